//! One RPC: its deadline, its cancellation, and its retries before the first message.

use std::error::Error as StdError;
use std::pin::Pin;
use std::sync::{Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use futures_core::Stream as _;
use prost::Message;
use tokio::time::{Instant, Sleep};
use tonic::client::Grpc;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::metadata::{
    AsciiMetadataKey, AsciiMetadataValue, BinaryMetadataKey, BinaryMetadataValue, MetadataMap,
};
use tonic::{Code, Status, Streaming};
use tonic_prost::ProstCodec;

use crate::channel::{BoxFuture, Gateway, Token};
use crate::errors::{Error, Pushback, REQUEST_ID_KEY, code_of, pushback};
use crate::mended::Mended;

/// Largest message in either direction: room for inline images. The gateway has the same.
pub(crate) const MAX_MESSAGE_BYTES: usize = 32 * 1024 * 1024;

const MAX_ATTEMPTS: u32 = 3;
const FIRST_BACKOFF: Duration = Duration::from_millis(200);
const LONGEST_BACKOFF: Duration = Duration::from_secs(5);

/// The RPCs of the contract. All may be retried: before the first message of an answer nothing
/// has been delivered, and the gateway says with pushback when a retry cannot help.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Method {
    Chat,
    StreamChat,
    BatchChat,
    CountTokens,
    Tokenize,
    ListModels,
    GetModel,
}

impl Method {
    fn path(self) -> PathAndQuery {
        PathAndQuery::from_static(match self {
            Self::Chat => "/tokenwire.v1.ChatService/Chat",
            Self::StreamChat => "/tokenwire.v1.ChatService/StreamChat",
            Self::BatchChat => "/tokenwire.v1.ChatService/BatchChat",
            Self::CountTokens => "/tokenwire.v1.TokenizerService/CountTokens",
            Self::Tokenize => "/tokenwire.v1.TokenizerService/Tokenize",
            Self::ListModels => "/tokenwire.v1.ModelService/ListModels",
            Self::GetModel => "/tokenwire.v1.ModelService/GetModel",
        })
    }

    /// Long answers take minutes; streams are watched by pings instead.
    fn default_timeout(self, of_client: Option<Duration>) -> Option<Duration> {
        match self {
            Self::StreamChat | Self::BatchChat => None,
            _ => of_client,
        }
    }
}

/// What every call takes.
#[derive(Default)]
pub(crate) struct CallOptions {
    /// `Some(None)`: no limit, where the client has one.
    #[allow(clippy::option_option)]
    pub(crate) timeout: Option<Option<Duration>>,
    pub(crate) request_id: Option<String>,
    pub(crate) metadata: Vec<(String, Vec<u8>)>,
    pub(crate) cancelled: Option<BoxFuture<()>>,
}

/// One RPC to make, with its limits running.
pub(crate) struct Call {
    method: Method,
    metadata: MetadataMap,
    pub(crate) request_id: String,
    limits: Limits,
}

/// What ends a call from this side.
pub(crate) struct Limits {
    deadline: Option<(Duration, Pin<Box<Sleep>>)>,
    cancelled: Option<BoxFuture<()>>,
}

