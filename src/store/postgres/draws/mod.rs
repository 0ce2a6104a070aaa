//! Draws: their secrets, their entries once they are fixed, and their outcome.
//!
//! Each step is one transaction that is fenced, and finds its own work done if it is repeated: a commit whose answer was
//! lost needs no other remedy.
//!
//! * this file: secrets, fixing the entries, ranking them;
//! * `closing`: the end of entries at several nodes;
//! * `published`: what everybody may read.

mod closing;
mod published;

use std::collections::HashMap;
use std::pin::pin;
use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use futures_util::{SinkExt, StreamExt};
use tokio_postgres::{Client, Row as DatabaseRow, Transaction};

pub use self::closing::close;
pub use self::published::{Page, page};
use super::transitions::fence;
use super::{Connected, Database, NodeLease};
use crate::faults::crash_point;
use crate::order::draw::{
    Beacon, EntriesHash, Entry, EntryTokens, Ranked, Ranking, Row, Salt, Seed, entries_hash, rows,
};
use crate::order::{OrderId, OrderStatus, Quantity, SkuNumber, UnixMillis, UserId};
use crate::store::{Ledger, StoreError};

/// Longest time for a step over all entries: a million take some seconds.
const STEP: Duration = Duration::from_secs(600);
/// Bytes of rows that are sent at once.
const CHUNK_BYTES: usize = 1 << 16;

/// A draw as stored.
#[derive(Debug)]
pub struct StoredDraw {
    /// Its SKU.
    pub sku: SkuNumber,
    /// The seed, which is published once the draw is made.
    pub seed: Seed,
    /// The salt, which never is.
    pub salt: Salt,
    /// The entries, once they are fixed.
    pub fixed: Option<Fixed>,
    /// The beacon, once it is known.
    pub beacon: Option<Beacon>,
    /// Whether the draw is made.
    pub is_drawn: bool,
    /// Whether a node has closed it: whoever reads this takes no entries.
    pub is_closed: bool,
}

/// The entries of a draw.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fixed {
    /// When they were fixed.
    pub at: UnixMillis,
    /// Units that are drawn for.
    pub units: u64,
    /// Their number.
    pub entries: u64,
    /// Their hash.
    pub hash: EntriesHash,
}

const COLUMNS: &str =
    "d.sku, d.seed, d.salt, (extract(epoch FROM d.fixed_at) * 1000)::int8, d.units, d.entries,
    d.entries_hash, d.beacon, d.drawn_at IS NOT NULL, d.closed_at IS NOT NULL";

fn data(what: impl std::fmt::Display) -> StoreError {
    StoreError::Data(format!("a draw: {what}"))
}

fn bytes_32(row: &DatabaseRow, index: usize) -> Result<[u8; 32], StoreError> {
    let bytes: &[u8] = row.get(index);
    bytes
        .try_into()
        .map_err(|_| data("a secret or hash has not 32 bytes"))
}

pub(super) fn from_row(row: &DatabaseRow) -> Result<StoredDraw, StoreError> {
    let at: Option<i64> = row.get(3);
    let number = |index: usize| -> Result<u64, StoreError> {
        let number: Option<i64> = row.get(index);
        number
            .and_then(|number| u64::try_from(number).ok())
            .ok_or_else(|| data("its entries are fixed, and a number of it is missing"))
    };
    let fixed = match at {
        None => None,
        Some(at) => Some(Fixed {
            at: UnixMillis(at),
            units: number(4)?,
            entries: number(5)?,
            hash: EntriesHash(bytes_32(row, 6)?),
        }),
    };
    let beacon: Option<&str> = row.get(7);
    Ok(StoredDraw {
        sku: SkuNumber(row.get(0)),
        seed: Seed(bytes_32(row, 1)?),
        salt: Salt(bytes_32(row, 2)?),
        fixed,
        beacon: beacon.map(Beacon::new).transpose().map_err(data)?,
        is_drawn: row.get(8),
        is_closed: row.get(9),
    })
}

