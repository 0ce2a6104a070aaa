//! The memory of each buyer: idempotency keys, recent orders, units toward purchase limits.
//!
//! One record a `user_id`, so that one look-up under one shard's lock answers idempotency (I4),
//! the purchase limit and the list of a buyer's orders. Refusals leave nothing behind. Lifetimes
//! differ:
//!
//! | remembered | until |
//! |---|---|
//! | a key, its order and the hash of its body | the order leaves the idempotency window |
//! | an order without a key | the same, or earlier if memory is nearly full and its units are released, or are sold without a limit |
//! | units of a live order of a SKU with a limit | the order ends, or the limit is removed |
//!
//! An order that leaves the window while its units count stays as id, SKU and quantity. The id makes
//! releasing its units exactly-once, even after a lost answer.
//!
//! A SKU without a limit keeps nothing beyond the window. Its record in memory is then incomplete,
//! and marked so: a limit that is set later takes effect after the missing orders have been read
//! ([`Counting`]).
//!
//! One key never has both an order and a sticky refusal ([`Sticky`]): an order is entered under the
//! lock under which no refusal was found, and a refusal is written before a second check finds no
//! order.

mod record;

use std::collections::HashSet;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use dashmap::DashMap;
use dashmap::mapref::entry::Entry as Place;
use parking_lot::RwLock;

pub use self::record::LiveOrder;
use self::record::{CountDelta, Entry, Record, Rule};
use crate::order::{
    Ended, KeyHash, Lane, LaneSet, Order, OrderId, PayloadHash, Quantity, Refusal, SkuNumber,
    UserId,
};

/// One order in a buyer's record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BuyerOrder {
    /// Id of the order.
    pub order_id: OrderId,
    /// The hash of its idempotency key, if it has one.
    pub key: Option<KeyHash>,
    /// The hash of its body; 0 for an order that has left the window.
    pub payload: PayloadHash,
    /// The SKU that was bought.
    pub sku: SkuNumber,
    /// Units, at least 1.
    pub quantity: Quantity,
    /// How the order ended; `None`: it is live, and its units count toward the purchase limit.
    pub ended: Option<Ended>,
}

impl BuyerOrder {
    /// The entry of an order that holds its units.
    pub fn of(order: &Order) -> Self {
        BuyerOrder {
            order_id: order.id,
            key: order.key,
            payload: order.payload,
            sku: order.sku,
            quantity: order.quantity,
            ended: None,
        }
    }

    /// Whether its units count toward the purchase limit.
    pub fn is_live(&self) -> bool {
        self.ended.is_none()
    }
}

/// The result of [`Buyers::claim`].
#[derive(Debug)]
pub enum Claimed<'a> {
    /// A new order. Dropping the guard removes it again.
    Fresh(BuyerClaim<'a>),
    /// The order of an earlier request with the same key and body.
    Duplicate(OrderId),
}

/// The sticky refusal under one key of a buyer. [`Buyers`] calls it under the lock of the buyer's
/// record, so it must not block.
pub trait Sticky {
    /// Returns the earlier refusal under the key, if there is one, else `outcome`. If `outcome` is a
    /// sticky refusal, it stays under the key from now on.
    ///
    /// # Errors
    /// That refusal.
    fn resolve(&self, outcome: Result<(), Refusal>) -> Result<(), Refusal>;

    /// Removes the refusal under the key.
    fn withdraw(&self);
}

/// No sticky refusals, for an order that Millrace itself enters.
#[derive(Clone, Copy, Debug)]
pub struct NothingSticky;

impl Sticky for NothingSticky {
    fn resolve(&self, outcome: Result<(), Refusal>) -> Result<(), Refusal> {
        outcome
    }

    fn withdraw(&self) {}
}

/// The orders that an eviction may remove.
#[derive(Clone, Copy, Debug)]
pub struct Eviction {
    /// The lowest id of the window.
    pub floor: OrderId,
    /// Below this id, orders that neither a retry nor a limit needs go too.
    pub early: OrderId,
    /// Of these, live ones go only below this id: from it on an order may still be unpaid, and its
    /// entry is needed to restore a row that a failover has lost.
    pub payable: OrderId,
}

impl Eviction {
    /// An eviction of the orders that have left the window, and no others.
    pub fn before(floor: OrderId) -> Self {
        Eviction {
            floor,
            early: floor,
            payable: floor,
        }
    }
}

/// Every buyer's record.
#[derive(Debug)]
pub struct Buyers {
    records: DashMap<UserId, Record, foldhash::quality::RandomState>,
    remembered: AtomicUsize,
    remembered_max: usize,
    /// Orders of `remembered` that neither a retry nor a limit needs.
    dispensable: AtomicUsize,
    /// The highest [`Eviction::early`] so far; 0 for none.
    let_go_below: AtomicU64,
    /// Taken under a shard's lock, never the other way round.
    counted: RwLock<Counted>,
}

/// The SKUs of which memory may lack live orders.
#[derive(Debug, Default)]
struct Counted {
    /// SKUs of which orders were removed that left the window, or went early.
    incomplete: HashSet<SkuNumber>,
    /// The SKU whose orders are being read from the database, and the orders that have ended
    /// meanwhile: they may be read as live.
    counting: Option<(SkuNumber, HashSet<OrderId>)>,
}

impl Counted {
    fn is_counting(&self, sku: SkuNumber) -> bool {
        self.counting
            .as_ref()
            .is_some_and(|counting| counting.0 == sku)
    }
}