impl Limits {
    pub(crate) fn without_deadline(cancelled: Option<BoxFuture<()>>) -> Self {
        Self { deadline: None, cancelled }
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Error> {
        if self.cancelled.as_mut().is_some_and(|it| it.as_mut().poll(cx).is_ready()) {
            self.cancelled = None; // a future is not polled after its end
            return Poll::Ready(Error::new(Code::Cancelled, "the call was cancelled here"));
        }
        if let Some((timeout, sleep)) = &mut self.deadline {
            ready!(sleep.as_mut().poll(cx));
            let message = format!("the deadline of {timeout:?} passed");
            return Poll::Ready(Error::new(Code::DeadlineExceeded, message));
        }
        Poll::Pending
    }

    /// The work's result, or what ended it.
    pub(crate) async fn over<T>(
        &mut self,
        work: impl Future<Output = Result<T, Error>>,
    ) -> Result<T, Error> {
        let mut work = std::pin::pin!(work);
        std::future::poll_fn(|cx| match self.poll(cx) {
            Poll::Ready(error) => Poll::Ready(Err(error)),
            Poll::Pending => work.as_mut().poll(cx),
        })
        .await
    }

    /// Whether there is time for a pause of this length.
    fn allow(&self, pause: Duration) -> bool {
        let end = self.deadline.as_ref().map(|(_, sleep)| sleep.deadline());
        end.is_none_or(|end| Instant::now() + pause < end)
    }
}

impl Call {
    pub(crate) fn new(
        method: Method,
        options: CallOptions,
        client_timeout: Option<Duration>,
    ) -> Result<Self, Error> {
        let request_id =
            options.request_id.unwrap_or_else(|| format!("{:032x}", fastrand::u128(..)));
        let mut metadata = MetadataMap::new();
        for (key, value) in options.metadata {
            insert(&mut metadata, &key.to_ascii_lowercase(), &value)?;
        }
        let printable =
            !request_id.is_empty() && request_id.bytes().all(|b| (0x20..0x7f).contains(&b));
        match AsciiMetadataValue::try_from(&request_id) {
            Ok(value) if printable => metadata.insert(REQUEST_ID_KEY, value),
            _ => {
                let got = format!("expected printable ASCII, got {request_id:?}");
                return Err(Error::invalid("request_id", got));
            }
        };
        let timeout = options.timeout.unwrap_or_else(|| method.default_timeout(client_timeout));
        // No clock goes on for ever: what does not fit is no limit.
        let end = timeout.and_then(|timeout| Some((timeout, Instant::now().checked_add(timeout)?)));
        let deadline = end.map(|(timeout, at)| (timeout, Box::pin(tokio::time::sleep_until(at))));
        let limits = Limits { deadline, cancelled: options.cancelled };
        Ok(Self { method, metadata, request_id, limits })
    }
}

fn insert(metadata: &mut MetadataMap, key: &str, value: &[u8]) -> Result<(), Error> {
    let refused = |why: &str| Error::invalid(format!("metadata[{key:?}]"), why);
    if [REQUEST_ID_KEY, "authorization"].contains(&key) {
        return Err(refused("has its own option (request_id, token)"));
    }
    if key.starts_with("grpc-") {
        return Err(refused("is gRPC's own"));
    }
    if key.ends_with("-bin") {
        let key: BinaryMetadataKey = key.parse().map_err(|_| refused("is no metadata key"))?;
        metadata.append_bin(key, BinaryMetadataValue::from_bytes(value));
        return Ok(());
    }
    let key: AsciiMetadataKey = key.parse().map_err(|_| refused("is no metadata key"))?;
    let value = AsciiMetadataValue::try_from(value);
    metadata.append(key, value.map_err(|_| refused("expected a value of printable ASCII"))?);
    Ok(())
}

/// What the calls of one client share.
pub(crate) struct Transport {
    pub(crate) gateway: Gateway,
    pub(crate) token: Token,
    pub(crate) throttle: Throttle,
}

impl Transport {
    /// Makes a call; the answer has begun, or ended, when this returns.
    pub(crate) async fn open<Q, A>(&self, call: Call, request: Q) -> Result<Receiving<A>, Error>
    where
        Q: Message + Clone + 'static,
        A: Message + Default + 'static,
    {
        let Call { method, mut metadata, request_id, mut limits } = call;
        if request.encoded_len() > MAX_MESSAGE_BYTES {
            let message = format!(
                "the request has {} bytes, more than the {MAX_MESSAGE_BYTES} of a message",
                request.encoded_len()
            );
            return Err(Error::new(Code::ResourceExhausted, message));
        }
        let end = limits.deadline.as_ref().map(|(_, sleep)| sleep.deadline());
        let ended = |error: Error| error.with_request_id(&request_id);
        if let Some(token) = limits.over(self.token.authorization()).await.map_err(ended)? {
            metadata.insert("authorization", token);
        }
        let mut made = 0;
        loop {
            let attempt = async { Ok(self.attempt(method, &metadata, end, request.clone()).await) };
            let failed = match limits.over(attempt).await.map_err(ended)? {
                Ok((streaming, first)) => {
                    self.throttle.succeeded();
                    return Ok(Receiving { streaming, first, limits, request_id });
                }
                Err(failed) => failed,
            };
            made += 1;
            let pause = failed.status().and_then(|status| self.throttle.pause(status, made));
            match pause {
                Some(pause) if limits.allow(pause) => {
                    let sleep = tokio::time::sleep(pause);
                    let paused = async {
                        sleep.await;
                        Ok(())
                    };
                    limits.over(paused).await.map_err(ended)?;
                }
                _ => return Err(failed.error(&request_id)),
            }
        }
    }

