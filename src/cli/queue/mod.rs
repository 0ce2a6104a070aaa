//! `millrace queue`: what is in the order log, whether it is sound, and giving it up.

mod broker;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::{Args, Subcommand};
use comfy_table::Table;
use serde::Serialize;

use super::output::print_line;
use super::{ConfigArgs, logging};
use crate::app::{open_database, prepare_schema};
use crate::config::{Backend, Config};
use crate::logging::say;
use crate::order::{Order, UnixMillis};
use crate::pipeline::failover::lease::waited_ms;
use crate::queue::log::file::disk::RealDisk;
use crate::queue::log::file::recovery::{Scanned, identity, salvage, scan};
use crate::queue::log::file::segment::file_name;
use crate::queue::log::record::Record;
use crate::store::StoreError;
use crate::store::postgres::{lease, order_log};

#[derive(Debug, Args)]
pub struct QueueArgs {
    #[command(subcommand)]
    command: QueueCommand,
}

#[derive(Debug, Subcommand)]
enum QueueCommand {
    /// Show what is in the order log; also while a server runs on it.
    Inspect(InspectArgs),
    /// Check every byte; exit code 1 if something is damaged or missing.
    Verify(VerifyArgs),
    /// Give up what the order log may still hold, so that a start without it is allowed again.
    ///
    /// A journal's directory is moved aside, a broker's stream or topic is left as it is. Orders in it that are not
    /// rows stay unwritten, although their buyers were told that they are accepted.
    Abandon(AbandonArgs),
}

#[derive(Debug, Args)]
struct InspectArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// Directory of a journal; without it the configured log.
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// Print every order that can be read as a line of JSON, also from a damaged log.
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
    /// Directory of a journal; without it the configured log.
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
    /// Do not wait until the process that wrote the log has lost the right to acknowledge orders
    /// (`queue.journal.lease_ms`): it is known to have ended, or its machine to be destroyed.
    #[arg(long)]
    process_is_gone: bool,
    /// The log of this node of a cluster, whose takeover waits for it because it cannot be read. The other nodes may run. The
    /// node's own process has to be gone: one that is only cut off from the database would go on acknowledging orders.
    #[arg(long, value_name = "NUMBER", requires = "process_is_gone")]
    node: Option<i16>,
}

pub async fn run(args: &QueueArgs) -> anyhow::Result<bool> {
    match &args.command {
        QueueCommand::Inspect(args) => inspect(args),
        QueueCommand::Verify(args) => verify(args),
        QueueCommand::Abandon(args) => abandon(args).await,
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

/// The configuration, if it names a broker and `dir` no journal.
fn with_broker(dir: Option<&PathBuf>, config: &ConfigArgs) -> anyhow::Result<Option<Config>> {
    if dir.is_some() {
        return Ok(None);
    }
    let config = config.load()?;
    Ok(match config.queue.backend {
        Backend::Journal | Backend::Memory => None,
        Backend::Redis | Backend::Kafka | Backend::RocketMq => Some(config),
    })
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
            .filter(|at| at.span == segment.number)
            .collect();
        SegmentSummary {
            file: file_name(segment.number),
            groups: groups.len(),
            records: groups.iter().map(|at| u64::from(at.records)).sum(),
            bytes_used: groups.iter().map(|at| u64::from(at.length) * 512).sum(),
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
    if let Some(config) = with_broker(args.dir.as_ref(), &args.config)? {
        return tokio::task::block_in_place(|| broker::inspect(&config, args.orders, args.json));
    }
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
    if let Some(config) = with_broker(args.dir.as_ref(), &args.config)? {
        return tokio::task::block_in_place(|| broker::verify(&config));
    }
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
            "this gives up every order of the order log that is not a row yet, although its buyer was told that it is accepted; \
             look at them with `millrace queue inspect --orders`, then say --yes"
        );
    }
    logging::start(&config.log)?;
    if let Some(node) = args.node {
        return abandon_of(&config, node).await;
    }
    let directory = config.journal_dir();
    let is_journal = config.queue.backend == Backend::Journal;
    // Held to the end: nobody starts on it meanwhile.
    let local = match is_journal && directory.is_dir() {
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
    let guard = lease::claim(&open.database).await?;
    prepare_schema(&config, &open.database).await?;
    let noted = order_log::noted(&open.database, &guard, 0).await?;
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
                    "the process of {} ({}) may be acknowledging orders somewhere: waiting {} s, after which it certainly \
                     does not. Nothing is changed before. If that process is known to be gone, end this command and \
                     say --process-is-gone",
                    noted.title,
                    noted.name,
                    ms.div_ceil(1_000)
                ));
                tokio::time::sleep(Duration::from_millis(ms)).await;
            }
            let done = order_log::abandon(&open.database, &guard, &noted).await?;
            if done {
                say(&format!("{} ({}) is given up", noted.title, noted.name));
                if !is_journal {
                    say(
                        "its stream or topic is left as it is: delete it, or configure another one",
                    );
                }
            } else {
                say(&format!(
                    "{} ({}) is not given up: its process is alive and has renewed its right to acknowledge orders \
                     meanwhile; stop it first",
                    noted.title, noted.name
                ));
            }
            done
        }
        None => {
            say("the database knows of no order log that may hold orders");
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

async fn abandon_of(config: &Config, node: i16) -> anyhow::Result<bool> {
    let open = open_database(config).await?;
    // Held to the end: nobody starts meanwhile.
    let guard = match lease::claim(&open.database).await {
        Err(StoreError::AlreadyActive(_)) => None,
        claimed => Some(claimed?),
    };
    let done = order_log::abandon_of(&open.database, node, guard.is_some()).await?;
    drop(guard);
    open.database.close();
    say(&if done {
        format!(
            "the log of node {node} is given up; its lanes open at the node that takes it over, or at the process that starts \
             next. Its stream or topic is left as it is: delete it before a node has this number again"
        )
    } else {
        format!(
            "nothing is changed: node {node} runs or has left, or the database knows of no log of it that may hold orders"
        )
    });
    Ok(done)
}
