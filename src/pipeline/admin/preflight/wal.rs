//! The checks of WAL and of the disks that it is written to.

use super::Seen;
use super::checks::{
    Check, LAG_BYTES, ROW_BYTES, Verdict, bytes, grouped, orders, segments_needed, wal_bytes,
};
use crate::store::postgres::preflight::{Room, prepare, remedies};

const GIB: u64 = 1 << 30;

pub(super) fn segments(seen: &Seen<'_>) -> Check {
    let (facts, sale) = (&seen.facts, seen.sale);
    let needed = segments_needed(facts, sale);
    let need = format!(
        "{} for the {} of {} orders",
        needed,
        bytes(wal_bytes(facts, sale)),
        grouped(orders(facts, sale))
    );
    if orders(facts, sale) == 0 {
        return Check::new("wal_segments", "no SKU has free units").or(
            Verdict::Unknown,
            "put the sale's SKUs up, or pass --orders N",
        );
    }
    let Some(ready) = facts.segments_ready else {
        return Check::new("wal_segments", format!("not known; needs {need}"))
            .or(Verdict::Unknown, "let the role see them")
            .sql([remedies::monitor(&facts.role)]);
    };
    let check = Check::new("wal_segments", format!("{ready} ready, {need}"));
    if ready >= needed {
        return check;
    }
    let most = prepare::segments_most(facts);
    let missing = (needed - ready).saturating_mul(facts.segment_bytes);
    let full = |room: Room| room.wal < missing.saturating_add(prepare::ROOM_LEFT);
    let remedy = if let Some(kept) = facts.kept.iter().find(|kept| kept.stuck) {
        format!(
            "{} keeps what could be recycled: {}; then millrace preflight --prepare",
            kept.holder, kept.remedy
        )
    } else if facts.room.is_some_and(full) {
        "make room on the disk of pg_wal, then millrace preflight --prepare".to_owned()
    } else if needed > most {
        format!("raise max_wal_size, which keeps {most}, then millrace preflight --prepare")
    } else {
        "millrace preflight --prepare, an hour before the sale".to_owned()
    };
    check.or(Verdict::Bad, remedy)
}

pub(super) fn checkpoints(seen: &Seen<'_>) -> Check {
    let (facts, wal) = (&seen.facts, wal_bytes(&seen.facts, seen.sale));
    let figure = format!(
        "max_wal_size {}, min_wal_size {}, every {} s",
        bytes(facts.max_wal_size),
        bytes(facts.min_wal_size),
        facts.checkpoint_timeout_s
    );
    let check = Check::new("checkpoints", figure);
    // A checkpoint is due when this share of max_wal_size was written.
    let most = wal as f64 * (1.0 + facts.checkpoint_completion_target);
    if facts.max_wal_size as f64 >= most && facts.min_wal_size >= wal {
        return check;
    }
    if seen.settings.embedded {
        let remedy = match facts.max_wal_size as f64 >= most {
            true => format!("set database.embedded_wal_bytes = {wal}"),
            false => "give a sale of this size a PostgreSQL of its own (database.url)".to_owned(),
        };
        return check.or(Verdict::Warn, remedy);
    }
    let gigabytes = |bytes: f64| (bytes / GIB as f64).ceil().max(1.0) as u64;
    let mut raised = Vec::new();
    if (facts.max_wal_size as f64) < most {
        raised.push(("max_wal_size", gigabytes(most)));
    }
    if facts.min_wal_size < wal {
        raised.push(("min_wal_size", gigabytes(wal as f64)));
    }
    let there = facts.segments_ready.unwrap_or(0) + facts.segments_behind.unwrap_or(0);
    let there = there * facts.segment_bytes;
    for (name, gigabytes) in &raised {
        let grows = gigabytes.saturating_mul(GIB).saturating_sub(there);
        if facts.room.is_some_and(|room| room.wal < grows) {
            let remedy = format!(
                "the sale's WAL wants {name} = {gigabytes} GB, which the disk of pg_wal does not have: make room first"
            );
            return check.or(Verdict::Warn, remedy);
        }
    }
    let raised: Vec<_> = raised
        .iter()
        .map(|(name, gigabytes)| (*name, format!("{gigabytes}GB")))
        .collect();
    let remedy = "raise it, so that the sale's WAL is kept, and written without a checkpoint";
    check.or(Verdict::Warn, remedy).sql(remedies::set(&raised))
}

/// Holders of WAL that is not recycled: it fills the disk, and a sale finds no segments ready.
pub(super) fn kept(seen: &Seen<'_>) -> Check {
    let facts = &seen.facts;
    let behind = |bytes: u64| bytes > LAG_BYTES;
    let held = facts.kept.iter();
    let held = held.filter(|kept| kept.stuck || kept.bytes.is_some_and(behind));
    let told: Vec<String> = held
        .clone()
        .map(|kept| match kept.bytes {
            Some(kept_bytes) => format!("{} keeps {}", kept.holder, bytes(kept_bytes)),
            None => format!("{} keeps all", kept.holder),
        })
        .collect();
    if told.is_empty() {
        return Check::new("wal_kept", "none that could be recycled");
    }
    // What is stuck keeps the whole sale's.
    let sale = wal_bytes(facts, seen.sale);
    let fills =
        held.clone().any(|kept| kept.stuck) && facts.room.is_some_and(|room| room.wal < sale);
    let verdict = match fills || held.clone().any(|kept| kept.archive) {
        true => Verdict::Bad,
        false => Verdict::Warn,
    };
    let remedies: Vec<&str> = held.map(|kept| &*kept.remedy).collect();
    Check::new("wal_kept", told.join("; ")).or(verdict, remedies.join("; "))
}

pub(super) fn disk(seen: &Seen<'_>) -> Check {
    let facts = &seen.facts;
    let missing = segments_needed(facts, seen.sale)
        .saturating_sub(facts.segments_ready.unwrap_or(0))
        .min(facts.max_wal_size / facts.segment_bytes);
    let rows = orders(facts, seen.sale).saturating_mul(ROW_BYTES);
    let wal = missing * facts.segment_bytes;
    let both = rows.saturating_add(wal);
    let Some(room) = facts.room else {
        let figure = format!("not known; the sale needs {}", bytes(both));
        let remedy = "look at the server's disk";
        return Check::new("disk", figure).or(Verdict::Unknown, remedy);
    };
    let (figure, parts) = match room.shared {
        true => (
            format!("{} free, the sale needs {}", bytes(room.rows), bytes(both)),
            vec![(room.rows, both)],
        ),
        false => (
            format!(
                "{} free, the sale needs {}; for pg_wal {} free, the sale needs {}",
                bytes(room.rows),
                bytes(rows),
                bytes(room.wal),
                bytes(wal)
            ),
            vec![(room.rows, rows), (room.wal, wal)],
        ),
    };
    let check = Check::new("disk", figure);
    let remedy = "make room on the server's disk";
    match parts {
        parts if parts.iter().any(|(free, needed)| free < needed) => check.or(Verdict::Bad, remedy),
        parts
            if parts
                .iter()
                .any(|(free, needed)| *free < needed.saturating_mul(2)) =>
        {
            check.or(Verdict::Warn, remedy)
        }
        _ => check,
    }
}
