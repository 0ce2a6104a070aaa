//! Random lives of orders and payments on a real PostgreSQL, beside a model that is obviously
//! right. After each event the rows, the counters of the database and those in memory are what
//! the model says. Every second life is that of a node among several, whose units are its share.
//!
//! A life goes wrong by its seed: `MILLRACE_SEED=<seed> cargo test --test proof -- settlement 1`
//! runs that one alone, and the seed then joins `PAST_SEEDS`.

use std::time::Instant;

use futures_util::future::try_join3;
use millrace::order::payment::{Delivery, Notice, Payment, PaymentState, Provider, RefundReason};
use millrace::order::{Currency, IdRange, Order, OrderId, OrderStatus, UnixMillis};
use millrace::state::stock::{Sku, StockSnapshot};
use millrace::store::Ledger;
use millrace::store::batch::BatchWriter;
use millrace::store::cluster::shares;
use millrace::store::postgres::{self, transitions};
use millrace::store::settlement::payments::{self, Arrival};
use millrace::store::settlement::refunds::{self, Closed, Recorded, RefundNote};
use millrace::store::settlement::{Destination, SettlementWriter, UnitMove, expiry};
use rand::rngs::StdRng;
use rand::seq::IndexedRandom as _;
use rand::{Rng as _, SeedableRng as _};

use super::outcome::{Why, block_on, seed};
use crate::support::sale::{Sale, order};

/// Seeds of lives that once went wrong; they are run first, every time.
const PAST_SEEDS: &[u64] = &[];
const EVENTS: usize = 40;
const TTL_MS: i64 = 1_000;
/// The time that the lives are in: so far ahead that the database's own clock finds nothing due.
const LATER_MS: u64 = 10 * 365 * 86_400_000;

// --- The model -------------------------------------------------------------------------------

/// The place of an order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// Admitted, on its way to the database.
    InFlight,
    /// A row, or a dead letter.
    There(OrderStatus),
    /// Lost.
    Gone,
}

#[derive(Clone, Debug)]
struct ModelOrder {
    order: Order,
    place: Place,
    reason: Option<RefundReason>,
    /// Under which references its money went back.
    references: Vec<u32>,
}

impl ModelOrder {
    fn units(&self) -> u32 {
        self.order.quantity.get()
    }

    fn is_there(&self) -> bool {
        matches!(self.place, Place::There(_))
    }
}

#[derive(Clone, Debug)]
struct ModelPayment {
    paid: Payment,
    /// Which of the orders it is for.
    of: Option<usize>,
    /// When it counts as made.
    paid_at: UnixMillis,
    state: PaymentState,
    reason: Option<RefundReason>,
}

#[derive(Debug)]
struct Model {
    total: u32,
    orders: Vec<ModelOrder>,
    payments: Vec<ModelPayment>,
}

impl Model {
    fn units(&self, place: Place) -> u32 {
        let there = self.orders.iter().filter(|order| order.place == place);
        there.map(ModelOrder::units).sum()
    }

    fn held(&self) -> u32 {
        self.units(Place::There(OrderStatus::PendingPayment))
    }

    fn sold(&self) -> u32 {
        self.units(Place::There(OrderStatus::Paid))
    }

    fn free(&self) -> u32 {
        self.total - self.held() - self.sold() - self.units(Place::InFlight)
    }

    fn has_orphan(&self) -> bool {
        let mut payments = self.payments.iter();
        payments.any(|one| one.state == PaymentState::Orphan)
    }

    fn is_paid_in_time(&self, at: usize) -> bool {
        let until = self.orders[at].order.expires_at;
        let waits = |one: &&ModelPayment| one.of == Some(at) && one.state == PaymentState::Orphan;
        let mut waiting = self.payments.iter().filter(waits);
        waiting.any(|one| one.paid_at < until)
    }

    /// Those of the orphans meet their orders, as they came.
    fn meet_all(&mut self, wanted: impl Fn(&ModelPayment) -> bool) {
        for at in 0..self.payments.len() {
            let payment = &self.payments[at];
            if payment.state == PaymentState::Orphan && wanted(payment) {
                self.match_orders(at);
            }
        }
    }

