//! A gateway inside your test process: real gRPC on a loopback port, answers from a script.
//!
//! ```
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), tokenwire::Error> {
//! use tokenwire::testing::FakeGateway;
//!
//! let gateway = FakeGateway::start();
//! gateway.reply(["Hello", " world"]);
//! let reply = gateway.client().chat("Hi").model("any").send().await?;
//! assert_eq!(reply.text(), "Hello world");
//! # Ok(())
//! # }
//! ```
//!
//! It speaks the contract as the gateway does (order of events, error details, trailers), except
//! where a test asks it not to ([`cut`](FakeGateway::cut)). It calls no model and counts words as
//! tokens. Calls beyond the script fail with INTERNAL.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::convert::Infallible;
use std::fmt;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::thread::JoinHandle;
use std::time::Duration;

use prost::Message;
use serde::Serialize;
use tokio::sync::{oneshot, watch};
use tonic::body::Body;
use tonic::codegen::{BoxFuture, Service, http};
use tonic::metadata::MetadataMap;
use tonic::transport::Server;
use tonic::transport::server::{ServerTlsConfig, TcpIncoming};
use tonic::{Code, Request, Response, Status};
use tonic_types::pb;

use crate::call::MAX_MESSAGE_BYTES;
use crate::client::{Builder, Client};
use crate::errors::{PUSHBACK_KEY, REQUEST_ID_KEY, text};
use crate::reasons::Reason;
use crate::replies::Accumulator;
use crate::requests::content_text;
use crate::v1::batch_chat_response::Result as Ended;
use crate::v1::chat_service_server::{ChatService, ChatServiceServer};
use crate::v1::model_service_server::{ModelService, ModelServiceServer};
use crate::v1::stream_chat_response::Event as Kind;
use crate::v1::tokenizer_service_server::{TokenizerService, TokenizerServiceServer};
use crate::v1::{self, FinishReason};

/// One part of a scripted answer: text, a [`v1::Delta`], any event, or a pause.
#[derive(Clone, Debug)]
pub struct Part(Step);

#[derive(Clone, Debug)]
#[allow(clippy::large_enum_variant)]
enum Step {
    Event(v1::StreamChatResponse),
    Pause(Duration),
}

impl Part {
    /// An empty message, which keeps a silent stream alive.
    pub fn heartbeat() -> Self {
        v1::StreamChatResponse::default().into()
    }

    /// Silence, in a stream; no time passes in a unary call.
    pub fn pause(time: Duration) -> Self {
        Self(Step::Pause(time))
    }
}

impl From<&str> for Part {
    fn from(text: &str) -> Self {
        text.to_owned().into()
    }
}

impl From<String> for Part {
    fn from(content: String) -> Self {
        v1::Delta { content, ..v1::Delta::default() }.into()
    }
}

impl From<v1::Delta> for Part {
    fn from(delta: v1::Delta) -> Self {
        v1::StreamChatResponse { event: Some(Kind::Delta(delta)) }.into()
    }
}

impl From<v1::StreamChatResponse> for Part {
    fn from(event: v1::StreamChatResponse) -> Self {
        Self(Step::Event(event))
    }
}

/// A part that calls a function; `arguments` is text as it is, anything else as JSON.
///
/// # Panics
/// When `arguments` cannot be written as JSON.
pub fn tool_call(name: impl Into<String>, arguments: impl Serialize) -> Part {
    let call = v1::ToolCallDelta {
        index: 0,
        id: "call_1".to_owned(),
        name: name.into(),
        arguments: content_text(&arguments).expect("arguments that are JSON"),
        custom: false,
    };
    v1::Delta { tool_calls: vec![call], ..v1::Delta::default() }.into()
}

/// How a scripted call fails: as the gateway fails, unless told otherwise.
#[derive(Clone, Debug)]
pub struct Failure {
    reason: Reason,
    message: String,
    code: Option<Code>,
    after: Vec<Part>,
    retry_after: Option<Duration>,
    #[allow(clippy::option_option)]
    pushback_ms: Option<Option<i64>>,
    field_violations: Vec<pb::bad_request::FieldViolation>,
    metadata: BTreeMap<String, String>,
}

impl Failure {
    /// `reason` is a [`Reason`] or its name; `""` for a status without details, as a proxy sends:
    /// UNAVAILABLE unless a code is given.
    pub fn new(reason: impl Into<Reason>) -> Self {
        Self {
            reason: reason.into(),
            message: "scripted by the test".to_owned(),
            code: None,
            after: Vec::new(),
            retry_after: None,
            pushback_ms: None,
            field_violations: Vec::new(),
            metadata: BTreeMap::new(),
        }
    }

    /// Text for people.
    #[must_use]
    pub fn message(mut self, message: impl Into<String>) -> Self {
        self.message = message.into();
        self
    }

    /// The status code; the reason's own unless given.
    #[must_use]
    pub fn code(mut self, code: Code) -> Self {
        self.code = Some(code);
        self
    }

    /// What a stream sends first.
    #[must_use]
    pub fn after<P: Into<Part>>(mut self, parts: impl IntoIterator<Item = P>) -> Self {
        self.after = parts.into_iter().map(Into::into).collect();
        self
    }

    /// How long the caller should wait.
    #[must_use]
    pub fn retry_after(mut self, delay: Duration) -> Self {
        self.retry_after = Some(delay);
        self
    }

    /// What the client's own retries are told in milliseconds: -1 for none, `None` for nothing.
    ///
    /// Unless given it is the gateway's way: nothing where another instance may help, else the
    /// time to wait, else -1.
    #[must_use]
    pub fn pushback_ms(mut self, pushback: impl Into<Option<i64>>) -> Self {
        self.pushback_ms = Some(pushback.into());
        self
    }

    /// A field that is not accepted; may be repeated.
    #[must_use]
    pub fn field_violation(
        mut self,
        field: impl Into<String>,
        description: impl Into<String>,
    ) -> Self {
        self.field_violations.push(pb::bad_request::FieldViolation {
            field: field.into(),
            description: description.into(),
            ..Default::default()
        });
        self
    }

    /// Metadata of the `ErrorInfo`, such as `attempts`; may be repeated.
    #[must_use]
    pub fn metadata(mut self, key: impl Into<String>, value: impl Into<String>) -> Self {
        self.metadata.insert(key.into(), value.into());
        self
    }

    fn proto(&self) -> pb::Status {
        let mut details = Vec::new();
        if self.reason != Reason::Unspecified {
            details.push(packed(
                "ErrorInfo",
                &pb::ErrorInfo {
                    reason: self.reason.to_string(),
                    domain: "tokenwire".to_owned(),
                    metadata: self.metadata.clone().into_iter().collect(),
                },
            ));
        }
        if let Some(delay) = self.retry_after {
            let retry_delay = prost_types::Duration::try_from(delay).ok();
            details.push(packed("RetryInfo", &pb::RetryInfo { retry_delay }));
        }
        if !self.field_violations.is_empty() {
            let field_violations = self.field_violations.clone();
            details.push(packed("BadRequest", &pb::BadRequest { field_violations }));
        }
        let code = self.code.unwrap_or_else(|| code_of(&self.reason));
        pb::Status { code: code as i32, message: self.message.clone(), details }
    }

    fn status(&self, request_id: Option<&str>) -> Status {
        let proto = self.proto();
        let mut metadata = MetadataMap::new();
        if let Some(id) = request_id.and_then(|id| id.parse().ok()) {
            metadata.insert(REQUEST_ID_KEY, id);
        }
        let elsewhere = matches!(
            self.reason,
            Reason::Unspecified | Reason::GatewayOverloaded | Reason::GatewayDraining
        );
        let after = self.retry_after.map_or(-1, |delay| delay.as_millis().try_into().unwrap_or(-1));
        let pushback = self.pushback_ms.unwrap_or((!elsewhere).then_some(after));
        if let Some(pushback) = pushback {
            metadata.insert(PUSHBACK_KEY, pushback.into());
        }
        let details = if proto.details.is_empty() { Vec::new() } else { proto.encode_to_vec() };
        let code = Code::from_i32(proto.code);
        Status::with_details_and_metadata(code, proto.message, details.into(), metadata)
    }
}

impl From<&str> for Failure {
    fn from(reason: &str) -> Self {
        Self::new(reason)
    }
}

impl From<Reason> for Failure {
    fn from(reason: Reason) -> Self {
        Self::new(reason)
    }
}

fn packed(name: &str, detail: &impl Message) -> prost_types::Any {
    let type_url = format!("type.googleapis.com/google.rpc.{name}");
    prost_types::Any { type_url, value: detail.encode_to_vec() }
}

/// The status code that goes with a reason, as `error_reason.proto` says.
fn code_of(reason: &Reason) -> Code {
    match reason {
        Reason::InvalidRequest
        | Reason::ContextLengthExceeded
        | Reason::UnsupportedParameter
        | Reason::UnknownRole
        | Reason::ContentFiltered => Code::InvalidArgument,
        Reason::RequestTooLarge
        | Reason::CallerQuotaExceeded
        | Reason::RateLimited
        | Reason::UpstreamQuotaExhausted => Code::ResourceExhausted,
        Reason::ModelNotFound => Code::NotFound,
        Reason::CallerUnauthenticated => Code::Unauthenticated,
        Reason::CallerForbidden => Code::PermissionDenied,
        Reason::UpstreamCredentialsRejected
        | Reason::UpstreamAccessDenied
        | Reason::TokenizerUnavailable => Code::FailedPrecondition,
        Reason::DeadlineExceeded => Code::DeadlineExceeded,
        Reason::Cancelled => Code::Cancelled,
        Reason::CallerStalled => Code::Aborted,
        Reason::Internal => Code::Internal,
        Reason::Unspecified
        | Reason::UpstreamUnreachable
        | Reason::UpstreamTimeout
        | Reason::UpstreamOverloaded
        | Reason::UpstreamError
        | Reason::UpstreamProtocolError
        | Reason::UpstreamStreamInterrupted
        | Reason::GatewayOverloaded
        | Reason::GatewayDraining => Code::Unavailable,
        Reason::StreamIncomplete | Reason::Other(_) => {
            panic!("{reason} is no reason of the contract: give its code, too")
        }
    }
}

/// What a scripted answer ends with.
#[derive(Clone, Debug)]
enum Ending {
    Whole,
    Fail(Failure),
    Cut,
    Hang,
}

#[derive(Clone, Debug)]
struct Script {
    parts: Vec<Part>,
    ending: Ending,
}

/// The request of a call as it arrived.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
#[allow(missing_docs)]
pub enum ReceivedRequest {
    Chat(v1::ChatRequest),
    StreamChat(v1::StreamChatRequest),
    BatchChat(v1::BatchChatRequest),
    CountTokens(v1::CountTokensRequest),
    Tokenize(v1::TokenizeRequest),
    ListModels(v1::ListModelsRequest),
    GetModel(v1::GetModelRequest),
}

/// One RPC as it arrived.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct ReceivedCall {
    /// What was asked.
    pub request: ReceivedRequest,
    /// The metadata it came with.
    pub metadata: MetadataMap,
    over: watch::Receiver<Option<bool>>,
}

