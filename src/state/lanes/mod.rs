//! Which node has which lane, and which lanes are open here.
//!
//! A lane is *open* in the process that owns it and admits its buyers. Each request of the lane holds a [`LanePass`]
//! until its answer is known; a lane that is closed is handed over only when no pass is left.
//!
//! ```text
//!                 close                       drained, one transaction
//!     open here ─────────► closed here ─────────────────────────────────► elsewhere
//!         ▲                     │                                             │
//!         └──── reopened ───────┴───────────── taken, loaded, log replayed ◄──┘
//! ```
//!
//! Everything carries the epoch of the lane, which rises in PostgreSQL whenever the lane changes hands. What arrives
//! with a lower epoch than what is known is old news, and is ignored.

use std::sync::Arc;

use arc_swap::ArcSwap;
use crossbeam::utils::CachePadded;

use crate::order::{Cutover, Lane, LaneSet};
use crate::sync::{AtomicU64, Guarded, Ordering};

mod door;

use door::Door;
pub use door::LanePass;

/// A node, and where other nodes reach it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeAddress {
    /// Its number, 0 to 63.
    pub node: u8,
    /// Host and port, as it advertises them.
    pub address: Arc<str>,
}

/// What this process knows of a lane.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Standing {
    /// This process owns it, and it is open.
    Here {
        /// Epoch of the lane.
        epoch: u64,
    },
    /// It is open nowhere as far as is known: it moves, or waits for the log of a dead node.
    Closed,
    /// Another node owns it.
    Elsewhere {
        /// Epoch of the lane.
        epoch: u64,
        /// Its owner.
        owner: NodeAddress,
    },
}

/// A [`LanePass`] that outlives a request.
#[derive(Debug)]
pub struct OwnedPass {
    lanes: Arc<Lanes>,
    lane: Lane,
}

impl Drop for OwnedPass {
    fn drop(&mut self) {
        self.lanes.door(self.lane).leave();
    }
}

/// The lanes of a node, for tasks that act on orders.
#[derive(Clone, Debug)]
pub struct NodeLanes {
    /// Which lanes are open here.
    pub lanes: Arc<Lanes>,
    /// Which order ids name their lane.
    pub cutover: Cutover,
}

/// The lanes that a process has open; one on its own has all.
pub fn here(of_node: Option<&NodeLanes>) -> LaneSet {
    of_node.map_or(LaneSet::ALL, |of_node| of_node.lanes.open_here())
}

/// The lanes.
#[derive(Debug)]
pub struct Lanes {
    /// Padded, because every request of a lane writes to its door.
    doors: Box<[CachePadded<Door>]>,
    standings: ArcSwap<Vec<(u64, Standing)>>,
    /// One writer of `standings` at a time.
    changing: Guarded<()>,
    version: AtomicU64,
    answers_until_ms: AtomicU64,
    /// Lanes that are ours and not open yet, a bit each: their orders are being loaded.
    coming: AtomicU64,
}

impl Default for Lanes {
    fn default() -> Self {
        Self::new()
    }
}

impl Lanes {
    /// The table before anything is known: every lane is closed.
    pub fn new() -> Self {
        Lanes {
            doors: Lane::all().map(|_| CachePadded::new(Door::new())).collect(),
            standings: ArcSwap::from_pointee(vec![(0, Standing::Closed); Lane::COUNT]),
            changing: Guarded::default(),
            version: AtomicU64::new(0),
            answers_until_ms: AtomicU64::new(0),
            coming: AtomicU64::new(0),
        }
    }

    /// What is known of a lane.
    pub fn standing(&self, lane: Lane) -> Standing {
        self.standings.load()[usize::from(lane.get())].1.clone()
    }

    /// What is known of every lane.
    pub fn snapshot(&self) -> Vec<(Lane, Standing)> {
        let standings = self.standings.load();
        let standings = standings.iter().map(|(_, standing)| standing.clone());
        Lane::all().zip(standings).collect()
    }

    /// Rises with every change of a standing.
    pub fn version(&self) -> u64 {
        self.version.load(Ordering::Acquire)
    }

