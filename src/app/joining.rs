//! Becoming a node of a cluster: a row in the database, whose membership is renewed from then on.

use std::collections::BTreeMap;
use std::net::TcpListener;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Notify;
use tokio::task::AbortHandle;

use super::nodes::NodeParts;
use super::ownership::{Owned, Ownership, Writers};
use super::planes::Planes;
use super::{StartError, order_log};
use crate::config::{Backend, Config};
use crate::http::control_plane::ControlPlane;
use crate::http::peers::Hint;
use crate::http::peers::key::ClusterKey;
use crate::order::{ClockReading, Lane};
use crate::pipeline::cluster::member::{Member, Renewing, session_name};
use crate::pipeline::cluster::takeover::{FindLog, TakeoverParts, Takeovers};
use crate::pipeline::failover::lease::AcknowledgeLease;
use crate::queue::log::broker::frame;
use crate::state::State;
use crate::state::lanes::Lanes;
use crate::state::poison::Poison;
use crate::store::Ledger;
use crate::store::cluster::formats::Formats;
use crate::store::cluster::membership::{self, Candidate, Join, Joined};
use crate::store::postgres::{Connected, Database, lease};
use crate::supervise::Supervisor;

/// The file under `data_dir` that names the row of this process.
const HOME: &str = "node.id";
/// The format of the groups in an order log: this release knows one.
pub(super) const FORMATS: Formats = Formats {
    reads: frame::VERSION as i16,
    writes_from: frame::VERSION as i16,
};
/// Pause before a row is asked for again whose log another node replays.
const ASK_AGAIN: Duration = Duration::from_millis(250);
/// `application_name` of a session that has no number yet.
pub(super) const NAME: &str = "millrace joining";

/// A process that is a node.
pub(super) struct JoinedNode {
    pub(super) member: Arc<Member>,
    /// Where other nodes call.
    pub(super) listener: TcpListener,
    /// Whether its row had lanes.
    pub(super) had_lanes: bool,
    /// The counters of the orders in its log.
    pub(super) log_ledger: Ledger,
    /// How long an earlier process on its row may answer after a contact.
    pub(super) answer_lease_ms: u64,
    /// Takes dead nodes over, those first that an earlier process on this row had begun with.
    pub(super) takeovers: Takeovers,
    /// Woken when something about lanes has changed.
    pub(super) changed: Arc<Notify>,
    /// Lanes that the start has loaded.
    pub(super) loaded: BTreeMap<Lane, i64>,
    pub(super) renewing: AbortHandle,
}

impl JoinedNode {
    /// What the links to the other nodes need.
    pub(super) fn parts(
        &self,
        config: &Config,
        ownership: &Ownership,
        state: &State,
    ) -> Result<NodeParts, StartError> {
        let lease = self.member.lease;
        let Some(lanes) = &state.lanes else {
            unreachable!("recovery gives a node its lanes");
        };
        let (changed, member) = (Arc::clone(&self.changed), Arc::clone(&self.member));
        Ok(NodeParts {
            listener: self.listener.try_clone().map_err(StartError::Engine)?,
            key: ClusterKey::new(&config.cluster.secret.0)?,
            database: ownership.identity,
            node: u8::try_from(lease.node).unwrap_or(u8::MAX),
            epoch: u64::try_from(lease.epoch).unwrap_or(0),
            lanes: Arc::clone(&lanes.lanes),
            cutover: lanes.cutover,
            on_hint: Box::new(move |_, hint| match hint {
                Hint::LanesMoved => {
                    member.look_now();
                    changed.notify_one();
                }
                Hint::Want(_) => member.hints.want_left(),
                Hint::Terms => member.hints.terms_changed(),
                // The callbacks look for it.
                Hint::Payment(_) | Hint::PaymentArrives(..) => {}
            }),
        })
    }
}

/// What a process that joins has already.
pub(super) struct JoinParts<'a> {
    pub(super) config: &'a Config,
    /// Where other nodes will call.
    pub(super) listener: TcpListener,
    pub(super) planes: &'a Planes,
    pub(super) poison: &'a Arc<Poison>,
    pub(super) supervisor: &'a Supervisor,
}

