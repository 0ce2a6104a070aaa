//! The task that reads the slot of one sink and delivers to it.
//!
//! Events that are read and not delivered are the *window*. Its rules:
//!
//! 1. The slot moves on once the window is empty, so whatever was read when this process ends is read again.
//! 2. Events that the sink does not take while it takes others go to `event_deliveries`, and later events of their
//!    subjects behind them: one order never holds up the others.
//! 3. A sink that takes nothing is away. Its window stays, the slot stays, and PostgreSQL keeps WAL for it, up to
//!    `events.lag_bytes_max`. Beyond that the slot is dropped. Once the sink has taken what is in the window there is a
//!    new slot, and it is refilled from the rows that changed since its place.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::Sink;
use super::deliverer::{Deliverer, POLL};
use super::form::Former;
use super::status::{Shared, SinkStatus};
use crate::backoff::Backoff;
use crate::metrics::Metrics;
use crate::order::UnixMillis;
use crate::store::StoreError;
use crate::store::events::deliveries;
use crate::store::events::refill::Refilling;
use crate::store::events::sinks::{self, SinkRow};
use crate::store::events::slot::{self, Slot, SlotReader};
use crate::store::events::transactions::{Told, Transactions};
use crate::store::events::{Change, SkuNames};
use crate::store::pgoutput::Lsn;
use crate::store::postgres::Database;

/// Events that are read and not delivered; beyond it nothing more is read.
const WINDOW: usize = 4_000;
/// Pause between readings while there are events: many are read and delivered together, for a few wake-ups.
const PAUSE: Duration = Duration::from_millis(40);
/// A reading ends if nothing comes for so long, and at the latest after so long.
const READING: (Duration, Duration) = (Duration::from_millis(2), Duration::from_millis(20));
/// Interval at which operators' wishes, waiting events and the slot are looked at, and at which the place is noted.
const LOOK: Duration = Duration::from_secs(1);
/// Pauses before the database is asked again.
const DATABASE_AWAY: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(5));
/// Silence after which another process that reads the slot counts as paused.
const SILENCE_MAX: Duration = Duration::from_secs(60);

/// The resources of a feeder.
#[derive(Debug)]
pub struct FeederParts {
    /// Name of the sink.
    pub name: String,
    /// The database, for rows.
    pub database: Database,
    /// The database as `events.database_url` names it, for the slot.
    pub slots_at: Database,
    /// The sink.
    pub sink: Arc<dyn Sink>,
    /// Forms events.
    pub former: Former,
    /// `events.lag_bytes_max`.
    pub lag_bytes_max: u64,
    /// Where it says how it goes.
    pub status: Shared,
    /// Metrics.
    pub metrics: Metrics,
}

/// The task of one sink.
#[derive(Debug)]
pub struct Feeder {
    parts: FeederParts,
    names: SkuNames,
    deliverer: Deliverer,
    /// The slot as it was last looked at, and when.
    slot: Option<(Slot, Instant)>,
    /// What the slot tells.
    stream: Option<Transactions>,
    /// Everything before it is in the window, or delivered.
    read_to: Lsn,
    /// Commit of the newest event that was read.
    newest: Option<UnixMillis>,
    refilling: Option<Refilling>,
    /// The rows are read, and the slot has to go past this.
    refill_end: Option<Lsn>,
    row: Option<SinkRow>,
    looked_at: Option<Instant>,
    /// The slot may move on to there: everything before it is delivered.
    delivered_to: Lsn,
    placed_at: Option<Instant>,
}

impl Feeder {
    /// A feeder that has read nothing yet.
    pub fn new(parts: FeederParts) -> Self {
        Feeder {
            deliverer: Deliverer::new(
                parts.name.clone(),
                parts.database.clone(),
                Arc::clone(&parts.sink),
                parts.status.clone(),
                parts.metrics.clone(),
            ),
            parts,
            names: SkuNames::default(),
            slot: None,
            stream: None,
            read_to: Lsn::default(),
            newest: None,
            refilling: None,
            refill_end: None,
            row: None,
            looked_at: None,
            delivered_to: Lsn::default(),
            placed_at: None,
        }
    }

