//! What every buyer was told, against every row. The judge believes neither the server's counters
//! nor its audit alone: it reads the public view `order_list` and the buyers' own answers.

use std::collections::HashMap;

use serde_json::Value;

use super::payments::{self, OrderRow};
use crate::loadgen::{AnswerKind, Check, LoadReport, Outcome};
use crate::order::OrderStatus;
use crate::pipeline::admin::audit::LIVE_CHECK;
use crate::store::postgres::Database;

/// One buyer's clicks on one SKU.
type Buyer = (String, String);

/// What a buyer's clicks add up to.
#[derive(Default)]
struct BuyerView {
    /// An order that an answer named as placed.
    placed: Option<u64>,
    /// Two answers named different orders.
    two_orders: bool,
    /// An undecided order that nobody could settle.
    unsettled: bool,
    /// An undecided order that turned out not to exist.
    settled_as_none: bool,
    /// No answer came, so the buyer knows nothing.
    in_the_dark: bool,
    /// Told to come back later, for want of room or time.
    turned_away: bool,
    /// The last definite answer was that there is no order.
    told_no: bool,
}

impl BuyerView {
    fn hear(&mut self, told: &Outcome<'_>) {
        match told.kind {
            AnswerKind::Created | AnswerKind::Accepted | AnswerKind::Replayed => {
                self.name(told.order_id)
            }
            AnswerKind::Undecided => match told.final_status {
                Some("unknown_order") => self.settled_as_none = true,
                Some(_) => self.name(told.order_id),
                None => self.unsettled = true,
            },
            AnswerKind::RateLimited | AnswerKind::Unavailable | AnswerKind::TimedOut => {
                self.turned_away = true;
                self.told_no = true;
            }
            AnswerKind::SoldOut | AnswerKind::Refused | AnswerKind::ClientError => {
                self.told_no = true;
            }
            AnswerKind::ServerError | AnswerKind::Transport => self.in_the_dark = true,
        }
    }

    fn name(&mut self, order_id: Option<u64>) {
        self.two_orders |= self.placed.is_some() && self.placed != order_id;
        self.placed = order_id;
    }
}

/// Judges the sale of the buyers whose ids begin with `user_prefix`; an answer may take
/// `answer_ms_max` from the moment that a click was sent. `audit_before` is of the time before the
/// first click.
pub async fn judge(
    database: &Database,
    report: &LoadReport,
    user_prefix: &str,
    audit_before: &Value,
    audit: &Value,
    answer_ms_max: f64,
) -> anyhow::Result<Vec<Check>> {
    let mut heard: HashMap<Buyer, BuyerView> = HashMap::new();
    for told in report.outcomes.iter().flat_map(|outcomes| outcomes.iter()) {
        heard
            .entry((told.user.to_string(), told.sku.to_owned()))
            .or_default()
            .hear(&told);
    }

    let mut rows = 0_u64;
    let mut second_rows = Vec::new();
    let mut untold_rows = Vec::new();
    let mut wrong_rows = Vec::new();
    let mut found: HashMap<Buyer, u64> = HashMap::new();
    let mut order_rows = Vec::new();
    database
        .read_orders(|order| {
            if !order.user_id.starts_with(user_prefix) {
                return;
            }
            rows += 1;
            let id = order.id.get();
            let buyer = (order.user_id.clone(), order.sku_id.clone());
            order_rows.push(OrderRow {
                order_id: id,
                amount: order.amount,
                status: order.status,
            });
            match heard.get(&buyer) {
                Some(told) if told.placed == Some(id) => {
                    if order.quantity != 1 || !is_of_a_sale(order.status) {
                        wrong_rows.push(id);
                    }
                }
                Some(told)
                    if told.placed.is_none()
                        && !told.told_no
                        && (told.in_the_dark || told.unsettled) => {}
                _ => untold_rows.push(id),
            }
            if found.insert(buyer, id).is_some() {
                second_rows.push(id);
            }
        })
        .await?;

    let count =
        |condition: fn(&BuyerView) -> bool| heard.values().filter(|told| condition(told)).count();
    let placed = count(|told| told.placed.is_some());
    let missing: Vec<u64> = heard
        .iter()
        .filter_map(|(buyer, told)| told.placed.filter(|id| found.get(buyer) != Some(id)))
        .collect();
    let two_orders = count(|told| told.two_orders);
    let settled_as_none = count(|told| told.settled_as_none && told.placed.is_some());
    let unsettled = count(|told| told.unsettled);

    let unsold = unsold(report, &heard, &found);
    let oversold = audit["skus"]
        .as_array()
        .into_iter()
        .flatten()
        .filter(|sku| {
            let units = |name: &str| sku[name].as_i64().unwrap_or(i64::MAX);
            units("held_by_orders").saturating_add(units("sold_by_orders")) > units("total")
        });
    let oversold = oversold.count();
    let promise = |name: &str, ok: bool, detail: String| Check {
        name: name.to_owned(),
        ok,
        detail,
    };
    let unanswered = report.count(AnswerKind::Transport) + report.count(AnswerKind::ServerError);
    let slowest_ms =
        report.latency.all.max_ms.unwrap_or(0.0) - report.send_lag.max_ms.unwrap_or(0.0);
    let mut promises = vec![
        promise(
            "Every click was answered, in time",
            unanswered == 0 && slowest_ms <= answer_ms_max,
            format!(
                "{} of {} answered; the slowest took {slowest_ms:.0} ms of at most {answer_ms_max:.0} ms",
                report.offered - unanswered.min(report.offered),
                report.offered
            ),
        ),
        promise(
            "Every unit that was wanted was ordered, and none twice at once",
            unsold == 0 && oversold == 0,
            format!(
                "{rows} orders of one unit; {unsold} units withheld from buyers who wanted them, {oversold} SKUs oversold"
            ),
        ),
        promise(
            "Every buyer who was told yes has exactly that order",
            missing.is_empty()
                && second_rows.is_empty()
                && two_orders == 0
                && wrong_rows.is_empty()
                && settled_as_none == 0,
            format!(
                "{placed} told yes; {} missing, {} with a second order, {} told two orders, {} rows unlike the answer",
                missing.len(),
                second_rows.len(),
                two_orders + settled_as_none,
                wrong_rows.len()
            ),
        ),
        promise(
            "Nobody who was told no has an order",
            untold_rows.is_empty(),
            format!(
                "{} told no; {} rows nobody was told of",
                heard.len() - placed,
                untold_rows.len()
            ),
        ),
        promise(
            "Nobody is left undecided",
            unsettled == 0,
            format!(
                "{} told undecided at first, {unsettled} still",
                report.count(AnswerKind::Undecided)
            ),
        ),
        promise(
            "Double clicks bought once",
            second_rows.is_empty() && two_orders == 0,
            format!(
                "{} double clicks, {} answered with the first click's order",
                report.double_clicks,
                report.count(AnswerKind::Replayed)
            ),
        ),
    ];
    if let Some(payments) = &report.payments {
        promises.extend(payments::judge(payments, &order_rows, audit_before, audit));
    }
    promises.push(promise(
        "The audit of the database agrees",
        audit["ok"] == true && live_compared(audit),
        audit_detail(audit),
    ));
    Ok(promises)
}

