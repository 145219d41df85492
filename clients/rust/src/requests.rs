//! Requests of the contract, built from what Rust developers have at hand.
//!
//! Ranges are the server's to judge: it names the field and knows the model. Here only what
//! cannot be sent is refused, with its place, before anything is.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::errors::Error;
use crate::v1::{self, content_part, media, response_format, tool};

/// One turn of a conversation.
pub type Message = v1::ChatMessage;

/// One element of a message's multimodal content.
pub type Part = v1::ContentPart;

impl v1::ChatMessage {
    /// What the user says.
    pub fn user(content: impl Into<String>) -> Self {
        Self::with_role("user", content)
    }

    /// What the model is told before all else.
    pub fn system(content: impl Into<String>) -> Self {
        Self::with_role("system", content)
    }

    /// What the model said.
    pub fn assistant(content: impl Into<String>) -> Self {
        Self::with_role("assistant", content)
    }

    /// What a tool said to the call `tool_call_id`; see also
    /// [`ToolCall::answer`](crate::ToolCall::answer).
    pub fn tool(tool_call_id: impl Into<String>, content: impl Into<String>) -> Self {
        Self { tool_call_id: tool_call_id.into(), ..Self::with_role("tool", content) }
    }

    /// A turn of any role, for example one of your own
    /// [role templates](Request::role_templates).
    pub fn with_role(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: Some(content.into()), ..Self::default() }
    }

    /// What the user says and shows.
    pub fn user_parts(parts: impl IntoIterator<Item = Part>) -> Self {
        let parts = parts.into_iter().collect();
        Self { role: "user".to_owned(), parts, ..Self::default() }
    }
}

impl v1::ContentPart {
    /// Plain text.
    pub fn text(text: impl Into<String>) -> Self {
        Self::of(content_part::Part::Text(text.into()))
    }

    /// An image at an `https:` or `data:` URL.
    pub fn image_url(url: impl Into<String>) -> Self {
        Self::of(content_part::Part::Image(v1::Media::url(url)))
    }

    /// An image in memory; `media_type` is for example `image/png`.
    pub fn image(data: impl Into<Vec<u8>>, media_type: impl Into<String>) -> Self {
        Self::of(content_part::Part::Image(v1::Media::data(data, media_type)))
    }

    /// A sound in memory; `media_type` is for example `audio/wav`.
    pub fn audio(data: impl Into<Vec<u8>>, media_type: impl Into<String>) -> Self {
        Self::of(content_part::Part::Audio(v1::Media::data(data, media_type)))
    }

    /// A document in memory; `media_type` is for example `application/pdf`.
    pub fn file(data: impl Into<Vec<u8>>, media_type: impl Into<String>) -> Self {
        Self::of(content_part::Part::File(v1::Media::data(data, media_type)))
    }

    fn of(part: content_part::Part) -> Self {
        Self { part: Some(part), ..Self::default() }
    }
}

impl v1::Media {
    /// What is at an `https:` or `data:` URL.
    pub fn url(url: impl Into<String>) -> Self {
        Self { source: Some(media::Source::Url(url.into())), ..Self::default() }
    }

    /// What is in memory; `media_type` is for example `image/png`.
    pub fn data(data: impl Into<Vec<u8>>, media_type: impl Into<String>) -> Self {
        let source = Some(media::Source::Data(data.into()));
        Self { source, media_type: media_type.into(), ..Self::default() }
    }
}

/// A tool the model may call.
///
/// ```
/// use serde_json::json;
/// use tokenwire::Tool;
///
/// let weather = Tool::function("weather").description("Current weather of a city").parameters(
///     json!({"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}),
/// );
/// ```
#[derive(Clone, Debug)]
#[must_use]
pub struct Tool {
    proto: v1::Tool,
    error: Option<Error>,
}

impl Tool {
    /// A function whose arguments are JSON.
    pub fn function(name: impl Into<String>) -> Self {
        let function = v1::FunctionTool { name: name.into(), ..v1::FunctionTool::default() };
        v1::Tool { tool: Some(tool::Tool::Function(function)) }.into()
    }

    /// A free-form tool, whose input is text.
    pub fn custom(name: impl Into<String>) -> Self {
        let custom = v1::CustomTool { name: name.into(), ..v1::CustomTool::default() };
        v1::Tool { tool: Some(tool::Tool::Custom(custom)) }.into()
    }

