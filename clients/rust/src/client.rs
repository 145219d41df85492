//! The client, and a builder for each of its calls.

use std::borrow::Cow;
use std::collections::HashSet;
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tonic::transport::{Channel, Endpoint};

use crate::call::{Call, CallOptions, Limits, Method, Throttle, Transport};
use crate::channel::{BoxError, Configure, DEFAULT_TARGET, Gateway, Tls, Token};
use crate::errors::Error;
use crate::replies::Reply;
use crate::requests::{Request, chat_options};
use crate::streams::{Batch, Stream};
use crate::v1;

const DEFAULT_TIMEOUT: Duration = Duration::from_secs(600);

/// A client of one gateway. Cheap to clone; clones share their connections.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let gateway = tokenwire::testing::FakeGateway::start();
/// # gateway.reply(["Rayleigh scattering."]);
/// # let target = gateway.target();
/// use tokenwire::Client;
///
/// let client = Client::builder(target).connect_lazy()?;
/// let reply = client.chat("Why is the sky blue?").model("gpt-4o-mini").send().await?;
/// println!("{}", reply.text());
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct Client {
    shared: Arc<Shared>,
}

struct Shared {
    transport: Transport,
    timeout: Option<Duration>,
}

impl Client {
    /// Begins a client of the gateway at `target`: `HOST:PORT`, `dns:///HOST:PORT`, or
    /// `unix:PATH`.
    ///
    /// A host that stands for several addresses is several replicas, which take turns.
    pub fn builder(target: impl Into<String>) -> Builder {
        Builder { target: Some(target.into()), ..Builder::default() }
    }

    /// A client of the gateway at `TOKENWIRE_TARGET`, or at `localhost:50051`, with the token in
    /// `TOKENWIRE_TOKEN` if there is one. Connects when it is first used.
    ///
    /// # Errors
    /// When these make no sense.
    pub fn from_env() -> Result<Self, Error> {
        Builder::default().connect_lazy()
    }

    /// Asks, and waits for the whole answer.
    ///
    /// `prompt` is a text, a conversation (a `Vec<Message>`, oldest first), a [`Request`], or a
    /// [`v1::ChatRequest`].
    pub fn chat(&self, prompt: impl Into<Request>) -> ChatCall {
        ChatCall { client: self.clone(), request: prompt.into(), options: CallOptions::default() }
    }

    /// Asks for an answer as it grows; `prompt` as for [`chat`](Client::chat).
    pub fn stream(&self, prompt: impl Into<Request>) -> StreamCall {
        StreamCall {
            client: self.clone(),
            request: prompt.into(),
            options: CallOptions::default(),
            mode: StreamMode::Delta,
            max_delay: None,
        }
    }

    /// Asks 1 to 256 independent things. The options of the call hold for every item without its
    /// own; one that fails fails no other.
    pub fn batch<R: Into<Request>>(&self, items: impl IntoIterator<Item = R>) -> BatchCall {
        BatchCall {
            client: self.clone(),
            items: items.into_iter().map(Into::into).collect(),
            defaults: v1::ChatRequest::default().into(),
            options: CallOptions::default(),
            max_concurrency: 0,
        }
    }

    /// Counts the tokens of a text, or of a conversation with its layout, tools and format.
    pub fn count_tokens(&self, prompt: impl Into<Request>) -> CountTokensCall {
        let request = prompt.into();
        CountTokensCall { client: self.clone(), request, options: CallOptions::default() }
    }

    /// Lists the tokens of each text.
    pub fn tokenize<S: Into<String>>(&self, texts: impl IntoIterator<Item = S>) -> TokenizeCall {
        TokenizeCall {
            client: self.clone(),
            model: String::new(),
            texts: texts.into_iter().map(Into::into).collect(),
            options: CallOptions::default(),
        }
    }

    /// Lists every model the caller may use.
    pub fn models(&self) -> ModelsCall {
        ModelsCall { client: self.clone(), page_size: 0, options: CallOptions::default() }
    }

    /// Gets one model, by name or alias.
    pub fn model(&self, name: impl Into<String>) -> ModelCall {
        let name = name.into();
        ModelCall { client: self.clone(), name, options: CallOptions::default() }
    }