/// Waits for a row and takes it, on a session that keeps single processes away. From then on it is renewed.
pub(super) async fn join(
    parts: JoinParts<'_>,
    database: &Database,
    mut session: Connected,
    clock: ClockReading,
) -> Result<(Owned, JoinedNode), StartError> {
    let JoinParts {
        config,
        listener,
        planes,
        poison,
        supervisor,
    } = parts;
    let control = &planes.control;
    let home = home(&config.data_dir).map_err(|source| StartError::data_dir(config, source))?;
    let log = match config.queue.backend {
        Backend::Memory | Backend::Journal => None,
        Backend::Redis | Backend::Kafka | Backend::RocketMq => Some(order_log::name_of(config, 0)),
    };
    let address = advertised(config, &listener).map_err(StartError::Engine)?;
    let writers = Writers::beside(config.worker_count());
    let candidate = Candidate {
        home: &home,
        log: log.as_deref(),
        address: &address,
        formats: FORMATS,
        answer_lease_ms: config.cluster.answer_lease_ms,
        shards: writers.count(),
        ids_from: clock.now(),
    };
    let joined = take_row(&mut session, &candidate, control).await?;
    let node = joined.lease.node;
    tracing::info!(node, epoch = joined.lease.epoch, %address, "joined the cluster");
    let database = &database.clone().of_node(joined.lease.node)?;
    // Named for the node, so that whoever fences it may end it.
    let session = lease::share(database, &session_name(joined.lease)).await?;
    let settings = &config.cluster;
    let member = Arc::new(Member::new(
        joined.lease,
        Arc::new(Lanes::new()),
        settings.lease_ms,
        settings.answer_lease_ms,
        Arc::new(AcknowledgeLease::of_log()),
    ));
    let own_pool = database.with_own_pool(2)?;
    let renewing = Renewing::new(
        Arc::clone(&member),
        own_pool.clone(),
        session,
        Arc::clone(poison),
    );
    let renewing = supervisor.task("the renewal of the membership", renewing.run());
    let changed = Arc::<Notify>::default();
    let Joined {
        lease,
        id_high_water,
        ids_leased_until,
        lanes,
        log_ledger,
        answer_lease_ms,
        paused,
        receipts,
        ..
    } = joined;
    let takeovers = Takeovers::new(TakeoverParts {
        member: Arc::clone(&member),
        database: own_pool,
        find_log: find_log(config),
        identity: receipts.database,
        rows_max: config.workers.batch_rows_max,
        clock,
        changed: Arc::clone(&changed),
        metrics: control.metrics().clone(),
    });
    let owned = Owned {
        lease,
        id_high_water,
        ids_leased_until,
        paused,
        receipts,
    };
    let node = JoinedNode {
        member,
        listener,
        had_lanes: !lanes.is_empty(),
        log_ledger,
        answer_lease_ms,
        takeovers,
        changed,
        loaded: BTreeMap::new(),
        renewing: renewing.abort_handle(),
    };
    Ok((owned, node))
}

async fn take_row(
    session: &mut Connected,
    candidate: &Candidate<'_>,
    control: &ControlPlane,
) -> Result<Joined, StartError> {
    let mut told = false;
    loop {
        match membership::join(session, candidate).await? {
            Join::Joined(joined) => return Ok(joined),
            Join::Full => return Err(StartError::ClusterFull),
            Join::BeingReplayed { node, by } => {
                control.progress(format!(
                    "node {by} replays the log of node {node}, whose process was gone; waiting for its end"
                ));
                if !std::mem::replace(&mut told, true) {
                    tracing::info!(
                        node,
                        by,
                        "another node replays the log of this one; waiting for its end"
                    );
                }
                tokio::time::sleep(ASK_AGAIN).await;
            }
        }
    }
}

/// The id of this `data_dir`, made at its first start: 32 hexadecimal digits.
fn home(data_dir: &Path) -> std::io::Result<String> {
    let path = data_dir.join(HOME);
    match std::fs::read_to_string(&path) {
        Ok(id) => Ok(id.trim().to_owned()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            let id: [u8; 16] = rand::random();
            let id: String = id.iter().map(|byte| format!("{byte:02x}")).collect();
            std::fs::write(&path, format!("{id}\n"))?;
            Ok(id)
        }
        Err(error) => Err(error),
    }
}

/// Where other nodes reach this one.
fn advertised(config: &Config, listener: &TcpListener) -> std::io::Result<String> {
    match config.cluster.advertise.as_str() {
        "" => Ok(listener.local_addr()?.to_string()),
        address => Ok(address.to_owned()),
    }
}

/// The logs of other nodes, by the settings of this process.
pub(super) fn find_log(config: &Config) -> FindLog {
    let config = config.clone();
    Arc::new(move |node| {
        let number = u8::try_from(node).map_err(|_| format!("there is a node {node}"))?;
        order_log::broker(&config, number).map_err(|error| error.to_string())
    })
}
