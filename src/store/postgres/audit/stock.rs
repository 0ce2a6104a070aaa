//! Counters, and the chain of stock log entries that explains them.

use std::collections::BTreeMap;

use tokio_postgres::Row;

use super::GAPS_MAX;
use super::session::{Session, each};
use crate::store::StoreError;

/// Counters of every SKU, those of the nodes' shares included, the number of its newest entry, and its checkpoints.
pub(super) const SKUS: &str = "
    SELECT s.id, s.sku_id, s.total, s.held + h.held, s.sold + h.sold, coalesce(j.id, c.through_id, 0), coalesce(c.through_id, 0),
           coalesce(c.total, 0), coalesce(c.held, 0), coalesce(c.sold, 0), coalesce(o.orders, 0), coalesce(o.sold, 0),
           (SELECT coalesce(sum(p.quantity), 0) FROM parked_orders p WHERE p.sku = s.id)::int8, s.lent,
           h.nodes, h.lent, h.helds, h.solds, h.newest,
           (SELECT count(*) FROM waitlist_entries e WHERE e.sku = s.id)
      FROM sku s
     CROSS JOIN LATERAL (SELECT coalesce(sum(held), 0)::int8 AS held, coalesce(sum(sold), 0)::int8 AS sold,
                                array_agg(node) AS nodes, array_agg(lent) AS lent, array_agg(held) AS helds,
                                array_agg(sold) AS solds,
                                array_agg(coalesce((SELECT id FROM stock_log l WHERE l.sku = s.id AND l.node = o.node
                                                     ORDER BY id DESC LIMIT 1), 0)) AS newest
                           FROM stock_share o WHERE sku = s.id) h
      LEFT JOIN LATERAL (SELECT id FROM stock_log WHERE sku = s.id ORDER BY id DESC LIMIT 1) j ON true
      LEFT JOIN stock_log_checkpoint c ON c.sku = s.id
      LEFT JOIN orders_checkpoint o ON o.sku = s.id";

/// Entries above a SKU and a number, in order of both. A node's entry has the counters of its share behind it, which
/// change without an entry when units are lent or lanes move. So only its changes are added up.
const ENTRIES: &str = "
    SELECT sku, id, total_delta, held_delta, sold_delta, total_after, held_after, sold_after, node
      FROM stock_log WHERE (sku, id) > ($1, $2) ORDER BY sku, id LIMIT $3";

const ENTRY: &str = "
    SELECT format('entry %s (%s %s at %s)', id, cause, reference, at::timestamptz(0))
      FROM stock_log WHERE sku = $1 AND id = $2";

/// Total, held, sold, in units.
pub(super) type Triple = (i64, i64, i64);

/// A SKU at one moment.
#[derive(Clone, Debug, Default)]
pub(super) struct Counters {
    pub(super) sku_id: String,
    pub(super) now: Triple,
    /// Its newest entry, or 0. Counters do not change without an entry.
    newest: i64,
    /// Entries up to this one are included in `checkpoint`.
    pub(super) checkpoint_through: i64,
    /// The sum of those entries.
    pub(super) checkpoint: Triple,
    /// Number of deleted orders, and the units of the paid ones.
    pub(super) pruned: (i64, i64),
    /// Units of parked orders.
    pub(super) parked: i64,
    /// Units lent to nodes.
    pub(super) lent: i64,
    /// The nodes' shares.
    pub(super) shares: Vec<NodeShare>,
    /// Entries of its waiting list, which nodes keep.
    pub(super) entries: i64,
}

/// The share of a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NodeShare {
    /// The node.
    pub node: i16,
    /// Units lent to it.
    pub lent: i64,
    /// Of these, units of payable orders.
    pub held: i64,
    /// Of these, units of paid orders that are not in `sku.sold`.
    pub sold: i64,
    /// Its newest entry, or 0.
    pub(super) newest: i64,
}

impl Counters {
    /// The newest entry of a node's share, or of units outside of any share. Nodes write at the same time, so the newest
    /// of all does not tell whether an earlier one was committed.
    fn newest(&self, node: Option<i16>) -> i64 {
        let share = self.shares.iter().find(|share| Some(share.node) == node);
        share.map_or(self.newest, |share| share.newest)
    }
}

pub(super) fn counters(rows: &[Row]) -> BTreeMap<i32, Counters> {
    let triple = |row: &Row, at: usize| (row.get(at), row.get(at + 1), row.get(at + 2));
    rows.iter()
        .map(|row| {
            let counters = Counters {
                sku_id: row.get(1),
                now: triple(row, 2),
                newest: row.get(5),
                checkpoint_through: row.get(6),
                checkpoint: triple(row, 7),
                pruned: (row.get(10), row.get(11)),
                parked: row.get(12),
                lent: row.get(13),
                shares: shares(row),
                entries: row.get(19),
            };
            (row.get(0), counters)
        })
        .collect()
}