    /// Matches a payment with its order, if that is there.
    fn match_orders(&mut self, payment: usize) {
        let payment = &mut self.payments[payment];
        let Some(at) = payment.of else { return };
        let order = &mut self.orders[at];
        let Place::There(status) = order.place else {
            return;
        };
        let reason = match status {
            OrderStatus::Paid => RefundReason::AlreadyPaid,
            OrderStatus::RefundDue | OrderStatus::Refunded => RefundReason::AlreadyRefunded,
            OrderStatus::Cancelled => RefundReason::OrderCancelled,
            OrderStatus::Expired => RefundReason::OrderExpired,
            OrderStatus::Failed => RefundReason::OrderFailed,
            // However late: its units are held.
            _ => match fault(&order.order, &payment.paid) {
                Some(reason) => reason,
                None => {
                    payment.state = PaymentState::Matched;
                    order.place = Place::There(OrderStatus::Paid);
                    return;
                }
            },
        };
        (payment.state, payment.reason) = (PaymentState::RefundDue, Some(reason));
        let is_over = [RefundReason::AlreadyPaid, RefundReason::AlreadyRefunded];
        if !is_over.contains(&reason) {
            order.place = Place::There(OrderStatus::RefundDue);
            order.reason = Some(reason);
        }
    }

    fn refund(&mut self, at: usize, reference: u32, restock: bool) -> bool {
        let order = &mut self.orders[at];
        let mut settle = |state| {
            let of_it = self.payments.iter_mut().filter(|one| one.of == Some(at));
            let due = of_it.filter(|one| one.state == state);
            due.map(|one| one.state = PaymentState::Refunded).count() > 0
        };
        if order.references.contains(&reference) {
            return false;
        }
        let settled = settle(PaymentState::RefundDue);
        if settled {
            order.references.push(reference);
        }
        match order.place {
            Place::There(OrderStatus::RefundDue) => {}
            Place::There(OrderStatus::Paid) if !settled => {
                order.references.push(reference);
                settle(PaymentState::Matched);
                self.total -= if restock { 0 } else { order.units() };
            }
            _ => return settled,
        }
        order.place = Place::There(OrderStatus::Refunded);
        true
    }
}

/// The fault of a payment for an order that is to be paid.
fn fault(order: &Order, paid: &Payment) -> Option<RefundReason> {
    if paid.currency != order.currency {
        Some(RefundReason::CurrencyMismatch)
    } else if paid.amount != order.amount {
        Some(RefundReason::AmountMismatch)
    } else {
        None
    }
}

// --- A life ---------------------------------------------------------------------------------

/// The real thing and its model.
struct Life<'a> {
    sale: &'a Sale,
    writers: &'a mut Writers,
    sku: Sku,
    model: Model,
    /// Units of the sale that are in no share: refunded ones, until they are lent again. The sold ones among them.
    pool: (u32, u32),
    random: StdRng,
    now: UnixMillis,
    /// The messages so far.
    notices: Vec<Notice>,
    /// Payments of earlier lives have lower rows.
    payments_above: i64,
    /// What has happened, for a failure.
    story: Vec<String>,
}

struct Writers {
    orders: BatchWriter,
    settlement: SettlementWriter,
}

/// The result of a step; the error says why it could not be made.
type Step<T> = Result<T, String>;

fn said(error: impl std::fmt::Debug) -> String {
    format!("{error:?}")
}

/// Lives, each on a SKU of its own.
pub fn run(lives: u64) -> Result<String, Why> {
    let (first, started) = (seed(), Instant::now());
    let seeds = (0..lives).map(|number| first.wrapping_add(number));
    let (mut events, mut payments) = (0, 0);
    block_on(async {
        let single = Sale::open(2).await;
        let mut node = Sale::open(2).await;
        node.become_a_node(2).await;
        let mut writers = [&single, &node].map(|sale| Writers {
            orders: sale.writer(0),
            settlement: SettlementWriter::new(sale.database.clone(), sale.lease(), 1),
        });
        for seed in PAST_SEEDS.iter().copied().chain(seeds) {
            let at = (seed % 2) as usize;
            let mut life = Life::begin([&single, &node][at], &mut writers[at], seed).await;
            if let Err(why) = life.run().await {
                let last = life.story.len().saturating_sub(12);
                let story = life.story[last..].join(", ");
                return Err(format!("seed={seed} {why}; before: {story}"));
            }
            events += life.story.len();
            payments += life.model.payments.len();
        }
        match [single.faults().await, node.faults().await]
            .concat()
            .as_slice()
        {
            [] => Ok(()),
            faults => Err(format!("the audit fails: {faults:?}")),
        }
    })?;
    let seconds = started.elapsed().as_secs();
    Ok(format!(
        "lives={lives} events={events} payments={payments} differences=0 seed={first} seconds={seconds}"
    ))
}