    /// Delivers until the future is dropped.
    pub async fn run(mut self) {
        let mut backoff = Backoff::new(DATABASE_AWAY.0, DATABASE_AWAY.1);
        loop {
            let started = Instant::now();
            let error = match self.follow().await {
                Ok(never) => match never {},
                Err(error) => error,
            };
            if started.elapsed() > DATABASE_AWAY.1 {
                backoff.reset();
            }
            tracing::warn!(
                sink = self.parts.name, reason = %error,
                "events cannot be read from the database; retrying. Orders are not concerned"
            );
            self.parts
                .status
                .fail(format!("events cannot be read: {error}"));
            tokio::time::sleep(backoff.jittered_pause()).await;
        }
    }

    /// Forgets what was read: it is read again from the slot's place on. After a failover an LSN means another place.
    fn begin_anew(&mut self) {
        self.deliverer.window.clear();
        self.slot = None;
        self.stream = None;
        self.read_to = Lsn::default();
        self.delivered_to = Lsn::default();
        self.refilling = None;
        self.refill_end = None;
        self.looked_at = None;
    }

    async fn follow(&mut self) -> Result<Infallible, StoreError> {
        self.begin_anew();
        let reader = self.open().await?;
        slot::publish(&self.parts.database).await?;
        loop {
            self.look().await?;
            if let Some(reason) = self.row.as_ref().and_then(|row| row.disabled.clone()) {
                self.stand_still(&reader, reason).await?;
            } else if let Some(slot) = self.slot(&reader).await? {
                self.step(&reader, slot).await?;
            }
        }
    }

    /// Waits until no other process reads the slot.
    async fn open(&mut self) -> Result<SlotReader, StoreError> {
        loop {
            let (slots_at, name) = (&self.parts.slots_at, &self.parts.name);
            let reader = SlotReader::open(slots_at, name, SILENCE_MAX).await?;
            let is_elsewhere = reader.is_none();
            if is_elsewhere {
                // What this process has last seen of the sink is the other one's to tell.
                self.parts
                    .status
                    .change(|status| *status = SinkStatus::default());
                self.parts
                    .metrics
                    .observe_sink(&self.parts.name, 0, 0, 0, false);
                self.observe_kept(0);
            }
            self.parts
                .status
                .change(|status| status.is_elsewhere = is_elsewhere);
            match reader {
                Some(reader) => return Ok(reader),
                None => tokio::time::sleep(LOOK).await,
            }
        }
    }

    /// Once a second: what operators want, and what waits.
    async fn look(&mut self) -> Result<(), StoreError> {
        if self.looked_at.is_some_and(|at| at.elapsed() < LOOK) {
            return Ok(());
        }
        self.looked_at = Some(Instant::now());
        let (database, name) = (&self.parts.database, &self.parts.name);
        self.row = sinks::find(database, name).await?;
        if self.row.as_ref().is_none_or(|row| row.disabled.is_none()) && self.deliverer.may_try() {
            self.deliverer.retry_waiting().await?;
        }
        self.deliverer.look().await?;
        let (database, name) = (&self.parts.database, &self.parts.name);
        let (waiting, dead) = deliveries::counts(database, name).await?;
        let row = self.row.as_ref();
        let is_refilling = row.is_some_and(|row| row.refill.is_some());
        let disabled = row.and_then(|row| row.disabled.clone());
        let is_disabled = disabled.is_some();
        let place_at = row.and_then(|row| row.place_at);
        let behind_ms = self.deliverer.behind_ms();
        self.parts.status.change(|status| {
            status.place_at = place_at;
            status.waiting = waiting.unsigned_abs();
            status.dead_letters = dead.unsigned_abs();
            status.is_refilling = is_refilling;
            status.disabled = disabled;
            status.behind_ms = behind_ms;
        });
        self.parts
            .metrics
            .observe_sink(name, behind_ms, waiting, dead, is_disabled);
        Ok(())
    }

    /// A sink that wants no events keeps no WAL.
    async fn stand_still(&mut self, reader: &SlotReader, reason: String) -> Result<(), StoreError> {
        (self.stream, self.slot) = (None, None);
        let state = reader.state().await?;
        if state.slot.is_some() || state.is_lost {
            reader.drop_slot().await?;
            tracing::error!(
                sink = self.parts.name,
                reason,
                "a sink wants no more events; its slot is dropped. To deliver again from its place on: POST \
                 /admin/v1/events/{{sink}}/resync"
            );
        }
        self.deliverer.window.clear();
        self.observe_kept(0);
        tokio::time::sleep(LOOK).await;
        Ok(())
    }

