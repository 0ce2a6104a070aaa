//! What is remembered of each buyer: keys, recent orders, units toward purchase limits.
//!
//! One record a `user_id`, so that one look-up under one shard's lock answers idempotency (I4),
//! the purchase limit and the list of a buyer's orders. A record holds the orders of the
//! idempotency window; refusals leave nothing behind.

use std::sync::atomic::{AtomicUsize, Ordering};

use dashmap::DashMap;
use dashmap::mapref::entry::Entry;
use smallvec::SmallVec;

use crate::order::{KeyHash, Order, OrderId, PayloadHash, Quantity, Refusal, SkuNumber, UserId};

/// One order as a buyer's record remembers it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Remembered {
    /// The order.
    pub order_id: OrderId,
    /// The hash of its key, where it came with one.
    pub key: Option<KeyHash>,
    /// The hash of what it asked for.
    pub payload: PayloadHash,
    /// What was bought.
    pub sku: SkuNumber,
    /// How many units.
    pub quantity: Quantity,
    /// Whether its units count toward the purchase limit.
    pub live: bool,
}

impl Remembered {
    /// What is remembered of an order that holds its units.
    pub fn of(order: &Order) -> Self {
        Remembered {
            order_id: order.id,
            key: order.key,
            payload: order.payload,
            sku: order.sku,
            quantity: order.quantity,
            live: true,
        }
    }
}

/// What the claim of a buyer's record comes to.
#[derive(Debug)]
pub enum Claimed<'a> {
    /// A new order. Dropping the guard forgets it again.
    Fresh(BuyerClaim<'a>),
    /// The same key came with the same body before; this is its order.
    Duplicate(OrderId),
}

/// Every buyer's record.
#[derive(Debug)]
pub struct Buyers {
    records: DashMap<UserId, SmallVec<[Remembered; 1]>, foldhash::quality::RandomState>,
    remembered: AtomicUsize,
    remembered_max: usize,
}

/// Parts of the map, each behind a lock of its own. Many, because one that grows, or is searched
/// for what is too old, keeps its buyers waiting: with ten million of them about a millisecond.
const SHARDS: usize = 1_024;

impl Buyers {
    /// Room for `remembered_max` orders, of which `expected` buyers are sized for at once, so
    /// that the map does not resize under load.
    pub fn new(remembered_max: usize, expected: usize) -> Self {
        Buyers {
            records: DashMap::with_capacity_and_hasher_and_shard_amount(
                expected,
                foldhash::quality::RandomState::default(),
                SHARDS,
            ),
            remembered: AtomicUsize::new(0),
            remembered_max,
        }
    }