impl<'a> Life<'a> {
    async fn begin(sale: &'a Sale, writers: &'a mut Writers, seed: u64) -> Self {
        let mut random = StdRng::seed_from_u64(seed);
        let total = random.random_range(3..12);
        // A seed may be run twice.
        let skus = sale.number("SELECT count(*) FROM sku").await;
        let sku = sale.sku(&format!("S-{skus}"), total).await;
        if sale.lease().ledger == Ledger::Share {
            let lent = shares::lend(&sale.database, sale.lease(), sku.number, total.into(), 1);
            assert_eq!(lent.await.map(|lent| lent.units).unwrap(), i64::from(total));
            sku.counter().set_total(total).unwrap();
        }
        Life {
            sku,
            pool: (0, 0),
            payments_above: sale
                .number("SELECT coalesce(max(id), 0) FROM payments")
                .await,
            sale,
            writers,
            model: Model {
                total,
                orders: Vec::new(),
                payments: Vec::new(),
            },
            random,
            now: UnixMillis::now().plus_ms(LATER_MS),
            notices: Vec::new(),
            story: Vec::new(),
        }
    }

    /// A node: what is free in the pool comes back to its share, and what it has sold leaves it.
    async fn lend(&mut self) -> Step<()> {
        let (free, sold) = self.pool;
        if free == 0 {
            return Ok(());
        }
        let lent = shares::lend(
            &self.sale.database,
            self.sale.lease(),
            self.sku.number,
            free.into(),
            1,
        );
        let lent = lent.await.map_err(said)?;
        same("units lent", &lent.units, &i64::from(free))?;
        self.note(format!("lend {free}"));
        let counter = self.sku.counter();
        let swept = u32::try_from(lent.swept).map_err(said)?;
        counter.withdraw(swept);
        counter
            .set_total(counter.snapshot().total + free)
            .map_err(said)?;
        self.pool = (0, sold + swept);
        Ok(())
    }

    async fn run(&mut self) -> Step<()> {
        for _ in 0..EVENTS {
            self.lend().await?;
            self.now = self.now.plus_ms(self.random.random_range(0..250));
            match self.random.random_range(0..100) {
                0..18 => self.place(),
                18..32 => self.write().await?,
                32..56 => self.pay().await?,
                56..64 => self.match_orders().await?,
                64..72 => self.expire().await?,
                72..78 => self.cancel().await?,
                78..84 => self.lose().await?,
                84..92 => self.decide().await?,
                92..97 => self.refund().await?,
                _ => self.close().await?,
            }
            self.compare().await?;
        }
        // Nothing is left to the next life.
        while let Some(at) = self.orphan(|_| true) {
            let of = self.model.payments[at].of;
            let is_in_flight = |of: usize| self.model.orders[of].place == Place::InFlight;
            match of.filter(|of| is_in_flight(*of)) {
                Some(of) => self.write_one(of).await?,
                None => {
                    self.match_orders().await?;
                    self.decide_one(at).await?;
                }
            }
            self.compare().await?;
        }
        Ok(())
    }

    fn note(&mut self, what: String) {
        self.story
            .push(format!("{what} at {}", self.now.0 % 1_000_000));
    }

    /// One of the orders for which this holds.
    fn pick(&mut self, wanted: impl Fn(&ModelOrder) -> bool) -> Option<usize> {
        let orders = self.model.orders.iter().enumerate();
        let found: Vec<usize> = orders
            .filter(|(_, one)| wanted(one))
            .map(|(at, _)| at)
            .collect();
        found.choose(&mut self.random).copied()
    }

    /// One of the orphans for which this holds.
    fn orphan(&mut self, wanted: impl Fn(&ModelPayment) -> bool) -> Option<usize> {
        let payments = self.model.payments.iter().enumerate();
        let is_orphan = |one: &ModelPayment| one.state == PaymentState::Orphan && wanted(one);
        let found: Vec<usize> = payments
            .filter(|(_, one)| is_orphan(one))
            .map(|(at, _)| at)
            .collect();
        found.choose(&mut self.random).copied()
    }