/// Stores the secrets of a SKU's draw, unless it has some: they never change.
pub(super) async fn keep_secrets(
    transaction: &Transaction<'_>,
    sku: i32,
    seed: &Seed,
    salt: &Salt,
) -> Result<(), tokio_postgres::Error> {
    transaction
        .execute(
            "INSERT INTO draws (sku, seed, salt) VALUES ($1, $2, $3) ON CONFLICT (sku) DO NOTHING",
            &[&sku, &&seed.0[..], &&salt.0[..]],
        )
        .await
        .map(|_| ())
}

/// The row of a SKU's draw, for [`from_row`].
pub(super) async fn row(
    transaction: &Transaction<'_>,
    sku: i32,
) -> Result<Option<DatabaseRow>, tokio_postgres::Error> {
    let draw = format!("SELECT {COLUMNS} FROM draws d WHERE d.sku = $1");
    transaction.query_opt(&draw, &[&sku]).await
}

/// Every draw of a SKU whose terms name one.
///
/// # Errors
/// If a row contradicts itself, or the database's error.
pub(super) async fn load_all(
    client: &Client,
) -> Result<HashMap<SkuNumber, StoredDraw>, StoreError> {
    let found = client
        .query(
            &format!(
                "SELECT {COLUMNS} FROM draws d JOIN sku s ON s.id = d.sku WHERE s.allocation = 'draw'"
            ),
            &[],
        )
        .await
        .map_err(StoreError::statement("reading the draws"))?;
    let draws = found.iter().map(from_row);
    draws
        .map(|draw| draw.map(|draw| (draw.sku, draw)))
        .collect()
}

/// The places of the orders that still wait, of a draw that is made.
///
/// # Errors
/// If the database does not answer.
pub async fn waiting_places(
    database: &Database,
    sku: SkuNumber,
) -> Result<HashMap<OrderId, u32>, StoreError> {
    let doing = "reading the places of a draw";
    let client = database.connect("millrace draw").await?;
    let waiting = OrderStatus::Waitlisted.code();
    long(doing, async {
        let found = client
            .query_raw(
                "SELECT p.order_id, p.place FROM draw_places p JOIN orders o ON o.order_id = p.order_id
                  WHERE p.sku = $1 AND o.status = $2",
                [&sku.0 as &(dyn tokio_postgres::types::ToSql + Sync), &waiting],
            )
            .await
            .map_err(StoreError::statement(doing))?;
        let mut found = pin!(found);
        let mut places = HashMap::new();
        while let Some(row) = found.next().await {
            let row = row.map_err(StoreError::statement(doing))?;
            places.extend(place_of(&row));
        }
        Ok(places)
    })
    .await
}

fn place_of(row: &DatabaseRow) -> Option<(OrderId, u32)> {
    let place = u32::try_from(row.get::<_, i32>(1)).ok()?;
    Some((OrderId::from_i64(row.get(0))?, place))
}

