//! The one error of the client: what a failed call said, decoded.

use std::collections::BTreeMap;
use std::error::Error as StdError;
use std::fmt;
use std::time::Duration;

use prost::Message;
use tonic::metadata::MetadataMap;
use tonic::{Code, Status};
use tonic_types::pb;

use crate::reasons::Reason;
use crate::replies::Reply;

pub(crate) const PUSHBACK_KEY: &str = "grpc-retry-pushback-ms";
pub(crate) const REQUEST_ID_KEY: &str = "x-request-id";

/// A call that failed.
///
/// [`code`](Error::code) and [`reason`](Error::reason) are for programs; the text is for people
/// and may change. Cheap to clone and to move.
#[derive(Clone)]
pub struct Error(Box<Inner>);

#[derive(Clone)]
struct Inner {
    code: Code,
    message: String,
    reason: Reason,
    retry_after: Option<Duration>,
    request_id: String,
    field_violations: Vec<FieldViolation>,
    metadata: BTreeMap<String, String>,
    partial: Option<Reply>,
    proto: pb::Status,
    source: Option<std::sync::Arc<dyn StdError + Send + Sync>>,
}

/// One field of a request that was not accepted.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct FieldViolation {
    /// Path in the request, for example `messages[0].role`.
    pub field: String,
    /// What was there and what was expected.
    pub description: String,
}

impl fmt::Display for FieldViolation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.field, self.description)
    }
}

impl Error {
    /// The gRPC status code.
    pub fn code(&self) -> Code {
        self.0.code
    }

    /// Why, for programs: `match` it, print it, or compare it with text.
    ///
    /// [`Reason::Unspecified`], printed as `""`, when the status did not come from a gateway; but
    /// a stream whose connection broke amid its answer has
    /// [`Reason::UpstreamStreamInterrupted`], as the gateway would say.
    pub fn reason(&self) -> &Reason {
        &self.0.reason
    }

    /// One line for people.
    pub fn message(&self) -> &str {
        &self.0.message
    }

    /// How long to wait before another try; `None` when nobody said.
    pub fn retry_after(&self) -> Option<Duration> {
        self.0.retry_after
    }

    /// The call's `x-request-id`, to quote to whoever runs the gateway; `""` when nothing was
    /// sent.
    pub fn request_id(&self) -> &str {
        &self.0.request_id
    }

    /// Upstream requests the gateway made for this call; 0 when it did not say.
    pub fn attempts(&self) -> u32 {
        self.0.metadata.get("attempts").and_then(|text| text.parse().ok()).unwrap_or(0)
    }

