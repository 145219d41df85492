//! Runs the conformance cases with the Rust client: tests/conformance/README.md.

use std::error::Error as StdError;
use std::io::{BufRead, Write};
use std::time::Duration;

use serde_json::{Map, Value, json};
use tokenwire::v1::{self, RoleTemplate, stream_chat_response::Event as Kind};
use tokenwire::{
    BatchResult, Client, Error, EventKind, Message, Reply, Request, StreamMode, Tls, Tool,
    ToolChoice, UnsupportedParameters,
};

type Failure = Box<dyn StdError>;

/// One case for each line of standard input.
#[tokio::main(flavor = "multi_thread", worker_threads = 1)]
async fn main() -> Result<(), Failure> {
    for text in std::io::stdin().lock().lines() {
        let asked: Value = serde_json::from_str(&text?)?;
        let case = &asked["case"];
        let mut line = match run(case, &asked["connect"]).await {
            Ok(line) => line,
            Err(failure) => match failure.downcast::<Error>() {
                Ok(error) => json!({"ok": false, "error": told(&error)}),
                Err(defect) => json!({"defect": defect.to_string()}),
            },
        };
        line["case"] = case["name"].clone();
        let mut output = std::io::stdout().lock();
        writeln!(output, "{line}")?;
        output.flush()?;
    }
    Ok(())
}

async fn run(case: &Value, connect: &Value) -> Result<Value, Failure> {
    let client = connected(connect)?;
    let mut earlier = 0;
    for _ in 1..case["repeat"].as_u64().unwrap_or(1) {
        earlier += u32::from(once(&client, case).await?["ok"] == true);
        tokio::time::sleep(milliseconds(&case["gap_ms"]).unwrap_or_default()).await;
    }
    let mut line = once(&client, case).await?;
    line["earlier"] = earlier.into();
    Ok(line)
}

fn connected(connect: &Value) -> Result<Client, Failure> {
    let mut builder = Client::builder(text(&connect["target"])).token(text(&connect["token"]));
    if let Some(authorities) = connect["ca_file"].as_str() {
        let mut tls = Tls::authorities(std::fs::read(authorities)?);
        if let Some(certificate) = connect["cert_file"].as_str() {
            tls = tls
                .identity(std::fs::read(certificate)?, std::fs::read(text(&connect["key_file"]))?);
        }
        builder = builder.tls(tls);
    }
    Ok(builder.connect_lazy()?)
}

/// What every call takes, for whichever builder.
macro_rules! with_call_options {
    ($call:expr, $case:expr) => {{
        let mut call = $call;
        if let Some(timeout) = milliseconds(&$case["timeout_ms"]) {
            call = call.timeout(timeout);
        }
        if let Some(id) = $case["request_id"].as_str() {
            call = call.request_id(id);
        }
        for (key, value) in object(&$case["metadata"]) {
            call = call.metadata(key, text(&value));
        }
        if let Some(after) = milliseconds(&$case["leave"]["after_ms"]) {
            call = call.cancel_when(tokio::time::sleep(after));
        }
        call
    }};
}

async fn once(client: &Client, case: &Value) -> Result<Value, Failure> {
    let asked = &case["request"];
    match text(&case["op"]) {
        "chat" => {
            let call = with_call_options!(client.chat(request(asked)?), case);
            answer(case, &call.send().await?)
        }
        "stream" => stream(client, case).await,
        op @ ("batch" | "batch_ordered") => {
            let items = array(&asked["items"]).into_iter().map(|item| request(&item));
            let items = items.collect::<Result<Vec<_>, _>>()?;
            let mut call = with_call_options!(client.batch(items), case);
            if let Some(most) = integer(&asked["max_concurrency"])? {
                call = call.max_concurrency(most);
            }
            let mut batch = call.send().await?;
            let mut results = Vec::new();
            if op == "batch" {
                while let Some(result) = batch.next().await {
                    results.push(result?);
                }
                results.sort_by_key(|result| result.index);
            } else {
                results = batch.ordered().await?;
            }
            let rows: Vec<_> = results.iter().map(row).collect();
            Ok(json!({"ok": true, "results": rows}))
        }
        "count_tokens" => {
            let call = with_call_options!(client.count_tokens(request(asked)?), case);
            let count = call.send().await?;
            Ok(json!({"ok": true, "tokens": count.total_tokens, "tokenizer": count.tokenizer}))
        }
        "tokenize" => {
            let call = client.tokenize(strings(&asked["texts"])).model(text(&asked["model"]));
            let lists = with_call_options!(call, case).send().await?;
            let ids: Vec<_> = lists.iter().map(|list| &list.ids).collect();
            let hex =
                |piece: &Vec<u8>| piece.iter().map(|b| format!("{b:02x}")).collect::<String>();
            let pieces: Vec<Vec<_>> =
                lists.iter().map(|list| list.pieces.iter().map(hex).collect()).collect();
            Ok(json!({"ok": true, "ids": ids, "pieces": pieces}))
        }
        "models" => {
            let models = with_call_options!(client.models(), case).send().await?;
            let names: Vec<_> = models.into_iter().map(|model| model.name).collect();
            Ok(json!({"ok": true, "models": names}))
        }
        op => Err(format!("no op {op:?}").into()),
    }
}