/// Parts of the map, each behind a lock of its own. Many, because a part that grows, or is searched
/// for old orders, keeps its buyers waiting: with ten million buyers about a millisecond.
const SHARDS: usize = 1_024;

/// Parts into which the window is divided to choose how much of it goes early.
const PARTS: usize = 256;

impl Buyers {
    /// Room for `remembered_max` orders. The map is sized for `expected` buyers at once, so that it
    /// does not resize under load. Dispensable orders may exceed `remembered_max`, by as many again
    /// at most.
    pub fn new(remembered_max: usize, expected: usize) -> Self {
        Buyers {
            records: DashMap::with_capacity_and_hasher_and_shard_amount(
                expected,
                foldhash::quality::RandomState::default(),
                SHARDS,
            ),
            remembered: AtomicUsize::new(0),
            remembered_max,
            dispensable: AtomicUsize::new(0),
            let_go_below: AtomicU64::new(0),
            counted: RwLock::default(),
        }
    }

    /// Enters a new order into its buyer's record, or finds the order that is already there under
    /// its key. `gate` is the refusal that applies to a fresh order only: a duplicate is answered
    /// even when the sale is over. `sticky` has the last word.
    ///
    /// # Errors
    /// The first that applies, resolved by `sticky`: [`Refusal::IdempotencyKeyReused`], `gate`,
    /// [`Refusal::PurchaseLimit`]; or [`Refusal::MemoryFull`].
    pub fn claim<'a>(
        &'a self,
        user_id: &'a UserId,
        order: BuyerOrder,
        limit: Option<u32>,
        gate: Result<(), Refusal>,
        sticky: &impl Sticky,
    ) -> Result<Claimed<'a>, Refusal> {
        let record = self.records.entry(user_id.clone());
        let known = match &record {
            Place::Occupied(occupied) => Some(occupied.get()),
            Place::Vacant(_) => None,
        };
        match check(known, &order, limit, gate) {
            Ok(Some(earlier)) => return Ok(Claimed::Duplicate(earlier)),
            Ok(None) => sticky.resolve(Ok(()))?,
            Err(refusal) => {
                return Err(sticky.resolve(Err(refusal)).err().unwrap_or(refusal));
            }
        }
        let entry = Entry::new(order, limit.is_some());
        let mut delta = CountDelta::default();
        delta.enter(&entry);
        if self.remembered.fetch_add(1, Ordering::Relaxed) >= self.remembered_max
            && !self.has_room_beyond()
        {
            self.remembered.fetch_sub(1, Ordering::Relaxed);
            return Err(Refusal::MemoryFull);
        }
        delta.remembered = 0;
        self.count(delta);
        match record {
            Place::Occupied(mut occupied) => occupied.get_mut().insert(entry),
            Place::Vacant(vacant) => vacant.insert(Record::default()).insert(entry),
        }
        Ok(Claimed::Fresh(BuyerClaim {
            buyers: self,
            user_id,
            order_id: order.order_id,
            committed: false,
        }))
    }

    /// Whether the dispensable orders make up for the excess.
    #[cold]
    fn has_room_beyond(&self) -> bool {
        let dispensable = self.dispensable.load(Ordering::Relaxed);
        let room = dispensable.min(self.remembered_max);
        // The order that asks is counted already.
        self.len() <= self.remembered_max.saturating_add(room)
    }

    /// Checks an order as [`Buyers::claim`] does, without entering it: an order that cannot be placed
    /// anyway, such as after the stock is gone, costs a read and no write. `otherwise` refuses a
    /// fresh order that nothing else refuses.
    ///
    /// # Errors
    /// As [`Buyers::claim`], except [`Refusal::MemoryFull`]; else `otherwise`, resolved by `sticky`.
    pub fn peek(
        &self,
        user_id: &UserId,
        order: &BuyerOrder,
        limit: Option<u32>,
        gate: Result<(), Refusal>,
        otherwise: Refusal,
        sticky: &impl Sticky,
    ) -> Result<OrderId, Refusal> {
        let checked = check(self.records.get(user_id).as_deref(), order, limit, gate);
        let refusal = match checked {
            Ok(Some(earlier)) => return Ok(earlier),
            Ok(None) => otherwise,
            Err(refusal) => refusal,
        };
        let refusal = sticky.resolve(Err(refusal)).err().unwrap_or(refusal);
        if order.key.is_none() || !refusal.is_sticky() {
            return Err(refusal);
        }
        // Another request under the key may have looked for a refusal before this one was written.
        // Then its order is here, and it stays here as long as the record is locked. A request that
        // enters an order after this check finds the refusal. The lock orders the two, so that
        // neither is missed.
        let record = self.records.get(user_id);
        match check_key(record.as_deref(), order) {
            Ok(None) => Err(refusal),
            Ok(Some(earlier)) => {
                sticky.withdraw();
                Ok(earlier)
            }
            Err(reused) => {
                sticky.withdraw();
                Err(reused)
            }
        }
    }

    /// The order under a key, if there is one.
    ///
    /// # Errors
    /// [`Refusal::IdempotencyKeyReused`] if it came with another body.
    pub fn under_key(
        &self,
        user_id: &UserId,
        order: &BuyerOrder,
    ) -> Result<Option<OrderId>, Refusal> {
        check_key(self.records.get(user_id).as_deref(), order)
    }

    /// Enters an order that was read at start, or replaces it: a limit may have it counted already. `limited`: its SKU has a
    /// limit.
    pub fn restore(&self, user_id: UserId, order: BuyerOrder, limited: bool) {
        let entry = Entry::new(order, limited);
        let mut record = self.records.entry(user_id).or_default();
        let mut delta = record.remove(order.order_id);
        delta.enter(&entry);
        record.insert(entry);
        drop(record);
        self.count(delta);
    }

    /// Enters a live order that was read at start and has left the window, unless it is there.
    pub fn restore_live(&self, user_id: UserId, order: LiveOrder) {
        if self.records.entry(user_id).or_default().insert_live(order) {
            self.remembered.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Notes at start that the orders of these SKUs that have left the window were not read.
    pub fn note_incomplete(&self, skus: impl IntoIterator<Item = SkuNumber>) {
        self.counted.write().incomplete.extend(skus);
    }

    /// Keeps the live orders of a SKU from now on, even beyond the window, until the guard is dropped;
    /// its limit has to be in force by then. One SKU at a time.
    pub fn counting(&self, sku: SkuNumber) -> Counting<'_> {
        self.counted.write().counting = Some((sku, HashSet::new()));
        Counting { buyers: self, sku }
    }

    /// The SKU whose orders are being counted.
    pub fn is_counting(&self, sku: SkuNumber) -> bool {
        self.counted.read().is_counting(sku)
    }

    /// Removes an order that was never written: its key may be used afresh.
    pub fn forget(&self, user_id: &UserId, order_id: OrderId) {
        self.with_record(user_id, order_id, |record| ((), record.remove(order_id)));
    }

    /// Forgets the buyers of lanes that another node owns now. Walks all.
    pub fn forget_lanes(&self, lanes: LaneSet) {
        self.records.retain(|user_id, record| {
            let leaves = lanes.has(Lane::of(user_id));
            if leaves {
                self.count(record.departure());
            }
            !leaves
        });
    }

    /// Releases an order's units from the purchase limit and keeps its key. `Some(true)`: it was live
    /// until now. `None`: it is not remembered. An order that had left the window is removed.
    pub fn deactivate(&self, user_id: &UserId, order_id: OrderId, ended: Ended) -> Option<bool> {
        self.with_record(user_id, order_id, |record| {
            record.set_ended(order_id, Some(ended))
        })
        .flatten()
    }

    /// Counts an order's units toward the purchase limit again. `Some(true)`: it was not live until
    /// now. `None`: it is not remembered, and by `is_limited` its SKU has no limit.
    pub fn reactivate(
        &self,
        user_id: &UserId,
        order: LiveOrder,
        is_limited: impl Fn(SkuNumber) -> bool,
    ) -> Option<bool> {
        let mut record = self.records.entry(user_id.clone()).or_default();
        if let Some((_, ended)) = &mut self.counted.write().counting {
            ended.remove(&order.order_id);
        }
        let (turned, delta) = record.set_ended(order.order_id, None);
        self.count(delta);
        if turned.is_none() && self.keeps(order.sku, &is_limited) {
            record.insert_live(order);
            self.remembered.fetch_add(1, Ordering::Relaxed);
            return Some(true);
        }
        turned
    }

    /// Changes a buyer's record, if there is one, in which an order ends.
    fn with_record<R>(
        &self,
        user_id: &UserId,
        order_id: OrderId,
        change: impl FnOnce(&mut Record) -> (R, CountDelta),
    ) -> Option<R> {
        // Locks the place of the record even if there is none.
        let place = self.records.entry(user_id.clone());
        let is_counting = self.counted.read().counting.is_some();
        if is_counting && let Some((_, ended)) = &mut self.counted.write().counting {
            ended.insert(order_id);
        }
        let Place::Occupied(mut occupied) = place else {
            return None;
        };
        let (result, delta) = change(occupied.get_mut());
        self.count(delta);
        if occupied.get().is_empty() {
            occupied.remove();
        }
        Some(result)
    }

    fn count(&self, delta: CountDelta) {
        let add = |count: &AtomicUsize, change: isize| {
            if change != 0 {
                // Wraps around, as a subtraction would.
                count.fetch_add(change as usize, Ordering::Relaxed);
            }
        };
        add(&self.remembered, delta.remembered);
        add(&self.dispensable, delta.dispensable);
    }

    /// Whether the live orders of a SKU are kept beyond the window. If not, the SKU is noted as
    /// incomplete.
    fn keeps(&self, sku: SkuNumber, is_limited: &dyn Fn(SkuNumber) -> bool) -> bool {
        if is_limited(sku) {
            return true;
        }
        let counted = self.counted.read();
        if counted.is_counting(sku) {
            return true;
        }
        if counted.incomplete.contains(&sku) {
            return false;
        }
        drop(counted);
        // Its limit may have come in force meanwhile, by a task that found the SKU complete.
        let mut counted = self.counted.write();
        let keeps = counted.is_counting(sku) || is_limited(sku);
        if !keeps {
            counted.incomplete.insert(sku);
        }
        keeps
    }

    /// Removes every order that is no longer needed. Returns how many were removed. Live orders of
    /// SKUs that are `is_limited` stay for their units.
    pub fn evict(&self, eviction: Eviction, is_limited: impl Fn(SkuNumber) -> bool) -> usize {
        let Eviction {
            floor,
            early,
            payable,
        } = eviction;
        let keeps = |sku| self.keeps(sku, &is_limited);
        let rule = Rule {
            floor,
            early: early.max(floor),
            payable,
            keeps: &keeps,
        };
        if early > floor {
            self.let_go_below.fetch_max(early.get(), Ordering::Relaxed);
        }
        let (mut evicted, mut long) = (0, Vec::new());
        let mut note = |delta: CountDelta| {
            evicted += delta.remembered.unsigned_abs();
            self.count(delta);
        };
        self.records.retain(|user_id, record| {
            let (delta, next) = record.evict(OrderId::MIN, &rule);
            note(delta);
            long.extend(next.map(|next| (user_id.clone(), next)));
            !record.is_empty()
        });
        // Long records in steps, so that the shard is locked for a step at a time.
        while let Some((user_id, from)) = long.pop() {
            let Place::Occupied(mut occupied) = self.records.entry(user_id.clone()) else {
                continue;
            };
            let (delta, next) = occupied.get_mut().evict(from, &rule);
            note(delta);
            if occupied.get().is_empty() {
                occupied.remove();
            }
            long.extend(next.map(|next| (user_id, next)));
        }
        evicted
    }

    /// Whether nine tenths of the capacity are used and some orders are dispensable.
    pub fn is_tight(&self) -> bool {
        self.len() > self.remembered_max / 10 * 9 && self.dispensable.load(Ordering::Relaxed) > 0
    }

    /// An eviction that brings the memory down to eight tenths of its capacity by removing the oldest
    /// dispensable orders before they leave the window. Ids are given out at `now`. Walks all.
    pub fn early_eviction(&self, floor: OrderId, payable: OrderId, now: OrderId) -> Eviction {
        let too_many = self.len().saturating_sub(self.remembered_max / 10 * 8);
        let width = now.get().saturating_sub(floor.get()) / PARTS as u64 + 1;
        let mut parts = [0_usize; PARTS];
        for record in self.records.iter() {
            record.dispensable(|id, live| {
                if live && id >= payable {
                    return;
                }
                let part = id.get().saturating_sub(floor.get()) / width;
                parts[usize::try_from(part).map_or(PARTS - 1, |part| part.min(PARTS - 1))] += 1;
            });
        }
        let mut going = 0;
        let enough = |part: &usize| {
            going += part;
            going >= too_many
        };
        let last = parts.iter().position(enough).unwrap_or(PARTS - 1);
        let early = floor.get().saturating_add(width * (last as u64 + 1));
        Eviction {
            floor,
            early: OrderId::new(early).map_or(now, |early| early.min(now)),
            payable,
        }
    }

    /// The id below which orders without a key were removed before they left the window that begins
    /// at `floor`.
    pub fn let_go_below(&self, floor: OrderId) -> Option<OrderId> {
        OrderId::new(self.let_go_below.load(Ordering::Relaxed)).filter(|early| *early > floor)
    }

    /// The entry of an order.
    pub fn find(&self, user_id: &UserId, order_id: OrderId) -> Option<BuyerOrder> {
        self.records.get(user_id)?.get(order_id)
    }

    /// A buyer's orders of the window below `before`, the newest first, at most `count`.
    pub fn page(&self, user_id: &UserId, before: OrderId, count: usize) -> Vec<BuyerOrder> {
        let record = self.records.get(user_id);
        record.map_or_else(Vec::new, |record| record.page(before, count))
    }

    /// Every remembered order that is no longer live, with its end. Walks all.
    pub fn ended_orders(&self) -> Vec<(OrderId, Ended)> {
        let mut ended = Vec::new();
        for record in self.records.iter() {
            record.ended(&mut ended);
        }
        ended
    }

    /// Every remembered order of the window that is live. Walks all.
    pub fn live_orders(&self) -> Vec<OrderId> {
        let mut live = Vec::new();
        for record in self.records.iter() {
            record.live(&mut live);
        }
        live
    }

    /// The entries of these orders, as far as they are live, with their buyers. Walks all.
    pub fn live_among(&self, ids: &HashSet<OrderId>) -> Vec<(UserId, BuyerOrder)> {
        let (mut known, mut live) = (Vec::new(), Vec::new());
        for record in self.records.iter() {
            record.live(&mut live);
            let wanted = live.drain(..).filter(|id| ids.contains(id));
            let of = wanted.filter_map(|id| Some((record.key().clone(), record.get(id)?)));
            known.extend(of);
        }
        known
    }

    /// Orders remembered now.
    pub fn len(&self) -> usize {
        self.remembered.load(Ordering::Relaxed)
    }

    /// Whether no order is remembered.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The share of the capacity that keys and limits need: 0 to 1, or a little more.
    pub fn used(&self) -> f64 {
        let dispensable = self.dispensable.load(Ordering::Relaxed);
        self.len().saturating_sub(dispensable) as f64 / self.remembered_max as f64
    }
}

