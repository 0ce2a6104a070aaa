//! `millrace config check`

use clap::Args;

use super::output::print;
use super::{ConfigArgs, logging};
use crate::app::start_checks;
use crate::logging::say;

#[derive(Debug, Args)]
pub struct CheckArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// Check the file and the environment only; connect to nothing.
    #[arg(long)]
    offline: bool,
}

/// Prints the configuration in force, secrets hidden, and finds what a start would: keys, certificates,
/// directories and addresses, and the database where one is named. Changes nothing.
pub async fn run(args: &CheckArgs) -> anyhow::Result<bool> {
    let config = args.config.load()?;
    logging::start(&config.log)?;
    let asked = start_checks::check(&config, !args.offline).await;
    print(&config.to_toml())?;
    if asked? {
        say("the configuration is valid and the database answers");
    } else {
        say("the configuration is valid");
    }
    Ok(true)
}
