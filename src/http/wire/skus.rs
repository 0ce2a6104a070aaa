//! The JSON of SKUs.

use std::fmt;
use std::ops::RangeInclusive;

use serde::{Deserialize, Serialize};

use super::json::from_object;
use super::time::{self, Time};
use crate::http::problem::Problem;
use crate::order::draw::{Beacon, Commitment};
use crate::order::{Currency, SkuId, UnixMillis};
use crate::state::stock::{
    DayTime, DayWindow, DrawTerms, SaleTerms, Sku, WAITLIST_MAX_DEFAULT, WaitlistTerms,
};

/// A SKU as operators see it.
#[derive(Debug, Serialize)]
pub struct OperatorSkuView {
    #[serde(flatten)]
    sku: SkuView,
    /// Whether an operator has paused this SKU, other than with every sale.
    paused: bool,
    /// Why its sale is paused, if the database refuses its counters: resuming cannot help until its row is mended.
    counters_refused: Option<CountersRefusedView>,
}

#[derive(Debug, Serialize)]
struct CountersRefusedView {
    /// The database's message at the last attempt.
    reason: String,
    /// Acknowledged orders that are parked.
    parked: u64,
}

impl OperatorSkuView {
    /// A SKU as it is now. `all_paused`: every sale is paused.
    pub fn of(sku: &Sku, all_paused: bool) -> Self {
        let refused = sku.fault().refused();
        OperatorSkuView {
            sku: SkuView::of(sku, all_paused),
            paused: sku.is_paused(),
            counters_refused: refused.map(|refused| CountersRefusedView {
                reason: refused.reason.to_string(),
                parked: refused.parked,
            }),
        }
    }
}

/// The answer to a `PUT` of a SKU.
#[derive(Debug, Serialize)]
pub struct PutSkuView {
    #[serde(flatten)]
    sku: OperatorSkuView,
    /// The terms that differ from before. A term that was left out takes its default.
    changed: Vec<&'static str>,
}

impl PutSkuView {
    /// A SKU after the change, with the changed terms.
    pub fn of(sku: OperatorSkuView, changed: Vec<&'static str>) -> Self {
        PutSkuView { sku, changed }
    }
}

/// The draw of a SKU.
#[derive(Debug, Serialize)]
struct DrawView {
    allocation: &'static str,
    draw_at: Time,
    draw_beacon: Option<String>,
    /// SHA-256 of the seed.
    draw_commitment: Option<Commitment>,
}

impl DrawView {
    fn of(sku: &Sku) -> Option<Self> {
        let terms = sku.terms();
        let draw = terms.draw.as_ref()?;
        Some(DrawView {
            allocation: DRAW,
            draw_at: Time(draw.at),
            draw_beacon: draw.beacon.clone(),
            draw_commitment: sku.draw().map(|draw| draw.commitment()),
        })
    }
}

/// A SKU in an answer of either plane.
#[derive(Debug, Serialize)]
pub struct SkuView {
    sku_id: SkuId,
    title: String,
    unit_price: i64,
    currency: Currency,
    total: u32,
    free: u32,
    held: u32,
    sold: u32,
    state: &'static str,
    opens_at: Option<Time>,
    closes_at: Option<Time>,
    per_user_limit: Option<u32>,
    /// Orders that wait for units.
    waiting: usize,
    waitlist_max: u32,
    waitlist_skips: bool,
    waitlist_payment_ttl_ms: Option<u64>,
    assign_between: Option<[String; 2]>,
    #[serde(flatten)]
    draw: Option<DrawView>,
    now: Time,
}

