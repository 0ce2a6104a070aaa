//! A load from its plan to its report.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Barrier, OnceLock, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tokio::net::TcpStream;

use super::buyers::{self, RunShared};
use super::error::LoadError;
use super::follow_up;
use super::lanes::LaneWatch;
use super::orders_file;
use super::outcome::{AnswerKind, Outcomes};
use super::plan::LoadPlan;
use super::platform::WebhookDelivery;
use super::progress::{Phase, Progress, RateMeter, Snapshot};
use super::recorder::{LiveCounters, Recorder};
use super::report::{LoadReport, UndecidedReport};
use super::request_template::RequestTemplate;
use super::schedule::{Cursor, Schedule};
use super::stock::StockWatch;
use super::target::Target;
use super::waiting::WaitingBuyers;

/// How often stock is looked at and progress is shown.
const TICK: Duration = Duration::from_millis(100);

/// Runs a load to its end.
///
/// It has threads of its own for sending; on the caller's runtime it only looks at stock and
/// reports progress. Dropping the future stops the sending.
pub async fn run(plan: LoadPlan, progress: &mut dyn Progress) -> Result<LoadReport, LoadError> {
    run_until(plan, progress, std::future::pending()).await
}

/// Like [`run`], but no further request falls due once `stop` is done (a signal, say). What is in
/// flight is still awaited, and the report covers what was sent.
pub async fn run_until(
    plan: LoadPlan,
    progress: &mut dyn Progress,
    stop: impl Future<Output = ()>,
) -> Result<LoadReport, LoadError> {
    plan.check()?;
    let target = Target::of(&plan)?;
    let template = Arc::new(match &plan.orders {
        Some(path) => {
            let (skus, lines) = orders_file::read(path)?;
            RequestTemplate::replay(skus, lines)
        }
        None => RequestTemplate::made_up(&plan),
    });
    let strict = plan.orders.is_none();
    let mut stock = StockWatch::open(&target, template.skus(), plan.watch_stock, strict).await?;

    let schedule = Arc::new(Schedule::new(&plan, &template));
    let interval_ms = interval_ms(schedule.seconds_expected());
    let shared = Arc::new(RunShared {
        addresses: addresses_of(&target).await?,
        target: target.clone(),
        template: Arc::clone(&template),
        request_timeout: Duration::from_millis(plan.request_timeout_ms),
        repeat: Duration::from_millis(plan.repeat_ms),
        interval_ms,
        keep_outcomes: plan.keep_outcomes,
        stop: AtomicBool::new(false),
        ready: Barrier::new(plan.threads_here()),
        start: OnceLock::new(),
    });
    let (mut sending, delivery, waiting) = Sending::start(&plan, shared, &schedule)?;
    // Ends with this function, should it be dropped.
    let mut waiting = waiting.map(|waiting| {
        let mut tasks = tokio::task::JoinSet::new();
        tasks.spawn(waiting.ask());
        tasks
    });
    let mut waited = None;
    let begun = sending.begun().await?;
    let started_at = jiff::Timestamp::now();

    let mut stop = std::pin::pin!(stop);
    let mut interrupted = false;
    let mut speed = RateMeter::default();
    let planned = Duration::try_from_secs_f64(schedule.seconds_expected()).ok();
    let watch_after = Duration::from_millis(plan.watch_after_ms);
    let watching = async {
        let mut sent_at = None;
        loop {
            if sent_at.is_none() && sending.is_finished() {
                sent_at = Some(Instant::now());
            }
            if let Some(tasks) = &mut waiting
                && let Some(report) = tasks.try_join_next()
            {
                waited = report.ok();
            }
            let settled = delivery.as_ref().is_none_or(WebhookDelivery::is_finished)
                && waiting.as_ref().is_none_or(tokio::task::JoinSet::is_empty);
            let watched = sent_at.is_some_and(|at| interrupted || at.elapsed() >= watch_after);
            if settled && watched {
                break;
            }
            tokio::select! {
                () = tokio::time::sleep(TICK) => {}
                () = &mut stop, if !interrupted => {
                    interrupted = true;
                    sending.shared.stop.store(true, Ordering::Relaxed);
                }
            }
            let mut snapshot = sending.snapshot(begun, planned, &schedule, &mut speed);
            snapshot.paid = delivery.as_ref().map_or(0, WebhookDelivery::acknowledged);
            if sent_at.is_some() {
                snapshot.phase = Phase::Payments;
            }
            progress.tick(&snapshot);
        }
    };
    let mut lanes = plan.watch_lanes.then(|| LaneWatch::of(&target));
    let sampling = async {
        match &mut lanes {
            Some(lanes) => lanes.keep_sampling(begun, TICK).await,
            None => std::future::pending().await,
        }
    };
    // Beside each other: a server that is slow to tell its stock must hold up no stop.
    tokio::select! {
        () = watching => {}
        () = stock.keep_sampling(begun, TICK) => {}
        () = sampling => {}
    }
    let snapshot = Snapshot {
        phase: Phase::FollowUp,
        paid: delivery.as_ref().map_or(0, WebhookDelivery::acknowledged),
        ..sending.snapshot(begun, planned, &schedule, &mut speed)
    };
    let parts = sending.join()?;
    let payments = delivery.map(WebhookDelivery::close).transpose()?;

    let (recorder, outcomes) = join_records(parts, &plan, &template, interval_ms);
    let mut report = LoadReport::draw(&plan, &recorder, interval_ms);
    report.payments = payments;
    report.waitlist = waited;
    report.outcomes = outcomes;
    report.started_at = format!("{started_at:.3}");
    report.interrupted = interrupted;
    if !recorder.undecided.is_empty() {
        progress.tick(&snapshot);
        follow_up(&mut report, &target, recorder.undecided).await;
    }
    stock.sample(begun).await;
    report.stock = stock.into_series();
    report.lanes = lanes.map(LaneWatch::into_series);
    progress.finish();
    Ok(report)
}

