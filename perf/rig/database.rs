//! A PostgreSQL of the lab's own, and databases in it.

use millrace::store::embedded::{DATABASE, Embedded, EmbeddedOptions};
use tokio_postgres::{Client, NoTls};

use super::Scratch;

/// A server with Millrace's own settings: durability on, as every comparison has it.
pub struct Postgres {
    embedded: Embedded,
}

impl Postgres {
    /// Starts one.
    ///
    /// # Errors
    /// Where PostgreSQL is not installed.
    pub async fn start(scratch: &Scratch) -> anyhow::Result<Self> {
        let options = EmbeddedOptions::new(scratch.dir("lab-postgres")?);
        Ok(Postgres {
            embedded: Embedded::start(options).await?,
        })
    }

    /// Makes a database and gives its URL.
    ///
    /// # Errors
    /// Where it cannot be made.
    pub async fn database(&self, name: &str) -> anyhow::Result<String> {
        let (client, driver) = self.embedded.config(DATABASE).connect(NoTls).await?;
        let driver = tokio::spawn(driver);
        client
            .batch_execute(&format!("CREATE DATABASE {name}"))
            .await?;
        driver.abort();
        Ok(self.embedded.url(name))
    }

    /// Stops it.
    ///
    /// # Errors
    /// Where it does not.
    pub async fn stop(self) -> anyhow::Result<()> {
        Ok(self.embedded.stop().await?)
    }
}

/// A plain connection, with Millrace's schema in its search path.
///
/// # Errors
/// Where none can be made.
pub async fn connect(url: &str) -> anyhow::Result<Client> {
    let (client, driver) = tokio_postgres::connect(url, NoTls).await?;
    tokio::spawn(driver);
    client.batch_execute("SET search_path = millrace").await?;
    Ok(client)
}

/// Brings what a side has left behind to an end, so that the next does not pay for it.
///
/// # Errors
/// Where the database fails.
pub async fn settle(client: &Client) -> anyhow::Result<()> {
    client.batch_execute("CHECKPOINT").await?;
    Ok(())
}