fn shares(row: &Row) -> Vec<NodeShare> {
    let nodes: Vec<i16> = row.get::<_, Option<_>>(14).unwrap_or_default();
    let column = |at: usize| -> Vec<i64> { row.get::<_, Option<_>>(at).unwrap_or_default() };
    let (lent, held, sold, newest) = (column(15), column(16), column(17), column(18));
    let share = |(at, node): (usize, i16)| NodeShare {
        node,
        lent: lent[at],
        held: held[at],
        sold: sold[at],
        newest: newest[at],
    };
    nodes.into_iter().enumerate().map(share).collect()
}

/// Units that moved between two moments, each direction by itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Motion {
    /// Into `held`.
    pub held_in: i64,
    /// Out of `held`.
    pub held_out: i64,
    /// Into `sold`.
    pub sold_in: i64,
    /// Out of `sold`.
    pub sold_out: i64,
}

impl Motion {
    /// Whether nothing moved.
    pub fn is_none(&self) -> bool {
        *self == Motion::default()
    }

    fn add(&mut self, (_, held, sold): Triple) {
        self.held_in += held.max(0);
        self.held_out -= held.min(0);
        self.sold_in += sold.max(0);
        self.sold_out -= sold.min(0);
    }
}

/// The chain of one SKU's entries.
#[derive(Clone, Debug, Default)]
pub(super) struct Chain {
    /// The sum of its changes.
    pub(super) sum: Triple,
    pub(super) breaks: i64,
    pub(super) gaps: Vec<String>,
    /// Units that moved while its orders were read.
    pub(super) motion: Motion,
    /// The counters after the last entry.
    last: Triple,
    last_id: i64,
    /// Entries before which counters changed without an entry, and by how much.
    broken: Vec<(i64, Triple)>,
}

fn minus(a: Triple, b: Triple) -> Triple {
    (a.0 - b.0, a.1 - b.1, a.2 - b.2)
}

fn plus(a: Triple, b: Triple) -> Triple {
    (a.0 + b.0, a.1 + b.1, a.2 + b.2)
}

/// Follows the entries of each SKU up to its newest one in `after`.
pub(super) async fn read(
    session: &mut Session,
    before: &BTreeMap<i32, Counters>,
    after: &BTreeMap<i32, Counters>,
) -> Result<BTreeMap<i32, Chain>, StoreError> {
    let begin = |counters: &Counters| Chain {
        sum: counters.checkpoint,
        last: counters.checkpoint,
        last_id: counters.checkpoint_through,
        ..Chain::default()
    };
    let mut chains: BTreeMap<i32, Chain> = after
        .iter()
        .map(|(sku, counters)| (*sku, begin(counters)))
        .collect();
    let statement = session.prepare(ENTRIES).await?;
    let (mut sku, mut id) = (i32::MIN, 0_i64);
    loop {
        let part = session
            .part("stock log", &statement, &[&sku, &id], each, None)
            .await?;
        for row in &part.rows {
            (sku, id) = (row.get(0), row.get(1));
            let (Some(chain), Some(counters)) = (chains.get_mut(&sku), after.get(&sku)) else {
                continue;
            };
            let node: Option<i16> = row.get(8);
            if id <= counters.checkpoint_through || id > counters.newest(node) {
                continue;
            }
            let change = (row.get(2), row.get(3), row.get(4));
            let left = match node {
                Some(_) => plus(chain.last, change),
                None => (row.get(5), row.get(6), row.get(7)),
            };
            let gap = minus(minus(left, chain.last), change);
            if gap != (0, 0, 0) {
                chain.breaks += 1;
                if chain.broken.len() < GAPS_MAX {
                    chain.broken.push((id, gap));
                }
            }
            chain.sum = plus(chain.sum, change);
            (chain.last, chain.last_id) = (left, id);
            if id > before.get(&sku).map_or(0, |counters| counters.newest(node)) {
                chain.motion.add(change);
            }
        }
        if part.is_last {
            break;
        }
    }
    for (sku, chain) in &mut chains {
        let Some(counters) = after.get(sku) else {
            continue;
        };
        for (id, gap) in std::mem::take(&mut chain.broken) {
            let entry = describe(session, *sku, id).await?;
            chain.gaps.push(told("before", &entry, gap));
        }
        let gap = minus(counters.now, chain.last);
        if gap != (0, 0, 0) && chain.last_id > 0 && chain.gaps.len() < GAPS_MAX {
            let entry = describe(session, *sku, chain.last_id).await?;
            chain.gaps.push(told("after the last", &entry, gap));
        }
    }
    Ok(chains)
}

async fn describe(session: &Session, sku: i32, id: i64) -> Result<String, StoreError> {
    let rows = session.query(ENTRY, &[&sku, &id]).await?;
    Ok(match rows.first() {
        Some(row) => row.get(0),
        None => format!("entry {id}, of which only the checkpoint is left"),
    })
}

fn told(place: &str, entry: &str, (total, held, sold): Triple) -> String {
    format!("{place} {entry}: total {total:+}, held {held:+}, sold {sold:+} without an entry")
}