/// The earlier order under an order's key, if there is one.
fn check_key(known: Option<&Record>, order: &BuyerOrder) -> Result<Option<OrderId>, Refusal> {
    match known.and_then(|known| known.under(order.key?)) {
        Some((id, payload)) if payload.matches(order.payload) => Ok(Some(id)),
        Some(_) => Err(Refusal::IdempotencyKeyReused),
        None => Ok(None),
    }
}

/// Checks `order` against its buyer's record: the earlier order under its key, or `None` if it is
/// fresh and allowed.
fn check(
    known: Option<&Record>,
    order: &BuyerOrder,
    limit: Option<u32>,
    gate: Result<(), Refusal>,
) -> Result<Option<OrderId>, Refusal> {
    if let Some(earlier) = check_key(known, order)? {
        return Ok(Some(earlier));
    }
    gate?;
    let Some(limit) = limit else { return Ok(None) };
    let taken = known.map_or(0, |known| known.units_of(order.sku));
    if taken.saturating_add(order.quantity.get()) > limit {
        return Err(Refusal::PurchaseLimit { limit, taken });
    }
    Ok(None)
}

/// A SKU whose limit is about to take effect: its live orders stay from now on. The orders that
/// memory lacks are added first.
#[derive(Debug)]
pub struct Counting<'a> {
    buyers: &'a Buyers,
    sku: SkuNumber,
}

