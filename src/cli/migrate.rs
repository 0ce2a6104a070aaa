//! `millrace migrate`

use clap::Args;

use super::output::print;
use super::{ConfigArgs, logging};
use crate::app::open_database;
use crate::logging::say;
use crate::store::postgres::lease;
use crate::store::schema;

#[derive(Debug, Args)]
pub struct MigrateArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// Print the SQL on standard output and change nothing.
    #[arg(long)]
    print: bool,
}

/// Brings the schema up to date, whatever `database.migrate` says.
pub async fn run(args: &MigrateArgs) -> anyhow::Result<bool> {
    let config = args.config.load()?;
    if args.print {
        print(&schema::print(&config.database.schema))?;
        return Ok(true);
    }
    logging::start(&config.log)?;
    let open = open_database(&config).await?;
    // Not under the feet of a running process, which may be of another release.
    let mut client = lease::claim(&open.database).await?;
    let applied = schema::migrate(&mut client, open.database.schema()).await;
    drop(client);
    open.database.close();
    if let Some(embedded) = open.embedded {
        embedded.stop().await?;
    }
    let schema = &config.database.schema;
    say(&match applied? {
        0 => format!("schema {schema} is up to date"),
        count => format!("schema {schema}: {count} migrations applied"),
    });
    Ok(true)
}