    /// The `ErrorInfo` metadata: `upstream`, `upstreamStatus`, `attempts`, `trail`, ...
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.0.metadata
    }

    /// The fields that were not accepted.
    pub fn field_violations(&self) -> &[FieldViolation] {
        &self.0.field_violations
    }

    /// For a stream, what had arrived before it failed.
    pub fn partial(&self) -> Option<&Reply> {
        self.0.partial.as_ref()
    }

    /// Text of the first choice that had arrived; `""` when none had.
    pub fn partial_text(&self) -> &str {
        self.0.partial.as_ref().map_or("", Reply::text)
    }

    /// Whether the same call may succeed later, after [`retry_after`](Error::retry_after) if
    /// that is set.
    ///
    /// The client and the gateway have made their own retries by then. Repeating a stream
    /// repeats, and bills, the part that had arrived.
    pub fn is_retryable(&self) -> bool {
        match self.0.code {
            Code::Unavailable => true,
            // Without a time to wait for, what is exhausted does not refill by itself: credit,
            // or a request larger than the limit.
            Code::ResourceExhausted => self.0.retry_after.is_some(),
            _ => false,
        }
    }

    /// The google.rpc.Status with every detail as it was sent.
    pub fn proto(&self) -> &pb::Status {
        &self.0.proto
    }

    pub(crate) fn new(code: Code, message: impl Into<String>) -> Self {
        let message = message.into();
        let proto = pb::Status { code: code as i32, message, details: Vec::new() };
        Self::from_proto(proto, String::new())
    }

    /// A request that makes no sense: nothing was sent.
    pub(crate) fn invalid(field: impl Into<String>, description: impl Into<String>) -> Self {
        let violation = FieldViolation { field: field.into(), description: description.into() };
        let mut error = Self::new(Code::InvalidArgument, violation.to_string());
        error.0.field_violations.push(violation);
        error
    }

    pub(crate) fn incomplete(message: impl Into<String>) -> Self {
        let mut error = Self::new(Code::Internal, message);
        error.0.reason = Reason::StreamIncomplete;
        error
    }

    /// The error a finished call stands for.
    pub(crate) fn from_status(status: &Status, request_id: &str) -> Self {
        let code = code_of(status);
        // Somebody else's details do not hide the code and the message.
        let mut proto = pb::Status::decode(status.details()).unwrap_or_default();
        proto.code = code as i32;
        proto.message = match status.source() {
            Some(source) if code != Code::Cancelled => told(status.message(), source),
            _ => status.message().to_owned(),
        };
        let mut error = Self::from_proto(proto, request_id.to_owned());
        let echoed = text(status.metadata(), REQUEST_ID_KEY);
        if let (Some(echoed), None) = (echoed, error.0.metadata.get("requestId")) {
            echoed.clone_into(&mut error.0.request_id);
        }
        if error.0.retry_after.is_none() {
            error.0.retry_after = match pushback(status.metadata()) {
                Some(Pushback::After(delay)) if !delay.is_zero() => Some(delay),
                _ => None,
            };
        }
        if status.source().is_some() {
            error.0.source = Some(std::sync::Arc::new(status.clone()));
        }
        error
    }

    /// The error a google.rpc.Status stands for.
    pub(crate) fn from_proto(proto: pb::Status, request_id: String) -> Self {
        let info = detail::<pb::ErrorInfo>(&proto, "google.rpc.ErrorInfo")
            .filter(|info| info.domain == "tokenwire")
            .unwrap_or_default();
        let metadata: BTreeMap<_, _> = info.metadata.into_iter().collect();
        let retry_after = detail::<pb::RetryInfo>(&proto, "google.rpc.RetryInfo")
            .and_then(|retry| retry.retry_delay)
            .map(|delay| Duration::try_from(delay).unwrap_or_default());
        let refused = detail::<pb::BadRequest>(&proto, "google.rpc.BadRequest").unwrap_or_default();
        let field_violations = refused
            .field_violations
            .into_iter()
            .map(|each| FieldViolation { field: each.field, description: each.description })
            .collect();
        let message = if proto.message.is_empty() { "no message" } else { &proto.message };
        Self(Box::new(Inner {
            code: match Code::from_i32(proto.code) {
                Code::Ok => Code::Unknown, // an error that says OK is still an error
                code => code,
            },
            message: message.to_owned(),
            reason: info.reason.into(),
            retry_after,
            request_id: metadata.get("requestId").cloned().unwrap_or(request_id),
            field_violations,
            metadata,
            partial: None,
            proto,
            source: None,
        }))
    }

    pub(crate) fn with_request_id(mut self, request_id: &str) -> Self {
        request_id.clone_into(&mut self.0.request_id);
        self
    }

    /// Of a stream. Where its connection broke amid the answer, nobody was left to give a reason:
    /// it is the one that the gateway would give.
    pub(crate) fn with_partial(mut self, partial: Reply) -> Self {
        let broken = self.0.code == Code::Unavailable && self.0.reason == Reason::Unspecified;
        if broken && partial.choices().len() > 0 {
            self.0.reason = Reason::UpstreamStreamInterrupted;
        }
        self.0.partial = Some(partial);
        self
    }

    pub(crate) fn within(mut self, place: &str) -> Self {
        for violation in &mut self.0.field_violations {
            violation.field = format!("{place}.{}", violation.field);
        }
        self.0.message = format!("{place}.{}", self.0.message);
        self.0.proto.message.clone_from(&self.0.message);
        self
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Inner { code, message, reason, retry_after, request_id, .. } = &*self.0;
        if *reason == Reason::Unspecified {
            write!(f, "{code:?}: {message}")?;
        } else {
            write!(f, "{reason}: {message}")?;
        }
        let mut facts = Vec::new();
        if let Some(delay) = retry_after {
            facts.push(format!("retry after {delay:?}"));
        }
        if self.attempts() > 1 {
            facts.push(format!("{} attempts", self.attempts()));
        }
        if !request_id.is_empty() {
            facts.push(format!("request {request_id}"));
        }
        if !facts.is_empty() {
            write!(f, " ({})", facts.join(", "))?;
        }
        // A message made of its only violation does not need it again.
        let told = |violation: &&FieldViolation| !message.contains(&violation.to_string());
        for violation in self.0.field_violations.iter().filter(told) {
            write!(f, "\n  {violation}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Error")
            .field("code", &self.0.code)
            .field("reason", &self.0.reason)
            .field("message", &self.0.message)
            .field("request_id", &self.0.request_id)
            .finish_non_exhaustive()
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.0.source.as_ref().map(|source| &**source as &(dyn StdError + 'static))
    }
}

/// Text that was to be JSON of some shape, and is not.
///
/// From [`Reply::json`](crate::Reply::json) and
/// [`ToolCall::arguments`](crate::ToolCall::arguments).
#[derive(Debug)]
pub struct JsonError {
    what: String,
    text: String,
    source: serde_json::Error,
}

impl JsonError {
    pub(crate) fn new(what: String, text: &str, source: serde_json::Error) -> Self {
        Self { what, text: text.to_owned(), source }
    }

    /// The whole text.
    pub fn text(&self) -> &str {
        &self.text
    }
}

impl fmt::Display for JsonError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let start: String = self.text.chars().take(80).collect();
        let more = if start.len() < self.text.len() { "…" } else { "" };
        write!(f, "the {} is not the JSON expected: {}: {start:?}{more}", self.what, self.source)
    }
}

