//! `millrace config check`

use clap::Args;

use super::output::print;
use super::{ConfigArgs, logging};
use crate::app::open_database;
use crate::http::data_plane::payments::Providers;
use crate::logging::say;

#[derive(Debug, Args)]
pub struct CheckArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// Check the file and the environment only; connect to nothing.
    #[arg(long)]
    offline: bool,
}

/// Prints the configuration in force, secrets hidden, and tries the database where one is named.
pub async fn run(args: &CheckArgs) -> anyhow::Result<bool> {
    let config = args.config.load()?;
    logging::start(&config.log)?;
    Providers::new(&config.payments)?;
    print(&config.to_toml())?;
    if args.offline || config.database.url.is_empty() {
        say("the configuration is valid");
        return Ok(true);
    }
    open_database(&config).await?.database.ping().await?;
    say("the configuration is valid and the database answers");
    Ok(true)
}