impl ReceivedCall {
    /// The chat that a call of `chat` or `stream` asked.
    ///
    /// # Panics
    /// When this is another call.
    pub fn chat(&self) -> &v1::ChatRequest {
        match &self.request {
            ReceivedRequest::Chat(chat) => chat,
            ReceivedRequest::StreamChat(request) => request.chat.as_ref().expect("a chat"),
            other => panic!("not a chat: {other:?}"),
        }
    }

    /// One text value of the metadata, such as `authorization`.
    pub fn header(&self, key: &str) -> Option<&str> {
        text(&self.metadata, key)
    }

    /// Waits up to 10 s for the call to be over; whether the caller left before its end.
    pub async fn was_cancelled(&self) -> bool {
        let mut over = self.over.clone();
        let ended = over.wait_for(Option::is_some);
        match tokio::time::timeout(Duration::from_secs(10), ended).await {
            Ok(Ok(answered)) => *answered == Some(false),
            _ => false,
        }
    }
}

/// Tells when a call is over: the server drops what it was doing when the caller leaves.
struct Running {
    over: watch::Sender<Option<bool>>,
    answered: AtomicBool,
    request_id: Option<String>,
}

impl Running {
    fn answered(&self) {
        self.answered.store(true, Ordering::SeqCst);
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.over.send_replace(Some(self.answered.load(Ordering::SeqCst)));
    }
}

