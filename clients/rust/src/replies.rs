//! Answers: whole, or growing event by event into the same shape.

use std::fmt;

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use crate::errors::JsonError;
use crate::requests::content_text;
use crate::v1::{self, FinishReason, stream_chat_response::Event as Kind, tool_call};

/// A whole answer, or within an error what had arrived of one.
///
/// The methods that name no choice are about the first one.
#[derive(Clone, PartialEq)]
pub struct Reply {
    proto: v1::ChatResponse,
    request_id: String,
}

impl Reply {
    pub(crate) fn new(proto: v1::ChatResponse, request_id: &str) -> Self {
        Self { proto, request_id: request_id.to_owned() }
    }

    /// Answers, by index: one unless `choice_count` asked for more.
    pub fn choices(&self) -> impl ExactSizeIterator<Item = Choice<'_>> {
        self.proto.choices.iter().map(Choice)
    }

    /// The first choice's text; `""` when there is none, as when the model only calls tools.
    pub fn text(&self) -> &str {
        first(&self.proto.choices).text()
    }

    /// What the model showed of its reasoning; usually `""`.
    pub fn reasoning(&self) -> &str {
        first(&self.proto.choices).reasoning()
    }

    /// Why the model declined; usually `""`.
    pub fn refusal(&self) -> &str {
        first(&self.proto.choices).refusal()
    }

    /// The whole message; push it onto the conversation to go on.
    pub fn message(&self) -> v1::ChatMessage {
        first(&self.proto.choices).message()
    }

    /// Calls the model wants made.
    pub fn tool_calls(&self) -> impl ExactSizeIterator<Item = ToolCall<'_>> {
        first(&self.proto.choices).tool_calls()
    }

    /// Why the answer ended.
    pub fn finish_reason(&self) -> FinishReason {
        first(&self.proto.choices).finish_reason()
    }

    /// The text, parsed as JSON: for `json_schema` and `json_object`.
    ///
    /// # Errors
    /// When the text is not JSON of that shape, as after [`FinishReason::Length`].
    pub fn json<T: DeserializeOwned>(&self) -> Result<T, JsonError> {
        first(&self.proto.choices).json()
    }

    /// Model, upstream, attempts, dropped parameters.
    pub fn header(&self) -> &v1::ResponseHeader {
        self.proto.header.as_ref().unwrap_or(&NO_HEADER)
    }

    /// Tokens used.
    pub fn usage(&self) -> &v1::Usage {
        self.proto.usage.as_ref().unwrap_or(&NO_USAGE)
    }

    /// The call's `x-request-id`.
    pub fn request_id(&self) -> &str {
        &self.request_id
    }

    /// The message of the contract.
    pub fn proto(&self) -> &v1::ChatResponse {
        &self.proto
    }
}

impl fmt::Debug for Reply {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reply")
            .field("text", &self.text())
            .field("finish_reason", &self.finish_reason())
            .field("model", &self.header().model)
            .field("request_id", &self.request_id)
            .finish_non_exhaustive()
    }
}

impl From<Reply> for v1::ChatMessage {
    fn from(reply: Reply) -> Self {
        reply.message()
    }
}

impl From<&Reply> for v1::ChatMessage {
    fn from(reply: &Reply) -> Self {
        reply.message()
    }
}

const NO_MESSAGE: v1::ChatMessage = v1::ChatMessage {
    role: String::new(),
    content: None,
    parts: Vec::new(),
    name: String::new(),
    tool_calls: Vec::new(),
    tool_call_id: String::new(),
    reasoning: None,
    refusal: None,
    annotations: Vec::new(),
    extra_json: String::new(),
};
static EMPTY_MESSAGE: v1::ChatMessage = NO_MESSAGE;
static NO_CHOICE: v1::Choice = v1::Choice {
    index: 0,
    message: None,
    finish_reason: 0,
    finish_reason_raw: String::new(),
    logprobs: Vec::new(),
    extra_json: String::new(),
};
static NO_HEADER: v1::ResponseHeader = v1::ResponseHeader {
    id: String::new(),
    model: String::new(),
    upstream: String::new(),
    create_time: None,
    system_fingerprint: String::new(),
    service_tier: String::new(),
    max_completion_tokens: 0,
    dropped_parameters: Vec::new(),
    attempts: Vec::new(),
    extra_json: String::new(),
};
static NO_USAGE: v1::Usage = v1::Usage {
    prompt_tokens: 0,
    completion_tokens: 0,
    total_tokens: 0,
    cached_prompt_tokens: None,
    cache_write_tokens: None,
    reasoning_tokens: None,
    estimated: false,
    extra_json: String::new(),
};

