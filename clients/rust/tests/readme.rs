//! Every Rust snippet of the README, run as it stands there.

use std::error::Error;

use tokenwire::testing::FakeGateway;

type Outcome = Result<(), Box<dyn Error>>;

/// A snippet that is not below has rotted, or will.
#[test]
fn every_snippet_is_here() {
    let plain = |text: &str| text.lines().map(str::trim).collect::<Vec<_>>().join("\n");
    let here = plain(concat!(include_str!("readme.rs"), include_str!("../examples/story.rs")));
    let readme = include_str!("../README.md");
    let snippets: Vec<_> = readme.split("```rust\n").skip(1).collect();
    for snippet in &snippets {
        let (snippet, _) = snippet.split_once("```").expect("an end of the snippet");
        assert!(here.contains(&plain(snippet)), "not run by tests/readme.rs:\n{snippet}");
    }
    // The first is a program of its own, which is compiled.
    assert_eq!(snippets.len(), 1 + here.matches("\n// The snippet:\n").count());
}

#[tokio::test]
async fn connect() -> Outcome {
    // The snippet:
    use tokenwire::{Client, Tls};

    let client = Client::builder("gateway.internal:443")
        .token("my-token")
        .tls(Tls::system_roots())
        .connect_lazy()?;
    // End.
    assert!(format!("{client:?}").contains("gateway.internal"));
    Ok(())
}

#[tokio::test]
async fn begin() -> Outcome {
    // The snippet:
    use tokenwire::Client;

    let client = Client::from_env()?;
    // End.
    assert!(!format!("{client:?}").is_empty());
    Ok(())
}

#[tokio::test]
async fn ask() -> Outcome {
    let gateway = FakeGateway::start();
    gateway.reply(["Rayleigh scattering."]);
    let client = gateway.client();
    // The snippet:
    let reply =
        client.chat("Why is the sky blue?").model("gpt-4o-mini").temperature(0.0).send().await?;

    println!("{}", reply.text());
    println!("{} {}", reply.finish_reason(), reply.usage().total_tokens);
    println!("{}", reply.header().upstream);
    // End.
    assert_eq!(reply.text(), "Rayleigh scattering.");
    Ok(())
}

#[tokio::test]
async fn conversation() -> Outcome {
    let gateway = FakeGateway::start();
    gateway.reply(["Rayleigh."]).reply(["Still Rayleigh."]);
    let client = gateway.client();
    // The snippet:
    use tokenwire::Message;

    let mut conversation =
        vec![Message::system("Answer in one sentence."), Message::user("Why is the sky blue?")];
    let reply = client.chat(&conversation).model("gpt-4o-mini").send().await?;
    conversation.extend([reply.message(), Message::user("And at sunset?")]);
    let reply = client.chat(&conversation).model("gpt-4o-mini").send().await?;
    println!("{}", reply.text());
    // End.
    assert_eq!(gateway.calls()[1].chat().messages.len(), 4);
    assert_eq!(reply.text(), "Still Rayleigh.");
    Ok(())
}