/// A gateway to test against. Dropping it ends what runs and frees the port.
pub struct FakeGateway {
    address: SocketAddr,
    state: Arc<State>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct State {
    script: Mutex<VecDeque<Script>>,
    calls: Mutex<Vec<ReceivedCall>>,
    token: Option<String>,
    models: Vec<String>,
}

/// A fake gateway to be: see [`FakeGateway::builder`].
#[derive(Clone, Debug, Default)]
#[must_use]
pub struct FakeGatewayBuilder {
    token: Option<String>,
    models: Vec<String>,
    tls: Option<ServerTlsConfig>,
}

impl FakeGatewayBuilder {
    /// The only token callers may have; any will do unless given.
    pub fn token(mut self, token: impl Into<String>) -> Self {
        self.token = Some(token.into());
        self
    }

    /// The models it lists; which one is asked does not matter.
    pub fn models<S: Into<String>>(mut self, models: impl IntoIterator<Item = S>) -> Self {
        self.models = models.into_iter().map(Into::into).collect();
        self
    }

    /// Its certificate and, for mutual TLS, whom it lets in; plaintext unless given. Its clients
    /// are then yours to make, with [`client_builder`](FakeGateway::client_builder).
    pub fn tls(mut self, config: ServerTlsConfig) -> Self {
        self.tls = Some(config);
        self
    }

