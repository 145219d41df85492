//! Tools in a stream: text is shown as it comes, calls are answered once they are whole.

use std::error::Error;
use std::io::Write;

use serde::Deserialize;
use serde_json::json;
use tokenwire::{Client, Message, Tool};

#[derive(Deserialize)]
struct Arguments {
    city: String,
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let client = Client::from_env()?;
    let weather = Tool::function("weather").description("Current weather of a city").parameters(
        json!({"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}),
    );
    let mut conversation = vec![Message::user("Is it warmer in Rome or in Oslo?")];
    loop {
        let ask = client.stream(&conversation).model("gpt-4o-mini").tools([weather.clone()]);
        let mut stream = ask.send().await?;
        while let Some(event) = stream.next().await {
            print!("{}", event?.text());
            std::io::stdout().flush()?;
        }
        println!();
        let reply = stream.reply().await?;
        if reply.tool_calls().len() == 0 {
            return Ok(());
        }
        conversation.push(reply.message());
        for call in reply.tool_calls() {
            // What the model wrote may be no JSON of this shape: it can correct itself.
            let answer = match call.arguments::<Arguments>() {
                Ok(Arguments { city }) => call.answer(json!({"city": city, "degrees": 21})),
                Err(error) => call.answer(error.to_string()),
            };
            conversation.push(answer?);
        }
    }
}