/// Fixes the entries of a SKU: those of its orders from `first` on that wait. Stores them with their number and hash.
/// If they are fixed already, they stay as they are. `None`: not yet, because another node takes entries, or is at this.
///
/// # Errors
/// [`StoreError::Fenced`] if this process may not write any more, or the database's error.
pub async fn fix(
    database: &Database,
    lease: NodeLease,
    sku: SkuNumber,
    first: OrderId,
    now: UnixMillis,
) -> Result<Option<Fixed>, StoreError> {
    let doing = "fixing the entries of a draw";
    let failed = StoreError::statement(doing);
    let mut client = database.connect("millrace draw").await?;
    long(doing, async {
        let transaction = begin(&mut client, lease, doing).await?;
        let Some(draw) = lock(&transaction, lease.ledger, sku, doing).await? else {
            return Ok(None);
        };
        if draw.fixed.is_some() {
            return Ok(draw.fixed);
        }
        if lease.ledger == Ledger::Share {
            let is_closed = closing::is_closed_by_all(&transaction, sku).await;
            if !is_closed.map_err(StoreError::statement(doing))? {
                return Ok(None);
            }
        }
        let tokens = EntryTokens::new(&draw.salt);
        let waiting = OrderStatus::Waitlisted.code();
        let parameters: [&(dyn tokio_postgres::types::ToSql + Sync); 3] =
            [&sku.0, &first.as_i64(), &waiting];
        let found = transaction
            .query_raw(
                "INSERT INTO draw_entries (sku, order_id, user_id, quantity)
                 SELECT sku, order_id, user_id, quantity FROM orders
                  WHERE sku = $1 AND order_id >= $2 AND status = $3
                 RETURNING user_id, quantity",
                parameters,
            )
            .await
            .map_err(StoreError::statement(doing))?;
        let mut entries = Vec::new();
        let mut found = pin!(found);
        while let Some(row) = found.next().await {
            let row = row.map_err(StoreError::statement(doing))?;
            let user = UserId::from_row(row.get(0));
            entries.push(Entry {
                hash: tokens.of(&user).entry_hash(&user),
                quantity: quantity(row.get(1))?,
            });
        }
        let hash = entries_hash(&mut entries);
        let number = entries.len() as i64;
        let row = transaction
            .query_one(
                "UPDATE draws d SET fixed_at = to_timestamp($2::int8 / 1000.0), entries = $3, entries_hash = $4,
                        units = s.total - s.held - s.sold
                              - (SELECT coalesce(sum(held + sold), 0)::int8 FROM stock_share WHERE sku = s.id)
                   FROM sku s WHERE s.id = d.sku AND d.sku = $1
                 RETURNING d.units",
                &[&sku.0, &now.0, &number, &&hash.0[..]],
            )
            .await
            .map_err(StoreError::statement(doing))?;
        let units: i64 = row.get(0);
        transaction.commit().await.map_err(failed)?;
        crash_point("draw.fixed");
        Ok(Some(Fixed {
            at: now,
            units: u64::try_from(units).unwrap_or(0),
            entries: entries.len() as u64,
            hash,
        }))
    })
    .await
}

/// What became of a beacon.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BeaconStored {
    /// It is the draw's beacon now, or was before.
    Stored,
    /// The entries are not fixed yet: whoever knows the beacon could still enter.
    NotFixed,
    /// The draw has another one.
    Other(Beacon),
}

/// Stores the beacon of a draw whose entries are fixed, once.
///
/// # Errors
/// [`StoreError::Fenced`] if this process may not write any more, or the database's error.
pub async fn store_beacon(
    database: &Database,
    lease: NodeLease,
    sku: SkuNumber,
    beacon: &Beacon,
) -> Result<BeaconStored, StoreError> {
    let doing = "storing the beacon of a draw";
    let mut client = database.connect("millrace draw").await?;
    long(doing, async {
        let transaction = begin(&mut client, lease, doing).await?;
        let draw = lock(&transaction, Ledger::Sku, sku, doing).await?;
        let draw = draw.ok_or_else(|| data("it has no secrets"))?;
        match draw.beacon {
            Some(stored) if stored == *beacon => return Ok(BeaconStored::Stored),
            Some(other) => return Ok(BeaconStored::Other(other)),
            None if draw.fixed.is_none() => return Ok(BeaconStored::NotFixed),
            None => {}
        }
        transaction
            .execute(
                "UPDATE draws SET beacon = $2 WHERE sku = $1",
                &[&sku.0, &beacon.as_str()],
            )
            .await
            .map_err(StoreError::statement(doing))?;
        let failed = StoreError::statement(doing);
        transaction.commit().await.map_err(failed)?;
        Ok(BeaconStored::Stored)
    })
    .await
}

/// Whether the beacon of a draw is stored.
///
/// # Errors
/// If the database does not answer.
pub async fn has_beacon(database: &Database, sku: SkuNumber) -> Result<bool, StoreError> {
    let client = database.pooled().await?;
    let sql = "SELECT EXISTS (SELECT FROM draws WHERE sku = $1 AND beacon IS NOT NULL)";
    let row = database
        .timed("looking for a beacon", client.query_one(sql, &[&sku.0]))
        .await?;
    Ok(row.get(0))
}