impl Counting<'_> {
    /// Whether memory has every live order of the SKU.
    pub fn is_complete(&self) -> bool {
        !self.buyers.counted.read().incomplete.contains(&self.sku)
    }

    /// Adds an order that was read as live, unless it is there or has ended since.
    pub fn add(&self, user_id: UserId, order: LiveOrder) {
        let mut record = self.buyers.records.entry(user_id).or_default();
        let has_ended = match &self.buyers.counted.read().counting {
            Some((_, ended)) => ended.contains(&order.order_id),
            None => false,
        };
        if !has_ended && record.insert_live(order) {
            self.buyers.remembered.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Marks the SKU as complete: every missing order was added.
    pub fn complete(&self) {
        self.buyers.counted.write().incomplete.remove(&self.sku);
    }
}

impl Drop for Counting<'_> {
    fn drop(&mut self) {
        self.buyers.counted.write().counting = None;
    }
}

/// A fresh order in its buyer's record. Dropping it removes the order; [`BuyerClaim::commit`] leaves
/// the order in place, for the worker that settles it.
#[derive(Debug)]
#[must_use = "dropping a claim removes the order"]
pub struct BuyerClaim<'a> {
    buyers: &'a Buyers,
    user_id: &'a UserId,
    order_id: OrderId,
    committed: bool,
}

