//! The sale: a catalogue, a rush of buyers who pay or do not, and the wait until all is settled.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::catalogue::{CATALOGUE, CURRENCY};
use super::result::publish;
use super::service::Service;
use super::status::{LINE_EVERY, clear, status};
use super::{DemoArgs, PAYMENT_TTL_MS, checks};
use crate::cli::client::call_with_token;
use crate::cli::signals::Signals;
use crate::loadgen::{
    Check, KilledNode, LoadPlan, LoadReport, OrderMode, PaymentKind, RateProfile, StderrProgress,
    Token, WebhookSecret, run_until,
};
use crate::logging::say;
use crate::order::UnixMillis;
use crate::store::cluster::stock;

/// The share of orders that are paid.
const PAY_SHARE: f64 = 0.7;
/// Callbacks under way at once. With 256 their latency was that of the platform's own queue.
const PAY_CONNECTIONS: usize = 1_000;

/// Orders on a waiting list at most: every buyer of a demo may wait.
const WAITLIST_MAX: u32 = 5_000_000;
/// How long a buyer who waited has to pay. Three of ten do not, and their units come back again.
const ASSIGNED_TTL_MS: u64 = 4_000;
/// How long after the rush units may go on coming back.
const REFLOW_MS_MAX: u64 = 120_000;

/// How long buyers click again under their keys while a lane is closed or a connection has broken.
const REPEAT_MS: u64 = 20_000;

/// How long payments that are too late come after an order's expiry, and its units may take to be back.
const TOO_LATE_MS: u64 = 3_000;

/// How long the server may take after that to find the orders of early payments and to return the
/// units of expired orders.
const SETTLING: Duration = Duration::from_secs(30);

/// A sale, and how to speak to the server that it is held on.
pub struct Sale<'a> {
    pub args: &'a DemoArgs,
    /// Signs the callbacks of payments.
    pub secret: WebhookSecret,
    pub data_token: Option<String>,
    pub control_token: Option<String>,
    /// How long an answer may take, in milliseconds.
    pub answer_ms_max: f64,
}

/// What was seen of a sale.
struct Held {
    report: LoadReport,
    checks: Vec<Check>,
    killed: Option<KilledNode>,
}

/// A node that was killed, by the wall clock.
struct Killing {
    node: u8,
    at: jiff::Timestamp,
}

impl Killing {
    /// The same, counted from the first click.
    fn since(&self, report: &LoadReport) -> KilledNode {
        let started: jiff::Timestamp = report.started_at.parse().unwrap_or(self.at);
        KilledNode {
            node: self.node,
            at_ms: (self.at.as_millisecond() - started.as_millisecond()) as f64,
        }
    }
}

