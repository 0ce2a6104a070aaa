//! The plan of a load, as a value.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::error::LoadError;
use super::platform::{Signer, WebhookSecret};
use super::rate::RateProfile;

/// The longest `Idempotency-Key` and `user_id` of the contract.
const KEY_BYTES_MAX: usize = 64;
const USER_BYTES_MAX: usize = 48;
const SKU_BYTES_MAX: usize = 32;

const DAY_MS: u64 = 86_400_000;

/// Everything that decides a load. Two runs of one plan send the same requests, due at the same moments.
///
/// Start from [`LoadPlan::new`] and set what differs; [`LoadPlan::check`] (which a run calls
/// first) refuses in one sentence a plan that cannot work.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LoadPlan {
    /// The data plane, `http://host:port` with an optional path before `/v1`.
    pub target: String,
    /// Other nodes of the same sale. Connections are spread over all of them; one that cannot be reached is passed over.
    pub more_targets: Vec<String>,
    /// Bearer token of the data plane; never written to a report.
    #[serde(skip_serializing)]
    pub token: Option<Token>,
    /// The control plane; kept with the plan for later use, a load does not call it yet.
    pub control_target: Option<String>,
    /// Bearer token of the control plane; never written to a report.
    #[serde(skip_serializing)]
    pub control_token: Option<Token>,
    /// SKUs with their shares of the clicks. Unused with `orders`.
    pub skus: Vec<SkuShare>,
    /// How many different buyers there are, at least 1.
    pub buyers: u32,
    /// Each click is a new buyer until all have clicked once; then earlier buyers, drawn at
    /// random, click again with their same key and body. Without it each click draws a buyer and
    /// a SKU at random.
    pub one_order_per_buyer: bool,
    /// The share of clicks that are double clicks, 0 to 1: the same request (user, key, body) is
    /// due again within [`double_click_ms_max`](Self::double_click_ms_max), so often while the
    /// first is in flight. Both count towards the rate.
    pub double_click_share: f64,
    /// The longest pause between the two requests of a double click, in milliseconds, at most
    /// 60,000.
    pub double_click_ms_max: u64,
    /// Units in each order, 1 to 10,000.
    pub quantity: u32,
    /// Buyers join the waiting list if no units are free, and pay once they are assigned some.
    pub waitlist: bool,
    /// How long after the last answer buyers wait for units, in milliseconds, at most a day. They give up
    /// earlier if no units of their SKU can come back any more.
    pub waitlist_after_ms: u64,
    /// Whether answers wait for the database or only for the queue.
    pub mode: OrderMode,
    /// Seconds to wait (`Prefer: wait=N`); none leaves it to the server.
    pub wait_s: Option<u32>,
    /// Requests a second over time.
    pub rate: RateProfile,
    /// How long requests fall due, in milliseconds; none only if `orders` or `requests_max` ends the load.
    pub duration_ms: Option<u64>,
    /// At most this many requests.
    pub requests_max: Option<u64>,
    /// Connections, kept alive. A request that finds none free waits, and its latency counts the wait.
    pub connections: usize,
    /// Threads of the generator, each with its part of the connections; one sends some tens of
    /// thousands of requests a second. None: a quarter of the cores.
    pub threads: Option<usize>,
    /// Decides buyers, SKUs and double clicks.
    pub seed: u64,
    /// How long to wait for an answer, in milliseconds, from the moment a request is sent. One
    /// that could not even be sent for as long is given up and counted. A callback is given up
    /// after 5 s at the latest.
    pub request_timeout_ms: u64,
    /// How long a buyer repeats a click under its key, in milliseconds from the moment at which it was due, if the
    /// connection broke or the answer says to ask again (`421`, `503`). 0: never.
    pub repeat_ms: u64,
    /// A file of orders to replay in place of made-up clicks: one JSON object a line, the body of
    /// `POST /v1/orders`, with an optional `idempotency_key` that goes to the header.
    pub orders: Option<PathBuf>,
    /// Look at each SKU before the load and about every 100 ms during it.
    pub watch_stock: bool,
    /// Look about every 100 ms which node has which lane.
    pub watch_lanes: bool,
    /// Keep the answer to every request, about 48 bytes a request.
    pub keep_outcomes: bool,
    /// How long to ask for the final status of `undecided` orders after the load, in milliseconds.
    pub follow_up_ms: u64,
    /// The share of placed orders that are paid, 0 to 1, through callbacks of the payment platform
    /// to the target; 0 sends none.
    pub pay_share: f64,
    /// The secret that the platform signs its callbacks with; never written to a report.
    #[serde(skip_serializing)]
    pub payment_secret: Option<WebhookSecret>,
    /// How long after the last answer payments may still fall due and be retried, in milliseconds,
    /// at most a day. Payments after an order's `expires_at` are sent only if that lies within.
    pub pay_grace_ms: u64,
    /// Connections of the payment platform, 1 to 1,000, and so the most callbacks under way at once. With too
    /// few, the latency under a flood is that of the platform's own queue.
    pub pay_connections: usize,
    /// How long after the last answer stock is still looked at, in milliseconds, at most a day: an
    /// expired order's units come back only then.
    pub watch_after_ms: u64,
    /// Begins each `user_id`: `u-` gives `u-000123`. Another prefix makes other buyers.
    pub user_prefix: String,
    /// Begins each `Idempotency-Key`: `k-` gives `k-000123-IPHONE-15`.
    pub key_prefix: String,
}

