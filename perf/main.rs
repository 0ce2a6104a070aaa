//! The perf lab: Millrace's throughput and latency beside the usual alternatives and beside the ceiling.
//!
//! ```text
//! ./x perf                      every case, one table
//! ./x perf --quick              the same in minutes
//! ./x perf wait_mode engine     two of them
//! ```
//!
//! Each case is a folder here: what it compares, why, and its last recorded result. `fixture` holds what they
//! share; `baselines` are the usual alternatives. Nothing is claimed from an absolute
//! number: sides take turns within one run, and only the ratio of neighbours counts.

mod async_acks;
mod baselines;
mod batch_endpoint;
#[path = "../tests/support/brokers.rs"]
#[allow(dead_code, reason = "tests use more of it")]
mod brokers;
mod callbacks;
mod costs;
mod cross_check;
mod database_away;
mod duplicates;
mod engine;
mod entries;
mod events;
mod fixture;
mod journal_sync;
mod latency;
mod memory;
mod mixed_sale;
mod order_logs;
mod overload;
mod recovery;
mod report;
mod soak;
mod sold_out;
mod stalls;
mod table_size;
mod wait_mode;
mod waiting_list;

use std::future::Future;
use std::path::PathBuf;
use std::pin::Pin;

use clap::{Parser, Subcommand};

use fixture::{Finding, Lab};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

#[derive(Debug, Parser)]
#[command(
    name = "lab",
    about = "Millrace's perf lab: ratios against baselines and ceilings, measured in turns"
)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    run: RunArgs,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// A service that a case compares with; the lab starts it by itself.
    #[command(hide = true)]
    Serve(baselines::ServeArgs),
    /// The memory that an order takes, in a process of its own; the lab starts it by itself.
    #[command(hide = true)]
    MemoryOf {
        /// queued or remembered.
        what: String,
    },
}

#[derive(Debug, clap::Args)]
struct RunArgs {
    /// Cases to run; all of them unless some are named.
    cases: Vec<String>,
    /// Minutes instead of an hour: fewer rounds, smaller amounts.
    #[arg(long)]
    quick: bool,
    /// Name the cases, and run none.
    #[arg(long)]
    list: bool,
    /// Print the targets as JSON.
    #[arg(long)]
    json: bool,
    /// Write each case's result to its folder, and the table of all targets to perf/README.md.
    #[arg(long)]
    record: bool,
    /// Minutes that the soak lasts; 10, or half a minute with --quick.
    #[arg(long, value_name = "MINUTES")]
    soak_minutes: Option<f64>,
    /// The `millrace` of an earlier build, to be measured beside this one where a case does that: `latency`.
    #[arg(long, value_name = "PROGRAM")]
    earlier: Option<PathBuf>,
}

type Running<'a> = Pin<Box<dyn Future<Output = anyhow::Result<Vec<Finding>>> + 'a>>;

/// A case: the name of its folder, and its function.
struct Case {
    name: &'static str,
    run: for<'a> fn(&'a Lab) -> Running<'a>,
}

/// Every case, the quick ones first.
const CASES: &[Case] = &[
    Case {
        name: "sold_out",
        run: |lab| Box::pin(sold_out::run(lab)),
    },
    Case {
        name: "engine",
        run: |lab| Box::pin(engine::run(lab)),
    },
    Case {
        name: "wait_mode",
        run: |lab| Box::pin(wait_mode::run(lab)),
    },
    Case {
        name: "entries",
        run: |lab| Box::pin(entries::run(lab)),
    },
    Case {
        name: "batch_endpoint",
        run: |lab| Box::pin(batch_endpoint::run(lab)),
    },
    Case {
        name: "async_acks",
        run: |lab| Box::pin(async_acks::run(lab)),
    },
    Case {
        name: "order_logs",
        run: |lab| Box::pin(order_logs::run(lab)),
    },
    Case {
        name: "journal_sync",
        run: |lab| Box::pin(journal_sync::run(lab)),
    },
    Case {
        name: "latency",
        run: |lab| Box::pin(latency::run(lab)),
    },
    Case {
        name: "events",
        run: |lab| Box::pin(events::run(lab)),
    },
    Case {
        name: "stalls",
        run: |lab| Box::pin(stalls::run(lab)),
    },
    Case {
        name: "database_away",
        run: |lab| Box::pin(database_away::run(lab)),
    },
    Case {
        name: "duplicates",
        run: |lab| Box::pin(duplicates::run(lab)),
    },
    Case {
        name: "callbacks",
        run: |lab| Box::pin(callbacks::run(lab)),
    },
    Case {
        name: "mixed_sale",
        run: |lab| Box::pin(mixed_sale::run(lab)),
    },
    Case {
        name: "waiting_list",
        run: |lab| Box::pin(waiting_list::run(lab)),
    },
    Case {
        name: "overload",
        run: |lab| Box::pin(overload::run(lab)),
    },
    Case {
        name: "costs",
        run: |lab| Box::pin(costs::run(lab)),
    },
    Case {
        name: "cross_check",
        run: |lab| Box::pin(cross_check::run(lab)),
    },
    Case {
        name: "memory",
        run: |lab| Box::pin(memory::run(lab)),
    },
    Case {
        name: "recovery",
        run: |lab| Box::pin(recovery::run(lab)),
    },
    Case {
        name: "table_size",
        run: |lab| Box::pin(table_size::run(lab)),
    },
    Case {
        name: "soak",
        run: |lab| Box::pin(soak::run(lab)),
    },
];

fn main() -> anyhow::Result<std::process::ExitCode> {
    let cli = Cli::parse();
    match cli.command {
        Some(Command::Serve(arguments)) => baselines::serve(arguments)?,
        Some(Command::MemoryOf { what }) => memory::memory_of(&what)?,
        None => {
            let runtime = tokio::runtime::Builder::new_multi_thread()
                .enable_all()
                .build()?;
            return runtime.block_on(run(cli.run));
        }
    }
    Ok(std::process::ExitCode::SUCCESS)
}

async fn run(arguments: RunArgs) -> anyhow::Result<std::process::ExitCode> {
    if arguments.list {
        for case in CASES {
            println!("{}", case.name);
        }
        return Ok(std::process::ExitCode::SUCCESS);
    }
    let lab = Lab {
        quick: arguments.quick,
        record: arguments.record,
        earlier: arguments.earlier,
        soak_minutes: arguments
            .soak_minutes
            .unwrap_or(if arguments.quick { 0.5 } else { 10.0 }),
    };
    for name in &arguments.cases {
        let known = CASES.iter().any(|case| case.name == name);
        let names: Vec<&str> = CASES.iter().map(|case| case.name).collect();
        anyhow::ensure!(
            known,
            "there is no case `{name}`; there are: {}",
            names.join(" ")
        );
    }
    let mut report = report::Report::new();
    for case in CASES {
        if !arguments.cases.is_empty() && !arguments.cases.iter().any(|name| name == case.name) {
            continue;
        }
        eprintln!("{}", case.name);
        let findings = (case.run)(&lab).await;
        report.add(case.name, findings, arguments.record)?;
    }
    if arguments.record {
        let names: Vec<&str> = CASES.iter().map(|case| case.name).collect();
        report::write_targets(&names)?;
    }
    report.print(arguments.json)?;
    Ok(report.exit_code())
}