#[tokio::test]
async fn json() -> Outcome {
    let gateway = FakeGateway::start();
    gateway.reply([r#"{"city": "Oslo", "degrees": -3}"#]);
    let client = gateway.client();
    // The snippet:
    use serde::Deserialize;
    use serde_json::json;

    #[derive(Deserialize)]
    struct Weather {
        city: String,
        degrees: f64,
    }

    let schema = json!({
        "type": "object",
        "properties": {"city": {"type": "string"}, "degrees": {"type": "number"}},
        "required": ["city", "degrees"],
    });
    let reply =
        client.chat("Weather in Oslo?").model("gpt-4o-mini").json_schema(&schema).send().await?;
    let weather: Weather = reply.json()?;
    println!("{}: {}", weather.city, weather.degrees);
    // End.
    assert_eq!((&*weather.city, weather.degrees), ("Oslo", -3.0));
    Ok(())
}

#[tokio::test]
async fn stream() -> Outcome {
    let gateway = FakeGateway::start();
    gateway.reply(["Once ", "upon"]);
    let client = gateway.client();
    // The snippet:
    let mut stream = client.stream("Tell me a story.").model("gpt-4o-mini").send().await?;
    while let Some(event) = stream.next().await {
        print!("{}", event?.text());
    }

    println!();
    if let (Some(time), Some(usage)) = (stream.time_to_first_token(), stream.usage()) {
        println!("{time:?}, {} tokens", usage.completion_tokens);
    }
    let reply = stream.reply().await?; // the whole answer, as chat() returns it
    // End.
    assert_eq!(reply.text(), "Once upon");
    assert!(stream.time_to_first_token().is_some());
    Ok(())
}

#[tokio::test]
async fn text_deltas() -> Outcome {
    let gateway = FakeGateway::start();
    gateway.reply(["Once ", "upon"]);
    let client = gateway.client();
    // The snippet:
    let mut stream = client.stream("Tell me a story.").model("gpt-4o-mini").send().await?;
    let mut texts = stream.text_deltas();
    while let Some(text) = texts.next().await {
        print!("{}", text?);
    }
    // End.
    assert_eq!(stream.text(), "Once upon");
    Ok(())
}

#[tokio::test]
async fn tools() -> Outcome {
    let gateway = FakeGateway::start();
    gateway
        .reply([tokenwire::testing::tool_call("weather", json!({"city": "Rome"}))])
        .reply(["Yes."]);
    let client = gateway.client();
    // The snippet:
    use serde::Deserialize;
    use serde_json::{Value, json};
    use tokenwire::{Message, Tool};

    #[derive(Deserialize)]
    struct Arguments {
        city: String,
    }

    fn weather(arguments: &Arguments) -> Value {
        json!({"city": arguments.city, "degrees": 21})
    }

    let tool = Tool::function("weather")
        .description("Current weather of a city")
        .parameters(json!({"type": "object", "properties": {"city": {"type": "string"}}}));
    let mut conversation = vec![Message::user("Is it warm in Rome?")];
    let reply = loop {
        let ask = client.chat(&conversation).model("gpt-4o-mini").tools([tool.clone()]);
        let reply = ask.send().await?;
        if reply.tool_calls().len() == 0 {
            break reply;
        }
        conversation.push(reply.message());
        for call in reply.tool_calls() {
            conversation.push(call.answer(weather(&call.arguments()?))?);
        }
    };
    println!("{}", reply.text());
    // End.
    assert_eq!(reply.text(), "Yes.");
    let calls = gateway.calls();
    let answer = &calls[1].chat().messages[2];
    assert_eq!(answer.content.as_deref(), Some(r#"{"city":"Rome","degrees":21}"#));
    Ok(())
}

#[tokio::test]
async fn cancel() -> Outcome {
    let gateway = FakeGateway::start();
    gateway.hang(["One, two, three,", " four, five"]);
    let client = gateway.client();
    // The snippet:
    let mut stream = client.stream("Count to a million.").model("gpt-4o-mini").send().await?;
    while let Some(event) = stream.next().await {
        event?;
        if stream.text().len() > 20 {
            break;
        }
    }
    println!("{}", stream.text()); // what had arrived
    drop(stream);
    // End.
    assert!(gateway.calls()[0].was_cancelled().await);
    Ok(())
}

#[tokio::test]
async fn cancel_when() -> Outcome {
    let gateway = FakeGateway::start();
    gateway.hang(["One, two,"]);
    let client = gateway.client();
    // The snippet:
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let call = client.stream("Count to a million.").model("gpt-4o-mini").cancel_when(stopped);
    let mut stream = call.send().await?;
    stop.send(()).ok();
    let error = stream.reply().await.unwrap_err();
    println!("{:?} after {:?}", error.code(), error.partial_text());
    // End.
    assert_eq!(error.code(), tokenwire::Code::Cancelled);
    Ok(())
}

#[tokio::test]
async fn errors() -> Outcome {
    let gateway = FakeGateway::start();
    gateway.fail(
        tokenwire::testing::Failure::new("RATE_LIMITED")
            .retry_after(std::time::Duration::from_secs(12)),
    );
    let client = gateway.client();
    // The snippet:
    use tokenwire::Reason;

    match client.chat("Hi").model("gpt-4o-mini").send().await {
        Ok(reply) => println!("{}", reply.text()),
        Err(error) => {
            println!("{:?}", error.code()); // ResourceExhausted, a tonic::Code
            println!("{}", error.reason()); // RATE_LIMITED, from the ErrorReason of the contract
            println!("{:?}", error.retry_after()); // a Duration, or None
            println!("{}", error.request_id()); // find it in the gateway's log
            match error.reason() {
                Reason::RateLimited | Reason::CallerQuotaExceeded => println!("later"),
                Reason::ContextLengthExceeded => println!("a shorter conversation"),
                _ => println!("tell somebody"),
            }
        }
    }
    // End.
    Ok(())
}

#[tokio::test]
async fn partial() -> Outcome {
    let gateway = FakeGateway::start();
    gateway.fail(tokenwire::testing::Failure::new("UPSTREAM_STREAM_INTERRUPTED").after(["Once "]));
    let client = gateway.client();
    // The snippet:
    let mut stream = client.stream("Tell me a story.").model("gpt-4o-mini").send().await?;
    while let Some(event) = stream.next().await {
        match event {
            Ok(event) => print!("{}", event.text()),
            Err(error) => println!("\n[{} after {:?}]", error.reason(), error.partial_text()),
        }
    }
    // End.
    Ok(())
}

#[tokio::test]
async fn retries() -> Outcome {
    let gateway = FakeGateway::start();
    gateway.fail(
        tokenwire::testing::Failure::new("RATE_LIMITED").retry_after(Duration::from_millis(10)),
    );
    gateway.reply(["Hello"]);
    let client = gateway.client();
    // The snippet:
    use std::time::Duration;

    let mut attempt = 0;
    let reply = loop {
        match client.chat("Hi").model("gpt-4o-mini").send().await {
            Err(error) if error.is_retryable() && attempt < 4 => {
                let pause = Duration::from_secs(1 << attempt);
                tokio::time::sleep(error.retry_after().unwrap_or(pause)).await;
                attempt += 1;
            }
            ended => break ended?,
        }
    };
    println!("{}", reply.text());
    // End.
    assert_eq!((reply.text(), gateway.calls().len()), ("Hello", 2));
    Ok(())
}

#[tokio::test]
async fn batch() -> Outcome {
    let gateway = FakeGateway::start();
    for answer in ["2", "Oslo", "Old pond", "2", "Oslo", "Old pond"] {
        gateway.reply([answer]);
    }
    let client = gateway.client();
    // The snippet:
    use tokenwire::Request;

    let questions = [
        Request::new("1 + 1?"),
        Request::new("Capital of Norway?"),
        Request::new("Haiku?").custom_id("haiku"),
    ];

    let mut batch = client.batch(questions.clone()).model("gpt-4o-mini").send().await?;
    while let Some(result) = batch.next().await {
        let result = result?; // each as soon as it is ready
        match result.result {
            Ok(reply) => println!("{} {} {}", result.index, result.custom_id, reply.text()),
            Err(error) => println!("{} {} {error}", result.index, result.custom_id),
        }
    }

    let batch = client.batch(questions).model("gpt-4o-mini").send().await?;
    for result in batch.ordered().await? {
        println!("{}", result.result?.text()); // in order, all at the end
    }
    // End.
    assert_eq!(gateway.calls().len(), 2);
    Ok(())
}

#[tokio::test]
async fn tokens() -> Outcome {
    let gateway = FakeGateway::start();
    let client = gateway.client();
    // The snippet:
    let count = client.count_tokens("How many tokens?").model("gpt-4o-mini").send().await?;
    println!("{}", count.total_tokens);

    let lists = client.tokenize(["How many tokens?"]).model("gpt-4o-mini").send().await?;
    println!("{:?} {:?}", lists[0].ids, lists[0].pieces);

    for model in client.models().send().await? {
        println!("{}", model.name);
    }
    // End.
    assert_eq!(count.total_tokens, 3);
    Ok(())
}

#[tokio::test]
async fn testing() -> Outcome {
    // The snippet:
    use serde_json::json;
    use tokenwire::testing::{Failure, FakeGateway, tool_call};

    let gateway = FakeGateway::start();
    gateway.reply(["Once upon", " a time"]);
    gateway.reply([tool_call("weather", json!({"city": "Rome"}))]);
    gateway.fail(Failure::new("UPSTREAM_STREAM_INTERRUPTED").after(["Once "]));

    let client = gateway.client();
    let reply = client.chat("A story!").model("any").send().await?;
    assert_eq!(reply.text(), "Once upon a time");
    let reply = client.chat("Weather?").model("any").send().await?;
    assert_eq!(reply.tool_calls().next().unwrap().name(), "weather");
    let mut stream = client.stream("Another!").model("any").send().await?;
    assert_eq!(stream.reply().await.unwrap_err().partial_text(), "Once ");

    let calls = gateway.calls();
    assert_eq!(calls[0].chat().messages[0].content.as_deref(), Some("A story!"));
    // End.
    Ok(())
}
