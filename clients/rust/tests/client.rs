//! The client against the fake gateway: real gRPC over a loopback socket.

use std::io::Read;
use std::net::TcpListener;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use futures_core::Stream as _;
use http_body::Frame;
use prost::bytes::Bytes;
use serde_json::{Value, json};
use tokenwire::testing::{Failure, FakeGateway, Part, ReceivedRequest, tool_call};
use tokenwire::v1::{self, stream_chat_response::Event as Kind};
use tokenwire::{
    Client, Code, Error, EventKind, FinishReason, Message, Reason, Request, StreamMode, Tls, Tool,
    ToolChoice, tonic,
};
use tonic::codegen::http;

async fn failed(gateway: &FakeGateway) -> Error {
    gateway.client().chat("Hi").model("any").send().await.expect_err("a failure")
}

fn delta_of(choice_index: i32, content: &str) -> Part {
    v1::Delta { choice_index, content: content.to_owned(), ..v1::Delta::default() }.into()
}

// --- answers

#[tokio::test]
async fn an_answer_has_everything() {
    let gateway = FakeGateway::start();
    gateway.reply(["Hello", " world"]);
    let reply = gateway.client().chat("Hi there").model("m").send().await.unwrap();
    assert_eq!((reply.text(), reply.finish_reason()), ("Hello world", FinishReason::Stop));
    assert_eq!((&*reply.header().model, &*reply.header().upstream), ("m", "fake"));
    assert_eq!(reply.usage().total_tokens, 4);
    assert_eq!(reply.message().role, "assistant");
    assert_eq!(Some(reply.request_id()), gateway.calls()[0].header("x-request-id"));
    assert_eq!(reply.request_id().len(), 32);
}

#[tokio::test]
async fn a_stream_ends_with_what_chat_returns() {
    let gateway = FakeGateway::start();
    let reasoning = v1::Delta { reasoning: "hm".into(), ..v1::Delta::default() };
    for _ in 0..2 {
        let call = tool_call("weather", json!({"city": "Rome"}));
        gateway.reply([reasoning.clone().into(), "Let me".into(), Part::from(" look."), call]);
    }
    let client = gateway.client();
    let chat = client.chat("Hi").model("any").send().await.unwrap();
    let mut stream = client.stream("Hi").model("any").send().await.unwrap();
    let (mut kinds, mut texts) = (Vec::new(), Vec::new());
    while let Some(event) = stream.next().await {
        let event = event.unwrap();
        kinds.push(event.kind());
        texts.push(event.text().to_owned());
    }
    use EventKind::{Delta, Finish, Header, Trailer};
    assert_eq!(kinds, [Header, Delta, Delta, Delta, Delta, Finish, Trailer]);
    assert_eq!(texts.concat(), "Let me look.");
    assert_eq!((stream.reasoning(), stream.text()), ("hm", "Let me look."));
    assert!(stream.is_complete() && stream.time_to_first_token().is_some());
    let reply = stream.reply().await.unwrap();
    let without_id = |reply: &tokenwire::Reply| {
        let mut proto = reply.proto().clone();
        proto.header.as_mut().unwrap().id.clear();
        proto
    };
    assert_eq!(without_id(&reply), without_id(&chat));
    assert_eq!(reply.finish_reason(), FinishReason::ToolCalls);
    assert_eq!(stream.next().await.map(|event| event.is_ok()), None);
}

#[tokio::test]
async fn heartbeats_and_unknown_events_are_no_events() {
    let gateway = FakeGateway::start();
    gateway.reply([Part::heartbeat(), "po".into(), Part::heartbeat(), "ng".into()]);
    let mut stream = gateway.client().stream("Hi").model("any").send().await.unwrap();
    let mut events = 0;
    while let Some(event) = stream.next().await {
        event.unwrap();
        events += 1;
    }
    assert_eq!((events, stream.text()), (5, "pong"));
}

#[tokio::test]
async fn cumulative_events_have_only_the_new_text() {
    let gateway = FakeGateway::start();
    gateway.reply(["po", "ng"]);
    let call = gateway.client().stream("Hi").model("any").mode(StreamMode::Cumulative);
    let mut stream = call.send().await.unwrap();
    let mut texts = stream.text_deltas();
    let mut seen = Vec::new();
    while let Some(text) = texts.next().await {
        seen.push(text.unwrap());
    }
    assert_eq!((seen.join("|"), stream.text()), ("po|ng".to_owned(), "pong"));
}

#[tokio::test]
async fn text_deltas_are_of_one_choice() {
    let gateway = FakeGateway::start();
    gateway.reply([delta_of(0, "a1"), delta_of(1, "b1"), delta_of(0, "a2"), delta_of(1, "b2")]);
    let call = gateway.client().stream("Hi").model("any").choice_count(2);
    let mut stream = call.send().await.unwrap();
    let mut texts = stream.text_deltas_of(1);
    let mut seen = String::new();
    while let Some(text) = texts.next().await {
        seen += &text.unwrap();
    }
    assert_eq!(seen, "b1b2");
    assert_eq!(stream.choices().map(|c| c.text()).collect::<Vec<_>>(), ["a1a2", "b1b2"]);
}

#[tokio::test]
async fn a_stream_is_one_of_futures() {
    let gateway = FakeGateway::start();
    gateway.reply(["Hello"]);
    let mut stream = pin!(gateway.client().stream("Hi").model("any").send().await.unwrap());
    let mut events = 0;
    while let Some(event) = std::future::poll_fn(|cx| stream.as_mut().poll_next(cx)).await {
        event.unwrap();
        events += 1;
    }
    assert_eq!(events, 4);
}

