//! The judge: what buyers and the payment platform were told, in plain maps, beside the rows of the database. It knows
//! nothing of Millrace's own state but what it compares at the end of each calm.

use std::collections::{BTreeMap, BTreeSet};

use millrace::order::{Order, OrderId, OrderStatus};
use millrace::state::State;

use super::postgres::tables::{self, Key, Row, View};
use super::process::{Answer, How};

/// What is promised may take this long in a calm, in milliseconds.
const SOON_MS: i64 = 15_000;
/// `expires_at` of an order without time to pay.
const NEVER_MS: i64 = 253_370_764_800_000;

/// What is known of an order from outside.
pub struct Placed {
    pub order: Order,
    pub receipt: Option<String>,
    /// It was acknowledged, or told to be a row.
    is_promised: bool,
    asked_to_cancel: bool,
    was_cancelled: bool,
    /// A payment in time, of the right amount, was stored.
    must_be_paid: bool,
}

/// The judge.
#[derive(Default)]
pub struct Judge {
    placed: BTreeMap<i64, Placed>,
    timed_out: BTreeSet<i64>,
    /// Payments that were answered with success, with their orders.
    stored: BTreeMap<String, i64>,
    /// Orders that were told to be dead letters; those that an operator wanted to retry, and has.
    told_failed: BTreeSet<i64>,
    asked_to_retry: BTreeSet<i64>,
    retried: BTreeSet<i64>,
    /// Paid orders that an operator gave up, and whether their units were to be sold again.
    given_up: BTreeMap<i64, bool>,
    /// Refunds that were recorded, with their orders.
    refunds: BTreeMap<String, i64>,
    /// Orders and payments whose rows a failover has changed.
    failed_over: BTreeSet<i64>,
    payments_failed_over: BTreeSet<String>,
    /// Some failover has lost something.
    has_lost: bool,
    /// The highest id of earlier processes, as its place among the ids of one clock.
    last_turn: u64,
    last_turn_before: u64,
    pub promised: u64,
}

type Verdict = Result<(), String>;

impl Judge {
    /// A new process runs.
    pub fn process_begins(&mut self) {
        self.last_turn_before = self.last_turn;
    }

    /// A buyer is told something.
    pub fn told(&mut self, answer: &Answer) -> Verdict {
        match answer {
            Answer::Order {
                order,
                receipt,
                how,
                is_new,
            } => {
                let turn = order.id.turn();
                if *is_new && turn <= self.last_turn_before {
                    return Err(format!("id {} is not above those of before", order.id));
                }
                self.last_turn = self.last_turn.max(turn);
                let known = self.placed.entry(order.id.as_i64()).or_insert(Placed {
                    order: (**order).clone(),
                    receipt: receipt.clone(),
                    is_promised: false,
                    asked_to_cancel: false,
                    was_cancelled: false,
                    must_be_paid: false,
                });
                if known.order != **order {
                    return Err(format!("order {} is told in two ways", order.id));
                }
                let promises = *how != How::Undecided;
                self.promised += u64::from(promises && !known.is_promised);
                known.is_promised |= promises;
                if promises && self.timed_out.contains(&order.id.as_i64()) {
                    return Err(format!("order {} timed out, and is promised", order.id));
                }
            }
            Answer::TimedOut(id) => {
                self.timed_out.insert(id.as_i64());
            }
            Answer::Stored(id, OrderStatus::Failed) => {
                self.told_failed.insert(id.as_i64());
            }
            Answer::Stored(..) | Answer::Refused(_) => {}
        }
        Ok(())
    }

    /// A known order.
    pub fn order(&self, id: i64) -> Option<&Placed> {
        self.placed.get(&id)
    }

    pub fn asked_to_cancel(&mut self, id: i64) {
        if let Some(order) = self.placed.get_mut(&id) {
            order.asked_to_cancel = true;
        }
    }

    pub fn was_cancelled(&mut self, id: i64) {
        if let Some(order) = self.placed.get_mut(&id) {
            order.was_cancelled = true;
        }
    }