/// Whether the audit was of a quiet moment, so that it could hold memory against the rows.
pub fn live_compared(audit: &Value) -> bool {
    let checks = audit["checks"].as_array();
    let mut checks = checks.into_iter().flatten();
    checks.any(|check| check["name"] == LIVE_CHECK)
}

/// Whether an order that was placed can stand here at the end of a sale in which nobody cancels and
/// no row is refused; `payments` says whether it should.
fn is_of_a_sale(status: OrderStatus) -> bool {
    match status {
        OrderStatus::PendingPayment
        | OrderStatus::Paid
        | OrderStatus::Expired
        | OrderStatus::RefundDue
        | OrderStatus::Refunded => true,
        OrderStatus::Accepted
        | OrderStatus::Undecided
        | OrderStatus::Cancelled
        | OrderStatus::Failed => false,
    }
}

/// Units that were never ordered although somebody who wanted one was told that there were none. An
/// order that has meanwhile expired counts: its buyer had the unit and did not pay.
fn unsold(
    report: &LoadReport,
    heard: &HashMap<Buyer, BuyerView>,
    found: &HashMap<Buyer, u64>,
) -> usize {
    let stock = report
        .stock
        .iter()
        .filter_map(|sku| Some((sku, sku.samples.first()?)));
    stock
        .map(|(sku, before)| {
            let of_sku = |buyer: &&Buyer| buyer.1 == sku.sku_id;
            let wanted = heard.keys().filter(of_sku).count();
            let bought = found.keys().filter(of_sku).count();
            let turned_away = heard
                .iter()
                .filter(|(buyer, told)| {
                    of_sku(buyer) && told.placed.is_none() && (told.turned_away || told.in_the_dark)
                })
                .count();
            let could = wanted.min(usize::try_from(before.free).unwrap_or(usize::MAX));
            could.saturating_sub(bought + turned_away)
        })
        .sum()
}

fn audit_detail(audit: &Value) -> String {
    let checks = audit["checks"]
        .as_array()
        .map(Vec::as_slice)
        .unwrap_or_default();
    let broken: Vec<&str> = checks
        .iter()
        .filter(|check| check["ok"] != true)
        .filter_map(|check| check["detail"].as_str())
        .collect();
    if broken.is_empty() {
        format!("{} checks hold", checks.len())
    } else {
        broken.join("; ")
    }
}
