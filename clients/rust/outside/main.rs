//! What a project elsewhere does with the packaged crate: see `make package`.

use tokenwire::{Client, Error};

/// What the README begins with.
async fn story(client: &Client) -> Result<String, Error> {
    let mut stream = client.stream("Tell me a story.").model("gpt-4o-mini").send().await?;
    let mut story = String::new();
    while let Some(event) = stream.next().await {
        story += event?.text();
    }
    Ok(story)
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let client = Client::from_env()?;
    let story = tokio::spawn(async move { story(&client).await }).await?;
    println!("{}", story?);
    Ok(())
}

#[cfg(test)]
mod tests {
    use tokenwire::Reason;
    use tokenwire::testing::{Failure, FakeGateway};

    #[derive(serde::Deserialize)]
    struct Weather {
        city: String,
    }

    #[tokio::test]
    async fn the_story_is_told() {
        let gateway = FakeGateway::start();
        gateway.reply(["from ", "outside"]);
        gateway.fail(Failure::new(Reason::UpstreamStreamInterrupted).after(["from "]));
        gateway.reply([serde_json::json!({"city": "Oslo"}).to_string()]);
        let client = gateway.client();
        assert_eq!(super::story(&client).await.unwrap(), "from outside");
        let error = super::story(&client).await.unwrap_err();
        assert_eq!(error.reason(), &Reason::UpstreamStreamInterrupted);
        assert_eq!(error.partial_text(), "from ");
        let reply = client.chat("Weather?").model("gpt-4o-mini").send().await.unwrap();
        assert_eq!(reply.json::<Weather>().unwrap().city, "Oslo");
    }
}
