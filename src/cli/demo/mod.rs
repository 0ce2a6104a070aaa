//! `millrace demo`: a flash sale on real parts, shown live, then audited.

mod checks;
mod settings;
mod status;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Context;
use clap::Args;
use serde_json::{Value, json};

use self::settings::Settings;
use self::status::{LINE_EVERY, clear, status};
use super::client::call_with_token;
use super::output::print_line;
use super::signals::Signals;
use super::{ConfigArgs, logging};
use crate::app::Millrace;
use crate::loadgen::{
    Check, LoadPlan, LoadReport, OrderMode, PageOptions, PaymentKind, RateProfile, StderrProgress,
    Token, WebhookSecret, render_page, render_table, run_until,
};
use crate::logging::{hold, release, say};

/// Beyond `orders.timeout_ms`, for a busy machine, in milliseconds.
const ANSWER_MS_BOUND: u64 = 1_000;

/// The share of orders that are paid.
const PAY_SHARE: f64 = 0.7;

/// How long buyers have to pay, in milliseconds: longer than `orders.timeout_ms`, so that no order
/// expires before its buyer has heard of it, and than the rush, so that units come back when it is
/// over. In a longer rush they are ordered again.
const PAYMENT_TTL_MS: u64 = 10_000;

/// From an order's expiry to the last payment that is too late for it, and to its units being back.
const TOO_LATE_MS: u64 = 3_000;

/// How long the server may take after that to find the orders of early payments and to return the
/// units of orders that expired.
const SETTLING: Duration = Duration::from_secs(30);

/// Columns of the table of promises, on any terminal and in a file.
const TABLE_COLUMNS: u16 = 100;

/// What everything is sold in.
const CURRENCY: &str = "EUR";

/// What is on sale: id, title, price in minor units, share of the stock, share of the clicks.
const CATALOGUE: [(&str, &str, i64, f64, f64); 4] = [
    ("IPHONE-15", "iPhone 15", 199_900, 0.50, 90.0),
    ("AIRPODS-PRO", "AirPods Pro", 29_900, 0.25, 5.0),
    ("WATCH-9", "Watch 9", 49_900, 0.15, 3.0),
    ("HOMEPOD-MINI", "HomePod mini", 9_900, 0.10, 2.0),
];

/// The configuration holds for the demo as for `serve`, but for what it decides itself and refuses:
/// directories, the database (--database-url), how long buyers have to pay, and payment platforms.
/// Ports are free ones unless they are configured. The log is shown where `log.level` is set, or
/// something went wrong.
#[derive(Debug, Args)]
pub struct DemoArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// Units on sale, over all SKUs; at least 20.
    #[arg(long, value_name = "N", default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(20..=10_000_000))]
    stock: u32,
    /// Clicks a second at the peak, double clicks included.
    #[arg(long, value_name = "N", default_value_t = 12_000, value_parser = clap::value_parser!(u32).range(10..=200_000))]
    rate: u32,
    /// How long the rush lasts, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=3_600))]
    duration: u32,
    /// Decides buyers, SKUs, double clicks and who pays how.
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// Where the page with the pictures goes.
    #[arg(long, value_name = "FILE", default_value = "millrace-demo.html")]
    page: PathBuf,
    /// Use this PostgreSQL instead of starting one, in a schema `millrace_demo` of its own.
    #[arg(long, value_name = "URL")]
    database_url: Option<String>,
    /// Keep the cluster and everything in it in this directory.
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// Print the figures as JSON on standard output.
    #[arg(long)]
    json: bool,
}

/// Runs the sale. True: every promise was kept.
pub async fn run(args: DemoArgs) -> anyhow::Result<bool> {
    let mut signals = Signals::new()?;
    let scratch = Scratch::new(args.data_dir.clone())?;
    let secret = WebhookSecret::of_key(&rand::random::<[u8; 32]>());
    let Settings { config, show_log } = Settings::load(&args, scratch.path.clone(), &secret)?;
    logging::start(&config.log)?;
    if !show_log {
        hold();
    }
    let server = match args.database_url {
        Some(_) => "Millrace",
        None => "Millrace and its own PostgreSQL",
    };
    status(&format!("Starting {server} ..."));
    let sale = Sale {
        args: &args,
        secret,
        data_token: config.data_plane.token.0.first().cloned(),
        control_token: config.control_plane.token.0.first().cloned(),
        answer_ms_max: (config.orders.timeout_ms + ANSWER_MS_BOUND) as f64,
    };
    let started = tokio::select! {
        started = Millrace::start(config) => started.map_err(anyhow::Error::from),
        signal = signals.recv() => Err(anyhow::anyhow!("{signal} came before the sale began")),
    };
    clear();
    let kept = sale.hold_and_judge(started?, &mut signals).await;
    clear();
    if !matches!(kept, Ok(true)) {
        release();
    }
    kept
}