impl SkuView {
    /// A SKU as it is now. `all_paused`: every sale is paused.
    pub fn of(sku: &Sku, all_paused: bool) -> Self {
        let now = UnixMillis::now();
        let terms = sku.terms();
        let stock = sku.stock();
        SkuView {
            sku_id: SkuId::clone(&sku.id),
            title: terms.title.clone(),
            unit_price: terms.unit_price,
            currency: terms.currency,
            total: stock.total,
            free: stock.free,
            held: stock.held,
            sold: stock.sold,
            state: if all_paused {
                "paused"
            } else {
                sku.state(now).as_str()
            },
            opens_at: terms.opens_at.map(Time),
            closes_at: terms.closes_at.map(Time),
            per_user_limit: terms.per_user_limit,
            waiting: sku.waitlist().waiting(),
            waitlist_max: terms.waitlist.max,
            waitlist_skips: terms.waitlist.skips,
            waitlist_payment_ttl_ms: terms.waitlist.payment_ttl_ms,
            assign_between: terms
                .waitlist
                .assign_between
                .map(|between| [between.from.to_string(), between.to.to_string()]),
            draw: DrawView::of(sku),
            now: Time(now),
        }
    }
}

#[derive(Debug, Deserialize)]
struct SkuMembers {
    #[serde(default)]
    title: Option<String>,
    unit_price: i64,
    currency: String,
    total: u32,
    #[serde(default)]
    per_user_limit: Option<u32>,
    #[serde(default)]
    opens_at: Option<String>,
    #[serde(default)]
    closes_at: Option<String>,
    #[serde(default)]
    waitlist_max: Option<u32>,
    #[serde(default)]
    waitlist_skips: bool,
    #[serde(default)]
    waitlist_payment_ttl_ms: Option<u64>,
    #[serde(default)]
    assign_between: Option<Vec<String>>,
    #[serde(default)]
    allocation: Option<String>,
    #[serde(default)]
    draw_at: Option<String>,
    #[serde(default)]
    draw_beacon: Option<String>,
}

/// The body of `PUT /admin/v1/skus/{sku_id}`, checked.
#[derive(Debug)]
pub struct SkuBody {
    /// The terms of the sale.
    pub terms: SaleTerms,
    /// Units on offer.
    pub total: u32,
}

/// The `allocation` of a SKU that is drawn.
const DRAW: &str = "draw";
/// Longest name of a beacon in characters.
const BEACON_NAME_MAX: usize = 256;
/// Longest title in bytes.
const TITLE_BYTES_MAX: usize = 200;
/// Most orders that a waiting list may have.
const WAITLIST_MAX_MOST: u32 = 10_000_000;
/// Times to pay after assignment, as of `orders.payment_ttl_ms`.
const PAYMENT_TTL_MS: RangeInclusive<u64> = 1_000..=31_536_000_000;

