//! The result of a load.

use std::collections::BTreeMap;

use hdrhistogram::{Counter, Histogram};
use serde::Serialize;

use super::lanes::LaneSeries;
use super::outcome::{AnswerKind, Outcomes};
use super::plan::LoadPlan;
use super::platform::PaymentReport;
use super::recorder::{Recorder, add, microseconds, ms};
use super::waiting::WaitlistReport;

/// Quantile points of a distribution: nine a decade of `1 - p`, down to one in a million.
const DECADES: i32 = 6;

/// Requests, answers and latencies of a load. Its serde form is the output of `--json`.
#[derive(Debug, Clone, Serialize)]
pub struct LoadReport {
    /// The plan that ran, without its tokens.
    pub plan: LoadPlan,
    /// When the first request was due, UTC, RFC 3339.
    pub started_at: String,
    /// From the first request's moment to the last answer, in milliseconds.
    pub elapsed_ms: f64,
    /// Whether the load was stopped before its schedule ended.
    pub interrupted: bool,
    /// Requests that fell due and were sent (or given up unsent).
    pub offered: u64,
    /// Requests that got an answer of any kind.
    pub answered: u64,
    /// Second requests of double clicks among them.
    pub double_clicks: u64,
    /// Repetitions of clicks whose earlier attempt decided nothing, if the plan has any.
    pub repeated: u64,
    /// Orders placed: `201` and `202 accepted`.
    pub placed: u64,
    /// Requests refused with `409`.
    pub refused: u64,
    /// Requests that failed: `504`, other `4xx` and `5xx`, no answer.
    pub errors: u64,
    /// Requests due a second, on average over the schedule.
    pub offered_per_second: f64,
    /// Answers a second, on average until the schedule's end or the last answer, whichever is later.
    pub answered_per_second: f64,
    /// The most answers within any one second.
    pub peak_answered_per_second: f64,
    /// The most requests due within any one second.
    pub peak_offered_per_second: f64,
    /// Answers by kind, those that occurred.
    pub answers: Vec<KindCount>,
    /// Answers without an order, by the `code` of their problem or the name of their fault.
    pub codes: BTreeMap<String, u64>,
    /// Latencies, counted from the moment a request was due.
    pub latency: LatencySummary,
    /// From the moment a request was due to the moment it was sent: queueing for a free
    /// connection, and the generator's own slowness. Part of the latency.
    pub send_lag: Percentiles,
    /// Latencies by quantile, for a percentile plot.
    pub distributions: Vec<Distribution>,
    /// Figures over time.
    pub series: Series,
    /// Stock over time, by SKU.
    pub stock: Vec<StockSeries>,
    /// Which node had which lane over time, if the plan watches them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lanes: Option<LaneSeries>,
    /// Final statuses of undecided orders.
    pub undecided: UndecidedReport,
    /// What became of orders that waited for units, if the plan has any.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub waitlist: Option<WaitlistReport>,
    /// The payments, if the plan has any.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub payments: Option<PaymentReport>,
    /// Every request with its answer, if the plan keeps outcomes.
    #[serde(skip)]
    pub outcomes: Option<Outcomes>,
}

/// How often one kind of answer was given.
#[derive(Debug, Clone, Serialize)]
pub struct KindCount {
    /// The kind.
    pub kind: AnswerKind,
    /// Its name for people.
    pub label: &'static str,
    /// How often.
    pub count: u64,
    /// Of all requests, 0 to 1.
    pub share: f64,
    /// How long these answers took.
    pub latency: Percentiles,
}

/// Percentiles of latencies in milliseconds; none if nothing was measured.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Percentiles {
    /// Latencies measured.
    pub count: u64,
    /// The mean.
    pub mean_ms: Option<f64>,
    /// The median.
    pub p50_ms: Option<f64>,
    /// 9 of 10 are below.
    pub p90_ms: Option<f64>,
    /// 99 of 100 are below.
    pub p99_ms: Option<f64>,
    /// 999 of 1,000 are below.
    pub p999_ms: Option<f64>,
    /// The longest.
    pub max_ms: Option<f64>,
}

/// Latencies of all requests and of the two outcomes that buyers care about.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub struct LatencySummary {
    /// Every answer, and every wait that was given up.
    pub all: Percentiles,
    /// `201` and `202 accepted`.
    pub placed: Percentiles,
    /// `409`.
    pub refused: Percentiles,
}

/// One line of a percentile plot.
#[derive(Debug, Clone, Serialize)]
pub struct Distribution {
    /// `all`, `placed` or `refused`.
    pub name: &'static str,
    /// Pairs of quantile (0 to 1) and latency in milliseconds, rising.
    pub points: Vec<(f64, f64)>,
}

