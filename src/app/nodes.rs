//! This process as a node of a cluster: the links to the others, and the server of their calls.

use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::task::AbortHandle;

use super::StartError;
use super::background::{Background, Handles, Parts};
use super::joining::JoinedNode;
use super::planes::Planes;
use crate::config::Config;
use crate::http::data_plane::nodes::Nodes;
use crate::http::data_plane::router::Router;
use crate::http::peers::key::ClusterKey;
use crate::http::peers::pool::Peers;
use crate::http::peers::server::PeerServer;
use crate::http::peers::{Hint, Identity};
use crate::order::{Cutover, SkuId};
use crate::pipeline::cluster::lane_keeper::{KeeperParts, LaneKeeper, Neighbours};
use crate::pipeline::cluster::member::{Member, Seen};
use crate::state::State;
use crate::state::lanes::{Lanes, NodeAddress};
use crate::store::cluster::{lanes, membership};
use crate::store::postgres::Database;
use crate::supervise::Supervisor;

/// Time for the answers to requests that were passed on. The nodes that have them answer in milliseconds, or at the end
/// of their buyers' waits, which a process that stops does not await.
const ANSWERS_WITHIN: Duration = Duration::from_secs(2);

/// Interval at which the answers are looked for.
const LOOK: Duration = Duration::from_millis(5);

/// Time in which a node that leaves hands its lanes over. What it still has then, another takes over.
const LEAVE_WITHIN: Duration = Duration::from_secs(30);

/// Interval at which a node that leaves looks whether it has lanes.
const LEAVE_LOOK: Duration = Duration::from_millis(50);

/// What makes a process a node.
pub struct NodeParts {
    /// Where other nodes call.
    pub listener: TcpListener,
    /// What the nodes of a cluster know and nobody else.
    pub key: ClusterKey,
    /// The id of the cluster's database.
    pub database: [u8; 16],
    /// The number of this node.
    pub node: u8,
    /// Its epoch.
    pub epoch: u64,
    /// Which node has which lane.
    pub lanes: Arc<Lanes>,
    /// Which order ids name their lane.
    pub cutover: Cutover,
    /// Takes news from other nodes. Must not block.
    pub on_hint: Box<dyn Fn(u8, Hint) + Send + Sync>,
}

/// A running node.
pub(super) struct Node {
    pub(super) peers: Arc<Peers>,
    server: PeerServer<Arc<Router>>,
    /// `None`: its lanes are dealt by hand.
    life: Option<Life>,
}

/// The membership of a running node.
struct Life {
    member: Arc<Member>,
    database: Database,
    renewing: AbortHandle,
}

/// A node that does not serve calls yet.
pub(super) struct Joining {
    listener: TcpListener,
    key: ClusterKey,
    peers: Arc<Peers>,
}

impl NodeParts {
    /// The data plane's view of the cluster, and what is left to do once there is a service.
    pub(super) fn join(
        self,
        config: &Config,
        planes: &Planes,
        supervisor: &Supervisor,
    ) -> (Nodes, Joining) {
        let own = Identity {
            database: self.database,
            node: self.node,
            epoch: self.epoch,
            data_plane: reachable(planes.data_plane, &config.cluster.advertise),
        };
        let wake_all = Arc::clone(&planes.wake_all);
        let peers = Peers::new(self.key.clone(), own, wake_all, supervisor.clone());
        let peers = Arc::new(peers);
        let nodes = Nodes {
            lanes: self.lanes,
            cutover: self.cutover,
            peers: Arc::clone(&peers),
            on_hint: self.on_hint,
        };
        let joining = Joining {
            listener: self.listener,
            key: self.key,
            peers,
        };
        (nodes, joining)
    }
}

impl Joining {
    /// Serves calls from now on.
    pub(super) fn serve(
        self,
        service: &Arc<Router>,
        supervisor: &Supervisor,
    ) -> Result<Node, StartError> {
        let own = self.peers.own().clone();
        let service = Arc::clone(service);
        let server = PeerServer::serve(self.listener, self.key, own, service, supervisor)
            .map_err(StartError::Engine)?;
        Ok(Node {
            peers: self.peers,
            server,
            life: None,
        })
    }
}

impl Neighbours for Peers {
    fn are(&self, nodes: &[NodeAddress]) {
        self.keep(nodes);
    }

    fn lanes_moved(&self) {
        tell(self, &Hint::LanesMoved);
    }

    fn want_left(&self, sku: &SkuId) {
        tell(self, &Hint::Want(sku.clone()));
    }

    fn terms_changed(&self) {
        tell(self, &Hint::Terms);
    }
}

fn tell(peers: &Peers, hint: &Hint) {
    for link in peers.report() {
        peers.hint(link.peer.node, hint);
    }
}

