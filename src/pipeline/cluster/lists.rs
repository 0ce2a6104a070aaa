//! The waiting lists of all nodes, as far as each has to know them: that somebody waits, so that nobody overtakes, and the
//! sequence, for people. Units are assigned by the rows alone (`store::cluster::lists`).

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::clock;
use crate::order::{LaneSet, OrderId, SkuNumber};
use crate::state::State;
use crate::state::lanes::NodeLanes;
use crate::state::stock::{Sku, Turn};
use crate::store::StoreError;
use crate::store::cluster::lists;
use crate::store::postgres::Database;

/// Interval between two looks for an order that has no turn yet, whose buyer waits to hear of its position.
const SOON: Duration = Duration::from_millis(10);
/// Interval between two looks at which SKUs have a list, and at the lists.
const LOOK: Duration = Duration::from_millis(100);
/// A list is not read as a whole again before so much time has passed for each of its orders, so that a long one costs a
/// small part of the database's time. What was added to it is read at each look.
const REST_PER_ORDER: Duration = Duration::from_micros(20);

/// The task.
pub struct Lists {
    state: Arc<State>,
    lanes: NodeLanes,
    node: i16,
    database: Database,
    /// When each list may be read as a whole again.
    next: BTreeMap<SkuNumber, Instant>,
}

impl Lists {
    /// The task, not yet running, with a connection of its own.
    pub fn new(state: Arc<State>, lanes: NodeLanes, node: i16, database: Database) -> Self {
        Lists {
            state,
            lanes,
            node,
            database,
            next: BTreeMap::new(),
        }
    }

    /// Runs until the future is dropped or the process is poisoned.
    pub async fn run(mut self) {
        let mut looked_at = None;
        while !self.state.poison.is_set() {
            let is_due = looked_at.is_none_or(|at: Instant| at.elapsed() >= LOOK);
            if self.has_news() || is_due {
                looked_at = Some(Instant::now());
                if let Err(error) = self.look().await {
                    tracing::warn!(reason = %error, "waiting lists of other nodes are not read for now; retrying");
                }
            }
            tokio::time::sleep(SOON).await;
        }
    }

    /// Whether an order of this node has got its row, and with it a turn, since its list was read.
    fn has_news(&self) -> bool {
        let waiting = self.state.catalogue.waiting();
        let news = waiting.iter().filter(|sku| sku.waitlist().has_news());
        news.filter(|sku| sku.is_drawn()).count() > 0
    }

    /// Reads which SKUs have lists, and the lists.
    ///
    /// # Errors
    /// If the database does not answer.
    pub async fn look(&mut self) -> Result<(), StoreError> {
        let looked_at = clock::now();
        let listed = lists::listed(&self.database, self.node).await?;
        for sku in self.state.catalogue.waiting() {
            let is_listed = listed.get(&sku.number);
            if is_listed != Some(&true) {
                sku.waitlist().note_elsewhere(sku.counter(), 0, &[]);
            }
            if is_listed.is_none() {
                sku.waitlist().resume(sku.counter(), looked_at);
            }
        }
        for (number, _) in listed.into_iter().filter(|(_, is_listed)| *is_listed) {
            let Some(sku) = self.state.catalogue.by_number(number) else {
                continue;
            };
            if !sku.is_waited() {
                sku.waitlist().note_somebody(sku.counter());
            }
            let next = self.next.get(&number);
            let is_due = next.is_none_or(|next| Instant::now() >= *next);
            if sku.waitlist().was_restored() || is_due {
                let orders = u32::try_from(self.read(&sku).await?).unwrap_or(u32::MAX);
                let rest = LOOK.max(REST_PER_ORDER.saturating_mul(orders));
                self.next.insert(number, Instant::now() + rest);
            } else if sku.is_drawn() {
                let after = sku.waitlist().last_turn();
                let (elsewhere, turns) = self.turns_after(&sku, after).await?;
                sku.waitlist().note_joined(elsewhere, &turns);
            }
        }
        Ok(())
    }

    /// Reads a list as a whole. Returns its length.
    async fn read(&self, sku: &Sku) -> Result<usize, StoreError> {
        let (list, counter) = (sku.waitlist(), sku.counter());
        if sku.is_drawn() {
            let (elsewhere, turns) = self.turns_after(sku, 0).await?;
            list.note_elsewhere(counter, elsewhere, &turns);
            return Ok(turns.len());
        }
        // Entries have no sequence yet, and there may be millions.
        let own = self.own();
        let elsewhere = lists::count_elsewhere(&self.database, sku.number, own).await?;
        list.note_elsewhere(counter, elsewhere, &[]);
        Ok(elsewhere)
    }

    /// The lanes whose orders this node lists.
    fn own(&self) -> LaneSet {
        // In this order: a lane that is not coming any more is open.
        let mut own = self.lanes.lanes.coming();
        own.extend(self.lanes.lanes.open_here().iter());
        own
    }

    /// The turns behind one, with the number of those that are not of this node.
    async fn turns_after(&self, sku: &Sku, after: u64) -> Result<(usize, Vec<Turn>), StoreError> {
        let own = self.own();
        // Every order that waits has an id that names its lane: lists are younger than lanes.
        let lane_of = |id| self.lanes.cutover.lane_of(id);
        let is_own = |id: &OrderId| lane_of(*id).is_some_and(|lane| own.has(lane));
        let turns = lists::turns(&self.database, sku.number, after).await?;
        let turns: Vec<Turn> = turns
            .into_iter()
            .map(|(turn, id)| (turn, Some(id).filter(is_own)))
            .collect();
        let elsewhere = turns.iter().filter(|(_, own)| own.is_none()).count();
        Ok((elsewhere, turns))
    }
}