pub(crate) fn first(choices: &[v1::Choice]) -> Choice<'_> {
    Choice(choices.first().unwrap_or(&NO_CHOICE))
}

/// One of the answers to one request.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Choice<'a>(&'a v1::Choice);

impl<'a> Choice<'a> {
    /// Position, from 0.
    pub fn index(self) -> i32 {
        self.0.index
    }

    /// The whole message; push it onto the conversation to go on.
    pub fn message(self) -> v1::ChatMessage {
        self.inner().clone()
    }

    /// The answer; `""` when there is none, as when the model only calls tools.
    pub fn text(self) -> &'a str {
        self.inner().content.as_deref().unwrap_or("")
    }

    /// What the model showed of its reasoning; usually `""`.
    pub fn reasoning(self) -> &'a str {
        self.inner().reasoning.as_deref().unwrap_or("")
    }

    /// Why the model declined; usually `""`.
    pub fn refusal(self) -> &'a str {
        self.inner().refusal.as_deref().unwrap_or("")
    }

    /// Calls the model wants made.
    pub fn tool_calls(self) -> impl ExactSizeIterator<Item = ToolCall<'a>> {
        self.inner().tool_calls.iter().map(ToolCall)
    }

    /// Why it ended; [`FinishReason::Unspecified`] while it grows. The upstream's own word is
    /// `proto().finish_reason_raw`.
    pub fn finish_reason(self) -> FinishReason {
        // A reason newer than this crate is not "not ended".
        FinishReason::try_from(self.0.finish_reason).unwrap_or(FinishReason::Other)
    }

    /// The text, parsed as JSON; see [`Reply::json`].
    ///
    /// # Errors
    /// When the text is not JSON of that shape.
    pub fn json<T: DeserializeOwned>(self) -> Result<T, JsonError> {
        let what = || format!("answer (finish reason {})", self.finish_reason());
        parsed(self.text(), what)
    }

    /// The message of the contract.
    pub fn proto(self) -> &'a v1::Choice {
        self.0
    }

    fn inner(self) -> &'a v1::ChatMessage {
        self.0.message.as_ref().unwrap_or(&EMPTY_MESSAGE)
    }
}

/// A call the model wants made.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ToolCall<'a>(&'a v1::ToolCall);

impl<'a> ToolCall<'a> {
    /// What the answering message repeats; [`answer`](ToolCall::answer) does that.
    pub fn id(self) -> &'a str {
        &self.0.id
    }

    /// Name of the tool.
    pub fn name(self) -> &'a str {
        match &self.0.call {
            Some(tool_call::Call::Function(call)) => &call.name,
            Some(tool_call::Call::Custom(call)) => &call.name,
            None => "",
        }
    }

    /// Whether this calls a free-form tool, whose input is text rather than JSON.
    pub fn is_custom(self) -> bool {
        matches!(self.0.call, Some(tool_call::Call::Custom(_)))
    }

    /// Exactly what the model wrote: usually JSON text; the input of a free-form tool.
    pub fn raw_arguments(self) -> &'a str {
        match &self.0.call {
            Some(tool_call::Call::Function(call)) => &call.arguments_json,
            Some(tool_call::Call::Custom(call)) => &call.input,
            None => "",
        }
    }

    /// The arguments, parsed; no text counts as no arguments.
    ///
    /// # Errors
    /// When the model wrote something other than JSON of that shape.
    pub fn arguments<T: DeserializeOwned>(self) -> Result<T, JsonError> {
        let raw = self.raw_arguments();
        let text = if raw.trim().is_empty() && !self.is_custom() { "{}" } else { raw };
        parsed(text, || format!("arguments of the call of {:?} ({})", self.name(), self.id()))
    }

    /// The message that gives the model `result`: text as it is, anything else as JSON.
    ///
    /// # Errors
    /// When `result` cannot be written as JSON.
    pub fn answer(self, result: impl Serialize) -> Result<v1::ChatMessage, serde_json::Error> {
        Ok(v1::ChatMessage {
            role: "tool".to_owned(),
            tool_call_id: self.0.id.clone(),
            content: Some(content_text(&result)?),
            ..v1::ChatMessage::default()
        })
    }

    /// The message of the contract.
    pub fn proto(self) -> &'a v1::ToolCall {
        self.0
    }
}

