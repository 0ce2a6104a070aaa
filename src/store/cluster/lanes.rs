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

use std::collections::{BTreeMap, HashMap};

use tokio_postgres::{Error, Row, Transaction};

use super::{lists, transact_long};
use crate::order::{Lane, LaneSet, OrderId, SkuNumber, UnixMillis};
use crate::store::StoreError;
use crate::store::postgres::parked::ParkedOf;
use crate::store::postgres::{Database, NodeLease, lease};

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
    let sql = format!("SELECT {COLUMNS} FROM lane ORDER BY lane");
    let rows = database
        .query_prepared("reading the lanes", &sql, &[])
        .await?;
    rows.iter().map(lane_row).collect()
}

/// Some lanes, once no transaction changes them.
///
/// # Errors
/// If the database does not answer, or a transaction still holds one of them.
pub async fn locked(database: &Database, lanes: LaneSet) -> Result<Vec<LaneRow>, StoreError> {
    let client = database.pooled().await?;
    let numbers: Vec<i16> = lanes.iter().map(|lane| i16::from(lane.get())).collect();
    let rows = database
        .timed(
            "looking up the outcome of a hand-over",
            client.query(
                &format!(
                    "SELECT {COLUMNS} FROM lane WHERE lane = ANY ($1) ORDER BY lane FOR SHARE"
                ),
                &[&numbers],
            ),
        )
        .await?;
    rows.iter().map(lane_row).collect()
}

/// Takes every lane that is nobody's, with the units of their orders. All of them or none, because these units
/// are one number. None while a log may hold orders of them: that of a single node, which had all lanes, of a dead one, or of
/// one that joins. Returns the lanes that were taken.
///
/// # Errors
/// [`StoreError::Fenced`] if the node was taken over; otherwise if the database does not answer.
pub async fn claim_free(database: &Database, lease: NodeLease) -> Result<Vec<LaneRow>, StoreError> {
    let work = async |transaction: &Transaction<'_>| {
        transaction
            .execute(
                "SELECT FROM lane WHERE node IS NULL ORDER BY lane FOR UPDATE",
                &[],
            )
            .await?;
        // The orders in the log of a single node belong to lanes that are nobody's: it comes first, also while another process
        // replays it, as a node without lanes that starts or is taken over.
        let taken = transaction
            .query(
                &format!(
                    "UPDATE lane SET node = $1, epoch = epoch + 1, ids_until_ms = greatest(ids_until_ms,
                            (SELECT max(ids_leased_until_ms) FROM node WHERE state IN ('single', 'left')))
                      WHERE node IS NULL AND NOT EXISTS
                            (SELECT FROM node n
                              WHERE n.state = 'single' AND n.journal_in_use
                                 OR n.state = 'joining' AND n.journal_in_use AND n.node <> $1
                                    AND NOT EXISTS (SELECT FROM lane b WHERE b.node = n.node)
                                 OR n.state = 'dead' AND NOT EXISTS (SELECT FROM lane b WHERE b.blocked_by = n.node))
                      RETURNING {COLUMNS}"
                ),
                &[&lease.node],
            )
            .await?;
        if !taken.is_empty() {
            // Those that lack are made when the lanes are loaded.
            lists::follow_single(transaction).await?;
            let numbers = taken.iter().map(|row| row.get::<_, i16>(0).into());
            units_into_share(transaction, lease.node, &numbers.collect::<Vec<_>>()).await?;
            lease::take_unpaid_from(transaction, lease.node).await?;
        }
        Ok(taken)
    };
    let taken = transact_long(database, lease, "taking free lanes", work).await?;
    taken.iter().map(lane_row).collect()
}

/// Moves the units of orders that are outside of any share into a node's: those of unpaid ones, which `sku` holds, and those of
/// parked ones in these lanes, which are in the pool, unless somebody has changed its numbers.
async fn units_into_share(
    transaction: &Transaction<'_>,
    node: i16,
    lanes: &[i64],
) -> Result<(), Error> {
    let sql = format!(
        "SELECT id, held, held + greatest(least(coalesce(p.units, 0), total - held - sold - lent), 0)
           FROM sku LEFT JOIN (SELECT sku, sum(quantity)::int8 AS units FROM parked_orders WHERE {} GROUP BY sku) p ON p.sku = id
          WHERE held > 0 OR p.units > 0 ORDER BY id FOR UPDATE OF sku",
        is_of("$1")
    );
    let rows = transaction.query(&sql, &[&lanes]).await?;
    let skus: Vec<i32> = rows.iter().map(|row| row.get(0)).collect();
    let held: Vec<i64> = rows.iter().map(|row| row.get(1)).collect();
    let lent: Vec<i64> = rows.iter().map(|row| row.get(2)).collect();
    // Out of `held` first: `held + sold + lent` may be all of the total.
    transaction
        .execute("UPDATE sku SET held = 0 WHERE id = ANY ($1)", &[&skus])
        .await?;
    transaction
        .execute(INTO_SHARE, &[&node, &skus, &lent, &held])
        .await?;
    Ok(())
}

