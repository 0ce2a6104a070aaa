//! Tasks that run as long as the process. A task that ends poisons it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::Mutex;
use tokio::task::AbortHandle;

use super::aside::Aside;
use super::order_path::OrderPath;
use super::ownership::Ownership;
use super::{StartError, events};
use crate::config::{Config, Retention};
use crate::metrics::Metrics;
use crate::pipeline::WakeAll;
use crate::pipeline::admin::open_letters;
use crate::pipeline::admin::pauses::Pauses;
use crate::pipeline::admin::pruning::Pruning;
use crate::pipeline::cluster::hints::Hints;
use crate::pipeline::cluster::lending::{Lending, LendingParts};
use crate::pipeline::cluster::lists::Lists;
use crate::pipeline::cluster::member::Member;
use crate::pipeline::cluster::terms::Terms;
use crate::pipeline::events::feeder::Feeder;
use crate::pipeline::events::status::Sinks;
use crate::pipeline::failover::health::{self, Health, Looker};
use crate::pipeline::failover::lease::{self, Leases};
use crate::pipeline::failover::restore::Restorer;
use crate::pipeline::failover::{log_place, wal_retention};
use crate::pipeline::orders::cancel::Canceller;
use crate::pipeline::orders::deadlines;
use crate::pipeline::orders::drawer::Drawer;
use crate::pipeline::orders::intake::Intake;
use crate::pipeline::orders::parking::{Parking, ParkingHandle};
use crate::pipeline::payments::assigner::Assigner;
use crate::pipeline::payments::callbacks::{Callbacks, CallbacksHandle};
use crate::pipeline::payments::expiry::Expiry;
use crate::pipeline::payments::processor::{PaymentProcessor, PaymentsHandle};
use crate::pipeline::payments::reconciler::{OrphanChecks, Reconciler};
use crate::pipeline::payments::settler::{Settler, SettlerParts, Signals};
use crate::state::State;
use crate::state::buyers::Eviction;
use crate::store::StoreError;
use crate::store::batch::BatchWriter;
use crate::store::embedded::Embedded;
use crate::store::postgres::Database;
use crate::store::settlement::SettlementWriter;
use crate::supervise::Supervisor;

/// Connections for operators.
const OPERATORS_POOL: usize = 4;
/// Connections of the tasks that watch for failovers: lost commits, and the progress of standbys.
const WATCH_POOL: usize = 2;
/// Read connections of each settler.
const SETTLER_POOL: usize = 1;

/// Interval at which orders that have left the idempotency window, and rate limits that are full again, are
/// forgotten.
const EVICTION: Duration = Duration::from_secs(20);
/// Margin after the payment deadline within which an unpaid order may still be payable, in milliseconds.
const SETTLING_MS: u64 = 60_000;
/// Interval between checks whether memory is nearly full.
const TIGHT: Duration = Duration::from_secs(1);
/// Interval between checks of the embedded PostgreSQL.
const POSTGRES_WATCH: Duration = Duration::from_millis(250);

/// Connections that a service opens at most: each worker's, the pool of look-ups, the node's lock, those of the
/// tasks below, and one each for an audit, a preflight and a deletion of old rows.
pub(super) fn connections_max(config: &Config) -> usize {
    let (settlers, parking, pauses, health) = (4 * (1 + SETTLER_POOL), 1, 1, 1);
    // The draw that is made, and a beacon that comes in meanwhile.
    let draws = 2;
    let tasks = OPERATORS_POOL + WATCH_POOL + settlers + parking + pauses + health + draws;
    let feeders = config.events.sinks.len() * events::CONNECTIONS;
    // The renewal, its pool, the lanes, the lending, the terms, and a takeover.
    let node = if config.cluster.enabled {
        1 + 2 + 2 + 1 + 1 + 1
    } else {
        0
    };
    config.worker_count() + config.database.pool_size + 1 + tasks + 3 + feeders + node
}

/// The running tasks.
pub(super) struct Background {
    supervisor: Supervisor,
    tasks: Vec<AbortHandle>,
    /// Where events are delivered.
    aside: Option<Aside>,
}

/// The resources of the tasks.
pub(super) struct Parts<'a> {
    pub(super) config: &'a Config,
    pub(super) state: &'a Arc<State>,
    pub(super) path: &'a OrderPath,
    pub(super) ownership: &'a Ownership,
    pub(super) wake_all: &'a WakeAll,
    pub(super) metrics: &'a Metrics,
    /// The membership of a node.
    pub(super) member: Option<Arc<Member>>,
}

