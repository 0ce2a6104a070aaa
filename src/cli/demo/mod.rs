//! `millrace demo`: a flash sale on real parts, shown live, then checked.
//!
//! ```text
//!  settings ─► service ─► sale ─► drain ─► result
//!                 │         │
//!                 │         catalogue ─► load ─► wait until settled ─► checks
//!                 └ Millrace::start, or nodes: processes of their own
//! ```

mod catalogue;
mod checks;
mod draw;
mod nodes;
mod result;
mod sale;
mod service;
mod settings;
mod status;

use std::path::PathBuf;

use anyhow::Context;
use clap::Args;

use self::draw::Draw;
use self::nodes::Nodes;
use self::sale::Sale;
use self::service::Service;
use self::settings::Settings;
use self::status::{clear, status};
use super::signals::Signals;
use super::{ConfigArgs, logging};
use crate::app::Millrace;
use crate::loadgen::WebhookSecret;
use crate::logging::{hold, release, say};

/// How long an answer may take beyond `orders.timeout_ms`, for a busy machine, in milliseconds.
const ANSWER_MS_BOUND: u64 = 1_000;

/// How long buyers have to pay, in milliseconds: longer than `orders.timeout_ms`, so that no order
/// expires before its buyer has its answer, and longer than the rush, so that units come back when it is
/// over. In a longer rush they are ordered again.
const PAYMENT_TTL_MS: u64 = 10_000;

/// The demo reads the configuration as `serve` does. It decides some settings itself and refuses them there:
/// directories, the database (--database-url), the time to pay, and payment platforms. Ports are free ones
/// unless they are configured. The log is shown if `log.level` is set or something went wrong.
#[derive(Debug, Args)]
pub struct DemoArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// Units on sale, over all SKUs; at least 20.
    #[arg(long, value_name = "N", default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(20..=10_000_000))]
    stock: u32,
    /// Clicks a second at the peak, double clicks included. [default: 12000, of several nodes 2400]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(10..=200_000))]
    rate: Option<u32>,
    /// How long the rush lasts, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=3_600))]
    duration: u32,
    /// Decides buyers, SKUs, double clicks and payments.
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// The file for the page with the pictures.
    #[arg(long, value_name = "FILE", default_value = "millrace-demo.html")]
    page: PathBuf,
    /// Use this PostgreSQL instead of starting one, in a schema `millrace_demo` of its own.
    #[arg(long, value_name = "URL")]
    database_url: Option<String>,
    /// Keep the cluster and everything in it in this directory.
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// Run this command with `sh` when half of the rush is over, to disturb something; it has to succeed.
    #[arg(long, value_name = "COMMAND")]
    at_half: Option<String>,
    /// Several nodes as processes of their own, on a broker that the settings name. The last one is killed with -9 when half
    /// of the rush is over, and its directory deleted. They listen on free ports whatever is configured.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(2..=16))]
    nodes: Option<u8>,
    /// Show a draw instead of a rush: entries, the draw, and the verdict on what is published, in millrace-draw.ndjson.
    #[arg(long, conflicts_with_all = ["at_half", "nodes", "page", "seed"])]
    draw: bool,
    /// Print the figures as JSON on standard output.
    #[arg(long)]
    json: bool,
}

impl DemoArgs {
    /// Clicks a second at the peak. Several nodes share a machine, and two of three requests go through two of them.
    fn rate(&self) -> u32 {
        self.rate.unwrap_or(match self.nodes {
            None => 12_000,
            Some(_) => 2_400,
        })
    }
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
    let data_token = config.data_plane.token.0.first().cloned();
    let control_token = config.control_plane.token.0.first().cloned();
    let answer_ms_max = (config.orders.timeout_ms + ANSWER_MS_BOUND) as f64;
    let file = args.config.config.as_deref();
    let starting = async {
        anyhow::Ok(match args.nodes {
            None => Service::One(Box::new(Millrace::start(config).await?)),
            Some(count) => {
                let nodes = Nodes::start(count, &config, file).await?;
                Service::Several(Box::new(nodes))
            }
        })
    };
    let started = tokio::select! {
        started = starting => started,
        signal = signals.recv() => Err(anyhow::anyhow!("{signal} came before the sale began")),
    };
    clear();
    let started = started?;
    let kept = if args.draw {
        let draw = Draw {
            args: &args,
            data_token,
            control_token,
        };
        draw.run(started, &mut signals).await
    } else {
        let sale = Sale {
            args: &args,
            secret,
            data_token,
            control_token,
            answer_ms_max,
        };
        sale.run(started, &mut signals).await
    };
    clear();
    if !matches!(kept, Ok(true)) {
        release();
    }
    kept
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
