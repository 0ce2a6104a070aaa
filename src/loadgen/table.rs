//! The result on a terminal.

use comfy_table::presets::NOTHING;
use comfy_table::{Cell, CellAlignment, Table, TableComponent};
use indicatif::HumanCount;

use super::platform::PaymentReport;
use super::report::{LoadReport, Percentiles, StockSeries, UndecidedReport};

/// The report as text: headlines, answers with their latencies, then payments.
pub fn render_table(report: &LoadReport) -> String {
    let mut text = headlines(report);
    text.push('\n');
    text.push_str(&answer_table(report));
    if let Some(payments) = &report.payments {
        text.push_str(&format!("\n{}\n", payment_table(payments)));
    }
    text
}

/// A line each for requests, answers, SKUs and undecided orders.
fn headlines(report: &LoadReport) -> String {
    let mut text = String::new();
    let mut line = |name: &str, value: String| {
        text.push_str(&format!("{name:<10} {value}\n"));
    };
    line(
        "offered",
        format!(
            "{} requests in {} ({}/s on average, {}/s at the peak){}",
            HumanCount(report.offered),
            seconds(report.elapsed_ms),
            whole(report.offered_per_second),
            whole(report.peak_offered_per_second),
            if report.interrupted {
                ", interrupted"
            } else {
                ""
            }
        ),
    );
    line(
        "answered",
        format!(
            "{} ({}/s on average, {}/s at the peak)",
            HumanCount(report.answered),
            whole(report.answered_per_second),
            whole(report.peak_answered_per_second)
        ),
    );
    for stock in report.stock.iter().filter_map(stock_line) {
        line("stock", stock);
    }
    if let Some(waitlist) = report.waitlist {
        let value = format!(
            "{} orders joined; {} were assigned units, {} ended without, {} still wait",
            HumanCount(waitlist.joined),
            HumanCount(waitlist.assigned),
            HumanCount(waitlist.ended),
            HumanCount(waitlist.waiting)
        );
        line("waiting", value);
    }
    if report.undecided.orders > 0 {
        line("undecided", undecided_line(&report.undecided));
    }
    text
}

fn stock_line(stock: &StockSeries) -> Option<String> {
    let last = stock.samples.last()?;
    let end = match stock.sold_out_after_ms {
        Some(ms) => format!("sold out after {}", seconds(ms)),
        None => format!("{} left", HumanCount(last.free)),
    };
    let paid = match last.sold {
        0 => String::new(),
        sold => format!(" ({} paid)", HumanCount(sold)),
    };
    Some(format!(
        "{}: {} of {} units taken{paid}, {end}",
        stock.sku_id,
        HumanCount(last.held + last.sold),
        HumanCount(last.total)
    ))
}

fn undecided_line(undecided: &UndecidedReport) -> String {
    let mut parts: Vec<String> = undecided
        .settled
        .iter()
        .map(|(status, count)| format!("{} {status}", HumanCount(*count)))
        .collect();
    if undecided.unsettled > 0 {
        parts.push(format!("{} still open", HumanCount(undecided.unsettled)));
    }
    format!(
        "{} orders: {}",
        HumanCount(undecided.orders),
        parts.join(", ")
    )
}

/// Answers by kind with their latencies, then codes.
fn answer_table(report: &LoadReport) -> String {
    let mut table = plain_table(&[
        "answer", "count", "share", "p50", "p90", "p99", "p99.9", "max",
    ]);
    for answer in &report.answers {
        add(
            &mut table,
            answer.label,
            answer.count,
            answer.share,
            &answer.latency,
        );
    }
    if report.answers.len() != 1 {
        add(&mut table, "all", report.offered, 1.0, &report.latency.all);
    }
    let mut text =
        format!("{table}\nLatencies in ms, counted from the moment each request was due.\n");
    if !report.codes.is_empty() {
        let mut codes: Vec<_> = report.codes.iter().collect();
        codes.sort_by_key(|(_, count)| std::cmp::Reverse(**count));
        let codes: Vec<String> = codes
            .into_iter()
            .map(|(code, count)| format!("{code} {}", HumanCount(*count)))
            .collect();
        text.push_str(&format!("Codes: {}\n", codes.join(" · ")));
    }
    if let Some(lag) = report.send_lag.p99_ms.filter(|&lag| lag >= 10.0) {
        text.push_str(&format!(
            "Note: the latest 1 % of requests left {lag:.0} ms or more after they were due, mostly for want of a free connection among {}.\n",
            report.plan.connections
        ));
    }
    text
}