/// Figures by interval of time, each list with one entry an interval.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Series {
    /// The length of an interval, in milliseconds.
    pub interval_ms: u64,
    /// Requests that fell due.
    pub offered: Vec<u64>,
    /// Answers that came, by kind; kinds that never occurred are left out.
    pub answers: BTreeMap<&'static str, Vec<u64>>,
    /// Median latency of the requests that fell due in the interval, in milliseconds.
    pub p50_ms: Vec<Option<f64>>,
    /// Their 99th percentile.
    pub p99_ms: Vec<Option<f64>>,
    /// Their longest.
    pub max_ms: Vec<Option<f64>>,
}

/// The stock of one SKU over time.
#[derive(Debug, Clone, Serialize)]
pub struct StockSeries {
    /// The SKU.
    pub sku_id: String,
    /// Its title, if it has one.
    pub title: Option<String>,
    /// Answers to `GET /v1/skus/{sku_id}`, about every 100 ms; the first, at 0, is from before the load.
    pub samples: Vec<StockSample>,
    /// When a sample first found nothing free, in milliseconds after the start.
    pub sold_out_after_ms: Option<f64>,
}

/// One sample of a SKU.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct StockSample {
    /// Milliseconds after the start.
    pub t_ms: f64,
    /// Units that can be ordered.
    pub free: u64,
    /// Units ordered and unpaid.
    pub held: u64,
    /// Units paid.
    pub sold: u64,
    /// All units.
    pub total: u64,
}

/// Orders answered as `undecided`.
#[derive(Debug, Clone, Default, Serialize)]
pub struct UndecidedReport {
    /// How many orders.
    pub orders: u64,
    /// Their final status; `unknown_order` where there is no row.
    pub settled: BTreeMap<String, u64>,
    /// Orders that were still undecided in the end.
    pub unsettled: u64,
}

impl LoadReport {
    /// Computes the figures from the joined records.
    pub(super) fn draw(plan: &LoadPlan, recorder: &Recorder, interval_ms: u64) -> Self {
        let all_kinds = |keep: fn(AnswerKind) -> bool| {
            let mut sum = microseconds(3);
            for kind in AnswerKind::ALL.into_iter().filter(|&kind| keep(kind)) {
                add(&mut sum, &recorder.by_kind[kind.place()]);
            }
            sum
        };
        let mut counts = [0u64; AnswerKind::COUNT];
        for interval in &recorder.intervals {
            for (count, more) in counts.iter_mut().zip(interval.answers) {
                *count += more;
            }
        }
        let count_of = |keep: fn(AnswerKind) -> bool| -> u64 {
            AnswerKind::ALL
                .into_iter()
                .filter(|&kind| keep(kind))
                .map(|kind| counts[kind.place()])
                .sum()
        };
        let offered: u64 = recorder.intervals.iter().map(|i| i.offered).sum();
        let all = all_kinds(|_| true);
        let placed = all_kinds(AnswerKind::is_placed);
        let refused = all_kinds(AnswerKind::is_refused);
        let answered = count_of(|kind| kind != AnswerKind::Transport);
        let series = Series::draw(recorder, interval_ms, &counts);
        let elapsed_ms = recorder.last_answer_ns as f64 / 1e6;
        let scheduled_s = series
            .offered
            .iter()
            .rposition(|&n| n > 0)
            .map_or(0.0, |last| (last + 1) as f64 * interval_ms as f64 / 1000.0);
        Self {
            plan: plan.clone(),
            started_at: String::new(),
            elapsed_ms,
            interrupted: false,
            offered,
            answered,
            double_clicks: recorder.double_clicks,
            repeated: recorder.repeated,
            placed: count_of(AnswerKind::is_placed),
            refused: count_of(AnswerKind::is_refused),
            errors: count_of(AnswerKind::is_error),
            offered_per_second: per_second(offered, scheduled_s),
            answered_per_second: per_second(answered, scheduled_s.max(elapsed_ms / 1000.0)),
            peak_answered_per_second: series.peak(|place| {
                recorder.intervals[place].answers.iter().sum::<u64>()
                    - recorder.intervals[place].answers[AnswerKind::Transport.place()]
            }),
            peak_offered_per_second: series.peak(|place| recorder.intervals[place].offered),
            answers: AnswerKind::ALL
                .into_iter()
                .filter(|kind| counts[kind.place()] > 0)
                .map(|kind| KindCount {
                    kind,
                    label: kind.label(),
                    count: counts[kind.place()],
                    share: counts[kind.place()] as f64 / offered.max(1) as f64,
                    latency: Percentiles::of(&recorder.by_kind[kind.place()]),
                })
                .collect(),
            codes: recorder
                .codes
                .iter()
                .map(|(code, count)| (code.to_string(), *count))
                .collect(),
            latency: LatencySummary {
                all: Percentiles::of(&all),
                placed: Percentiles::of(&placed),
                refused: Percentiles::of(&refused),
            },
            send_lag: Percentiles::of(&recorder.send_lag),
            distributions: [("all", &all), ("placed", &placed), ("refused", &refused)]
                .into_iter()
                .filter(|(_, latencies)| !latencies.is_empty())
                .map(|(name, latencies)| Distribution {
                    name,
                    points: distribution(latencies),
                })
                .collect(),
            series,
            stock: Vec::new(),
            undecided: UndecidedReport::default(),
            lanes: None,
            waitlist: None,
            payments: None,
            outcomes: None,
        }
    }

