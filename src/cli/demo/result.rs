//! The result: a page, a table, or JSON.

use std::path::Path;

use anyhow::Context;
use serde_json::json;

use super::DemoArgs;
use crate::cli::output::print_line;
use crate::loadgen::{Check, KilledNode, LoadReport, PageOptions, render_page, render_table};

/// Columns of the table of checks, on any terminal and in a file.
const TABLE_COLUMNS: u16 = 100;

/// Writes the page, and prints the result.
pub fn publish(
    args: &DemoArgs,
    report: &LoadReport,
    checks: &[Check],
    killed: Option<KilledNode>,
) -> anyhow::Result<()> {
    let options = PageOptions {
        title: "Millrace: a flash sale".into(),
        subtitle: Some(format!(
            "{}{} units, {} clicks, {} PostgreSQL",
            args.nodes
                .map_or_else(String::new, |count| format!("{count} nodes, ")),
            args.stock,
            report.offered,
            if args.database_url.is_some() {
                "your"
            } else {
                "its own"
            }
        )),
        checks: checks.to_vec(),
        killed,
    };
    write_file(&args.page, &render_page(report, &options))?;
    print_line(&if args.json {
        let kept = checks.iter().all(|check| check.ok);
        let figures = json!({ "ok": kept, "promises": checks, "load": report });
        serde_json::to_string_pretty(&figures)?
    } else {
        format!(
            "{}\n{}\nThe pictures are in {}",
            render_table(report),
            check_table(checks),
            args.page.display()
        )
    })
}

fn check_table(checks: &[Check]) -> String {
    let mut table = comfy_table::Table::new();
    table
        .load_preset(comfy_table::presets::UTF8_HORIZONTAL_ONLY)
        .set_content_arrangement(comfy_table::ContentArrangement::Dynamic)
        .set_width(TABLE_COLUMNS)
        .set_header(["", "promise", "figures"]);
    for check in checks {
        let mark = if check.ok { "kept" } else { "BROKEN" };
        table.add_row([mark, &check.name, &check.detail]);
    }
    let last_line = match checks.iter().filter(|check| !check.ok).count() {
        0 => "Every promise was kept.".to_owned(),
        broken => format!("{broken} PROMISES WERE BROKEN."),
    };
    format!("{table}\n{last_line}")
}

fn write_file(path: &Path, text: &str) -> anyhow::Result<()> {
    std::fs::write(path, text)
        .with_context(|| format!("cannot write the page to {}", path.display()))
}