    fn observe_kept(&self, bytes: u64) {
        self.parts.status.change(|status| status.kept_bytes = bytes);
        self.parts.metrics.observe_kept(&self.parts.name, bytes);
    }

    /// The slot, if it may be read, as it was within the last second.
    async fn slot(&mut self, reader: &SlotReader) -> Result<Option<Slot>, StoreError> {
        if let Some((slot, at)) = self.slot
            && at.elapsed() < LOOK
        {
            return Ok(Some(slot));
        }
        let state = reader.state().await?;
        self.observe_kept(state.slot.map_or(0, |slot| slot.kept_bytes));
        let is_listening = state.slot.is_some();
        self.parts
            .status
            .change(|status| status.is_listening = is_listening);
        let name = &self.parts.name;
        match state.slot {
            Some(slot) if slot.kept_bytes <= self.parts.lag_bytes_max => {
                if self.row.is_none() {
                    sinks::note_place(&self.parts.database, name, slot.oldest_xid, None).await?;
                    self.looked_at = None;
                }
                if self.stream.is_some() && !slot.is_read {
                    return Err(StoreError::Events(
                        "the server does not stream to this process any more".to_owned(),
                    ));
                }
                self.slot = Some((slot, Instant::now()));
                return Ok(Some(slot));
            }
            Some(slot) => {
                self.give_up(
                    reader,
                    slot,
                    "the sink is so far behind that the database's disk is at stake",
                )
                .await?;
                return Ok(None);
            }
            None => {}
        }
        if state.is_lost {
            reader.drop_slot().await?;
        }
        if self.row.is_some() {
            sinks::refill_from_place(&self.parts.database, name).await?;
        }
        // What is in the window shows whether the sink is back.
        if !self.deliverer.window.is_empty() && !self.deliver().await? {
            return Ok(None);
        }
        reader.make().await?;
        let made = reader.state().await?;
        if let (Some(slot), None) = (made.slot, &self.row) {
            sinks::note_place(
                &self.parts.database,
                &self.parts.name,
                slot.oldest_xid,
                None,
            )
            .await?;
        }
        tracing::info!(
            sink = self.parts.name,
            refill = self.row.is_some(),
            "a replication slot for events was made"
        );
        self.begin_anew();
        Ok(None)
    }

    /// Delivers the window. Returns false if something is left in it.
    async fn deliver(&mut self) -> Result<bool, StoreError> {
        let is_delivered = self.deliverer.deliver().await?;
        if !is_delivered {
            // It may be disabled now.
            self.looked_at = None;
        }
        Ok(is_delivered)
    }

    /// Reads, delivers, and lets the slot move on.
    async fn step(&mut self, reader: &SlotReader, slot: Slot) -> Result<(), StoreError> {
        if !self.deliverer.may_try() {
            tokio::time::sleep(POLL).await;
            return Ok(());
        }
        self.read_rows(reader).await?;
        let Some(pause) = self.read_slot(reader, slot).await? else {
            return Ok(());
        };
        if !self.deliver().await? {
            return Ok(());
        }
        // Everything that was read is delivered, so a failure to read is over, without an event too.
        self.parts.status.change(|status| status.failure = None);
        if self.read_to > self.delivered_to {
            self.delivered_to = self.read_to;
            if let Some(stream) = &self.stream {
                stream.delivered(self.read_to);
            }
            self.note_place(slot).await?;
            self.end_refill().await?;
        }
        tokio::time::sleep(pause).await;
        Ok(())
    }

    /// Notes the place, once a second. `slot` was looked at before, so what is not delivered is not older.
    async fn note_place(&mut self, slot: Slot) -> Result<(), StoreError> {
        if self.placed_at.is_some_and(|at| at.elapsed() < LOOK) {
            return Ok(());
        }
        self.placed_at = Some(Instant::now());
        let (database, name) = (&self.parts.database, &self.parts.name);
        sinks::note_place(database, name, slot.oldest_xid, self.newest).await
    }