impl Default for LoadPlan {
    fn default() -> Self {
        Self {
            target: "http://127.0.0.1:8080".to_owned(),
            more_targets: Vec::new(),
            token: None,
            control_target: None,
            control_token: None,
            skus: Vec::new(),
            buyers: 100_000,
            one_order_per_buyer: false,
            double_click_share: 0.0,
            double_click_ms_max: 50,
            quantity: 1,
            waitlist: false,
            waitlist_after_ms: 60_000,
            mode: OrderMode::Wait,
            wait_s: None,
            rate: RateProfile::Constant { per_second: 1000.0 },
            duration_ms: Some(10_000),
            requests_max: None,
            connections: 256,
            threads: None,
            seed: 1,
            request_timeout_ms: 10_000,
            repeat_ms: 0,
            orders: None,
            watch_stock: true,
            watch_lanes: false,
            keep_outcomes: false,
            follow_up_ms: 30_000,
            pay_share: 0.0,
            payment_secret: None,
            pay_grace_ms: 10_000,
            pay_connections: 256,
            watch_after_ms: 0,
            user_prefix: "u-".to_owned(),
            key_prefix: "k-".to_owned(),
        }
    }
}

impl LoadPlan {
    /// A plan with the defaults against `target`: 1,000 requests a second for 10 s. It still needs
    /// SKUs or a file of orders.
    pub fn new(target: impl Into<String>) -> Self {
        Self {
            target: target.into(),
            ..Self::default()
        }
    }

    /// Adds a SKU with its share of the clicks; the shares need not add up to anything.
    pub fn with_sku(mut self, sku_id: impl Into<String>, weight: f64) -> Self {
        self.skus.push(SkuShare {
            sku_id: sku_id.into(),
            weight,
        });
        self
    }