async fn stream(client: &Client, case: &Value) -> Result<Value, Failure> {
    let mut call = with_call_options!(client.stream(request(&case["request"])?), case);
    if case["mode"] == "cumulative" {
        call = call.mode(StreamMode::Cumulative);
    }
    let mut stream = call.send().await?;
    let (mut kinds, mut states) = (Vec::new(), Vec::new());
    let mut pause = milliseconds(&case["pause_ms"]);
    while let Some(event) = stream.next().await {
        let event = event?;
        kinds.push(match event.kind() {
            EventKind::Header => "header",
            EventKind::Delta => "delta",
            EventKind::Snapshot => "snapshot",
            EventKind::Finish => "finish",
            EventKind::Trailer => "trailer",
            _ => "unknown",
        });
        if let Some(Kind::Snapshot(snapshot)) = &event.proto().event {
            states.push(snapshot.state().as_str_name().trim_start_matches("STATE_").to_owned());
        }
        let delay = milliseconds(&case["read_delay_ms"]).unwrap_or_default();
        tokio::time::sleep(delay + pause.take().unwrap_or_default()).await;
        let enough = case["leave"]["after_text"].as_u64();
        if enough.is_some_and(|enough| stream.text().chars().count() as u64 >= enough) {
            return Ok(json!({"ok": true, "left": true, "partial_text": stream.text()}));
        }
    }
    let mut line = answer(case, &stream.reply().await?)?;
    kinds.dedup();
    states.dedup();
    line["kinds"] = kinds.into();
    if !states.is_empty() {
        line["states"] = states.into();
    }
    Ok(line)
}

// --- what the client is told

fn request(asked: &Value) -> Result<Request, Failure> {
    let mut request = match (asked["prompt_bytes"].as_u64(), asked["messages"].as_array()) {
        (Some(bytes), _) => Request::new("a".repeat(bytes.try_into()?)),
        (None, Some(messages)) => {
            let turn = |m: &Value| Message::with_role(text(&m["role"]), text(&m["content"]));
            Request::new(messages.iter().map(turn).collect::<Vec<_>>())
        }
        (None, None) => Request::new(text(&asked["prompt"])),
    };
    request = request.model(text(&asked["model"])).custom_id(text(&asked["custom_id"]));
    if let Some(temperature) = asked["temperature"].as_f64() {
        request = request.temperature(temperature);
    }
    if let Some(top_k) = integer(&asked["top_k"])? {
        request = request.top_k(top_k);
    }
    if let Some(most) = integer(&asked["max_completion_tokens"])? {
        request = request.max_completion_tokens(most);
    }
    if let Some(count) = integer(&asked["choice_count"])? {
        request = request.choice_count(count);
    }
    if !asked["stop"].is_null() {
        request = request.stop(strings(&asked["stop"]));
    }
    let tools = array(&asked["tools"]).into_iter().map(|tool| {
        Tool::function(text(&tool["name"]))
            .description(text(&tool["description"]))
            .parameters(&tool["parameters"])
    });
    request = request.tools(tools);
    request = match text(&asked["tool_choice"]) {
        "auto" => request.tool_choice(ToolChoice::Auto),
        "none" => request.tool_choice(ToolChoice::None),
        "required" => request.tool_choice(ToolChoice::Required),
        _ => request,
    };
    if !asked["json_schema"].is_null() {
        request = request.json_schema(&asked["json_schema"]);
    }
    let templates = array(&asked["role_templates"]).into_iter().map(|template| RoleTemplate {
        role: text(&template["role"]).to_owned(),
        api_role: text(&template["api_role"]).to_owned(),
        begin: text(&template["begin"]).to_owned(),
        end: text(&template["end"]).to_owned(),
        fallback_role: text(&template["fallback_role"]).to_owned(),
    });
    request = request.role_templates(templates);
    if asked["unsupported_parameters"] == "drop" {
        request = request.unsupported_parameters(UnsupportedParameters::Drop);
    }
    if !asked["extra_body"].is_null() {
        request = request.extra_body(&asked["extra_body"]);
    }
    for (key, value) in object(&asked["labels"]) {
        request = request.label(key, text(&value));
    }
    Ok(request)
}