#[tokio::test]
async fn options_arrive_as_the_contract_says() {
    let gateway = FakeGateway::start();
    gateway.reply(["{\"n\": 1}"]);
    let call = gateway
        .client()
        .chat([Message::system("Short."), Message::user("Hi")])
        .model("any")
        .temperature(0.0)
        .stop(["x"])
        .tools([Tool::function("f").parameters(json!({"type": "object"})).strict(true)])
        .tool_choice(ToolChoice::Tool("f".into()))
        .json_schema(json!({"title": "N", "type": "object"}))
        .label("team", "a")
        .extra_body(json!({"k": [1]}))
        .request_id("mine")
        .metadata("traceparent", "00-1")
        .metadata("blob-bin", [0, 255])
        .timeout(Duration::from_secs(7));
    let reply = call.send().await.unwrap();
    assert_eq!(reply.json::<Value>().unwrap()["n"], 1);
    assert!(reply.json::<Vec<u8>>().unwrap_err().to_string().contains("finish reason stop"));
    let calls = gateway.calls();
    let (chat, metadata) = (calls[0].chat(), &calls[0].metadata);
    assert_eq!(chat.messages[0].role, "system");
    assert_eq!(chat.params.as_ref().unwrap().temperature, Some(0.0));
    assert_eq!(chat.tool_choice.as_ref().unwrap().tool_names, ["f"]);
    assert_eq!((&*chat.extra_body_json, &*chat.labels["team"]), (r#"{"k":[1]}"#, "a"));
    assert_eq!((reply.request_id(), calls[0].header("x-request-id")), ("mine", Some("mine")));
    assert_eq!(calls[0].header("traceparent"), Some("00-1"));
    assert_eq!(*metadata.get_bin("blob-bin").unwrap().to_bytes().unwrap(), [0, 255]);
    assert!(calls[0].header("user-agent").unwrap().starts_with("tokenwire-rust/"));
    // Its own is 7 s; the client's is 600 s.
    let timeout = calls[0].header("grpc-timeout").unwrap();
    assert!(timeout.starts_with('6') || timeout.starts_with('7'), "{timeout}");
}

#[tokio::test]
async fn only_calls_with_one_answer_have_a_deadline_unless_told() {
    let gateway = FakeGateway::start();
    gateway.reply(["a"]).reply(["b"]).reply(["c"]).reply(["d"]);
    let client = gateway.client();
    client.chat("Hi").model("any").send().await.unwrap();
    client.chat("Hi").model("any").timeout(None).send().await.unwrap();
    client.stream("Hi").model("any").send().await.unwrap().reply().await.unwrap();
    let of_client =
        gateway.client_builder().timeout(Duration::from_secs(5)).connect_lazy().unwrap();
    of_client.chat("Hi").model("any").send().await.unwrap();
    let timeouts: Vec<_> =
        gateway.calls().iter().map(|call| call.header("grpc-timeout").map(str::to_owned)).collect();
    let seconds = |text: &Option<String>| {
        let text = text.as_deref().unwrap();
        let (number, unit) = text.split_at(text.len() - 1);
        let scale = match unit {
            "n" => 1e9,
            "u" => 1e6,
            "m" => 1e3,
            _ => 1.0,
        };
        number.parse::<f64>().unwrap() / scale
    };
    assert!((590.0..=600.0).contains(&seconds(&timeouts[0])), "{timeouts:?}");
    assert_eq!(timeouts[1..3], [None, None]);
    assert!((1.0..=5.0).contains(&seconds(&timeouts[3])), "{timeouts:?}");
}

#[tokio::test]
async fn a_ready_request_is_sent_as_it_is() {
    let gateway = FakeGateway::start();
    gateway.reply(["Hello"]);
    let chat = v1::ChatRequest {
        model: "any".into(),
        messages: vec![Message::user("Hi")],
        service_tier: "flex".into(),
        ..v1::ChatRequest::default()
    };
    gateway.client().chat(chat.clone()).send().await.unwrap();
    assert_eq!(gateway.calls()[0].chat(), &chat);
}

// --- errors

#[tokio::test]
async fn an_error_tells_all_it_knows() {
    let gateway = FakeGateway::start();
    let failure = Failure::new("RATE_LIMITED")
        .message("slow down")
        .retry_after(Duration::from_millis(12_500))
        .metadata("attempts", "2")
        .metadata("requestId", "r-1");
    gateway.fail(failure);
    let error = failed(&gateway).await;
    assert_eq!((error.code(), error.reason()), (Code::ResourceExhausted, &Reason::RateLimited));
    assert_eq!(error.retry_after(), Some(Duration::from_millis(12_500)));
    assert_eq!((error.attempts(), error.request_id()), (2, "r-1"));
    assert!(error.is_retryable() && error.partial().is_none() && error.partial_text().is_empty());
    assert_eq!(error.metadata()["attempts"], "2");
    assert_eq!(error.proto().details.len(), 2);
    let text = "RATE_LIMITED: slow down (retry after 12.5s, 2 attempts, request r-1)";
    assert_eq!(error.to_string(), text);
}

#[tokio::test]
async fn refused_fields_are_named() {
    let gateway = FakeGateway::start();
    gateway.fail(Failure::new("INVALID_REQUEST").field_violation("params.temperature", "too hot"));
    let error = failed(&gateway).await;
    assert_eq!(error.field_violations()[0].field, "params.temperature");
    assert_eq!(error.field_violations()[0].description, "too hot");
    assert!(error.to_string().contains("\n  params.temperature: too hot"), "{error}");
    assert!(!error.is_retryable());
    assert_eq!(Some(error.request_id()), gateway.calls()[0].header("x-request-id"));
}

#[tokio::test]
async fn pushback_tells_how_long_to_wait_where_nothing_else_does() {
    let gateway = FakeGateway::start();
    gateway.fail(Failure::new("RATE_LIMITED").pushback_ms(1500));
    assert_eq!(failed(&gateway).await.retry_after(), Some(Duration::from_millis(1500)));
    gateway.fail(Failure::new("UPSTREAM_QUOTA_EXHAUSTED"));
    let error = failed(&gateway).await;
    assert_eq!((error.retry_after(), error.is_retryable()), (None, false));
}

#[tokio::test]
async fn details_of_others_are_not_the_gateways() {
    let gateway = FakeGateway::start();
    gateway.fail(Failure::new("").code(Code::PermissionDenied).message("proxy says no"));
    let error = failed(&gateway).await;
    assert_eq!((error.code(), error.reason()), (Code::PermissionDenied, &Reason::Unspecified));
    assert_eq!(error.message(), "proxy says no");
}

#[tokio::test]
async fn every_reason_of_the_contract_has_its_code() {
    let gateway = FakeGateway::start();
    for reason in (1..).map_while(|number| v1::ErrorReason::try_from(number).ok()) {
        let reason = Reason::from(reason);
        gateway.fail(Failure::new(reason.clone()).pushback_ms(-1));
        let error = failed(&gateway).await;
        assert_eq!(error.reason(), &reason);
        let retryable = error.code() == Code::Unavailable;
        assert_eq!(error.is_retryable(), retryable, "{reason}");
    }
    assert!(gateway.calls().len() > 20);
    // One that is newer than this crate is told by its name, and judged by its code.
    gateway.fail(Failure::new("MODEL_ASLEEP").code(Code::Unavailable).pushback_ms(-1));
    let error = failed(&gateway).await;
    assert_eq!(error.reason(), &Reason::Other("MODEL_ASLEEP".into()));
    assert!(error.is_retryable() && error.to_string().starts_with("MODEL_ASLEEP: "), "{error}");
}

#[tokio::test]
async fn a_broken_stream_has_what_had_arrived() {
    let gateway = FakeGateway::start();
    gateway.fail(Failure::new("UPSTREAM_STREAM_INTERRUPTED").after(["Once ", "upon"]));
    let mut stream = gateway.client().stream("Hi").model("any").send().await.unwrap();
    let mut text = String::new();
    let error = loop {
        match stream.next().await.expect("an error before the end") {
            Ok(event) => text += event.text(),
            Err(error) => break error,
        }
    };
    assert_eq!(
        (error.reason(), error.partial_text()),
        (&Reason::UpstreamStreamInterrupted, "Once upon")
    );
    assert_eq!(error.partial().unwrap().header().upstream, "fake");
    assert_eq!(text, "Once upon");
    assert!(stream.next().await.is_none() && !stream.is_complete());
    assert_eq!(stream.reply().await.unwrap_err().reason(), error.reason());
    assert_eq!(gateway.calls().len(), 1); // nothing of it is asked again
}

#[tokio::test]
async fn an_ok_without_a_trailer_is_an_error() {
    let gateway = FakeGateway::start();
    gateway.cut(["Once "]);
    let mut stream = gateway.client().stream("Hi").model("any").send().await.unwrap();
    let error = stream.reply().await.unwrap_err();
    assert_eq!((error.code(), error.reason()), (Code::Internal, &Reason::StreamIncomplete));
    assert_eq!((error.partial_text(), error.is_retryable()), ("Once ", false));
    assert!(!error.request_id().is_empty());
}

#[tokio::test]
async fn a_whole_answer_followed_by_an_error_is_an_error() {
    let gateway = FakeGateway::start();
    let trailer = v1::StreamChatResponse { event: Some(Kind::Trailer(Default::default())) };
    gateway.fail(Failure::new("INTERNAL").after([Part::from("all"), trailer.into()]));
    let mut stream = gateway.client().stream("Hi").model("any").send().await.unwrap();
    let error = stream.reply().await.unwrap_err();
    assert_eq!((error.reason(), error.partial_text()), (&Reason::Internal, "all"));
}

#[tokio::test]
async fn nobody_listens() {
    let free = TcpListener::bind("127.0.0.1:0").unwrap();
    let target = free.local_addr().unwrap().to_string();
    drop(free);
    let client = Client::builder(&target).connect_lazy().unwrap();
    let error = client.chat("Hi").model("any").send().await.unwrap_err();
    assert_eq!((error.code(), error.reason()), (Code::Unavailable, &Reason::Unspecified));
    assert!(error.is_retryable() && error.to_string().contains("refused"), "{error}");
    let error = Client::builder(&target).connect().await.unwrap_err();
    assert_eq!(error.code(), Code::Unavailable);
    let error = Client::builder("no-such-host.invalid:1").connect().await.unwrap_err();
    assert!(error.message().contains("no-such-host"), "{error}");
    assert_eq!(error.code(), Code::Unavailable);
}

/// Answers calls with details that are no base64, at once or in trailers, or by HTTP alone.
#[derive(Clone)]
struct Damaged;

impl tonic::codegen::Service<http::Request<tonic::body::Body>> for Damaged {
    type Response = http::Response<tonic::body::Body>;
    type Error = std::convert::Infallible;
    type Future = std::future::Ready<Result<Self::Response, Self::Error>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<tonic::body::Body>) -> Self::Future {
        let answer = http::Response::builder().header("content-type", "application/grpc");
        let mut status = http::HeaderMap::new();
        status.insert("grpc-status", "9".parse().unwrap());
        status.insert("grpc-status-details-bin", "*".parse().unwrap());
        let mut answer = answer.body(tonic::body::Body::empty()).unwrap();
        if request.uri().path().ends_with("/StreamChat") {
            *answer.body_mut() = tonic::body::Body::new(Frames(vec![Frame::trailers(status)]));
        } else if request.uri().path().ends_with("/GetModel") {
            let empty = Frame::data(vec![0; 5].into());
            let frames = vec![Frame::trailers(status), empty];
            *answer.body_mut() = tonic::body::Body::new(Frames(frames));
        } else if request.uri().path().ends_with("/Chat") {
            answer.headers_mut().extend(status);
        } else if request.uri().path().ends_with("/Tokenize") {
            *answer.status_mut() = http::StatusCode::SERVICE_UNAVAILABLE;
        } else {
            *answer.status_mut() = http::StatusCode::FORBIDDEN;
        }
        std::future::ready(Ok(answer))
    }
}

/// Last frame first.
struct Frames(Vec<Frame<Bytes>>);

impl http_body::Body for Frames {
    type Data = Bytes;
    type Error = tonic::Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        Poll::Ready(self.0.pop().map(Ok))
    }
}

