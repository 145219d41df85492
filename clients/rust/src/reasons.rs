//! Why a call failed, as a program can switch on it: the reasons of the contract by name.

use std::fmt;

use crate::v1;

macro_rules! reasons {
    ($($(#[$doc:meta])* $name:ident = $text:literal,)*) => {
        /// Why a call failed, in one word: an `ErrorReason` of the contract, or
        /// [`StreamIncomplete`](Reason::StreamIncomplete), which this client makes itself.
        ///
        /// New ones may come: treat one that you do not know by its code. What each asks of you is
        /// in docs/errors.md of the repository. It is compared with text, too:
        /// `*error.reason() == "RATE_LIMITED"`.
        ///
        /// ```
        /// use tokenwire::{Error, Reason};
        ///
        /// fn advice(error: &Error) -> &'static str {
        ///     match error.reason() {
        ///         Reason::RateLimited | Reason::CallerQuotaExceeded => "wait",
        ///         Reason::ContextLengthExceeded => "shorten",
        ///         _ if error.is_retryable() => "again",
        ///         _ => "give up",
        ///     }
        /// }
        /// ```
        #[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        pub enum Reason {
            /// The status did not come from a gateway: nothing listens, a proxy answered, a
            /// deadline passed here, the request made no sense.
            #[default]
            Unspecified,
            $($(#[$doc])* $name,)*
            /// The server said OK before the answer was whole. Made by this client.
            StreamIncomplete,
            /// Newer than this crate, by its name.
            Other(Box<str>),
        }

        impl Reason {
            /// The name as it travels, for example `"RATE_LIMITED"`; `""` for
            /// [`Unspecified`](Reason::Unspecified).
            pub fn as_str(&self) -> &str {
                match self {
                    Self::Unspecified => "",
                    $(Self::$name => $text,)*
                    Self::StreamIncomplete => "STREAM_INCOMPLETE",
                    Self::Other(name) => name,
                }
            }
        }

        impl From<&str> for Reason {
            fn from(name: &str) -> Self {
                match name {
                    "" => Self::Unspecified,
                    $($text => Self::$name,)*
                    "STREAM_INCOMPLETE" => Self::StreamIncomplete,
                    other => Self::Other(other.into()),
                }
            }
        }

        /// Those of the attempts in a [`ResponseHeader`](v1::ResponseHeader), for example.
        impl From<v1::ErrorReason> for Reason {
            fn from(reason: v1::ErrorReason) -> Self {
                match reason {
                    v1::ErrorReason::Unspecified => Self::Unspecified,
                    $(v1::ErrorReason::$name => Self::$name,)*
                }
            }
        }
    };
}

reasons! {
    /// The request is malformed, or the upstream refused it as malformed.
    InvalidRequest = "INVALID_REQUEST",
    /// Prompt plus reserved output exceeds the context window.
    ContextLengthExceeded = "CONTEXT_LENGTH_EXCEEDED",
    /// The upstream does not take a parameter.
    UnsupportedParameter = "UNSUPPORTED_PARAMETER",
    /// A role is neither known nor in the role templates.
    UnknownRole = "UNKNOWN_ROLE",
    /// The request is larger than the gateway or the upstream allows.
    RequestTooLarge = "REQUEST_TOO_LARGE",
    /// The prompt was refused by a content filter.
    ContentFiltered = "CONTENT_FILTERED",
    /// No such model, or not for this caller.
    ModelNotFound = "MODEL_NOT_FOUND",
    /// The caller's own token is missing or wrong.
    CallerUnauthenticated = "CALLER_UNAUTHENTICATED",
    /// The caller may not do this.
    CallerForbidden = "CALLER_FORBIDDEN",
    /// The caller's own quota at the gateway is used up.
    CallerQuotaExceeded = "CALLER_QUOTA_EXCEEDED",
    /// Every usable upstream key is rate limited.
    RateLimited = "RATE_LIMITED",
    /// Every upstream key is out of credit.
    UpstreamQuotaExhausted = "UPSTREAM_QUOTA_EXHAUSTED",
    /// The upstream rejected every key of the gateway; the caller's own token is fine.
    UpstreamCredentialsRejected = "UPSTREAM_CREDENTIALS_REJECTED",
    /// The upstream refused the gateway's account: region, address or permission.
    UpstreamAccessDenied = "UPSTREAM_ACCESS_DENIED",
    /// The upstream could not be connected to.
    UpstreamUnreachable = "UPSTREAM_UNREACHABLE",
    /// The upstream was too slow, within the caller's deadline.
    UpstreamTimeout = "UPSTREAM_TIMEOUT",
    /// The upstream said it is overloaded.
    UpstreamOverloaded = "UPSTREAM_OVERLOADED",
    /// The upstream failed.
    UpstreamError = "UPSTREAM_ERROR",
    /// The upstream answered with something that is not the protocol.
    UpstreamProtocolError = "UPSTREAM_PROTOCOL_ERROR",
    /// The upstream's stream ended early: what arrived is a true prefix, and not the whole.
    UpstreamStreamInterrupted = "UPSTREAM_STREAM_INTERRUPTED",
    /// This instance of the gateway is full; another may not be.
    GatewayOverloaded = "GATEWAY_OVERLOADED",
    /// This instance of the gateway is shutting down; another is not.
    GatewayDraining = "GATEWAY_DRAINING",
    /// The caller's deadline passed first.
    DeadlineExceeded = "DEADLINE_EXCEEDED",
    /// The caller cancelled.
    Cancelled = "CANCELLED",
    /// A defect of the gateway, logged there under the request id.
    Internal = "INTERNAL",
    /// The caller did not read its stream for too long.
    CallerStalled = "CALLER_STALLED",
    /// The gateway cannot load the tokenizer of this model; chats are not affected.
    TokenizerUnavailable = "TOKENIZER_UNAVAILABLE",
}

impl From<String> for Reason {
    fn from(name: String) -> Self {
        name.as_str().into()
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl PartialEq<str> for Reason {
    fn eq(&self, name: &str) -> bool {
        self.as_str() == name
    }
}

impl PartialEq<&str> for Reason {
    fn eq(&self, name: &&str) -> bool {
        self.as_str() == *name
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test] // that each has a variant is the compiler's to see: `From` leaves none out
    fn every_reason_of_the_contract_keeps_its_name() {
        let mut known = 0;
        for reason in (1..).map_while(|number| v1::ErrorReason::try_from(number).ok()) {
            let name = reason.as_str_name().trim_start_matches("ERROR_REASON_");
            assert_eq!(Reason::from(name), Reason::from(reason));
            assert_eq!(Reason::from(reason).as_str(), name);
            known += 1;
        }
        assert!(known >= 27);
    }

    #[test]
    fn a_newer_one_is_kept_by_name_and_none_is_nothing() {
        let newer = Reason::from("MODEL_ASLEEP".to_owned());
        assert_eq!(newer, Reason::Other("MODEL_ASLEEP".into()));
        assert!(newer == "MODEL_ASLEEP" && format!("{newer}!") == "MODEL_ASLEEP!");
        assert_eq!(Reason::from(""), Reason::default());
        assert_eq!(Reason::from("STREAM_INCOMPLETE"), Reason::StreamIncomplete);
        assert_eq!(format!("{:>13}", Reason::RateLimited), " RATE_LIMITED");
    }
}