    /// One message is the whole answer.
    pub(crate) async fn unary<Q, A>(&self, call: Call, request: Q) -> Result<A, Error>
    where
        Q: Message + Clone + 'static,
        A: Message + Default + 'static,
    {
        let mut receiving = self.open::<Q, A>(call, request).await?;
        let none = || {
            let error = Error::incomplete("the server said OK, but sent no answer");
            error.with_request_id(&receiving.request_id)
        };
        let Some(answer) = receiving.first.take() else { return Err(none()) };
        // Only the status, which comes last, says that this was all.
        match receiving.next().await {
            None => Ok(answer),
            Some(Err(error)) => Err(error),
            Some(Ok(_)) => {
                let error = Error::new(Code::Internal, "the server sent more than one answer");
                Err(error.with_request_id(&receiving.request_id))
            }
        }
    }

    /// One attempt, on whichever replica can be connected to.
    async fn attempt<Q, A>(
        &self,
        method: Method,
        metadata: &MetadataMap,
        end: Option<Instant>,
        request: Q,
    ) -> Result<(Option<Streaming<A>>, Option<A>), Failed>
    where
        Q: Message + Clone + 'static,
        A: Message + Default + 'static,
    {
        let mut tried = Vec::new();
        let mut last = None;
        while let Some(picked) = self.gateway.pick(&tried).await.map_err(Failed::Unresolved)? {
            let mut message = tonic::Request::new(request.clone());
            *message.metadata_mut() = metadata.clone();
            if let Some(end) = end {
                message.set_timeout(end.saturating_duration_since(Instant::now()));
            }
            let mut grpc = Grpc::new(Mended(picked.channel.clone()))
                .max_decoding_message_size(MAX_MESSAGE_BYTES)
                .max_encoding_message_size(MAX_MESSAGE_BYTES);
            let begun = async {
                grpc.ready().await.map_err(|error| Status::from_error(Box::new(error)))?;
                let codec = ProstCodec::<Q, A>::default();
                let answer = grpc.server_streaming(message, method.path(), codec).await?;
                let mut streaming = answer.into_inner();
                let first = streaming.message().await?;
                Ok((first.is_some().then_some(streaming), first))
            };
            match begun.await {
                Err(status) if is_connecting(&status) => {
                    // Nothing was sent: another replica at once, and no attempt counted.
                    self.gateway.cannot_connect(&picked);
                    tried.push(picked);
                    last = Some(status);
                }
                ended => {
                    self.gateway.answered(&picked);
                    return ended.map_err(Failed::Answered);
                }
            }
        }
        Err(Failed::Answered(last.unwrap_or_else(|| Status::unavailable("no address"))))
    }
}

/// How an attempt failed.
enum Failed {
    Answered(Status),
    Unresolved(Error),
}

impl Failed {
    fn status(&self) -> Option<Status> {
        match self {
            Self::Answered(status) => Some(status.clone()),
            Self::Unresolved(error) if error.code() == Code::Unavailable => {
                Some(Status::unavailable("unresolved"))
            }
            Self::Unresolved(_) => None,
        }
    }

    fn error(self, request_id: &str) -> Error {
        match self {
            Self::Answered(status) => Error::from_status(&status, request_id),
            Self::Unresolved(error) => error.with_request_id(request_id),
        }
    }
}

fn is_connecting(status: &Status) -> bool {
    let mut cause = status.source();
    while let Some(error) = cause {
        if error.is::<tonic::ConnectError>() {
            return true;
        }
        cause = error.source();
    }
    false
}

/// When to try again: gRPC's retry policy and throttle (gRFC A6), which tonic does not have.
#[derive(Debug)]
pub(crate) struct Throttle {
    /// In tenths. Retries end while half of them are used up: a failure costs one, and ten calls that
    /// succeed earn one. Enough for the calls of a replica that dies, not for an outage.
    tokens: Mutex<i32>,
}

const MAX_TOKENS: i32 = 1000;
const COST_OF_FAILURE: i32 = 10;
const WORTH_OF_SUCCESS: i32 = 1;

impl Throttle {
    pub(crate) fn new() -> Self {
        Self { tokens: Mutex::new(MAX_TOKENS) }
    }

    fn succeeded(&self) {
        self.add(WORTH_OF_SUCCESS);
    }

    fn add(&self, worth: i32) -> i32 {
        let mut tokens = self.tokens.lock().unwrap_or_else(PoisonError::into_inner);
        *tokens = (*tokens + worth).clamp(0, MAX_TOKENS);
        *tokens
    }