    /// A payment was answered with success. `in_time`: it was made long before the deadline and fits.
    pub fn was_stored(&mut self, payment: &str, id: i64, in_time: bool) {
        self.stored.insert(payment.to_owned(), id);
        if let Some(order) = self.placed.get_mut(&id) {
            let is_lost = self.payments_failed_over.contains(payment);
            order.must_be_paid |= in_time && !order.asked_to_cancel && !is_lost;
        }
    }

    pub fn asked_to_retry(&mut self, id: i64) {
        self.asked_to_retry.insert(id);
    }

    pub fn was_retried(&mut self, id: i64) {
        self.retried.insert(id);
    }

    /// An operator wants the money of a paid order to go back.
    pub fn gives_up(&mut self, id: i64, restock: bool) {
        self.given_up.insert(id, restock);
    }

    pub fn is_given_up(&self, id: i64) -> bool {
        self.given_up.contains_key(&id)
    }

    pub fn was_refunded(&mut self, id: i64, reference: &str) {
        self.refunds.insert(reference.to_owned(), id);
    }

    /// A failover has changed these rows.
    pub fn failed_over(&mut self, changed: &BTreeSet<Key>) {
        self.has_lost |= !changed.is_empty();
        for key in changed {
            match key {
                Key::Order(id) | Key::DeadLetter(id) | Key::Parked(id) => {
                    self.failed_over.insert(*id);
                }
                Key::PaymentId(_, name) => {
                    self.payments_failed_over.insert(name.clone());
                    let order = self.stored.get(name);
                    if let Some(order) = order.and_then(|id| self.placed.get_mut(id)) {
                        order.must_be_paid = false;
                    }
                }
                _ => {}
            }
        }
    }

    /// What holds between any two commits.
    pub fn look(&self, rows: &View<'_>) -> Verdict {
        let mut counted: BTreeMap<i32, (i64, i64)> = BTreeMap::new();
        let mut parked: BTreeMap<i32, i64> = BTreeMap::new();
        let (mut ids, mut keys) = (BTreeSet::new(), BTreeSet::new());
        let mut live: BTreeMap<(i32, &str), i64> = BTreeMap::new();
        for (id, place, order) in everywhere(rows) {
            let counters = counted.entry(order.sku).or_default();
            let units = i64::from(order.quantity);
            match (place, order.status) {
                (Place::Row, Some(1)) => counters.0 += units,
                (Place::Row, Some(2)) => counters.1 += units,
                (Place::Parked, _) => *parked.entry(order.sku).or_default() += units,
                _ => {}
            }
            let is_live = match place {
                Place::Row => matches!(order.status, Some(1 | 2 | 7)),
                Place::Parked => true,
                Place::DeadLetter => false,
            };
            // An operator may give a buyer more than the limit.
            if is_live && !self.asked_to_retry.contains(&id) {
                *live.entry((order.sku, &order.user)).or_default() += units;
            }
            if !ids.insert(id) {
                return Err(format!("order {id} is in two tables"));
            }
            if let Some(key) = &order.key
                && !keys.insert((&order.user, key))
            {
                return Err(format!("order {id} has the key of another"));
            }
            if self.timed_out.contains(&id) {
                return Err(format!("order {id} timed out, and is there: {place:?}"));
            }
        }
        for (id, sku) in rows.skus() {
            let (held, sold) = counted.get(&id).copied().unwrap_or_default();
            if (held, sold) != (sku.held, sku.sold) {
                return Err(format!(
                    "sku {}: its orders hold {held} and have {sold}, its row says {} and {}",
                    sku.name, sku.held, sku.sold
                ));
            }
            if held + sold > sku.total {
                return Err(format!("sku {} is oversold", sku.name));
            }
            let parked = parked.get(&id).copied().unwrap_or(0);
            if held + sold + parked > sku.total + sku.taken_off && !self.has_lost {
                return Err(format!("sku {} is oversold by {parked} parked", sku.name));
            }
            if let Some(limit) = sku.limit {
                let most = live.iter().filter(|((of, _), _)| *of == id);
                if let Some(((_, user), units)) = most.max_by_key(|(_, units)| **units)
                    && *units > limit
                {
                    return Err(format!("{user} has {units} of {}, limit {limit}", sku.name));
                }
            }
        }
        Ok(())
    }