    /// Enters a new order into its buyer's record, or finds the order that is already there under
    /// its key. `gate` is the refusal that applies to a fresh order only: a duplicate is answered
    /// even when the sale is over.
    ///
    /// # Errors
    /// In order of precedence: [`Refusal::IdempotencyKeyReused`], `gate`,
    /// [`Refusal::PurchaseLimit`], and [`Refusal::MemoryFull`] where the memory is full.
    pub fn claim<'a>(
        &'a self,
        user_id: &'a UserId,
        order: Remembered,
        limit: Option<u32>,
        gate: Result<(), Refusal>,
    ) -> Result<Claimed<'a>, Refusal> {
        let record = self.records.entry(user_id.clone());
        let known = match &record {
            Entry::Occupied(occupied) => occupied.get().as_slice(),
            Entry::Vacant(_) => &[],
        };
        if let Some(earlier) = judge(known, &order, limit, gate)? {
            return Ok(Claimed::Duplicate(earlier));
        }
        if self.remembered.fetch_add(1, Ordering::Relaxed) >= self.remembered_max {
            self.remembered.fetch_sub(1, Ordering::Relaxed);
            return Err(Refusal::MemoryFull);
        }
        match record {
            Entry::Occupied(mut occupied) => occupied.get_mut().push(order),
            Entry::Vacant(vacant) => {
                vacant.insert(SmallVec::from_elem(order, 1));
            }
        }
        Ok(Claimed::Fresh(BuyerClaim {
            buyers: self,
            user_id,
            order_id: order.order_id,
            kept: false,
        }))
    }

    /// What [`Buyers::claim`] would say now, without entering anything: an order that cannot be
    /// placed anyway, as after the stock is gone, costs one look and no write.
    ///
    /// # Errors
    /// As [`Buyers::claim`], but for the memory being full.
    pub fn look(
        &self,
        user_id: &UserId,
        order: &Remembered,
        limit: Option<u32>,
        gate: Result<(), Refusal>,
    ) -> Result<Option<OrderId>, Refusal> {
        let record = self.records.get(user_id);
        judge(
            record.as_deref().map_or(&[], SmallVec::as_slice),
            order,
            limit,
            gate,
        )
    }

    /// Enters an order that is known to stand, at start.
    pub fn restore(&self, user_id: UserId, order: Remembered) {
        self.records.entry(user_id).or_default().push(order);
        self.remembered.fetch_add(1, Ordering::Relaxed);
    }

    /// Forgets an order that was never written: its key may be used afresh.
    pub fn forget(&self, user_id: &UserId, order_id: OrderId) {
        self.records.remove_if_mut(user_id, |_, record| {
            let before = record.len();
            record.retain(|known| known.order_id != order_id);
            self.remembered
                .fetch_sub(before - record.len(), Ordering::Relaxed);
            record.is_empty()
        });
    }

    /// Frees an order's units from the purchase limit and keeps its key. True: it was live until
    /// now; `None`: it is not remembered.
    pub fn no_longer_live(&self, user_id: &UserId, order_id: OrderId) -> Option<bool> {
        self.set_live(user_id, order_id, false)
    }

    /// Counts an order's units toward the purchase limit again. True: it was not live until now;
    /// `None`: it is not remembered.
    pub fn live_again(&self, user_id: &UserId, order_id: OrderId) -> Option<bool> {
        self.set_live(user_id, order_id, true)
    }

    fn set_live(&self, user_id: &UserId, order_id: OrderId, live: bool) -> Option<bool> {
        let mut record = self.records.get_mut(user_id)?;
        let known = record.iter_mut().find(|known| known.order_id == order_id)?;
        Some(std::mem::replace(&mut known.live, live) != live)
    }

    /// Drops everything older than the window's `floor`; returns how many orders were dropped.
    pub fn evict_before(&self, floor: OrderId) -> usize {
        let mut evicted = 0;
        self.records.retain(|_, record| {
            let before = record.len();
            record.retain(|known| known.order_id >= floor);
            evicted += before - record.len();
            !record.is_empty()
        });
        self.remembered.fetch_sub(evicted, Ordering::Relaxed);
        evicted
    }

    /// A buyer's remembered orders, in no particular order.
    pub fn orders_of(&self, user_id: &UserId) -> Vec<Remembered> {
        self.records
            .get(user_id)
            .map(|record| record.to_vec())
            .unwrap_or_default()
    }

    /// Every remembered order that is no longer live: cancelled, expired or refused. Walks all.
    pub fn no_longer_live_ones(&self) -> Vec<OrderId> {
        let records = self.records.iter();
        records
            .flat_map(|record| {
                let ended = record.iter().filter(|known| !known.live);
                ended.map(|known| known.order_id).collect::<Vec<_>>()
            })
            .collect()
    }

    /// Orders remembered now.
    pub fn len(&self) -> usize {
        self.remembered.load(Ordering::Relaxed)
    }

    /// Whether no order is remembered.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Holds `order` against what is known of its buyer: the earlier order under its key, or nothing
/// where it is fresh and allowed.
fn judge(
    known: &[Remembered],
    order: &Remembered,
    limit: Option<u32>,
    gate: Result<(), Refusal>,
) -> Result<Option<OrderId>, Refusal> {
    // An order that was recovered from a receipt may be known by short hashes.
    let under_key = order.key.and_then(|key| {
        let is_under = |known: &&Remembered| known.key.is_some_and(|known| known.matches(key));
        known.iter().find(is_under)
    });
    if let Some(earlier) = under_key {
        return if earlier.payload.matches(order.payload) {
            Ok(Some(earlier.order_id))
        } else {
            Err(Refusal::IdempotencyKeyReused)
        };
    }
    gate?;
    let Some(limit) = limit else { return Ok(None) };
    let taken = known
        .iter()
        .filter(|known| known.live && known.sku == order.sku)
        .map(|known| known.quantity.get())
        .fold(0, u32::saturating_add);
    if taken.saturating_add(order.quantity.get()) > limit {
        return Err(Refusal::PurchaseLimit { limit, taken });
    }
    Ok(None)
}

/// A fresh order in its buyer's record. Dropping it forgets the order; [`BuyerClaim::keep`] hands
/// it over to whoever settles the order.
#[derive(Debug)]
#[must_use = "dropping a claim forgets the order"]
pub struct BuyerClaim<'a> {
    buyers: &'a Buyers,
    user_id: &'a UserId,
    order_id: OrderId,
    kept: bool,
}