    /// What it does, for the model.
    pub fn description(mut self, text: impl Into<String>) -> Self {
        match &mut self.proto.tool {
            Some(tool::Tool::Function(function)) => function.description = text.into(),
            Some(tool::Tool::Custom(custom)) => custom.description = text.into(),
            _ => self.refuse("description", "this kind of tool has none"),
        }
        self
    }

    /// JSON Schema of the parameters: anything serde writes as an object, or JSON text, which is
    /// sent unchanged.
    pub fn parameters(mut self, schema: impl Serialize) -> Self {
        match (&mut self.proto.tool, json_object(&schema)) {
            (Some(tool::Tool::Function(function)), Ok(text)) => {
                function.parameters_schema_json = text;
            }
            (_, Err(description)) => self.refuse("parameters", description),
            _ => self.refuse("parameters", "only a function has parameters"),
        }
        self
    }

    /// Asks the upstream to enforce the schema.
    pub fn strict(mut self, strict: bool) -> Self {
        match &mut self.proto.tool {
            Some(tool::Tool::Function(function)) => function.strict = Some(strict),
            _ => self.refuse("strict", "only a function can be strict"),
        }
        self
    }

    fn refuse(&mut self, field: &str, description: impl Into<String>) {
        self.error.get_or_insert_with(|| Error::invalid(field, description));
    }
}

impl From<v1::Tool> for Tool {
    fn from(proto: v1::Tool) -> Self {
        Self { proto, error: None }
    }
}

/// Which tools the model may or must call.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ToolChoice {
    /// The model decides.
    Auto,
    /// No calls.
    None,
    /// At least one call.
    Required,
    /// A call of this tool.
    Tool(String),
    /// As the model decides, but only of these.
    Allowed(Vec<String>),
    /// At least one call, of one of these.
    RequiredOf(Vec<String>),
}

impl From<ToolChoice> for v1::ToolChoice {
    fn from(choice: ToolChoice) -> Self {
        use v1::tool_choice::Mode;
        let (mode, tool_names) = match choice {
            ToolChoice::Auto => (Mode::Auto, Vec::new()),
            ToolChoice::None => (Mode::None, Vec::new()),
            ToolChoice::Required => (Mode::Required, Vec::new()),
            ToolChoice::Tool(name) => (Mode::Required, vec![name]),
            ToolChoice::Allowed(names) => (Mode::Auto, names),
            ToolChoice::RequiredOf(names) => (Mode::Required, names),
        };
        Self { mode: mode.into(), tool_names }
    }
}

/// What to do with a parameter the upstream does not take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum UnsupportedParameters {
    /// Fail. The default.
    Reject,
    /// Drop it, and name it in the header's `dropped_parameters`.
    Drop,
}

/// One chat to be asked: a prompt with its options.
///
/// [`Client::chat`](crate::Client::chat), `stream` and the others take whatever becomes one, and
/// have the same options; make one yourself for an item of a batch, or to ask it more than once.
/// What is unset means the model's default.
///
/// ```
/// use tokenwire::Request;
///
/// let haiku = Request::new("A haiku about rust.").custom_id("haiku").temperature(1.0);
/// ```
#[derive(Clone, Debug)]
#[must_use]
pub struct Request {
    pub(crate) chat: v1::ChatRequest,
    pub(crate) custom_id: String,
    pub(crate) is_text: bool,
    error: Option<Error>,
}

impl Request {
    /// Of one user message, a conversation (oldest first), or a ready [`v1::ChatRequest`].
    pub fn new(prompt: impl Into<Request>) -> Self {
        prompt.into()
    }

    /// In a batch, the name of this item, unique there; repeated in its result.
    pub fn custom_id(mut self, custom_id: impl Into<String>) -> Self {
        self.custom_id = custom_id.into();
        self
    }

    pub(crate) fn refuse(&mut self, field: &str, description: impl Into<String>) {
        self.error.get_or_insert_with(|| Error::invalid(field, description));
    }

    /// The message of the contract, if it can be sent.
    pub(crate) fn checked(self) -> Result<v1::ChatRequest, Error> {
        if let Some(error) = self.error {
            return Err(error);
        }
        if self.chat.messages.is_empty() {
            return Err(Error::invalid("messages", "expected at least one message"));
        }
        if self.chat.model.is_empty() {
            let expected = "expected the name of a model, for example \"gpt-4o-mini\"";
            return Err(Error::invalid("model", expected));
        }
        Ok(self.chat)
    }