    /// What holds once nothing is on its way. `now_ms`: the wall clock of the process. `kept`: the one SKU whose
    /// counters are refused.
    pub fn calm(
        &self,
        rows: &View<'_>,
        state: &State,
        now_ms: i64,
        kept: Option<i32>,
        has_refused: impl Fn(i64) -> bool,
    ) -> Verdict {
        self.look(rows)?;
        self.promises(rows, now_ms)?;
        self.aside(rows, now_ms, kept, has_refused)?;
        self.money(rows)?;
        self.refunds(rows)?;
        self.lists(rows, kept)?;
        memory(rows, state, |sku| Some(sku) == kept)
    }

    /// Whether a failover has lost anything.
    pub fn has_lost(&self) -> bool {
        self.has_lost
    }

    /// Orders are parked or dead letters only for a reason.
    fn aside(
        &self,
        rows: &View<'_>,
        now_ms: i64,
        kept: Option<i32>,
        has_refused: impl Fn(i64) -> bool,
    ) -> Verdict {
        for (id, place, order) in everywhere(rows) {
            let is_paid = || !rows.payments(|_, one| one.order == Some(id)).is_empty();
            if place == Place::Parked && Some(order.sku) != kept {
                return Err(format!("order {id} is parked still"));
            }
            if place == Place::Parked && order.expires_ms < now_ms - SOON_MS && !is_paid() {
                return Err(format!("order {id} should have expired, and is parked"));
            }
            if place == Place::DeadLetter && !has_refused(id) && !self.failed_over.contains(&id) {
                return Err(format!(
                    "order {id} is a dead letter, and nobody has refused it"
                ));
            }
        }
        let mut failed = self
            .told_failed
            .iter()
            .filter(|id| !self.failed_over.contains(id));
        let is_retried = |id: &i64| self.asked_to_retry.contains(id);
        if let Some(id) = failed.find(|id| !rows.has(&Key::DeadLetter(**id)) && !is_retried(id)) {
            return Err(format!("order {id} was told to have failed, and has not"));
        }
        let mut retried = self
            .retried
            .iter()
            .filter(|id| !self.failed_over.contains(id));
        match retried.find(|id| !rows.has(&Key::Order(**id))) {
            None => Ok(()),
            Some(id) => Err(format!("order {id} was retried, and is no row")),
        }
    }

    /// Every recorded refund is there, and units left the sale with none but those that were to.
    fn refunds(&self, rows: &View<'_>) -> Verdict {
        let recorded = rows.payments(|_, one| one.state == "refunded");
        let is_there = |reference: &str, order: i64| {
            let mut recorded = recorded.iter().map(|(_, one)| one);
            recorded
                .any(|one| one.reference.as_deref() == Some(reference) && one.order == Some(order))
        };
        let mut refunds = self.refunds.iter();
        if self.has_lost {
            return Ok(());
        }
        let lost = refunds.find(|(reference, order)| !is_there(reference, **order));
        if let Some((reference, order)) = lost {
            return Err(format!("{reference} of order {order} is lost"));
        }
        let at_first = super::shop::skus();
        for (number, sku) in rows.skus() {
            let is_withdrawn = |(id, order): &(i64, &tables::Order)| {
                let is_refunded = order.status == Some(6) && order.reason.is_none();
                order.sku == number && is_refunded && self.given_up.get(id) == Some(&false)
            };
            let withdrawn = orders(rows).filter(is_withdrawn);
            let withdrawn: i64 = withdrawn.map(|(_, order)| i64::from(order.quantity)).sum();
            let before = at_first[number as usize - 1].total;
            if sku.total + sku.taken_off != before - withdrawn {
                return Err(format!(
                    "sku {} had {before} units, {withdrawn} were taken out, and it has {} and {} that were edited",
                    sku.name, sku.total, sku.taken_off
                ));
            }
        }
        Ok(())
    }