impl Sale<'_> {
    /// Holds the sale, stops the server in any case, and publishes the result. True: every check passed.
    pub(super) async fn run(self, service: Service, signals: &mut Signals) -> anyhow::Result<bool> {
        let held = tokio::select! {
            held = self.hold(&service, signals) => held,
            reason = service.failed() => Err(anyhow::anyhow!(reason)),
        };
        let clean = service.drain().await;
        let Held {
            report,
            mut checks,
            killed,
        } = held?;
        checks.push(Check {
            name: "The service stopped with nothing left over".into(),
            ok: clean,
            detail: if clean {
                "drained".into()
            } else {
                "see the log".into()
            },
        });
        clear();
        publish(self.args, &report, &checks, killed)?;
        Ok(checks.iter().all(|check| check.ok))
    }

    /// Puts the catalogue on sale, runs the rush, waits until payments and expiry are over, and checks.
    async fn hold(&self, service: &Service, signals: &mut Signals) -> anyhow::Result<Held> {
        let control = service.control_plane()?;
        let opened = Instant::now();
        self.put_catalogue(&control).await?;
        if let Some(nodes) = service.nodes() {
            for item in &CATALOGUE {
                let token = self.data_token.as_deref();
                nodes.wait_for_sku(item.sku_id, token).await?;
            }
        }
        let plan = self.plan(service);
        let terms = checks::Terms {
            user_prefix: plan.user_prefix.clone(),
            began_at: UnixMillis::now(),
            answer_ms_max: self.answer_ms_max + plan.repeat_ms as f64,
            audit_before: self.audit(&control).await?,
        };
        clear();
        let mut progress =
            StderrProgress::new(LINE_EVERY, say).titled(&format!("http://{control}"));
        let interrupted = async {
            signals.recv().await;
        };
        let (report, disturbed, killed) = tokio::join!(
            run_until(plan, &mut progress, interrupted),
            self.disturb(),
            self.kill(service),
        );
        let (report, killed) = (report?, killed.transpose()?);
        status("Auditing: what every buyer was told and paid against every row ...");
        for control in service.control_planes() {
            self.wait_until_quiet(&control.to_string()).await?;
        }
        let audit = self
            .wait_until_settled(service, &terms.audit_before, &report)
            .await?;
        let mut checks = checks::run(service.database(), &report, &terms, &audit).await?;
        checks.extend(disturbed);
        let killed = killed.map(|killed| killed.since(&report));
        if let Some(killed) = killed {
            checks.push(checks::taken_over(&report, killed));
            for control in service.control_planes().iter().skip(1) {
                let audit = self.audit(&control.to_string()).await?;
                checks.push(checks::audit_agrees_at(&control.to_string(), &audit));
            }
        }
        tracing::debug!(seconds = opened.elapsed().as_secs_f64(), "the sale is over");
        Ok(Held {
            report,
            checks,
            killed,
        })
    }

    /// Kills a node at half time, if there are several.
    async fn kill(&self, service: &Service) -> Option<anyhow::Result<Killing>> {
        let nodes = service.nodes()?;
        tokio::time::sleep(self.half()).await;
        let at = jiff::Timestamp::now();
        let killed = nodes.kill_one().await;
        Some(killed.map(|node| Killing { node, at }))
    }

    fn half(&self) -> Duration {
        Duration::from_secs(self.args.duration.into()) / 2
    }

    /// Runs the command of half time, if there is one.
    async fn disturb(&self) -> Option<Check> {
        let command = self.args.at_half.as_ref()?;
        tokio::time::sleep(self.half()).await;
        let output = tokio::process::Command::new("sh")
            .args(["-c", command])
            .output()
            .await;
        let (ok, detail) = match output {
            Ok(output) if output.status.success() => (true, command.clone()),
            Ok(output) => {
                let said = String::from_utf8_lossy(&output.stderr);
                (
                    false,
                    format!("{command}: {}: {}", output.status, said.trim()),
                )
            }
            Err(error) => (false, format!("{command}: {error}")),
        };
        Some(Check {
            name: "What --at-half disturbs was disturbed".into(),
            ok,
            detail,
        })
    }

    async fn put_catalogue(&self, control: &str) -> anyhow::Result<()> {
        let args = self.args;
        for item in &CATALOGUE {
            let body = json!({
                "title": item.title, "unit_price": item.unit_price, "currency": CURRENCY,
                "total": (f64::from(args.stock) * item.stock_share) as u32, "per_user_limit": 1,
                "waitlist_max": WAITLIST_MAX, "waitlist_payment_ttl_ms": ASSIGNED_TTL_MS,
            });
            let path = format!("/admin/v1/skus/{}", item.sku_id);
            self.call(control, "PUT", &path, Some(&body)).await?;
        }
        status(&format!(
            "On sale at http://{control}: {} units of {} SKUs, one to a buyer; {} buyers within {} s, {} clicks a second at the peak, \
         3 of 10 double clicks; 7 of 10 orders are paid, the others expire after {} s and their units go to whoever waits{}",
            args.stock,
            CATALOGUE.len(),
            buyers(args),
            args.duration,
            args.rate(),
            PAYMENT_TTL_MS / 1_000,
            match args.nodes {
                None => String::new(),
                Some(count) => format!(
                    "; the last of {count} nodes is killed with -9 after {} s, and its directory deleted",
                    self.half().as_secs_f64()
                ),
            }
        ));
        Ok(())
    }

    fn plan(&self, service: &Service) -> LoadPlan {
        let args = self.args;
        let planes = service.data_planes().into_iter();
        let mut targets = planes.map(|plane| format!("http://{plane}"));
        let plan = LoadPlan {
            target: targets.next().unwrap_or_default(),
            more_targets: targets.collect(),
            repeat_ms: service.nodes().map_or(0, |_| REPEAT_MS),
            watch_lanes: service.nodes().is_some(),
            rate: RateProfile::Step {
                peak_per_second: f64::from(args.rate()),
            },
            duration_ms: Some(u64::from(args.duration) * 1_000),
            buyers: buyers(args),
            one_order_per_buyer: true,
            double_click_share: 0.3,
            mode: OrderMode::Mixed,
            waitlist: true,
            waitlist_after_ms: REFLOW_MS_MAX,
            seed: args.seed,
            keep_outcomes: true,
            pay_share: PAY_SHARE,
            pay_connections: PAY_CONNECTIONS,
            payment_secret: Some(self.secret.clone()),
            token: self.data_token.clone().map(Token::new),
            pay_grace_ms: PAYMENT_TTL_MS + TOO_LATE_MS,
            watch_after_ms: PAYMENT_TTL_MS + 1_000,
            // Buyers of their own, so that the demo can run again on a database that is kept.
            user_prefix: format!("u{}-", UnixMillis::now().0 / 1_000),
            ..LoadPlan::default()
        };
        let items = CATALOGUE.iter();
        items.fold(plan, |plan, item| {
            plan.with_sku(item.sku_id, item.click_share)
        })
    }

    /// Waits until nothing is in flight, so that memory and rows can be compared.
    async fn wait_until_quiet(&self, control: &str) -> anyhow::Result<()> {
        let deadline = Instant::now() + Duration::from_secs(30);
        loop {
            let audit = self.audit(control).await?;
            if audit["orders_in_flight"] == 0 {
                return Ok(());
            }
            anyhow::ensure!(
                Instant::now() < deadline,
                "{} orders are still in flight 30 s after the last click",
                audit["orders_in_flight"]
            );
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Waits until payments that came before their order have found it and units of expired orders are
    /// back, and returns the audit. The checks report whatever is late.
    async fn wait_until_settled(
        &self,
        service: &Service,
        before: &Value,
        report: &LoadReport,
    ) -> anyhow::Result<Value> {
        let deadline = Instant::now() + SETTLING;
        loop {
            let audit = self.audit_of_all(service).await?;
            if is_settled(before, &audit, report) || Instant::now() >= deadline {
                return Ok(audit);
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// The audit by the first node. The free units of the others, and those that are lent to none, are in
    /// `free_elsewhere`.
    async fn audit_of_all(&self, service: &Service) -> anyhow::Result<Value> {
        let mut audit = self.audit(&service.control_plane()?).await?;
        if service.nodes().is_none() {
            return Ok(audit);
        }
        let mut free = stock::pool(service.database()).await?;
        for control in service.control_planes().iter().skip(1) {
            let other = self.audit(&control.to_string()).await?;
            let skus = other["skus"].as_array().into_iter().flatten();
            free += skus
                .filter_map(|sku| sku["live"]["free"].as_i64())
                .sum::<i64>();
        }
        audit["free_elsewhere"] = free.into();
        Ok(audit)
    }

    async fn audit(&self, control: &str) -> anyhow::Result<Value> {
        self.call(control, "GET", "/admin/v1/audit", None).await
    }

    async fn call(
        &self,
        control: &str,
        method: &str,
        path: &str,
        body: Option<&Value>,
    ) -> anyhow::Result<Value> {
        call_with_token(control, method, path, body, self.control_token.as_deref()).await
    }
}

/// Enough that fresh buyers keep coming throughout the rush.
fn buyers(args: &DemoArgs) -> u32 {
    args.rate()
        .saturating_mul(args.duration)
        .max(args.stock.saturating_mul(2))
}

/// Whether no payment waits but those for orders that never existed, no unit is held, and the audit is of a
/// quiet moment.
fn is_settled(before: &Value, audit: &Value, report: &LoadReport) -> bool {
    let kinds = report.payments.iter().flat_map(|payments| &payments.kinds);
    let lost = kinds.filter(|kind| kind.kind == PaymentKind::Lost);
    let lost: u64 = lost.map(|kind| kind.sent).sum();
    // Payments that wait, and payments that the server has given up.
    let without_order = |audit: &Value| {
        let payments = &audit["payments"];
        let count = |value: &Value| value.as_u64().unwrap_or(0);
        count(&payments["orphan"]["count"])
            + count(&payments["refund_reasons"]["receipt_missing"])
            + count(&payments["refund_reasons"]["receipt_invalid"])
    };
    let skus = audit["skus"].as_array().map(Vec::as_slice);
    without_order(audit) <= without_order(before) + lost
        && (skus.unwrap_or_default().iter()).all(|sku| sku["held_by_orders"] == 0)
        && audit["orders_in_flight"] == 0
        && checks::live_compared(audit)
}