    /// A gateway that listens.
    ///
    /// # Panics
    /// When there is no free loopback port, and when the certificate is none.
    pub fn start(self) -> FakeGateway {
        self.start_on(TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a loopback port"))
    }

    pub(crate) fn start_on(self, listener: TcpListener) -> FakeGateway {
        let Self { token, models, tls } = self;
        let state = Arc::new(State { token, models, ..State::default() });
        let mut server = Server::builder();
        if let Some(config) = tls {
            server = server.tls_config(config).expect("a certificate with its key");
        }
        listener.set_nonblocking(true).expect("a socket of tokio's kind");
        let address = listener.local_addr().expect("an address");
        let (stop, stopped) = oneshot::channel::<()>();
        let services = Services::new(&state);
        // A thread with a runtime of its own: a test's clock may be paused or its runtime blocked,
        // and what still runs ends with it.
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime.expect("a runtime").block_on(async move {
                let listener = tokio::net::TcpListener::from_std(listener).expect("a listener");
                let server = server.serve_with_incoming(services, TcpIncoming::from(listener));
                let mut server = std::pin::pin!(server);
                let mut stopped = std::pin::pin!(stopped);
                std::future::poll_fn(|cx| {
                    let is_over = stopped.as_mut().poll(cx).is_ready();
                    if is_over || server.as_mut().poll(cx).is_ready() {
                        return Poll::Ready(());
                    }
                    Poll::Pending
                })
                .await;
            });
        });
        FakeGateway { address, state, stop: Some(stop), thread: Some(thread) }
    }
}

impl FakeGateway {
    /// A gateway that listens, with nothing scripted yet.
    ///
    /// # Panics
    /// When there is no free loopback port.
    pub fn start() -> Self {
        Self::builder().start()
    }

    /// Begins a gateway with a token, models or TLS of its own.
    pub fn builder() -> FakeGatewayBuilder {
        FakeGatewayBuilder { models: vec!["any".to_owned()], ..FakeGatewayBuilder::default() }
    }

    /// HOST:PORT to connect to.
    pub fn target(&self) -> String {
        self.address.to_string()
    }

    /// A client of this gateway, without a token.
    ///
    /// # Panics
    /// Never.
    pub fn client(&self) -> Client {
        self.client_builder().connect_lazy().expect("a loopback target")
    }