    fn of(messages: Vec<Message>) -> Self {
        v1::ChatRequest { messages, ..v1::ChatRequest::default() }.into()
    }

    fn params(&mut self) -> &mut v1::GenerationParams {
        self.chat.params.get_or_insert_default()
    }

    /// Fills what this item leaves unset from what the batch says for all.
    pub(crate) fn with_defaults(mut self, defaults: &Request) -> Self {
        let (own, all) = (&mut self.chat, defaults.chat.clone());
        if own.model.is_empty() {
            own.model = all.model;
        }
        macro_rules! fill {
            ($empty:ident: $($field:ident)*) => { $(
                if own.$field.$empty() { own.$field = all.$field; }
            )* };
        }
        fill!(is_empty: tools role_templates end_user_id prompt_cache_key service_tier labels extra_body_json);
        fill!(is_none: tool_choice response_format);
        if own.unsupported_parameter_policy == 0 {
            own.unsupported_parameter_policy = all.unsupported_parameter_policy;
        }
        if let Some(all) = all.params {
            let own = own.params.get_or_insert_default();
            macro_rules! fill_params {
                ($empty:ident: $($field:ident)*) => { $(
                    if own.$field.$empty() { own.$field = all.$field; }
                )* };
            }
            fill_params!(is_empty: stop logit_bias reasoning_effort verbosity);
            fill_params!(is_none: temperature top_p top_k min_p max_completion_tokens
                frequency_penalty presence_penalty repetition_penalty seed choice_count logprobs
                top_logprobs enable_thinking parallel_tool_calls);
        }
        if self.error.is_none() {
            self.error.clone_from(&defaults.error);
        }
        self
    }
}

impl From<v1::ChatRequest> for Request {
    fn from(chat: v1::ChatRequest) -> Self {
        Self { chat, custom_id: String::new(), is_text: false, error: None }
    }
}

impl From<v1::BatchChatItem> for Request {
    fn from(item: v1::BatchChatItem) -> Self {
        Self { custom_id: item.custom_id, ..item.chat.unwrap_or_default().into() }
    }
}

impl From<String> for Request {
    fn from(text: String) -> Self {
        Self { is_text: true, ..Self::of(vec![Message::user(text)]) }
    }
}

impl From<&String> for Request {
    fn from(text: &String) -> Self {
        text.clone().into()
    }
}

impl From<&str> for Request {
    fn from(text: &str) -> Self {
        text.to_owned().into()
    }
}

impl From<Message> for Request {
    fn from(message: Message) -> Self {
        Self::of(vec![message])
    }
}

impl From<Vec<Message>> for Request {
    fn from(messages: Vec<Message>) -> Self {
        Self::of(messages)
    }
}

impl From<&Vec<Message>> for Request {
    fn from(messages: &Vec<Message>) -> Self {
        Self::of(messages.clone())
    }
}

impl From<&[Message]> for Request {
    fn from(messages: &[Message]) -> Self {
        Self::of(messages.to_vec())
    }
}

impl<const N: usize> From<[Message; N]> for Request {
    fn from(messages: [Message; N]) -> Self {
        Self::of(messages.into())
    }
}

