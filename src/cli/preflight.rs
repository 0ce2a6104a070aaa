//! `millrace preflight`

use anyhow::Context;
use clap::Args;
use comfy_table::{Table, TableComponent, presets};
use serde_json::Value;

use super::client::{call_with_token, running_server};
use super::output::print;
use super::signals::Signals;
use super::{ConfigArgs, logging};
use crate::app::{open_existing_database, preflight as wiring};
use crate::config::Config;
use crate::pipeline::admin::preflight::{Sale, preflight_until};

#[derive(Debug, Args)]
pub struct PreflightArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// Orders of the sale; without it one for each free unit.
    #[arg(long, value_name = "N", value_parser = number())]
    orders: Option<u64>,
    /// Orders a second; without it all come at once.
    #[arg(long, value_name = "R", value_parser = number())]
    rate: Option<u64>,
    /// Make WAL segments and a checkpoint and read the tables into memory, as far as the role may.
    #[arg(long)]
    prepare: bool,
    /// Print the verdict as JSON on standard output.
    #[arg(long)]
    json: bool,
}

fn number() -> clap::builder::RangedU64ValueParser {
    clap::value_parser!(u64).range(Sale::NUMBERS)
}

/// Asks the running server, if `data_dir` names one, else looks at the database alone. True: no check is bad.
pub async fn run(args: &PreflightArgs) -> anyhow::Result<bool> {
    let config = args.config.load()?;
    logging::start(&config.log)?;
    let report = match running_server(&config) {
        Some(address) => {
            let token = config.control_plane.token.0.first().map(String::as_str);
            call_with_token(&address, "POST", &target(args), None, token).await?
        }
        None => offline(&config, args).await?,
    };
    print(&match args.json {
        true => format!("{report:#}\n"),
        false => table(&report),
    })?;
    Ok(report["ok"] == true)
}

fn target(args: &PreflightArgs) -> String {
    let mut target = format!("/admin/v1/preflight?prepare={}", args.prepare);
    for (name, number) in [("orders", args.orders), ("rate", args.rate)] {
        if let Some(number) = number {
            target.push_str(&format!("&{name}={number}"));
        }
    }
    target
}

async fn offline(config: &Config, args: &PreflightArgs) -> anyhow::Result<Value> {
    let settings = wiring::settings(config, None)?;
    // One that comes while our own server starts is heard afterwards, so that the server is stopped.
    let mut signals = Signals::new()?;
    let open = open_existing_database(config).await?;
    let sale = Sale {
        orders: args.orders,
        rate: args.rate,
    };
    let ended = async {
        let signal = signals.recv().await;
        tracing::info!(signal, "ending the preflight");
    };
    let report = preflight_until(ended, &open.database, &settings, sale, args.prepare).await;
    open.database.close();
    if let Some(embedded) = open.embedded {
        embedded.stop().await?;
    }
    let report =
        report?.context("ended by a signal; nothing of the preflight is left in the database")?;
    Ok(serde_json::to_value(report)?)
}

/// The verdict for people: a table, then the SQL that somebody else has to run.
fn table(report: &Value) -> String {
    let mut table = Table::new();
    table.load_preset(presets::UTF8_HORIZONTAL_ONLY);
    for lines in [
        TableComponent::HorizontalLines,
        TableComponent::MiddleIntersections,
    ] {
        table.remove_style(lines);
    }
    table.set_header(["", "check", "found, and the remedy"]);
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let mut sql: Vec<String> = Vec::new();
    let mut statements = |value: &Value| {
        for statement in list(value).map(text) {
            if !sql.contains(&statement) {
                sql.push(statement);
            }
        }
        list(value).next().is_some()
    };
    for step in list(&report["prepared"]) {
        let mark = if step["done"] == true {
            "done"
        } else {
            "NOT DONE"
        };
        let mut found = text(&step["detail"]);
        if statements(&step["sql"]) {
            found.push_str("\n→ SQL below");
        }
        table.add_row([
            mark.to_owned(),
            format!("prepare {}", words(&step["name"])),
            found,
        ]);
    }
    for check in list(&report["checks"]) {
        let mark = match check["verdict"].as_str() {
            Some("good") => "ok",
            Some("warn") => "better",
            Some("bad") => "BAD",
            _ => "not known",
        };
        let mut found = text(&check["figure"]);
        if let Some(remedy) = check["remedy"].as_str() {
            found.push_str(&format!("\n→ {remedy}"));
        }
        if statements(&check["sql"]) {
            found.push_str(" (SQL below)");
        }
        table.add_row([mark.to_owned(), words(&check["name"]), found]);
    }
    let sql = match sql.is_empty() {
        true => String::new(),
        false => format!("\nTo be run by a superuser:\n\n  {}\n", sql.join("\n  ")),
    };
    let verdict = match report["ok"] == true {
        true => "Nothing is bad.",
        false => "Mend what is BAD before the sale opens.",
    };
    let unknown = list(&report["checks"]).filter(|check| check["verdict"] == "unknown");
    let verdict = match unknown.count() {
        0 => verdict.to_owned(),
        1 => format!("{verdict} One check is not known."),
        unknown => format!("{verdict} {unknown} checks are not known."),
    };
    format!("{table}\n{sql}\n{verdict}\n")
}

fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

/// A stable name as words.
fn words(name: &Value) -> String {
    let words = name.as_str().unwrap_or_default().replace('_', " ");
    words.replace("wal ", "WAL ")
}