/// The addresses that connections to the target reach.
async fn addresses_of(target: &Target) -> Result<Vec<SocketAddr>, LoadError> {
    let mut reached = Vec::new();
    for address in &target.addresses {
        let connected = TcpStream::connect(address).await;
        let address = connected.and_then(|stream| stream.peer_addr());
        reached.push(address.map_err(|source| LoadError::Unreachable {
            target: target.url.clone(),
            source,
        })?);
    }
    Ok(reached)
}

/// The sending threads; dropping it stops them.
struct Sending {
    shared: Arc<RunShared>,
    lives: Vec<Arc<LiveCounters>>,
    threads: Vec<JoinHandle<io::Result<Recorder>>>,
}

impl Sending {
    fn start(
        plan: &LoadPlan,
        shared: Arc<RunShared>,
        schedule: &Arc<Schedule>,
    ) -> Result<(Self, Option<WebhookDelivery>, Option<WaitingBuyers>), LoadError> {
        let count = plan.threads_here();
        let opened = if plan.pay_share > 0.0 {
            let end = Duration::try_from_secs_f64(schedule.seconds_expected());
            Some(WebhookDelivery::open(
                plan,
                &shared,
                end.unwrap_or(Duration::MAX),
            )?)
        } else {
            None
        };
        let (delivery, payments_tx) = opened.unzip();
        let (waiting_tx, waiting) = plan
            .waitlist
            .then(|| {
                let (waiting_tx, orders) = mpsc::channel();
                let waiting = WaitingBuyers {
                    shared: Arc::clone(&shared),
                    orders,
                    payments_tx: payments_tx.clone(),
                    wait_after: Duration::from_millis(plan.waitlist_after_ms),
                };
                (waiting_tx, waiting)
            })
            .unzip();
        let mut sending = Self {
            shared,
            lives: Vec::new(),
            threads: Vec::new(),
        };
        for part in 0..count {
            let live = Arc::new(LiveCounters::default());
            let cursor = Cursor::new(Arc::clone(schedule), part, count);
            let connections =
                plan.connections / count + usize::from(part < plan.connections % count);
            sending.lives.push(Arc::clone(&live));
            sending.threads.push(buyers::spawn(
                Arc::clone(&sending.shared),
                cursor,
                connections,
                live,
                payments_tx.clone(),
                waiting_tx.clone(),
            )?);
        }
        Ok((sending, delivery, waiting))
    }