    fn place(&mut self) {
        let units = self.random.random_range(1..=3);
        let is_free = self.model.free() >= units;
        assert_eq!(
            self.sku.counter().hold(units).is_ok(),
            is_free,
            "{:?}",
            self.story
        );
        if !is_free {
            return;
        }
        let order = Order {
            expires_at: self.now.plus_ms(TTL_MS as u64),
            ..order(&self.sku, units)
        };
        self.note(format!("place {}", self.model.orders.len()));
        self.model.orders.push(ModelOrder {
            order,
            place: Place::InFlight,
            reason: None,
            references: Vec::new(),
        });
    }

    async fn write(&mut self) -> Step<()> {
        match self.pick(|one| one.place == Place::InFlight) {
            Some(at) => self.write_one(at).await,
            None => Ok(()),
        }
    }

    /// A worker writes an order, or buries it.
    async fn write_one(&mut self, at: usize) -> Step<()> {
        let ModelOrder { order, .. } = self.model.orders[at].clone();
        let status = if self.random.random_bool(0.1) {
            OrderStatus::Failed
        } else if order.expires_at <= self.now && !self.model.is_paid_in_time(at) {
            OrderStatus::Expired
        } else {
            OrderStatus::PendingPayment
        };
        self.note(format!("write {at} as {status}"));
        if status == OrderStatus::Failed {
            let buried = self.writers.orders.refuse(&order, "22001", "a test");
            buried.await.map_err(said)?;
        } else {
            let written = self.writers.orders.write_as(&[(&order, status)]).await;
            written.map_err(said)?;
        }
        if status != OrderStatus::PendingPayment {
            self.sku.counter().release(order.quantity.get());
        }
        self.model.orders[at].place = Place::There(status);
        Ok(())
    }

    /// Messages arrive together: new payments, and those of before again.
    async fn pay(&mut self) -> Step<()> {
        let mut together = Vec::new();
        for _ in 0..self.random.random_range(1..=3) {
            let again = self.notices.choose(&mut self.random).cloned();
            let notice = match again.filter(|_| self.random.random_bool(0.25)) {
                // The same message, another about the same payment, or the same about another.
                Some(notice) if self.random.random_bool(0.4) => notice,
                Some(notice) if self.random.random_bool(0.7) => Notice {
                    event_id: format!("{}-again-{}", notice.event_id, self.notices.len()),
                    ..notice
                },
                Some(Notice { event_id, .. }) => Notice {
                    event_id,
                    ..self.new_notice(together.len())
                },
                None => self.new_notice(together.len()),
            };
            together.push(Delivery {
                notice,
                received_at: self.now,
            });
        }
        let match_now = self.random.random_bool(0.85);
        let orders = self.model.orders.iter();
        let in_flight: Vec<OrderId> = orders
            .filter(|one| one.place == Place::InFlight)
            .map(|one| one.order.id)
            .collect();
        let arrival = Arrival {
            now: self.now,
            check_at: self.now,
            match_now,
            with_waiting: self.model.has_orphan(),
        };
        let deliveries: Vec<&Delivery> = together.iter().collect();
        let settlement = &mut self.writers.settlement;
        let settled = payments::ingest(settlement, &deliveries, arrival, &in_flight, &[]);
        let settled = settled.await.map_err(said)?;
        let (mut new, mut orders) = (0, Vec::new());
        for delivery in together {
            let paid_at = delivery.paid_at();
            let notice = delivery.notice;
            let paid = notice.payment.clone().expect("each is about a payment");
            orders.extend(paid.order_id());
            let is_known = |one: &Notice| {
                let of = |one: &Notice| one.payment.as_ref().map(|paid| paid.payment_id.clone());
                one.event_id == notice.event_id && of(one) == of(&notice)
            };
            if self.notices.iter().any(is_known) {
                continue;
            }
            new += 1;
            self.notices.push(notice);
            let is_known = |one: &ModelPayment| one.paid.payment_id == paid.payment_id;
            if self.model.payments.iter().any(is_known) {
                continue;
            }
            let id = paid.order_id();
            let of = self
                .model
                .orders
                .iter()
                .position(|one| Some(one.order.id) == id);
            self.note(format!(
                "pay {of:?} {} {} matched={match_now}",
                paid.amount,
                paid.currency.as_str()
            ));
            self.model.payments.push(ModelPayment {
                paid,
                of,
                paid_at,
                state: PaymentState::Orphan,
                reason: None,
            });
        }
        if match_now {
            // Whoever waits for the same order came first.
            let is_of_them = |id: Option<OrderId>| id.is_some_and(|id| orders.contains(&id));
            self.model.meet_all(|one| is_of_them(one.paid.order_id()));
        }
        self.move_memory(&settled.moved);
        match settled.events == new {
            true => Ok(()),
            false => Err(format!("{} new messages, not {new}", settled.events)),
        }
    }

