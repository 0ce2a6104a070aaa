//! One buyer's record: few orders side by side, or many with an index.
//!
//! Most buyers have one or two orders, which lie in the map itself and are searched linearly. A record
//! of more than [`FEW`] orders is ordered by id, with an index of its keys and a sum of its units, so
//! that a buyer with 100,000 orders delays the others behind the same lock no more than one with 30.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;

use smallvec::SmallVec;

use super::BuyerOrder;
use crate::order::{Ended, KeyHash, OrderId, PayloadHash, Quantity, SkuNumber};

/// Most orders of a record that is searched linearly.
pub(super) const FEW: usize = 32;
/// Most orders of one record that an eviction checks under one lock of its shard.
pub(super) const STEP: usize = 1_000;

/// A live order, reduced to the data that a purchase limit needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LiveOrder {
    /// Id of the order.
    pub order_id: OrderId,
    /// The SKU that was bought.
    pub sku: SkuNumber,
    /// Units, at least 1.
    pub quantity: Quantity,
}

impl LiveOrder {
    /// The live part of an entry.
    pub fn of(order: &BuyerOrder) -> Self {
        LiveOrder {
            order_id: order.order_id,
            sku: order.sku,
            quantity: order.quantity,
        }
    }
}

/// One order of a record. 48 bytes, so that a record of one order fits a cache line.
#[derive(Clone, Copy, Debug)]
pub(super) struct Entry {
    order_id: OrderId,
    key: Option<KeyHash>,
    payload: PayloadHash,
    sku: SkuNumber,
    quantity: Quantity,
    ended: Option<Ended>,
    /// Left the window; kept only for its units.
    aged: bool,
    /// Whether its SKU had a limit when the order was entered.
    limited: bool,
}

impl Entry {
    pub(super) fn new(order: BuyerOrder, limited: bool) -> Self {
        let BuyerOrder {
            order_id,
            key,
            payload,
            sku,
            quantity,
            ended,
        } = order;
        Entry {
            order_id,
            key,
            payload,
            sku,
            quantity,
            ended,
            aged: false,
            limited,
        }
    }

    fn aged(order: LiveOrder) -> Self {
        Entry {
            order_id: order.order_id,
            key: None,
            payload: PayloadHash(0),
            sku: order.sku,
            quantity: order.quantity,
            ended: None,
            aged: true,
            limited: true,
        }
    }

    fn to_order(self) -> BuyerOrder {
        BuyerOrder {
            order_id: self.order_id,
            key: self.key,
            payload: self.payload,
            sku: self.sku,
            quantity: self.quantity,
            ended: self.ended,
        }
    }

    /// Whether neither a retry nor a limit needs it.
    fn is_dispensable(&self) -> bool {
        self.key.is_none() && !(self.is_live() && self.limited)
    }

    fn is_live(&self) -> bool {
        self.ended.is_none()
    }

    fn units(&self) -> u32 {
        if self.is_live() {
            self.quantity.get()
        } else {
            0
        }
    }
}

/// A change of the counts over all records.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct CountDelta {
    pub(super) remembered: isize,
    pub(super) dispensable: isize,
}

impl CountDelta {
    pub(super) fn enter(&mut self, entry: &Entry) {
        self.remembered += 1;
        self.dispensable += isize::from(entry.is_dispensable());
    }

    fn leave(&mut self, entry: &Entry) {
        self.remembered -= 1;
        self.dispensable -= isize::from(entry.is_dispensable());
    }
}

/// The bounds of an eviction, and the SKUs whose live orders are kept.
pub(super) struct Rule<'a> {
    /// Every order below has left the window.
    pub(super) floor: OrderId,
    /// Dispensable orders below this go; `floor` or above.
    pub(super) early: OrderId,
    /// Live ones of them go only below this.
    pub(super) payable: OrderId,
    /// Whether the live orders of a SKU are kept for its limit. Asking has an effect: a SKU that it
    /// denies is noted as incomplete.
    pub(super) keeps: &'a dyn Fn(SkuNumber) -> bool,
}

/// The effect of an eviction on one order.
enum Action {
    Keep,
    /// Keep only its units.
    Age,
    Remove,
}

