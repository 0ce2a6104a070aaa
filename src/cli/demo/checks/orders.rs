//! Answers to buyers against the rows.

use std::collections::{HashMap, HashSet};

use serde_json::Value;

use super::{Evidence, check};
use crate::loadgen::{AnswerKind, Check, LoadReport};

/// The checks of orders.
pub fn checks(evidence: &Evidence<'_>) -> Vec<Check> {
    let buyers = buyers(evidence.report);
    vec![
        answered_in_time(evidence),
        every_unit_ordered_once(evidence, &buyers),
        told_yes_has_the_order(evidence),
        told_no_has_none(evidence, &buyers),
        nobody_undecided(evidence, &buyers),
        double_clicks_bought_once(evidence),
        nobody_waits_beside_units(evidence),
    ]
}

fn answered_in_time(evidence: &Evidence<'_>) -> Check {
    let (report, answer_ms_max) = (evidence.report, evidence.answer_ms_max);
    let unanswered = report.count(AnswerKind::Transport) + report.count(AnswerKind::ServerError);
    let slowest_ms =
        report.latency.all.max_ms.unwrap_or(0.0) - report.send_lag.max_ms.unwrap_or(0.0);
    check(
        "Every click was answered, in time",
        unanswered == 0 && slowest_ms <= answer_ms_max,
        format!(
            "{} of {} answered; the slowest took {slowest_ms:.0} ms of at most {answer_ms_max:.0} ms",
            report.offered - unanswered.min(report.offered),
            report.offered
        ),
    )
}

fn every_unit_ordered_once(evidence: &Evidence<'_>, buyers: &Buyers<'_>) -> Check {
    let unsold = unsold(evidence, buyers);
    let skus = evidence.audit["skus"].as_array().into_iter().flatten();
    let oversold = skus.filter(|sku| {
        let units = |name: &str| sku[name].as_i64().unwrap_or(i64::MAX);
        units("held_by_orders").saturating_add(units("sold_by_orders")) > units("total")
    });
    let oversold = oversold.count();
    check(
        "Every unit that was wanted was ordered, and none twice at once",
        unsold == 0 && oversold == 0,
        format!(
            "{} orders of one unit; {unsold} units withheld from buyers who wanted them, {oversold} SKUs oversold",
            evidence.rows.orders.len()
        ),
    )
}

fn told_yes_has_the_order(evidence: &Evidence<'_>) -> Check {
    let found = &evidence.orders;
    let rows = evidence.rows.orders.iter();
    let out_of_place = rows.filter(|row| !is_of_a_sale(&row.status)).count() as u64;
    let wrong = found.changed + out_of_place;
    check(
        "Every buyer who was told yes has exactly that order",
        found.lost == 0 && found.second_rows == 0 && found.contradicted == 0 && wrong == 0,
        format!(
            "{} told yes; {} missing, {} with a second order, {} told two orders, {wrong} rows unlike the answer",
            found.acked, found.lost, found.second_rows, found.contradicted
        ),
    )
}

fn told_no_has_none(evidence: &Evidence<'_>, buyers: &Buyers<'_>) -> Check {
    let found = &evidence.orders;
    let untold = found.refused_but_present + found.unexplained;
    check(
        "Nobody who was told no has an order",
        untold == 0,
        format!(
            "{} told no; {untold} rows nobody was told of",
            (buyers.len() as u64).saturating_sub(found.acked)
        ),
    )
}

fn nobody_undecided(evidence: &Evidence<'_>, buyers: &Buyers<'_>) -> Check {
    let unsettled = buyers.values().filter(|view| view.is_undecided).count();
    check(
        "Nobody is left undecided",
        unsettled == 0,
        format!(
            "{} told undecided at first, {unsettled} still",
            evidence.report.count(AnswerKind::Undecided)
        ),
    )
}

fn double_clicks_bought_once(evidence: &Evidence<'_>) -> Check {
    let (report, found) = (evidence.report, &evidence.orders);
    check(
        "Double clicks bought once",
        found.second_rows == 0 && found.contradicted == 0,
        format!(
            "{} double clicks, {} answered with the first click's order",
            report.double_clicks,
            report.count(AnswerKind::Replayed)
        ),
    )
}