    fn new_notice(&mut self, number: usize) -> Notice {
        let name = format!("{}-{:06}-{number}", self.sku.id, self.notices.len());
        let order = self
            .pick(|_| true)
            .map(|at| self.model.orders[at].order.clone());
        let random = &mut self.random;
        let order = order.filter(|_| random.random_bool(0.9));
        let amount = order.as_ref().map_or(100, |order| order.amount);
        let wrong = random.random_range(0..10);
        let order_ref = order.map_or_else(
            || {
                [
                    "no number".to_owned(),
                    ((1_u64 << 60) + random.random_range(0..1 << 50)).to_string(),
                ]
                .choose(random)
                .cloned()
                .unwrap_or_default()
            },
            |order| order.id.to_string(),
        );
        Notice {
            provider: Provider::Standard,
            event_id: format!("evt-{name}"),
            kind: "payment.succeeded".to_owned(),
            body: Box::from(name.as_bytes()),
            payment: Some(Payment {
                payment_id: format!("pay-{name}"),
                order_ref,
                amount: if wrong == 0 { amount + 1 } else { amount },
                currency: Currency::new(if wrong == 1 { "USD" } else { "EUR" })
                    .expect("a currency"),
                receipt: random.random_bool(0.7).then(|| "a receipt".to_owned()),
                // Whoever signs a time that is yet to come is not believed.
                made_at: random
                    .random_bool(0.5)
                    .then(|| UnixMillis(self.now.0 + random.random_range(-800..200))),
            }),
        }
    }

    /// The reconciler lets orphans meet orders that have appeared.
    async fn match_orders(&mut self) -> Step<()> {
        let found = postgres::payments::orphans_with_order(&self.sale.database, 0, 1_000)
            .await
            .map_err(said)?;
        let orders: Vec<OrderId> = found.iter().filter_map(|one| one.order_id).collect();
        let settlement = &mut self.writers.settlement;
        let settled = payments::match_orphans(settlement, &orders, self.now)
            .await
            .map_err(said)?;
        self.note(format!("meet {}", orders.len()));
        self.move_memory(&settled.moved);
        self.model.meet_all(|_| true);
        Ok(())
    }

    async fn expire(&mut self) -> Step<()> {
        let (Some(first), Some(last)) = (self.model.orders.first(), self.model.orders.last())
        else {
            return Ok(());
        };
        let (limit, rows) = (
            self.random.random_range(1..5),
            self.random.random_range(1..4),
        );
        let with_orphans = self.model.has_orphan();
        let mut ranges = vec![IdRange {
            from: first.order.id,
            to: last.order.id,
        }];
        let mut found = Vec::new();
        let settlement = &mut self.writers.settlement;
        while !ranges.is_empty() {
            let looked = expiry::look_for_overdue(settlement, &ranges, rows, self.now, None);
            let looked = looked.await.map_err(said)?;
            if looked.rows > rows as i64 {
                return Err(format!("{} rows read, not {rows}", looked.rows));
            }
            found.extend(looked.overdue.iter().map(|one| one.order_id));
            ranges = looked.rest;
        }
        let is_past = |one: &&ModelOrder| {
            one.place == Place::There(OrderStatus::PendingPayment)
                && one.order.expires_at <= self.now
        };
        let past = self.model.orders.iter().filter(is_past);
        let past: Vec<OrderId> = past.map(|one| one.order.id).collect();
        same("overdue orders", &found, &past)?;
        found.truncate(limit);
        let moved = expiry::end_overdue(settlement, &found, self.now, with_orphans);
        let moved = moved.await.map_err(said)?;
        self.note(format!("expire {limit}"));
        self.move_memory(&moved);
        for at in 0..self.model.orders.len() {
            let is_chosen = found.contains(&self.model.orders[at].order.id);
            if is_chosen && !self.model.is_paid_in_time(at) {
                self.model.orders[at].place = Place::There(OrderStatus::Expired);
            }
        }
        Ok(())
    }