impl BuyerClaim<'_> {
    /// Hands the entry over.
    pub fn keep(mut self) {
        self.kept = true;
    }
}

impl Drop for BuyerClaim<'_> {
    fn drop(&mut self) {
        if !self.kept {
            self.buyers.forget(self.user_id, self.order_id);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(id: u64, key: u8, payload: u64, units: u32) -> Remembered {
        Remembered {
            order_id: OrderId::new(id).unwrap(),
            key: (key > 0).then_some(KeyHash([key; 16])),
            payload: PayloadHash(payload),
            sku: SkuNumber(1),
            quantity: Quantity::new(units).unwrap(),
            live: true,
        }
    }

    fn keep(claimed: Result<Claimed<'_>, Refusal>) {
        match claimed {
            Ok(Claimed::Fresh(claim)) => claim.keep(),
            other => panic!("not fresh: {other:?}"),
        }
    }

    #[test]
    fn a_key_has_one_order_and_another_body_is_refused() {
        let buyers = Buyers::new(10, 10);
        let user = UserId::new("u").unwrap();
        keep(buyers.claim(&user, entry(1, 7, 1, 1), None, Ok(())));
        let paused = Err(Refusal::SalePaused);
        assert!(matches!(
            buyers.claim(&user, entry(2, 7, 1, 1), None, paused),
            Ok(Claimed::Duplicate(id)) if id.get() == 1
        ));
        assert_eq!(
            buyers
                .claim(&user, entry(3, 7, 2, 1), None, paused)
                .unwrap_err(),
            Refusal::IdempotencyKeyReused
        );
        // The key is the user's own: another user's is another key.
        keep(buyers.claim(&UserId::new("v").unwrap(), entry(4, 7, 2, 1), None, Ok(())));
    }

    #[test]
    fn a_retry_finds_the_order_that_was_recovered_from_a_short_receipt() {
        let buyers = Buyers::new(10, 10);
        let user = UserId::new("u").unwrap();
        let mut recovered = entry(1, 7, 5 << 32, 1);
        recovered.key.as_mut().unwrap().0[8..].fill(0);
        buyers.restore(user.clone(), recovered);
        assert!(matches!(
            buyers.claim(&user, entry(2, 7, 5 << 32 | 9, 1), None, Ok(())),
            Ok(Claimed::Duplicate(id)) if id.get() == 1
        ));
        assert_eq!(
            buyers
                .claim(&user, entry(3, 7, 6 << 32 | 9, 1), None, Ok(()))
                .unwrap_err(),
            Refusal::IdempotencyKeyReused
        );
    }

    #[test]
    fn a_dropped_claim_leaves_nothing() {
        let buyers = Buyers::new(10, 10);
        let user = UserId::new("u").unwrap();
        drop(buyers.claim(&user, entry(1, 7, 1, 1), None, Ok(())));
        assert!(buyers.is_empty());
        assert!(buyers.records.is_empty());
        keep(buyers.claim(&user, entry(2, 7, 9, 1), None, Ok(())));
    }

    #[test]
    fn the_limit_counts_units_of_live_orders() {
        let buyers = Buyers::new(10, 10);
        let user = UserId::new("u").unwrap();
        keep(buyers.claim(&user, entry(1, 0, 1, 2), Some(3), Ok(())));
        assert_eq!(
            buyers
                .claim(&user, entry(2, 0, 1, 2), Some(3), Ok(()))
                .unwrap_err(),
            Refusal::PurchaseLimit { limit: 3, taken: 2 }
        );
        buyers.no_longer_live(&user, OrderId::new(1).unwrap());
        keep(buyers.claim(&user, entry(2, 0, 1, 3), Some(3), Ok(())));
    }

    #[test]
    fn a_full_memory_refuses_and_eviction_makes_room() {
        let buyers = Buyers::new(1, 1);
        let user = UserId::new("u").unwrap();
        keep(buyers.claim(&user, entry(1, 1, 1, 1), None, Ok(())));
        let other = UserId::new("v").unwrap();
        assert_eq!(
            buyers
                .claim(&other, entry(2, 1, 1, 1), None, Ok(()))
                .unwrap_err(),
            Refusal::MemoryFull
        );
        assert_eq!(buyers.evict_before(OrderId::new(2).unwrap()), 1);
        keep(buyers.claim(&other, entry(2, 1, 1, 1), None, Ok(())));
        assert_eq!(buyers.len(), 1);
    }
}