impl Parts<'_> {
    fn database(&self) -> &Database {
        &self.ownership.database
    }

    /// Hints between nodes; those of a process on its own go nowhere.
    pub(super) fn hints(&self) -> Arc<Hints> {
        let member = self.member.as_ref();
        member.map_or_else(Arc::default, |member| Arc::clone(&member.hints))
    }
}

/// Handles to the tasks that serve requests.
pub(super) struct Handles {
    pub(super) callbacks: CallbacksHandle,
    pub(super) payments: PaymentsHandle,
    pub(super) parking: ParkingHandle,
    pub(super) pauses: Arc<Pauses>,
    pub(super) canceller: Canceller,
    pub(super) health: Arc<Health>,
    pub(super) sinks: Sinks,
    pub(super) orphan_checks: OrphanChecks,
    /// The operators' own pool, so that they never wait behind buyers' look-ups.
    pub(super) operators: Database,
}

impl Background {
    /// Starts every task. On return the leases are renewed and the database has been checked once.
    pub(super) async fn start(
        parts: &Parts<'_>,
        supervisor: Supervisor,
    ) -> Result<(Background, Handles), StartError> {
        let mut background = Background {
            supervisor,
            tasks: Vec::new(),
            aside: None,
        };
        background.watch_orders(parts);
        background.keep_ownership(parts).await?;
        let (callbacks, payments, orphan_checks) = background.settle_payments(parts)?;
        let operators = parts.database().with_own_pool(OPERATORS_POOL)?;
        let (parking, pauses) = background.serve_operators(parts, &operators)?;
        if let Some(member) = &parts.member {
            background.share_stock(parts, &pauses, member).await?;
        }
        background.run(
            "the count of dead letters",
            open_letters::keep(operators.clone(), parts.metrics.clone()),
        );
        let canceller = Canceller::new(
            Arc::clone(parts.state),
            parts.database().clone(),
            parts.ownership.lease,
        );
        background.run(
            "the settlement of cancellations",
            canceller.clone().resolve_lost(),
        );
        let health = Arc::<Health>::default();
        let mut looker = Looker::new(parts.database().with_own_pool(1)?, Arc::clone(&health));
        // So that a client that is told that orders are taken finds the service ready.
        looker.look().await;
        background.run("the database health check", health::keep(looker));
        let sinks = background.deliver_events(parts)?;
        let handles = Handles {
            sinks,
            callbacks,
            payments,
            parking,
            pauses,
            canceller,
            health,
            orphan_checks,
            operators,
        };
        Ok((background, handles))
    }

    /// Events, on a thread of their own.
    fn deliver_events(&mut self, parts: &Parts<'_>) -> Result<Sinks, StartError> {
        let (feeders, sinks) = events::feeders(parts)?;
        if feeders.is_empty() {
            return Ok(sinks);
        }
        let aside = Aside::start("events").map_err(StartError::Events)?;
        let entered = aside.enter();
        for feeder in feeders {
            self.run("the delivery of events", Feeder::run(feeder));
        }
        drop(entered);
        self.aside = Some(aside);
        Ok(sinks)
    }

    /// Deadlines of orders in flight, and eviction of old orders from memory.
    fn watch_orders(&mut self, parts: &Parts<'_>) {
        let Parts { config, state, .. } = parts;
        let wake_all = Arc::clone(parts.wake_all);
        self.run(
            "the deadline task",
            deadlines::keep(Arc::clone(state), wake_all, parts.metrics.clone()),
        );
        let evicting = evict(
            Arc::clone(state),
            Arc::clone(&parts.path.intake),
            config.orders.idempotency_window_ms,
            config.orders.payment_ttl_ms,
        );
        self.run("the eviction of old orders", evicting);
    }