    async fn cancel(&mut self) -> Step<()> {
        let Some(at) = self.pick(|one| one.place != Place::InFlight) else {
            return Ok(());
        };
        self.note(format!("cancel {at}"));
        let order = &self.model.orders[at].order;
        let (lease, now) = (self.sale.lease(), Some(self.now));
        let told = transitions::cancel(
            &self.sale.database,
            lease,
            order.id,
            now,
            transitions::Which::Unpaid,
        );
        let told = told.await.map_err(said)?;
        let pending = Place::There(OrderStatus::PendingPayment);
        let expected = match self.model.orders[at].place {
            place if place == pending && self.now < order.expires_at => {
                self.sku.counter().release(order.quantity.get());
                self.model.orders[at].place = Place::There(OrderStatus::Cancelled);
                return match told {
                    transitions::Transition::Now(_) => Ok(()),
                    told => Err(format!("{at} is not cancelled: {told:?}")),
                };
            }
            place if place == pending => transitions::Transition::StandsAt(OrderStatus::Expired),
            Place::There(status) => transitions::Transition::StandsAt(status),
            Place::InFlight | Place::Gone => transitions::Transition::Unknown,
        };
        match told == expected {
            true => Ok(()),
            false => Err(format!("{at} is {told:?}, not {expected:?}")),
        }
    }

    /// An order is lost on its way, or with its row; a start then finds it nowhere. One that is
    /// lost may also be brought back.
    async fn lose(&mut self) -> Step<()> {
        let pending = Place::There(OrderStatus::PendingPayment);
        let Some(at) = self.pick(|one| !one.is_there() || one.place == pending) else {
            return Ok(());
        };
        let ModelOrder { order, place, .. } = self.model.orders[at].clone();
        let units = order.quantity.get();
        if place == Place::Gone {
            if self.sku.counter().hold(units).is_ok() {
                self.note(format!("bring back {at}"));
                self.model.orders[at].place = Place::InFlight;
                self.write_one(at).await?;
            }
            return Ok(());
        }
        self.note(format!("lose {at} {place:?}"));
        if place == pending {
            self.sale
                .sql(&format!(
                    "BEGIN; DELETE FROM orders WHERE order_id = {};
                     {}; COMMIT",
                    order.id,
                    self.sale.lease().ledger.sql(
                        self.sale.lease().node,
                        &format!(
                            "WITH moved AS (UPDATE @ledger SET held = held - {units} WHERE @id = {}@own RETURNING *)
                             INSERT INTO stock_log (sku, @columncause, reference, held_delta, total_after, held_after, sold_after)
                             SELECT @id, @node'lost', 'a test', -{units}, @total, held, sold FROM moved",
                            order.sku.0
                        )
                    )
                ))
                .await;
        }
        self.sku.counter().release(units);
        self.model.orders[at].place = Place::Gone;
        Ok(())
    }

    /// An orphan was looked for often enough; its order may have appeared in this very moment.
    async fn decide(&mut self) -> Step<()> {
        let in_flight = |model: &Model, one: &ModelPayment| {
            one.of
                .is_some_and(|of| model.orders[of].place == Place::InFlight)
        };
        let candidates: Vec<bool> = self
            .model
            .payments
            .iter()
            .map(|one| one.state == PaymentState::Orphan && !in_flight(&self.model, one))
            .collect();
        let candidates: Vec<usize> = (0..candidates.len()).filter(|at| candidates[*at]).collect();
        match candidates.choose(&mut self.random) {
            Some(at) => self.decide_one(*at).await,
            None => Ok(()),
        }
    }