    fn call(&self, method: Method, options: CallOptions) -> Result<Call, Error> {
        Call::new(method, options, self.shared.timeout)
    }
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client")
            .field("gateway", &self.shared.transport.gateway)
            .finish_non_exhaustive()
    }
}

/// A client to be: see [`Client::builder`].
#[must_use]
pub struct Builder {
    target: Option<String>,
    token: Option<Result<Token, Error>>,
    tls: Option<Tls>,
    channel: Option<Channel>,
    configure: Configure,
    timeout: Option<Duration>,
}

impl Default for Builder {
    /// As [`Client::from_env`], with more to say.
    fn default() -> Self {
        Self {
            target: None,
            token: None,
            tls: None,
            channel: None,
            configure: Arc::new(|endpoint| endpoint),
            timeout: Some(DEFAULT_TIMEOUT),
        }
    }
}

impl Builder {
    /// A bearer token; `""` for none. Without this, it is `TOKENWIRE_TOKEN`, if that is set.
    ///
    /// It travels as `authorization` metadata, so it also works in plaintext behind a mesh.
    pub fn token(mut self, token: impl AsRef<str>) -> Self {
        self.token = Some(Token::fixed(token.as_ref()));
        self
    }

    /// Asks for the current token, once per call.
    ///
    /// When this fails, the call fails with UNAUTHENTICATED, and nothing is sent.
    pub fn token_supplier<F, T, E>(mut self, supplier: F) -> Self
    where
        F: Fn() -> T + Send + Sync + 'static,
        T: Future<Output = Result<String, E>> + Send + 'static,
        E: Into<BoxError>,
    {
        let ask = move || -> crate::channel::BoxFuture<Result<String, BoxError>> {
            let token = supplier();
            Box::pin(async { token.await.map_err(Into::into) })
        };
        self.token = Some(Ok(Token::Supplier(Arc::new(ask))));
        self
    }

    /// Connects by TLS. Without this, in plaintext.
    pub fn tls(mut self, tls: impl Into<Tls>) -> Self {
        self.tls = Some(tls.into());
        self
    }

    /// Changes the [`Endpoint`] each connection is made from, for what has no method here.
    pub fn endpoint(
        mut self,
        configure: impl Fn(Endpoint) -> Endpoint + Send + Sync + 'static,
    ) -> Self {
        self.configure = Arc::new(configure);
        self
    }

    /// Uses a channel of your own; target, TLS and endpoint are then what you made it of.
    pub fn channel(mut self, channel: Channel) -> Self {
        self.channel = Some(channel);
        self
    }

    /// The deadline of calls with one answer that say none: 600 s unless given, `None` for none.
    /// Streams and batches have none of their own.
    pub fn timeout(mut self, timeout: impl Into<Option<Duration>>) -> Self {
        self.timeout = timeout.into();
        self
    }

    /// A client that connects when it is first used.
    ///
    /// # Errors
    /// When target, token or certificates make no sense.
    pub fn connect_lazy(self) -> Result<Client, Error> {
        self.build(|name| std::env::var(name).ok())
    }

    /// A client that is connected to some replica.
    ///
    /// # Errors
    /// As [`connect_lazy`](Builder::connect_lazy), and UNAVAILABLE when no replica is reached.
    pub async fn connect(self) -> Result<Client, Error> {
        let client = self.connect_lazy()?;
        client.shared.transport.gateway.connect().await?;
        Ok(client)
    }

    fn build(self, environ: impl Fn(&str) -> Option<String>) -> Result<Client, Error> {
        let environ = |name: &str| environ(name).filter(|value| !value.is_empty());
        let target: Cow<'_, str> = match self.target {
            Some(target) => target.into(),
            None => environ("TOKENWIRE_TARGET").map_or(DEFAULT_TARGET.into(), Into::into),
        };
        let token = match self.token {
            Some(token) => token?,
            None => Token::fixed(&environ("TOKENWIRE_TOKEN").unwrap_or_default())?,
        };
        let gateway = match self.channel {
            Some(channel) => Gateway::given(target.into_owned(), channel),
            None => Gateway::at(&target, self.tls, self.configure)?,
        };
        let transport = Transport { gateway, token, throttle: Throttle::new() };
        Ok(Client { shared: Arc::new(Shared { transport, timeout: self.timeout }) })
    }
}

