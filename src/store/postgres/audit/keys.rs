//! Idempotency keys with two orders within the window.
//!
//! Keys have no index, so orders are read by id, and the hashes of orders younger than the window are kept. To
//! bound the memory, the orders are read once for each million orders of the busiest window, each time for
//! another share of the hashes: ten million orders a day take ten walks along the primary key and 35 MB.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use tokio_postgres::Row;
use tokio_postgres::types::ToSql;

use super::super::{Database, NodeLease};
use super::session::{Session, sum};
use crate::order::{KeyHash, OrderId};
use crate::store::StoreError;

/// Pairs that are verified one by one; further pairs are counted unverified.
const PAIRS_MAX: usize = 1_000;

/// Hashes of the keys of orders above an id ($1), of the share $2 of $3. Both forms of a key's hash (see
/// `KeyHash::matches`) agree in the half that is used.
const KEYS: &str = "
    SELECT count(*), max(order_id), array_agg(order_id) FILTER (WHERE wanted), array_agg(hash) FILTER (WHERE wanted)
      FROM (SELECT order_id, hash, key_hash IS NOT NULL AND (hash & 1073741823) % $3 = $2 AS wanted
              FROM (SELECT order_id, key_hash, hashtextextended(left(key_hash::text, 18), hashtextextended(user_id, 0)) AS hash
                      FROM orders WHERE order_id > $1 ORDER BY order_id LIMIT $4) part) part";

const PAIR: &str = "
    SELECT user_id, decode(replace(key_hash::text, '-', ''), 'hex') FROM orders
     WHERE order_id = ANY ($1) AND key_hash IS NOT NULL";

/// The windows in force so far, latest first.
const WINDOWS: &str = "SELECT since, window_ms FROM idempotency_windows ORDER BY since DESC";

/// The window of orders older than the record of windows: the shortest that could be configured.
const WINDOW_MS_LEAST: i64 = 1_000;

/// Records the window in force from an order on, if it has changed.
const NOTE_WINDOW: &str = "
    INSERT INTO idempotency_windows (since, window_ms)
    SELECT $3::int8, $4::int8 WHERE EXISTS (SELECT FROM node WHERE node = $1 AND epoch = $2)
       AND $4 IS DISTINCT FROM (SELECT window_ms FROM idempotency_windows ORDER BY since DESC LIMIT 1)
    ON CONFLICT (since) DO UPDATE SET window_ms = excluded.window_ms";

/// Records that keys of orders from `since` on are known for `window_ms`.
///
/// # Errors
/// If the database does not answer.
pub async fn note_window(
    database: &Database,
    lease: NodeLease,
    since: OrderId,
    window_ms: u64,
) -> Result<(), StoreError> {
    let client = database.pooled().await?;
    let window_ms = i64::try_from(window_ms).unwrap_or(i64::MAX);
    database
        .timed(
            "noting the idempotency window",
            client.execute(
                NOTE_WINDOW,
                &[&lease.node, &lease.epoch, &since.as_i64(), &window_ms],
            ),
        )
        .await
        .map(|_| ())
}

struct Windows(Vec<(i64, i64)>);

impl Windows {
    /// The window in force when the order `id` was placed, in milliseconds.
    fn at(&self, id: i64) -> i64 {
        let in_force = self.0.iter().find(|(since, _)| *since <= id);
        in_force.map_or(WINDOW_MS_LEAST, |(_, window_ms)| *window_ms)
    }

    fn longest(&self) -> i64 {
        let all = self.0.iter().map(|(_, window_ms)| *window_ms);
        all.max().unwrap_or(0).max(WINDOW_MS_LEAST)
    }
}

fn millis(id: i64) -> i64 {
    OrderId::from_i64(id).map_or(0, |id| id.millis().0)
}