/// A sale, and how to speak to the server that it is held on.
struct Sale<'a> {
    args: &'a DemoArgs,
    secret: WebhookSecret,
    data_token: Option<String>,
    control_token: Option<String>,
    /// How long an answer may take, in milliseconds.
    answer_ms_max: f64,
}

impl Sale<'_> {
    /// Holds the sale, stops the server whatever happens, and publishes the verdict.
    async fn hold_and_judge(
        self,
        millrace: Millrace,
        signals: &mut Signals,
    ) -> anyhow::Result<bool> {
        let held = tokio::select! {
            held = self.hold(&millrace, signals) => held,
            reason = millrace.poisoned() => Err(anyhow::anyhow!("Millrace stopped itself: {reason}")),
        };
        let clean = millrace.drain().await;
        let (report, mut promises) = held?;
        promises.push(Check {
            name: "The service stopped with nothing left over".into(),
            ok: clean,
            detail: if clean {
                "drained".into()
            } else {
                "see the log".into()
            },
        });
        let kept = promises.iter().all(|promise| promise.ok);
        clear();
        publish(self.args, &report, &promises)?;
        Ok(kept)
    }

    /// Puts the shelf up, runs the rush, and judges it.
    async fn hold(
        &self,
        millrace: &Millrace,
        signals: &mut Signals,
    ) -> anyhow::Result<(LoadReport, Vec<Check>)> {
        let args = self.args;
        let control = millrace.control_plane.to_string();
        let (opened, buyers) = (Instant::now(), buyers(args));
        for (sku_id, title, unit_price, share, _) in CATALOGUE {
            let body = json!({
                "title": title, "unit_price": unit_price, "currency": CURRENCY,
                "total": (f64::from(args.stock) * share) as u32, "per_user_limit": 1,
            });
            let path = format!("/admin/v1/skus/{sku_id}");
            self.call(&control, "PUT", &path, Some(&body)).await?;
        }
        status(&format!(
            "On sale at http://{control}: {} units of {} SKUs, one to a buyer; {buyers} buyers within {} s, {} clicks a second at the peak, \
         3 of 10 double clicks; 7 of 10 orders are paid, the others expire after {} s",
            args.stock,
            CATALOGUE.len(),
            args.duration,
            args.rate,
            PAYMENT_TTL_MS / 1_000
        ));
        let mut plan = LoadPlan {
            target: format!("http://{}", millrace.data_plane),
            rate: RateProfile::Step {
                peak_per_second: f64::from(args.rate),
            },
            duration_ms: Some(u64::from(args.duration) * 1_000),
            buyers,
            one_order_per_buyer: true,
            double_click_share: 0.3,
            mode: OrderMode::Mixed,
            seed: args.seed,
            keep_outcomes: true,
            pay_share: PAY_SHARE,
            payment_secret: Some(self.secret.clone()),
            token: self.data_token.clone().map(Token::new),
            pay_grace_ms: PAYMENT_TTL_MS + TOO_LATE_MS,
            watch_after_ms: PAYMENT_TTL_MS + 1_000,
            // Buyers of their own, so that the demo can run again on a database that is kept.
            user_prefix: format!("u{}-", millrace_epoch()),
            ..LoadPlan::default()
        };
        for (sku_id, _, _, _, weight) in CATALOGUE {
            plan = plan.with_sku(sku_id, weight);
        }
        let prefix = plan.user_prefix.clone();
        let interrupted = async {
            signals.recv().await;
        };
        let before = self.audit(&control).await?;
        clear();
        let mut progress =
            StderrProgress::new(LINE_EVERY, say).titled(&format!("http://{control}"));
        let report = run_until(plan, &mut progress, interrupted).await?;
        status("Auditing: what every buyer was told and paid against every row ...");
        self.wait_until_quiet(&control).await?;
        let audit = self.wait_until_settled(&control, &before, &report).await?;
        let promises = checks::orders::judge(
            millrace.database(),
            &report,
            &prefix,
            &before,
            &audit,
            self.answer_ms_max,
        )
        .await?;
        tracing::debug!(seconds = opened.elapsed().as_secs_f64(), "the sale is over");
        Ok((report, promises))
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
    /// back, and returns the audit. What is late for that is for the verdict to say.
    async fn wait_until_settled(
        &self,
        control: &str,
        before: &Value,
        report: &LoadReport,
    ) -> anyhow::Result<Value> {
        let deadline = Instant::now() + SETTLING;
        loop {
            let audit = self.audit(control).await?;
            if is_settled(before, &audit, report) || Instant::now() >= deadline {
                return Ok(audit);
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
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
    args.rate
        .saturating_mul(args.duration)
        .max(args.stock.saturating_mul(2))
}

fn millrace_epoch() -> u64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}

/// No payment waits but those that can never find an order, no unit is held, and the audit is of a
/// quiet moment.
fn is_settled(before: &Value, audit: &Value, report: &LoadReport) -> bool {
    let kinds = report.payments.iter().flat_map(|payments| &payments.kinds);
    let lost = kinds.filter(|kind| kind.kind == PaymentKind::Lost);
    let lost: u64 = lost.map(|kind| kind.sent).sum();
    // Those still waiting, and those that the server has given up looking for.
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
        && checks::orders::live_compared(audit)
}

fn publish(args: &DemoArgs, report: &LoadReport, promises: &[Check]) -> anyhow::Result<()> {
    let options = PageOptions {
        title: "Millrace: a flash sale".into(),
        subtitle: Some(format!(
            "{} units, {} clicks, {} PostgreSQL",
            args.stock,
            report.offered,
            if args.database_url.is_some() {
                "your"
            } else {
                "its own"
            }
        )),
        checks: promises.to_vec(),
    };
    write_file(&args.page, &render_page(report, &options))?;
    print_line(&if args.json {
        let kept = promises.iter().all(|promise| promise.ok);
        let figures = json!({ "ok": kept, "promises": promises, "load": report });
        serde_json::to_string_pretty(&figures)?
    } else {
        format!(
            "{}\n{}\nThe pictures are in {}",
            render_table(report),
            promise_table(promises),
            args.page.display()
        )
    })
}

fn promise_table(promises: &[Check]) -> String {
    let mut table = comfy_table::Table::new();
    table
        .load_preset(comfy_table::presets::UTF8_HORIZONTAL_ONLY)
        .set_content_arrangement(comfy_table::ContentArrangement::Dynamic)
        .set_width(TABLE_COLUMNS)
        .set_header(["", "promise", "figures"]);
    for promise in promises {
        let mark = if promise.ok { "kept" } else { "BROKEN" };
        table.add_row([mark, &promise.name, &promise.detail]);
    }
    let verdict = match promises.iter().filter(|promise| !promise.ok).count() {
        0 => "Every promise was kept.".to_owned(),
        broken => format!("{broken} PROMISES WERE BROKEN."),
    };
    format!("{table}\n{verdict}")
}

fn write_file(path: &Path, text: &str) -> anyhow::Result<()> {
    std::fs::write(path, text)
        .with_context(|| format!("cannot write the page to {}", path.display()))
}

/// The demo's `data_dir`: erased at the end, unless it was named.
struct Scratch {
    path: PathBuf,
    erase: bool,
}

impl Scratch {
    fn new(named: Option<PathBuf>) -> anyhow::Result<Self> {
        let erase = named.is_none();
        let path = named.unwrap_or_else(|| {
            std::env::temp_dir().join(format!("millrace-demo-{}", std::process::id()))
        });
        std::fs::create_dir_all(&path).with_context(|| format!("cannot use {}", path.display()))?;
        Ok(Scratch { path, erase })
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if self.erase
            && let Err(error) = std::fs::remove_dir_all(&self.path)
        {
            say(&format!(
                "could not remove {}: {error}",
                self.path.display()
            ));
        }
    }
}