fn parsed<T: DeserializeOwned>(text: &str, what: impl Fn() -> String) -> Result<T, JsonError> {
    serde_json::from_str(text).map_err(|error| JsonError::new(what(), text, error))
}

/// What an event of a stream is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum EventKind {
    /// Facts known once, before any text.
    Header,
    /// New text of one choice.
    Delta,
    /// Everything so far of one choice; only with [`StreamMode::Cumulative`](crate::StreamMode).
    Snapshot,
    /// A choice ended.
    Finish,
    /// The last event of a complete stream.
    Trailer,
}

/// One event of a stream.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    proto: v1::StreamChatResponse,
    kind: EventKind,
    /// For a snapshot, where what is new begins.
    from: usize,
}

impl Event {
    /// What it is.
    pub fn kind(&self) -> EventKind {
        self.kind
    }

    /// New answer text, in either mode; `""` for an event without any.
    pub fn text(&self) -> &str {
        match &self.proto.event {
            Some(Kind::Delta(delta)) => &delta.content,
            Some(Kind::Snapshot(snapshot)) => {
                let message = snapshot.message.as_ref();
                message.and_then(|m| m.content.as_deref()).map_or("", |all| &all[self.from..])
            }
            _ => "",
        }
    }

    /// New reasoning text; `""` in cumulative mode, where the stream has it.
    pub fn reasoning(&self) -> &str {
        match &self.proto.event {
            Some(Kind::Delta(delta)) => &delta.reasoning,
            _ => "",
        }
    }

    /// Choice this belongs to; 0 for header and trailer.
    pub fn choice_index(&self) -> i32 {
        match &self.proto.event {
            Some(Kind::Delta(delta)) => delta.choice_index,
            Some(Kind::Snapshot(snapshot)) => snapshot.choice_index,
            Some(Kind::Finish(finish)) => finish.choice_index,
            _ => 0,
        }
    }

    /// The message of the contract.
    pub fn proto(&self) -> &v1::StreamChatResponse {
        &self.proto
    }

    pub(crate) fn has_token(&self) -> bool {
        let more = |delta: &v1::Delta| {
            !(delta.reasoning.is_empty() && delta.refusal.is_empty() && delta.tool_calls.is_empty())
        };
        !self.text().is_empty() || matches!(&self.proto.event, Some(Kind::Delta(d)) if more(d))
    }
}

/// Folds the events of one stream into the answer so far. No I/O.
///
/// A [`Stream`](crate::Stream) holds one; use it by itself to fold events that came another way.
#[derive(Clone, Debug, Default)]
pub struct Accumulator {
    header: Option<v1::ResponseHeader>,
    trailer: Option<v1::StreamTrailer>,
    choices: Vec<v1::Choice>,
    growing: Vec<Growing>, // beside `choices`
}

/// What a growing choice needs besides its message.
#[derive(Clone, Debug, Default)]
struct Growing {
    calls: Vec<i32>, // the index of each of the message's tool calls
    extra: Map<String, Value>,
}

impl Accumulator {
    /// Nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Folds one event in; `None` for one to ignore: a heartbeat, or newer than this crate.
    pub fn add(&mut self, proto: v1::StreamChatResponse) -> Option<Event> {
        let mut from = 0;
        let kind = match proto.event.as_ref()? {
            Kind::Header(header) => {
                self.header = Some(header.clone());
                EventKind::Header
            }
            Kind::Delta(delta) => {
                let at = self.choice(delta.choice_index);
                append(&mut self.choices[at], &mut self.growing[at], delta);
                EventKind::Delta
            }
            Kind::Snapshot(snapshot) => {
                let at = self.choice(snapshot.choice_index);
                let after = snapshot.message.clone().unwrap_or_default();
                let before = self.choices[at].message.replace(after);
                from = common(before.as_ref(), snapshot.message.as_ref());
                EventKind::Snapshot
            }
            Kind::Finish(finish) => {
                let at = self.choice(finish.choice_index);
                let choice = &mut self.choices[at];
                choice.finish_reason = finish.finish_reason;
                choice.finish_reason_raw.clone_from(&finish.finish_reason_raw);
                choice.extra_json.clone_from(&finish.extra_json);
                EventKind::Finish
            }
            Kind::Trailer(trailer) => {
                self.trailer = Some(trailer.clone());
                EventKind::Trailer
            }
        };
        Some(Event { proto, kind, from })
    }