#[tokio::test]
async fn what_is_not_quite_grpc_is_an_error_of_its_own() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let target = listener.local_addr().unwrap().to_string();
    let incoming = tonic::transport::server::TcpIncoming::from(listener);
    let server = tonic::transport::Server::builder().serve_with_incoming(Damaged, incoming);
    let server = tokio::spawn(server);
    let client = Client::builder(target).connect_lazy().unwrap();
    let error = client.chat("Hi").model("any").send().await.unwrap_err();
    assert_eq!((error.code(), error.reason()), (Code::FailedPrecondition, &Reason::Unspecified));
    let error = client.stream("Hi").model("any").send().await.unwrap_err();
    assert_eq!((error.code(), error.reason()), (Code::FailedPrecondition, &Reason::Unspecified));
    // An answer whose status is an error is none.
    let error = client.model("any").send().await.unwrap_err();
    assert_eq!((error.code(), error.reason()), (Code::FailedPrecondition, &Reason::Unspecified));
    let error = client.models().send().await.unwrap_err();
    assert_eq!((error.code(), error.reason()), (Code::PermissionDenied, &Reason::Unspecified));
    assert!(error.message().contains("403 Forbidden"), "{error}");
    let error = client.tokenize(["a"]).model("any").send().await.unwrap_err();
    assert!(error.code() == Code::Unavailable && error.is_retryable(), "{error}");
    server.abort();
}