impl fmt::Debug for Builder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Builder").field("target", &self.target).finish_non_exhaustive()
    }
}

/// The options of every call, for each builder that has them.
macro_rules! call_options {
    ($type:ty) => {
        /// The options of every call.
        impl $type {
            /// How long the call may take, its retries included; `None` for any time.
            pub fn timeout(mut self, timeout: impl Into<Option<Duration>>) -> Self {
                self.options.timeout = Some(timeout.into());
                self
            }

            /// `x-request-id`, to find the call in the gateway's log; made up when not given.
            pub fn request_id(mut self, id: impl Into<String>) -> Self {
                self.options.request_id = Some(id.into());
                self
            }

            /// More gRPC metadata, such as `traceparent`; may be repeated. Keys that end with
            /// `-bin` take any bytes.
            pub fn metadata(mut self, key: impl Into<String>, value: impl AsRef<[u8]>) -> Self {
                self.options.metadata.push((key.into(), value.as_ref().to_vec()));
                self
            }

            /// Ends the call with CANCELLED as soon as `cancelled` is ready.
            ///
            /// Dropping a call cancels it, too; this is for cancelling it from elsewhere while
            /// something waits for it: with the receiver of a oneshot channel, or the
            /// `cancelled_owned()` of tokio-util's `CancellationToken`.
            pub fn cancel_when(
                mut self,
                cancelled: impl IntoFuture<Output: Sized, IntoFuture: Send + 'static>,
            ) -> Self {
                let cancelled = cancelled.into_future();
                self.options.cancelled = Some(Box::pin(async move {
                    cancelled.await;
                }));
                self
            }
        }
    };
}

macro_rules! debug {
    ($($type:ident: $field:ident,)*) => { $(
        impl fmt::Debug for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.debug_struct(stringify!($type))
                    .field(stringify!($field), &self.$field)
                    .finish_non_exhaustive()
            }
        }
    )* };
}

debug! {
    ChatCall: request,
    StreamCall: request,
    BatchCall: items,
    CountTokensCall: request,
    TokenizeCall: texts,
    ModelsCall: page_size,
    ModelCall: name,
}

/// A chat about to be asked: see [`Client::chat`].
#[must_use = "nothing is sent before `send`"]
pub struct ChatCall {
    client: Client,
    request: Request,
    options: CallOptions,
}

chat_options!(ChatCall, request);
call_options!(ChatCall);

impl ChatCall {
    /// The whole answer.
    ///
    /// # Errors
    /// Every way the call can fail.
    pub async fn send(self) -> Result<Reply, Error> {
        let Self { client, request, options } = self;
        let request = request.checked()?;
        let call = client.call(Method::Chat, options)?;
        let request_id = call.request_id.clone();
        let response = client.shared.transport.unary(call, request).await?;
        Ok(Reply::new(response, &request_id))
    }
}

/// What a stream carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum StreamMode {
    /// Only what is new. The default; the [`Stream`] keeps all so far.
    Delta,
    /// All text so far, every time. Quadratic in the length of the answer.
    Cumulative,
}

/// A stream about to begin: see [`Client::stream`].
#[must_use = "nothing is sent before `send`"]
pub struct StreamCall {
    client: Client,
    request: Request,
    options: CallOptions,
    mode: StreamMode,
    max_delay: Option<Duration>,
}

chat_options!(StreamCall, request);
call_options!(StreamCall);

impl StreamCall {
    /// What the stream carries.
    pub fn mode(mut self, mode: StreamMode) -> Self {
        self.mode = mode;
        self
    }

    /// Lets the gateway hold text up to this long (at most 5 s) to send fewer, larger messages.
    pub fn max_delay(mut self, delay: Duration) -> Self {
        self.max_delay = Some(delay);
        self
    }

    /// The stream, once it has begun.
    ///
    /// # Errors
    /// Every way the call can fail before its first message. Later ones come from the stream.
    pub async fn send(self) -> Result<Stream, Error> {
        let Self { client, request, options, mode, max_delay } = self;
        let started = Instant::now();
        let mode = match mode {
            StreamMode::Delta => v1::StreamMode::Delta,
            StreamMode::Cumulative => v1::StreamMode::Cumulative,
        };
        let max_delay = max_delay
            .map(|delay| delay.try_into().map_err(|_| Error::invalid("max_delay", "too long")))
            .transpose()?;
        let chat = Some(request.checked()?);
        let request = v1::StreamChatRequest { chat, mode: mode.into(), max_delay };
        let call = client.call(Method::StreamChat, options)?;
        Ok(Stream::new(client.shared.transport.open(call, request).await?, started))
    }
}

