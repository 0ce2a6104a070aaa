//! This process as a node of a cluster: the links to the others, and the server of their calls.

use std::net::TcpListener;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::StartError;
use super::planes::Planes;
use crate::http::data_plane::nodes::Nodes;
use crate::http::data_plane::router::Router;
use crate::http::peers::key::ClusterKey;
use crate::http::peers::pool::Peers;
use crate::http::peers::server::PeerServer;
use crate::http::peers::{Hint, Identity};
use crate::order::Cutover;
use crate::state::lanes::Lanes;
use crate::supervise::Supervisor;

/// Time for the answers to requests that were passed on. The nodes that have them answer in milliseconds, or at the end
/// of their buyers' waits, which a process that stops does not await.
const ANSWERS_WITHIN: Duration = Duration::from_secs(2);

/// Interval at which the answers are looked for.
const LOOK: Duration = Duration::from_millis(5);

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
}

/// A node that does not serve calls yet.
pub(super) struct Joining {
    listener: TcpListener,
    key: ClusterKey,
    peers: Arc<Peers>,
}

impl NodeParts {
    /// The data plane's view of the cluster, and what is left to do once there is a service.
    pub(super) fn join(self, planes: &Planes, supervisor: &Supervisor) -> (Nodes, Joining) {
        let own = Identity {
            database: self.database,
            node: self.node,
            epoch: self.epoch,
            data_plane: planes.data_plane.to_string(),
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
        })
    }
}

impl Node {
    /// Begins no more calls of others, answers those that run, and gives up those of its own that have no answer.
    pub(super) async fn stop(self, limit: Duration) {
        let Node { peers, server } = self;
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
    }
}
