//! Operators: they edit rows by hand and mend them, retry and discard dead letters, and record refunds.

use std::rc::Rc;
use std::time::Duration;

use millrace::order::{OrderId, SkuId};
use millrace::pipeline::admin::operator::OperatorError;
use millrace::store::settlement::refunds::{Recorded, RefundNote};
use rand::Rng;
use tokio::task::spawn_local;
use tokio::time::sleep;

use super::postgres::Trigger;
use super::postgres::tables::{Key, View};
use super::process::Dead;
use super::shop::pause_ms;
use super::{Sim, TROUBLE};

/// The numbers of SKUs are 1 to this.
pub const SKUS: i32 = 4;
/// Mean time between two looks at dead letters, and between two refunds, in milliseconds.
const LETTERS_MS: f64 = 3_000.0;
const REFUNDS_MS: f64 = 8_000.0;
/// An order without a number of a buyer is paid under one from here on.
const OF_LETTERS: u64 = 1 << 40;

impl Sim {
    /// Has PostgreSQL refuse the counters of a SKU from now on.
    pub fn refuse_counters(self: &Rc<Self>, sku: i32) -> &'static str {
        let (is_edited, units) =
            self.chance(|random| (random.random_bool(0.5), random.random_range(1..40)));
        self.note(format_args!("sku {sku} is refused"));
        if !is_edited {
            let row = self.server.look(|rows| rows.sku(&Key::Sku(sku)));
            self.server.check_held(sku, row.map(|row| row.held));
            return "counters_checked";
        }
        let server = Rc::clone(&self.server);
        spawn_local(async move {
            let edit = server.edit(sku, |row| {
                let units = (row.total - row.held - row.sold).min(units);
                row.total -= units;
                row.taken_off += units;
            });
            edit.await;
        });
        "total_edited"
    }

    /// Mends a SKU, and resumes its sale.
    pub async fn accept_counters(self: Rc<Self>, sku: i32) {
        self.note(format_args!("sku {sku} is mended"));
        self.server.check_held(sku, None);
        let edit = self.server.edit(sku, |row| {
            row.total += row.taken_off;
            row.taken_off = 0;
        });
        edit.await;
        let Some(row) = self.server.look(|rows| rows.sku(&Key::Sku(sku))) else {
            return;
        };
        let id = SkuId::new(&row.name).expect("a name");
        while self.world.why_stopped().is_none() {
            if let Some(process) = self.process() {
                let resumed = process.unless_dead(process.operator.resume(&id)).await;
                self.note(format_args!("resume {id}: {}", outcome(&resumed)));
                if let Ok(Ok(_) | Err(OperatorError::CountersRefused { .. })) = resumed {
                    return;
                }
            }
            sleep(Duration::from_millis(700)).await;
        }
    }

    /// In most rounds the counters of a SKU are refused when the trouble ends. Returns the SKU.
    pub fn refuse_at_the_end(self: &Rc<Self>) -> Option<i32> {
        let (sku, before_ms) = self.chance(|random| {
            (
                random.random_range(1..=SKUS + 2),
                random.random_range(5_000..60_000),
            )
        });
        if sku > SKUS {
            return None;
        }
        let sim = Rc::clone(self);
        spawn_local(async move {
            sleep(TROUBLE - Duration::from_millis(before_ms)).await;
            let kind = sim.refuse_counters(sku);
            sim.figures.borrow_mut().note(kind);
        });
        Some(sku)
    }

    /// Has PostgreSQL refuse orders for so many units, for a time.
    pub fn refuse_rows(self: &Rc<Self>, ms: u64) -> &'static str {
        let (quantity, drops) =
            self.chance(|random| (random.random_range(1..=3), random.random_bool(0.3)));
        self.server.set_trigger(Some(Trigger { quantity, drops }));
        let server = Rc::clone(&self.server);
        spawn_local(async move {
            sleep(Duration::from_millis(ms)).await;
            server.set_trigger(None);
        });
        "rows_refused"
    }

    /// Retries and discards dead letters.
    pub async fn decide_on_letters(self: Rc<Self>) {
        loop {
            let pause = self.chance(|random| pause_ms(random, LETTERS_MS));
            sleep(Duration::from_millis(pause)).await;
            self.gate().await;
            let letters = self.server.look(|rows| rows.letters(i64::MIN, i64::MAX));
            let mut open: Vec<_> = letters
                .into_iter()
                .filter(|(_, letter)| !letter.is_discarded)
                .collect();
            let Some(process) = self.process().filter(|_| !open.is_empty()) else {
                continue;
            };
            let (at, is_wanted) =
                self.chance(|random| (random.random_range(0..open.len()), random.random_bool(0.7)));
            let (id, letter) = open.swap_remove(at);
            if is_wanted {
                self.judge(|judge| judge.asked_to_retry(id));
                let retry = process.operator.retry_dead_letter(letter.number);
                let retried = process.unless_dead(retry).await;
                self.note(format_args!("retry {id}: {}", outcome(&retried)));
                if let Ok(Ok(_)) = retried {
                    self.judge(|judge| judge.was_retried(id));
                    let fate = self.chance(|random| random.random_range(0..100));
                    let sim = Rc::clone(&self);
                    let number = OF_LETTERS + letter.number as u64;
                    spawn_local(async move { sim.go_on(number, id, fate).await });
                }
            } else {
                let discard = process.operator.discard_dead_letter(letter.number, None);
                let discarded = process.unless_dead(discard).await;
                self.note(format_args!("discard {id}: {}", outcome(&discarded)));
            }
        }
    }

    /// Records refunds: of payments that have to go back, and now and then of an order that is paid.
    pub async fn refund(self: Rc<Self>) {
        for number in 0_u64.. {
            let pause = self.chance(|random| pause_ms(random, REFUNDS_MS));
            sleep(Duration::from_millis(pause)).await;
            self.gate().await;
            let gives_up = self.chance(|random| random.random_ratio(1, 4));
            let wanted = if gives_up { "matched" } else { "refund_due" };
            let orders = self.server.look(|rows| orders_of(rows, wanted));
            let orders: Vec<i64> = orders
                .into_iter()
                .filter(|id| !self.judge(|judge| judge.is_given_up(*id)))
                .collect();
            if orders.is_empty() {
                continue;
            }
            let (at, restock, twice) = self.chance(|random| {
                (
                    random.random_range(0..orders.len()),
                    random.random_bool(0.5),
                    random.random_ratio(1, 3),
                )
            });
            let id = orders[at];
            if gives_up {
                self.judge(|judge| judge.gives_up(id, restock));
            }
            self.record(id, format!("refund-{number}"), restock, twice)
                .await;
        }
    }

    /// Sends a refund until it is answered, and perhaps once more.
    async fn record(&self, id: i64, reference: String, restock: bool, twice: bool) {
        let order_id = OrderId::from_i64(id).expect("an id");
        let mut again = twice;
        for _ in 0..20 {
            if let Some(process) = self.process() {
                let note = RefundNote {
                    reference: Some(reference.clone()),
                    note: None,
                    restock,
                };
                let recording = process.operator.record_refund(order_id, note);
                let recorded = process.unless_dead(recording).await;
                self.note(format_args!("{reference} of {id}: {recorded:?}"));
                match recorded {
                    Ok(Ok(Recorded::Done(_) | Recorded::Already)) => {
                        self.judge(|judge| judge.was_refunded(id, &reference));
                        if !again {
                            return;
                        }
                        again = false;
                    }
                    Ok(Ok(_)) => return,
                    Ok(Err(_)) | Err(Dead) => {}
                }
            }
            let pause = self.chance(|random| pause_ms(random, 1_500.0));
            sleep(Duration::from_millis(pause)).await;
            self.gate().await;
        }
    }
}

/// Orders with payments in this state.
fn orders_of(rows: &View<'_>, state: &str) -> Vec<i64> {
    let payments = rows.payments(|_, one| one.state == state).into_iter();
    let orders = payments.filter_map(|(_, one)| one.order);
    let has_row = |id: &i64| rows.has(&Key::Order(*id)) || rows.has(&Key::DeadLetter(*id));
    orders.filter(has_row).collect()
}

fn outcome<T>(asked: &Result<Result<T, OperatorError>, Dead>) -> String {
    match asked {
        Ok(Ok(_)) => "done".to_owned(),
        Ok(Err(error)) => error.to_string(),
        Err(Dead) => "dead".to_owned(),
    }
}
