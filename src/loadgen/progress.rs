//! Progress of a load while it runs.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{HumanCount, ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::outcome::AnswerKind;

/// How far a run has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Requests fall due.
    Load,
    /// All were sent; some answers are still to come.
    LastAnswers,
    /// All were answered; payments are still to come, or stock to come back.
    Payments,
    /// Undecided orders are asked for.
    FollowUp,
}

/// The state of a run at a moment.
#[derive(Debug, Clone)]
pub struct Snapshot {
    /// Since the first request was due.
    pub elapsed: Duration,
    /// How long requests fall due, if that is known.
    pub planned: Option<Duration>,
    /// How far the run has come.
    pub phase: Phase,
    /// Requests sent.
    pub sent: u64,
    /// Requests that the plan will send, about.
    pub planned_requests: u64,
    /// Requests answered a second, over about the last second.
    pub answered_per_second: f64,
    /// Requests sent and not yet answered.
    pub in_flight: u64,
    /// Orders placed.
    pub placed: u64,
    /// Payments acknowledged.
    pub paid: u64,
    /// Requests answered with the order of an earlier request.
    pub replayed: u64,
    /// Requests refused with `409`.
    pub refused: u64,
    /// Requests pushed back with `429` or `503`.
    pub pushed_back: u64,
    /// Requests that failed.
    pub errors: u64,
    /// The 99th percentile of latencies so far, in milliseconds; 0 while unknown.
    pub p99_ms: f64,
}

impl Snapshot {
    /// Adds up the counters of the threads.
    pub(super) fn count(&mut self, count_of: impl Fn(AnswerKind) -> u64) {
        let sum = |keep: fn(AnswerKind) -> bool| -> u64 {
            AnswerKind::ALL
                .into_iter()
                .filter(|&kind| keep(kind))
                .map(&count_of)
                .sum()
        };
        self.placed = sum(AnswerKind::is_placed);
        self.refused = sum(AnswerKind::is_refused);
        self.errors = sum(AnswerKind::is_error);
        self.replayed = count_of(AnswerKind::Replayed);
        self.pushed_back = count_of(AnswerKind::RateLimited) + count_of(AnswerKind::Unavailable);
        self.in_flight = self.sent.saturating_sub(sum(|_| true));
    }
}

/// Shows the state of a run, about ten times a second.
pub trait Progress: Send {
    /// The state at this moment.
    fn tick(&mut self, snapshot: &Snapshot);
    /// The run is over; nothing more comes.
    fn finish(&mut self) {}
}

/// Shows nothing.
#[derive(Debug, Default)]
pub struct Silent;

impl Progress for Silent {
    fn tick(&mut self, _: &Snapshot) {}
}

/// A live line on standard error if that is a terminal, otherwise a plain line now and then.
#[derive(Debug)]
pub struct StderrProgress {
    bar: Option<ProgressBar>,
    title: String,
    say: fn(&str),
    line_every: Duration,
    line_due: Duration,
}

impl StderrProgress {
    /// Looks at standard error and picks its form. Plain lines, one in every `line_every`, are given
    /// to `say`, which must not wait for a reader: the load would wait with it.
    pub fn new(line_every: Duration, say: fn(&str)) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr_with_hz(10));
            // The template is a constant, so the plain style never takes its place.
            if let Ok(style) = ProgressStyle::with_template("{prefix} {wide_bar:.cyan/dim} {msg}") {
                bar.set_style(style.progress_chars("━╸─"));
            }
            bar
        });
        Self {
            bar,
            title: String::new(),
            say,
            line_every,
            line_due: line_every,
        }
    }

    /// Puts a title before the live line.
    #[must_use]
    pub fn titled(mut self, title: &str) -> Self {
        self.title = format!("{title}  ");
        self
    }
}

impl Progress for StderrProgress {
    fn tick(&mut self, snapshot: &Snapshot) {
        match &self.bar {
            Some(bar) => {
                bar.set_length(snapshot.planned_requests.max(snapshot.sent).max(1));
                bar.set_position(snapshot.sent);
                bar.set_prefix(format!("{}{}", self.title, clock(snapshot)));
                bar.set_message(figures(snapshot));
            }
            None if snapshot.elapsed >= self.line_due => {
                self.line_due = snapshot.elapsed + self.line_every;
                (self.say)(&format!("{}  {}", clock(snapshot), figures(snapshot)));
            }
            None => {}
        }
    }

    fn finish(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }
}

/// `3.2 s of 10 s, 6.8 s left`.
fn clock(snapshot: &Snapshot) -> String {
    let elapsed = snapshot.elapsed.as_secs_f64();
    match (snapshot.phase, snapshot.planned) {
        (Phase::Load, Some(planned)) => {
            let planned = planned.as_secs_f64();
            let left = (planned - elapsed).max(0.0);
            format!("{elapsed:.1} s of {planned:.0} s, {left:.0} s left")
        }
        (Phase::Load, None) => format!("{elapsed:.1} s"),
        (Phase::LastAnswers, _) => format!("{elapsed:.1} s, last answers"),
        (Phase::Payments, _) => format!("{elapsed:.1} s, payments"),
        (Phase::FollowUp, _) => format!("{elapsed:.1} s, asking for undecided orders"),
    }
}

fn figures(snapshot: &Snapshot) -> String {
    let mut text = format!(
        "{}/s · {} placed · {} refused",
        HumanCount(snapshot.answered_per_second as u64),
        HumanCount(snapshot.placed),
        HumanCount(snapshot.refused),
    );
    for (count, name) in [
        (snapshot.paid, "paid"),
        (snapshot.replayed, "replayed"),
        (snapshot.pushed_back, "pushed back"),
        (snapshot.errors, "errors"),
    ] {
        if count > 0 {
            text.push_str(&format!(" · {} {name}", HumanCount(count)));
        }
    }
    if snapshot.p99_ms > 0.0 {
        text.push_str(&format!(" · p99 {:.1} ms", snapshot.p99_ms));
    }
    text
}

/// The rate over about the last second, from a counter that only grows.
#[derive(Debug, Default)]
pub(super) struct RateMeter {
    marks: std::collections::VecDeque<(Instant, u64)>,
}

impl RateMeter {
    pub(super) fn per_second(&mut self, count: u64) -> f64 {
        let now = Instant::now();
        self.marks.push_back((now, count));
        while self.marks.len() > 2
            && self
                .marks
                .get(1)
                .is_some_and(|(at, _)| now.duration_since(*at) >= Duration::from_secs(1))
        {
            self.marks.pop_front();
        }
        match self.marks.front() {
            Some((at, first)) if now > *at => {
                (count - first) as f64 / now.duration_since(*at).as_secs_f64()
            }
            _ => 0.0,
        }
    }
}