#[tokio::test]
async fn what_makes_no_sense_is_never_sent() {
    let gateway = FakeGateway::start();
    let client = gateway.client();
    let place = |error: Error| {
        assert_eq!((error.code(), error.request_id()), (Code::InvalidArgument, ""));
        error.field_violations()[0].field.clone()
    };
    assert_eq!(place(client.chat("Hi").send().await.unwrap_err()), "model");
    let none: Vec<Message> = Vec::new();
    assert_eq!(place(client.stream(none).model("m").send().await.unwrap_err()), "messages");
    let empty: [&str; 0] = [];
    assert_eq!(place(client.batch(empty).send().await.unwrap_err()), "items");
    let items = [Request::new("Hi"), Request::new("Hi").extra_body(7)];
    let refused = client.batch(items).model("m").send().await.unwrap_err();
    assert_eq!(place(refused), "items[1].extra_body");
    let call = client.chat("Hi").model("m").metadata("x-request-id", "a");
    assert_eq!(place(call.send().await.unwrap_err()), "metadata[\"x-request-id\"]");
    let call = client.chat("Hi").model("m").request_id("");
    assert_eq!(place(call.send().await.unwrap_err()), "request_id");
    assert_eq!(place(client.tokenize(["a"]).send().await.unwrap_err()), "model");
    let tls = Tls::authorities("no PEM");
    let refused = Client::builder("localhost:1").tls(tls.identity("a", "b")).connect_lazy();
    assert_eq!(place(refused.unwrap_err()), "tls");
    let huge = "a".repeat(33 * 1024 * 1024);
    let refused = client.chat(huge).model("m").send().await.unwrap_err();
    assert_eq!(refused.code(), Code::ResourceExhausted);
    assert!(gateway.calls().is_empty());
}

#[tokio::test]
async fn a_message_of_more_than_32_mib_is_refused() {
    let gateway = FakeGateway::start();
    gateway.reply(["a".repeat(31 * 1024 * 1024)]).reply(["a".repeat(33 * 1024 * 1024)]);
    let client = gateway.client();
    let reply = client.chat("Hi").model("any").send().await.unwrap();
    assert_eq!(reply.text().len(), 31 * 1024 * 1024);
    let error = client.chat("Hi").model("any").send().await.unwrap_err();
    assert_eq!(error.code(), Code::ResourceExhausted, "{error}");
}

// --- retries

#[tokio::test]
async fn unavailable_is_tried_three_times() {
    let gateway = FakeGateway::start();
    gateway.fail("GATEWAY_DRAINING").fail("GATEWAY_DRAINING").reply(["Hello"]);
    let reply = gateway.client().chat("Hi").model("any").send().await.unwrap();
    assert_eq!((reply.text(), gateway.calls().len()), ("Hello", 3));
    let ids: Vec<_> =
        gateway.calls().iter().map(|c| c.header("x-request-id").map(str::to_owned)).collect();
    assert!(ids.iter().all(|id| *id == ids[0]));
    for _ in 0..4 {
        gateway.fail("GATEWAY_DRAINING");
    }
    let error = failed(&gateway).await;
    assert_eq!((error.reason(), gateway.calls().len()), (&Reason::GatewayDraining, 6));
}

