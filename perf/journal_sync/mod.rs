//! The ceiling of acknowledgements: appending and syncing groups of the journal's own sizes, alone.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::time::Instant;

use crate::fixture::compare::alternate;
use crate::fixture::{Finding, Lab, Scratch};

/// Orders of a group, and the bytes that the journal writes for them (about 110 an order, in sectors
/// of 512).
const GROUPS: [(usize, usize); 4] = [(1, 512), (32, 4_096), (1_024, 118_784), (8_192, 946_176)];
/// Written over and over, as a journal's segment is filled with zeros beforehand.
const FILE_BYTES: u64 = 16 << 20;

/// Runs the case.
pub async fn run(lab: &Lab) -> anyhow::Result<Vec<Finding>> {
    let scratch = Scratch::new()?;
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(scratch.path().join("segment"))?;
    file.write_all_at(&vec![0; FILE_BYTES as usize], 0)?;
    file.sync_all()?;
    let names = ["syncs/s of 1", "of 32", "of 1,024", "of 8,192 orders"];
    let rounds = alternate(lab.rounds(), names, async |side| {
        let (_, bytes) = GROUPS[side];
        let group = vec![1; bytes];
        let (started, mut syncs, mut at) = (Instant::now(), 0, 0);
        while started.elapsed() < lab.window() / 4 {
            if at + bytes as u64 > FILE_BYTES {
                at = 0;
            }
            file.write_all_at(&group, at)?;
            file.sync_data()?;
            at += bytes as u64;
            syncs += 1;
        }
        Ok(f64::from(syncs) / started.elapsed().as_secs_f64())
    })
    .await?;
    Ok(GROUPS
        .iter()
        .enumerate()
        .map(|(side, (orders, bytes))| {
            let spread = rounds.side(side).times(*orders as f64);
            Finding::spread(
                format!(
                    "append and fdatasync of {bytes} bytes, {orders} orders each: orders a second"
                ),
                spread,
            )
        })
        .collect())
}