    /// Admits one request of a lane.
    ///
    /// # Errors
    /// The standing of the lane, if it is not open here.
    pub fn enter(&self, lane: Lane) -> Result<LanePass<'_>, Standing> {
        self.door(lane)
            .pass()
            .ok_or_else(|| match self.standing(lane) {
                // It was closed or opened between the two looks; to the caller it was closed.
                Standing::Here { .. } => Standing::Closed,
                other => other,
            })
    }

    /// The same for work that may outlive its request.
    ///
    /// # Errors
    /// As [`Lanes::enter`].
    pub fn enter_owned(self: &Arc<Self>, lane: Lane) -> Result<OwnedPass, Standing> {
        let pass = self.enter(lane)?;
        // Returned by the other one.
        std::mem::forget(pass);
        let lanes = Arc::clone(self);
        Ok(OwnedPass { lanes, lane })
    }

    /// Admits work on those of some lanes that are open here. A lane is not handed over while its pass lives.
    pub fn enter_among(&self, lanes: LaneSet) -> (LaneSet, Vec<LanePass<'_>>) {
        let entered = lanes
            .iter()
            .filter_map(|lane| Some((lane, self.door(lane).pass()?)));
        entered.unzip()
    }

    /// Opens a lane that this process has taken. Returns false if a higher epoch is known.
    pub fn open(&self, lane: Lane, epoch: u64) -> bool {
        self.set(lane, epoch, Standing::Here { epoch }, Door::open)
    }

    /// Closes a lane: from now on nothing passes. Its epoch stays, so it may be opened again under it.
    pub fn close(&self, lane: Lane) {
        let epoch = self.standings.load()[usize::from(lane.get())].0;
        self.set(lane, epoch, Standing::Closed, Door::shut);
    }

    /// Notes that another node owns a lane under `epoch`; closes it here. Returns false if a higher epoch is known.
    pub fn set_elsewhere(&self, lane: Lane, epoch: u64, owner: NodeAddress) -> bool {
        self.set(
            lane,
            epoch,
            Standing::Elsewhere { epoch, owner },
            Door::shut,
        )
    }

    /// The lanes that are open here.
    pub fn open_here(&self) -> LaneSet {
        let standings = self.snapshot().into_iter();
        standings
            .filter(|(_, standing)| matches!(standing, Standing::Here { .. }))
            .map(|(lane, _)| lane)
            .collect()
    }

    /// The lanes that are not another node's, as far as is known.
    pub fn not_elsewhere(&self) -> LaneSet {
        // Before the standings: a lane that is not coming any more is open.
        let coming = self.coming();
        let standings = self.snapshot().into_iter();
        let ours = standings.filter(|(lane, standing)| {
            coming.has(*lane) || !matches!(standing, Standing::Elsewhere { .. })
        });
        ours.map(|(lane, _)| lane).collect()
    }

    /// Notes which lanes are ours and about to be opened. Requests of them are passed on to their last owner meanwhile, which
    /// sends them back.
    pub fn set_coming(&self, lanes: LaneSet) {
        self.coming.store(lanes.bits(), Ordering::Release);
    }

    /// The lanes that are ours and about to be opened.
    pub fn coming(&self) -> LaneSet {
        LaneSet::from_bits(self.coming.load(Ordering::Acquire))
    }

    /// Whether a lane is closed and every request that had passed is answered.
    pub fn is_drained(&self, lane: Lane) -> bool {
        self.door(lane).is_drained()
    }

    /// Whether an answer from the memory of a lane may leave now: a refusal, a replay, an order, a list. Acknowledgements
    /// ask the log instead. `now_ms` is of the clock of [`Lanes::contact`].
    pub fn may_answer(&self, now_ms: u64) -> bool {
        now_ms < self.answers_until_ms.load(Ordering::Acquire)
    }

    /// Notes a contact that lets answers leave until `until_ms`: `cluster.answer_lease_ms` after a moment *before* the
    /// renewal or the append was sent.
    pub fn contact(&self, until_ms: u64) {
        self.answers_until_ms.fetch_max(until_ms, Ordering::AcqRel);
    }

    fn door(&self, lane: Lane) -> &Door {
        &self.doors[usize::from(lane.get())]
    }

    fn set(&self, lane: Lane, epoch: u64, standing: Standing, turn: impl FnOnce(&Door)) -> bool {
        self.changing.with(|()| {
            let at = usize::from(lane.get());
            let mut standings = Vec::clone(&self.standings.load());
            if epoch < standings[at].0 {
                return false;
            }
            standings[at] = (epoch, standing);
            // The table first: who is turned away at the door looks at it.
            self.standings.store(Arc::new(standings));
            turn(self.door(lane));
            self.version.fetch_add(1, Ordering::Release);
            true
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lane() -> Lane {
        Lane::new(7).unwrap()
    }

    fn owner(node: u8) -> NodeAddress {
        NodeAddress {
            node,
            address: Arc::from("127.0.0.1:8082"),
        }
    }

    #[test]
    fn nothing_passes_before_a_lane_is_open_or_after_it_was_closed() {
        let lanes = Lanes::new();
        assert_eq!(lanes.enter(lane()).unwrap_err(), Standing::Closed);
        assert!(lanes.open(lane(), 1));
        assert!(lanes.enter(lane()).is_ok());
        assert!(lanes.enter(Lane::FIRST).is_err(), "of its own");
        lanes.close(lane());
        assert_eq!(lanes.enter(lane()).unwrap_err(), Standing::Closed);
        assert!(lanes.is_drained(lane()));
    }

    #[test]
    fn a_lane_is_drained_when_the_last_pass_is_returned() {
        let lanes = Lanes::new();
        lanes.open(lane(), 1);
        let (first, second) = (lanes.enter(lane()).unwrap(), lanes.enter(lane()).unwrap());
        assert!(!lanes.is_drained(lane()), "it is open");
        lanes.close(lane());
        drop(first);
        assert!(!lanes.is_drained(lane()));
        drop(second);
        assert!(lanes.is_drained(lane()));
    }

    #[test]
    fn a_lane_is_not_drained_while_work_that_outlives_its_request_has_a_pass() {
        let lanes = Arc::new(Lanes::new());
        assert!(lanes.enter_owned(lane()).is_err());
        lanes.open(lane(), 1);
        let pass = lanes.enter_owned(lane()).unwrap();
        lanes.close(lane());
        assert!(!lanes.is_drained(lane()));
        drop(pass);
        assert!(lanes.is_drained(lane()));
    }

    #[test]
    fn a_lane_of_another_node_that_is_about_to_open_here_is_not_elsewhere() {
        let lanes = Lanes::new();
        lanes.set_elsewhere(lane(), 1, owner(2));
        assert!(!lanes.not_elsewhere().has(lane()));
        assert!(lanes.not_elsewhere().has(Lane::FIRST));
        lanes.set_coming([lane()].into_iter().collect());
        assert!(lanes.not_elsewhere().has(lane()));
    }

    #[test]
    fn the_higher_epoch_of_a_lane_wins() {
        let lanes = Lanes::new();
        let elsewhere = Standing::Elsewhere {
            epoch: 5,
            owner: owner(2),
        };
        assert!(lanes.open(lane(), 4));
        assert!(lanes.set_elsewhere(lane(), 5, owner(2)));
        assert!(!lanes.open(lane(), 4), "old news");
        assert!(!lanes.set_elsewhere(lane(), 4, owner(1)));
        assert_eq!(lanes.enter(lane()).unwrap_err(), elsewhere);
        assert_eq!(lanes.standing(lane()), elsewhere);
        let version = lanes.version();
        assert!(lanes.open(lane(), 6));
        assert!(lanes.version() > version);
        assert_eq!(lanes.standing(lane()), Standing::Here { epoch: 6 });
    }

    #[test]
    fn answers_leave_only_within_the_lease_of_the_last_contact() {
        let lanes = Lanes::new();
        assert!(!lanes.may_answer(0));
        lanes.contact(3_000);
        lanes.contact(2_000);
        assert!(lanes.may_answer(2_999));
        assert!(!lanes.may_answer(3_000));
    }
}
