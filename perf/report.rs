//! One table of everything, and each case's own record.

use std::io::{IsTerminal, Write as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use comfy_table::{CellAlignment, Table, presets};
use serde_json::{Value, json};

use crate::fixture::machine::{commit, machine};
use crate::fixture::{Finding, Target};

/// What is recorded of a case, in its folder.
const RESULT: &str = "result.json";

/// The findings of a run.
pub struct Report {
    commit: String,
    machine: String,
    command: String,
    findings: Vec<(&'static str, Finding)>,
    failed: Vec<(&'static str, String)>,
}

impl Report {
    /// An empty one.
    pub fn new() -> Self {
        let arguments: Vec<String> = std::env::args().skip(1).collect();
        Report {
            commit: commit(),
            machine: machine(),
            command: format!("./x perf {}", arguments.join(" "))
                .trim_end()
                .to_owned(),
            findings: Vec::new(),
            failed: Vec::new(),
        }
    }

    /// Adds what a case found, or why it found nothing.
    ///
    /// # Errors
    /// If its record cannot be written.
    pub fn add(
        &mut self,
        case: &'static str,
        findings: anyhow::Result<Vec<Finding>>,
        record: bool,
    ) -> anyhow::Result<()> {
        let findings = match findings {
            Ok(findings) => findings,
            Err(error) => {
                eprintln!("    FAILED: {error:#}");
                self.failed.push((case, format!("{error:#}")));
                return Ok(());
            }
        };
        for finding in &findings {
            eprintln!("    {}", line(finding));
        }
        if record {
            let text = serde_json::to_string_pretty(&json!({
                "commit": self.commit,
                "machine": self.machine,
                "command": self.command,
                "findings": findings.iter().map(row).collect::<Vec<_>>(),
            }))?;
            std::fs::write(folder().join(case).join(RESULT), text + "\n")?;
        }
        self.findings
            .extend(findings.into_iter().map(|finding| (case, finding)));
        Ok(())
    }

    /// Prints everything on standard output.
    ///
    /// # Errors
    /// If nothing can be printed.
    pub fn print(&self, as_json: bool) -> anyhow::Result<()> {
        let mut out = std::io::stdout();
        if as_json {
            writeln!(out, "{}", serde_json::to_string_pretty(&self.json())?)?;
            return Ok(());
        }
        let mut table = Table::new();
        table.load_preset(presets::NOTHING);
        table.set_header(["", "measured", "value", "least", "greatest", "target", ""]);
        for (_, finding) in &self.findings {
            let (least, greatest) = finding
                .spread
                .map_or((String::new(), String::new()), |(least, greatest)| {
                    (number(least), number(greatest))
                });
            let target = finding.target.map(target).unwrap_or_default();
            let met = match finding.target {
                None => "",
                Some(target) if target.is_met_by(finding.value) => "met",
                Some(_) => "MISSED",
            };
            table.add_row([
                finding.id.unwrap_or_default().to_owned(),
                finding.what.clone(),
                number(finding.value),
                least,
                greatest,
                target,
                met.to_owned(),
            ]);
        }
        for column in 2..5 {
            if let Some(column) = table.column_mut(column) {
                column.set_cell_alignment(CellAlignment::Right);
            }
        }
        if !out.is_terminal() {
            table.set_width(160);
        }
        writeln!(
            out,
            "\ncommit {}, {}\n{}\n\n{table}",
            self.commit, self.machine, self.command
        )?;
        for (case, why) in &self.failed {
            writeln!(out, "{case} FAILED: {why}")?;
        }
        Ok(())
    }

    fn json(&self) -> Value {
        let (targets, figures): (Vec<_>, Vec<_>) = self
            .findings
            .iter()
            .partition(|(_, finding)| finding.id.is_some());
        let rows = |list: Vec<&(&str, Finding)>| -> Vec<Value> {
            let with_case = |(case, finding): &&(&str, Finding)| {
                let mut row = row(finding);
                row["case"] = json!(case);
                row
            };
            list.iter().map(with_case).collect()
        };
        json!({
            "commit": self.commit, "machine": self.machine, "command": self.command,
            "targets": rows(targets), "figures": rows(figures),
            "failed": self.failed.iter().map(|(case, why)| json!({ "case": case, "reason": why })).collect::<Vec<_>>(),
        })
    }

    /// 1 where a case could not be measured. A target that is missed is a result.
    pub fn exit_code(&self) -> ExitCode {
        if self.failed.is_empty() {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        }
    }
}

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("perf")
}

/// A finding for machines.
fn row(finding: &Finding) -> Value {
    json!({
        "id": finding.id,
        "what": finding.what,
        "value": finding.value,
        "least": finding.spread.map(|spread| spread.0),
        "greatest": finding.spread.map(|spread| spread.1),
        "target": finding.target.map(Target::number),
        "bound": finding.target.map(|target| match target {
            Target::AtLeast(_) => "at_least",
            Target::AtMost(_) => "at_most",
        }),
        "met": finding.target.map(|target| target.is_met_by(finding.value)),
    })
}

/// A row of the table of targets, from the record of a case.
struct TableRow {
    id: String,
    case: String,
    commit: String,
    what: String,
    value: String,
    least: String,
    greatest: String,
    target: String,
    met: &'static str,
}

impl TableRow {
    /// `None` for a figure without a target.
    fn read(case: &str, commit: &Value, row: &Value) -> Option<Self> {
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let figure = |name: &str| row[name].as_f64().map(number).unwrap_or_default();
        let wanted = row["target"].as_f64()?;
        let wanted = match row["bound"].as_str() {
            Some("at_least") => Target::AtLeast(wanted),
            _ => Target::AtMost(wanted),
        };
        Some(TableRow {
            id: row["id"].as_str()?.to_owned(),
            case: case.to_owned(),
            commit: text(commit),
            what: text(&row["what"]),
            value: figure("value"),
            least: figure("least"),
            greatest: figure("greatest"),
            target: target(wanted),
            met: match row["met"].as_bool() {
                Some(true) => "met",
                _ => "**missed**",
            },
        })
    }

    /// The row in Markdown. A single value has no spread.
    fn markdown(&self) -> String {
        let spread = match self.least.as_str() {
            "" => String::new(),
            least => format!("{least} to {}", self.greatest),
        };
        format!(
            "| {} | {} | {} | {spread} | {} | {} | `./x perf {}` | {} |\n",
            self.id, self.what, self.value, self.target, self.met, self.case, self.commit,
        )
    }
}

/// Writes the table of targets into `perf/README.md`, from the records of these cases.
///
/// # Errors
/// If the file cannot be read or written, or has no marks.
pub fn write_targets(cases: &[&str]) -> anyhow::Result<()> {
    let mut rows = Vec::new();
    for case in cases {
        let Ok(text) = std::fs::read_to_string(folder().join(case).join(RESULT)) else {
            continue;
        };
        let recorded: Value = serde_json::from_str(&text)?;
        let findings = recorded["findings"].as_array().into_iter().flatten();
        rows.extend(findings.filter_map(|row| TableRow::read(case, &recorded["commit"], row)));
    }
    rows.sort_by(|one, other| one.id.cmp(&other.id));
    let rows: String = rows.iter().map(TableRow::markdown).collect();
    put_between(
        &folder().join("README.md"),
        "targets",
        "| | measured | value | least to greatest | target | | command | commit |\n\
         |---|---|---|---|---|---|---|---|\n",
        &rows,
    )
}

/// Puts a table between two marks of a Markdown file, in place of what is there.
fn put_between(file: &Path, mark: &str, head: &str, rows: &str) -> anyhow::Result<()> {
    let (begins, ends) = (
        format!("<!-- {mark} -->"),
        format!("<!-- end of {mark} -->"),
    );
    let text = std::fs::read_to_string(file)?;
    let around = text.split_once(&begins).and_then(|(before, rest)| {
        let (_, after) = rest.split_once(&ends)?;
        Some((before, after))
    });
    let (before, after) = around
        .with_context(|| format!("{} has no marks `{begins}` and `{ends}`", file.display()))?;
    std::fs::write(file, format!("{before}{begins}\n{head}{rows}{ends}{after}"))?;
    Ok(())
}

fn line(finding: &Finding) -> String {
    let spread = finding
        .spread
        .map(|(least, greatest)| format!(" ({} to {})", number(least), number(greatest)))
        .unwrap_or_default();
    let verdict = match finding.target {
        None => String::new(),
        Some(wanted) => {
            let met = if wanted.is_met_by(finding.value) {
                "met"
            } else {
                "MISSED"
            };
            format!("; target {}: {met}", target(wanted))
        }
    };
    let id = finding.id.map(|id| format!("{id} ")).unwrap_or_default();
    format!(
        "{id}{}: {}{spread}{verdict}",
        finding.what,
        number(finding.value)
    )
}

fn target(target: Target) -> String {
    match target {
        Target::AtLeast(least) => format!("≥ {}", number(least)),
        Target::AtMost(most) => format!("≤ {}", number(most)),
    }
}

/// Three digits that count.
fn number(value: f64) -> String {
    let size = value.abs();
    if size >= 1_000.0 {
        let digits = format!("{value:.0}");
        let mut grouped = String::new();
        for (place, digit) in digits.chars().enumerate() {
            if place > 0 && (digits.len() - place) % 3 == 0 && grouped != "-" {
                grouped.push(',');
            }
            grouped.push(digit);
        }
        grouped
    } else if size >= 100.0 || value == value.trunc() {
        format!("{value:.0}")
    } else if size >= 10.0 {
        format!("{value:.1}")
    } else if size >= 0.1 {
        format!("{value:.3}")
    } else {
        format!("{value:.5}")
    }
}