    /// Every promised order is there, and stands as it was told.
    fn promises(&self, rows: &View<'_>, now_ms: i64) -> Verdict {
        for (id, placed) in &self.placed {
            if self.failed_over.contains(id) {
                continue;
            }
            let key = Key::Order(*id);
            let Some(order) = rows.order(&key) else {
                let is_aside = rows.has(&Key::DeadLetter(*id)) || rows.has(&Key::Parked(*id));
                if placed.is_promised && !is_aside {
                    return Err(format!("order {id} was promised and is lost"));
                }
                if placed.was_cancelled && rows.has(&Key::Parked(*id)) {
                    return Err(format!("order {id} was cancelled and is parked"));
                }
                continue;
            };
            let same = order.user == placed.order.user_id.as_str()
                && order.quantity == placed.order.quantity.get() as i32
                && order.amount == placed.order.amount;
            if !same {
                return Err(format!("order {id} was changed"));
            }
            if placed.was_cancelled && matches!(order.status, Some(1 | 2 | 4 | 7)) {
                return Err(format!(
                    "order {id} was cancelled and is {:?}",
                    order.status
                ));
            }
            let is_cancelled = placed.asked_to_cancel && matches!(order.status, Some(3 | 5));
            let is_given_up = self.is_given_up(*id) && order.status == Some(6);
            if placed.must_be_paid && order.status != Some(2) && !is_cancelled && !is_given_up {
                return Err(format!(
                    "order {id} was paid in time and is {:?}",
                    order.status
                ));
            }
        }
        for (id, order) in orders(rows) {
            if order.status == Some(1) && order.expires_ms < now_ms - SOON_MS {
                return Err(format!(
                    "order {id} should have expired at {}",
                    order.expires_ms
                ));
            }
        }
        Ok(())
    }

    /// Every payment is there once, in one state, and fits its order.
    fn money(&self, rows: &View<'_>) -> Verdict {
        let mut matched: BTreeMap<i64, u32> = BTreeMap::new();
        let mut names = BTreeSet::new();
        for (id, payment) in rows.payments(|_, _| true) {
            if !names.insert(payment.payment_id.clone()) {
                return Err(format!("payment {} is there twice", payment.payment_id));
            }
            match payment.state.as_str() {
                "matched" => {
                    let order = payment.order.ok_or("a matched payment without an order")?;
                    *matched.entry(order).or_default() += 1;
                }
                // It waits for its order.
                "orphan" if payment.order.is_some_and(|id| rows.has(&Key::Parked(id))) => {}
                "orphan" => return Err(format!("payment {id} is an orphan still")),
                "refund_due" if payment.reason.is_none() => {
                    return Err(format!("payment {id} is refunded for no reason"));
                }
                _ => {}
            }
        }
        let lost = self
            .stored
            .keys()
            .find(|name| !names.contains(*name) && !self.payments_failed_over.contains(*name));
        if let Some(name) = lost {
            return Err(format!("payment {name} was stored and is lost"));
        }
        for (id, order) in orders(rows) {
            let payments = matched.remove(&id).unwrap_or(0);
            if payments != u32::from(order.status == Some(2)) {
                return Err(format!(
                    "order {id} is {:?} and has {payments} payments",
                    order.status
                ));
            }
        }
        match matched.first_key_value() {
            None => Ok(()),
            Some((id, _)) => Err(format!("a payment is matched to order {id}, which is lost")),
        }
    }

    /// Nobody waits while units are free, and nobody was served before somebody ahead.
    fn lists(&self, rows: &View<'_>, kept: Option<i32>) -> Verdict {
        let skus = rows.skus().into_iter();
        for (number, sku) in skus.filter(|(number, _)| Some(*number) != kept) {
            let of_sku = orders(rows).filter(|(_, order)| order.sku == number);
            let mut waiting: Vec<_> = of_sku
                .filter(|(_, order)| order.status == Some(7))
                .collect();
            waiting.sort_by_key(|(id, _)| turn(*id));
            let free = sku.total - sku.held - sku.sold;
            let is_next = |order: &tables::Order| i64::from(order.quantity) <= free;
            let next = match sku.skips {
                true => waiting.iter().find(|(_, order)| is_next(order)),
                false => waiting.first().filter(|(_, order)| is_next(order)),
            };
            if let Some((id, _)) = next {
                return Err(format!(
                    "order {id} waits, and {free} units of {} are free",
                    sku.name
                ));
            }
            let Some((first, _)) = waiting.first().filter(|_| !sku.skips) else {
                continue;
            };
            let before = orders(rows).find(|(id, order)| {
                let is_behind = order.sku == number && turn(*id) > turn(*first);
                is_behind && order.assigned_ms.is_some() && !self.failed_over.contains(id)
            });
            if let Some((id, _)) = before.filter(|_| !self.failed_over.contains(first)) {
                return Err(format!("order {id} was served before {first}, which waits"));
            }
        }
        Ok(())
    }
}