/// Makes a draw whose entries are fixed, with the beacon that is stored: ranks the entries and stores their places. From
/// its commit on the seed is public. Returns the places, also if the draw was made before; at a node none then, where the entries of
/// the list have them. `None`: not yet, because another node is at this.
///
/// # Errors
/// [`StoreError::Fenced`] if this process may not write any more, or the database's error.
pub async fn draw(
    database: &Database,
    lease: NodeLease,
    sku: SkuNumber,
    now: UnixMillis,
) -> Result<Option<HashMap<OrderId, u32>>, StoreError> {
    let doing = "making a draw";
    let mut client = database.connect("millrace draw").await?;
    let made = long(doing, async {
        let transaction = begin(&mut client, lease, doing).await?;
        let Some(draw) = lock(&transaction, lease.ledger, sku, doing).await? else {
            return Ok(Made::NotYet);
        };
        let Some(fixed) = draw.fixed.filter(|_| !draw.is_drawn) else {
            return match draw.is_drawn {
                true => Ok(Made::Before),
                false => Err(data("it is to be made, and its entries are not fixed")),
            };
        };
        let (ids, mut ranked) = ranked(&transaction, &draw, doing).await?;
        if ranked.len() as u64 != fixed.entries {
            return Err(data("its fixed entries are not complete"));
        }
        let places = copy_places(&transaction, sku, &ids, &mut ranked, fixed.units, doing).await?;
        crash_point("draw.ranked");
        if lease.ledger == Ledger::Share {
            transaction
                .execute(PLACES_ARE_TURNS, &[&sku.0])
                .await
                .map_err(StoreError::statement(doing))?;
        }
        transaction
            .execute("DELETE FROM draw_entries WHERE sku = $1", &[&sku.0])
            .await
            .map_err(StoreError::statement(doing))?;
        transaction
            .execute(
                "UPDATE draws SET drawn_at = to_timestamp($2::int8 / 1000.0) WHERE sku = $1",
                &[&sku.0, &now.0],
            )
            .await
            .map_err(StoreError::statement(doing))?;
        let failed = StoreError::statement(doing);
        transaction.commit().await.map_err(failed)?;
        crash_point("draw.drawn");
        Ok(Made::Now(places))
    })
    .await?;
    match made {
        Made::Now(places) => Ok(Some(places)),
        Made::Before if lease.ledger == Ledger::Share => Ok(Some(HashMap::new())),
        Made::Before => waiting_places(database, sku).await.map(Some),
        Made::NotYet => Ok(None),
    }
}

/// What became of making a draw.
enum Made {
    Now(HashMap<OrderId, u32>),
    Before,
    NotYet,
}

/// Puts the entries of the list in the order of their places. The turns given out since are above them: each entry has had one.
const PLACES_ARE_TURNS: &str = "
    UPDATE waitlist_entries e SET turn = p.place FROM draw_places p
     WHERE p.sku = $1 AND e.order_id = p.order_id";

/// The fixed entries in the order of rank, with their orders.
async fn ranked(
    transaction: &Transaction<'_>,
    draw: &StoredDraw,
    doing: &'static str,
) -> Result<(Vec<OrderId>, Vec<Ranked>), StoreError> {
    let ranking = Ranking::new(&draw.seed, draw.beacon.as_ref());
    let tokens = EntryTokens::new(&draw.salt);
    let found = transaction
        .query_raw(
            "SELECT order_id, user_id, quantity FROM draw_entries WHERE sku = $1",
            [draw.sku.0],
        )
        .await
        .map_err(StoreError::statement(doing))?;
    let mut found = pin!(found);
    let mut entries = Vec::new();
    while let Some(row) = found.next().await {
        let row = row.map_err(StoreError::statement(doing))?;
        let id = OrderId::from_i64(row.get(0)).ok_or_else(|| data("not an order id"))?;
        let user = UserId::from_row(row.get(1));
        let entry = Entry {
            hash: tokens.of(&user).entry_hash(&user),
            quantity: quantity(row.get(2))?,
        };
        let rank = ranking.rank(&user);
        entries.push((Ranked { rank, entry }, id));
    }
    entries.sort_unstable();
    let (ranked, ids) = entries.into_iter().unzip();
    Ok((ids, ranked))
}