impl Node {
    /// Begins the life of a node: its lanes open, and it takes dead nodes over.
    pub(super) async fn live(
        &mut self,
        joined: JoinedNode,
        parts: &Parts<'_>,
        handles: &Handles,
        background: &mut Background,
    ) -> Result<(), StartError> {
        let JoinedNode {
            member,
            takeovers,
            changed,
            loaded,
            renewing,
            ..
        } = joined;
        let (state, queue) = (Arc::clone(parts.state), Arc::clone(&parts.path.queue));
        member.lease_ids_of(Arc::clone(&state), Arc::clone(&queue));
        let neighbours = Arc::clone(&self.peers) as Arc<dyn Neighbours>;
        member.hints.reach(Arc::clone(&neighbours));
        let own = member.lease.node;
        let mut seen = member.watch();
        let is_active = |seen: &Arc<_>| is_active(seen, own);
        // The renewal that was asked for; a database that is away poisons nothing and ends the wait.
        let _ = tokio::time::timeout(LEAVE_WITHIN, seen.wait_for(is_active)).await;
        let Some(lanes) = state.lanes.clone() else {
            unreachable!("recovery gives a node its lanes");
        };
        // Two connections: a hand-over never waits behind a load.
        let database = parts.ownership.database.with_own_pool(2)?;
        let mut keeper = LaneKeeper::new(KeeperParts {
            member: Arc::clone(&member),
            state: Arc::clone(&state),
            lanes,
            queue,
            canceller: handles.canceller.clone(),
            database: database.clone(),
            window_ms: parts.config.orders.idempotency_window_ms,
            neighbours,
            loaded,
            changed,
            metrics: parts.metrics.clone(),
        });
        keeper.pass().await?;
        background.run("the lanes of this node", keeper.run());
        background.run("the takeovers of dead nodes", takeovers.run(state));
        self.life = Some(Life {
            member,
            database,
            renewing,
        });
        Ok(())
    }

    /// Hands every lane over, if there is another node, so that no client notices more than a lane that moves.
    pub(super) async fn hand_everything_over(&self) {
        let Some(life) = &self.life else {
            return;
        };
        let own = life.member.lease.node;
        let asked = membership::ask_to_leave(&life.database, own).await;
        life.member.look_now();
        let until = Instant::now() + LEAVE_WITHIN;
        if let Err(error) = asked {
            tracing::warn!(reason = %error, "the database could not be told that this node leaves");
            return;
        }
        while Instant::now() < until {
            let seen = life.member.seen();
            let has_heir = seen
                .nodes
                .iter()
                .any(|row| row.node != own && row.is_active());
            let rows = lanes::all(&life.database).await;
            let ours = rows.map(|rows| rows.iter().filter(|row| row.node == Some(own)).count());
            match ours {
                Ok(0) => return,
                Ok(left) if !has_heir => {
                    tracing::info!(lanes = left, "no other node takes the lanes of this one");
                    return;
                }
                Ok(_) | Err(_) => tokio::time::sleep(LEAVE_LOOK).await,
            }
        }
        tracing::warn!("not every lane was handed over in time; another node takes the rest over");
    }

    /// Begins no more calls of others, answers those that run, and gives up those of its own that have no answer.
    pub(super) async fn stop(self, limit: Duration) -> Option<Left> {
        let Node {
            peers,
            server,
            life,
        } = self;
        let own = async {
            let deadline = Instant::now() + ANSWERS_WITHIN;
            let waiting = || peers.report().iter().any(|link| link.calls > 0);
            while waiting() && Instant::now() < deadline {
                tokio::time::sleep(LOOK).await;
            }
            // Whoever still waits is answered that its order is undecided.
            peers.keep(&[]);
        };
        let (all_answered, ()) = tokio::join!(server.drain(limit), own);
        if !all_answered {
            tracing::warn!(
                "requests of other nodes are left without an answer; their clients learn the outcome by a retry"
            );
        }
        life.map(Left)
    }
}

/// A node that serves nothing any more, and has not left the cluster yet.
pub(super) struct Left(Life);

impl Left {
    /// Leaves the cluster, after everything is written. What this node still has, another takes over at once.
    pub(super) async fn leave(self, state: &State) -> bool {
        let Left(life) = self;
        life.renewing.abort();
        let used = state.ids.now().plus_ms(1);
        match membership::leave(&life.database, life.member.lease, used).await {
            Ok(true) => true,
            Ok(false) => {
                tracing::warn!("this node leaves with lanes or a log that another node takes over");
                false
            }
            Err(error) => {
                tracing::warn!(reason = %error, "the database could not be told that this node has left; it is taken over");
                false
            }
        }
    }
}

/// Where clients reach the data plane of this node: where it listens, and if that is every address, the host under which
/// the other nodes call.
fn reachable(data_plane: SocketAddr, advertised: &str) -> String {
    match advertised.rsplit_once(':') {
        Some((host, _)) if data_plane.ip().is_unspecified() => {
            format!("{host}:{}", data_plane.port())
        }
        _ => data_plane.to_string(),
    }
}

fn is_active(seen: &Seen, node: i16) -> bool {
    seen.nodes
        .iter()
        .any(|row| row.node == node && row.is_active())
}

/// Binds the address at which other nodes call; `None` for a process on its own.
pub(super) fn listener(config: &Config) -> Result<Option<TcpListener>, StartError> {
    if !config.cluster.enabled {
        return Ok(None);
    }
    let address = config.cluster.listen;
    let listener = TcpListener::bind(address).map_err(|source| StartError::Listen {
        field: "cluster.listen",
        address,
        source,
    })?;
    Ok(Some(listener))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clients_are_told_an_address_that_they_can_call() {
        let everywhere = SocketAddr::from(([0, 0, 0, 0], 8080));
        let here = SocketAddr::from(([10, 0, 0, 7], 8080));
        let advertised = "millrace-0.nodes:8082";
        assert_eq!(reachable(everywhere, advertised), "millrace-0.nodes:8080");
        assert_eq!(reachable(here, advertised), "10.0.0.7:8080");
        assert_eq!(reachable(here, ""), "10.0.0.7:8080");
    }
}
