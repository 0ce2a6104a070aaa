//! Which node has which lane, and hand-over.
//!
//! ```text
//!                    claim_free                      hand_over (one transaction: lane and held units)
//!      nobody's ──────────────────► a node's ───────────────────────────────────────► another node's
//!          ▲                          │   │ its epoch is raised (takeover, restart)        │
//!          │                          │   ▼                                                │
//!          │                          │  blocked by its log ── replayed ──► open           │
//!          └── the last node leaves ──┴────────────────────────────────────────────────────┘
//! ```

use tokio_postgres::{Error, Row, Transaction};

use super::in_force;
use crate::order::{Lane, SkuNumber, UnixMillis};
use crate::store::StoreError;
use crate::store::postgres::{Database, NodeLease};

/// The row of a lane.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LaneRow {
    /// The lane.
    pub lane: Lane,
    /// Its owner; `None`: nobody has it.
    pub node: Option<i16>,
    /// Rises whenever the lane changes hands.
    pub epoch: i64,
    /// Every id of earlier owners lies before this moment.
    pub ids_until: UnixMillis,
    /// The node whose log has to be replayed before the lane opens.
    pub blocked_by: Option<i16>,
}

/// The columns that [`lane_row`] reads.
pub(super) const COLUMNS: &str = "lane, node, epoch, ids_until_ms, blocked_by";

pub(super) fn lane_row(row: &Row) -> Result<LaneRow, StoreError> {
    let number: i16 = row.get(0);
    let lane = u8::try_from(number).ok().and_then(Lane::new);
    Ok(LaneRow {
        lane: lane.ok_or_else(|| StoreError::Data(format!("there is a lane {number}")))?,
        node: row.get(1),
        epoch: row.get(2),
        ids_until: UnixMillis(row.get(3)),
        blocked_by: row.get(4),
    })
}

/// Every lane.
///
/// # Errors
/// If the database does not answer.
pub async fn all(database: &Database) -> Result<Vec<LaneRow>, StoreError> {
    let client = database.pooled().await?;
    let rows = database
        .timed(
            "reading the lanes",
            client.query(&format!("SELECT {COLUMNS} FROM lane ORDER BY lane"), &[]),
        )
        .await?;
    rows.iter().map(lane_row).collect()
}

/// Takes every lane that is nobody's, with the units of their unpaid orders. All of them or none, because these units
/// are one number. None while the log of a single node, which had all lanes, may hold orders. Returns the lanes that
/// were taken.
///
/// # Errors
/// [`StoreError::Fenced`] if the node was taken over; otherwise if the database does not answer.
pub async fn claim_free(database: &Database, lease: NodeLease) -> Result<Vec<LaneRow>, StoreError> {
    let mut client = database.pooled().await?;
    let work = async {
        let transaction = client.transaction().await?;
        if !in_force(&transaction, lease).await? {
            return Ok(None);
        }
        transaction
            .execute(
                "SELECT FROM lane WHERE node IS NULL ORDER BY lane FOR UPDATE",
                &[],
            )
            .await?;
        // The orders in the log of a single node belong to lanes that are nobody's: it comes first.
        let taken = transaction
            .query(
                &format!(
                    "UPDATE lane SET node = $1, epoch = epoch + 1, ids_until_ms = greatest(ids_until_ms,
                            (SELECT max(ids_leased_until_ms) FROM node WHERE state IN ('single', 'left')))
                      WHERE node IS NULL AND NOT EXISTS (SELECT FROM node WHERE state = 'single' AND journal_in_use
                                                            OR state = 'dead' AND NOT EXISTS
                                                               (SELECT FROM lane b WHERE b.blocked_by = node.node))
                      RETURNING {COLUMNS}"
                ),
                &[&lease.node],
            )
            .await?;
        if !taken.is_empty() {
            held_into_share(&transaction, lease.node).await?;
        }
        transaction.commit().await?;
        Ok(Some(taken))
    };
    let taken = database.timed("taking free lanes", work).await?;
    taken
        .ok_or_else(|| lease.is_lost())?
        .iter()
        .map(lane_row)
        .collect()
}

/// Moves the units of unpaid orders that are outside of any share into a node's.
async fn held_into_share(transaction: &Transaction<'_>, node: i16) -> Result<(), Error> {
    let rows = transaction
        .query(
            "SELECT id, held FROM sku WHERE held > 0 ORDER BY id FOR UPDATE",
            &[],
        )
        .await?;
    let skus: Vec<i32> = rows.iter().map(|row| row.get(0)).collect();
    let units: Vec<i64> = rows.iter().map(|row| row.get(1)).collect();
    // Out of `held` first: `held + sold + lent` may be all of the total.
    transaction
        .execute("UPDATE sku SET held = 0 WHERE id = ANY ($1)", &[&skus])
        .await?;
    transaction
        .execute(INTO_SHARE, &[&node, &skus, &units])
        .await?;
    Ok(())
}

