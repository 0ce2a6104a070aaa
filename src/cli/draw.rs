//! `millrace draw verify`

use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow};
use clap::{Args, Subcommand};
use serde::Deserialize;

use super::output::print;
use crate::order::UserId;
use crate::order::draw::EntryToken;
use crate::order::draw::verify::{Evidence, Opening, Verdict, header_of, verify};

#[derive(Debug, Subcommand)]
pub enum DrawCommand {
    /// Check a published draw from its file alone.
    ///
    /// The file is what GET /v1/skus/{sku_id}/draw answers, all pages one after the other. docs/DRAW.md says how to do the
    /// same by hand. Exit code 0: every check holds; 1: one does not; 2: there is nothing to judge, such as no file, or
    /// a draw that is not made yet.
    Verify(VerifyArgs),
}

#[derive(Debug, Args)]
pub struct VerifyArgs {
    /// The published draw; - for standard input.
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// Also check the entry of this buyer.
    #[arg(long, value_name = "USER", requires = "entry_token")]
    user_id: Option<String>,
    /// The entry token of that buyer.
    #[arg(long, value_name = "TOKEN", requires = "user_id")]
    entry_token: Option<String>,
    /// Also check many entries: JSON lines with user_id and entry_token, such as the orders that the shop was answered.
    #[arg(long, value_name = "FILE")]
    openings: Option<PathBuf>,
    /// Compare with what was published earlier of the same draw; may be given several times.
    #[arg(long, value_name = "FILE")]
    earlier: Vec<PathBuf>,
    /// Print the verdict as JSON on standard output.
    #[arg(long)]
    json: bool,
}

/// True: every check holds.
pub fn run(command: &DrawCommand) -> anyhow::Result<bool> {
    let DrawCommand::Verify(args) = command;
    let evidence = evidence(args)?;
    let verdict =
        verify(open(&args.file)?, &evidence).with_context(|| args.file.display().to_string())?;
    print(&match args.json {
        true => format!("{:#}\n", serde_json::to_value(&verdict)?),
        false => words(&verdict),
    })?;
    Ok(verdict.ok)
}

fn evidence(args: &VerifyArgs) -> anyhow::Result<Evidence> {
    let mut evidence = Evidence::default();
    for path in &args.earlier {
        let header = header_of(open(path)?).with_context(|| path.display().to_string())?;
        evidence.earlier.push(header);
    }
    if let (Some(user_id), Some(token)) = (&args.user_id, &args.entry_token) {
        evidence.openings.push(opening(user_id, token)?);
    }
    if let Some(path) = &args.openings {
        read_openings(path, &mut evidence.openings).with_context(|| path.display().to_string())?;
    }
    Ok(evidence)
}

fn read_openings(path: &Path, openings: &mut Vec<Opening>) -> anyhow::Result<()> {
    #[derive(Deserialize)]
    struct Order {
        user_id: String,
        entry_token: String,
    }
    for (number, line) in open(path)?.lines().enumerate() {
        let line = line?;
        let order: Order = serde_json::from_str(&line)
            .with_context(|| format!("line {} is not an entry with its token", number + 1))?;
        let opening = opening(&order.user_id, &order.entry_token);
        openings.push(opening.with_context(|| format!("line {}", number + 1))?);
    }
    Ok(())
}

fn opening(user_id: &str, token: &str) -> anyhow::Result<Opening> {
    Ok(Opening {
        user_id: UserId::new(user_id).map_err(|error| anyhow!("the user id {error}"))?,
        token: EntryToken::from_hex(token)
            .context("an entry token has 32 lower-case hexadecimal digits")?,
    })
}

fn open(path: &Path) -> anyhow::Result<Box<dyn BufRead>> {
    if path == Path::new("-") {
        return Ok(Box::new(BufReader::new(io::stdin())));
    }
    let file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    Ok(Box::new(BufReader::with_capacity(1 << 16, file)))
}

/// The verdict for people.
pub(super) fn words(verdict: &Verdict) -> String {
    let mut text = format!(
        "The draw of {} at {}: {} entries for {} units, {} winners.\n\n",
        verdict.sku_id, verdict.draw_at, verdict.entries, verdict.units, verdict.winners
    );
    for check in &verdict.checks {
        let mark = if check.ok { "ok   " } else { "WRONG" };
        text.push_str(&format!(
            "  {mark}  {}\n         {}\n",
            check.holds, check.found
        ));
    }
    text.push_str(match verdict.ok {
        true => "\nEvery check holds.\n",
        false => "\nThis draw is NOT what it says.\n",
    });
    text.push_str("\nThe file alone cannot show:\n");
    for open in &verdict.not_checked {
        text.push_str(&format!("  - {open}.\n"));
    }
    text
}
