//! Buyers and a payment platform: requests that come late, twice or not at all, and payments that come before, after
//! and beside everything else.

use std::rc::Rc;
use std::time::Duration;

use millrace::order::payment::{Delivery, Notice, Payment, Provider};
use millrace::order::{
    Currency, IdempotencyKey, KeyHash, OrderStatus, Quantity, SkuId, UnixMillis, UserId,
};
use millrace::pipeline::orders::intake::OrderRequest;
use rand::Rng;
use tokio::task::spawn_local;
use tokio::time::{Instant, sleep};

use super::Sim;
use super::judge::has_time;
use super::postgres::tables::{Key, Sku};
use super::process::{Answer, Dead, How, ORDER_TIMEOUT};

/// Mean time between two buyers, in milliseconds.
const ARRIVAL_MS: f64 = 800.0;
const BUYERS: u32 = 80;
/// An answer may be late by this much (I6), and by the way of the waker.
const LATE: Duration = Duration::from_millis(300);
/// A payment that is made so long before the deadline is in time whatever the clocks do, in milliseconds.
const MARGIN_MS: i64 = 35_000;

/// What is sold.
pub fn skus() -> Vec<Sku> {
    let sku = |name: &str, total, limit, skips| Sku {
        name: name.to_owned(),
        price: 1_000,
        total,
        held: 0,
        sold: 0,
        limit,
        skips,
        taken_off: 0,
    };
    vec![
        sku("many", 2_000, None, false),
        sku("limited", 600, Some(3), false),
        sku("few", 60, None, false),
        sku("skipping", 40, Some(8), true),
    ]
}

/// An exponential pause with this mean, in milliseconds.
pub fn pause_ms(random: &mut impl Rng, mean: f64) -> u64 {
    let uniform: f64 = random.random_range(0.0001..1.0);
    (-uniform.ln() * mean) as u64 + 1
}

impl Sim {
    /// Lets buyers come, one by one and now and then many at once.
    pub async fn crowd(self: Rc<Self>) {
        for number in 0_u64.. {
            let pause = self.chance(|random| pause_ms(random, ARRIVAL_MS));
            sleep(Duration::from_millis(pause)).await;
            self.gate().await;
            let many = self.chance(|random| random.random_ratio(1, 60));
            let count = if many { 24 } else { 1 };
            for one in 0..count {
                spawn_local(Rc::clone(&self).buyer(number * 100 + one, many));
            }
        }
    }

    async fn buyer(self: Rc<Self>, number: u64, in_flood: bool) {
        let (user, sku, units, respond_async, waitlist, fate, again, bytes) =
            self.chance(|random| {
                let sku = match in_flood {
                    true => 2,
                    false => [0, 0, 1, 2, 2, 3][random.random_range(0..6)],
                };
                (
                    random.random_range(0..BUYERS),
                    ["many", "limited", "few", "skipping"][sku],
                    [1, 1, 1, 2, 3][random.random_range(0..5)],
                    random.random_bool(0.5),
                    random.random_bool(0.6),
                    random.random_range(0..100),
                    random.random_ratio(1, 15),
                    [0, 200, 900, 900][random.random_range(0..4)],
                )
            });
        let attributes = (bytes > 0).then(|| format!("{{\"a\":\"{}\"}}", "x".repeat(bytes)));
        let key = format!("key-{number}");
        let request = OrderRequest {
            user_id: UserId::new(&format!("buyer-{user}")).expect("a name"),
            sku_id: SkuId::new(sku).expect("a name"),
            quantity: Quantity::new(units).expect("units"),
            adjustment: 0,
            attributes: attributes.as_deref(),
            key: Some(KeyHash::of(IdempotencyKey::new(&key).expect("a key"))),
            wait: ORDER_TIMEOUT,
            respond_async,
            waitlist,
            trace: None,
        };
        let Some(mut order) = self.ask(number, &request).await else {
            return;
        };
        if again && let Some(same) = self.ask(number, &request).await {
            if same != order {
                self.fail(format!("one key has the orders {order} and {same}"));
            }
            order = same;
        }
        self.go_on(number, order, fate).await;
    }

    /// Sends a request until it is answered for good. Returns the order.
    async fn ask(&self, number: u64, request: &OrderRequest<'_>) -> Option<i64> {
        for _ in 0..40 {
            self.gate().await;
            let (there, back, is_lost) = self.chance(|random| {
                let there = match random.random_ratio(1, 60) {
                    true => random.random_range(500..9_000),
                    false => random.random_range(1..6),
                };
                let back = random.random_range(1..6);
                (there, back, random.random_ratio(1, 40))
            });
            sleep(Duration::from_millis(there)).await;
            let mut answer = Err(Dead);
            if let Some(process) = self.process() {
                let sent = Instant::now();
                answer = process.place(request).await;
                let took = sent.elapsed();
                if answer.is_ok() && took > request.wait + LATE {
                    self.fail(format!("request {number} was answered after {took:?}"));
                }
                sleep(Duration::from_millis(back)).await;
                // An answer of a process that is dead by now may be on its way still.
            }
            if let Ok(answer) = &answer {
                self.told(number, answer);
            }
            match answer {
                Ok(Answer::Order { order, how, .. }) if how != How::Undecided && !is_lost => {
                    return Some(order.id.as_i64());
                }
                Ok(Answer::Stored(id, status)) if !is_lost => {
                    return (status != OrderStatus::Failed).then(|| id.as_i64());
                }
                Ok(Answer::Refused("sold_out" | "purchase_limit" | "waitlist_full"))
                    if !is_lost =>
                {
                    return None;
                }
                _ => {}
            }
            let pause = self.chance(|random| pause_ms(random, 1_500.0));
            sleep(Duration::from_millis(pause)).await;
        }
        None
    }