/// The options of a chat, for [`Request`] and for each builder that has one: `$via` leads to it.
macro_rules! chat_options {
    (@param $name:ident: $type:ty, $doc:literal $(, $via:ident)?) => {
        #[doc = $doc]
        pub fn $name(mut self, $name: $type) -> Self {
            self$(.$via)?.chat.params.get_or_insert_default().$name = Some($name);
            self
        }
    };
    ($type:ty $(, $via:ident)?) => {
        /// The options of a chat. What is unset means the model's default.
        impl $type {
            /// Name or alias of the model.
            pub fn model(mut self, model: impl Into<String>) -> Self {
                self$(.$via)?.chat.model = model.into();
                self
            }

            crate::requests::chat_options!(@param temperature: f64, "Randomness; 0 is the most deterministic. Range: 0 to 2."$(, $via)?);
            crate::requests::chat_options!(@param top_p: f64, "Sample from the smallest set of tokens with this total probability. Range: above 0, to 1."$(, $via)?);
            crate::requests::chat_options!(@param top_k: i32, "Sample from this many most likely tokens. Not accepted by every upstream."$(, $via)?);
            crate::requests::chat_options!(@param min_p: f64, "Drop tokens less likely than this share of the most likely one. Range: 0 to 1. Not accepted by every upstream."$(, $via)?);
            crate::requests::chat_options!(@param max_completion_tokens: i32, "Upper bound on generated tokens, reasoning included."$(, $via)?);
            crate::requests::chat_options!(@param frequency_penalty: f64, "Added per earlier occurrence of a token; 0 is neutral. Range: -2 to 2."$(, $via)?);
            crate::requests::chat_options!(@param presence_penalty: f64, "Added once a token has occurred; 0 is neutral. Range: -2 to 2."$(, $via)?);
            crate::requests::chat_options!(@param repetition_penalty: f64, "Multiplies; 1 is neutral. Not accepted by every upstream."$(, $via)?);
            crate::requests::chat_options!(@param seed: i64, "Best-effort determinism."$(, $via)?);
            crate::requests::chat_options!(@param choice_count: i32, "Answers to generate (`n` elsewhere). Range: 1 to 128."$(, $via)?);
            crate::requests::chat_options!(@param logprobs: bool, "Return log probabilities."$(, $via)?);
            crate::requests::chat_options!(@param top_logprobs: i32, "Alternatives per token. Range: 0 to 20. Needs `logprobs`."$(, $via)?);
            crate::requests::chat_options!(@param enable_thinking: bool, "Turn thinking on or off where the model allows it."$(, $via)?);
            crate::requests::chat_options!(@param parallel_tool_calls: bool, "Allow several calls in one turn."$(, $via)?);

            /// Where to stop: at most 16 strings. Never part of the returned text.
            pub fn stop<S: Into<String>>(mut self, stop: impl IntoIterator<Item = S>) -> Self {
                self$(.$via)?.set_stop(stop.into_iter().map(Into::into).collect());
                self
            }

            /// Token id to bias. Range of the bias: -100 to 100.
            pub fn logit_bias(mut self, bias: impl IntoIterator<Item = (i32, f64)>) -> Self {
                self$(.$via)?.set_logit_bias(bias.into_iter().collect());
                self
            }

            /// How much to reason: `none`, `minimal`, `low`, `medium`, `high`, ...
            pub fn reasoning_effort(mut self, effort: impl Into<String>) -> Self {
                self$(.$via)?.set_reasoning_effort(effort.into());
                self
            }

            /// How much to say: `low`, `medium`, `high`, ...
            pub fn verbosity(mut self, verbosity: impl Into<String>) -> Self {
                self$(.$via)?.set_verbosity(verbosity.into());
                self
            }

            /// Tools the model may call.
            pub fn tools<T: Into<crate::Tool>>(
                mut self,
                tools: impl IntoIterator<Item = T>,
            ) -> Self {
                self$(.$via)?.set_tools(tools.into_iter().map(Into::into));
                self
            }

            /// Which tools it may or must call.
            pub fn tool_choice(mut self, choice: impl Into<crate::v1::ToolChoice>) -> Self {
                self$(.$via)?.chat.tool_choice = Some(choice.into());
                self
            }

            /// Asks for JSON of this schema; [`Reply::json`](crate::Reply::json) parses it.
            ///
            /// `schema` is anything serde writes as an object, or JSON text, which is sent
            /// unchanged. Key order is kept.
            pub fn json_schema(mut self, schema: impl serde::Serialize) -> Self {
                self$(.$via)?.set_json_schema(&schema);
                self
            }

            /// Asks for any JSON object; [`Reply::json`](crate::Reply::json) parses it.
            pub fn json_object(mut self) -> Self {
                self$(.$via)?.set_json_object();
                self
            }

            /// Shape of the answer in the contract's own words.
            pub fn response_format(mut self, format: crate::v1::ResponseFormat) -> Self {
                self$(.$via)?.chat.response_format = Some(format);
                self
            }

            /// How roles are written for the upstream; replaces the model's configured templates.
            pub fn role_templates(
                mut self,
                templates: impl IntoIterator<Item = crate::v1::RoleTemplate>,
            ) -> Self {
                self$(.$via)?.chat.role_templates = templates.into_iter().collect();
                self
            }

            /// Stable pseudonymous end-user identifier.
            pub fn end_user_id(mut self, id: impl Into<String>) -> Self {
                self$(.$via)?.chat.end_user_id = id.into();
                self
            }

            /// Cache bucket hint.
            pub fn prompt_cache_key(mut self, key: impl Into<String>) -> Self {
                self$(.$via)?.chat.prompt_cache_key = key.into();
                self
            }

            /// `auto`, `default`, `flex`, `priority`, ...
            pub fn service_tier(mut self, tier: impl Into<String>) -> Self {
                self$(.$via)?.chat.service_tier = tier.into();
                self
            }

            /// What to do with a parameter the upstream does not take.
            pub fn unsupported_parameters(mut self, policy: crate::UnsupportedParameters) -> Self {
                self$(.$via)?.set_policy(policy);
                self
            }

            /// A label for accounting; may be repeated.
            pub fn label(mut self, key: impl Into<String>, value: impl Into<String>) -> Self {
                self$(.$via)?.chat.labels.insert(key.into(), value.into());
                self
            }

            /// Merged into the upstream's body last, for what is not modelled here.
            ///
            /// Anything serde writes as an object, or JSON text, which is sent unchanged.
            pub fn extra_body(mut self, body: impl serde::Serialize) -> Self {
                self$(.$via)?.set_extra_body(&body);
                self
            }
        }
    };
}
pub(crate) use chat_options;

