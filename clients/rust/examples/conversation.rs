//! A conversation at the terminal: `cargo run --example conversation -- gpt-4o-mini`.

use std::error::Error;
use std::io::Write;

use tokenwire::{Client, Message};

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let model = std::env::args().nth(1).unwrap_or_else(|| "gpt-4o-mini".to_owned());
    let client = Client::from_env()?;
    let mut conversation = vec![Message::system("Be brief.")];
    for line in std::io::stdin().lines() {
        conversation.push(Message::user(line?));
        let mut stream = client.stream(&conversation).model(&model).send().await?;
        let mut texts = stream.text_deltas();
        while let Some(text) = texts.next().await {
            print!("{}", text?);
            std::io::stdout().flush()?;
        }
        println!();
        conversation.push(stream.message());
    }
    Ok(())
}
