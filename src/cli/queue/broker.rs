//! The log on a broker: what is in it, and whether it is sound.

use std::collections::BTreeMap;
use std::sync::Arc;

use comfy_table::Table;
use serde::Serialize;

use super::order_line;
use crate::app::brokers;
use crate::cli::output::print_line;
use crate::config::Config;
use crate::logging::say;
use crate::queue::log::broker::reader::Reader;
use crate::queue::log::broker::{Broker, PATIENCE, Pages, Place, frame, records_of, while_away};
use crate::queue::log::record::Record;

/// The summary, for machines.
#[derive(Serialize)]
struct Summary {
    log: String,
    groups: u64,
    records: u64,
    epochs: Vec<Epoch>,
    /// Entries that are no groups.
    unreadable: u64,
}

/// The groups that one process wrote.
#[derive(Default, Serialize)]
struct Epoch {
    epoch: u64,
    first: u64,
    last: u64,
    groups: u64,
    records: u64,
    bytes: u64,
}

/// Shows what is in the log, and returns whether all of it can be read.
pub(super) fn inspect(config: &Config, orders: bool, json: bool) -> anyhow::Result<bool> {
    let broker = connect(config)?;
    let (mut epochs, mut unreadable) = (BTreeMap::<u64, Epoch>::new(), 0);
    each_frame(&*broker, |place, payload, bytes| {
        let records = match records_of(place, payload) {
            Ok(records) => records,
            Err(error) => {
                say(&format!("cannot read {error}"));
                unreadable += 1;
                return Ok(());
            }
        };
        let epoch = epochs.entry(place.epoch).or_insert_with(|| Epoch {
            epoch: place.epoch,
            first: place.number,
            ..Epoch::default()
        });
        epoch.last = epoch.last.max(place.number);
        epoch.groups += 1;
        epoch.records += records.len() as u64;
        epoch.bytes += bytes as u64;
        for record in records.iter().filter(|_| orders) {
            if let Record::Order(order) = record {
                print_line(&order_line(order).to_string())?;
            }
        }
        Ok(())
    })
    .map(|foreign| unreadable += foreign)?;
    if orders {
        return Ok(unreadable == 0);
    }
    let epochs: Vec<Epoch> = epochs.into_values().collect();
    let summary = Summary {
        log: broker.title(),
        groups: epochs.iter().map(|epoch| epoch.groups).sum(),
        records: epochs.iter().map(|epoch| epoch.records).sum(),
        epochs,
        unreadable,
    };
    if json {
        print_line(&serde_json::to_string_pretty(&summary)?)?;
        return Ok(unreadable == 0);
    }
    print_line(&format!(
        "{}: {} records in {} groups; groups of settled orders stay for queue.retain_ms",
        summary.log, summary.records, summary.groups
    ))?;
    let mut table = Table::new();
    table.set_header([
        "epoch",
        "first group",
        "last group",
        "groups",
        "records",
        "bytes",
    ]);
    for epoch in &summary.epochs {
        table.add_row(
            [
                epoch.epoch,
                epoch.first,
                epoch.last,
                epoch.groups,
                epoch.records,
                epoch.bytes,
            ]
            .map(|figure| figure.to_string()),
        );
    }
    print_line(&table.to_string())?;
    Ok(unreadable == 0)
}

/// Checks every group, and that none is missing between others.
pub(super) fn verify(config: &Config) -> anyhow::Result<bool> {
    let broker = connect(config)?;
    let first = broker.read(None, 1)?;
    let frame = first.first().and_then(|one| frame::decode(&one.frame).ok());
    let Some(owner) = frame.map(|frame| frame.owner) else {
        print_line(&format!("{}: it has no groups", broker.title()))?;
        return Ok(first.is_empty());
    };
    let mut reader = Reader::from_first(&*broker, owner);
    let (mut groups, mut records) = (0, 0);
    loop {
        let counted = match reader.read() {
            Ok(counted) if counted.is_empty() => break,
            Ok(counted) => counted,
            Err(error) => {
                print_line(&error.to_string())?;
                return Ok(false);
            }
        };
        for group in counted {
            groups += 1;
            match records_of(group.position.place, &group.payload) {
                Ok(of_group) => records += of_group.len(),
                Err(error) => {
                    print_line(&format!("{}: {error}", broker.title()))?;
                    return Ok(false);
                }
            }
        }
    }
    print_line(&format!(
        "{}: sound: {groups} groups, {records} records",
        broker.title()
    ))?;
    Ok(true)
}

fn connect(config: &Config) -> anyhow::Result<Arc<dyn Broker>> {
    let broker = brokers::client(config, 0)?;
    for warning in while_away(PATIENCE, || broker.check())?.warnings {
        say(&format!("{}: {warning}", broker.title()));
    }
    Ok(broker)
}

/// Passes place, payload and length of every frame to `each`. Returns the number of entries that are none.
fn each_frame(
    broker: &dyn Broker,
    mut each: impl FnMut(Place, &[u8], usize) -> anyhow::Result<()>,
) -> anyhow::Result<u64> {
    let (mut pages, mut foreign) = (Pages::after(broker, None), 0);
    loop {
        let page = pages.read()?;
        if page.is_empty() {
            return Ok(foreign);
        }
        for one in page {
            match frame::decode(&one.frame) {
                Ok(frame) => each(frame.place, frame.payload, one.frame.len())?,
                Err(error) => {
                    say(&format!(
                        "cannot read the entry at {:?}: {error}",
                        one.position()
                    ));
                    foreign += 1;
                }
            }
        }
    }
}
