//! The README's first program: an answer as it grows.

use tokenwire::Client;

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let client = Client::builder("localhost:50051").connect_lazy()?;
    let mut stream = client.stream("Tell me a story.").model("gpt-4o-mini").send().await?;
    while let Some(event) = stream.next().await {
        print!("{}", event?.text());
    }
    println!();
    Ok(())
}