    /// How long to wait before the next attempt, after `made` of them; `None` for no more.
    #[expect(clippy::needless_pass_by_value, reason = "the status was made for this")]
    fn pause(&self, status: Status, made: u32) -> Option<Duration> {
        let pushback = pushback(status.metadata());
        let is_unavailable = code_of(&status) == Code::Unavailable;
        if !is_unavailable && pushback != Some(Pushback::Never) {
            return None;
        }
        let tokens = self.add(-COST_OF_FAILURE);
        if !is_unavailable || made >= MAX_ATTEMPTS || tokens <= MAX_TOKENS / 2 {
            return None;
        }
        match pushback {
            Some(Pushback::Never) => None,
            Some(Pushback::After(delay)) => Some(delay),
            None => {
                let backoff = FIRST_BACKOFF.saturating_mul(1 << (made - 1)).min(LONGEST_BACKOFF);
                Some(backoff.mul_f64(0.8 + 0.4 * fastrand::f64()))
            }
        }
    }
}

/// An answer on its way. Dropping it cancels the call.
pub(crate) struct Receiving<A> {
    streaming: Option<Streaming<A>>,
    first: Option<A>,
    limits: Limits,
    pub(crate) request_id: String,
}

impl<A> Receiving<A> {
    pub(crate) fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<A, Error>>> {
        if let Some(first) = self.first.take() {
            return Poll::Ready(Some(Ok(first)));
        }
        let Some(streaming) = &mut self.streaming else { return Poll::Ready(None) };
        let ended = match self.limits.poll(cx) {
            Poll::Ready(error) => Some(Err(error.with_request_id(&self.request_id))),
            Poll::Pending => match ready!(Pin::new(streaming).poll_next(cx)) {
                Some(Ok(message)) => return Poll::Ready(Some(Ok(message))),
                Some(Err(status)) => Some(Err(Error::from_status(&status, &self.request_id))),
                None => None,
            },
        };
        self.streaming = None; // which frees what the call holds
        Poll::Ready(ended)
    }