    /// Leases, lost commits, retention, and the embedded server.
    async fn keep_ownership(&mut self, parts: &Parts<'_>) -> Result<(), StartError> {
        let Parts {
            config,
            state,
            path,
            ownership,
            ..
        } = parts;
        let watching = parts.database().with_own_pool(WATCH_POOL)?;
        // A node renews its membership instead, and starts again after a failover.
        if let Some(guard) = &ownership.guard {
            let leases = Leases {
                guard: Arc::clone(guard),
                lease: ownership.lease,
                state: Arc::clone(state),
                acknowledge: Arc::clone(&path.acknowledge),
                queue: Arc::clone(&path.queue),
            };
            leases.renew().await?;
            self.run("the leases", lease::keep(leases));
            let restorer = Restorer {
                state: Arc::clone(state),
                queue: Arc::clone(&path.queue),
                database: watching.clone(),
                lease: ownership.lease,
                watermarks: Arc::clone(&path.watermarks),
                metrics: parts.metrics.clone(),
                rows_max: config.workers.batch_rows_max,
            };
            self.run("the watch for lost commits", restorer.watch());
        }
        if let Some(log) = path.log_name.clone() {
            let (queue, watermarks) = (Arc::clone(&path.queue), Arc::clone(&path.watermarks));
            let placing =
                log_place::keep(queue, watching.clone(), ownership.lease, log, watermarks);
            self.run("the place of the order log", placing);
        }
        let slots = &config.queue.journal.retain_for_slots.0;
        if path.queue.durable().is_some() && !slots.is_empty() {
            let (queue, watermarks) = (Arc::clone(&path.queue), Arc::clone(&path.watermarks));
            let keeping = wal_retention::keep(queue, watching, slots.clone(), watermarks);
            self.run("the retention of the order log", keeping);
        }
        if config.retention != Retention::default() {
            let pruning = Pruning {
                database: parts.database().clone(),
                lease: ownership.lease,
                state: Arc::clone(state),
                settings: config.retention,
                metrics: parts.metrics.clone(),
            };
            self.run("the deletion of old rows", pruning.keep());
        }
        if let Some(embedded) = &ownership.embedded {
            self.run(
                "the supervision of the embedded PostgreSQL",
                keep_running(Arc::clone(embedded)),
            );
        }
        Ok(())
    }

    /// Callbacks, the payment processor, expiry and assignment, each with a connection of its own.
    fn settle_payments(
        &mut self,
        parts: &Parts<'_>,
    ) -> Result<(CallbacksHandle, PaymentsHandle, OrphanChecks), StartError> {
        let Parts {
            config, ownership, ..
        } = parts;
        let signals = Arc::new(Signals::default());
        let settler = |writer: i16| -> Result<Settler, StoreError> {
            let database = parts.database();
            Ok(Settler::new(SettlerParts {
                state: Arc::clone(parts.state),
                database: database.with_own_pool(SETTLER_POOL)?,
                lease: ownership.lease,
                writer: SettlementWriter::new(database.clone(), ownership.lease, writer),
                signals: Arc::clone(&signals),
                metrics: parts.metrics.clone(),
            }))
        };
        let writers = ownership.writers;
        let first_check_ms = config.payments.orphan_check_ms;
        let (callbacks_handle, callbacks) =
            Callbacks::new(settler(writers.callbacks())?, first_check_ms);
        self.run("callbacks", callbacks.run());
        let orphan_checks = OrphanChecks {
            count: config.payments.orphan_checks,
            first: Duration::from_millis(first_check_ms),
        };
        let (payments_handle, processor) = PaymentProcessor::new(Reconciler::new(
            settler(writers.processor())?,
            Arc::clone(&parts.path.queue),
            Arc::clone(&ownership.receipts),
            orphan_checks,
        ));
        self.run("the payment processor", processor.run());
        let window_ms = config.orders.idempotency_window_ms;
        let expiry = Expiry::new(settler(writers.expiry())?, window_ms);
        self.run("expiry", expiry.run());
        let assigner = Assigner::new(
            settler(writers.assigner())?,
            config.orders.payment_ttl_ms,
            config.orders.waitlist_ttl_ms,
        );
        self.run("the assignment of units", assigner.run());
        let drawer = Drawer {
            state: Arc::clone(parts.state),
            database: parts.database().clone(),
            lease: ownership.lease,
        };
        self.run("the draws", drawer.run());
        Ok((callbacks_handle, payments_handle, orphan_checks))
    }