impl StdError for JsonError {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        Some(&self.source)
    }
}

/// What the server says about retries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pushback {
    Never,
    After(Duration),
}

/// As gRFC A6: anything that is no delay means never.
pub(crate) fn pushback(metadata: &MetadataMap) -> Option<Pushback> {
    let value = metadata.get(PUSHBACK_KEY)?;
    let millis = value.to_str().ok().and_then(|text| text.parse::<u32>().ok());
    Some(
        millis.map_or(Pushback::Never, |millis| {
            Pushback::After(Duration::from_millis(millis.into()))
        }),
    )
}

/// The code that gRPC has for how a call ended.
///
/// A status with a source was made here, for a connection that failed. tonic leaves most of those
/// as UNKNOWN or CANCELLED, but nobody cancelled, and only UNAVAILABLE is worth a retry.
pub(crate) fn code_of(status: &Status) -> Code {
    let mut cause = status.source();
    if cause.is_none() {
        // tonic's word for a message beyond the limit; gRPC has another.
        let is_large = status.message().starts_with("Error, decoded message length too large");
        return if is_large { Code::ResourceExhausted } else { status.code() };
    }
    while let Some(error) = cause {
        if error.is::<tonic::TimeoutExpired>() {
            return Code::DeadlineExceeded;
        }
        if let Some(error) = error.downcast_ref::<h2::Error>() {
            return match error.reason() {
                Some(reason) if error.is_reset() => code_of_reset(reason),
                _ => Code::Unavailable,
            };
        }
        cause = error.source();
    }
    match status.code() {
        Code::Unknown | Code::Cancelled => Code::Unavailable,
        code => code,
    }
}

/// The table of gRPC's own document about HTTP/2.
fn code_of_reset(reason: h2::Reason) -> Code {
    match reason {
        h2::Reason::REFUSED_STREAM => Code::Unavailable,
        h2::Reason::CANCEL => Code::Cancelled,
        h2::Reason::ENHANCE_YOUR_CALM => Code::ResourceExhausted,
        h2::Reason::INADEQUATE_SECURITY => Code::PermissionDenied,
        _ => Code::Internal,
    }
}

/// The last cause is what people need to know: "connection refused", for example.
fn told(message: &str, source: &(dyn StdError + 'static)) -> String {
    let mut last = source;
    while let Some(next) = last.source() {
        last = next;
    }
    let cause = last.to_string();
    if message.contains(&cause) { message.to_owned() } else { format!("{message}: {cause}") }
}

pub(crate) fn text<'a>(metadata: &'a MetadataMap, key: &str) -> Option<&'a str> {
    metadata.get(key).and_then(|value| value.to_str().ok())
}

fn detail<M: Message + Default>(status: &pb::Status, name: &str) -> Option<M> {
    status
        .details
        .iter()
        .filter(|packed| packed.type_url.rsplit('/').next() == Some(name))
        // A damaged detail is no reason to hide the error it came with.
        .find_map(|packed| M::decode(&*packed.value).ok())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::v1;

    #[test]
    fn a_stream_whose_connection_broke_was_interrupted() {
        let broken = |code: i32, begun: bool| {
            let mut answer = crate::Accumulator::new();
            if begun {
                let text = v1::Delta { content: "Hel".to_owned(), ..v1::Delta::default() };
                let event = Some(v1::stream_chat_response::Event::Delta(text));
                answer.add(v1::StreamChatResponse { event });
            }
            let status = pb::Status { code, message: "EOF".to_owned(), details: vec![] };
            let error = Error::from_proto(status, String::new());
            error.with_partial(answer.so_far("r")).reason().clone()
        };
        assert_eq!(broken(14, true), Reason::UpstreamStreamInterrupted);
        assert_eq!(broken(14, false), Reason::Unspecified); // nothing of an answer had come
        assert_eq!(broken(1, true), Reason::Unspecified);
    }

    #[test]
    fn a_damaged_detail_hides_no_other() {
        let info = pb::ErrorInfo {
            reason: "RATE_LIMITED".to_owned(),
            domain: "tokenwire".to_owned(),
            ..pb::ErrorInfo::default()
        };
        let packed = |value| prost_types::Any {
            type_url: "type.googleapis.com/google.rpc.ErrorInfo".to_owned(),
            value,
        };
        let details = vec![packed(vec![0xff]), packed(info.encode_to_vec())];
        let status = pb::Status { code: 8, message: String::new(), details };
        let error = Error::from_proto(status, String::new());
        assert_eq!((error.reason(), error.message()), (&Reason::RateLimited, "no message"));
    }
}