    async fn decide_one(&mut self, at: usize) -> Step<()> {
        let ModelPayment {
            paid,
            of,
            paid_at,
            state,
            ..
        } = self.model.payments[at].clone();
        if state != PaymentState::Orphan {
            return Ok(());
        }
        let row = self.row_of(&paid).await;
        let (now, settlement) = (self.now, &mut self.writers.settlement);
        let Some(of) = of.filter(|_| paid.receipt.is_some()) else {
            let reason = RefundReason::ReceiptMissing;
            let given_up = payments::give_up(settlement, row, reason, now)
                .await
                .map_err(said)?;
            let is_there = of.is_some_and(|of| self.model.orders[of].is_there());
            self.note(format!("give up {at}"));
            if given_up == is_there {
                return Err(format!(
                    "{at} is given up: {given_up}, its order there: {is_there}"
                ));
            }
            if given_up {
                let payment = &mut self.model.payments[at];
                (payment.state, payment.reason) = (PaymentState::RefundDue, Some(reason));
            }
            return Ok(());
        };
        let ModelOrder { order, .. } = self.model.orders[of].clone();
        let units = order.quantity.get();
        let is_there = self.model.orders[of].is_there();
        let free = self.model.free();
        let late = (paid_at >= order.expires_at).then_some(RefundReason::OrderExpired);
        let reason = late
            .or_else(|| fault(&order, &paid))
            .or((free < units).then_some(RefundReason::SoldOut));
        let holds = reason.is_none();
        if holds && self.sku.counter().hold(units).is_err() {
            return Err(format!("{units} of {free} units cannot be held"));
        }
        let recovered = payments::recover_order(settlement, row, &order, reason, now)
            .await
            .map_err(said)?;
        self.note(format!("recover {of} by {at} {reason:?}: {recovered}"));
        if recovered == is_there {
            return Err(format!("{of} is recovered: {recovered}, there: {is_there}"));
        }
        match (holds, recovered) {
            (true, true) => self.sku.counter().sell(units),
            (true, false) => self.sku.counter().release(units),
            (false, _) => {}
        }
        if recovered {
            let (order, payment) = (&mut self.model.orders[of], &mut self.model.payments[at]);
            let (status, state) = match reason {
                None => (OrderStatus::Paid, PaymentState::Matched),
                Some(_) => (OrderStatus::RefundDue, PaymentState::RefundDue),
            };
            (order.place, order.reason) = (Place::There(status), reason);
            (payment.state, payment.reason) = (state, reason);
        }
        Ok(())
    }

    /// A person sends the money of an order back.
    async fn refund(&mut self) -> Step<()> {
        let Some(at) = self.pick(|_| true) else {
            return Ok(());
        };
        let restock = self.random.random_bool(0.5);
        let order = &self.model.orders[at];
        // Now and then a request whose answer was lost comes again.
        let again = order.references.last().copied();
        let again = again.filter(|_| self.random.random_bool(0.5));
        let reference = again.unwrap_or_else(|| self.random.random());
        let known = order.references.contains(&reference);
        let (id, note) = (order.order.id, note(&reference.to_string(), restock));
        let settlement = &mut self.writers.settlement;
        let told = refunds::record(settlement, id, &note, self.now);
        let told = told.await.map_err(said)?;
        self.note(format!("refund {at} restock={restock}: {told:?}"));
        let before = self.model.orders[at].place;
        // What is due for an order that is not there is closed, payment by payment.
        let done = self.model.orders[at].is_there() && self.model.refund(at, reference, restock);
        let is_right = match told {
            Recorded::Done(moved) => {
                self.move_memory(moved.as_slice());
                done
            }
            Recorded::Already => !done && (known || before == Place::There(OrderStatus::Refunded)),
            Recorded::StandsAt(status) => !done && before == Place::There(status),
            Recorded::UnitsElsewhere => false,
            Recorded::Unknown => !self.model.orders[at].is_there(),
        };
        match is_right {
            true => Ok(()),
            false => Err(format!("{at} was {before:?}, done: {done}")),
        }
    }

    /// A person closes a payment without an order.
    async fn close(&mut self) -> Step<()> {
        let count = self.model.payments.len();
        if count == 0 {
            return Ok(());
        }
        let at = self.random.random_range(0..count);
        let ModelPayment {
            paid, of, state, ..
        } = self.model.payments[at].clone();
        let (row, note) = (self.row_of(&paid).await, note("closed", false));
        let settlement = &mut self.writers.settlement;
        let told = refunds::close_payment(settlement, row, &note, self.now);
        let told = told.await.map_err(said)?;
        self.note(format!("close {at}: {told:?}"));
        let order = of
            .map(|of| &self.model.orders[of])
            .filter(|one| one.is_there());
        let expected = match (state, order) {
            (PaymentState::Matched | PaymentState::Refunded, _) => Closed::Settled,
            (_, Some(order)) => Closed::HasOrder(order.order.id),
            (_, None) => {
                self.model.payments[at].state = PaymentState::Refunded;
                Closed::Done(None)
            }
        };
        let told = match told {
            Closed::Done(_) => Closed::Done(None),
            other => other,
        };
        match told == expected {
            true => Ok(()),
            false => Err(format!("closing {at} is {told:?}, not {expected:?}")),
        }
    }