#[tokio::test]
async fn a_stream_is_tried_again_only_before_its_first_message() {
    let gateway = FakeGateway::start();
    gateway.fail("GATEWAY_OVERLOADED").reply(["Hello"]);
    let mut stream = gateway.client().stream("Hi").model("any").send().await.unwrap();
    assert_eq!(stream.reply().await.unwrap().text(), "Hello");
    assert_eq!(gateway.calls().len(), 2);
    gateway.fail(Failure::new("GATEWAY_OVERLOADED").after([Part::heartbeat()])).reply(["No"]);
    let mut stream = gateway.client().stream("Hi").model("any").send().await.unwrap();
    assert_eq!(stream.reply().await.unwrap_err().reason(), &Reason::GatewayOverloaded);
    assert_eq!(gateway.calls().len(), 3);
}

#[tokio::test]
async fn pushback_delays_a_retry_or_forbids_it() {
    let gateway = FakeGateway::start();
    gateway.fail(Failure::new("GATEWAY_OVERLOADED").pushback_ms(900)).reply(["Hello"]);
    let begin = Instant::now();
    gateway.client().chat("Hi").model("any").send().await.unwrap();
    assert!(begin.elapsed() >= Duration::from_millis(900));
    assert_eq!(gateway.calls().len(), 2);
    gateway.fail("UPSTREAM_ERROR").reply(["No"]); // the gateway says -1
    assert_eq!(failed(&gateway).await.reason(), &Reason::UpstreamError);
    assert_eq!(gateway.calls().len(), 3);
}

#[tokio::test]
async fn a_pause_that_outlasts_the_deadline_is_not_made() {
    let gateway = FakeGateway::start();
    gateway.fail(Failure::new("GATEWAY_OVERLOADED").pushback_ms(60_000));
    let call = gateway.client().chat("Hi").model("any").timeout(Duration::from_secs(20));
    let begin = Instant::now();
    let error = call.send().await.unwrap_err();
    assert_eq!(error.reason(), &Reason::GatewayOverloaded);
    assert!(begin.elapsed() < Duration::from_secs(15));
}

#[tokio::test]
async fn nothing_but_unavailable_is_tried_again() {
    let gateway = FakeGateway::start();
    for code in (1..17).map(Code::from_i32).filter(|code| *code != Code::Unavailable) {
        gateway.fail(Failure::new("").code(code).pushback_ms(0));
        assert_eq!(failed(&gateway).await.code(), code);
    }
    assert_eq!(gateway.calls().len(), 15);
}

#[tokio::test]
async fn a_connection_that_breaks_midway_is_unavailable_and_not_asked_again() {
    let gateway = FakeGateway::start();
    gateway.hang(["Once "]);
    let mut stream = gateway.client().stream("Hi").model("any").send().await.unwrap();
    while stream.text().is_empty() {
        stream.next().await.unwrap().unwrap();
    }
    drop(gateway);
    let error = stream.reply().await.unwrap_err();
    assert_eq!(
        (error.code(), error.reason()),
        (Code::Unavailable, &Reason::UpstreamStreamInterrupted),
        "{error}"
    );
    assert_eq!(error.partial_text(), "Once ");
}

#[tokio::test]
async fn a_server_that_is_none_is_an_error() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let target = listener.local_addr().unwrap().to_string();
    let server = std::thread::spawn(move || {
        for _ in 0..3 {
            let (mut socket, _) = listener.accept().unwrap();
            let _ = socket.read(&mut [0; 16]);
        }
    });
    let client = Client::builder(target).connect_lazy().unwrap();
    let error = client.chat("Hi").model("any").send().await.unwrap_err();
    assert_eq!(
        (error.code(), error.reason()),
        (Code::Unavailable, &Reason::Unspecified),
        "{error}"
    );
    server.join().unwrap();
}

// --- leaving

#[tokio::test]
async fn dropping_a_stream_cancels_the_call() {
    let gateway = FakeGateway::start();
    gateway.hang(["one", "two"]);
    let mut stream = gateway.client().stream("Hi").model("any").send().await.unwrap();
    while stream.text() != "onetwo" {
        stream.next().await.unwrap().unwrap();
    }
    drop(stream);
    assert!(gateway.calls()[0].was_cancelled().await);
}

#[tokio::test]
async fn dropping_a_call_cancels_it() {
    let gateway = FakeGateway::start();
    let none: [&str; 0] = [];
    gateway.hang(none).hang(none);
    let client = gateway.client();
    let short = Duration::from_millis(200);
    let chat = client.chat("Hi").model("any").send();
    assert!(tokio::time::timeout(short, chat).await.is_err());
    let stream = client.stream("Hi").model("any").send();
    assert!(tokio::time::timeout(short, stream).await.is_err());
    for call in gateway.calls() {
        assert!(call.was_cancelled().await);
    }
    assert_eq!(gateway.calls().len(), 2);
}

#[tokio::test]
async fn a_call_can_be_cancelled_from_elsewhere() {
    let gateway = FakeGateway::start();
    let none: [&str; 0] = [];
    gateway.hang(none).hang(["one"]);
    let client = gateway.client();
    let call = client.chat("Hi").model("any");
    let error = call.cancel_when(tokio::time::sleep(Duration::from_millis(200))).send().await;
    let error = error.unwrap_err();
    assert_eq!((error.code(), error.is_retryable()), (Code::Cancelled, false));
    assert!(!error.request_id().is_empty());
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let call = client.stream("Hi").model("any").cancel_when(stopped);
    let mut stream = call.send().await.unwrap();
    while stream.text().is_empty() {
        stream.next().await.unwrap().unwrap();
    }
    stop.send(()).unwrap();
    let error = stream.reply().await.unwrap_err();
    assert_eq!((error.code(), error.partial_text()), (Code::Cancelled, "one"));
    for call in gateway.calls() {
        assert!(call.was_cancelled().await);
    }
}