/// Adds units to the shares of a node.
const INTO_SHARE: &str = "
    INSERT INTO stock_share (sku, node, lent, held)
    SELECT w.sku, $1, w.lent, w.held FROM unnest($2::int4[], $3::int8[], $4::int8[]) AS w (sku, lent, held)
    ON CONFLICT (sku, node) DO UPDATE
       SET lent = stock_share.lent + excluded.lent, held = stock_share.held + excluded.held";

/// Units of a SKU that the orders of a lane have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LaneUnits {
    /// The SKU.
    pub sku: SkuNumber,
    /// Units of unpaid orders: held in the share of its owner.
    pub held: i64,
    /// Its parked orders. Their units are free in the share of its owner, by its row.
    pub parked: ParkedOf,
}

impl LaneUnits {
    /// Of all SKUs.
    pub fn joined(
        held: BTreeMap<SkuNumber, i64>,
        mut parked: BTreeMap<SkuNumber, ParkedOf>,
    ) -> Vec<Self> {
        let mut units: Vec<_> = held
            .into_iter()
            .map(|(sku, held)| LaneUnits {
                sku,
                held,
                parked: parked.remove(&sku).unwrap_or_default(),
            })
            .collect();
        units.extend(parked.into_iter().map(|(sku, parked)| LaneUnits {
            sku,
            held: 0,
            parked,
        }));
        units
    }

    /// What all of them have in a share.
    pub fn lent(&self) -> i64 {
        self.held + self.parked.units.cast_signed()
    }
}

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
    /// What its orders have, by SKU, ascending. It moves from the giver's shares to the taker's.
    pub units: &'a [LaneUnits],
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

/// Gives a lane and the units of its orders to another node. A repeat after a lost answer returns
/// [`HandedOver::No`], and [`all`] tells whether the first attempt was committed.
///
/// # Errors
/// A CHECK violation if the giver's share has fewer units; [`StoreError::Fenced`] if the giver was taken over.
pub async fn hand_over(
    database: &Database,
    lease: NodeLease,
    over: &HandOver<'_>,
) -> Result<HandedOver, StoreError> {
    let mut client = database.pooled().await?;
    let lane = i16::from(over.lane.get());
    let skus: Vec<i32> = over.units.iter().map(|units| units.sku.0).collect();
    let lent: Vec<i64> = over.units.iter().map(LaneUnits::lent).collect();
    let held: Vec<i64> = over.units.iter().map(|units| units.held).collect();
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
                "UPDATE stock_share s SET lent = s.lent - w.lent, held = s.held - w.held
                   FROM unnest($2::int4[], $3::int8[], $4::int8[]) AS w (sku, lent, held) WHERE s.sku = w.sku AND s.node = $1",
                &[&lease.node, &skus, &lent, &held],
            )
            .await?;
        if given != skus.len() as u64 {
            return Ok(Some(HandedOver::No));
        }
        transaction
            .execute(INTO_SHARE, &[&over.to, &skus, &lent, &held])
            .await?;
        share_unpaid_from(&transaction, lease.node, over.to).await?;
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

/// Has the node `to`, which gets lanes of `from`, look for unpaid orders from where `from` did.
pub(super) async fn share_unpaid_from(
    transaction: &Transaction<'_>,
    from: i16,
    to: i16,
) -> Result<(), Error> {
    transaction
        .execute(
            "UPDATE node n SET unpaid_changes = n.unpaid_changes + 1, unpaid_from = least(n.unpaid_from, g.unpaid_from)
               FROM node g WHERE n.node = $2 AND g.node = $1",
            &[&from, &to],
        )
        .await
        .map(|_| ())
}