impl Rule<'_> {
    fn action(&self, entry: &Entry) -> Action {
        let is_needed = || entry.is_live() && (self.keeps)(entry.sku);
        if entry.aged {
            return if is_needed() {
                Action::Keep
            } else {
                Action::Remove
            };
        }
        if entry.order_id < self.floor {
            return if is_needed() {
                Action::Age
            } else {
                Action::Remove
            };
        }
        let may_go = entry.key.is_none()
            && entry.order_id < self.early
            && !(entry.is_live() && entry.order_id >= self.payable);
        if may_go && !is_needed() {
            return Action::Remove;
        }
        Action::Keep
    }
}

/// One buyer's orders.
#[derive(Debug)]
pub(super) enum Record {
    Few(SmallVec<[Entry; 1]>),
    Many(Box<Many>),
}

impl Default for Record {
    fn default() -> Self {
        Record::Few(SmallVec::new())
    }
}

impl Record {
    pub(super) fn is_empty(&self) -> bool {
        match self {
            Record::Few(few) => few.is_empty(),
            Record::Many(many) => many.window.is_empty() && many.aged.is_empty(),
        }
    }

    /// The order under a key, and the hash of its body.
    pub(super) fn under(&self, key: KeyHash) -> Option<(OrderId, PayloadHash)> {
        // An order recovered from a receipt may have short hashes only.
        let is_under = |entry: &&Entry| entry.key.is_some_and(|known| known.matches(key));
        let found = match self {
            Record::Few(few) => few.iter().find(is_under),
            Record::Many(many) => many.of_key(key).find(is_under),
        };
        found.map(|entry| (entry.order_id, entry.payload))
    }

    /// Units of the live orders of a SKU.
    pub(super) fn units_of(&self, sku: SkuNumber) -> u32 {
        match self {
            Record::Few(few) => few
                .iter()
                .filter(|entry| entry.sku == sku)
                .map(Entry::units)
                .fold(0, u32::saturating_add),
            Record::Many(many) => many.units.get(&sku).map_or(0, |units| {
                u32::try_from(units.of_live_orders).unwrap_or(u32::MAX)
            }),
        }
    }

    pub(super) fn get(&self, id: OrderId) -> Option<BuyerOrder> {
        match self {
            Record::Few(few) => {
                let found = few.iter().find(|entry| entry.order_id == id);
                found.copied().map(Entry::to_order)
            }
            Record::Many(many) => many.get(id).map(|entry| entry.to_order()),
        }
    }

    /// Orders of the window below `before`, the newest first, at most `count`.
    pub(super) fn page(&self, before: OrderId, count: usize) -> Vec<BuyerOrder> {
        match self {
            Record::Few(few) => {
                let below = |entry: &&Entry| !entry.aged && entry.order_id < before;
                let mut page: Vec<_> = few
                    .iter()
                    .filter(below)
                    .copied()
                    .map(Entry::to_order)
                    .collect();
                page.sort_unstable_by_key(|entry| std::cmp::Reverse(entry.order_id));
                page.truncate(count);
                page
            }
            Record::Many(many) => many
                .window
                .range(..before)
                .rev()
                .take(count)
                .map(|(_, entry)| entry.to_order())
                .collect(),
        }
    }

    pub(super) fn ended(&self, ended: &mut Vec<(OrderId, Ended)>) {
        let mut note = |entry: &Entry| ended.extend(entry.ended.map(|how| (entry.order_id, how)));
        match self {
            Record::Few(few) => few.iter().for_each(&mut note),
            Record::Many(many) => many.window.values().for_each(&mut note),
        }
    }

    /// Appends the live orders of the window. Rows of older orders may have been deleted.
    pub(super) fn live(&self, live: &mut Vec<OrderId>) {
        let mut note = |entry: &Entry| {
            if entry.is_live() && !entry.aged {
                live.push(entry.order_id);
            }
        };
        match self {
            Record::Few(few) => few.iter().for_each(&mut note),
            Record::Many(many) => many.window.values().for_each(&mut note),
        }
    }

    /// Calls `each` for every order that may go early: its id, and whether it is live.
    pub(super) fn dispensable(&self, mut each: impl FnMut(OrderId, bool)) {
        let mut note = |entry: &Entry| {
            if entry.is_dispensable() {
                each(entry.order_id, entry.is_live());
            }
        };
        match self {
            Record::Few(few) => few.iter().for_each(&mut note),
            Record::Many(many) => many.window.values().for_each(&mut note),
        }
    }