    /// Reads a part of a refill that is due.
    async fn read_rows(&mut self, reader: &SlotReader) -> Result<(), StoreError> {
        let wanted = self.row.as_ref().and_then(|row| row.refill);
        if let Some(wanted) = wanted
            && self
                .refilling
                .as_ref()
                .is_none_or(|at_work| at_work.refill() != wanted)
        {
            tracing::info!(
                sink = self.parts.name,
                after = wanted.after,
                "refilling a sink of events from the rows"
            );
            self.refilling = Some(Refilling::new(wanted));
            self.refill_end = None;
        }
        let Some(refilling) = self.refilling.as_mut().filter(|one| !one.is_read()) else {
            return Ok(());
        };
        if !self.deliverer.window.is_empty() {
            return Ok(());
        }
        let Some(mut changes) = refilling.next(&self.parts.database).await? else {
            tokio::time::sleep(POLL / 4).await;
            return Ok(());
        };
        let is_read = refilling.is_read();
        self.names
            .fill_in(&self.parts.database, &mut changes)
            .await?;
        self.take(&changes, true);
        if is_read {
            self.refill_end = Some(reader.mark().await?);
        }
        Ok(())
    }

    async fn end_refill(&mut self) -> Result<(), StoreError> {
        let Some(refilling) = &self.refilling else {
            return Ok(());
        };
        if self.refill_end.is_none_or(|end| self.delivered_to < end) {
            return Ok(());
        }
        let refill = refilling.refill();
        sinks::refilled(&self.parts.database, &self.parts.name, refill).await?;
        tracing::info!(sink = self.parts.name, "a sink of events is refilled");
        self.refilling = None;
        self.refill_end = None;
        self.looked_at = None;
        self.row = None;
        self.look().await
    }

    /// Fills the window with what the slot tells. Returns the pause until there may be more; `None` if the slot is given up.
    async fn read_slot(
        &mut self,
        reader: &SlotReader,
        slot: Slot,
    ) -> Result<Option<Duration>, StoreError> {
        let mut stream = match self.stream.take() {
            Some(stream) => stream,
            None => reader.stream(slot).await?,
        };
        let until = Instant::now() + READING.1;
        let mut pause = POLL;
        while self.deliverer.window.len() < WINDOW {
            let patience = READING
                .0
                .min(until.saturating_duration_since(Instant::now()));
            let Ok(told) = tokio::time::timeout(patience, stream.next()).await else {
                break;
            };
            match told? {
                Told::Transaction(mut transaction) => {
                    self.read_to = transaction.end;
                    if let Some(refilling) = &mut self.refilling {
                        refilling.screen(&mut transaction);
                    }
                    let mut changes = transaction.changes;
                    self.names
                        .fill_in(&self.parts.database, &mut changes)
                        .await?;
                    self.take(&changes, false);
                    if !changes.is_empty() {
                        pause = PAUSE;
                    }
                }
                Told::Place(place) => self.read_to = self.read_to.max(place),
                Told::Overlong if self.deliverer.window.is_empty() => {
                    self.give_up(
                        reader,
                        slot,
                        "a transaction of somebody else changes more rows than are held in memory",
                    )
                    .await?;
                    return Ok(None);
                }
                Told::Overlong => break,
            }
        }
        self.stream = Some(stream);
        let is_refilling = self.refilling.as_ref().is_some_and(|one| !one.is_read());
        if is_refilling || self.deliverer.window.len() >= WINDOW {
            pause = Duration::ZERO;
        }
        Ok(Some(pause))
    }

    /// Drops the slot. The place stays, and the rows are read from there on.
    async fn give_up(
        &mut self,
        reader: &SlotReader,
        slot: Slot,
        reason: &str,
    ) -> Result<(), StoreError> {
        let (database, name) = (&self.parts.database, &self.parts.name);
        sinks::note_place(database, name, slot.oldest_xid, None).await?;
        sinks::refill_from_place(database, name).await?;
        (self.stream, self.slot) = (None, None);
        reader.drop_slot().await?;
        self.parts
            .metrics
            .events_slots_given_up
            .with_label_values(&[name])
            .inc();
        tracing::error!(
            sink = name,
            reason,
            kept_bytes = slot.kept_bytes,
            lag_bytes_max = self.parts.lag_bytes_max,
            "the slot of a sink of events is dropped; once the sink takes events it is refilled from the rows"
        );
        self.looked_at = None;
        Ok(())
    }

    fn take(&mut self, changes: &[Change], resync: bool) {
        let former = &self.parts.former;
        self.deliverer.window.extend(
            changes
                .iter()
                .filter_map(|change| former.form(change, resync)),
        );
        self.newest = changes.last().map(|change| change.at).max(self.newest);
    }
}