async fn copy_places(
    transaction: &Transaction<'_>,
    sku: SkuNumber,
    ids: &[OrderId],
    ranked: &mut [Ranked],
    units: u64,
    doing: &'static str,
) -> Result<HashMap<OrderId, u32>, StoreError> {
    let sink = transaction
        .copy_in::<_, Bytes>(
            "COPY draw_places (sku, place, order_id, entry, quantity, rank, won) FROM STDIN",
        )
        .await
        .map_err(StoreError::statement(doing))?;
    let mut sink = pin!(sink);
    let mut lines = BytesMut::with_capacity(CHUNK_BYTES + 256);
    let mut places = HashMap::with_capacity(ids.len());
    for (row, id) in rows(ranked, units).zip(ids) {
        let Row {
            place,
            entry,
            quantity,
            rank,
            won,
        } = row;
        let line = format!(
            "{}\t{place}\t{}\t\\\\x{entry}\t{}\t{rank}\t{won}\n",
            sku.0,
            id.as_i64(),
            quantity.get()
        );
        lines.put_slice(line.as_bytes());
        places.insert(*id, u32::try_from(place).map_err(data)?);
        if lines.len() >= CHUNK_BYTES {
            let chunk: Bytes = lines.split().freeze();
            sink.send(chunk)
                .await
                .map_err(StoreError::statement(doing))?;
        }
    }
    sink.send(lines.freeze())
        .await
        .map_err(StoreError::statement(doing))?;
    sink.finish().await.map_err(StoreError::statement(doing))?;
    Ok(places)
}

fn quantity(units: i32) -> Result<Quantity, StoreError> {
    u32::try_from(units)
        .ok()
        .and_then(Quantity::new)
        .ok_or_else(|| data(format_args!("a quantity is {units}")))
}

async fn begin<'a>(
    client: &'a mut Connected,
    lease: NodeLease,
    doing: &'static str,
) -> Result<Transaction<'a>, StoreError> {
    let transaction = client
        .transaction()
        .await
        .map_err(StoreError::statement(doing))?;
    let is_ours = fence(&transaction, lease).await;
    match is_ours {
        Ok(true) => Ok(transaction),
        Ok(false) => Err(lease.is_lost()),
        Err(error) => Err(StoreError::statement(doing)(error)),
    }
}

/// Locks a draw. `None`: another node has it locked, and no other process does.
async fn lock(
    transaction: &Transaction<'_>,
    ledger: Ledger,
    sku: SkuNumber,
    doing: &'static str,
) -> Result<Option<StoredDraw>, StoreError> {
    let unless_locked = match ledger {
        Ledger::Sku => "",
        Ledger::Share => "SKIP LOCKED",
    };
    let sql = format!("SELECT {COLUMNS} FROM draws d WHERE d.sku = $1 FOR UPDATE {unless_locked}");
    let row = transaction.query_opt(&sql, &[&sku.0]).await;
    let row = row.map_err(StoreError::statement(doing))?;
    match row {
        None if ledger == Ledger::Share => Ok(None),
        row => row
            .as_ref()
            .map(from_row)
            .unwrap_or_else(|| Err(data("it has no secrets")))
            .map(Some),
    }
}

/// A step that may take long.
async fn long<T>(
    doing: &'static str,
    step: impl Future<Output = Result<T, StoreError>>,
) -> Result<T, StoreError> {
    let timeout = StoreError::Timeout { doing, after: STEP };
    tokio::time::timeout(STEP, step)
        .await
        .unwrap_or(Err(timeout))
}