chat_options!(Request);

impl Request {
    pub(crate) fn set_stop(&mut self, stop: Vec<String>) {
        self.params().stop = stop;
    }

    pub(crate) fn set_logit_bias(&mut self, bias: BTreeMap<i32, f64>) {
        self.params().logit_bias = bias;
    }

    pub(crate) fn set_reasoning_effort(&mut self, effort: String) {
        self.params().reasoning_effort = effort;
    }

    pub(crate) fn set_verbosity(&mut self, verbosity: String) {
        self.params().verbosity = verbosity;
    }

    pub(crate) fn set_tools(&mut self, tools: impl Iterator<Item = Tool>) {
        self.chat.tools.clear();
        for (i, tool) in tools.enumerate() {
            self.chat.tools.push(tool.proto);
            if let (Some(error), None) = (tool.error, &self.error) {
                self.error = Some(error.within(&format!("tools[{i}]")));
            }
        }
    }

    pub(crate) fn set_json_schema(&mut self, schema: &impl Serialize) {
        match json_object(schema) {
            Ok(schema_json) => {
                let format = v1::JsonSchemaFormat {
                    name: schema_name(&schema_json),
                    schema_json,
                    ..v1::JsonSchemaFormat::default()
                };
                let format = Some(response_format::Format::JsonSchema(format));
                self.chat.response_format = Some(v1::ResponseFormat { format });
            }
            Err(description) => self.refuse("json_schema", description),
        }
    }

    pub(crate) fn set_json_object(&mut self) {
        let format = Some(response_format::Format::JsonObject(v1::JsonObjectFormat {}));
        self.chat.response_format = Some(v1::ResponseFormat { format });
    }

    pub(crate) fn set_policy(&mut self, policy: UnsupportedParameters) {
        let policy = match policy {
            UnsupportedParameters::Reject => v1::UnsupportedParameterPolicy::Reject,
            UnsupportedParameters::Drop => v1::UnsupportedParameterPolicy::Drop,
        };
        self.chat.unsupported_parameter_policy = policy.into();
    }

    pub(crate) fn set_extra_body(&mut self, body: &impl Serialize) {
        match json_object(body) {
            Ok(text) => self.chat.extra_body_json = text,
            Err(description) => self.refuse("extra_body", description),
        }
    }
}

/// Text as it is, anything else as JSON.
pub(crate) fn content_text(value: &impl Serialize) -> Result<String, serde_json::Error> {
    let text = serde_json::to_string(value)?;
    // Only a string is written with a quote in front.
    if text.starts_with('"') { serde_json::from_str(&text) } else { Ok(text) }
}

/// A JSON object as text, or what is wrong.
fn json_object(value: &impl Serialize) -> Result<String, String> {
    let text = content_text(value).map_err(|error| format!("cannot be written: {error}"))?;
    match serde_json::from_str::<serde_json::Value>(&text) {
        Ok(serde_json::Value::Object(_)) => Ok(text),
        Ok(other) => Err(format!("expected a JSON object, got {}", start(&other.to_string()))),
        Err(error) => Err(format!("expected a JSON object, {error}: {}", start(&text))),
    }
}

fn start(text: &str) -> String {
    let start: String = text.chars().take(40).collect();
    if start.len() < text.len() { start + "…" } else { start }
}

