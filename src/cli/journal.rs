//! `millrace journal`: what is in the journal, whether it is sound, and giving it up.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::{Args, Subcommand};
use comfy_table::Table;
use serde::Serialize;

use super::output::print_line;
use super::{ConfigArgs, logging};
use crate::app::{open_database, prepare_schema};
use crate::logging::say;
use crate::order::{Order, UnixMillis};
use crate::pipeline::failover::lease::waited_ms;
use crate::queue::journal::disk::RealDisk;
use crate::queue::journal::record::Record;
use crate::queue::journal::recovery::{Scanned, identity, salvage, scan};
use crate::queue::journal::segment::file_name;

#[derive(Debug, Args)]
pub struct JournalArgs {
    #[command(subcommand)]
    command: JournalCommand,
}

#[derive(Debug, Subcommand)]
enum JournalCommand {
    /// Show what is in the journal; also while a server runs on it.
    Inspect(InspectArgs),
    /// Check every byte; exit code 1 where something is damaged.
    Verify(VerifyArgs),
    /// Give up what the journal may still hold, so that a start without it is allowed again.
    ///
    /// Its directory is moved aside, not deleted. Orders in it that are not rows stay unwritten,
    /// although their buyers were told that they are accepted.
    Abandon(AbandonArgs),
}

#[derive(Debug, Args)]
struct InspectArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// Its directory; without it the configured one.
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// Print every order that can be read as a line of JSON, also from a damaged journal.
    #[arg(long)]
    orders: bool,
    /// Print the summary as JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
struct VerifyArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// Its directory; without it the configured one.
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
}

#[derive(Debug, Args)]
struct AbandonArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// Do it.
    #[arg(long)]
    yes: bool,
    /// Do not wait until the process that wrote the journal has lost the right to acknowledge orders
    /// (`queue.journal.lease_ms`): it is known to have ended, or its machine to be destroyed.
    #[arg(long)]
    process_is_gone: bool,
}

pub async fn run(args: &JournalArgs) -> anyhow::Result<bool> {
    match &args.command {
        JournalCommand::Inspect(args) => inspect(args),
        JournalCommand::Verify(args) => verify(args),
        JournalCommand::Abandon(args) => abandon(args).await,
    }
}

fn directory(dir: Option<&PathBuf>, config: &ConfigArgs) -> anyhow::Result<PathBuf> {
    let directory = match dir {
        Some(dir) => dir.clone(),
        None => config.load()?.journal_dir(),
    };
    if !directory.is_dir() {
        bail!(
            "there is no journal in {}; name its directory with --dir",
            directory.display()
        );
    }
    Ok(directory)
}

/// The summary, for machines.
#[derive(Serialize)]
struct Summary {
    journal: Option<String>,
    segment_bytes: Option<u64>,
    segments: Vec<SegmentSummary>,
    groups: usize,
    records: u64,
    torn_sectors: u64,
}

#[derive(Serialize)]
struct SegmentSummary {
    file: String,
    groups: usize,
    records: u64,
    bytes_used: u64,
}

fn summary(scanned: &Scanned) -> Summary {
    let segments = scanned.segments.iter().map(|segment| {
        let groups: Vec<_> = scanned
            .groups
            .iter()
            .filter(|at| at.segment.number == segment.number)
            .collect();
        SegmentSummary {
            file: file_name(segment.number),
            groups: groups.len(),
            records: groups.iter().map(|at| u64::from(at.records)).sum(),
            bytes_used: groups.iter().map(|at| u64::from(at.sectors) * 512).sum(),
        }
    });
    Summary {
        journal: scanned.identity.map(|identity| identity.name()),
        segment_bytes: scanned.identity.map(|identity| identity.segment_bytes),
        segments: segments.collect(),
        groups: scanned.groups.len(),
        records: scanned.records,
        torn_sectors: scanned.torn_sectors,
    }
}

fn inspect(args: &InspectArgs) -> anyhow::Result<bool> {
    let directory = directory(args.dir.as_ref(), &args.config)?;
    let disk = RealDisk::unlocked(&directory);
    if args.orders {
        let mut printed = Ok(());
        let lost = salvage(&disk, |record| {
            if let (Record::Order(order), true) = (record, printed.is_ok()) {
                printed = print_line(&order_line(&order).to_string());
            }
        })?;
        printed?;
        for lost in &lost {
            say(&format!("cannot read {lost}"));
        }
        return Ok(lost.is_empty());
    }
    let summary = summary(&scan(&disk, |_, _| {})?);
    if args.json {
        print_line(&serde_json::to_string_pretty(&summary)?)?;
        return Ok(true);
    }
    print_line(&match &summary.journal {
        None => format!("{}: nothing was written yet", directory.display()),
        Some(name) => format!(
            "{}: journal {name}, {} records in {} groups",
            directory.display(),
            summary.records,
            summary.groups
        ),
    })?;
    let mut table = Table::new();
    table.set_header(["segment", "groups", "records", "bytes used"]);
    for segment in &summary.segments {
        table.add_row([
            segment.file.clone(),
            segment.groups.to_string(),
            segment.records.to_string(),
            segment.bytes_used.to_string(),
        ]);
    }
    print_line(&table.to_string())?;
    if summary.torn_sectors > 0 {
        print_line(&format!(
            "the last group is incomplete ({} sectors): nobody was told about its orders",
            summary.torn_sectors
        ))?;
    }
    Ok(true)
}