    /// How often an answer of this kind was given.
    pub fn count(&self, kind: AnswerKind) -> u64 {
        self.answers
            .iter()
            .find(|answer| answer.kind == kind)
            .map_or(0, |answer| answer.count)
    }
}

impl Percentiles {
    pub(super) fn of(latencies: &Histogram<u64>) -> Self {
        Self {
            count: latencies.len(),
            mean_ms: (!latencies.is_empty()).then(|| latencies.mean().round() / 1000.0),
            p50_ms: quantile_ms(latencies, 0.5),
            p90_ms: quantile_ms(latencies, 0.9),
            p99_ms: quantile_ms(latencies, 0.99),
            p999_ms: quantile_ms(latencies, 0.999),
            max_ms: max_ms(latencies),
        }
    }
}

impl Series {
    fn draw(recorder: &Recorder, interval_ms: u64, counts: &[u64; AnswerKind::COUNT]) -> Self {
        let intervals = &recorder.intervals;
        let latency = |pick: fn(&Histogram<u32>) -> Option<f64>| {
            intervals.iter().map(|i| pick(&i.latencies)).collect()
        };
        Self {
            interval_ms,
            offered: intervals.iter().map(|i| i.offered).collect(),
            answers: AnswerKind::ALL
                .into_iter()
                .filter(|kind| counts[kind.place()] > 0)
                .map(|kind| {
                    let counts = intervals.iter().map(|i| i.answers[kind.place()]);
                    (kind.name(), counts.collect())
                })
                .collect(),
            p50_ms: latency(|l| quantile_ms(l, 0.5)),
            p99_ms: latency(|l| quantile_ms(l, 0.99)),
            max_ms: latency(max_ms),
        }
    }

    /// The greatest sum over one second of intervals, as a rate; a run shorter than a second is
    /// taken as it is.
    fn peak(&self, count_at: impl Fn(usize) -> u64) -> f64 {
        let length = self.offered.len();
        let width = (1000 / self.interval_ms.max(1)).max(1) as usize;
        let width = width.min(length.max(1));
        let mut sum = 0;
        let mut peak = 0;
        for place in 0..length {
            sum += count_at(place);
            if place >= width {
                sum -= count_at(place - width);
            }
            peak = peak.max(sum);
        }
        per_second(peak, width as f64 * self.interval_ms as f64 / 1000.0)
    }
}

fn per_second(count: u64, seconds: f64) -> f64 {
    if seconds > 0.0 {
        (count as f64 / seconds * 10.0).round() / 10.0
    } else {
        0.0
    }
}

/// The latency at a quantile (0 to 1); none of an empty histogram.
fn quantile_ms<C: Counter>(latencies: &Histogram<C>, quantile: f64) -> Option<f64> {
    (!latencies.is_empty()).then(|| ms(latencies.value_at_quantile(quantile)))
}

fn max_ms<C: Counter>(latencies: &Histogram<C>) -> Option<f64> {
    (!latencies.is_empty()).then(|| ms(latencies.max()))
}

fn distribution(latencies: &Histogram<u64>) -> Vec<(f64, f64)> {
    let finest = 1.0 / latencies.len().max(1) as f64;
    let at = |quantile| quantile_ms(latencies, quantile).unwrap_or(0.0);
    let mut points = vec![(0.0, at(0.0))];
    for decade in 0..DECADES {
        for ninth in 0..18 {
            let above = 10f64.powi(-decade) * (1.0 - f64::from(ninth) * 0.05);
            if above < 1.0 && above >= finest {
                let quantile = 1.0 - above;
                points.push((quantile, at(quantile)));
            }
        }
    }
    points.push((1.0, max_ms(latencies).unwrap_or(0.0)));
    points
}