    /// Moment zero, once all threads are connected.
    async fn begun(&self) -> Result<Instant, LoadError> {
        loop {
            if let Some(start) = self.shared.start.get() {
                return Ok(*start);
            }
            if self.threads.iter().any(JoinHandle::is_finished) {
                return Err(dead(&"it ended before the load began"));
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    fn is_finished(&self) -> bool {
        self.threads.iter().all(JoinHandle::is_finished)
    }

    fn snapshot(
        &self,
        begun: Instant,
        planned: Option<Duration>,
        schedule: &Schedule,
        speed: &mut RateMeter,
    ) -> Snapshot {
        let elapsed = begun.elapsed();
        let count_of = |kind: AnswerKind| self.lives.iter().map(|live| live.answers(kind)).sum();
        let answered: u64 = AnswerKind::ALL.into_iter().map(count_of).sum();
        let over = planned.is_some_and(|planned| elapsed > planned);
        let mut snapshot = Snapshot {
            elapsed,
            planned,
            phase: if over {
                Phase::LastAnswers
            } else {
                Phase::Load
            },
            sent: self.lives.iter().map(|live| live.sent()).sum(),
            planned_requests: schedule.requests_expected(),
            answered_per_second: speed.per_second(answered),
            in_flight: 0,
            placed: 0,
            paid: 0,
            replayed: 0,
            refused: 0,
            pushed_back: 0,
            errors: 0,
            p99_ms: self
                .lives
                .iter()
                .map(|live| live.p99_ms())
                .fold(0.0, f64::max),
        };
        snapshot.count(count_of);
        snapshot
    }

    fn join(&mut self) -> Result<Vec<Recorder>, LoadError> {
        self.threads
            .drain(..)
            .map(|thread| match thread.join() {
                Ok(recorder) => recorder.map_err(|e| dead(&e)),
                Err(_) => Err(dead(&"it panicked, as printed above")),
            })
            .collect()
    }
}

impl Drop for Sending {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
    }
}

fn dead(reason: &dyn std::fmt::Display) -> LoadError {
    LoadError::Thread {
        what: "sending thread",
        reason: reason.to_string(),
    }
}

fn join_records(
    mut parts: Vec<Recorder>,
    plan: &LoadPlan,
    template: &Arc<RequestTemplate>,
    interval_ms: u64,
) -> (Recorder, Option<Outcomes>) {
    let outcomes = plan.keep_outcomes.then(|| {
        let rows = parts
            .iter_mut()
            .map(|part| {
                (
                    std::mem::take(&mut part.rows),
                    std::mem::take(&mut part.names),
                )
            })
            .collect();
        Outcomes::join(Arc::clone(template), rows)
    });
    let mut recorder = Recorder::new(interval_ms, false);
    for part in &mut parts {
        recorder.add(part);
    }
    (recorder, outcomes)
}

async fn follow_up(report: &mut LoadReport, target: &Target, mut order_ids: Vec<u64>) {
    order_ids.sort_unstable();
    order_ids.dedup();
    let orders = order_ids.len() as u64;
    let limit = Duration::from_millis(report.plan.follow_up_ms);
    let finals = follow_up::resolve(target, order_ids, limit).await;
    if let Some(outcomes) = &mut report.outcomes {
        outcomes.set_final_statuses(&finals);
    }
    let mut undecided = UndecidedReport {
        orders,
        unsettled: orders - finals.len() as u64,
        ..UndecidedReport::default()
    };
    for status in finals.into_values() {
        *undecided.settled.entry(status).or_default() += 1;
    }
    report.undecided = undecided;
}

/// Short runs are drawn finely; long ones in slices that a chart can still show.
fn interval_ms(seconds: f64) -> u64 {
    if seconds <= 60.0 {
        100
    } else if seconds <= 3600.0 {
        1000
    } else {
        10_000
    }
}
