//! A batch with errors: what failed and may succeed later is asked again, the rest is told.

use std::error::Error;
use std::time::Duration;

use tokenwire::{Client, Request};

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let client = Client::from_env()?;
    let mut items: Vec<_> = ["Norway", "Italy", "Atlantis"]
        .map(|country| Request::new(format!("Capital of {country}?")).custom_id(country))
        .into();
    for _ in 0..3 {
        let batch = client.batch(items.clone()).model("gpt-4o-mini").max_concurrency(8);
        let mut again = Vec::new();
        let mut pause = Duration::from_secs(1);
        for result in batch.send().await?.ordered().await? {
            match result.result {
                Ok(reply) => println!("{}: {}", result.custom_id, reply.text()),
                Err(error) if error.is_retryable() => {
                    pause = pause.max(error.retry_after().unwrap_or_default());
                    again.push(items[result.index].clone());
                }
                Err(error) => eprintln!("{}: {error}", result.custom_id),
            }
        }
        if again.is_empty() {
            return Ok(());
        }
        items = again;
        tokio::time::sleep(pause).await;
    }
    eprintln!("{} items were not answered", items.len());
    Ok(())
}
