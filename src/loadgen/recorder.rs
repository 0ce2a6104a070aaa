//! Records that a sending thread keeps of its own requests; joined after the run.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};

use hdrhistogram::{Counter, Histogram};
use smol_str::SmolStr;

use super::arrival::Arrival;
use super::outcome::{Answer, AnswerKind, Codes, Row};

/// Intervals are never more than this, so that a long run cannot eat the memory.
const INTERVALS_MAX: usize = 20_000;

/// Different codes that are counted; the contract has about thirty.
const CODES_MAX: usize = 256;

/// The records of one thread.
#[derive(Debug)]
pub(super) struct Recorder {
    interval_ns: u64,
    keep_outcomes: bool,
    /// Latencies by kind of answer.
    pub by_kind: Vec<Histogram<u64>>,
    /// From the scheduled moment to the moment at which the request was written to its connection.
    pub send_lag: Histogram<u64>,
    /// Figures by interval.
    pub intervals: Vec<Interval>,
    /// Answers by the code of the problem, or by the fault.
    pub codes: BTreeMap<SmolStr, u64>,
    /// Every outcome, if the plan asks for them.
    pub rows: Vec<Row>,
    /// The names in `rows`.
    pub names: Codes,
    /// Orders answered as `undecided`.
    pub undecided: Vec<u64>,
    /// Second requests of double clicks.
    pub double_clicks: u64,
    /// Repetitions of clicks whose earlier attempt decided nothing.
    pub repeated: u64,
    /// When the last answer came, in nanoseconds after the start.
    pub last_answer_ns: u64,
}

/// One slice of time.
#[derive(Debug, Clone)]
pub(super) struct Interval {
    /// Requests that fell due in it.
    pub offered: u64,
    /// Answers that came in it, by kind.
    pub answers: [u64; AnswerKind::COUNT],
    /// Latencies of the requests that fell due in it.
    pub latencies: Histogram<u32>,
}

impl Interval {
    fn new() -> Self {
        Self {
            offered: 0,
            answers: [0; AnswerKind::COUNT],
            // Two digits: a line in a chart shows no third, and there are many of these.
            latencies: microseconds(2),
        }
    }
}

impl Recorder {
    /// A recorder with slices of this length.
    pub(super) fn new(interval_ms: u64, keep_outcomes: bool) -> Self {
        Self {
            interval_ns: interval_ms.max(1) * 1_000_000,
            keep_outcomes,
            by_kind: vec![microseconds(3); AnswerKind::COUNT],
            send_lag: microseconds(3),
            intervals: Vec::new(),
            codes: BTreeMap::new(),
            rows: Vec::new(),
            names: Codes::default(),
            undecided: Vec::new(),
            double_clicks: 0,
            repeated: 0,
            last_answer_ns: 0,
        }
    }

    /// Notes that a request was sent (or given up) at this moment.
    pub(super) fn sent(&mut self, arrival: &Arrival, now_ns: u64) {
        record(
            &mut self.send_lag,
            now_ns.saturating_sub(arrival.scheduled_ns),
        );
        self.double_clicks += u64::from(arrival.double);
        self.interval(arrival.scheduled_ns).offered += 1;
    }

    /// Notes the answer that came at this moment.
    pub(super) fn answered(&mut self, arrival: &Arrival, now_ns: u64, answer: &Answer) {
        let latency_ns = now_ns.saturating_sub(arrival.scheduled_ns);
        let place = answer.kind.place();
        self.last_answer_ns = self.last_answer_ns.max(now_ns);
        self.interval(now_ns).answers[place] += 1;
        if is_timed(answer) {
            record(&mut self.by_kind[place], latency_ns);
            record(
                &mut self.interval(arrival.scheduled_ns).latencies,
                latency_ns,
            );
        }
        // The code of an order is its status, which the kind implies.
        if answer.order_id.is_none() && !answer.code.is_empty() {
            if let Some(count) = self.codes.get_mut(&answer.code) {
                *count += 1;
            } else if self.codes.len() < CODES_MAX {
                self.codes.insert(answer.code.clone(), 1);
            }
        }
        if answer.kind == AnswerKind::Undecided
            && let Some(order_id) = answer.order_id
        {
            self.undecided.push(order_id);
        }
        if self.keep_outcomes {
            self.rows
                .push(Row::new(arrival, latency_ns, answer, &mut self.names));
        }
    }

