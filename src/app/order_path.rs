//! The path of an order: intake, queue, workers.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};

use super::StartError;
use super::order_log::OwnedLog;
use super::ownership::Ownership;
use super::planes::Planes;
use crate::config::{Backend, Config};
use crate::metrics::Metrics;
use crate::pipeline::failover::lease::{self, AcknowledgeLease};
use crate::pipeline::failover::restore::Watermarks;
use crate::pipeline::orders::intake::Intake;
use crate::pipeline::orders::worker::{Worker, WorkerError, WorkerSlot};
use crate::pipeline::orders::worker_pool::WorkerPool;
use crate::queue::log::broker::BrokerLimits;
use crate::queue::{LogContact, LoggedQueue, OrderQueue, QueueParts, RingQueue};
use crate::state::State;
use crate::store::batch::BatchWriter;
use crate::store::postgres::order_log::{self, LogName};
use crate::store::postgres::replication;
use crate::supervise::Supervisor;

/// Intake, queue and workers. The intake is not open yet.
pub(super) struct OrderPath {
    pub(super) intake: Arc<Intake>,
    pub(super) queue: Arc<dyn OrderQueue>,
    /// The name of its log, if it is durable.
    pub(super) log_name: Option<LogName>,
    /// The right to acknowledge durable orders.
    pub(super) acknowledge: Arc<AcknowledgeLease>,
    pub(super) watermarks: Arc<Watermarks>,
    /// Returns true once every worker has finished its orders.
    pub(super) workers: JoinHandle<Option<bool>>,
    /// Set to true when workers have to stop even if the database does not answer.
    pub(super) cut: watch::Sender<bool>,
}

impl OrderPath {
    /// Starts the queue and the workers on it.
    pub(super) async fn start(
        config: &Config,
        planes: &Planes,
        ownership: &mut Ownership,
        state: &Arc<State>,
        metrics: &Metrics,
        supervisor: &Supervisor,
    ) -> Result<Self, StartError> {
        let acknowledge = match &ownership.node {
            None => Arc::new(AcknowledgeLease::new(config.queue.journal.lease_ms)),
            Some(node) => Arc::clone(&node.member.acknowledge),
        };
        let (queue, log_name): (Arc<dyn OrderQueue>, _) = match config.queue.backend {
            Backend::Memory => (Arc::new(RingQueue::new(config.queue.capacity)), None),
            Backend::Journal | Backend::Redis | Backend::Kafka | Backend::RocketMq => {
                let starting =
                    start_logged(config, planes, ownership, state, &acknowledge, metrics);
                let (queue, name) = starting.await?;
                (queue, Some(name))
            }
        };
        let intake = Intake::new(
            Arc::clone(state),
            Arc::clone(&queue),
            config.orders.payment_ttl_ms,
        );
        let (cut, cut_seen) = watch::channel(false);
        let worker_count = config.worker_count();
        let watermarks = Arc::new(Watermarks::new(worker_count));
        watermarks.set_whole(Some(replication::timeline(&ownership.database).await?));
        let pool = Arc::<WorkerPool>::default();
        let mut workers = JoinSet::new();
        for shard in 0..worker_count {
            let number = i16::try_from(shard).unwrap_or(i16::MAX);
            let worker = Worker::new(
                BatchWriter::new(ownership.database.clone(), ownership.lease, number),
                WorkerSlot {
                    shard,
                    watermarks: Arc::clone(&watermarks),
                    pool: Arc::clone(&pool),
                },
                Arc::clone(&queue),
                Arc::clone(state),
                Arc::clone(&planes.wake_all),
                metrics.clone(),
                config.workers.batch_rows_max,
                cut_seen.clone(),
            );
            let worker = worker.with_spans(planes.spans.clone());
            supervisor.task_of(&mut workers, "a worker", work(worker, Arc::clone(state)));
        }
        Ok(OrderPath {
            intake: Arc::new(intake.with_rate_limits(&config.rate_limit)),
            queue,
            log_name,
            acknowledge,
            watermarks,
            workers: supervisor.task("the wait for the workers", all_end(workers)),
            cut,
        })
    }
}

/// Starts the queue over the log that was replayed, and records in the database that the log is in use.
async fn start_logged(
    config: &Config,
    planes: &Planes,
    ownership: &mut Ownership,
    state: &Arc<State>,
    acknowledge: &Arc<AcknowledgeLease>,
    metrics: &Metrics,
) -> Result<(Arc<dyn OrderQueue>, LogName), StartError> {
    let Some((log, name)) = ownership.log.take() else {
        unreachable!("order_log::find finds the log of this backend");
    };
    let settings = &config.queue.journal;
    metrics.journal_bytes_max.set(settings.bytes_max as i64);
    let (may_acknowledge, poison) = (Arc::clone(acknowledge), Arc::clone(&state.poison));
    let parts = QueueParts {
        capacity: config.queue.capacity,
        epoch: ownership.lease.epoch,
        pending: Arc::clone(&state.pending),
        wake_all: Arc::clone(&planes.wake_all),
        may_acknowledge: Arc::new(move || may_acknowledge.holds()),
        on_end: Arc::new(move |reason| poison.set(reason)),
        contact: ownership.node.as_ref().map(|node| {
            let member = Arc::clone(&node.member);
            LogContact {
                now_ms: lease::now_ms,
                note: Arc::new(move |sent_ms| member.contact(sent_ms)),
            }
        }),
        metrics: metrics.clone(),
    };
    let (bytes_max, retain) = (settings.bytes_max, !settings.retain_for_slots.0.is_empty());
    let retain_ms = config.queue.retain_ms;
    let place = log.marker();
    // Creates a journal's first segment, which waits for the disk.
    let starting = move || {
        let log = match log {
            OwnedLog::Journal(opened) => opened.start(bytes_max, retain)?,
            OwnedLog::TakenOver(taken) => taken.start(BrokerLimits {
                bytes_max,
                retain: Duration::from_millis(retain_ms),
                retain_for_slots: retain,
            }),
            OwnedLog::Broker(_) => unreachable!("recovery has taken it over"),
        };
        LoggedQueue::start(log, parts).map_err(StartError::Engine)
    };
    let started = tokio::task::spawn_blocking(starting).await;
    let queue = started.map_err(|panic| StartError::Engine(std::io::Error::other(panic)))??;
    // After the first segment, which keeps a journal's name, exists, and before the first acknowledgement.
    let (database, lease) = (&ownership.database, ownership.lease);
    order_log::note(database, lease, &name, place).await?;
    Ok((Arc::new(queue), name))
}

/// Runs a worker to its end. A fatal error poisons the process.
async fn work(worker: Worker, state: Arc<State>) -> Result<(), WorkerError> {
    let ended = worker.run().await;
    if let Err(error @ WorkerError::Fatal(_)) = &ended {
        state.poison.set(error.to_string());
    }
    ended
}

/// Waits for every worker. Returns false if one did not finish its orders.
async fn all_end(mut workers: JoinSet<Option<Result<(), WorkerError>>>) -> bool {
    let mut finished = true;
    while let Some(ended) = workers.join_next().await {
        match ended {
            Ok(Some(Ok(()))) => {}
            Ok(Some(Err(error))) => {
                tracing::error!(reason = %error, "a worker ended with unfinished orders");
                finished = false;
            }
            // Reported by its supervisor.
            Ok(None) | Err(_) => finished = false,
        }
    }
    finished
}