    pub(super) fn insert(&mut self, entry: Entry) {
        match self {
            Record::Few(few) if few.len() < FEW => few.push(entry),
            Record::Few(few) => {
                let mut many = Many::default();
                few.drain(..).for_each(|entry| many.insert(entry));
                many.insert(entry);
                *self = Record::Many(Box::new(many));
            }
            Record::Many(many) => many.insert(entry),
        }
    }

    /// Enters a live order only for its units, unless it is there. True: it was not.
    pub(super) fn insert_live(&mut self, order: LiveOrder) -> bool {
        let is_new = self.get(order.order_id).is_none();
        if is_new {
            self.insert(Entry::aged(order));
        }
        is_new
    }

    pub(super) fn remove(&mut self, id: OrderId) -> CountDelta {
        let removed = match self {
            Record::Few(few) => {
                let at = few.iter().position(|entry| entry.order_id == id);
                at.map(|at| few.remove(at))
            }
            Record::Many(many) => many.remove(id),
        };
        let mut delta = CountDelta::default();
        removed.iter().for_each(|entry| delta.leave(entry));
        delta
    }

    /// The change of the counts if all of its orders leave.
    pub(super) fn departure(&self) -> CountDelta {
        let mut delta = CountDelta::default();
        match self {
            Record::Few(few) => few.iter().for_each(|entry| delta.leave(entry)),
            Record::Many(many) => many.all().for_each(|entry| delta.leave(&entry)),
        }
        delta
    }

    /// Sets the end of an order, or (`None`) that its units count again. `Some(true)`: this has
    /// changed whether they count. An order that had ended keeps its end. An order that stays only
    /// for its units goes when they no longer count.
    pub(super) fn set_ended(
        &mut self,
        id: OrderId,
        ended: Option<Ended>,
    ) -> (Option<bool>, CountDelta) {
        let live = ended.is_none();
        let mut delta = CountDelta::default();
        let turn = |entry: &mut Entry, delta: &mut CountDelta| {
            let turned = entry.is_live() != live;
            if turned {
                delta.leave(entry);
                entry.ended = ended;
                delta.enter(entry);
            }
            turned
        };
        let turned = match self {
            Record::Few(few) => few
                .iter_mut()
                .find(|entry| entry.order_id == id && (live || !entry.aged))
                .map(|entry| turn(entry, &mut delta)),
            Record::Many(many) => many.window.get_mut(&id).map(|entry| {
                let before = entry.units();
                let turned = turn(entry, &mut delta);
                let (sku, after) = (entry.sku, entry.units());
                many.units.entry(sku).or_default().change(before, after);
                turned
            }),
        };
        if turned.is_some() || live {
            return (turned, delta);
        }
        let delta = self.remove(id);
        ((delta.remembered != 0).then_some(true), delta)
    }

    /// Applies `rule` to the orders from `from` on. A long record takes several calls: returns the
    /// id to continue from, if there is more.
    pub(super) fn evict(
        &mut self,
        from: OrderId,
        rule: &Rule<'_>,
    ) -> (CountDelta, Option<OrderId>) {
        let mut delta = CountDelta::default();
        let next = match self {
            Record::Few(few) => {
                few.retain(|entry| {
                    delta.leave(entry);
                    match rule.action(entry) {
                        Action::Remove => return false,
                        Action::Age => *entry = Entry::aged(LiveOrder::of(&entry.to_order())),
                        Action::Keep => {}
                    }
                    delta.enter(entry);
                    true
                });
                None
            }
            Record::Many(many) => {
                let next = many.evict(from, rule, &mut delta);
                if next.is_none() && many.len() <= FEW / 2 {
                    *self = Record::Few(many.all().collect());
                }
                next
            }
        };
        (delta, next)
    }
}

/// Units of one SKU in a long record.
#[derive(Clone, Copy, Debug, Default)]
struct Units {
    /// 64 bits, because only the limit bounds them.
    of_live_orders: u64,
    aged_orders: usize,
}

impl Units {
    fn change(&mut self, before: u32, after: u32) {
        self.of_live_orders += u64::from(after);
        self.of_live_orders -= u64::from(before);
    }
}

