//! The commands. Exit codes: 0 done, 1 failed, 2 wrong usage. A preflight: 0 nothing is bad, 1 something is, 2 it
//! could not be made. The check of a draw: 0 it is right, 1 it is not, 2 there is nothing to judge.

mod audit;
mod client;
mod config_check;
mod config_reference;
mod demo;
mod draw;
mod events;
mod load;
mod logging;
mod migrate;
mod output;
mod preflight;
mod queue;
mod serve;
mod signals;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use clap::{Args, Parser, Subcommand};

use crate::config::Config;
use crate::logging::{flush, say, take_panics};

/// How long the last lines may take to be written. A pipe that nobody reads costs an end so much.
const LAST_LINES: Duration = Duration::from_secs(1);

/// Flash-sale order intake in front of PostgreSQL: holds stock in memory, writes winners with COPY,
/// tells every buyer the truth.
#[derive(Debug, Parser)]
#[command(name = "millrace", version, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the service until SIGTERM or Ctrl-C, then drain.
    Serve(ConfigArgs),
    /// Watch a flash sale: own PostgreSQL, the server, a rush of buyers, and an audit of every
    /// answer.
    Demo(demo::DemoArgs),
    /// Put an open-loop load on a running server.
    Load(load::LoadArgs),
    /// Recompute every promise from the database and compare it with the live counters.
    Audit(audit::AuditArgs),
    /// Tell whether the database and the order log will hold a sale, and prepare them for it.
    ///
    /// Exit code 0: nothing is bad; 1: something is; 2: the preflight could not be made.
    Preflight(preflight::PreflightArgs),
    /// Check a published draw.
    Draw {
        #[command(subcommand)]
        command: draw::DrawCommand,
    },
    /// Bring the database schema up to date, or print its SQL.
    Migrate(migrate::MigrateArgs),
    /// Look at the order log, check it, or give it up.
    #[command(alias = "journal")]
    Queue(queue::QueueArgs),
    /// Manage the events for the shop's other systems.
    Events(events::EventsArgs),
    /// Look at the configuration.
    Config {
        #[command(subcommand)]
        command: ConfigCommand,
    },
}

#[derive(Debug, Subcommand)]
enum ConfigCommand {
    /// Check the configuration and the database that it names.
    Check(config_check::CheckArgs),
    /// Print the reference of every setting as Markdown.
    Reference,
}

/// Where the configuration comes from.
#[derive(Clone, Debug, Args)]
struct ConfigArgs {
    /// TOML file; without it ./millrace.toml, if there is one. Every field can be overridden by an
    /// environment variable such as MILLRACE_DATABASE__URL.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

impl ConfigArgs {
    fn load(&self) -> anyhow::Result<Config> {
        Ok(Config::load(self.config.as_deref())?)
    }
}

/// Runs the command line of this process.
pub fn main() -> ExitCode {
    // Wrong usage ends here, with exit code 2.
    let cli = Cli::parse();
    take_panics();
    let failed = match cli.command {
        Command::Preflight(_) | Command::Draw { .. } => ExitCode::from(2),
        _ => ExitCode::FAILURE,
    };
    let result = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .thread_name("millrace-tokio")
        .build()
        .context("cannot start the runtime")
        .and_then(|runtime| runtime.block_on(run(cli)));
    let code = match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            say(&format!("millrace: {}", sentence(&error)));
            failed
        }
    };
    flush(LAST_LINES);
    code
}

/// An error and its causes in one line, each said once: some of ours speak for their causes.
fn sentence(error: &anyhow::Error) -> String {
    error
        .chain()
        .skip(1)
        .fold(error.to_string(), |said, cause| {
            let cause = cause.to_string();
            match said.contains(&cause) {
                true => said,
                false => format!("{said}: {cause}"),
            }
        })
}

/// True: done and well.
async fn run(cli: Cli) -> anyhow::Result<bool> {
    match cli.command {
        Command::Serve(args) => serve::run(&args).await,
        Command::Demo(args) => demo::run(args).await,
        Command::Load(args) => load::run(args).await,
        Command::Audit(args) => audit::run(&args).await,
        Command::Preflight(args) => preflight::run(&args).await,
        Command::Draw { command } => draw::run(&command),
        Command::Migrate(args) => migrate::run(&args).await,
        Command::Queue(args) => queue::run(&args).await,
        Command::Events(args) => events::run(&args).await,
        Command::Config {
            command: ConfigCommand::Check(args),
        } => config_check::run(&args).await,
        Command::Config {
            command: ConfigCommand::Reference,
        } => config_reference::run(),
    }
}