    /// Answers so far, by index.
    pub fn choices(&self) -> impl ExactSizeIterator<Item = Choice<'_>> {
        self.choices.iter().map(Choice)
    }

    /// The first choice so far; an empty one when there is none.
    pub fn first(&self) -> Choice<'_> {
        first(&self.choices)
    }

    /// Model, upstream, attempts; `None` before the first event.
    pub fn header(&self) -> Option<&v1::ResponseHeader> {
        self.header.as_ref()
    }

    /// Tokens used; `None` before the trailer, or when nobody reported them.
    pub fn usage(&self) -> Option<&v1::Usage> {
        self.trailer.as_ref().and_then(|trailer| trailer.usage.as_ref())
    }

    /// The last event; `None` unless the stream is complete.
    pub fn trailer(&self) -> Option<&v1::StreamTrailer> {
        self.trailer.as_ref()
    }

    /// Whether the trailer has arrived: without it the answer is only a part.
    pub fn is_complete(&self) -> bool {
        self.trailer.is_some()
    }

    /// What has arrived, as `chat` returns it; see [`is_complete`](Accumulator::is_complete).
    pub fn so_far(&self, request_id: &str) -> Reply {
        let mut header = self.header.clone();
        if let Some(after) = self.trailer.as_ref().map(|t| &t.extra_json).filter(|t| !t.is_empty())
        {
            // What a whole answer has in its header, a stream learns when that has gone.
            let header = header.get_or_insert_default();
            let mut all = extra(&header.extra_json);
            all.extend(extra(after));
            header.extra_json = Value::Object(all).to_string();
        }
        let choices = self.choices.iter().cloned().map(whole).collect();
        Reply::new(v1::ChatResponse { header, choices, usage: self.usage().cloned() }, request_id)
    }

    fn choice(&mut self, index: i32) -> usize {
        self.choices.binary_search_by_key(&index, |choice| choice.index).unwrap_or_else(|at| {
            let message = v1::ChatMessage { role: "assistant".to_owned(), ..NO_MESSAGE };
            let choice = v1::Choice { index, message: Some(message), ..v1::Choice::default() };
            self.choices.insert(at, choice);
            self.growing.insert(at, Growing::default());
            at
        })
    }
}

fn append(choice: &mut v1::Choice, growing: &mut Growing, delta: &v1::Delta) {
    let message = choice.message.get_or_insert_default();
    push(&mut message.content, &delta.content);
    push(&mut message.reasoning, &delta.reasoning);
    push(&mut message.refusal, &delta.refusal);
    for part in &delta.tool_calls {
        let at = growing.calls.binary_search(&part.index).unwrap_or_else(|at| {
            growing.calls.insert(at, part.index);
            let call = tool_call::Call::Function(v1::FunctionCall::default());
            message.tool_calls.insert(at, v1::ToolCall { id: String::new(), call: Some(call) });
            at
        });
        grow(&mut message.tool_calls[at], part);
    }
    message.annotations.extend_from_slice(&delta.annotations);
    choice.logprobs.extend_from_slice(&delta.logprobs);
    if !delta.extra_json.is_empty() {
        for (key, value) in extra(&delta.extra_json) {
            append_json(growing.extra.entry(key).or_insert(Value::Null), value);
        }
        message.extra_json = Value::Object(growing.extra.clone()).to_string();
    }
}

