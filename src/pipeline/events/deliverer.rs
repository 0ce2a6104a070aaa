//! Delivers the window of one sink: the events that are read and that the slot has not gone past.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::status::Shared;
use super::{Delivery, Event, Sink};
use crate::backoff::Backoff;
use crate::metrics::Metrics;
use crate::order::UnixMillis;
use crate::store::StoreError;
use crate::store::events::deliveries::{self, Waiting};
use crate::store::events::sinks;
use crate::store::postgres::Database;

/// Pause between looks while there is nothing to do.
pub(super) const POLL: Duration = Duration::from_millis(200);
/// Pauses before the events that failed are tried again while others are taken.
const ROUNDS: [Duration; 3] = [
    Duration::from_millis(200),
    Duration::from_millis(500),
    Duration::from_secs(1),
];
/// Pauses before a sink that takes nothing is tried again.
const AWAY: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));
/// The longest of them at first, and for how long: the receiver is being started, or restarted.
const AWAY_AT_FIRST: (Duration, Duration) = (Duration::from_secs(3), Duration::from_secs(180));
/// Pauses before an event that waits by itself is tried again, and how long it is tried.
const WAITING: (Duration, Duration) = (Duration::from_secs(5), Duration::from_secs(3_600));
const PATIENCE: Duration = Duration::from_secs(86_400);
/// Waiting events that are tried at once.
const WAITING_AT_ONCE: i64 = 32;
/// Most events that wait by themselves. A sink that leaves more than that is away.
const WAITING_MAX: usize = 10_000;
/// Most events of a window that go there, and the share of it.
const STRAYS: usize = 64;
const STRAY_SHARE: usize = 4;

/// What is to be delivered to one sink.
#[derive(Debug)]
pub(super) struct Deliverer {
    name: String,
    database: Database,
    sink: Arc<dyn Sink>,
    status: Shared,
    metrics: Metrics,
    /// Events in the order in which they were read.
    pub(super) window: Vec<Event>,
    /// Subjects with events in `event_deliveries`, and how many events these are.
    waiting: HashSet<String>,
    waiting_count: usize,
    away: Backoff,
    retry_at: Option<Instant>,
}

impl Deliverer {
    /// One with nothing to deliver.
    pub(super) fn new(
        name: String,
        database: Database,
        sink: Arc<dyn Sink>,
        status: Shared,
        metrics: Metrics,
    ) -> Self {
        Deliverer {
            name,
            database,
            sink,
            status,
            metrics,
            window: Vec::new(),
            waiting: HashSet::new(),
            waiting_count: 0,
            away: Backoff::new(AWAY.0, AWAY.1),
            retry_at: None,
        }
    }

    /// Whether the sink may be tried: it took events when it was last tried, or that was long enough ago.
    pub(super) fn may_try(&self) -> bool {
        self.retry_at.is_none_or(|at| at <= Instant::now())
    }

    /// Age in milliseconds of the oldest event in the window.
    pub(super) fn behind_ms(&self) -> u64 {
        let now = UnixMillis::now();
        let oldest = self.window.first().map_or(now, |event| event.at);
        u64::try_from(now.0 - oldest.0).unwrap_or(0)
    }

    /// Reads which subjects wait.
    pub(super) async fn look(&mut self) -> Result<(), StoreError> {
        let subjects = deliveries::waiting_subjects(&self.database, &self.name).await?;
        self.waiting_count = subjects.len();
        self.waiting = subjects.into_iter().collect();
        Ok(())
    }

    /// Delivers the window. Returns false if the sink is away: what it did not take is in the window still.
    pub(super) async fn deliver(&mut self) -> Result<bool, StoreError> {
        if self.window.is_empty() {
            return Ok(true);
        }
        if !self.may_try() {
            tokio::time::sleep(POLL).await;
            return Ok(false);
        }
        let window = std::mem::take(&mut self.window);
        let count = window.len();
        let (behind, open): (Vec<Event>, Vec<Event>) = window
            .into_iter()
            .partition(|event| self.waiting.contains(&event.subject));
        self.have_wait(&behind, 0, "an earlier event of its subject waits", false)
            .await?;
        // Each with why it failed last.
        let mut open: Vec<(Event, Option<String>)> =
            open.into_iter().map(|event| (event, None)).collect();
        let mut rounds = ROUNDS.iter();
        loop {
            if !self.deliver_once(&mut open).await? {
                self.window = open.into_iter().map(|(event, _)| event).collect();
                return Ok(false);
            }
            if open.is_empty() {
                break;
            }
            let took_some = open.len() + behind.len() < count;
            match rounds.next().filter(|_| took_some) {
                Some(pause) => tokio::time::sleep(*pause).await,
                None => return self.settle(open, count, took_some).await,
            }
        }
        self.is_back();
        Ok(true)
    }