#[tokio::test]
async fn a_deadline_ends_the_call_here_and_there() {
    let gateway = FakeGateway::start();
    let none: [&str; 0] = [];
    gateway.hang(none).hang(["one"]);
    let client = gateway.client();
    let short = Duration::from_millis(300);
    let error = client.chat("Hi").model("any").timeout(short).send().await.unwrap_err();
    assert_eq!((error.code(), error.is_retryable()), (Code::DeadlineExceeded, false));
    let mut stream = client.stream("Hi").model("any").timeout(short).send().await.unwrap();
    let error = stream.reply().await.unwrap_err();
    assert_eq!((error.code(), error.partial_text()), (Code::DeadlineExceeded, "one"));
    for call in gateway.calls() {
        assert!(call.was_cancelled().await);
    }
    assert_eq!(gateway.calls().len(), 2);
}

#[tokio::test]
async fn a_stream_that_was_read_to_its_end_is_not_cancelled() {
    let gateway = FakeGateway::start();
    gateway.reply(["Hello"]);
    let mut stream = gateway.client().stream("Hi").model("any").send().await.unwrap();
    stream.reply().await.unwrap();
    drop(stream);
    assert!(!gateway.calls()[0].was_cancelled().await);
}

/// A server that minds a ping each 30 s would end the connection; here it comes each 0.3 s.
async fn silent_for(silence: Duration, ping_every: Option<Duration>) {
    let gateway = FakeGateway::start();
    gateway.reply(["Once ".into(), Part::pause(silence), "upon".into()]);
    let client = gateway.client_builder().endpoint(move |endpoint| match ping_every {
        Some(every) => endpoint.http2_keep_alive_interval(every),
        None => endpoint,
    });
    let client = client.connect_lazy().unwrap();
    let begin = Instant::now();
    let mut stream = client.stream("Hi").model("any").send().await.unwrap();
    assert_eq!(stream.reply().await.unwrap().text(), "Once upon");
    assert!(begin.elapsed() >= silence);
}

#[tokio::test]
async fn an_idle_stream_survives_silence() {
    silent_for(Duration::from_millis(1500), Some(Duration::from_millis(300))).await;
}

#[tokio::test]
#[ignore = "takes two minutes: make test-idle"]
async fn an_idle_stream_survives_120_s_of_silence() {
    silent_for(Duration::from_secs(120), None).await;
}

#[tokio::test]
async fn a_peer_that_died_is_noticed_by_pings() {
    // It answers the first bytes with SETTINGS and then nothing, not even a ping.
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let target = listener.local_addr().unwrap().to_string();
    let server = tokio::spawn(async move {
        let mut held = Vec::new();
        loop {
            let (socket, _) = listener.accept().await.unwrap();
            socket.writable().await.unwrap();
            let _ = socket.try_write(&[0, 0, 0, 4, 0, 0, 0, 0, 0]);
            held.push(socket);
        }
    });
    let short = Duration::from_millis(200);
    let client = Client::builder(target)
        .endpoint(move |it| it.http2_keep_alive_interval(short).keep_alive_timeout(short));
    let call = client.connect_lazy().unwrap().chat("Hi").model("any");
    let error = call.timeout(Duration::from_secs(20)).send().await.unwrap_err();
    assert_eq!(error.code(), Code::Unavailable, "{error}");
    server.abort();
}

// --- token

#[tokio::test]
async fn a_token_travels_with_each_call() {
    let gateway = FakeGateway::builder().token("secret").start();
    gateway.reply(["Hello"]);
    let good = gateway.client_builder().token("secret").connect().await.unwrap();
    good.chat("Hi").model("any").send().await.unwrap();
    let error = failed(&gateway).await;
    assert_eq!(error.reason(), &Reason::CallerUnauthenticated);
    assert!(!format!("{good:?}").contains("secret"));
}

#[tokio::test]
async fn a_supplier_is_asked_once_per_call() {
    let gateway = FakeGateway::start();
    gateway.fail("GATEWAY_DRAINING").reply(["a"]).reply(["b"]);
    let asked = Arc::new(AtomicUsize::new(0));
    let counter = asked.clone();
    let client = gateway.client_builder().token_supplier(move || {
        let count = counter.fetch_add(1, Ordering::SeqCst);
        async move {
            match count {
                0 | 1 => Ok(format!("token-{count}")),
                2 => Ok("se cret".to_owned()),
                _ => Err("the vault is shut"),
            }
        }
    });
    let client = client.connect_lazy().unwrap();
    client.chat("Hi").model("any").send().await.unwrap();
    client.chat("Hi").model("any").send().await.unwrap();
    let shown: Vec<_> = gateway
        .calls()
        .iter()
        .filter_map(|c| c.header("authorization").map(str::to_owned))
        .collect();
    assert_eq!(shown, ["Bearer token-0", "Bearer token-0", "Bearer token-1"]);
    let error = client.chat("Hi").model("any").send().await.unwrap_err();
    assert_eq!(error.code(), Code::InvalidArgument);
    assert!(!error.to_string().contains("cret"));
    let error = client.chat("Hi").model("any").send().await.unwrap_err();
    assert_eq!(error.code(), Code::Unauthenticated);
    assert!(error.message().contains("the vault is shut"));
    assert_eq!((asked.load(Ordering::SeqCst), gateway.calls().len()), (4, 3));
}

#[tokio::test]
async fn a_channel_of_the_callers_own_will_do() {
    let gateway = FakeGateway::start();
    gateway.reply(["Hello"]);
    let endpoint = tonic::transport::Endpoint::from_shared(format!("http://{}", gateway.target()));
    let channel = endpoint.unwrap().connect_lazy();
    let client = Client::builder("mine").channel(channel).token("t").connect().await.unwrap();
    client.chat("Hi").model("any").send().await.unwrap();
    assert_eq!(gateway.calls()[0].header("authorization"), Some("Bearer t"));
}