    pub(crate) async fn next(&mut self) -> Option<Result<A, Error>> {
        std::future::poll_fn(|cx| self.poll_next(cx)).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unavailable(pushback: Option<&'static str>) -> Status {
        let mut status = Status::unavailable("");
        if let Some(value) = pushback {
            status.metadata_mut().insert("grpc-retry-pushback-ms", value.parse().unwrap());
        }
        status
    }

    #[test]
    fn backoff_doubles_with_jitter_and_ends_after_three_attempts() {
        for _ in 0..100 {
            let pause = |made| Throttle::new().pause(unavailable(None), made);
            assert!((160..=240).contains(&pause(1).unwrap().as_millis()));
            assert!((320..=480).contains(&pause(2).unwrap().as_millis()));
            assert_eq!(pause(3), None);
        }
    }

    #[cfg(feature = "testing")]
    #[tokio::test]
    async fn a_replica_that_is_gone_costs_neither_an_attempt_nor_a_pause() {
        use crate::testing::FakeGateway;
        use crate::v1;
        let (one, two) = (FakeGateway::start(), FakeGateway::start());
        let gone = FakeGateway::start().target();
        let gateway = Gateway::of_replicas(vec![gone, one.target(), two.target()]).unwrap();
        let transport = Transport { gateway, token: Token::None, throttle: Throttle::new() };
        for _ in 0..100 {
            if !one.calls().is_empty() && !two.calls().is_empty() {
                break;
            }
            let call = Call::new(Method::GetModel, CallOptions::default(), None).unwrap();
            let request = v1::GetModelRequest { name: "any".to_owned() };
            let _: v1::GetModelResponse = transport.unary(call, request).await.unwrap();
            // A replica takes its turns once it is connected to, which happens meanwhile.
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        assert!(!one.calls().is_empty() && !two.calls().is_empty());
        assert_eq!(*transport.throttle.tokens.lock().unwrap(), MAX_TOKENS);
    }

    /// Three gateways that a name may stand for: at other addresses, on one port.
    #[cfg(all(feature = "testing", target_os = "linux"))]
    fn beside_each_other() -> [(crate::testing::FakeGateway, std::net::SocketAddr); 3] {
        use std::net::{Ipv4Addr, SocketAddr, TcpListener};
        let bound = || {
            let first = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
            let port = first.local_addr()?.port();
            let at = |last| TcpListener::bind((Ipv4Addr::new(127, 0, 0, last), port));
            std::io::Result::Ok([first, at(2)?, at(3)?])
        };
        let listeners = (0..100).find_map(|_| bound().ok()).expect("a port that all have");
        listeners.map(|listener| {
            let address: SocketAddr = listener.local_addr().unwrap();
            (crate::testing::FakeGateway::builder().start_on(listener), address)
        })
    }

    #[cfg(all(feature = "testing", target_os = "linux"))]
    #[tokio::test]
    async fn a_name_stands_for_replicas_that_come_and_go() {
        use crate::channel::Names;
        use crate::v1;
        use std::net::SocketAddr;
        use std::sync::Arc;

        type Said = Option<Vec<SocketAddr>>;
        let [(one, at_one), (two, at_two), (three, at_three)] = beside_each_other();
        let said: Arc<Mutex<Said>> = Arc::default();
        let dns = said.clone();
        let lookup = move |host: String, port| -> BoxFuture<std::io::Result<Vec<SocketAddr>>> {
            assert_eq!((&*host, port), ("gateway.internal", at_one.port()));
            let answer = dns.lock().unwrap().clone();
            Box::pin(async { answer.ok_or_else(|| std::io::Error::other("no such name")) })
        };
        let short = Duration::from_millis(1);
        let names = Names { lookup: Arc::new(lookup), keep: short, keep_in_need: short };
        let target = format!("gateway.internal:{}", at_one.port());
        let gateway = Gateway::found_by(&target, None, Arc::new(|it| it), names).unwrap();
        let transport = Transport { gateway, token: Token::None, throttle: Throttle::new() };
        let ask = async || {
            let call = Call::new(Method::GetModel, CallOptions::default(), None).unwrap();
            let request = v1::GetModelRequest { name: "any".to_owned() };
            transport.unary::<_, v1::GetModelResponse>(call, request).await
        };
        let is_met = async |gateway: &crate::testing::FakeGateway| {
            let before = gateway.calls().len();
            for _ in 0..500 {
                ask().await.unwrap();
                if gateway.calls().len() > before {
                    return true;
                }
                tokio::time::sleep(Duration::from_millis(5)).await; // DNS is asked meanwhile
            }
            false
        };

        let error = ask().await.unwrap_err();
        assert_eq!(error.code(), Code::Unavailable);
        assert_eq!(error.message(), "cannot resolve \"gateway.internal\": no such name");
        *said.lock().unwrap() = Some(vec![at_one, at_two]);
        assert!(is_met(&one).await && is_met(&two).await);
        *said.lock().unwrap() = Some(vec![at_two, at_three]);
        assert!(is_met(&three).await && is_met(&two).await);
        let gone = one.calls().len();
        // What was known serves on where DNS fails, or says nothing.
        for silence in [None, Some(Vec::new())] {
            *said.lock().unwrap() = silence;
            assert!(is_met(&two).await && is_met(&three).await);
        }
        assert_eq!(one.calls().len(), gone);
        // A replica that cannot be reached fails no call, and costs no attempt.
        *said.lock().unwrap() = Some(vec![at_one, at_two, at_three]);
        drop(three);
        assert!(is_met(&one).await && is_met(&two).await && is_met(&one).await);
    }

    #[test]
    fn pushback_is_obeyed() {
        let pause = |value| Throttle::new().pause(unavailable(Some(value)), 1);
        assert_eq!(pause("1500"), Some(Duration::from_millis(1500)));
        assert_eq!(pause("0"), Some(Duration::ZERO));
        assert_eq!(pause("-1"), None);
        assert_eq!(pause("soon"), None);
    }

    #[test]
    fn only_unavailable_is_retried() {
        for code in (0..17).map(Code::from_i32).filter(|code| *code != Code::Unavailable) {
            assert_eq!(Throttle::new().pause(Status::new(code, ""), 1), None, "{code:?}");
        }
    }

    #[test]
    fn many_failures_end_retries_and_successes_allow_them_again() {
        let throttle = Throttle::new();
        let retried = (0..100).filter(|_| throttle.pause(unavailable(None), 1).is_some()).count();
        assert_eq!(retried, 49);
        (0..600).for_each(|_| throttle.succeeded());
        assert!(throttle.pause(unavailable(None), 1).is_some());
    }

    #[test]
    fn metadata_of_the_clients_own_is_refused() {
        for (key, value) in [
            ("x-request-id", "a"),
            ("Authorization", "a"),
            ("grpc-timeout", "1S"),
            ("a b", "a"),
            ("a", "\n"),
        ] {
            let metadata = vec![(key.to_owned(), value.as_bytes().to_vec())];
            let options = CallOptions { metadata, ..CallOptions::default() };
            let error = Call::new(Method::StreamChat, options, None).err().expect(key);
            assert!(error.field_violations()[0].field.starts_with("metadata["), "{error}");
        }
        for id in ["", "a\nb", "é"] {
            let options = CallOptions { request_id: Some(id.to_owned()), ..CallOptions::default() };
            assert!(Call::new(Method::StreamChat, options, None).is_err(), "{id}");
        }
    }
}
