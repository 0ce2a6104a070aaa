//! `millrace demo`: a flash sale on real parts, shown live, then audited.

mod money;
mod verdict;

use std::io::{IsTerminal, Write as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Context;
use clap::Args;
use serde_json::{Value, json};

use super::{client, logging};
use crate::app::Millrace;
use crate::config::{Config, Log, LogFormat, OneOrMany};
use crate::loadgen::{
    LoadPlan, LoadReport, OrderMode, PageOptions, PaymentKind, Promise, RateProfile,
    StderrProgress, WebhookSecret, render_page, render_table, run_until,
};

/// The order timeout of seven seconds and a bound for a busy machine, in milliseconds.
const ANSWER_MS_MAX: f64 = 8_000.0;

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

/// What everything is sold in.
const CURRENCY: &str = "EUR";

/// What is on sale: id, title, price in minor units, share of the stock, share of the clicks.
const SHELF: [(&str, &str, i64, f64, f64); 4] = [
    ("IPHONE-15", "iPhone 15", 199_900, 0.50, 90.0),
    ("AIRPODS-PRO", "AirPods Pro", 29_900, 0.25, 5.0),
    ("WATCH-9", "Watch 9", 49_900, 0.15, 3.0),
    ("HOMEPOD-MINI", "HomePod mini", 9_900, 0.10, 2.0),
];

#[derive(Debug, Args)]
pub struct DemoArgs {
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
    logging::start(&Log {
        level: "warn".into(),
        format: LogFormat::Auto,
    })?;
    let scratch = Scratch::new(args.data_dir.clone())?;
    let mut config = Config {
        data_dir: scratch.path.clone(),
        ..Config::default()
    };
    config.data_plane.listen.set_port(0);
    config.control_plane.listen.set_port(0);
    let secret = WebhookSecret::of_key(&rand::random::<[u8; 32]>());
    config.payments.standard.secret = OneOrMany(vec![secret.text().to_owned()]);
    config.orders.payment_ttl_ms = PAYMENT_TTL_MS;
    if let Some(url) = &args.database_url {
        config.database.url.clone_from(url);
        // Never among the orders of a real sale.
        config.database.schema = "millrace_demo".into();
    }

    let started = Instant::now();
    say(if args.database_url.is_some() {
        "Starting Millrace ..."
    } else {
        "Starting Millrace and its own PostgreSQL ..."
    });
    let millrace = Millrace::start(config).await?;
    say(&format!(
        "Taking orders after {:.1} s on http://{}; control plane http://{}",
        started.elapsed().as_secs_f64(),
        millrace.data_plane,
        millrace.control_plane
    ));
    // Whatever happens from here on, what was started is stopped.
    let sale = tokio::select! {
        sale = hold_sale(&args, &millrace, secret) => sale,
        reason = millrace.poisoned() => Err(anyhow::anyhow!("Millrace stopped itself: {reason}")),
    };
    let clean = millrace.drain().await;
    let (report, mut promises) = sale?;
    promises.push(Promise {
        name: "The service stopped with nothing left over".into(),
        ok: clean,
        detail: if clean {
            "drained".into()
        } else {
            "see the log above".into()
        },
    });
    let kept = promises.iter().all(|promise| promise.ok);
    publish(&args, &report, &promises)?;
    Ok(kept)
}

/// Puts the shelf up, runs the rush, and judges it.
async fn hold_sale(
    args: &DemoArgs,
    millrace: &Millrace,
    secret: WebhookSecret,
) -> anyhow::Result<(LoadReport, Vec<Promise>)> {
    let control = millrace.control_plane.to_string();
    let (opened, buyers) = (Instant::now(), buyers(args));
    for (sku_id, title, unit_price, share, _) in SHELF {
        let body = json!({
            "title": title, "unit_price": unit_price, "currency": CURRENCY,
            "total": (f64::from(args.stock) * share) as u32, "per_user_limit": 1,
        });
        client::call(
            &control,
            "PUT",
            &format!("/admin/v1/skus/{sku_id}"),
            Some(&body),
        )
        .await?;
    }
    say(&format!(
        "{} units of {} SKUs in stock, one to a buyer; {buyers} buyers click within {} s, {} times a second at the peak, \
         3 of 10 clicks are double clicks; 7 of 10 orders are paid, the others expire after {} s",
        args.stock,
        SHELF.len(),
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
        payment_secret: Some(secret),
        pay_grace_ms: PAYMENT_TTL_MS + TOO_LATE_MS,
        watch_after_ms: PAYMENT_TTL_MS + 1_000,
        // Buyers of their own, so that the demo can run again on a database that is kept.
        user_prefix: format!("u{}-", millrace_epoch()),
        ..LoadPlan::default()
    };
    for (sku_id, _, _, _, weight) in SHELF {
        plan = plan.with_sku(sku_id, weight);
    }
    let prefix = plan.user_prefix.clone();
    let interrupted = async {
        let _ = tokio::signal::ctrl_c().await;
    };
    let before = client::call(&control, "GET", "/admin/v1/audit", None).await?;
    let report = run_until(plan, &mut StderrProgress::new(), interrupted).await?;
    say("Auditing: what every buyer was told and paid against every row ...");
    wait_until_quiet(&control).await?;
    let audit = wait_until_settled(&control, &before, &report).await?;
    let promises = verdict::judge(
        millrace.database(),
        &report,
        &prefix,
        &before,
        &audit,
        ANSWER_MS_MAX,
    )
    .await?;
    tracing::debug!(seconds = opened.elapsed().as_secs_f64(), "the sale is over");
    Ok((report, promises))
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

/// Waits until nothing is in flight, so that memory and rows can be compared.
async fn wait_until_quiet(control: &str) -> anyhow::Result<()> {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        let audit = client::call(control, "GET", "/admin/v1/audit", None).await?;
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
    control: &str,
    before: &Value,
    report: &LoadReport,
) -> anyhow::Result<Value> {
    let deadline = Instant::now() + SETTLING;
    loop {
        let audit = client::call(control, "GET", "/admin/v1/audit", None).await?;
        if is_settled(before, &audit, report) || Instant::now() >= deadline {
            return Ok(audit);
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
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
        && verdict::live_compared(audit)
}

fn publish(args: &DemoArgs, report: &LoadReport, promises: &[Promise]) -> anyhow::Result<()> {
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
        promises: promises.to_vec(),
    };
    write_file(&args.page, &render_page(report, &options))?;
    let mut out = std::io::stdout();
    // A closed pipe is the reader's choice, not a failed sale.
    let _ = if args.json {
        let kept = promises.iter().all(|promise| promise.ok);
        let figures = json!({ "ok": kept, "promises": promises, "load": report });
        writeln!(out, "{}", serde_json::to_string_pretty(&figures)?)
    } else {
        writeln!(
            out,
            "\n{}\n{}",
            render_table(report),
            promise_table(promises)
        )
    };
    say(&format!("The pictures are in {}", args.page.display()));
    Ok(())
}

fn promise_table(promises: &[Promise]) -> String {
    let mut table = comfy_table::Table::new();
    table.load_preset(comfy_table::presets::UTF8_HORIZONTAL_ONLY);
    table.set_header(["", "promise", "figures"]);
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

fn say(line: &str) {
    if std::io::stderr().is_terminal() {
        eprintln!("\x1b[1m{line}\x1b[0m");
    } else {
        eprintln!("{line}");
    }
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
            eprintln!("could not remove {}: {error}", self.path.display());
        }
    }
}