/// Counters and records in memory are those of the rows, parked orders hold units. `is_refused`: of this SKU the total is
/// not.
pub fn memory(rows: &View<'_>, state: &State, is_refused: impl Fn(i32) -> bool) -> Verdict {
    let mut parked: BTreeMap<i32, i64> = BTreeMap::new();
    for (_, _, order) in everywhere(rows).filter(|(_, place, _)| *place == Place::Parked) {
        *parked.entry(order.sku).or_default() += i64::from(order.quantity);
    }
    for (number, sku) in rows.skus() {
        let known = state
            .catalogue
            .by_number(millrace::order::SkuNumber(number));
        let known = known.ok_or("a SKU is not in memory")?;
        let stock = known.counter().snapshot();
        let kept_units = i64::from(known.counter().kept());
        let [total, free, held, sold] =
            [stock.total, stock.free, stock.held, stock.sold].map(i64::from);
        if total != free + held + sold {
            return Err(format!("sku {}: {stock:?} do not add up", sku.name));
        }
        let is_refused = is_refused(number);
        if known.is_faulted() && !is_refused {
            return Err(format!("sku {}: its counters are refused still", sku.name));
        }
        let parked = parked.get(&number).copied().unwrap_or(0);
        let has_total = total == sku.total || is_refused;
        if !has_total || (held - kept_units, sold) != (sku.held + parked, sku.sold) {
            return Err(format!(
                "sku {}: memory has {stock:?} with {kept_units} kept, {parked} are parked, the row {sku:?}",
                sku.name
            ));
        }
        let waiting = orders(rows)
            .filter(|(_, order)| order.sku == number && order.status == Some(7))
            .count();
        if known.waitlist().len() != waiting {
            let listed = known.waitlist().len();
            return Err(format!(
                "sku {}: {listed} are listed, {waiting} wait",
                sku.name
            ));
        }
    }
    for (id, place, order) in everywhere(rows) {
        let (Ok(user), Some(order_id)) = (
            millrace::order::UserId::new(&order.user),
            OrderId::from_i64(id),
        ) else {
            return Err(format!("order {id} has an impossible buyer"));
        };
        let is_live = match place {
            Place::Row => matches!(order.status, Some(1 | 2 | 7)),
            Place::Parked => true,
            Place::DeadLetter => false,
        };
        let known = state.buyers.find(&user, order_id);
        if known.map(|known| known.is_live()) != Some(is_live) {
            return Err(format!(
                "order {id} is {place:?} {:?}, its buyer's record {known:?}",
                order.status
            ));
        }
    }
    Ok(())
}

/// The table that an order is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Row,
    Parked,
    DeadLetter,
}

/// Every order, with its table.
fn everywhere<'a>(rows: &View<'a>) -> impl Iterator<Item = (i64, Place, &'a tables::Order)> {
    let all = rows.committed.range(Key::Order(i64::MIN)..);
    all.map_while(|(key, row)| match (key, &**row) {
        (Key::Order(id), Row::Order(order)) => Some((*id, Place::Row, order)),
        (Key::Parked(id), Row::Parked(order)) => Some((*id, Place::Parked, order)),
        (Key::DeadLetter(id), Row::DeadLetter(letter)) => {
            Some((*id, Place::DeadLetter, &letter.order))
        }
        _ => None,
    })
}

/// Every order that is a row.
fn orders<'a>(rows: &View<'a>) -> impl Iterator<Item = (i64, &'a tables::Order)> {
    let all = rows
        .committed
        .range(Key::Order(i64::MIN)..=Key::Order(i64::MAX));
    all.filter_map(|(key, row)| match (key, &**row) {
        (Key::Order(id), Row::Order(order)) => Some((*id, order)),
        _ => None,
    })
}

/// The place of an order in a line.
fn turn(id: i64) -> u64 {
    OrderId::from_i64(id).map_or(0, OrderId::turn)
}

/// Whether an order of this expiry ever had time to pay.
pub fn has_time(expires_ms: i64) -> bool {
    expires_ms < NEVER_MS
}