    /// Begins a client of this gateway, without a token.
    pub fn client_builder(&self) -> Builder {
        Client::builder(self.target()).token("")
    }

    /// Answers the next call with these parts: by "stop", or "tool calls" after one, unless a
    /// part is a finish of its own.
    pub fn reply<P: Into<Part>>(&self, parts: impl IntoIterator<Item = P>) -> &Self {
        self.add(parts, Ending::Whole)
    }

    /// Fails the next call: by its reason, or a [`Failure`].
    ///
    /// # Panics
    /// When the reason is not of the contract and has no code.
    pub fn fail(&self, failure: impl Into<Failure>) -> &Self {
        let failure = failure.into();
        let _ = failure.proto();
        self.add(failure.after.clone(), Ending::Fail(failure))
    }

    /// Answers with these parts, then ends with OK although the answer is not whole.
    ///
    /// The gateway never does this; a broken proxy might. Streams only: a unary call fails with
    /// `UPSTREAM_STREAM_INTERRUPTED`.
    pub fn cut<P: Into<Part>>(&self, parts: impl IntoIterator<Item = P>) -> &Self {
        self.add(parts, Ending::Cut)
    }

    /// Answers with these parts, then stays silent until the caller leaves.
    pub fn hang<P: Into<Part>>(&self, parts: impl IntoIterator<Item = P>) -> &Self {
        self.add(parts, Ending::Hang)
    }

    /// The calls that have arrived, in order.
    pub fn calls(&self) -> Vec<ReceivedCall> {
        locked(&self.state.calls).clone()
    }

    fn add<P: Into<Part>>(&self, parts: impl IntoIterator<Item = P>, ending: Ending) -> &Self {
        let parts = parts.into_iter().map(Into::into).collect();
        locked(&self.state.script).push_back(Script { parts, ending });
        self
    }
}

impl Drop for FakeGateway {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl fmt::Debug for FakeGateway {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FakeGateway").field("target", &self.address).finish_non_exhaustive()
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The three services of the contract behind one port.
#[derive(Clone)]
struct Services {
    chat: ChatServiceServer<Fake>,
    tokenizer: TokenizerServiceServer<Fake>,
    model: ModelServiceServer<Fake>,
}

impl Services {
    fn new(state: &Arc<State>) -> Self {
        let fake = Arc::new(Fake(state.clone()));
        Self {
            chat: ChatServiceServer::from_arc(fake.clone())
                .max_decoding_message_size(MAX_MESSAGE_BYTES),
            tokenizer: TokenizerServiceServer::from_arc(fake.clone())
                .max_decoding_message_size(MAX_MESSAGE_BYTES),
            model: ModelServiceServer::from_arc(fake),
        }
    }
}

impl Service<http::Request<Body>> for Services {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<Self::Response, Infallible>;

    fn poll_ready(&mut self, _cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        match request.uri().path().split('/').nth(1) {
            Some("tokenwire.v1.ChatService") => self.chat.call(request),
            Some("tokenwire.v1.TokenizerService") => self.tokenizer.call(request),
            Some("tokenwire.v1.ModelService") => self.model.call(request),
            _ => Box::pin(async { Ok(Status::unimplemented("no such service").into_http()) }),
        }
    }
}

struct Fake(Arc<State>);

impl Fake {
    fn accept<Q>(
        &self,
        request: Request<Q>,
        kind: impl FnOnce(Q) -> ReceivedRequest,
    ) -> Result<Running, Status> {
        let (metadata, _, request) = request.into_parts();
        let (sender, over) = watch::channel(None);
        let request_id = text(&metadata, REQUEST_ID_KEY).map(str::to_owned);
        let running = Running { over: sender, answered: AtomicBool::new(false), request_id };
        let shown = text(&metadata, "authorization").map(str::to_owned);
        locked(&self.0.calls).push(ReceivedCall { request: kind(request), metadata, over });
        let wanted = self.0.token.as_ref().map(|token| format!("Bearer {token}"));
        if wanted.is_some() && shown != wanted {
            let failure = Failure::new("CALLER_UNAUTHENTICATED");
            return Err(refuse(&running, &failure.message("missing or wrong token")));
        }
        Ok(running)
    }