    fn told(&self, number: u64, answer: &Answer) {
        match answer {
            Answer::Order { order, how, .. } => {
                self.note(format_args!("{number} has order {} {how:?}", order.id));
            }
            Answer::Stored(id, status) => self.note(format_args!("{number} has {id} {status}")),
            Answer::TimedOut(id) => self.note(format_args!("{number} timed out {id}")),
            Answer::Refused(why) => self.note(format_args!("{number} is refused: {why}")),
        }
        let told = self.judge(|judge| judge.told(answer));
        if let Err(why) = told {
            self.fail(why);
        }
    }

    /// What becomes of an order: it is paid, cancelled, or left.
    pub async fn go_on(self: &Rc<Self>, number: u64, id: i64, fate: u32) {
        let think = self.chance(|random| pause_ms(random, 9_000.0));
        sleep(Duration::from_millis(think)).await;
        match fate {
            0..55 => self.pay(number, id, fate).await,
            55..70 => self.cancel(id).await,
            _ => {}
        }
    }

    async fn cancel(&self, id: i64) {
        let order_id = millrace::order::OrderId::from_i64(id).expect("an id");
        for _ in 0..30 {
            self.gate().await;
            self.judge(|judge| judge.asked_to_cancel(id));
            if let Some(process) = self.process() {
                let cancelled = process.cancel(order_id).await;
                self.note(format_args!("cancel {id}: {cancelled:?}"));
                match cancelled {
                    Ok(Some(true)) => return self.judge(|judge| judge.was_cancelled(id)),
                    // Perhaps its row is to come.
                    Ok(Some(false)) => return,
                    Ok(None) | Err(Dead) => {}
                }
            }
            let pause = self.chance(|random| pause_ms(random, 2_000.0));
            sleep(Duration::from_millis(pause)).await;
        }
    }

    /// Pays an order, once it can be paid.
    async fn pay(self: &Rc<Self>, number: u64, id: i64, fate: u32) {
        let key = Key::Order(id);
        // An order that waits is paid once it has its units.
        for _ in 0..40 {
            let row = self.server().look(|rows| rows.order(&key));
            match row.map(|row| row.status) {
                Some(Some(7)) => {
                    sleep(Duration::from_millis(3_000)).await;
                    self.gate().await;
                }
                Some(Some(1)) | None => break,
                Some(_) => return,
            }
        }
        if fate < 50 {
            return self
                .deliver(
                    number,
                    id,
                    format!("pay-{number}"),
                    fate == 0,
                    fate % 10 == 1,
                )
                .await;
        }
        // The buyer pays twice.
        let both = (
            self.deliver(number, id, format!("pay-{number}"), false, false),
            self.deliver(number, id, format!("pay-{number}-again"), false, false),
        );
        futures_util::future::join(both.0, both.1).await;
    }

    /// Delivers a message until it is stored, and perhaps once more.
    async fn deliver(
        self: &Rc<Self>,
        number: u64,
        id: i64,
        name: String,
        is_wrong: bool,
        again: bool,
    ) {
        let Some((mut amount, receipt, told)) = self.judge(|judge| {
            let known = judge.order(id)?;
            let told = known.order.expires_at.0;
            Some((known.order.amount, known.receipt.clone(), told))
        }) else {
            return;
        };
        // As it stands in its table, perhaps among the parked ones.
        let expires_ms = || {
            self.server().look(|rows| {
                let order = rows.order(&Key::Order(id));
                let order = order.or_else(|| rows.parked(&Key::Parked(id)));
                order.map(|order| order.expires_ms)
            })
        };
        // A payment of an order that waits has to be refunded, also if it is heard of again once the order has units.
        let had_time = has_time(expires_ms().unwrap_or(told));
        amount += i64::from(is_wrong);
        // Some shops do not pass it on.
        let receipt = receipt.filter(|_| self.chance(|random| random.random_ratio(9, 10)));
        let made_at = UnixMillis(self.wall_ms());
        let mut stored = false;
        for attempt in 0..60 {
            // Who waits for an answer does not wait for the end of a calm.
            if attempt == 0 {
                self.gate().await;
            }
            let (there, is_lost) =
                self.chance(|random| (pause_ms(random, 40.0), random.random_ratio(1, 20)));
            sleep(Duration::from_millis(there)).await;
            if let Some(process) = self.process() {
                let received_at = process.state.ids.real_now();
                let payment = Payment {
                    payment_id: name.clone(),
                    order_ref: id.to_string(),
                    amount,
                    currency: Currency::new("EUR").expect("a currency"),
                    receipt: receipt.clone(),
                    made_at: Some(made_at),
                };
                let delivery = Delivery {
                    notice: Notice {
                        provider: Provider::Standard,
                        event_id: format!("event-{name}"),
                        kind: "paid".to_owned(),
                        body: Box::new(*b"{}"),
                        payment: Some(payment),
                    },
                    received_at,
                };
                let answer = process.notify(delivery).await;
                self.note(format_args!("payment {name} for {id}: {answer:?}"));
                if let Ok(true) = answer {
                    // When it is stored, at the latest.
                    let now = process.state.ids.real_now().0;
                    let in_time = expires_ms()
                        .filter(|until| had_time && has_time(*until))
                        .is_some_and(|until| made_at.0.max(now) + MARGIN_MS < until);
                    self.judge(|judge| judge.was_stored(&name, id, in_time && !is_wrong));
                    if stored || (!again && !is_lost) {
                        return;
                    }
                    stored = true;
                }
            }
            let mean = if attempt < 5 { 1_000.0 } else { 5_000.0 };
            let pause = self.chance(|random| pause_ms(random, mean));
            sleep(Duration::from_millis(pause)).await;
        }
        self.note(format_args!("payment {name} of {number} is given up"));
    }
}