    /// Refuses a plan that cannot work, before anything is sent.
    pub fn check(&self) -> Result<(), LoadError> {
        let bad = |reason: &str| Err(LoadError::BadPlan(reason.to_owned()));
        if self.orders.is_none() {
            if self.skus.is_empty() {
                return bad("it names no SKU; give at least one, like IPHONE-15=90");
            }
            if self.skus.len() > usize::from(u16::MAX) {
                return bad("it names more than 65535 SKUs");
            }
            if !self
                .skus
                .iter()
                .all(|s| s.weight.is_finite() && s.weight >= 0.0)
                || !self.skus.iter().any(|s| s.weight > 0.0)
            {
                return bad("the shares of the SKUs must not be negative, and one must be above 0");
            }
            if let Some(sku) = self.skus.iter().find(|s| !fits(&s.sku_id, SKU_BYTES_MAX)) {
                return Err(LoadError::BadPlan(format!(
                    "{:?} is no SKU: 1 to {SKU_BYTES_MAX} visible ASCII characters",
                    sku.sku_id
                )));
            }
            let longest = self.skus.iter().map(|s| s.sku_id.len()).max().unwrap_or(0);
            // Ten digits are the longest that a 32-bit buyer can have.
            if self.user_prefix.len() + 10 > USER_BYTES_MAX
                || self.key_prefix.len() + 11 + longest > KEY_BYTES_MAX
                || !visible(&self.user_prefix)
                || !visible(&self.key_prefix)
            {
                return bad("the prefixes of users and keys are too long or not visible ASCII");
            }
        }
        if self.buyers == 0 {
            return bad("it has no buyers; give at least 1");
        }
        if !(0.0..=1.0).contains(&self.double_click_share) {
            return bad("the share of double clicks must be from 0 to 1");
        }
        if self.double_click_ms_max > 60_000 {
            return bad("the pause of a double click must be at most 60000 ms");
        }
        if !(1..=10_000).contains(&self.quantity) {
            return bad("the quantity of an order must be from 1 to 10000");
        }
        if self.connections == 0 || self.connections > 60_000 {
            return bad("the connections must be from 1 to 60000");
        }
        if self.threads == Some(0) {
            return bad("it has no threads; give at least 1, or leave it out");
        }
        if self.request_timeout_ms == 0 {
            return bad("the timeout of a request must be at least 1 ms");
        }
        if !(0.0..=1.0).contains(&self.pay_share) {
            return bad("the share of orders that are paid must be from 0 to 1");
        }
        if self.pay_share > 0.0 {
            self.signer()?;
        }
        if self.pay_grace_ms > DAY_MS
            || self.watch_after_ms > DAY_MS
            || self.waitlist_after_ms > DAY_MS
            || self.repeat_ms > DAY_MS
        {
            return bad("what comes after the last answer must be over within a day");
        }
        if !(1..=1000).contains(&self.pay_connections) {
            return bad("the connections of the payment platform must be from 1 to 1000");
        }
        if self.duration_ms.is_none() {
            if self.orders.is_none() && self.requests_max.is_none() {
                return bad("it never ends; give a duration or a number of requests");
            }
            if matches!(self.rate, RateProfile::Ramp { .. }) {
                return bad("a ramp needs a duration to stretch over");
            }
        }
        Ok(())
    }

    /// The signer of callbacks.
    pub(super) fn signer(&self) -> Result<Signer, LoadError> {
        let secret = self.payment_secret.as_ref().ok_or_else(|| {
            LoadError::BadPlan(
                "payments need the secret of their signatures; give the server's payments.standard.secret"
                    .to_owned(),
            )
        })?;
        secret.signer().map_err(|what| {
            LoadError::BadPlan(format!(
                "the payment secret cannot be used: {what}; give the server's payments.standard.secret"
            ))
        })
    }

    /// The `Prefer` header of a request in this mode, if it has one.
    pub(super) fn prefer(&self, mode: OrderMode) -> Option<String> {
        match (mode, self.wait_s) {
            (OrderMode::Wait | OrderMode::Mixed, None) => None,
            (OrderMode::Wait | OrderMode::Mixed, Some(s)) => Some(format!("wait={s}")),
            (OrderMode::RespondAsync, None) => Some("respond-async".to_owned()),
            (OrderMode::RespondAsync, Some(s)) => Some(format!("respond-async, wait={s}")),
        }
    }

    /// Threads to use on this machine, never more than there are connections.
    pub(super) fn threads_here(&self) -> usize {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        self.threads
            .unwrap_or((cores / 4).max(1))
            .min(self.connections)
            .max(1)
    }
}

/// A SKU and its share of the clicks, written like `IPHONE-15=90`; without a number the share is 1.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SkuShare {
    /// The SKU.
    pub sku_id: String,
    /// Its share, relative to the shares of the others.
    pub weight: f64,
}