/// A batch about to begin: see [`Client::batch`].
#[must_use = "nothing is sent before `send`"]
pub struct BatchCall {
    client: Client,
    items: Vec<Request>,
    defaults: Request,
    options: CallOptions,
    max_concurrency: i32,
}

chat_options!(BatchCall, defaults);
call_options!(BatchCall);

impl BatchCall {
    /// Items to run at once, at most 256; 0 for the gateway's default.
    pub fn max_concurrency(mut self, items: i32) -> Self {
        self.max_concurrency = items;
        self
    }

    /// The batch, once its first result is there.
    ///
    /// # Errors
    /// Every way the call as a whole can fail before that.
    pub async fn send(self) -> Result<Batch, Error> {
        let Self { client, items, defaults, options, max_concurrency } = self;
        if items.is_empty() {
            return Err(Error::invalid("items", "expected at least one"));
        }
        let mut request = v1::BatchChatRequest { items: Vec::new(), max_concurrency };
        let mut custom_ids = Vec::new();
        for (i, item) in items.into_iter().enumerate() {
            let item = item.with_defaults(&defaults);
            let custom_id = item.custom_id.clone();
            custom_ids.push(custom_id.clone());
            let chat = item.checked().map_err(|error| error.within(&format!("items[{i}]")))?;
            request.items.push(v1::BatchChatItem { custom_id, chat: Some(chat) });
        }
        let call = client.call(Method::BatchChat, options)?;
        Ok(Batch::new(client.shared.transport.open(call, request).await?, custom_ids))
    }
}

/// Tokens about to be counted: see [`Client::count_tokens`].
#[must_use = "nothing is sent before `send`"]
pub struct CountTokensCall {
    client: Client,
    request: Request,
    options: CallOptions,
}

chat_options!(CountTokensCall, request);
call_options!(CountTokensCall);

impl CountTokensCall {
    /// How many there are, and whether that is exact.
    ///
    /// # Errors
    /// Every way the call can fail.
    pub async fn send(self) -> Result<v1::CountTokensResponse, Error> {
        let Self { client, request, options } = self;
        let is_text = request.is_text;
        let mut chat = request.checked()?;
        let model = chat.model.clone();
        // A text without any option of a chat is counted as it is, without the layout of one.
        let bare = v1::ChatRequest {
            model: model.clone(),
            messages: chat.messages.clone(),
            ..v1::ChatRequest::default()
        };
        let input = if is_text && chat == bare {
            let text = chat.messages.pop().and_then(|message| message.content);
            v1::count_tokens_request::Input::Text(text.unwrap_or_default())
        } else {
            v1::count_tokens_request::Input::Chat(chat)
        };
        let request = v1::CountTokensRequest { model, input: Some(input) };
        let call = client.call(Method::CountTokens, options)?;
        client.shared.transport.unary(call, request).await
    }
}

/// Tokens about to be listed: see [`Client::tokenize`].
#[must_use = "nothing is sent before `send`"]
pub struct TokenizeCall {
    client: Client,
    model: String,
    texts: Vec<String>,
    options: CallOptions,
}

call_options!(TokenizeCall);

impl TokenizeCall {
    /// Name or alias of the model whose tokenizer is used.
    pub fn model(mut self, model: impl Into<String>) -> Self {
        self.model = model.into();
        self
    }

    /// The tokens of each text: `ids`, and as `pieces` their bytes.
    ///
    /// # Errors
    /// Every way the call can fail.
    pub async fn send(self) -> Result<Vec<v1::TokenList>, Error> {
        let Self { client, model, texts, options } = self;
        if model.is_empty() {
            return Err(Error::invalid("model", "expected the name of a model"));
        }
        let call = client.call(Method::Tokenize, options)?;
        let (asked, id) = (texts.len(), call.request_id.clone());
        let request = v1::TokenizeRequest { model, texts };
        let response: v1::TokenizeResponse = client.shared.transport.unary(call, request).await?;
        match response.lists.len() {
            got if got == asked => Ok(response.lists),
            got => {
                let error = Error::incomplete(format!("got the tokens of {got} of {asked} texts"));
                Err(error.with_request_id(&id))
            }
        }
    }
}

