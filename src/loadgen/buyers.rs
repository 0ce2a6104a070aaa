//! A thread of buyers: its share of the schedule, its connections, its records.

use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Barrier, OnceLock, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::arrival::Arrival;
use super::error::LoadError;
use super::outcome::{Answer, AnswerKind};
use super::platform::PlacedOrder;
use super::recorder::{LiveCounters, Recorder};
use super::request_template::RequestTemplate;
use super::schedule::Cursor;
use super::sender::{Fault, Reply, Sender, Traffic};
use super::target::Target;
use super::waiting::WaitingOrder;

/// How long connections may take to be made before the load begins.
const CONNECT_PATIENCE: Duration = Duration::from_secs(5);
/// Pause between two updates of the p99 on the progress line.
const SHOW_P99_EVERY: Duration = Duration::from_millis(500);

/// Pause before a click is repeated, as `Retry-After: 1` asks.
const REPEAT_AFTER: Duration = Duration::from_secs(1);

/// What all threads of a run share.
pub(super) struct RunShared {
    pub target: Target,
    /// The addresses behind the targets.
    pub addresses: Vec<SocketAddr>,
    pub template: Arc<RequestTemplate>,
    pub request_timeout: Duration,
    /// How long a click is repeated from the moment at which it was due.
    pub repeat: Duration,
    pub interval_ms: u64,
    pub keep_outcomes: bool,
    /// Set to end the load early; answers to requests under way are still awaited.
    pub stop: AtomicBool,
    /// Passed once all threads are connected.
    pub ready: Barrier,
    /// Moment zero of the schedule, set by the first thread that passes `ready`.
    pub start: OnceLock<Instant>,
}

/// Starts a thread; joining it gives its records.
pub(super) fn spawn(
    shared: Arc<RunShared>,
    cursor: Cursor,
    connections: usize,
    live: Arc<LiveCounters>,
    payments_tx: Option<mpsc::Sender<PlacedOrder>>,
    waiting_tx: Option<mpsc::Sender<WaitingOrder>>,
) -> Result<JoinHandle<io::Result<Recorder>>, LoadError> {
    let failed = |e: io::Error| LoadError::Thread {
        what: "sending thread",
        reason: e.to_string(),
    };
    let mut sender = Sender::over(
        shared.addresses.clone(),
        connections,
        shared.request_timeout,
    )
    .map_err(failed)?;
    let mut buyers = Buyers {
        recorder: Recorder::new(shared.interval_ms, shared.keep_outcomes),
        start: Instant::now(),
        shown_at: Instant::now(),
        shared,
        cursor,
        again: VecDeque::new(),
        live,
        payments_tx,
        waiting_tx,
    };
    std::thread::Builder::new()
        .name("loadgen".to_owned())
        .spawn(move || {
            // Connections that are missing are tried again with their first request. A failure is returned only
            // after `ready`, so that no other thread waits for this one.
            let connected = sender.connect(CONNECT_PATIENCE);
            buyers.shared.ready.wait();
            connected?;
            buyers.start = *buyers.shared.start.get_or_init(Instant::now);
            sender.run(&mut buyers)?;
            Ok(buyers.recorder)
        })
        .map_err(failed)
}

/// A click under way.
#[derive(Clone, Copy)]
struct Click {
    arrival: Arrival,
    /// Whether an earlier attempt had no answer, so that it may have placed the order.
    is_uncertain: bool,
}

/// The traffic of one thread.
struct Buyers {
    shared: Arc<RunShared>,
    cursor: Cursor,
    /// Clicks that are repeated, and when; the next one first.
    again: VecDeque<(Instant, Click)>,
    start: Instant,
    recorder: Recorder,
    live: Arc<LiveCounters>,
    shown_at: Instant,
    /// Takes placed orders to the payment platform; none without payments.
    payments_tx: Option<mpsc::Sender<PlacedOrder>>,
    /// Takes orders that wait for units to those who ask for them; none if nobody waits.
    waiting_tx: Option<mpsc::Sender<WaitingOrder>>,
}

impl Traffic for Buyers {
    type Request = Click;