impl FromStr for SkuShare {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        // A SKU may itself contain `=`, so the last one parts it from its share.
        let (sku_id, weight) = match text.rsplit_once('=') {
            None => (text, 1.0),
            Some((sku_id, weight)) => match weight.trim_end_matches('%').parse::<f64>() {
                Ok(weight) if weight.is_finite() && weight >= 0.0 => (sku_id, weight),
                _ => {
                    return Err(format!(
                        "{weight:?} is not a share of clicks; write it like IPHONE-15=90"
                    ));
                }
            },
        };
        if fits(sku_id, SKU_BYTES_MAX) {
            Ok(Self {
                sku_id: sku_id.to_owned(),
                weight,
            })
        } else {
            Err(format!(
                "{sku_id:?} is no SKU: 1 to {SKU_BYTES_MAX} visible ASCII characters, like IPHONE-15=90"
            ))
        }
    }
}

/// Which of the two order models the requests ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OrderMode {
    /// The answer waits for the database.
    #[default]
    Wait,
    /// `Prefer: respond-async`: the answer waits for the queue only.
    RespondAsync,
    /// Every second buyer the one, the others the other.
    Mixed,
}

impl FromStr for OrderMode {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "wait" => Ok(Self::Wait),
            "async" | "respond-async" => Ok(Self::RespondAsync),
            "mixed" => Ok(Self::Mixed),
            _ => Err(format!(
                "{text:?} is no order mode; write wait, async or mixed"
            )),
        }
    }
}

/// A bearer token that no log and no report shows.
#[derive(Clone, PartialEq, Eq, Deserialize)]
#[serde(transparent)]
pub struct Token(String);

impl Token {
    /// Wraps the token's text.
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// The value of the `Authorization` header.
    pub(super) fn header(&self) -> String {
        format!("Bearer {}", self.0)
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(…)")
    }
}

fn visible(text: &str) -> bool {
    text.bytes().all(|b| b.is_ascii_graphic())
}

fn fits(text: &str, bytes_max: usize) -> bool {
    (1..=bytes_max).contains(&text.len()) && visible(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_read_like_flags() {
        let share: SkuShare = "IPHONE-15=90".parse().unwrap();
        assert_eq!((share.sku_id.as_str(), share.weight), ("IPHONE-15", 90.0));
        assert_eq!("A".parse::<SkuShare>().unwrap().weight, 1.0);
        assert_eq!("A=5%".parse::<SkuShare>().unwrap().weight, 5.0);
        for text in ["", "=5", "A=x", "A=-1", "A B=1", "A=nan"] {
            assert!(text.parse::<SkuShare>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_plan_that_cannot_run_says_why() {
        let good = LoadPlan::new("http://127.0.0.1:1").with_sku("A", 1.0);
        assert!(good.check().is_ok());
        let spoil: [fn(&mut LoadPlan); 13] = [
            |p| p.skus.clear(),
            |p| p.skus[0].weight = 0.0,
            |p| p.buyers = 0,
            |p| p.double_click_share = 1.5,
            |p| p.quantity = 0,
            |p| p.connections = 0,
            |p| p.duration_ms = None,
            |p| p.key_prefix = "k".repeat(60),
            |p| p.request_timeout_ms = 0,
            |p| p.pay_share = 1.5,
            |p| p.pay_share = 0.5,
            |p| {
                p.pay_share = 0.5;
                p.payment_secret = Some(WebhookSecret::new("whsec_short"));
            },
            |p| p.pay_connections = 0,
        ];
        for (number, spoil) in spoil.iter().enumerate() {
            let mut plan = good.clone();
            spoil(&mut plan);
            assert!(plan.check().is_err(), "{number}");
        }
    }

    #[test]
    fn a_plan_survives_serde_without_its_secrets() {
        let mut plan = LoadPlan::new("http://127.0.0.1:1").with_sku("A", 1.0);
        plan.token = Some(Token::new("hidden"));
        plan.payment_secret = Some(WebhookSecret::new("whsec_hidden"));
        plan.rate = "ramp:1..2".parse().unwrap();
        let text = serde_json::to_string(&plan).unwrap();
        assert!(!text.contains("hidden"));
        assert!(!format!("{plan:?}").contains("hidden"));
        let back: LoadPlan = serde_json::from_str(&text).unwrap();
        plan.token = None;
        plan.payment_secret = None;
        assert_eq!(back, plan);
    }
}
