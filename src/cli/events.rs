//! `millrace events`

use clap::{Args, Subcommand};

use super::output::print_line;
use super::{ConfigArgs, logging};
use crate::app::{open_existing_database, slots_database};
use crate::store::events::slot;

#[derive(Debug, Args)]
pub struct EventsArgs {
    #[command(subcommand)]
    command: EventsCommand,
}

#[derive(Debug, Subcommand)]
enum EventsCommand {
    /// Drop the replication slots of all sinks, the publication and the places of the sinks.
    ///
    /// A slot keeps WAL for its sink. Drop them before a schema is given up, or once events are no longer wanted. A sink
    /// that is configured again begins with the changes from then on.
    Drop(DropArgs),
}

#[derive(Debug, Args)]
struct DropArgs {
    #[command(flatten)]
    config: ConfigArgs,
}

pub async fn run(args: &EventsArgs) -> anyhow::Result<bool> {
    let EventsCommand::Drop(args) = &args.command;
    let config = args.config.load()?;
    logging::start(&config.log)?;
    let open = open_existing_database(&config).await?;
    let slots_at = slots_database(&config, &open.database)?;
    let dropped = slot::drop_all(&open.database, &slots_at).await;
    if let Some(embedded) = open.embedded {
        embedded.stop().await?;
    }
    for slot in dropped? {
        print_line(&format!("dropped the replication slot {slot}"))?;
    }
    let publication = slot::publication_of(&config.database.schema);
    print_line(&format!("there is no publication {publication} any more"))?;
    Ok(true)
}