    /// A node's shares of stock, and what operators change at other nodes.
    async fn share_stock(
        &mut self,
        parts: &Parts<'_>,
        pauses: &Arc<Pauses>,
        member: &Member,
    ) -> Result<(), StartError> {
        let lease = parts.ownership.lease;
        let lending = Lending::new(LendingParts {
            state: Arc::clone(parts.state),
            database: parts.database().with_own_pool(1)?,
            lease,
            hints: parts.hints(),
        });
        self.run("the lending of stock", lending.run());
        let terms = Terms {
            state: Arc::clone(parts.state),
            database: parts.database().with_own_pool(1)?,
            lease,
            pauses: Arc::clone(pauses),
            moving: Arc::clone(&member.moving),
            hints: parts.hints(),
            metrics: parts.metrics.clone(),
        };
        self.run("the terms set at other nodes", terms.run());
        let Some(lanes) = parts.state.lanes.clone() else {
            unreachable!("recovery gives a node its lanes");
        };
        let mut lists = Lists::new(
            Arc::clone(parts.state),
            lanes,
            lease.node,
            parts.database().with_own_pool(1)?,
        );
        // Before a lane opens: nobody overtakes those who wait at other nodes.
        lists.look().await?;
        self.run("the waiting lists of all nodes", lists.run());
        Ok(())
    }

    /// Parked orders and pauses.
    fn serve_operators(
        &mut self,
        parts: &Parts<'_>,
        operators: &Database,
    ) -> Result<(ParkingHandle, Arc<Pauses>), StartError> {
        let (database, lease) = (parts.database(), parts.ownership.lease);
        let (parking_handle, parking) = Parking::new(
            Arc::clone(parts.state),
            operators.clone(),
            lease,
            BatchWriter::new(database.clone(), lease, parts.ownership.writers.parking()),
            parts.metrics.clone(),
        );
        self.run("the retry of parked orders", parking.run());
        // On a connection of its own, so that an emergency never waits.
        let own = database.with_own_pool(1)?;
        let pauses = Arc::new(Pauses::new(Arc::clone(parts.state), own, lease));
        self.run("the storage of pauses", Arc::clone(&pauses).keep_storing());
        Ok((parking_handle, pauses))
    }

    pub(super) fn run(
        &mut self,
        name: &'static str,
        work: impl Future<Output = ()> + Send + 'static,
    ) {
        let task = self.supervisor.task(name, work);
        self.tasks.push(task.abort_handle());
    }

    pub(super) fn stop(&self) {
        self.tasks.iter().for_each(AbortHandle::abort);
    }
}

/// Restarts the embedded PostgreSQL after it has died. Workers keep their batches meanwhile.
pub(super) async fn keep_running(embedded: Arc<Mutex<Embedded>>) {
    let mut tick = tokio::time::interval(POSTGRES_WATCH);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tick.tick().await;
        let mut embedded = embedded.lock().await;
        if embedded.is_running() {
            continue;
        }
        tracing::error!("our own PostgreSQL has died; starting it again");
        match embedded.start_again().await {
            Ok(()) => tracing::info!("our own PostgreSQL runs again"),
            Err(error) => {
                tracing::error!(reason = %error, "our own PostgreSQL did not start; retrying")
            }
        }
    }
}

/// Evicts orders and rate limits that are no longer needed.
pub(super) async fn evict(
    state: Arc<State>,
    intake: Arc<Intake>,
    window_ms: u64,
    payment_ttl_ms: u64,
) {
    let mut tick = tokio::time::interval(TIGHT);
    let mut last: Option<(Instant, bool)> = None;
    loop {
        tick.tick().await;
        let is_tight = state.buyers.is_tight();
        // An eviction that freed nothing is not repeated at once.
        let is_early =
            |(at, in_vain): (Instant, bool)| at.elapsed() < EVICTION && (in_vain || !is_tight);
        if last.is_some_and(is_early) {
            continue;
        }
        let started = Instant::now();
        let (state, intake) = (Arc::clone(&state), Arc::clone(&intake));
        // Walks every record, so it runs on a blocking thread.
        let evicted = tokio::task::spawn_blocking(move || {
            intake.forget_idle();
            let (buyers, ids) = (&state.buyers, &state.ids);
            let floor = ids.window_floor(window_ms);
            let eviction = if is_tight {
                let payable = ids.window_floor(payment_ttl_ms.saturating_add(SETTLING_MS));
                buyers.early_eviction(floor, payable, ids.window_floor(0))
            } else {
                Eviction::before(floor)
            };
            buyers.evict(eviction, |sku| state.is_limited(sku))
        })
        .await;
        let evicted = evicted.unwrap_or(0);
        last = Some((started, is_tight && evicted == 0));
        if evicted > 0 && is_tight {
            tracing::warn!(
                evicted,
                "orders.remembered_max is nearly reached: the oldest orders that neither a key nor a limit needs were \
                 forgotten before they left the idempotency window; raise it, or shorten the window"
            );
        } else if evicted > 0 {
            tracing::debug!(evicted, "forgot orders that left the idempotency window");
        }
    }
}