// --- what the client says

fn answer(case: &Value, reply: &Reply) -> Result<Value, Failure> {
    let mut choices = Vec::new();
    for choice in reply.choices() {
        let mut calls = Vec::new();
        for call in choice.tool_calls() {
            let arguments: Value = call.arguments()?;
            calls.push(json!({"id": call.id(), "name": call.name(), "arguments": arguments}));
        }
        choices.push(json!({
            "index": choice.index(),
            "text": choice.text(),
            "reasoning": choice.reasoning(),
            "finish_reason": choice.finish_reason().to_string().to_uppercase(),
            "tool_calls": calls,
        }));
    }
    let v1::Usage { prompt_tokens, completion_tokens, total_tokens, estimated, .. } = reply.usage();
    let header = reply.header();
    let mut line = json!({
        "ok": true,
        "choices": choices,
        "usage": {
            "prompt": prompt_tokens,
            "completion": completion_tokens,
            "total": total_tokens,
            "estimated": estimated,
        },
        "header": {
            "model": header.model,
            "upstream": header.upstream,
            "attempts": header.attempts.len(),
            "dropped": header.dropped_parameters,
        },
        "request_id": !reply.request_id().is_empty(),
    });
    if !case["request"]["json_schema"].is_null() {
        line["json"] = reply.json()?;
    }
    Ok(line)
}

fn told(error: &Error) -> Value {
    let fields: Vec<_> = error.field_violations().iter().map(|each| &each.field).collect();
    json!({
        "code": code_name(error),
        "reason": error.reason().as_str(),
        "retry_after_ms": error.retry_after().map(|delay| delay.as_millis() as u64),
        "retryable": error.is_retryable(),
        "attempts": error.attempts(),
        "request_id": !error.request_id().is_empty(),
        "partial_text": error.partial_text(),
        "fields": fields,
    })
}

/// `ResourceExhausted` -> `RESOURCE_EXHAUSTED`.
fn code_name(error: &Error) -> String {
    let mut name = String::new();
    for (i, letter) in format!("{:?}", error.code()).char_indices() {
        if letter.is_uppercase() && i > 0 {
            name.push('_');
        }
        name.push(letter.to_ascii_uppercase());
    }
    name
}

fn row(result: &BatchResult) -> Value {
    let mut row = json!({"index": result.index, "custom_id": result.custom_id});
    match &result.result {
        Ok(reply) => row["text"] = reply.text().into(),
        Err(error) => row["error"] = told(error),
    }
    row
}

// --- JSON

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or("")
}

fn integer(value: &Value) -> Result<Option<i32>, Failure> {
    Ok(value.as_i64().map(TryInto::try_into).transpose()?)
}

fn milliseconds(value: &Value) -> Option<Duration> {
    value.as_u64().map(Duration::from_millis)
}

fn array(value: &Value) -> Vec<Value> {
    value.as_array().cloned().unwrap_or_default()
}

fn strings(value: &Value) -> Vec<String> {
    array(value).iter().map(|each| text(each).to_owned()).collect()
}

fn object(value: &Value) -> Map<String, Value> {
    value.as_object().cloned().unwrap_or_default()
}