/// The first id and name win, arguments append.
fn grow(call: &mut v1::ToolCall, part: &v1::ToolCallDelta) {
    if call.id.is_empty() {
        call.id.clone_from(&part.id);
    }
    if let (true, Some(tool_call::Call::Function(so_far))) = (part.custom, &mut call.call) {
        call.call = Some(tool_call::Call::Custom(v1::CustomCall {
            name: std::mem::take(&mut so_far.name),
            input: std::mem::take(&mut so_far.arguments_json),
        }));
    }
    let (name, text) = match &mut call.call {
        Some(tool_call::Call::Function(call)) => (&mut call.name, &mut call.arguments_json),
        Some(tool_call::Call::Custom(call)) => (&mut call.name, &mut call.input),
        None => return,
    };
    if name.is_empty() {
        name.clone_from(&part.name);
    }
    text.push_str(&part.arguments);
}

fn push(to: &mut Option<String>, new: &str) {
    if !new.is_empty() {
        to.get_or_insert_default().push_str(new);
    }
}

/// A turn that only calls tools, or refuses, has null content, and no other turn has.
fn whole(mut choice: v1::Choice) -> v1::Choice {
    if let Some(message) = &mut choice.message {
        let silent = message.content.is_none() && message.parts.is_empty();
        if silent && message.tool_calls.is_empty() && message.refusal.is_none() {
            message.content = Some(String::new());
        }
    }
    choice
}

/// How much of a snapshot was there before; all of it is new where the text was rewritten.
fn common(before: Option<&v1::ChatMessage>, after: Option<&v1::ChatMessage>) -> usize {
    let text = |m: Option<&v1::ChatMessage>| m.and_then(|m| m.content.clone()).unwrap_or_default();
    let (before, after) = (text(before), text(after));
    if after.starts_with(&before) { before.len() } else { 0 }
}

/// Delta semantics for JSON nobody has modelled: text and lists grow, objects merge.
fn append_json(before: &mut Value, new: Value) {
    match (before, new) {
        (Value::Object(before), Value::Object(new)) => {
            for (key, value) in new {
                append_json(before.entry(key).or_insert(Value::Null), value);
            }
        }
        (Value::String(before), Value::String(new)) => before.push_str(&new),
        (Value::Array(before), Value::Array(new)) => before.extend(new),
        (before, new) => *before = new,
    }
}

/// Unmodelled fields; they are a courtesy, and must not cost the answer.
fn extra(text: &str) -> Map<String, Value> {
    serde_json::from_str(text).unwrap_or_default()
}