/// Upstreams want a name of this alphabet, and few people have one at hand.
fn schema_name(schema_json: &str) -> String {
    let schema: serde_json::Value = serde_json::from_str(schema_json).unwrap_or_default();
    let title = schema["title"].as_str().unwrap_or_default();
    let plain = |c: char| if c.is_ascii_alphanumeric() || "_-".contains(c) { c } else { '_' };
    let name: String = title.chars().map(plain).take(64).collect();
    if name.is_empty() { "answer".to_owned() } else { name }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn refused(request: Request) -> (String, String) {
        let error = request.model("m").checked().unwrap_err();
        let violation = &error.field_violations()[0];
        assert!(*error.reason() == "" && error.request_id().is_empty());
        (violation.field.clone(), violation.description.clone())
    }

    #[test]
    fn what_cannot_be_sent_is_refused_with_its_place() {
        assert_eq!(refused(Request::new(vec![])).0, "messages");
        assert_eq!(refused(Request::new("Hi").model("").extra_body(1)).0, "extra_body");
        let (field, description) = refused(Request::new("Hi").json_schema("[1, 2"));
        assert_eq!(field, "json_schema");
        assert!(description.ends_with(": [1, 2"), "{description}");
        let tools = [Tool::custom("a"), Tool::custom("b").parameters(json!({}))];
        assert_eq!(refused(Request::new("Hi").tools(tools)).0, "tools[1].parameters");
        let no_model = Request::new("Hi").checked().unwrap_err();
        assert_eq!(no_model.field_violations()[0].field, "model");
    }

    #[test]
    fn key_order_is_kept_and_text_is_sent_unchanged() {
        let chat = Request::new("Hi").extra_body(json!({"z": 1, "a": 2})).chat;
        assert_eq!(chat.extra_body_json, r#"{"z":1,"a":2}"#);
        let text = r#"{ "n": 9007199254740993.10 }"#;
        assert_eq!(Request::new("Hi").extra_body(text).chat.extra_body_json, text);
    }

    #[test]
    fn a_schema_is_named_after_its_title() {
        assert_eq!(schema_name(r#"{"title": "My répönse"}"#), "My_r_p_nse");
        assert_eq!(schema_name("{}"), "answer");
    }

    #[test]
    fn an_item_keeps_what_it_says_and_takes_the_rest() {
        let all = Request::new("")
            .model("all")
            .temperature(1.0)
            .top_p(0.5)
            .stop(["x"])
            .label("a", "1")
            .json_object();
        let item = Request::new("Hi").temperature(0.0).stop(["y"]).with_defaults(&all);
        let chat = item.checked().unwrap();
        let params = chat.params.unwrap();
        assert_eq!((params.temperature, params.top_p), (Some(0.0), Some(0.5)));
        assert_eq!((params.stop, &*chat.model), (vec!["y".to_owned()], "all"));
        assert_eq!(chat.messages, [Message::user("Hi")]);
        assert!(chat.response_format.is_some() && chat.labels.len() == 1);
        let own = Request::new("Hi").model("own").with_defaults(&all);
        assert_eq!(own.chat.model, "own");
    }

    #[test]
    fn every_field_of_the_batch_is_filled() {
        use prost::Message as _;
        // A request with everything set: nothing of it may be lost on an item that sets nothing.
        let all = Request::new("Hi")
            .model("m")
            .temperature(1.0)
            .top_p(1.0)
            .top_k(1)
            .min_p(1.0)
            .max_completion_tokens(1)
            .frequency_penalty(1.0)
            .presence_penalty(1.0)
            .repetition_penalty(1.0)
            .seed(1)
            .choice_count(1)
            .logprobs(true)
            .top_logprobs(1)
            .enable_thinking(true)
            .parallel_tool_calls(true)
            .stop(["s"])
            .logit_bias([(1, 1.0)])
            .reasoning_effort("low")
            .verbosity("low")
            .tools([Tool::custom("t")])
            .tool_choice(ToolChoice::Auto)
            .json_object()
            .role_templates([v1::RoleTemplate::default()])
            .end_user_id("u")
            .prompt_cache_key("k")
            .service_tier("t")
            .unsupported_parameters(UnsupportedParameters::Drop)
            .label("l", "1")
            .extra_body(json!({}));
        let item = Request::new("Hi").with_defaults(&all);
        assert_eq!(item.chat.encode_to_vec(), all.chat.encode_to_vec());
    }
}