fn order_line(order: &Order) -> serde_json::Value {
    serde_json::json!({
        "order_id": order.id,
        "user_id": order.user_id.as_str(),
        "sku_id": order.sku_id.as_str(),
        "quantity": order.quantity.get(),
        "adjustment": order.adjustment,
        "amount": order.amount,
        "currency": order.currency,
        "created_at": order.created_at.to_string(),
        "expires_at": order.expires_at.to_string(),
        "attributes": order.attributes.as_deref(),
    })
}

fn verify(args: &VerifyArgs) -> anyhow::Result<bool> {
    let directory = directory(args.dir.as_ref(), &args.config)?;
    match scan(&RealDisk::unlocked(&directory), |_, _| {}) {
        Ok(scanned) => {
            print_line(&format!(
                "{}: sound: {} segments, {} groups, {} records, {} sectors of an incomplete last group",
                directory.display(),
                scanned.segments.len(),
                scanned.groups.len(),
                scanned.records,
                scanned.torn_sectors
            ))?;
            Ok(true)
        }
        Err(error) => {
            print_line(&format!("{}: {error}", directory.display()))?;
            Ok(false)
        }
    }
}

async fn abandon(args: &AbandonArgs) -> anyhow::Result<bool> {
    let config = args.config.load()?;
    if !args.yes {
        bail!(
            "this gives up every order of the journal that is not a row yet, although its buyer was told that it is accepted; \
             look at them with `millrace journal inspect --orders`, then say --yes"
        );
    }
    logging::start(&config.log)?;
    let directory = config.journal_dir();
    // Held to the end: nobody starts on it meanwhile.
    let local = match directory.is_dir() {
        false => None,
        true => match RealDisk::lock(&directory).context("cannot lock the journal")? {
            Some(disk) => Some(disk),
            None => bail!(
                "the journal in {} is in use by a running process; stop it first",
                directory.display()
            ),
        },
    };
    let name = local.as_ref().and_then(|disk| identity(disk));
    let name = name.map(|identity| identity.name());
    let open = open_database(&config).await?;
    let guard = open.database.claim().await?;
    prepare_schema(&config, &open.database).await?;
    let noted = open.database.noted_journal(&guard).await?;
    let noted_name = noted.as_ref().map(|noted| noted.name.clone());
    let done = match noted.filter(|noted| noted.in_use) {
        Some(noted) => {
            if let Some(renewal) = &noted.renewal
                && name.as_ref() != Some(&noted.name)
                && !args.process_is_gone
            {
                // Its process may be alive somewhere, without the database. How long ago it renewed its
                // right is known by no clock but our own: from now on.
                let of_predecessor = || waited_ms(config.queue.journal.lease_ms);
                let ms = renewal.lease_ms.unwrap_or_else(of_predecessor);
                say(&format!(
                    "journal {} is not in {}, and its process may be acknowledging orders somewhere: waiting {} s, \
                     after which it certainly does not. Nothing is changed before. If that process is known to \
                     be gone, end this command and say --process-is-gone",
                    noted.name,
                    directory.display(),
                    ms.div_ceil(1_000)
                ));
                tokio::time::sleep(Duration::from_millis(ms)).await;
            }
            let done = open.database.abandon_journal(&guard, &noted).await?;
            if done {
                say(&format!("journal {} is given up", noted.name));
            } else {
                say(&format!(
                    "journal {} is not given up: its process is alive and has renewed its right to acknowledge \
                     orders meanwhile; stop it first",
                    noted.name
                ));
            }
            done
        }
        None => {
            say("the database knows of no journal that may hold orders");
            true
        }
    };
    drop(guard);
    open.database.close();
    if let Some(embedded) = open.embedded {
        embedded.stop().await?;
    }
    let given_up = noted_name.is_some() && (name.is_none() || name == noted_name);
    if done && local.is_some() && !given_up {
        say(&format!(
            "{} holds another journal and is left alone",
            directory.display()
        ));
    }
    if done && local.is_some() && given_up {
        let mut aside = directory.clone().into_os_string();
        aside.push(format!(".abandoned-{}", UnixMillis::now().0));
        std::fs::rename(&directory, &aside)
            .with_context(|| format!("cannot move {} aside", directory.display()))?;
        say(&format!(
            "its directory is {} now",
            PathBuf::from(aside).display()
        ));
    }
    Ok(done)
}