/// Payments by kind, then deliveries and their latency.
fn payment_table(payments: &PaymentReport) -> String {
    let mut table = plain_table(&["payment", "sent", "acknowledged"]);
    let mut row = |label: &str, sent: u64, acknowledged: u64| {
        let cells = [
            label.to_owned(),
            HumanCount(sent).to_string(),
            HumanCount(acknowledged).to_string(),
        ];
        let cells = cells.into_iter().enumerate();
        table.add_row(cells.map(|(column, text)| aligned(column, text)));
    };
    for kind in &payments.kinds {
        row(kind.label, kind.sent, kind.acknowledged);
    }
    if payments.kinds.len() != 1 {
        row("all", payments.sent, payments.acknowledged);
    }
    let forged = &payments.false_signatures;
    row("false signature", forged.sent, forged.taken);
    let mut text = format!("{table}\n");
    for (currency, money) in &payments.money {
        text.push_str(&format!(
            "Money: {} minor units of {currency} sent, {} acknowledged\n",
            money.sent, money.acknowledged
        ));
    }
    let answers: Vec<String> = payments
        .answers
        .iter()
        .map(|(answer, count)| format!("{answer} {}", HumanCount(*count)))
        .collect();
    let latency = &payments.latency;
    text.push_str(&format!(
        "Callbacks: {} deliveries, {} of them sent again after a failure; answers: {}\n\
         False signatures: {} sent, {} refused with 401\n\
         Latency of a callback in ms: p50 {}, p90 {}, p99 {}, max {}",
        HumanCount(payments.deliveries),
        HumanCount(payments.retried),
        if answers.is_empty() {
            "none".to_owned()
        } else {
            answers.join(" · ")
        },
        HumanCount(forged.sent),
        HumanCount(forged.refused),
        millis(latency.p50_ms),
        millis(latency.p90_ms),
        millis(latency.p99_ms),
        millis(latency.max_ms),
    ));
    text
}

fn plain_table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_preset(NOTHING);
    // One rule below the header is enough.
    table.set_style(TableComponent::HeaderLines, '─');
    table.set_style(TableComponent::MiddleHeaderIntersections, '─');
    let header = header.iter().enumerate();
    table.set_header(header.map(|(column, name)| aligned(column, (*name).to_owned())));
    table
}

fn add(table: &mut Table, label: &str, count: u64, share: f64, latency: &Percentiles) {
    let cells = [
        label.to_owned(),
        HumanCount(count).to_string(),
        percent(share),
        millis(latency.p50_ms),
        millis(latency.p90_ms),
        millis(latency.p99_ms),
        millis(latency.p999_ms),
        millis(latency.max_ms),
    ];
    table.add_row(
        cells
            .into_iter()
            .enumerate()
            .map(|(column, text)| aligned(column, text)),
    );
}

fn aligned(column: usize, text: String) -> Cell {
    Cell::new(text).set_alignment(if column == 0 {
        CellAlignment::Left
    } else {
        CellAlignment::Right
    })
}

fn percent(share: f64) -> String {
    let percent = share * 100.0;
    if percent > 0.0 && percent < 0.1 {
        "<0.1 %".to_owned()
    } else {
        format!("{percent:.1} %")
    }
}

fn millis(ms: Option<f64>) -> String {
    match ms {
        None => "–".to_owned(),
        Some(ms) if ms < 10.0 => format!("{ms:.2}"),
        Some(ms) if ms < 100.0 => format!("{ms:.1}"),
        Some(ms) => HumanCount(ms.round() as u64).to_string(),
    }
}

fn whole(rate: f64) -> String {
    HumanCount(rate.round() as u64).to_string()
}

fn seconds(ms: f64) -> String {
    format!("{:.1} s", ms / 1000.0)
}