/// Adds held units to the shares of a node.
const INTO_SHARE: &str = "
    INSERT INTO stock_share (sku, node, lent, held)
    SELECT w.sku, $1, w.units, w.units FROM unnest($2::int4[], $3::int8[]) AS w (sku, units)
    ON CONFLICT (sku, node) DO UPDATE
       SET lent = stock_share.lent + excluded.lent, held = stock_share.held + excluded.held";

/// A lane that is handed over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HandOver<'a> {
    /// The lane, closed and drained in the process that gives it.
    pub lane: Lane,
    /// Its epoch, under which the giver has it.
    pub epoch: i64,
    /// The node that gets it.
    pub to: i16,
    /// Every id that the giver has given out in it lies before this moment.
    pub ids_until: UnixMillis,
    /// Units of its unpaid orders, by SKU, ascending. They move from the giver's shares to the taker's.
    pub held: &'a [(SkuNumber, i64)],
}

/// The outcome of a hand-over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HandedOver {
    /// The taker has the lane, under this epoch.
    Yes {
        /// Epoch of the lane from now on.
        epoch: i64,
    },
    /// The taker is not active, the lane is not the giver's under that epoch any more, or the giver has no share of one
    /// of the SKUs; nothing has changed.
    No,
}

/// Gives a lane and the units of its unpaid orders to another node. A repeat after a lost answer returns
/// [`HandedOver::No`], and [`all`] tells whether the first attempt was committed.
///
/// # Errors
/// A CHECK violation if the giver's share holds fewer units; [`StoreError::Fenced`] if the giver was taken over.
pub async fn hand_over(
    database: &Database,
    lease: NodeLease,
    over: &HandOver<'_>,
) -> Result<HandedOver, StoreError> {
    let mut client = database.pooled().await?;
    let lane = i16::from(over.lane.get());
    let skus: Vec<i32> = over.held.iter().map(|(sku, _)| sku.0).collect();
    let units: Vec<i64> = over.held.iter().map(|(_, units)| *units).collect();
    let work = async {
        let transaction = client.transaction().await?;
        let nodes = transaction
            .query(
                "SELECT node, epoch, state FROM node WHERE node = ANY ($1) ORDER BY node FOR KEY SHARE",
                &[&vec![lease.node, over.to]],
            )
            .await?;
        let mut rows = nodes.iter();
        let is_ours = rows.any(|row| {
            (row.get(0), row.get(1)) == (lease.node, lease.epoch)
                && matches!(row.get(2), "joining" | "active")
        });
        if !is_ours {
            return Ok(None);
        }
        let mut rows = nodes.iter();
        let may_take =
            rows.any(|row| row.get::<_, i16>(0) == over.to && row.get::<_, &str>(2) == "active");
        let moved = transaction
            .query_opt(
                "UPDATE lane SET node = $3, epoch = epoch + 1, ids_until_ms = greatest(ids_until_ms, $5)
                  WHERE lane = $1 AND node = $2 AND epoch = $4 AND blocked_by IS NULL AND $6 RETURNING epoch",
                &[
                    &lane,
                    &lease.node,
                    &over.to,
                    &over.epoch,
                    &over.ids_until.0,
                    &(may_take && over.to != lease.node),
                ],
            )
            .await?;
        let Some(moved) = moved else {
            return Ok(Some(HandedOver::No));
        };
        transaction
            .execute(
                "SELECT FROM sku WHERE id = ANY ($1) ORDER BY id FOR UPDATE",
                &[&skus],
            )
            .await?;
        // Out of the giver's share first: what is lent never exceeds the total in between.
        let given = transaction
            .execute(
                "UPDATE stock_share s SET lent = s.lent - w.units, held = s.held - w.units
                   FROM unnest($2::int4[], $3::int8[]) AS w (sku, units) WHERE s.sku = w.sku AND s.node = $1",
                &[&lease.node, &skus, &units],
            )
            .await?;
        if given != skus.len() as u64 {
            return Ok(Some(HandedOver::No));
        }
        transaction
            .execute(INTO_SHARE, &[&over.to, &skus, &units])
            .await?;
        transaction.commit().await?;
        Ok(Some(HandedOver::Yes {
            epoch: moved.get(0),
        }))
    };
    database
        .timed("handing a lane over", work)
        .await?
        .ok_or_else(|| lease.is_lost())
}