    /// The 99th percentile so far, in milliseconds.
    pub(super) fn p99_ms(&self) -> Option<f64> {
        let mut all = microseconds(3);
        for latencies in &self.by_kind {
            add(&mut all, latencies);
        }
        (!all.is_empty()).then(|| ms(all.value_at_quantile(0.99)))
    }

    /// Adds another thread's records, except the outcomes, which [`Outcomes`](super::Outcomes) joins.
    pub(super) fn add(&mut self, other: &mut Self) {
        for (own, others) in self.by_kind.iter_mut().zip(&other.by_kind) {
            add(own, others);
        }
        add(&mut self.send_lag, &other.send_lag);
        if self.intervals.len() < other.intervals.len() {
            self.intervals
                .resize_with(other.intervals.len(), Interval::new);
        }
        for (own, others) in self.intervals.iter_mut().zip(&other.intervals) {
            own.offered += others.offered;
            add(&mut own.latencies, &others.latencies);
            for (count, more) in own.answers.iter_mut().zip(others.answers) {
                *count += more;
            }
        }
        for (code, count) in std::mem::take(&mut other.codes) {
            *self.codes.entry(code).or_default() += count;
        }
        self.undecided.append(&mut other.undecided);
        self.double_clicks += other.double_clicks;
        self.repeated += other.repeated;
        self.last_answer_ns = self.last_answer_ns.max(other.last_answer_ns);
    }

    fn interval(&mut self, at_ns: u64) -> &mut Interval {
        let place = ((at_ns / self.interval_ns) as usize).min(INTERVALS_MAX - 1);
        if self.intervals.len() <= place {
            self.intervals.resize_with(place + 1, Interval::new);
        }
        &mut self.intervals[place]
    }
}

/// An empty histogram of microseconds with this many significant decimal digits, 1 to 5.
pub(super) fn microseconds<C: Counter>(digits: u8) -> Histogram<C> {
    Histogram::new(digits).expect("the digits are constants")
}

/// Records a latency.
pub(super) fn record<C: Counter>(histogram: &mut Histogram<C>, latency_ns: u64) {
    // The range grows with its values, so none is refused.
    let _ = histogram.record((latency_ns / 1000).max(1));
}

/// Adds the counts of another histogram.
pub(super) fn add<C: Counter>(histogram: &mut Histogram<C>, other: &Histogram<C>) {
    let _ = histogram.add(other);
}

/// A value of a histogram in milliseconds.
pub(super) fn ms(us: u64) -> f64 {
    us as f64 / 1000.0
}

/// Whether the duration of a request says something about the server. A refused connection is over at
/// once, and would only flatter; a wait that was given up counts with its duration.
fn is_timed(answer: &Answer) -> bool {
    answer.kind != AnswerKind::Transport || matches!(answer.code.as_str(), "timeout" | "not_sent")
}

/// Counters that a thread shows while it runs. Only that thread writes them, so that relaxed additions
/// never meet; readers want a recent figure, not an exact one.
#[derive(Debug, Default)]
#[repr(align(128))]
pub(super) struct LiveCounters {
    sent: AtomicU64,
    answers: [AtomicU64; AnswerKind::COUNT],
    p99_us: AtomicU64,
}

impl LiveCounters {
    pub(super) fn count_sent(&self) {
        self.sent.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn count_answer(&self, kind: AnswerKind) {
        self.answers[kind.place()].fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn show_p99(&self, p99_ms: f64) {
        self.p99_us
            .store((p99_ms * 1000.0) as u64, Ordering::Relaxed);
    }

    pub(super) fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    pub(super) fn answers(&self, kind: AnswerKind) -> u64 {
        self.answers[kind.place()].load(Ordering::Relaxed)
    }

    pub(super) fn p99_ms(&self) -> f64 {
        self.p99_us.load(Ordering::Relaxed) as f64 / 1000.0
    }
}