impl SkuBody {
    /// Parses and checks a body; a missing title is the id.
    ///
    /// # Errors
    /// As [`super::orders::OrderBody::parse`].
    pub fn parse(id: &SkuId, body: &[u8]) -> Result<Self, Problem> {
        let members: SkuMembers = from_object(body)?;
        let field = |name: &str, what: &dyn fmt::Display| {
            Problem::new(400, "invalid_field", format!("{name}: {what}"))
        };
        let moment = |name: &'static str, text: Option<String>| match text {
            None => Ok(None),
            Some(text) => time::parse(&text).map(Some).map_err(|e| field(name, &e)),
        };
        let title = members.title.unwrap_or_else(|| id.to_string());
        if title.len() > TITLE_BYTES_MAX || title.contains('\0') {
            return Err(field(
                "title",
                &format!("must be at most {TITLE_BYTES_MAX} bytes, without NUL"),
            ));
        }
        if members.unit_price < 0 {
            return Err(field("unit_price", &"must be 0 or more, in minor units"));
        }
        if members.per_user_limit == Some(0) {
            return Err(field(
                "per_user_limit",
                &"must be 1 or more; leave it out for none",
            ));
        }
        let (opens_at, closes_at) = (
            moment("opens_at", members.opens_at)?,
            moment("closes_at", members.closes_at)?,
        );
        if let (Some(opens_at), Some(closes_at)) = (opens_at, closes_at)
            && closes_at <= opens_at
        {
            return Err(field("closes_at", &"must be after opens_at"));
        }
        let draw_at = moment("draw_at", members.draw_at)?;
        let draw = match members.allocation.as_deref() {
            Some(DRAW) => {
                let at = draw_at
                    .ok_or_else(|| field("draw_at", &"allocation is draw, so it must be there"))?;
                let is_within = opens_at.is_some_and(|opens_at| opens_at < at)
                    && closes_at.is_some_and(|closes_at| at <= closes_at);
                if !is_within {
                    let what = "must be after opens_at, and not after closes_at; a draw needs both";
                    return Err(field("draw_at", &what));
                }
                let beacon = members.draw_beacon;
                if beacon.as_deref().is_some_and(|name| !is_beacon_name(name)) {
                    let what = format!("must be 1 to {BEACON_NAME_MAX} characters on one line");
                    return Err(field("draw_beacon", &what));
                }
                Some(DrawTerms { at, beacon })
            }
            None => match (draw_at, &members.draw_beacon) {
                (None, None) => None,
                (Some(_), _) => {
                    return Err(field("draw_at", &"goes only with \"allocation\": \"draw\""));
                }
                (None, Some(_)) => {
                    return Err(field(
                        "draw_beacon",
                        &"goes only with \"allocation\": \"draw\"",
                    ));
                }
            },
            Some(_) => {
                let what = "must be \"draw\"; leave it out for first come, first served";
                return Err(field("allocation", &what));
            }
        };
        let waitlist = WaitlistTerms {
            max: members.waitlist_max.unwrap_or(WAITLIST_MAX_DEFAULT),
            skips: members.waitlist_skips,
            payment_ttl_ms: members.waitlist_payment_ttl_ms,
            assign_between: match &members.assign_between {
                None => None,
                Some(between) => {
                    Some(day_window(between).map_err(|what| field("assign_between", &what))?)
                }
            },
        };
        if waitlist.max > WAITLIST_MAX_MOST {
            let what = format!("must be 0 to {WAITLIST_MAX_MOST}");
            return Err(field("waitlist_max", &what));
        }
        if waitlist
            .payment_ttl_ms
            .is_some_and(|ttl_ms| !PAYMENT_TTL_MS.contains(&ttl_ms))
        {
            let (least, most) = (PAYMENT_TTL_MS.start(), PAYMENT_TTL_MS.end());
            let what = format!("must be {least} to {most}");
            return Err(field("waitlist_payment_ttl_ms", &what));
        }
        Ok(SkuBody {
            terms: SaleTerms {
                title,
                unit_price: members.unit_price,
                currency: Currency::new(&members.currency).map_err(|e| field("currency", &e))?,
                per_user_limit: members.per_user_limit,
                opens_at,
                closes_at,
                waitlist,
                draw,
            },
            total: members.total,
        })
    }
}

fn is_beacon_name(name: &str) -> bool {
    (1..=BEACON_NAME_MAX).contains(&name.chars().count()) && !name.chars().any(char::is_control)
}

/// The body of `POST /admin/v1/skus/{sku_id}/draw`.
#[derive(Debug, Deserialize)]
pub struct DrawBody {
    beacon: String,
}

impl DrawBody {
    /// Parses and checks a body: the beacon.
    ///
    /// # Errors
    /// As [`super::orders::OrderBody::parse`].
    pub fn parse(body: &[u8]) -> Result<Beacon, Problem> {
        let body: Self = from_object(body)?;
        Beacon::new(&body.beacon)
            .map_err(|e| Problem::new(400, "invalid_field", format!("beacon: {e}")))
    }
}

/// Reads a part of the day.
fn day_window(between: &[String]) -> Result<DayWindow, String> {
    let [from, to] = between else {
        return Err("must be two times of day, from and to".to_owned());
    };
    let time = |text: &str| {
        DayTime::parse(text).ok_or_else(|| {
            format!("{text:?} is no time of day with an offset, such as 09:00+08:00")
        })
    };
    let window = DayWindow::new(time(from)?, time(to)?);
    window.ok_or_else(|| "must be two different times of day; leave it out for always".to_owned())
}