/// Number of orders under a key that another order had already. `parts`: the last id of each part of the table,
/// and its number of orders.
pub(super) async fn duplicates(
    session: &mut Session,
    parts: &[(i64, i64)],
) -> Result<i64, StoreError> {
    let windows = session.query(WINDOWS, &[]).await?;
    let windows = Windows(windows.iter().map(|row| (row.get(0), row.get(1))).collect());
    let longest = windows.longest();
    let keys_max = session.keys_max();
    let shares = (busiest(parts, longest) / keys_max + 1).min(1 << 20);
    let statement = session.prepare(KEYS).await?;
    let mut pairs = Vec::new();
    let mut more = 0;
    for share in 0..shares {
        let mut seen: HashMap<i64, i64> = HashMap::new();
        let mut prune_at = keys_max;
        let mut above = 0_i64;
        loop {
            let key: [&(dyn ToSql + Sync); 3] = [&above, &share, &shares];
            let part = session
                .part("keys", &statement, &key, sum::<0>, None)
                .await?;
            let Some(row) = part.rows.first() else { break };
            let ids: Vec<i64> = row.get::<_, Option<_>>(2).unwrap_or_default();
            let hashes: Vec<i64> = row.get::<_, Option<_>>(3).unwrap_or_default();
            for (id, hash) in ids.into_iter().zip(hashes) {
                match seen.entry(hash) {
                    Entry::Vacant(free) => {
                        free.insert(id);
                    }
                    Entry::Occupied(mut taken) => {
                        let earlier = taken.insert(id);
                        if millis(id) - millis(earlier) >= windows.at(id) {
                            continue;
                        }
                        match pairs.len() < PAIRS_MAX {
                            true => pairs.push([earlier, id]),
                            false => more += 1,
                        }
                    }
                }
            }
            if seen.len() as i64 >= prune_at {
                let floor = above_of(above, longest);
                seen.retain(|_, id| millis(*id) >= floor);
                prune_at = keys_max.max(2 * seen.len() as i64);
            }
            above = row.get::<_, Option<i64>>(1).unwrap_or(above);
            if part.is_last {
                break;
            }
        }
    }
    let mut duplicates = more;
    for pair in pairs {
        let rows = session.query(PAIR, &[&pair.as_slice()]).await?;
        let key = |row: &Row| Some(KeyHash(row.get::<_, &[u8]>(1).try_into().ok()?));
        if let [a, b] = rows.as_slice()
            && a.get::<_, &str>(0) == b.get::<_, &str>(0)
            && let (Some(one), Some(other)) = (key(a), key(b))
            && one.matches(other)
        {
            duplicates += 1;
        }
    }
    Ok(duplicates)
}

/// The moment, in milliseconds, before which orders no longer matter for orders above `id`.
fn above_of(id: i64, window_ms: i64) -> i64 {
    millis(id).saturating_sub(window_ms)
}

/// Upper bound of the orders in the busiest window, in whole parts.
fn busiest(parts: &[(i64, i64)], window_ms: i64) -> i64 {
    let (mut sum, mut most, mut oldest) = (0, 0, 0);
    for (index, (last, count)) in parts.iter().enumerate() {
        sum += count;
        // A part counts until its last order has left the window.
        while oldest < index && millis(parts[oldest].0) < above_of(*last, window_ms) {
            sum -= parts[oldest].1;
            oldest += 1;
        }
        most = most.max(sum);
    }
    most
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(ms: i64) -> i64 {
        ms << 22
    }

    #[test]
    fn the_busiest_window_counts_every_part_that_reaches_into_it() {
        assert_eq!(busiest(&[], 1_000), 0);
        let parts = [
            (id(1_000), 5),
            (id(1_500), 7),
            (id(2_400), 1),
            (id(9_000), 9),
        ];
        assert_eq!(busiest(&parts, 1_000), 12);
        assert_eq!(busiest(&parts, 100_000), 22);
        assert_eq!(busiest(&parts, 1), 9);
    }

    #[test]
    fn a_pair_is_judged_by_the_window_that_was_in_force_when_its_second_order_was_placed() {
        let windows = Windows(vec![(id(5_000), 60_000), (id(2_000), 1_500)]);
        assert_eq!(windows.at(id(1_999)), WINDOW_MS_LEAST);
        assert_eq!(windows.at(id(2_000)), 1_500);
        assert_eq!(windows.at(id(5_000)), 60_000);
        assert_eq!(windows.longest(), 60_000);
        assert_eq!(Windows(Vec::new()).at(id(7)), WINDOW_MS_LEAST);
    }
}