    fn next(&self) -> Script {
        locked(&self.0.script).pop_front().unwrap_or_else(|| {
            let message =
                "FakeGateway has no answer left: script one with reply, fail, cut or hang";
            let failure = Failure::new("INTERNAL").message(message);
            Script { parts: Vec::new(), ending: Ending::Fail(failure) }
        })
    }

    fn steps(&self, script: &Script, chat: &v1::ChatRequest) -> Vec<Step> {
        let header = v1::ResponseHeader {
            id: format!("fake-{}", locked(&self.0.calls).len()),
            model: chat.model.clone(),
            upstream: "fake".to_owned(),
            ..v1::ResponseHeader::default()
        };
        let mut steps = vec![event(Kind::Header(header))];
        steps.extend(script.parts.iter().map(|part| part.0.clone()));
        if !matches!(script.ending, Ending::Whole) {
            return steps;
        }
        let (mut begun, mut finished) = (BTreeSet::new(), BTreeSet::new());
        let (mut calls, mut has_trailer) = (false, false);
        for kind in script.events() {
            match kind {
                Kind::Delta(delta) => {
                    begun.insert(delta.choice_index);
                    calls |= !delta.tool_calls.is_empty();
                }
                Kind::Finish(finish) => drop(finished.insert(finish.choice_index)),
                Kind::Trailer(_) => has_trailer = true,
                _ => {}
            }
        }
        if begun.is_empty() {
            begun.insert(0);
        }
        let reason = if calls { FinishReason::ToolCalls } else { FinishReason::Stop };
        for &choice_index in begun.difference(&finished) {
            steps.push(event(Kind::Finish(v1::Finish {
                choice_index,
                finish_reason: reason.into(),
                finish_reason_raw: reason.to_string(),
                extra_json: String::new(),
            })));
        }
        if !has_trailer {
            let usage = Some(script.usage(chat));
            let trailer = v1::StreamTrailer { usage, ..v1::StreamTrailer::default() };
            steps.push(event(Kind::Trailer(trailer)));
        }
        steps
    }

    fn fold(
        &self,
        script: &Script,
        chat: &v1::ChatRequest,
    ) -> Result<v1::ChatResponse, Box<Failure>> {
        match &script.ending {
            Ending::Fail(failure) => return Err(failure.clone().into()),
            Ending::Cut => {
                let failure = Failure::new("UPSTREAM_STREAM_INTERRUPTED");
                return Err(failure.message("cut by the test").into());
            }
            Ending::Whole | Ending::Hang => {}
        }
        let mut answer = Accumulator::new();
        for step in self.steps(script, chat) {
            if let Step::Event(event) = step {
                answer.add(event);
            }
        }
        Ok(answer.so_far("").proto().clone())
    }
}

impl Script {
    fn events(&self) -> impl Iterator<Item = &Kind> {
        self.parts.iter().filter_map(|part| match &part.0 {
            Step::Event(event) => event.event.as_ref(),
            Step::Pause(_) => None,
        })
    }