/// Models about to be listed: see [`Client::models`].
#[must_use = "nothing is sent before `send`"]
pub struct ModelsCall {
    client: Client,
    page_size: i32,
    options: CallOptions,
}

call_options!(ModelsCall);

impl ModelsCall {
    /// At most this many in one message; 0 for the gateway's default.
    pub fn page_size(mut self, models: i32) -> Self {
        self.page_size = models;
        self
    }

    /// Every model, from all pages. The deadline is of each page.
    ///
    /// # Errors
    /// Every way a call can fail.
    pub async fn send(self) -> Result<Vec<v1::Model>, Error> {
        let Self { client, page_size, options } = self;
        let CallOptions { timeout, request_id, metadata, cancelled } = options;
        let mut limits = Limits::without_deadline(cancelled);
        let mut models = Vec::new();
        let mut page_token = String::new();
        let mut read = HashSet::new(); // tokens of pages
        loop {
            let options = CallOptions {
                timeout,
                request_id: request_id.clone(),
                metadata: metadata.clone(),
                cancelled: None,
            };
            let call = client.call(Method::ListModels, options)?;
            let id = call.request_id.clone();
            let request = v1::ListModelsRequest { page_size, page_token };
            let page = client.shared.transport.unary(call, request);
            let page: v1::ListModelsResponse = limits.over(page).await?;
            models.extend(page.models);
            if page.next_page_token.is_empty() {
                return Ok(models);
            }
            if !read.insert(page.next_page_token.clone()) {
                let message = "the list of models goes on with a page that was read";
                return Err(Error::incomplete(message).with_request_id(&id));
            }
            page_token = page.next_page_token;
        }
    }
}

/// A model about to be looked up: see [`Client::model`].
#[must_use = "nothing is sent before `send`"]
pub struct ModelCall {
    client: Client,
    name: String,
    options: CallOptions,
}

call_options!(ModelCall);

impl ModelCall {
    /// The model.
    ///
    /// # Errors
    /// `NOT_FOUND`, and every other way the call can fail.
    pub async fn send(self) -> Result<v1::Model, Error> {
        let Self { client, name, options } = self;
        let call = client.call(Method::GetModel, options)?;
        let id = call.request_id.clone();
        let request = v1::GetModelRequest { name };
        let response: v1::GetModelResponse = client.shared.transport.unary(call, request).await?;
        let none = || Error::incomplete("got an answer without a model").with_request_id(&id);
        response.model.ok_or_else(none)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test] // without a runtime: a client may be made before there is one
    fn the_environment_fills_in_what_is_not_said() {
        let environ = |name: &str| match name {
            "TOKENWIRE_TARGET" => Some("gateway.internal:443".to_owned()),
            "TOKENWIRE_TOKEN" => Some("se cret".to_owned()),
            _ => None,
        };
        let refused = Builder::default().build(environ).unwrap_err();
        assert_eq!(refused.field_violations()[0].field, "token");
        let client = Builder::default().token("").build(environ).unwrap();
        assert_eq!(format!("{client:?}"), "Client { gateway: \"gateway.internal:443\", .. }");
        let client = Client::builder("other:1").token("t").build(environ).unwrap();
        assert!(format!("{client:?}").contains("other:1"));
        let client = Builder::default().build(|_| Some(String::new())).unwrap();
        assert!(format!("{client:?}").contains(DEFAULT_TARGET));
    }

    #[test]
    fn calls_can_be_spawned() {
        fn is_send<T: Send>() {}
        fn is_sync<T: Send + Sync + Unpin>() {}
        fn sends(_: impl Send) {}
        is_sync::<Client>();
        is_sync::<Error>();
        is_sync::<Reply>();
        is_send::<Stream>();
        is_send::<Batch>();
        is_send::<ChatCall>();
        let client = Client::builder("localhost:1").token("").connect_lazy().unwrap();
        sends(client.chat("Hi").send());
        sends(client.stream("Hi").send());
        sends(client.batch(["Hi"]).send());
        sends(client.models().send());
    }
}