impl fmt::Display for FinishReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = self.as_str_name();
        f.write_str(&name.strip_prefix("FINISH_REASON_").unwrap_or(name).to_lowercase())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn delta(delta: v1::Delta) -> v1::StreamChatResponse {
        v1::StreamChatResponse { event: Some(Kind::Delta(delta)) }
    }

    fn part(index: i32, id: &str, name: &str, arguments: &str, custom: bool) -> v1::ToolCallDelta {
        v1::ToolCallDelta {
            index,
            id: id.to_owned(),
            name: name.to_owned(),
            arguments: arguments.to_owned(),
            custom,
        }
    }

    #[test]
    fn tool_calls_keep_their_first_id_and_name_and_stand_by_index() {
        let mut answer = Accumulator::new();
        for calls in [
            vec![part(1, "b", "second", "in", true)],
            vec![part(0, "a", "first", "{\"x\"", false), part(1, "c", "other", "put", false)],
            vec![part(0, "", "", ":1}", false)],
        ] {
            answer.add(delta(v1::Delta { tool_calls: calls, ..v1::Delta::default() }));
        }
        let reply = answer.so_far("");
        let calls: Vec<_> = reply.tool_calls().collect();
        let seen: Vec<_> = calls.iter().map(|c| (c.id(), c.name(), c.raw_arguments())).collect();
        assert_eq!(seen, [("a", "first", "{\"x\":1}"), ("b", "second", "input")]);
        assert_eq!([calls[0].is_custom(), calls[1].is_custom()], [false, true]);
        assert_eq!(calls[0].arguments::<Value>().unwrap()["x"], 1);
        assert_eq!(reply.message().content, None);
    }

    #[test]
    fn unmodelled_fields_grow_like_text() {
        let mut answer = Accumulator::new();
        for text in [
            r#"{"a":"x","l":[1],"o":{"k":"p"},"n":1}"#,
            "not JSON",
            r#"{"a":"y","l":[2],"o":{"k":"q"},"n":2}"#,
        ] {
            answer.add(delta(v1::Delta { extra_json: text.to_owned(), ..v1::Delta::default() }));
        }
        let message = answer.so_far("").message();
        assert_eq!(message.extra_json, r#"{"a":"xy","l":[1,2],"o":{"k":"pq"},"n":2}"#);
        assert_eq!(message.content.as_deref(), Some(""));
    }

    #[test]
    fn choices_interleave() {
        let mut answer = Accumulator::new();
        for (choice_index, content) in [(1, "b1"), (0, "a1"), (1, "b2"), (0, "a2")] {
            let content = content.to_owned();
            answer.add(delta(v1::Delta { choice_index, content, ..v1::Delta::default() }));
        }
        let texts: Vec<_> = answer.choices().map(|c| (c.index(), c.text())).collect();
        assert_eq!(texts, [(0, "a1a2"), (1, "b1b2")]);
    }

    #[test]
    fn a_rewritten_snapshot_is_all_new() {
        let mut answer = Accumulator::new();
        let mut snap = |text: &str| {
            let content = Some(text.to_owned());
            let message = Some(v1::ChatMessage { content, ..NO_MESSAGE });
            let snapshot = v1::Snapshot { state: 2, choice_index: 0, message };
            let event = v1::StreamChatResponse { event: Some(Kind::Snapshot(snapshot)) };
            answer.add(event).unwrap().text().to_owned()
        };
        assert_eq!(
            [snap("po"), snap("pong"), snap("pong"), snap("ping")],
            ["po", "ng", "", "ping"]
        );
    }

    #[test]
    fn a_newer_finish_reason_is_other_and_a_newer_event_is_ignored() {
        let mut answer = Accumulator::new();
        let finish = v1::Finish { finish_reason: 99, ..v1::Finish::default() };
        answer.add(v1::StreamChatResponse { event: Some(Kind::Finish(finish)) });
        assert_eq!(answer.first().finish_reason(), FinishReason::Other);
        assert_eq!(answer.add(v1::StreamChatResponse { event: None }), None);
    }

    #[test]
    fn every_field_of_a_stream_is_kept() {
        let mut answer = Accumulator::new();
        let logprob = |token: &str| v1::TokenLogprob { token: token.into(), ..Default::default() };
        let note = v1::Annotation { url: "u".into(), ..Default::default() };
        for (token, refusal) in [("Hel", "No"), ("lo", ", sorry")] {
            answer.add(delta(v1::Delta {
                content: token.into(),
                reasoning: token.into(),
                refusal: refusal.into(),
                logprobs: vec![logprob(token)],
                annotations: vec![note.clone()],
                ..Default::default()
            }));
        }
        let finish = v1::Finish {
            finish_reason: FinishReason::Stop.into(),
            finish_reason_raw: "eos".into(),
            extra_json: "{}".into(),
            choice_index: 0,
        };
        answer.add(v1::StreamChatResponse { event: Some(Kind::Finish(finish)) });
        let expected = v1::Choice {
            index: 0,
            message: Some(v1::ChatMessage {
                role: "assistant".into(),
                content: Some("Hello".into()),
                reasoning: Some("Hello".into()),
                refusal: Some("No, sorry".into()),
                annotations: vec![note.clone(), note],
                ..NO_MESSAGE
            }),
            finish_reason: FinishReason::Stop.into(),
            finish_reason_raw: "eos".into(),
            logprobs: vec![logprob("Hel"), logprob("lo")],
            extra_json: "{}".into(),
        };
        assert_eq!(answer.so_far("").proto().choices, [expected]);
    }

    #[test]
    fn what_came_after_the_header_is_in_the_reply() {
        let mut answer = Accumulator::new();
        let header = v1::ResponseHeader { extra_json: r#"{"a":1}"#.into(), ..Default::default() };
        let trailer = v1::StreamTrailer { extra_json: r#"{"b":2}"#.into(), ..Default::default() };
        for event in [Kind::Header(header), Kind::Trailer(trailer)] {
            answer.add(v1::StreamChatResponse { event: Some(event) });
        }
        assert!(answer.is_complete());
        assert_eq!(answer.so_far("").header().extra_json, r#"{"a":1,"b":2}"#);
    }
}