    fn usage(&self, chat: &v1::ChatRequest) -> v1::Usage {
        let text: String = self
            .events()
            .map(|kind| if let Kind::Delta(delta) = kind { &*delta.content } else { "" })
            .collect();
        let prompt_tokens = chat.messages.iter().map(|m| words(m.content.as_deref())).sum();
        let completion_tokens = words(Some(&text));
        v1::Usage {
            prompt_tokens,
            completion_tokens,
            total_tokens: prompt_tokens + completion_tokens,
            estimated: true,
            ..v1::Usage::default()
        }
    }
}

fn words(text: Option<&str>) -> i32 {
    text.unwrap_or("").split_whitespace().count().try_into().unwrap_or(i32::MAX)
}

fn event(kind: Kind) -> Step {
    Step::Event(v1::StreamChatResponse { event: Some(kind) })
}

fn refuse(running: &Running, failure: &Failure) -> Status {
    running.answered();
    failure.status(running.request_id.as_deref())
}

/// A scripted stream on its way.
struct Sending<M> {
    steps: VecDeque<Result<Sent<M>, Status>>,
    pause: Option<Pin<Box<tokio::time::Sleep>>>,
    hangs: bool,
    running: Running,
}

enum Sent<M> {
    Message(M),
    Pause(Duration),
}

impl<M: Unpin> futures_core::Stream for Sending<M> {
    type Item = Result<M, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        loop {
            if let Some(pause) = &mut self.pause {
                ready!(pause.as_mut().poll(cx));
                self.pause = None;
            }
            match self.steps.pop_front() {
                Some(Ok(Sent::Pause(time))) => {
                    self.pause = Some(Box::pin(tokio::time::sleep(time)));
                }
                Some(Ok(Sent::Message(message))) => return Poll::Ready(Some(Ok(message))),
                Some(Err(status)) => {
                    self.running.answered();
                    return Poll::Ready(Some(Err(status)));
                }
                None if self.hangs => return Poll::Pending, // until it is dropped
                None => {
                    self.running.answered();
                    return Poll::Ready(None);
                }
            }
        }
    }
}

type Answered<M> = Result<Response<M>, Status>;
type BoxStream<M> = Pin<Box<dyn futures_core::Stream<Item = Result<M, Status>> + Send>>;

#[tonic::async_trait]
impl ChatService for Fake {
    type StreamChatStream = BoxStream<v1::StreamChatResponse>;
    type BatchChatStream = BoxStream<v1::BatchChatResponse>;

    async fn chat(&self, request: Request<v1::ChatRequest>) -> Answered<v1::ChatResponse> {
        let chat = request.get_ref().clone();
        let running = self.accept(request, ReceivedRequest::Chat)?;
        let script = self.next();
        if matches!(script.ending, Ending::Hang) {
            std::future::pending::<()>().await; // until it is dropped
        }
        let answer = self.fold(&script, &chat).map_err(|failure| refuse(&running, &failure))?;
        running.answered();
        Ok(Response::new(answer))
    }

    async fn stream_chat(
        &self,
        request: Request<v1::StreamChatRequest>,
    ) -> Answered<Self::StreamChatStream> {
        let cumulative = request.get_ref().mode() == v1::StreamMode::Cumulative;
        let chat = request.get_ref().chat.clone().unwrap_or_default();
        let running = self.accept(request, ReceivedRequest::StreamChat)?;
        let script = self.next();
        let mut steps = VecDeque::new();
        let mut answer = Accumulator::new();
        for step in self.steps(&script, &chat) {
            steps.push_back(Ok(match step {
                Step::Pause(time) => Sent::Pause(time),
                Step::Event(event) => {
                    answer.add(event.clone());
                    Sent::Message(if cumulative { snapshot(&answer, event) } else { event })
                }
            }));
        }
        if let Ending::Fail(failure) = &script.ending {
            if script.parts.is_empty() {
                return Err(refuse(&running, failure));
            }
            steps.push_back(Err(failure.status(running.request_id.as_deref())));
        }
        let hangs = matches!(script.ending, Ending::Hang);
        if hangs && script.parts.is_empty() {
            std::future::pending::<()>().await; // before its first byte
        }
        Ok(Response::new(Box::pin(Sending { steps, pause: None, hangs, running })))
    }

