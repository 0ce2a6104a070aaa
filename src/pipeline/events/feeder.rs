//! The task that reads the slot of one sink and delivers to it.
//!
//! Events that are read and not delivered are the *window*. Its rules:
//!
//! 1. The slot moves on once the window is empty, so whatever happens in between is read again.
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
use crate::store::events::{Change, SkuNames};
use crate::store::pgoutput::Lsn;
use crate::store::postgres::Database;

/// Events that are read and not delivered; beyond it nothing more is read.
const WINDOW: usize = 4_000;
/// Messages after which a reading ends with its transaction: twice as many after each that has found more, because every one
/// decodes from the slot's restart position on, and what failed is tried again a window at a time.
const PEEK_ROWS: std::ops::RangeInclusive<i32> = 2_000..=32_000;
/// Pause after a reading that has found all there was, as a multiple of its time: orders need the server's processors more.
const PAUSES: u32 = 8;
/// Longest pause between readings, each of which decodes from the slot's restart position on.
const POLL_MAX: Duration = Duration::from_secs(5);
/// Interval at which operators' wishes and waiting events are looked at, and at which the place is noted.
const LOOK: Duration = Duration::from_secs(1);
/// Pauses before the database is asked again.
const DATABASE_AWAY: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(5));
/// Silence after which another process that reads the slot counts as paused.
const SILENCE_MAX: Duration = Duration::from_secs(60);
/// WAL without events after which the slot moves on, and the longest time until it does.
const IDLE_BYTES: u64 = 1 << 20;
const IDLE: Duration = Duration::from_secs(10);

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
    /// The end of the last transaction in the window, or before it.
    read_to: Lsn,
    /// Messages between the slot's place and there.
    read_messages: i32,
    /// Messages of the next reading.
    peek_rows: i32,
    /// Commit of the newest event that was read.
    newest: Option<UnixMillis>,
    refilling: Option<Refilling>,
    /// The rows are read, and the slot has to go past this.
    refill_end: Option<Lsn>,
    row: Option<SinkRow>,
    looked_at: Option<Instant>,
    moved_at: Instant,
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
            read_to: Lsn::default(),
            read_messages: 0,
            peek_rows: *PEEK_ROWS.start(),
            newest: None,
            refilling: None,
            refill_end: None,
            row: None,
            looked_at: None,
            moved_at: Instant::now(),
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
        self.read_to = Lsn::default();
        self.read_messages = 0;
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
            } else if let Some((slot, flushed)) = self.slot(&reader).await? {
                self.step(&reader, slot, flushed).await?;
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

    /// The slot, if it may be read, and the end of the WAL on the server's disk.
    async fn slot(&mut self, reader: &SlotReader) -> Result<Option<(Slot, Lsn)>, StoreError> {
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
                return Ok(Some((slot, state.flushed)));
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

    /// Reads, delivers, and moves the slot on.
    async fn step(
        &mut self,
        reader: &SlotReader,
        slot: Slot,
        flushed: Lsn,
    ) -> Result<(), StoreError> {
        if !self.deliverer.may_try() {
            tokio::time::sleep(POLL).await;
            return Ok(());
        }
        self.read_to = self.read_to.max(slot.confirmed);
        self.read_rows(reader).await?;
        let mut pause = Duration::ZERO;
        let mut is_idle = false;
        if self.deliverer.window.len() < WINDOW {
            let started = Instant::now();
            is_idle = match self.read_slot(reader, slot).await? {
                Some(is_new) => !is_new,
                None => return Ok(()),
            };
            let took = started.elapsed();
            pause = match is_idle {
                true => (took * 3).clamp(POLL, POLL_MAX),
                // More is there already.
                false if self.peek_rows > *PEEK_ROWS.start() => Duration::ZERO,
                false => (took * PAUSES).min(LOOK),
            };
        }
        if !self.deliver().await? {
            return Ok(());
        }
        // Everything that was read is delivered, so a failure to read is over, without an event too.
        self.parts.status.change(|status| status.failure = None);
        let end = match is_idle {
            // Nothing before it was left unread.
            true => flushed.max(self.read_to),
            false => self.read_to,
        };
        let gap = end.0.saturating_sub(slot.confirmed.0);
        let is_due = self.moved_at.elapsed() >= IDLE || self.refill_end.is_some();
        if gap > 0 && (!is_idle || gap >= IDLE_BYTES || is_due || self.read_to > slot.confirmed) {
            reader.advance(end).await?;
            self.read_to = end;
            self.read_messages = 0;
            self.moved_at = Instant::now();
            self.note_place(slot).await?;
            self.end_refill(end).await?;
        }
        if !pause.is_zero() {
            tokio::time::sleep(pause).await;
        }
        Ok(())
    }

    /// Notes the place, once a second. `slot` was looked at before it moved on, so what is not delivered is not older.
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
            self.refill_end = Some(reader.state().await?.flushed);
        }
        Ok(())
    }

    async fn end_refill(&mut self, moved_to: Lsn) -> Result<(), StoreError> {
        let Some(refilling) = &self.refilling else {
            return Ok(());
        };
        if self.refill_end.is_none_or(|end| moved_to < end) {
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

    /// Reads what is behind the window. Returns false if there was nothing, and `None` if the slot is given up.
    async fn read_slot(
        &mut self,
        reader: &SlotReader,
        slot: Slot,
    ) -> Result<Option<bool>, StoreError> {
        let rows = self.peek_rows.saturating_add(self.read_messages);
        let read = reader.peek(rows).await?;
        let messages = read
            .transactions
            .iter()
            .map(|one| one.messages)
            .sum::<i32>();
        self.peek_rows = match messages >= rows {
            true => (self.peek_rows * 2).min(*PEEK_ROWS.end()),
            false => *PEEK_ROWS.start(),
        };
        let mut is_new = false;
        for mut transaction in read.transactions {
            if transaction.end <= self.read_to {
                continue;
            }
            is_new = true;
            self.read_to = transaction.end;
            self.read_messages = self.read_messages.saturating_add(transaction.messages);
            if let Some(refilling) = &mut self.refilling {
                refilling.screen(&mut transaction);
            }
            let mut changes = transaction.changes;
            self.names
                .fill_in(&self.parts.database, &mut changes)
                .await?;
            self.take(&changes, false);
        }
        if read.is_overlong && !is_new && self.deliverer.window.is_empty() {
            self.give_up(
                reader,
                slot,
                "a transaction of somebody else changes more rows than are held in memory",
            )
            .await?;
            return Ok(None);
        }
        Ok(Some(is_new))
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