    fn take_due(&mut self, now: Instant, out: &mut Vec<u8>) -> Option<Click> {
        if let Some((due, click)) = self.again.front().copied()
            && due <= now
        {
            self.again.pop_front();
            self.write(&click.arrival, out);
            return Some(click);
        }
        loop {
            let now_ns = self.since_start_ns(now);
            let arrival = self.cursor.take_due(now_ns)?;
            self.recorder.sent(&arrival, now_ns);
            self.live.count_sent();
            let late = Duration::from_nanos(now_ns.saturating_sub(arrival.scheduled_ns));
            if late <= self.shared.request_timeout {
                self.write(&arrival, out);
                return Some(Click {
                    arrival,
                    is_uncertain: false,
                });
            }
            self.record(&arrival, now, &Answer::fault(Fault::NotSent));
        }
    }

    fn next_due(&self) -> Option<Instant> {
        let first = self.cursor.due_ns();
        let first = first.map(|due_ns| self.start + Duration::from_nanos(due_ns));
        let again = self.again.front().map(|(due, _)| *due);
        first.into_iter().chain(again).min()
    }

    fn answered(&mut self, click: Click, now: Instant, answer: Result<Reply<'_>, Fault>) {
        let arrival = click.arrival;
        let reply = match answer {
            Ok(reply) => reply,
            Err(fault) => return self.repeat_or_record(click, now, Answer::fault(fault)),
        };
        let replayed = reply.field("idempotency-replayed").is_some();
        let answer = Answer::read(reply.status, replayed, reply.body);
        if let Some(payments_tx) = &self.payments_tx
            && answer.kind.is_placed()
            && let Some(order) = PlacedOrder::read(&arrival, reply.body)
        {
            // A platform that has given up takes no more orders.
            let _ = payments_tx.send(order);
        }
        if let Some(waiting_tx) = &self.waiting_tx
            && answer.kind == AnswerKind::Waitlisted
            && let Some(order_id) = answer.order_id
        {
            let Arrival { buyer, sku, .. } = arrival;
            let _ = waiting_tx.send(WaitingOrder {
                buyer,
                sku,
                order_id,
            });
        }
        self.repeat_or_record(click, now, answer);
    }

    fn go_on(&mut self, now: Instant, busy: usize) -> bool {
        if self.shared.stop.load(Ordering::Relaxed) {
            self.cursor.end();
            for (_, click) in std::mem::take(&mut self.again) {
                self.record(&click.arrival, now, &Answer::fault(Fault::Closed));
            }
        }
        if now.saturating_duration_since(self.shown_at) >= SHOW_P99_EVERY {
            self.shown_at = now;
            if let Some(p99_ms) = self.recorder.p99_ms() {
                self.live.show_p99(p99_ms);
            }
        }
        busy > 0 || self.cursor.due_ns().is_some() || !self.again.is_empty()
    }
}

impl Buyers {
    fn since_start_ns(&self, now: Instant) -> u64 {
        now.saturating_duration_since(self.start).as_nanos() as u64
    }

    fn write(&self, arrival: &Arrival, out: &mut Vec<u8>) {
        let RunShared {
            target, template, ..
        } = &*self.shared;
        template.write(arrival, target.order_head(arrival.buyer), out);
    }

    /// Repeats a click whose attempt decided nothing, as long as its buyer has patience.
    fn repeat_or_record(&mut self, click: Click, now: Instant, answer: Answer) {
        let has_no_answer = answer.kind == AnswerKind::Transport;
        let asks_again = answer.kind == AnswerKind::Unavailable || answer.http_status == 421;
        let is_uncertain = click.is_uncertain || has_no_answer;
        let again_at = now + REPEAT_AFTER;
        let until_ns = click.arrival.scheduled_ns + self.shared.repeat.as_nanos() as u64;
        let may_repeat = !self.shared.stop.load(Ordering::Relaxed)
            && !self.shared.repeat.is_zero()
            && self.since_start_ns(again_at) <= until_ns;
        if (has_no_answer || asks_again) && may_repeat {
            self.recorder.repeated += 1;
            self.again.push_back((
                again_at,
                Click {
                    is_uncertain,
                    ..click
                },
            ));
        } else if asks_again && is_uncertain {
            // That this attempt placed nothing says nothing of the earlier one.
            self.record(&click.arrival, now, &Answer::fault(Fault::Closed));
        } else {
            self.record(&click.arrival, now, &answer);
        }
    }

    fn record(&mut self, arrival: &Arrival, now: Instant, answer: &Answer) {
        let now_ns = self.since_start_ns(now);
        self.recorder.answered(arrival, now_ns, answer);
        self.live.count_answer(answer.kind);
    }
}
