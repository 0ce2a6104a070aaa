//! `millrace load`

use std::io::IsTerminal;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use clap::Args;

use super::output::print_line;
use crate::loadgen::{
    LoadPlan, OrderMode, PageOptions, PaymentReport, RateProfile, SkuShare, StderrProgress, Token,
    WebhookSecret, render_page, render_table, run_until,
};
use crate::logging::say;

/// Between two lines of progress where they stay.
const LINE_EVERY: Duration = Duration::from_secs(2);

#[derive(Debug, Args)]
pub struct LoadArgs {
    /// The data plane to load. Only ever name a server of your own.
    #[arg(long, value_name = "URL", default_value = "http://127.0.0.1:8080")]
    target: String,
    /// Bearer token of the data plane.
    #[arg(long, env = "MILLRACE_LOAD_TOKEN", hide_env_values = true)]
    token: Option<String>,
    /// A SKU and its share of the clicks, such as IPHONE-15=90; may be given several times.
    #[arg(
        long = "sku",
        value_name = "SKU[=SHARE]",
        required_unless_present = "orders"
    )]
    skus: Vec<SkuShare>,
    /// Requests a second: 5000, step:20000 (to the peak within a second) or ramp:100..20000.
    #[arg(long, value_name = "PROFILE", default_value = "1000")]
    rate: RateProfile,
    /// How long requests fall due, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 10.0)]
    duration: f64,
    /// At most this many requests.
    #[arg(long, value_name = "N")]
    requests: Option<u64>,
    /// Different buyers.
    #[arg(long, value_name = "N", default_value_t = 100_000)]
    buyers: u32,
    /// Each buyer clicks once before any clicks again, and then with the same key.
    #[arg(long)]
    one_order_per_buyer: bool,
    /// Share of clicks that are double clicks, 0 to 1.
    #[arg(long, value_name = "SHARE", default_value_t = 0.0)]
    duplicates: f64,
    /// Units in each order.
    #[arg(long, value_name = "N", default_value_t = 1)]
    quantity: u32,
    /// wait: for the database; async: for the queue only (Prefer: respond-async); mixed: every second
    /// buyer the one.
    #[arg(long, value_name = "MODE", default_value = "wait")]
    mode: OrderMode,
    /// Ask the server to wait at most this long (Prefer: wait=N), in seconds.
    #[arg(long, value_name = "SECONDS")]
    wait: Option<u32>,
    /// Buyers join the waiting list if no units are free, and with --pay they pay once they are assigned some.
    #[arg(long)]
    waitlist: bool,
    /// Play the payment platform too: this share of placed orders is paid, 0 to 1, through callbacks
    /// to POST /v1/payments/standard/notify of the target.
    ///
    /// Payments come from at once (before the row of an order that was only accepted is there) to two
    /// seconds after the answer, and a few after the order's expires_at where that lies within the run;
    /// in one to eight deliveries each, shuffled among others. About 1 % of deliveries have a false
    /// signature and must be refused with 401; a few payments are of a wrong amount, second ones, or
    /// for orders that never existed. A delivery that is not answered 2xx is
    /// retried after a growing pause.
    ///
    /// With --json the member `payments` has: `sent`, `acknowledged` (answered 2xx), `unacknowledged`
    /// (payments, each counted once); `kinds` (regular, late, wrong_amount, second, lost); `money` by
    /// currency in minor units; `deliveries`, `answered_2xx`, `retried`, `unanswered`, `answers` by
    /// status; `latency` of a callback; `false_signatures` with `sent`, `refused`, `taken`,
    /// `undecided`.
    #[arg(
        long,
        value_name = "SHARE",
        default_value_t = 0.0,
        requires = "payment_secret"
    )]
    pay: f64,
    /// The secret that signs callbacks: one of the server's payments.standard.secret, whsec_ and base64.
    #[arg(
        long,
        value_name = "SECRET",
        env = "MILLRACE_LOAD_PAYMENT_SECRET",
        hide_env_values = true
    )]
    payment_secret: Option<String>,
    /// How long after the last answer payments are still sent and retried, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 10.0)]
    pay_grace: f64,
    /// Connections, kept alive.
    #[arg(long, value_name = "N", default_value_t = 256)]
    connections: usize,
    /// Decides buyers, SKUs, double clicks and payments.
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// Replay orders from a file, one JSON object a line, instead of making clicks up.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["skus", "one_order_per_buyer"])]
    orders: Option<PathBuf>,
    /// Write the result as a page to this file.
    #[arg(long, value_name = "FILE")]
    page: Option<PathBuf>,
    /// Print the result as JSON on standard output.
    #[arg(long)]
    json: bool,
}

/// Runs the load. True: every request was answered, and none with a failure; every payment was
/// acknowledged and no false signature believed.
pub async fn run(args: LoadArgs) -> anyhow::Result<bool> {
    anyhow::ensure!(
        args.duration.is_finite() && args.duration > 0.0,
        "--duration must be a number of seconds above 0"
    );
    anyhow::ensure!(
        args.pay_grace.is_finite() && args.pay_grace >= 0.0,
        "--pay-grace must be a number of seconds, 0 or more"
    );
    let plan = LoadPlan {
        target: args.target,
        token: args.token.map(Token::new),
        skus: args.skus,
        rate: args.rate,
        duration_ms: Some((args.duration * 1000.0) as u64),
        requests_max: args.requests,
        buyers: args.buyers,
        one_order_per_buyer: args.one_order_per_buyer,
        double_click_share: args.duplicates,
        quantity: args.quantity,
        waitlist: args.waitlist,
        mode: args.mode,
        wait_s: args.wait,
        connections: args.connections,
        seed: args.seed,
        pay_share: args.pay,
        payment_secret: args.payment_secret.map(WebhookSecret::new),
        pay_grace_ms: (args.pay_grace * 1000.0) as u64,
        orders: args.orders,
        ..LoadPlan::default()
    };
    let stop = async {
        // Without a handler Ctrl-C ends the process, as intended.
        let _ = tokio::signal::ctrl_c().await;
    };
    let report = run_until(plan, &mut StderrProgress::new(LINE_EVERY, say), stop).await?;
    if let Some(file) = &args.page {
        let options = PageOptions {
            subtitle: Some(report.plan.target.clone()),
            ..PageOptions::default()
        };
        std::fs::write(file, render_page(&report, &options))
            .with_context(|| format!("cannot write the page to {}", file.display()))?;
    }
    print_line(&match args.json {
        true => serde_json::to_string_pretty(&report)?,
        false => render_table(&report),
    })?;
    if let Some(file) = args.page.filter(|_| std::io::stderr().is_terminal()) {
        say(&format!("page: {}", file.display()));
    }
    let paid = report.payments.as_ref().is_none_or(PaymentReport::is_clean);
    Ok(report.errors == 0 && paid)
}