    async fn batch_chat(
        &self,
        request: Request<v1::BatchChatRequest>,
    ) -> Answered<Self::BatchChatStream> {
        let items = request.get_ref().items.clone();
        let running = self.accept(request, ReceivedRequest::BatchChat)?;
        let scripts: Vec<_> = items.iter().map(|_| self.next()).collect();
        let (mut steps, mut hangs) = (VecDeque::new(), false);
        // Last item first: results come in order of completion, and code that takes it for the
        // order of the items should notice in a test.
        for (index, (item, script)) in items.into_iter().zip(scripts).enumerate().rev() {
            match script.ending {
                Ending::Hang => {
                    hangs = true;
                    break;
                }
                Ending::Cut => break,
                Ending::Whole | Ending::Fail(_) => {}
            }
            let result = match self.fold(&script, &item.chat.unwrap_or_default()) {
                Ok(response) => Ended::Response(response),
                Err(failure) => Ended::Error(failure.proto()),
            };
            let index = index.try_into().unwrap_or(i32::MAX);
            let (custom_id, result) = (item.custom_id, Some(result));
            steps.push_back(Ok(Sent::Message(v1::BatchChatResponse { index, custom_id, result })));
        }
        Ok(Response::new(Box::pin(Sending { steps, pause: None, hangs, running })))
    }
}

fn snapshot(answer: &Accumulator, event: v1::StreamChatResponse) -> v1::StreamChatResponse {
    let Some(Kind::Delta(delta)) = &event.event else { return event };
    let choice = answer.choices().find(|choice| choice.index() == delta.choice_index);
    let snapshot = v1::Snapshot {
        state: v1::snapshot::State::Streaming.into(),
        choice_index: delta.choice_index,
        message: choice.map(crate::Choice::message),
    };
    v1::StreamChatResponse { event: Some(Kind::Snapshot(snapshot)) }
}

#[tonic::async_trait]
impl TokenizerService for Fake {
    async fn count_tokens(
        &self,
        request: Request<v1::CountTokensRequest>,
    ) -> Answered<v1::CountTokensResponse> {
        use v1::count_tokens_request::Input;
        let total_tokens = match &request.get_ref().input {
            Some(Input::Text(text)) => words(Some(text)),
            Some(Input::Chat(chat)) => {
                chat.messages.iter().map(|message| words(message.content.as_deref())).sum()
            }
            None => 0,
        };
        self.accept(request, ReceivedRequest::CountTokens)?.answered();
        let tokenizer = "words".to_owned();
        Ok(Response::new(v1::CountTokensResponse { total_tokens, tokenizer, exact: false }))
    }

    async fn tokenize(
        &self,
        request: Request<v1::TokenizeRequest>,
    ) -> Answered<v1::TokenizeResponse> {
        let list = |text: &String| {
            let pieces: Vec<_> = text.split_whitespace().map(Into::into).collect();
            v1::TokenList { ids: (0..words(Some(text))).collect(), pieces }
        };
        let lists = request.get_ref().texts.iter().map(list).collect();
        self.accept(request, ReceivedRequest::Tokenize)?.answered();
        Ok(Response::new(v1::TokenizeResponse { lists, tokenizer: "words".to_owned() }))
    }
}

#[tonic::async_trait]
impl ModelService for Fake {
    async fn list_models(
        &self,
        request: Request<v1::ListModelsRequest>,
    ) -> Answered<v1::ListModelsResponse> {
        let asked = request.get_ref().clone();
        self.accept(request, ReceivedRequest::ListModels)?.answered();
        let start: usize = asked.page_token.parse().unwrap_or(0);
        let size = usize::try_from(asked.page_size).ok().filter(|size| *size > 0).unwrap_or(100);
        let models = self.0.models.iter().skip(start).take(size).map(|name| model(name)).collect();
        let next = start + size;
        let next_page_token =
            if next < self.0.models.len() { next.to_string() } else { String::new() };
        Ok(Response::new(v1::ListModelsResponse { models, next_page_token }))
    }

    async fn get_model(
        &self,
        request: Request<v1::GetModelRequest>,
    ) -> Answered<v1::GetModelResponse> {
        let name = request.get_ref().name.clone();
        let running = self.accept(request, ReceivedRequest::GetModel)?;
        if !self.0.models.contains(&name) {
            let failure = Failure::new("MODEL_NOT_FOUND").message(format!("no model {name:?}"));
            return Err(refuse(&running, &failure));
        }
        running.answered();
        Ok(Response::new(v1::GetModelResponse { model: Some(model(&name)) }))
    }
}

fn model(name: &str) -> v1::Model {
    v1::Model {
        name: name.to_owned(),
        upstream: "fake".to_owned(),
        upstream_model: name.to_owned(),
        tokenizer: "words".to_owned(),
        ..v1::Model::default()
    }
}