/// The body of `POST /admin/v1/skus/{sku_id}/restock`.
#[derive(Debug, Deserialize)]
pub struct RestockBody {
    /// Units to add; a negative number removes units.
    pub quantity: i64,
}

impl RestockBody {
    /// Parses and checks a body.
    ///
    /// # Errors
    /// As [`super::orders::OrderBody::parse`].
    pub fn parse(body: &[u8]) -> Result<Self, Problem> {
        let body: Self = from_object(body)?;
        if body.quantity == 0 || body.quantity.unsigned_abs() > u64::from(u32::MAX) {
            return Err(Problem::new(
                400,
                "invalid_field",
                "quantity: must be a number of units other than 0 and within 4294967295",
            ));
        }
        Ok(body)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sku_is_checked_member_by_member() {
        let id = SkuId::new("A").unwrap();
        let parse = |body: &str| SkuBody::parse(&id, body.as_bytes());
        let body = parse(r#"{"unit_price":100,"currency":"EUR","total":5,"opens_at":"2026-11-11T20:00:00+08:00"}"#).unwrap();
        assert_eq!(body.terms.title, "A");
        assert_eq!(
            body.terms.opens_at.unwrap().to_string(),
            "2026-11-11T12:00:00.000Z"
        );
        for (bad, named) in [
            (
                r#"{"unit_price":-1,"currency":"EUR","total":5}"#,
                "unit_price",
            ),
            (r#"{"unit_price":1,"currency":"eur","total":5}"#, "currency"),
            (
                r#"{"unit_price":1,"currency":"EUR","total":4294967296}"#,
                "4294967296",
            ),
            (
                r#"{"unit_price":1,"currency":"EUR","total":1,"per_user_limit":0}"#,
                "per_user_limit",
            ),
            (
                r#"{"unit_price":1,"currency":"EUR","total":1,"opens_at":"tomorrow"}"#,
                "opens_at",
            ),
            (
                r#"{"unit_price":1,"currency":"EUR","total":1,"waitlist_max":10000001}"#,
                "waitlist_max",
            ),
            (
                r#"{"unit_price":1,"currency":"EUR","total":1,"waitlist_payment_ttl_ms":999}"#,
                "waitlist_payment_ttl_ms",
            ),
            (
                r#"{"unit_price":1,"currency":"EUR","total":1,"assign_between":["9:00","22:00Z"]}"#,
                "assign_between",
            ),
            (
                r#"{"unit_price":1,"currency":"EUR","total":1,"assign_between":["09:00Z"]}"#,
                "assign_between",
            ),
            (
                r#"{"unit_price":1,"currency":"EUR","total":1,"assign_between":["09:00Z","17:00+08:00"]}"#,
                "assign_between",
            ),
            (
                r#"{"unit_price":1,"currency":"EUR","total":1,"allocation":"lottery"}"#,
                "allocation",
            ),
            (
                r#"{"unit_price":1,"currency":"EUR","total":1,"draw_at":"2026-12-01T12:00:00Z"}"#,
                "draw_at",
            ),
            (
                r#"{"unit_price":1,"currency":"EUR","total":1,"allocation":"draw","draw_at":"2026-12-01T12:00:00Z"}"#,
                "draw_at",
            ),
            (
                r#"{"unit_price":1,"currency":"EUR","total":1,"allocation":"draw","draw_at":"2026-12-01T12:00:00Z",
                    "opens_at":"2026-12-01T11:00:00Z","closes_at":"2026-12-01T13:00:00Z","draw_beacon":""}"#,
                "draw_beacon",
            ),
        ] {
            let problem = parse(bad).unwrap_err();
            assert!(problem.detail.contains(named), "{}", problem.detail);
        }
    }
}