#[tokio::test]
async fn a_replica_that_is_gone_costs_no_attempt() {
    // "localhost" is ::1, too, where nothing listens.
    let gateway = FakeGateway::start();
    let port = gateway.target().rsplit_once(':').unwrap().1.to_owned();
    let client = Client::builder(format!("localhost:{port}")).token("").connect_lazy().unwrap();
    for _ in 0..4 {
        gateway.reply(["Hello"]);
        client.chat("Hi").model("any").send().await.unwrap();
    }
    assert_eq!(gateway.calls().len(), 4);
}

#[tokio::test]
async fn a_gateway_that_was_restarted_is_found_again() {
    let first = FakeGateway::start();
    first.reply(["Hello"]);
    let client = first.client();
    client.chat("Hi").model("any").send().await.unwrap();
    drop(first);
    assert_eq!(client.chat("Hi").model("any").send().await.unwrap_err().code(), Code::Unavailable);
}

// --- batches, tokens, models

#[tokio::test]
async fn a_batch_is_told_as_it_comes_and_in_order() {
    let gateway = FakeGateway::start();
    for _ in 0..2 {
        gateway.reply(["one"]).fail("CONTENT_FILTERED").reply(["three"]);
    }
    let client = gateway.client();
    let items = || {
        let own = Request::new("c").model("own").temperature(1.0);
        [Request::new("a").custom_id("x"), Request::new("b"), own]
    };
    let call = client.batch(items()).model("any").temperature(0.0).max_concurrency(2);
    let mut batch = call.send().await.unwrap();
    let mut indices = Vec::new();
    while let Some(result) = batch.next().await {
        indices.push(result.unwrap().index);
    }
    assert_eq!(indices, [2, 1, 0]);
    let batch = client.batch(items()).model("any").send().await.unwrap();
    let results = batch.ordered().await.unwrap();
    assert_eq!(results[0].custom_id, "x");
    assert_eq!(results[0].result.as_ref().unwrap().text(), "one");
    assert_eq!(results[1].result.as_ref().unwrap_err().reason(), &Reason::ContentFiltered);
    assert_eq!(results[2].result.as_ref().unwrap().header().model, "own");
    let calls = gateway.calls();
    let ReceivedRequest::BatchChat(sent) = &calls[0].request else { panic!("no batch") };
    assert_eq!(sent.max_concurrency, 2);
    let temperatures: Vec<_> = sent
        .items
        .iter()
        .map(|item| item.chat.as_ref().unwrap().params.as_ref().unwrap().temperature.unwrap())
        .collect();
    assert_eq!(temperatures, [0.0, 0.0, 1.0]);
}

#[tokio::test]
async fn a_batch_that_lost_items_is_an_error_for_those() {
    let gateway = FakeGateway::start();
    let none: [&str; 0] = [];
    for _ in 0..2 {
        gateway.cut(none).reply(["two"]);
    }
    let client = gateway.client();
    let mut batch = client.batch(["a", "b"]).model("any").send().await.unwrap();
    assert!(batch.next().await.unwrap().is_ok());
    let error = batch.next().await.unwrap().unwrap_err();
    assert_eq!(error.reason(), &Reason::StreamIncomplete);
    assert!(batch.next().await.is_none());
    let batch = client.batch(["a", "b"]).model("any").send().await.unwrap();
    let results = batch.ordered().await.unwrap();
    assert_eq!(results[0].result.as_ref().unwrap_err().reason(), &Reason::StreamIncomplete);
    assert_eq!(results[1].result.as_ref().unwrap().text(), "two");
}

/// A gateway that answers every call with OK and these messages, whatever was asked.
async fn odd_gateway(messages: Vec<Vec<u8>>) -> Client {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let target = listener.local_addr().unwrap().to_string();
    tokio::spawn(async move {
        while let Ok((socket, _)) = listener.accept().await {
            let messages = messages.clone();
            tokio::spawn(async move {
                let mut connection = h2::server::handshake(socket).await.unwrap();
                while let Some(Ok((request, mut respond))) = connection.accept().await {
                    let messages = messages.clone();
                    tokio::spawn(async move {
                        let mut body = request.into_body();
                        while let Some(Ok(data)) = body.data().await {
                            let _ = body.flow_control().release_capacity(data.len());
                        }
                        let head = http::Response::builder()
                            .header("content-type", "application/grpc")
                            .body(())
                            .unwrap();
                        let mut answer = respond.send_response(head, false).unwrap();
                        for message in messages {
                            let mut frame = vec![0];
                            frame.extend(u32::try_from(message.len()).unwrap().to_be_bytes());
                            frame.extend(message);
                            answer.send_data(frame.into(), false).unwrap();
                        }
                        let mut trailers = http::HeaderMap::new();
                        trailers.insert("grpc-status", http::HeaderValue::from_static("0"));
                        answer.send_trailers(trailers).unwrap();
                    });
                }
            });
        }
    });
    Client::builder(target).token("").connect_lazy().unwrap()
}

/// The message as it travels.
fn encoded(message: &impl prost::Message) -> Vec<u8> {
    message.encode_to_vec()
}