impl BuyerClaim<'_> {
    /// Leaves the entry in the record.
    pub fn commit(mut self) {
        self.committed = true;
    }

    /// Removes the order, and resolves `refusal` under its key in the same step.
    pub fn refuse(mut self, refusal: Refusal, sticky: &impl Sticky) -> Refusal {
        self.committed = true;
        let id = self.order_id;
        let refused = self.buyers.with_record(self.user_id, id, |record| {
            let delta = record.remove(id);
            let told = sticky.resolve(Err(refusal));
            (told.err().unwrap_or(refusal), delta)
        });
        refused.unwrap_or(refusal)
    }
}

impl Drop for BuyerClaim<'_> {
    fn drop(&mut self) {
        if !self.committed {
            self.buyers.forget(self.user_id, self.order_id);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(id: u64, key: u8, payload: u64, units: u32) -> BuyerOrder {
        BuyerOrder {
            order_id: OrderId::new(id).unwrap(),
            key: (key > 0).then_some(KeyHash([key; 16])),
            payload: PayloadHash(payload),
            sku: SkuNumber(1),
            quantity: Quantity::new(units).unwrap(),
            ended: None,
        }
    }

    fn id(id: u64) -> OrderId {
        OrderId::new(id).unwrap()
    }

    fn user(name: &str) -> UserId {
        UserId::new(name).unwrap()
    }

    fn taken(buyers: &Buyers, user: &UserId) -> u32 {
        let order = entry(u64::from(u32::MAX), 0, 0, 1);
        match buyers.claim(user, order, Some(0), Ok(()), &NothingSticky) {
            Err(Refusal::PurchaseLimit { taken, .. }) => taken,
            other => panic!("{other:?}"),
        }
    }

    fn commit(claimed: Result<Claimed<'_>, Refusal>) {
        match claimed {
            Ok(Claimed::Fresh(claim)) => claim.commit(),
            other => panic!("not fresh: {other:?}"),
        }
    }

    #[test]
    fn a_key_has_one_order_and_another_body_is_refused() {
        let buyers = Buyers::new(10, 10);
        let user = UserId::new("u").unwrap();
        commit(buyers.claim(&user, entry(1, 7, 1, 1), None, Ok(()), &NothingSticky));
        let paused = Err(Refusal::SalePaused);
        assert!(matches!(
            buyers.claim(&user, entry(2, 7, 1, 1), None, paused, &NothingSticky),
            Ok(Claimed::Duplicate(id)) if id.get() == 1
        ));
        assert_eq!(
            buyers
                .claim(&user, entry(3, 7, 2, 1), None, paused, &NothingSticky)
                .unwrap_err(),
            Refusal::IdempotencyKeyReused
        );
        // Keys belong to a user: another user's equal key is another key.
        commit(buyers.claim(
            &UserId::new("v").unwrap(),
            entry(4, 7, 2, 1),
            None,
            Ok(()),
            &NothingSticky,
        ));
    }

    #[test]
    fn a_retry_finds_the_order_that_was_recovered_from_a_short_receipt() {
        let buyers = Buyers::new(10, 10);
        let user = UserId::new("u").unwrap();
        let mut recovered = entry(1, 7, 5 << 32, 1);
        recovered.key.as_mut().unwrap().0[8..].fill(0);
        buyers.restore(user.clone(), recovered, false);
        assert!(matches!(
            buyers.claim(&user, entry(2, 7, 5 << 32 | 9, 1), None, Ok(()), &NothingSticky),
            Ok(Claimed::Duplicate(id)) if id.get() == 1
        ));
        assert_eq!(
            buyers
                .claim(
                    &user,
                    entry(3, 7, 6 << 32 | 9, 1),
                    None,
                    Ok(()),
                    &NothingSticky
                )
                .unwrap_err(),
            Refusal::IdempotencyKeyReused
        );
    }

    #[test]
    fn an_order_is_found_by_its_key_on_its_page_and_by_its_end() {
        let (buyers, user) = (Buyers::new(10, 10), user("u"));
        assert!(buyers.is_empty() && buyers.used() == 0.0);
        for order in [entry(5, 1, 7, 1), entry(6, 2, 8, 1)] {
            commit(buyers.claim(&user, order, None, Ok(()), &NothingSticky));
        }
        let under = |key, payload| buyers.under_key(&user, &entry(9, key, payload, 1));
        assert_eq!(under(1, 7), Ok(Some(id(5))));
        assert_eq!(under(1, 8), Err(Refusal::IdempotencyKeyReused));
        assert_eq!(under(3, 7), Ok(None));
        assert_eq!(buyers.page(&user, id(6), 9), [entry(5, 1, 7, 1)]);
        assert_eq!(buyers.ended_orders(), []);
        buyers.deactivate(&user, id(5), Ended::Expired);
        assert_eq!(buyers.ended_orders(), [(id(5), Ended::Expired)]);
        assert_eq!(buyers.live_orders(), [id(6)]);
        assert!(!buyers.is_empty() && buyers.used() == 0.2);
    }

    #[test]
    fn a_dropped_claim_leaves_nothing() {
        let buyers = Buyers::new(10, 10);
        let user = UserId::new("u").unwrap();
        drop(buyers.claim(&user, entry(1, 7, 1, 1), None, Ok(()), &NothingSticky));
        assert!(buyers.is_empty());
        assert!(buyers.records.is_empty());
        commit(buyers.claim(&user, entry(2, 7, 9, 1), None, Ok(()), &NothingSticky));
    }

    #[test]
    fn the_limit_counts_units_of_live_orders() {
        let buyers = Buyers::new(10, 10);
        let user = UserId::new("u").unwrap();
        commit(buyers.claim(&user, entry(1, 0, 1, 2), Some(3), Ok(()), &NothingSticky));
        assert_eq!(
            buyers
                .claim(&user, entry(2, 0, 1, 2), Some(3), Ok(()), &NothingSticky)
                .unwrap_err(),
            Refusal::PurchaseLimit { limit: 3, taken: 2 }
        );
        buyers.deactivate(&user, OrderId::new(1).unwrap(), Ended::Cancelled);
        commit(buyers.claim(&user, entry(2, 0, 1, 3), Some(3), Ok(()), &NothingSticky));
    }

    #[test]
    fn a_full_memory_refuses_and_eviction_makes_room() {
        let buyers = Buyers::new(1, 1);
        let user = UserId::new("u").unwrap();
        commit(buyers.claim(&user, entry(1, 1, 1, 1), None, Ok(()), &NothingSticky));
        let other = UserId::new("v").unwrap();
        assert_eq!(
            buyers
                .claim(&other, entry(2, 1, 1, 1), None, Ok(()), &NothingSticky)
                .unwrap_err(),
            Refusal::MemoryFull
        );
        assert_eq!(buyers.evict(Eviction::before(id(2)), |_| false), 1);
        commit(buyers.claim(&other, entry(2, 1, 1, 1), None, Ok(()), &NothingSticky));
        assert_eq!(buyers.len(), 1);
    }

    #[test]
    fn units_of_live_orders_count_after_the_window_until_the_order_ends_once() {
        let (buyers, user) = (Buyers::new(10, 10), user("u"));
        commit(buyers.claim(&user, entry(1, 7, 1, 2), Some(3), Ok(()), &NothingSticky));
        commit(buyers.claim(&user, entry(2, 8, 1, 1), Some(3), Ok(()), &NothingSticky));
        assert_eq!(buyers.evict(Eviction::before(id(3)), |_| true), 0);
        assert_eq!(taken(&buyers, &user), 3);
        assert_eq!(
            buyers.page(&user, OrderId::MAX, 10),
            [],
            "the window is empty"
        );
        let key = entry(3, 7, 9, 1);
        assert_eq!(
            buyers.under_key(&user, &key),
            Ok(None),
            "its key is free again"
        );
        assert_eq!(
            buyers.deactivate(&user, id(1), Ended::Cancelled),
            Some(true)
        );
        assert_eq!(
            buyers.deactivate(&user, id(1), Ended::Cancelled),
            None,
            "given back once"
        );
        assert_eq!((taken(&buyers, &user), buyers.len()), (1, 1));
        // The limit is removed.
        assert_eq!(buyers.evict(Eviction::before(id(3)), |_| false), 1);
        assert!(buyers.records.is_empty());
    }

    #[test]
    fn a_limit_that_is_set_later_waits_for_the_orders_that_memory_has_let_go() {
        let (buyers, user) = (Buyers::new(10, 10), user("u"));
        let live = |of: u64| LiveOrder::of(&entry(of, 0, 0, 1));
        commit(buyers.claim(&user, entry(1, 7, 1, 1), None, Ok(()), &NothingSticky));
        assert!(
            buyers.counting(SkuNumber(1)).is_complete(),
            "nothing was let go"
        );
        buyers.evict(Eviction::before(id(2)), |_| false);
        commit(buyers.claim(&user, entry(2, 7, 1, 1), None, Ok(()), &NothingSticky));
        let counting = buyers.counting(SkuNumber(1));
        assert!(!counting.is_complete());
        // Orders that leave the window meanwhile are kept. Orders that end meanwhile are not
        // counted, even if they were read as live just before.
        buyers.evict(Eviction::before(id(9)), |_| false);
        assert_eq!(buyers.deactivate(&user, id(1), Ended::Cancelled), None);
        assert_eq!(
            buyers.deactivate(&user, id(2), Ended::Cancelled),
            Some(true)
        );
        for of in [1, 2, 3, 3] {
            counting.add(user.clone(), live(of));
        }
        counting.complete();
        drop(counting);
        buyers.evict(Eviction::before(id(9)), |_| true);
        assert_eq!(taken(&buyers, &user), 1);
        assert!(buyers.counting(SkuNumber(1)).is_complete());
    }

    #[test]
    fn an_order_that_was_counted_for_a_limit_counts_once_when_its_lane_is_loaded() {
        let (buyers, user) = (Buyers::new(10, 10), user("u"));
        let counting = buyers.counting(SkuNumber(1));
        assert!(buyers.is_counting(SkuNumber(1)) && !buyers.is_counting(SkuNumber(2)));
        counting.add(user.clone(), LiveOrder::of(&entry(1, 7, 1, 1)));
        buyers.restore(user.clone(), entry(1, 7, 1, 1), true);
        counting.add(user.clone(), LiveOrder::of(&entry(1, 7, 1, 1)));
        assert_eq!((taken(&buyers, &user), buyers.len()), (1, 1));
        let again = buyers.claim(&user, entry(2, 7, 1, 1), Some(1), Ok(()), &NothingSticky);
        assert!(
            matches!(again, Ok(Claimed::Duplicate(first)) if first == id(1)),
            "its key is known"
        );
    }

    #[test]
    fn a_dead_letter_that_is_placed_after_the_window_counts_again() {
        let (buyers, user) = (Buyers::new(10, 10), user("u"));
        let order = LiveOrder::of(&entry(1, 0, 0, 2));
        assert_eq!(buyers.reactivate(&user, order, |_| true), Some(true));
        assert_eq!(buyers.reactivate(&user, order, |_| true), Some(false));
        assert_eq!(taken(&buyers, &user), 2);
    }

    #[test]
    fn what_can_be_let_go_is_no_reason_to_refuse_and_goes_first() {
        let (buyers, user) = (Buyers::new(2, 2), user("u"));
        let claim = |of, key, limit| {
            let order = entry(of, key, 1, 1);
            let claimed = buyers.claim(&user, order, limit, Ok(()), &NothingSticky);
            claimed.map(|claimed| commit(Ok(claimed)))
        };
        claim(1, 1, None).unwrap();
        claim(2, 0, Some(9)).unwrap();
        assert_eq!(
            claim(3, 0, None),
            Err(Refusal::MemoryFull),
            "a key and a limit"
        );
        assert!(!buyers.is_tight());
        assert_eq!(
            buyers.deactivate(&user, id(2), Ended::Cancelled),
            Some(true)
        );
        claim(3, 2, None).unwrap();
        assert!(buyers.is_tight());
        assert_eq!(
            claim(4, 0, None),
            Err(Refusal::MemoryFull),
            "both have keys"
        );
        let eviction = buyers.early_eviction(id(1), id(9), id(9));
        assert_eq!(buyers.evict(eviction, |_| false), 1);
        let known = buyers.page(&user, OrderId::MAX, 9);
        let known: Vec<u64> = known.iter().map(|known| known.order_id.get()).collect();
        assert_eq!(known, [3, 1], "keys stay");
        assert!(
            buyers
                .let_go_below(id(1))
                .is_some_and(|below| below > id(2))
        );
        assert_eq!(
            buyers.let_go_below(id(9)),
            None,
            "all of that has left the window"
        );
        assert!(buyers.used() >= 1.0);
    }

    #[test]
    fn what_may_be_let_go_is_bounded_too_and_live_orders_stay_while_they_may_be_unpaid() {
        let (buyers, user) = (Buyers::new(4, 4), user("u"));
        let mut placed = 0;
        let refused = loop {
            let order = entry(placed + 1, 0, 1, 1);
            match buyers.claim(&user, order, None, Ok(()), &NothingSticky) {
                Ok(Claimed::Fresh(claim)) => claim.commit(),
                refused => break refused.unwrap_err(),
            }
            placed += 1;
        };
        assert_eq!((placed, refused), (8, Refusal::MemoryFull));
        let eviction = buyers.early_eviction(id(1), id(3), id(9));
        assert_eq!(buyers.evict(eviction, |_| false), 2);
    }

    #[test]
    fn an_early_eviction_takes_the_oldest_and_no_more_than_it_must() {
        let buyers = Buyers::new(1_000, 1_000);
        let place = |of: u64| {
            let (user, order) = (user(&format!("u{}", of % 100)), entry(of * 1_000, 0, 1, 1));
            commit(buyers.claim(&user, order, None, Ok(()), &NothingSticky));
        };
        (1..=900).for_each(place);
        assert!(!buyers.is_tight(), "nine tenths are not yet tight");
        (901..=1_000).for_each(place);
        assert!(buyers.is_tight());
        let (floor, now) = (id(1), id(1_000_001));
        let eviction = buyers.early_eviction(floor, now, now);
        let gone = buyers.evict(eviction, |_| false);
        // Of 256 parts of the window each has about four orders.
        assert!((200..=204).contains(&gone), "{gone}");
        let mut left = buyers.live_orders();
        left.sort_unstable();
        assert_eq!(left[0].get(), (gone as u64 + 1) * 1_000);
        assert_eq!(left.len(), 1_000 - gone);
        assert!(!buyers.is_tight());
    }

    /// A long record answers as many short ones do.
    #[test]
    fn a_long_record_answers_as_many_short_ones() {
        const ORDERS: u64 = 3_000;
        let key = |of: u64| {
            let mut key = [0; 16];
            key[..8].copy_from_slice(&(of / 2).to_be_bytes());
            key[15] = (of % 2) as u8 + 1;
            KeyHash(key)
        };
        let order = |of: u64| BuyerOrder {
            key: (!of.is_multiple_of(5)).then(|| key(of)),
            sku: SkuNumber((of % 3) as i32),
            ..entry(of, 0, of, of as u32 % 7 + 1)
        };
        let (long, short) = (Buyers::new(1 << 20, 1), Buyers::new(1 << 20, 1));
        let one = user("one");
        let each = |of: u64| user(&format!("u-{of}"));
        for of in 1..=ORDERS {
            let claimed = long.claim(&one, order(of), Some(u32::MAX), Ok(()), &NothingSticky);
            commit(claimed);
            short.restore(each(of), order(of), true);
        }
        for of in (1..=ORDERS).filter(|of| of % 4 == 0) {
            assert_eq!(long.deactivate(&one, id(of), Ended::Cancelled), Some(true));
            assert_eq!(long.deactivate(&one, id(of), Ended::Cancelled), Some(false));
            short.deactivate(&each(of), id(of), Ended::Cancelled);
        }
        for of in (1..=ORDERS).filter(|of| of % 11 == 0) {
            long.forget(&one, id(of));
            short.forget(&each(of), id(of));
        }
        let floor = ORDERS / 2;
        let limited = |sku: SkuNumber| sku.0 != 2;
        let evicted = long.evict(Eviction::before(id(floor)), limited);
        assert_eq!(evicted, short.evict(Eviction::before(id(floor)), limited));
        assert_eq!(long.len(), short.len());
        let mut units = [0; 3];
        for of in 1..=ORDERS {
            assert_eq!(
                long.find(&one, id(of)),
                short.find(&each(of), id(of)),
                "{of}"
            );
            let mut again = order(of);
            again.order_id = OrderId::MAX;
            assert_eq!(
                long.under_key(&one, &again),
                short.under_key(&each(of), &again),
                "{of}"
            );
            if let Some(known) = short.find(&each(of), id(of)).filter(BuyerOrder::is_live) {
                units[known.sku.0 as usize] += known.quantity.get();
            }
        }
        for (sku, units) in units.into_iter().enumerate() {
            let mut another = entry(ORDERS + 1, 0, 0, 1);
            another.sku = SkuNumber(sku as i32);
            let refused = long.claim(&one, another, Some(1), Ok(()), &NothingSticky);
            let expected = Refusal::PurchaseLimit {
                limit: 1,
                taken: units,
            };
            assert_eq!(refused.unwrap_err(), expected);
        }
        let page = long.page(&one, id(ORDERS - 10), 100);
        let ids: Vec<u64> = page.iter().map(|known| known.order_id.get()).collect();
        let expected: Vec<u64> = (1..ORDERS - 10)
            .rev()
            .filter(|of| of % 11 != 0)
            .take(100)
            .collect();
        assert_eq!(ids, expected);
        let ended = long.ended_orders();
        let mut ended: Vec<OrderId> = ended.into_iter().map(|(id, _)| id).collect();
        ended.sort_unstable();
        assert!(
            ended
                .iter()
                .all(|of| of.get() % 4 == 0 && of.get() >= floor)
        );
        // The record becomes short again, and then empty.
        long.evict(Eviction::before(id(ORDERS - 3)), |_| false);
        assert!(matches!(&*long.records.get(&one).unwrap(), Record::Few(few) if few.len() == 4));
        long.evict(Eviction::before(OrderId::MAX), |_| false);
        assert!(long.records.is_empty() && long.is_empty());
    }

    /// A linear scan would cost ten thousand times as much.
    #[test]
    fn a_buyer_with_100_000_orders_costs_about_as_much_as_one_with_ten() {
        const ROUNDS: u64 = 200;
        let buyers = Buyers::new(usize::MAX, 10);
        let (long, short) = (user("long"), user("short"));
        let key = |of: u64| {
            let mut key = [1; 16];
            key[..8].copy_from_slice(&of.to_be_bytes());
            Some(KeyHash(key))
        };
        let order = |of: u64| BuyerOrder {
            key: key(of),
            ..entry(of, 0, of, 1)
        };
        (1..=100_000).for_each(|of| buyers.restore(long.clone(), order(of), true));
        (1..=10).for_each(|of| buyers.restore(short.clone(), order(of), true));
        let work = |user: &UserId, of: u64, at: u64| {
            let started = std::time::Instant::now();
            commit(buyers.claim(user, order(of), Some(u32::MAX), Ok(()), &NothingSticky));
            let again = buyers.claim(user, order(at), None, Ok(()), &NothingSticky);
            assert!(matches!(again, Ok(Claimed::Duplicate(_))));
            assert_eq!(buyers.page(user, id(of), 5).len(), 5);
            assert!(buyers.deactivate(user, id(at), Ended::Cancelled).is_some());
            assert!(buyers.find(user, id(at)).is_some());
            buyers.forget(user, id(of));
            started.elapsed()
        };
        let (mut of_long, mut of_short) = (Vec::new(), Vec::new());
        for round in 0..ROUNDS {
            of_long.push(work(&long, 1_000_000 + round, round * 499 + 1));
            of_short.push(work(&short, 1_000_000 + round, round % 10 + 1));
        }
        let median = |mut times: Vec<std::time::Duration>| {
            times.sort_unstable();
            times[times.len() / 2]
        };
        let (of_long, of_short) = (median(of_long), median(of_short));
        assert!(of_long < of_short * 30, "{of_long:?} against {of_short:?}");
    }

    #[test]
    fn a_record_of_one_order_fits_a_cache_line() {
        assert_eq!(size_of::<Entry>(), 48);
        assert_eq!(size_of::<Record>(), 64);
    }
}
