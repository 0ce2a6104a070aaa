//! A link to each node of the cluster.

use std::sync::Arc;
use std::task::Waker;
use std::time::Instant;

use arc_swap::ArcSwap;
use parking_lot::Mutex;

use super::frame::CallParts;
use super::key::ClusterKey;
use super::link::{Link, LinkReport, PendingCall};
use super::{Hint, Identity, Unsent};
use crate::pipeline::WakeAll;
use crate::state::lanes::NodeAddress;
use crate::supervise::Supervisor;

/// Nodes of a cluster at most.
const NODES_MAX: usize = 64;

/// Links by the number of their node.
type Links = [Option<Arc<Link>>; NODES_MAX];

/// The links of this process to the other nodes.
pub struct Peers {
    key: ClusterKey,
    own: Identity,
    wake_all: WakeAll,
    supervisor: Supervisor,
    links: ArcSwap<Links>,
    /// Held while links are opened and closed.
    keeping: Mutex<()>,
}

impl Peers {
    /// A pool without links.
    pub fn new(key: ClusterKey, own: Identity, wake_all: WakeAll, supervisor: Supervisor) -> Self {
        Peers {
            key,
            own,
            wake_all,
            supervisor,
            links: ArcSwap::from_pointee([const { None }; NODES_MAX]),
            keeping: Mutex::new(()),
        }
    }

    /// Who this process is.
    pub fn own(&self) -> &Identity {
        &self.own
    }

    /// Keeps a link to each of these nodes and to no other; this process itself is left out. A link stays while its
    /// node has the same address. Must be called on a tokio runtime.
    pub fn keep(&self, nodes: &[NodeAddress]) {
        let _keeping = self.keeping.lock();
        let old = self.links.load_full();
        let mut links: Links = [const { None }; NODES_MAX];
        for peer in nodes.iter().filter(|peer| peer.node != self.own.node) {
            let at = usize::from(peer.node);
            let Some(place) = links.get_mut(at) else {
                continue;
            };
            let present = old.get(at).and_then(Option::as_ref);
            *place = match present.filter(|link| link.peer() == peer) {
                Some(link) => Some(Arc::clone(link)),
                None => Some(Arc::new(Link::keep(
                    peer.clone(),
                    self.key.clone(),
                    self.own.clone(),
                    Arc::clone(&self.wake_all),
                    &self.supervisor,
                ))),
            };
        }
        self.links.store(Arc::new(links));
    }

    /// Begins a call to a node. It ends by `deadline`, and `waker` is woken then.
    ///
    /// # Errors
    /// [`Unsent`]: no byte of it has left.
    pub fn begin(
        &self,
        node: u8,
        call: &CallParts<'_>,
        waker: &Waker,
        deadline: Instant,
    ) -> Result<PendingCall, Unsent> {
        let links = self.links.load();
        match links.get(usize::from(node)) {
            Some(Some(link)) => link.begin(call, waker, deadline),
            _ => Err(Unsent::Away),
        }
    }

    /// Sends a hint to a node. False: there is no connection to it now.
    pub fn hint(&self, node: u8, hint: &Hint) -> bool {
        let links = self.links.load();
        let link = links.get(usize::from(node)).and_then(Option::as_ref);
        link.is_some_and(|link| link.hint(hint))
    }

    /// The state of each link, by node.
    pub fn report(&self) -> Vec<LinkReport> {
        let links = self.links.load();
        links.iter().flatten().map(|link| link.report()).collect()
    }
}