fn nobody_waits_beside_units(evidence: &Evidence<'_>) -> Check {
    let skus = || evidence.audit["skus"].as_array().into_iter().flatten();
    let count = |sku: &Value, name: &str| sku[name].as_u64().unwrap_or(0);
    let sum = |name: &str| skus().map(|sku| count(sku, name)).sum::<u64>();
    let beside = skus().filter(|sku| {
        let (units, held) = (count(sku, "total"), count(sku, "held"));
        count(sku, "waiting") > 0 && units > held + count(sku, "sold")
    });
    let beside = beside.count();
    let waited = evidence.report.waitlist.unwrap_or_default();
    check(
        "No unit is free while somebody waits for it",
        beside == 0,
        format!(
            "{} of {} units sold; {} buyers waited, {} of them got a unit that came back, {} wait still",
            sum("sold"),
            sum("total"),
            waited.joined,
            waited.assigned,
            sum("waiting"),
        ),
    )
}

/// Whether an order can have this status at the end of a sale in which nobody cancels and no row is
/// refused. The checks of payments say whether it should.
fn is_of_a_sale(status: &str) -> bool {
    [
        "waitlisted",
        "pending_payment",
        "paid",
        "expired",
        "refund_due",
        "refunded",
    ]
    .contains(&status)
}

/// The answers to one buyer's clicks on one SKU.
#[derive(Default)]
struct BuyerView {
    /// An answer named an order.
    is_placed: bool,
    /// An undecided order stayed undecided.
    is_undecided: bool,
    /// Pushed back for want of room or time, or not answered.
    was_turned_away: bool,
}

/// By user and SKU.
type Buyers<'a> = HashMap<(String, &'a str), BuyerView>;

fn buyers(report: &LoadReport) -> Buyers<'_> {
    let mut buyers = Buyers::new();
    for outcome in report.outcomes.iter().flat_map(|all| all.iter()) {
        let buyer = (outcome.user.to_string(), outcome.sku);
        let view = buyers.entry(buyer).or_default();
        match outcome.kind {
            AnswerKind::Created
            | AnswerKind::Accepted
            | AnswerKind::Waitlisted
            | AnswerKind::Replayed => {
                view.is_placed = true;
            }
            AnswerKind::Undecided => match outcome.final_status {
                Some("unknown_order") => {}
                Some(_) => view.is_placed = true,
                None => view.is_undecided = true,
            },
            AnswerKind::RateLimited
            | AnswerKind::Unavailable
            | AnswerKind::TimedOut
            | AnswerKind::ServerError
            | AnswerKind::Transport => view.was_turned_away = true,
            AnswerKind::SoldOut | AnswerKind::Refused | AnswerKind::ClientError => {}
        }
    }
    buyers
}

/// Units that were never ordered although a buyer who wanted one was told that there were none. An order
/// that has meanwhile expired counts: its buyer had the unit and did not pay.
fn unsold(evidence: &Evidence<'_>, buyers: &Buyers<'_>) -> usize {
    let rows = evidence.rows.orders.iter();
    let bought: HashSet<(&str, &str)> = rows
        .map(|row| (row.user.as_str(), row.sku.as_str()))
        .collect();
    let stock = evidence.report.stock.iter();
    let stock = stock.filter_map(|sku| Some((sku.sku_id.as_str(), sku.samples.first()?.free)));
    stock
        .map(|(sku_id, free)| {
            let wanted = buyers.keys().filter(|(_, sku)| *sku == sku_id).count();
            let bought = bought.iter().filter(|(_, sku)| *sku == sku_id).count();
            let turned_away = buyers
                .iter()
                .filter(|((_, sku), view)| {
                    *sku == sku_id && !view.is_placed && view.was_turned_away
                })
                .count();
            let could = wanted.min(usize::try_from(free).unwrap_or(usize::MAX));
            could.saturating_sub(bought + turned_away)
        })
        .sum()
}