#[tokio::test]
async fn a_batch_with_results_of_no_item_is_an_error() {
    let result = |index| {
        let reply = v1::ChatResponse { choices: vec![v1::Choice::default()], ..<_>::default() };
        let result = Some(v1::batch_chat_response::Result::Response(reply));
        encoded(&v1::BatchChatResponse { index, result, ..<_>::default() })
    };
    for (indexes, told) in [(vec![0, 2], 1), (vec![0, -1], 1), (vec![1, 1, 0], 1), (vec![7], 0)] {
        let client = odd_gateway(indexes.iter().map(|&index| result(index)).collect()).await;
        let mut batch = client.batch(["a", "b"]).model("any").send().await.unwrap();
        for _ in 0..told {
            assert!(batch.next().await.unwrap().is_ok());
        }
        let error = batch.next().await.unwrap().unwrap_err();
        assert_eq!((error.code(), error.reason()), (Code::Internal, &Reason::StreamIncomplete));
        assert!(batch.next().await.is_none());
        let ordered = client.batch(["a", "b"]).model("any").send().await.unwrap().ordered().await;
        assert_eq!(ordered.unwrap_err().reason(), &Reason::StreamIncomplete);
    }
}

#[tokio::test]
async fn an_ok_that_lacks_what_was_asked_for_is_an_error() {
    let lists = v1::TokenizeResponse { lists: vec![<_>::default()], ..<_>::default() };
    let client = odd_gateway(vec![encoded(&lists)]).await;
    let error = client.tokenize(["a", "b"]).model("m").send().await.unwrap_err();
    assert_eq!(error.message(), "got the tokens of 1 of 2 texts");
    assert_eq!(error.request_id().len(), 32);
    assert_eq!(error.reason(), &Reason::StreamIncomplete);

    let client = odd_gateway(vec![encoded(&v1::GetModelResponse::default())]).await;
    let error = client.model("m").request_id("mine").send().await.unwrap_err();
    assert_eq!((error.reason(), error.request_id()), (&Reason::StreamIncomplete, "mine"));

    let page = v1::ListModelsResponse { next_page_token: "again".into(), ..<_>::default() };
    let client = odd_gateway(vec![encoded(&page)]).await;
    let listed = tokio::time::timeout(Duration::from_secs(10), client.models().send()).await;
    let error = listed.expect("an end").unwrap_err();
    assert_eq!((error.reason(), error.request_id().len()), (&Reason::StreamIncomplete, 32));
}

#[tokio::test]
async fn dropping_a_batch_cancels_what_is_not_answered() {
    let gateway = FakeGateway::start();
    let none: [&str; 0] = [];
    gateway.hang(none).reply(["two"]);
    let mut batch = gateway.client().batch(["a", "b"]).model("any").send().await.unwrap();
    assert_eq!(batch.next().await.unwrap().unwrap().index, 1);
    drop(batch);
    assert!(gateway.calls()[0].was_cancelled().await);
}

#[tokio::test]
async fn an_ordered_batch_that_is_cancelled_is_no_result() {
    let gateway = FakeGateway::start();
    let none: [&str; 0] = [];
    gateway.hang(none).reply(["two"]);
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let call = gateway.client().batch(["a", "b"]).model("any").cancel_when(stopped);
    let mut batch = call.send().await.unwrap();
    assert!(batch.next().await.unwrap().unwrap().result.is_ok());
    stop.send(()).unwrap();
    assert_eq!(batch.ordered().await.unwrap_err().code(), Code::Cancelled);
}

#[tokio::test]
async fn every_call_can_be_cancelled() {
    let gateway = FakeGateway::start();
    let client = gateway.client();
    let now = || std::future::ready(());
    let codes = [
        client.models().cancel_when(now()).send().await.unwrap_err().code(),
        client.model("any").cancel_when(now()).send().await.unwrap_err().code(),
        client.count_tokens("a").model("any").cancel_when(now()).send().await.unwrap_err().code(),
        client.tokenize(["a"]).model("any").cancel_when(now()).send().await.unwrap_err().code(),
        client.batch(["a"]).model("any").cancel_when(now()).send().await.unwrap_err().code(),
    ];
    assert_eq!(codes, [Code::Cancelled; 5]);
    assert!(gateway.calls().is_empty());
}

#[tokio::test]
async fn tokens_are_counted_as_text_or_with_the_layout() {
    let gateway = FakeGateway::start();
    let client = gateway.client();
    let count = client.count_tokens("a b c").model("any").send().await.unwrap();
    assert_eq!((count.total_tokens, count.exact), (3, false));
    client.count_tokens("a").model("any").tools([Tool::function("f")]).send().await.unwrap();
    client.count_tokens([Message::user("a")]).model("any").send().await.unwrap();
    use v1::count_tokens_request::Input;
    let texts: Vec<_> = gateway
        .calls()
        .into_iter()
        .map(|call| match call.request {
            ReceivedRequest::CountTokens(v1::CountTokensRequest { input, .. }) => {
                matches!(input, Some(Input::Text(_)))
            }
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(texts, [true, false, false]);
    let lists = client.tokenize(["a b", ""]).model("any").send().await.unwrap();
    assert_eq!((&*lists[0].ids, lists[1].ids.len()), (&[0, 1][..], 0));
    assert_eq!(lists[0].pieces, [b"a", b"b"]);
}

#[tokio::test]
async fn models_are_listed_from_all_pages() {
    let names: Vec<_> = (0..5).map(|i| format!("m{i}")).collect();
    let gateway = FakeGateway::builder().models(names.clone()).start();
    let client = gateway.client();
    let models = client.models().page_size(2).send().await.unwrap();
    assert_eq!(models.into_iter().map(|model| model.name).collect::<Vec<_>>(), names);
    assert_eq!(gateway.calls().len(), 3);
    assert_eq!(client.model("m1").send().await.unwrap().name, "m1");
    let error = client.model("none").send().await.unwrap_err();
    assert_eq!((error.code(), error.reason()), (Code::NotFound, &Reason::ModelNotFound));
}

#[tokio::test]
async fn a_call_beyond_the_script_says_so() {
    let gateway = FakeGateway::start();
    let error = failed(&gateway).await;
    assert_eq!(error.reason(), &Reason::Internal);
    assert!(error.message().contains("no answer left"));
}