    /// Tries each event once, and keeps those that were not taken. Returns false if the sink wants no events any more.
    async fn deliver_once(
        &mut self,
        open: &mut Vec<(Event, Option<String>)>,
    ) -> Result<bool, StoreError> {
        let tried = std::mem::take(open);
        let events: Vec<Event> = tried.iter().map(|(event, _)| event.clone()).collect();
        let outcomes = self.sink.deliver(&events).await;
        let (mut delivered, mut failures, mut gone) = (0, 0, None);
        let mut refused = Vec::new();
        let mut outcomes = outcomes.into_iter();
        for (event, reason) in tried {
            match outcomes.next().unwrap_or(Delivery::Untried) {
                Delivery::Delivered => delivered += 1,
                Delivery::Refused(reason) => refused.push((event, reason)),
                Delivery::Failed(reason) => {
                    failures += 1;
                    open.push((event, Some(reason)));
                }
                Delivery::Untried => open.push((event, reason)),
                Delivery::Gone(reason) => {
                    gone = Some(reason);
                    open.push((event, None));
                }
            }
        }
        let (metrics, name) = (&self.metrics, &self.name);
        metrics
            .events_delivered
            .with_label_values(&[name])
            .inc_by(delivered);
        metrics
            .events_failures
            .with_label_values(&[name])
            .inc_by(failures);
        for (event, reason) in refused {
            tracing::error!(
                sink = self.name,
                event = event.id,
                reason,
                "a sink refuses an event; it is a dead letter"
            );
            self.have_wait(std::slice::from_ref(&event), 1, &reason, true)
                .await?;
        }
        if let Some(reason) = gone {
            sinks::disable(&self.database, &self.name, &reason).await?;
            return Ok(false);
        }
        Ok(true)
    }

    /// Decides what becomes of events that were not taken: they wait by themselves, or the sink is away.
    async fn settle(
        &mut self,
        open: Vec<(Event, Option<String>)>,
        count: usize,
        took_some: bool,
    ) -> Result<bool, StoreError> {
        let are_strays = open.len() <= STRAYS.max(count / STRAY_SHARE)
            && self.waiting_count + open.len() <= WAITING_MAX;
        if took_some && are_strays {
            for (event, reason) in &open {
                let attempts = if reason.is_some() {
                    ROUNDS.len() as i32 + 1
                } else {
                    0
                };
                let reason = reason
                    .as_deref()
                    .unwrap_or("an earlier event of its subject waits");
                self.have_wait(std::slice::from_ref(event), attempts, reason, false)
                    .await?;
            }
            self.is_back();
            return Ok(true);
        }
        let reason = open
            .iter()
            .find_map(|(_, reason)| reason.clone())
            .unwrap_or_default();
        if self.away.attempts() == 0 {
            tracing::warn!(
                sink = self.name,
                to = self.sink.title(),
                reason,
                "a sink takes no events; retrying. Orders are not concerned"
            );
        }
        let since = self.status.fail(reason);
        self.window = open.into_iter().map(|(event, _)| event).collect();
        let pause = self.away.jittered_pause();
        let pause = match since.elapsed() < AWAY_AT_FIRST.1 {
            true => pause.min(AWAY_AT_FIRST.0),
            false => pause,
        };
        self.retry_at = Some(Instant::now() + pause);
        Ok(false)
    }

    fn is_back(&mut self) {
        if self.away.attempts() > 0 {
            tracing::info!(sink = self.name, "the sink takes events again");
        }
        self.away.reset();
        self.retry_at = None;
        self.status.change(|status| {
            status.failure = None;
            status.has_delivered = true;
        });
    }

    async fn have_wait(
        &mut self,
        events: &[Event],
        attempts: i32,
        error: &str,
        is_dead: bool,
    ) -> Result<(), StoreError> {
        let waiting: Vec<Waiting<'_>> = events
            .iter()
            .map(|event| Waiting {
                event_id: &event.id,
                subject: &event.subject,
                kind: &event.kind,
                body: &event.body,
                traceparent: event.traceparent.as_deref(),
                attempts,
                error,
                is_dead,
            })
            .collect();
        deliveries::add(&self.database, &self.name, &waiting, WAITING.0).await?;
        if !is_dead {
            self.waiting
                .extend(events.iter().map(|event| event.subject.clone()));
            self.waiting_count += events.len();
        }
        Ok(())
    }

    /// Tries the waiting events that are due.
    pub(super) async fn retry_waiting(&mut self) -> Result<(), StoreError> {
        let (database, name) = (&self.database, &self.name);
        let due = deliveries::due(database, name, WAITING_AT_ONCE).await?;
        if due.is_empty() {
            return Ok(());
        }
        let events: Vec<Event> = due
            .iter()
            .map(|one| Event {
                id: one.event_id.clone(),
                subject: one.subject.clone(),
                kind: one.kind.clone(),
                body: one.body.clone(),
                traceparent: one.traceparent.clone(),
                at: one.first_failed_at,
            })
            .collect();
        let outcomes = self.sink.deliver(&events).await;
        let mut delivered = Vec::new();
        for (one, outcome) in due.iter().zip(outcomes) {
            let (reason, patience) = match outcome {
                Delivery::Delivered => {
                    delivered.push(one.id);
                    continue;
                }
                Delivery::Untried => continue,
                Delivery::Failed(reason) => (reason, PATIENCE),
                Delivery::Refused(reason) => (reason, Duration::ZERO),
                Delivery::Gone(reason) => {
                    sinks::disable(database, name, &reason).await?;
                    continue;
                }
            };
            self.metrics
                .events_failures
                .with_label_values(&[name])
                .inc();
            let doubled = u32::try_from(one.attempts.clamp(0, 16)).unwrap_or(0);
            let pause = (WAITING.0 * (1 << doubled)).min(WAITING.1);
            if deliveries::failed(database, one.id, &reason, pause, patience).await? {
                tracing::error!(
                    sink = name,
                    event = one.event_id,
                    attempts = one.attempts + 1,
                    reason,
                    "a sink has not taken an event for a day; it is a dead letter"
                );
            }
        }
        let count = delivered.len() as u64;
        deliveries::delivered(database, &delivered).await?;
        if count > 0 {
            self.status.change(|status| status.has_delivered = true);
        }
        self.metrics
            .events_delivered
            .with_label_values(&[name])
            .inc_by(count);
        Ok(())
    }
}