/// The orders of a buyer with many.
#[derive(Debug, Default)]
pub(super) struct Many {
    window: BTreeMap<OrderId, Entry>,
    /// Orders that stay only for their units: 16 bytes each, beside the tree's own.
    aged: BTreeMap<OrderId, (SkuNumber, Quantity)>,
    /// The first 8 bytes of each key, as short hashes have no more, and its order.
    keys: BTreeSet<(u64, OrderId)>,
    units: BTreeMap<SkuNumber, Units>,
}

fn first_half(key: KeyHash) -> u64 {
    (u128::from_be_bytes(key.0) >> 64) as u64
}

impl Many {
    fn len(&self) -> usize {
        self.window.len() + self.aged.len()
    }

    fn of_key(&self, key: KeyHash) -> impl Iterator<Item = &Entry> {
        let half = first_half(key);
        let from = Bound::Excluded((half.wrapping_sub(1), OrderId::MAX));
        let from = if half == 0 { Bound::Unbounded } else { from };
        let ids = self
            .keys
            .range((from, Bound::Included((half, OrderId::MAX))));
        ids.filter_map(|(_, id)| self.window.get(id))
    }

    fn aged_entry((order_id, (sku, quantity)): (&OrderId, &(SkuNumber, Quantity))) -> Entry {
        Entry::aged(LiveOrder {
            order_id: *order_id,
            sku: *sku,
            quantity: *quantity,
        })
    }

    fn get(&self, id: OrderId) -> Option<Entry> {
        let of_window = self.window.get(&id).copied();
        of_window.or_else(|| Some(Many::aged_entry((&id, self.aged.get(&id)?))))
    }

    fn all(&self) -> impl Iterator<Item = Entry> {
        let aged = self.aged.iter().map(Many::aged_entry);
        aged.chain(self.window.values().copied())
    }

    fn insert(&mut self, entry: Entry) {
        let units = self.units.entry(entry.sku).or_default();
        units.change(0, entry.units());
        if entry.aged {
            units.aged_orders += 1;
            self.aged
                .insert(entry.order_id, (entry.sku, entry.quantity));
            return;
        }
        if let Some(key) = entry.key {
            self.keys.insert((first_half(key), entry.order_id));
        }
        self.window.insert(entry.order_id, entry);
    }

    fn remove(&mut self, id: OrderId) -> Option<Entry> {
        let entry = self.get(id)?;
        if entry.aged {
            self.aged.remove(&id);
        } else {
            self.window.remove(&id);
        }
        if let Some(key) = entry.key {
            self.keys.remove(&(first_half(key), id));
        }
        if let Some(units) = self.units.get_mut(&entry.sku) {
            units.change(entry.units(), 0);
            units.aged_orders -= usize::from(entry.aged);
        }
        Some(entry)
    }

    fn evict(&mut self, from: OrderId, rule: &Rule<'_>, delta: &mut CountDelta) -> Option<OrderId> {
        let aged_of = self.units.iter().filter(|(_, units)| units.aged_orders > 0);
        let unlimited: Vec<SkuNumber> = aged_of
            .map(|(sku, _)| *sku)
            .filter(|sku| !(rule.keeps)(*sku))
            .collect();
        if !unlimited.is_empty() {
            // Once, after a limit was removed.
            let of_them = self
                .aged
                .iter()
                .filter(|(_, aged)| unlimited.contains(&aged.0));
            let gone: Vec<OrderId> = of_them.map(|(id, _)| *id).collect();
            for id in gone {
                self.remove(id).iter().for_each(|entry| delta.leave(entry));
            }
        }
        let looked_at: Vec<Entry> = self
            .window
            .range(from..rule.early.max(rule.floor))
            .take(STEP)
            .map(|(_, entry)| *entry)
            .collect();
        for entry in &looked_at {
            let action = rule.action(entry);
            if matches!(action, Action::Keep) {
                continue;
            }
            delta.leave(entry);
            self.remove(entry.order_id);
            if matches!(action, Action::Age) {
                let aged = Entry::aged(LiveOrder::of(&entry.to_order()));
                delta.enter(&aged);
                self.insert(aged);
            }
        }
        self.units
            .retain(|_, units| units.of_live_orders > 0 || units.aged_orders > 0);
        let last = looked_at.last().filter(|_| looked_at.len() == STEP)?;
        OrderId::new(last.order_id.get() + 1)
    }
}