    async fn row_of(&self, paid: &Payment) -> i64 {
        let id = &paid.payment_id;
        let sql = format!("SELECT id FROM payments WHERE payment_id = '{id}'");
        self.sale.number(&sql).await
    }

    /// As the payment processor moves the counters in memory.
    fn move_memory(&mut self, moved: &[UnitMove]) {
        for UnitMove { units, to } in moved {
            let quantity = &units.quantity;
            let counter = self.sku.counter();
            match to {
                Destination::Sold => counter.sell(*quantity),
                Destination::Free(_) => counter.release(*quantity),
                Destination::Restocked => counter.unsell(*quantity),
                Destination::Withdrawn => counter.withdraw(*quantity),
                Destination::Nowhere => {}
                Destination::Pool { swept, is_free } => {
                    counter.withdraw(*swept);
                    self.pool.1 += *swept;
                    self.pool.1 -= *quantity;
                    self.pool.0 += if *is_free { *quantity } else { 0 };
                }
            }
        }
    }

    /// Everything is as the model says.
    async fn compare(&self) -> Step<()> {
        let client = self.sale.admin();
        let sku = self.sku.number.0;
        let (orders, payments, counters) = try_join3(
            client.query(
                "SELECT order_id, status, refund_reason FROM order_rows WHERE sku = $1 ORDER BY order_id",
                &[&sku],
            ),
            client.query(
                "SELECT payment_id, state, refund_reason FROM payment_list WHERE id > $1 ORDER BY id",
                &[&self.payments_above],
            ),
            client.query_one(
                "SELECT total, sku.held + coalesce(sum(h.held), 0)::int8, sku.sold + coalesce(sum(h.sold), 0)::int8
                   FROM sku LEFT JOIN (SELECT sku, held, sold FROM stock_share) h (of, held, sold) ON h.of = id
                  WHERE id = $1 GROUP BY id",
                &[&sku],
            ),
        )
        .await
        .map_err(said)?;
        let found: Vec<(i64, String, Option<String>)> = orders
            .iter()
            .map(|row| (row.get(0), row.get(1), row.get(2)))
            .collect();
        let word = |reason: Option<RefundReason>| reason.map(|reason| reason.as_str().to_owned());
        let expected: Vec<_> = self
            .model
            .orders
            .iter()
            .filter_map(|one| match one.place {
                Place::There(status) => {
                    Some((one.order.id.as_i64(), status.to_string(), word(one.reason)))
                }
                Place::InFlight | Place::Gone => None,
            })
            .collect();
        same("orders", &found, &expected)?;
        let found: Vec<(String, String, Option<String>)> = payments
            .iter()
            .map(|row| (row.get(0), row.get(1), row.get(2)))
            .collect();
        let expected: Vec<_> = self
            .model
            .payments
            .iter()
            .map(|one| {
                (
                    one.paid.payment_id.clone(),
                    one.state.to_string(),
                    word(one.reason),
                )
            })
            .collect();
        same("payments", &found, &expected)?;
        let (held, sold, total) = (self.model.held(), self.model.sold(), self.model.total);
        let found: [i64; 3] = [counters.get(0), counters.get(1), counters.get(2)];
        same("counters", &found, &[total, held, sold].map(i64::from))?;
        let StockSnapshot {
            total: live_total,
            held: live_held,
            sold: live_sold,
            ..
        } = self.sku.counter().snapshot();
        let in_flight = self.model.units(Place::InFlight);
        same(
            "live counters",
            &[live_total, live_held, live_sold],
            &[
                total - self.pool.0 - self.pool.1,
                held + in_flight,
                sold - self.pool.1,
            ],
        )
    }
}

fn note(reference: &str, restock: bool) -> RefundNote {
    RefundNote {
        reference: Some(reference.to_owned()),
        note: None,
        restock,
    }
}

fn same<T: PartialEq + std::fmt::Debug>(what: &str, found: &T, expected: &T) -> Step<()> {
    match found == expected {
        true => Ok(()),
        false => Err(format!("{what}: {found:?}, not {expected:?}")),
    }
}