/// Has the node look for unpaid orders from `least` on at the latest: it has loaded lanes with older ones.
///
/// # Errors
/// [`StoreError::Fenced`] if the node was taken over; otherwise if the database does not answer.
pub async fn note_unpaid(
    database: &Database,
    lease: NodeLease,
    least: OrderId,
) -> Result<(), StoreError> {
    let client = database.pooled().await?;
    let noted = database
        .timed(
            "noting the oldest unpaid order",
            client.execute(
                "UPDATE node SET unpaid_changes = unpaid_changes + 1, unpaid_from = least(unpaid_from, $3)
                  WHERE node = $1 AND epoch = $2",
                &[&lease.node, &lease.epoch, &least.as_i64()],
            ),
        )
        .await?;
    if noted == 1 {
        Ok(())
    } else {
        Err(lease.is_lost())
    }
}

/// The lane of a row of `orders` or `parked_orders`: in its id, of its `user_id` for ids from before lanes.
pub(in crate::store) const OF_ROW: &str = "
    CASE WHEN order_id >= (SELECT lanes_from FROM database_identity) THEN (order_id >> 16) & 63
         ELSE get_byte(sha256(convert_to(user_id, 'UTF8')), 0) >> 2 END";

/// A row of these tables is of the lanes in this parameter, which are [`numbers`].
pub(in crate::store) fn is_of(parameter: &str) -> String {
    let all = Lane::COUNT;
    format!("(cardinality({parameter}::int8[]) = {all} OR ({OF_ROW}) = ANY ({parameter}))")
}

/// The lanes as a parameter.
pub(in crate::store) fn numbers(lanes: LaneSet) -> Vec<i64> {
    lanes.iter().map(|lane| i64::from(lane.get())).collect()
}

fn lane_of(row: &Row, at: usize) -> Option<Lane> {
    let number = u8::try_from(row.get::<_, i64>(at));
    number.ok().and_then(Lane::new)
}

/// What the orders of these lanes have, by SKU, ascending. The lanes are closed and drained in this process, so nothing moves.
///
/// # Errors
/// If the database does not answer.
pub async fn units_of(
    database: &Database,
    lease: NodeLease,
    lanes: LaneSet,
) -> Result<BTreeMap<Lane, Vec<LaneUnits>>, StoreError> {
    let client = database.pooled().await?;
    // Without a step timeout, because there may be many.
    let rows = client
        .query(
            &format!(
                "SELECT lane::int8, sku, sum(held)::int8, sum(orders)::int8, sum(parked)::int8
                   FROM (SELECT {OF_ROW} AS lane, sku, quantity AS held, 0 AS orders, 0 AS parked FROM orders
                          WHERE order_id >= (SELECT unpaid_from FROM node WHERE node = $1) AND status = 1
                         UNION ALL SELECT {OF_ROW}, sku, 0, 1, quantity FROM parked_orders) o
                  WHERE lane = ANY ($2) GROUP BY lane, sku ORDER BY lane, sku"
            ),
            &[&lease.node, &numbers(lanes)],
        )
        .await
        .map_err(StoreError::statement("adding up what the orders of lanes have"))?;
    let mut units = BTreeMap::<Lane, Vec<_>>::new();
    for row in &rows {
        if let Some(lane) = lane_of(row, 0) {
            units.entry(lane).or_default().push(LaneUnits {
                sku: SkuNumber(row.get(1)),
                held: row.get(2),
                parked: ParkedOf {
                    orders: row.get::<_, i64>(3).cast_unsigned(),
                    units: row.get::<_, i64>(4).cast_unsigned(),
                },
            });
        }
    }
    Ok(units)
}

/// The lanes of orders whose ids are from before lanes, by their rows or as they are parked.
///
/// # Errors
/// If the database does not answer.
pub async fn of_rows(
    database: &Database,
    ids: &[OrderId],
) -> Result<HashMap<OrderId, Lane>, StoreError> {
    let client = database.pooled().await?;
    let ids: Vec<i64> = ids.iter().map(|id| id.as_i64()).collect();
    let sql = format!(
        "SELECT order_id, ({OF_ROW})::int8
           FROM (SELECT order_id, user_id FROM orders UNION ALL SELECT order_id, user_id FROM parked_orders) o
          WHERE order_id = ANY ($1)"
    );
    let rows = database
        .timed(
            "looking up the lanes of orders",
            client.query(&sql, &[&ids]),
        )
        .await?;
    let pair = |row: &Row| Some((OrderId::from_i64(row.get(0))?, lane_of(row, 1)?));
    Ok(rows.iter().filter_map(pair).collect())
}
