//! `millrace audit`

use std::time::Duration;

use clap::Args;

use super::client::{call_with_token, running_server};
use super::output::print;
use super::{ConfigArgs, logging};
use crate::app::open_existing_database;
use crate::config::Config;
use crate::pipeline::admin::audit::{audit, within};

#[derive(Debug, Args)]
pub struct AuditArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// Print the whole verdict as JSON on standard output.
    #[arg(long)]
    json: bool,
}

/// Asks the running server, where `data_dir` names one, else audits the database alone. True:
/// every check holds.
pub async fn run(args: &AuditArgs) -> anyhow::Result<bool> {
    let config = args.config.load()?;
    logging::start(&config.log)?;
    let token = config.control_plane.token.0.first().map(String::as_str);
    let verdict = match running_server(&config) {
        Some(address) => call_with_token(&address, "GET", "/admin/v1/audit", None, token).await?,
        None => offline(&config).await?,
    };
    let ok = verdict["ok"] == true;
    print(&match args.json {
        true => format!("{verdict:#}\n"),
        false => table(&verdict),
    })?;
    Ok(ok)
}

async fn offline(config: &Config) -> anyhow::Result<serde_json::Value> {
    let open = open_existing_database(config).await?;
    let timeout = Duration::from_millis(config.control_plane.audit_timeout_ms);
    let verdict = within(timeout, audit(&open.database, None)).await;
    open.database.close();
    if let Some(embedded) = open.embedded {
        embedded.stop().await?;
    }
    Ok(serde_json::to_value(verdict?)?)
}

/// The verdict as a table for people.
pub fn table(verdict: &serde_json::Value) -> String {
    let mut table = comfy_table::Table::new();
    table.load_preset(comfy_table::presets::UTF8_HORIZONTAL_ONLY);
    table.set_header(["", "promise", "what has to hold", "found"]);
    for check in verdict["checks"].as_array().into_iter().flatten() {
        let text = |name: &str| check[name].as_str().unwrap_or_default().to_owned();
        let mark = match (check["ok"] == true, check["decided"] == false) {
            (true, false) => "ok",
            (true, true) => "moving",
            (false, _) => "BROKEN",
        };
        table.add_row([
            mark.to_owned(),
            text("promise"),
            text("name"),
            text("detail"),
        ]);
    }
    format!(
        "{table}\n{} orders, {} dead letters\n",
        verdict["orders"], verdict["dead_letters"]
    )
}
