//! Lending in a running node: it keeps the node's shares filled, asks the other nodes when one is dry, and gives back what
//! others ask for. One task with a connection of its own.
//!
//! ```text
//!   before opens_at      a part of the pool comes in advance
//!   low water            what the last second used comes from the pool
//!   dry, requests ask    pool ─► want ─► others give back ─► units, or nobody has any: sold out
//!   others want          free units go back, the share is marked
//!   a total is lowered   free units go back
//!   orders wait          free units go back, and nothing is lent but to those orders (`store::cluster::lists`)
//! ```
//!
//! Memory never has more than the row: units are taken out of memory before they leave the row, and enter it after they
//! are in the row. If the answer to a transaction is lost, the sums in the row tell what became of it
//! ([`stock::Books`]), and until then nothing else is lent to this share.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::hints::Hints;
use super::own_share::OwnShare;
use super::timer::Timer;
use crate::clock;
use crate::order::{Quantity, Refusal, SkuNumber, UnixMillis};
use crate::pipeline::payments::settler::wait_until_sold;
use crate::state::State;
use crate::state::stock::{Ask, Hold, SaleStock, Shared, Sku, StockSnapshot, Wanted};
use crate::store::StoreError;
use crate::store::cluster::recall;
use crate::store::cluster::shares::{self, Lent, Supply, Want};
use crate::store::cluster::stock::{self, Sale};
use crate::store::postgres::{Database, NodeLease};

/// Interval between two looks for requests that found a share dry.
const TICK: Duration = Duration::from_millis(10);
/// Interval between two looks for wants of other nodes, which tell of theirs.
const WANTS: Duration = Duration::from_millis(500);
/// The same while there are some.
const WANTED: Duration = Duration::from_millis(50);
/// Interval between two readings of the whole sale's counters, which may be 250 ms old in answers.
const SALES: Duration = Duration::from_millis(100);
/// Age up to which those that another node has added up are taken.
const SALES_AGE: Duration = Duration::from_millis(75);
/// Interval between two looks at what each share has used.
const USE: Duration = Duration::from_millis(100);
/// Interval between two moves of sold units to `sku`.
const SWEEP: Duration = Duration::from_secs(1);
/// Time for orders that asked to join a list that nobody is on, and longest time until the first of them is a row.
const JOINING: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(2));
/// Units come in advance from this long before a sale opens.
const AHEAD_MS: u64 = 60_000;
/// Time for which tasks of this process ask for units.
const HOLD: Duration = Duration::from_secs(2);
/// Time after which whoever lowers a total has given up, or is gone. It takes two seconds at most.
const RECALL: Duration = Duration::from_secs(5);
/// Pause after a failure.
const PAUSE: Duration = Duration::from_millis(200);

/// The parts of the task.
pub struct LendingParts {
    /// The state in memory.
    pub state: Arc<State>,
    /// The database, with a connection for this task.
    pub database: Database,
    /// The lease of this node.
    pub lease: NodeLease,
    /// Hints to and from other nodes.
    pub hints: Arc<Hints>,
}

/// The task.
pub struct Lending {
    parts: LendingParts,
    shares: BTreeMap<SkuNumber, OwnShare>,
    /// Active nodes.
    nodes: u32,
    /// The counters of the whole sale, as they were read last, and their version.
    sale: (Option<i64>, Vec<Sale>),
    wants: Timer,
    sales: Timer,
    uses: Timer,
    sweeps: Timer,
}

/// Holds units for a task of this process, as an order does: at a node whose share is dry, others are asked for up to two
/// seconds.
///
/// # Errors
/// [`Refusal::SoldOut`], or [`Refusal::StockElsewhere`] if nothing is known after that time.
pub async fn hold(sku: &Arc<Sku>, quantity: Quantity) -> Result<Hold, Refusal> {
    let deadline = tokio::time::Instant::now() + HOLD;
    loop {
        let refusal = match sku.hold(quantity) {
            Err(refusal @ Refusal::StockElsewhere) => refusal,
            held => return held,
        };
        let Ok(Some(ask)) = Ask::new(sku, quantity.get(), false) else {
            return Err(refusal);
        };
        if tokio::time::timeout_at(deadline, ask).await.is_err() {
            return Err(refusal);
        }
    }
}

/// Units of the database, which are in range by its CHECKs.
pub(super) fn units(units: i64) -> u32 {
    u32::try_from(units).unwrap_or_else(|_| panic!("{units} units are out of range"))
}

pub(super) fn forget_sold_out(sku: &Sku) {
    if let Some(shared) = sku.shared() {
        shared.forget_sold_out();
    }
}

impl Lending {
    /// The task, not yet running.
    pub fn new(parts: LendingParts) -> Self {
        Lending {
            parts,
            shares: BTreeMap::new(),
            nodes: 1,
            sale: (None, Vec::new()),
            wants: Timer::new(WANTS),
            sales: Timer::new(SALES),
            uses: Timer::new(USE),
            sweeps: Timer::new(SWEEP),
        }
    }

    /// Runs until the future is dropped or another process takes over.
    pub async fn run(mut self) {
        loop {
            let pause = match self.step().await {
                Ok(()) => TICK,
                Err(error @ StoreError::Fenced { .. }) => {
                    self.parts.state.poison.set(error.to_string());
                    return;
                }
                Err(error) => {
                    tracing::warn!(reason = %error, "units are neither lent nor given back for now; retrying");
                    PAUSE
                }
            };
            if self.parts.state.poison.is_set() {
                return;
            }
            tokio::time::sleep(pause).await;
        }
    }

    async fn step(&mut self) -> Result<(), StoreError> {
        self.learn_of_new().await?;
        self.settle_doubts().await?;
        if self.parts.hints.take_want() || self.wants.is_due() {
            self.answer_wants().await?;
        }
        if self.sales.is_due() {
            self.read_sales().await?;
        }
        for sku in self.parts.state.catalogue.wanted() {
            self.look(&sku).await?;
        }
        // What comes free here while orders wait, here or elsewhere: the pool's units are for them.
        for sku in self.parts.state.catalogue.waiting() {
            let share = self.shares.get(&sku.number);
            if sku.counter().kept() > 0 && share.is_some_and(|share| !share.is_in_doubt) {
                self.give_back(&sku, None).await?;
            }
        }
        self.end_wants().await?;
        if self.uses.is_due() {
            self.refill().await?;
        }
        if self.sweeps.is_due() {
            self.sweep().await?;
        }
        Ok(())
    }

    /// Reads the books of SKUs that are new in the catalogue.
    async fn learn_of_new(&mut self) -> Result<(), StoreError> {
        let catalogue = &self.parts.state.catalogue;
        if catalogue.count() == self.shares.len() {
            return Ok(());
        }
        let all = catalogue.all();
        let new = all.iter().map(|sku| sku.number);
        let mut new: Vec<SkuNumber> = new.filter(|sku| !self.shares.contains_key(sku)).collect();
        new.sort_unstable();
        let books = stock::books(&self.parts.database, self.parts.lease.node, &new).await?;
        for sku in new {
            let books = books.get(&sku).copied().unwrap_or_default();
            self.shares.insert(sku, OwnShare::of(books));
        }
        Ok(())
    }

    /// Learns what became of transactions whose answers were lost, and puts it into memory.
    async fn settle_doubts(&mut self) -> Result<(), StoreError> {
        let doubts = self.shares.iter().filter(|(_, share)| share.is_in_doubt);
        let doubts: Vec<SkuNumber> = doubts.map(|(sku, _)| *sku).collect();
        if doubts.is_empty() {
            return Ok(());
        }
        let found = stock::books(&self.parts.database, self.parts.lease.node, &doubts).await?;
        for number in doubts {
            // It may have left a want that nobody here knows of.
            shares::withdraw(&self.parts.database, self.parts.lease, number).await?;
            let found = found.get(&number).copied().unwrap_or_default();
            let (Some(sku), Some(share)) = (
                self.parts.state.catalogue.by_number(number),
                self.shares.get_mut(&number),
            ) else {
                continue;
            };
            share.is_in_doubt = false;
            share.want = None;
            share.opened_at = None;
            sku.waitlist().close(true);
            let returning = std::mem::take(&mut share.returning);
            let borrowed = found.borrowed - share.books.borrowed + i64::from(returning);
            let swept = found.swept - share.books.swept;
            share.books = found;
            self.put(&sku, borrowed, swept).await;
        }
        Ok(())
    }

    /// Puts a committed change of a share into memory.
    async fn put(&self, sku: &Sku, lent: i64, swept: i64) {
        if swept > 0 {
            // The settler that has sold them may not have told memory yet.
            wait_until_sold(&self.parts.state, sku.number, units(swept)).await;
            sku.counter().withdraw(units(swept));
        }
        if lent > 0 {
            forget_sold_out(sku);
            // The pool has lent, so nobody waits.
            sku.waitlist().resume(sku.counter(), clock::now());
            sku.counter().lend(units(lent));
        }
    }

    /// Notes whether the outcome of a transaction on a share is known.
    fn known<T>(&mut self, sku: SkuNumber, result: Result<T, StoreError>) -> Result<T, StoreError> {
        if result.is_err()
            && let Some(share) = self.shares.get_mut(&sku)
        {
            share.is_in_doubt = true;
        }
        result
    }

    /// Takes units from the pool. With `least`, leaves a want if it has fewer.
    async fn lend(
        &mut self,
        sku: &Arc<Sku>,
        wanted: u32,
        least: Option<u32>,
    ) -> Result<Lent, StoreError> {
        let LendingParts {
            database, lease, ..
        } = &self.parts;
        let wanted = i64::from(wanted);
        let lent = match least {
            Some(least) => shares::lend(database, *lease, sku.number, wanted, least.into()).await,
            None => shares::refill(database, *lease, sku.number, wanted).await,
        };
        let lent = self.known(sku.number, lent)?;
        if let Some(share) = self.shares.get_mut(&sku.number) {
            share.books.borrowed += lent.units;
            share.books.swept += lent.swept;
            share.pool = share.pool.saturating_sub(units(lent.units));
        }
        self.put(sku, lent.units, lent.swept).await;
        if lent.is_waited {
            forget_sold_out(sku);
            sku.waitlist().note_somebody(sku.counter());
        }
        Ok(lent)
    }

    /// Gives back what is free, as the answer to a want of another node, or because a total is lowered.
    async fn give_back(&mut self, sku: &Sku, want: Option<&Want>) -> Result<(), StoreError> {
        forget_sold_out(sku);
        let (free, lent) = sku.counter().take_free();
        if let Some(share) = self.shares.get_mut(&sku.number) {
            share.returning = free;
        }
        let LendingParts {
            database, lease, ..
        } = &self.parts;
        let given = match want {
            Some(want) => shares::answer(database, *lease, want, free.into(), lent.into()).await,
            None => shares::give_back(database, *lease, sku.number, free.into()).await,
        };
        self.known(sku.number, given)?;
        if let Some(share) = self.shares.get_mut(&sku.number) {
            share.returning = 0;
            share.books.borrowed -= i64::from(free);
        }
        Ok(())
    }

    /// Gives other nodes what they want.
    async fn answer_wants(&mut self) -> Result<(), StoreError> {
        let wants = shares::wants(&self.parts.database).await?;
        let pause = if wants.is_empty() { WANTS } else { WANTED };
        self.wants.due = Instant::now() + pause;
        for want in wants {
            let Some(sku) = self.parts.state.catalogue.by_number(want.sku) else {
                continue;
            };
            let Some(share) = self.shares.get_mut(&want.sku) else {
                continue;
            };
            let is_first = |own: &Want| own.number < want.number;
            if want.node == self.parts.lease.node
                || share.is_in_doubt
                || share.want.as_ref().is_some_and(is_first)
            {
                continue;
            }
            if sku.counter().free() > 0 || share.is_due(&want) {
                let newest = share.answered.map_or(0, |(newest, _)| newest);
                share.answered = Some((newest.max(want.number), Instant::now()));
                if sku.terms().waitlist.max > 0 {
                    sku.waitlist().suspend(sku.counter());
                }
                self.give_back(&sku, Some(&want)).await?;
            }
        }
        Ok(())
    }

    /// Reads the counters of the whole sale.
    async fn read_sales(&mut self) -> Result<(), StoreError> {
        let (known, database) = (self.sale.0, &self.parts.database);
        let Some(read) = stock::sales(database, known, SALES_AGE).await? else {
            // Another node adds them up, and has done so at the next look.
            self.sales.due = Instant::now();
            return Ok(());
        };
        self.nodes = u32::try_from(read.nodes).unwrap_or(1).max(1);
        let before = std::mem::take(&mut self.sale.1);
        self.sale = (Some(read.version), read.sales.unwrap_or(before));
        let read_at = read.read_at;
        for sale in self.sale.1.clone() {
            let (Some(sku), Some(share)) = (
                self.parts.state.catalogue.by_number(sale.sku),
                self.shares.get_mut(&sale.sku),
            ) else {
                continue;
            };
            let stock = StockSnapshot {
                total: units(sale.total),
                free: units(sale.total - sale.held - sale.sold),
                held: units(sale.held),
                sold: units(sale.sold),
            };
            share.pool = units(sale.pool);
            let since = share.recalled_since.unwrap_or(read_at);
            share.recalled_since = sale.is_recalled.then_some(since);
            if sale.is_recalled && since.elapsed() >= RECALL {
                share.recalled_since = None;
                tracing::warn!(sku_id = %sku.id, "nobody has ended the lowering of a total that was begun; it is given up");
                recall::end_recall(&self.parts.database, self.parts.lease, sale.sku).await?;
                continue;
            }
            let is_returned = sale.is_recalled && !share.is_in_doubt && sku.counter().free() > 0;
            if let Some(shared) = sku.shared() {
                let pool = share.pool;
                shared.set_sale(SaleStock {
                    stock,
                    pool,
                    read_at,
                });
            }
            if is_returned {
                self.give_back(&sku, None).await?;
            }
        }
        Ok(())
    }

    /// Looks for units of a SKU that requests wait for.
    async fn look(&mut self, sku: &Arc<Sku>) -> Result<(), StoreError> {
        let (Some(shared), Some(share)) = (sku.shared(), self.shares.get(&sku.number)) else {
            return Ok(());
        };
        let Some(wanted) = shared.wanted().filter(|_| !share.is_in_doubt) else {
            return Ok(());
        };
        if share.opened_at.is_some() {
            // They may join, and what comes free meanwhile is for those who have joined.
            shared.answer_all();
            return Ok(());
        }
        let missing = wanted.least.saturating_sub(sku.counter().free());
        if missing == 0 {
            shared.forget_sold_out();
            shared.answer_all();
            return Ok(());
        }
        let Some(want) = share.want else {
            return self.lend_wanted(sku, shared, wanted).await;
        };
        let looked_at = Instant::now();
        let database = &self.parts.database;
        let Some(supply) = shares::supply(database, &want, wanted.may_join).await? else {
            // The answer to its withdrawal was lost. The next look leaves another one.
            if let Some(share) = self.shares.get_mut(&sku.number) {
                share.want = None;
            }
            return Ok(());
        };
        match supply {
            Supply::Unanswered if want.units <= i64::from(missing) => Ok(()),
            Supply::Unanswered | Supply::Pool => self.lend_wanted(sku, shared, wanted).await,
            Supply::None => {
                let LendingParts {
                    database, lease, ..
                } = &self.parts;
                // A takeover may have brought units since the want was left.
                let row = shares::share_of(database, lease.node, sku.number).await?;
                let stock = sku.counter().snapshot();
                if row.lent != i64::from(stock.total) {
                    return Ok(());
                }
                // Nobody else has what is missing, so nobody can have an order of this many units.
                let sold_out_from = stock.free.saturating_add(units(want.units));
                if sold_out_from > wanted.least {
                    return self.lend_wanted(sku, shared, wanted).await;
                }
                if wanted.may_join {
                    sku.waitlist().open();
                } else {
                    shares::withdraw(database, *lease, sku.number).await?;
                }
                shared.set_sold_out(sold_out_from, looked_at);
                shared.answer_all();
                if let Some(share) = self.shares.get_mut(&sku.number) {
                    share.want = share.want.filter(|_| wanted.may_join);
                    share.opened_at = share.want.map(|_| Instant::now());
                }
                Ok(())
            }
        }
    }

    async fn lend_wanted(
        &mut self,
        sku: &Arc<Sku>,
        shared: &Shared,
        wanted: Wanted,
    ) -> Result<(), StoreError> {
        let share = self.shares.get(&sku.number);
        let used = share.map_or(0, OwnShare::used);
        let missing = wanted.least.saturating_sub(sku.counter().free()).max(1);
        // A want that stands may be for fewer: orders have taken what was here. Then these come first, because the pool
        // keeps them for it.
        let standing = share.and_then(|share| share.want);
        let least = missing.min(standing.map_or(u32::MAX, |want| units(want.units)));
        let lent = self.lend(sku, used.max(wanted.units), Some(least)).await?;
        if lent.units > 0 || lent.is_waited {
            shared.answer_all();
        } else if standing.is_none() {
            self.parts.hints.tell_want(&sku.id);
        }
        if let Some(share) = self.shares.get_mut(&sku.number) {
            share.want = lent.want.map(|number| Want {
                number,
                sku: sku.number,
                node: self.parts.lease.node,
                units: least.into(),
            });
        }
        Ok(())
    }

    /// Withdraws wants for which no request waits any more, and those for whom somebody has joined the list.
    async fn end_wants(&mut self) -> Result<(), StoreError> {
        for (number, share) in &mut self.shares {
            if share.want.is_none() {
                continue;
            }
            let Some(sku) = self.parts.state.catalogue.by_number(*number) else {
                continue;
            };
            let is_over = match share.opened_at.map(|at| at.elapsed()) {
                Some(open) => open >= JOINING.0 && sku.waitlist().close(open >= JOINING.1),
                None => sku.shared().and_then(Shared::wanted).is_none(),
            };
            if is_over {
                share.opened_at = None;
                shares::withdraw(&self.parts.database, self.parts.lease, *number).await?;
                share.want = None;
            }
        }
        Ok(())
    }

    /// Fills shares: before their sale opens, and as they are used.
    async fn refill(&mut self) -> Result<(), StoreError> {
        let now = UnixMillis::now().plus_ms(AHEAD_MS);
        for sku in self.parts.state.catalogue.all() {
            let Some(share) = self.shares.get_mut(&sku.number) else {
                continue;
            };
            let stock = sku.counter().snapshot();
            let taken = i64::from(stock.total - stock.free) + share.books.swept;
            share.note_taken(taken);
            let used = share.used();
            let opens_at = sku.terms().opens_at;
            let is_ahead = !share.is_lent_ahead && opens_at.is_none_or(|at| at <= now);
            let wanted = if is_ahead {
                // Half of the pool stays there, for those who sell more than others.
                (share.pool / (2 * self.nodes)).max(1)
            } else if used > 0 && stock.free < used.div_ceil(2) {
                used
            } else {
                continue;
            };
            let is_kept = share.want.is_some() || sku.counter().is_waiting();
            if share.pool == 0 || share.recalled_since.is_some() || share.is_in_doubt || is_kept {
                continue;
            }
            share.is_lent_ahead = true;
            self.lend(&sku, wanted, None).await?;
        }
        Ok(())
    }

    /// Moves sold units to `sku`, where a refund finds them whichever node has the lane by then.
    async fn sweep(&mut self) -> Result<(), StoreError> {
        let all = self.parts.state.catalogue.all();
        let is_sold = |sku: &&Arc<Sku>| sku.counter().snapshot().sold > 0;
        let sold = all.iter().filter(is_sold).map(|sku| sku.number);
        let mut sold: Vec<SkuNumber> = sold
            .filter(|sku| self.shares.get(sku).is_some_and(|share| !share.is_in_doubt))
            .collect();
        if sold.is_empty() {
            return Ok(());
        }
        sold.sort_unstable();
        let LendingParts {
            database, lease, ..
        } = &self.parts;
        let swept = match shares::sweep(database, *lease, &sold).await {
            Ok(swept) => swept,
            Err(error) => {
                for sku in &sold {
                    if let Some(share) = self.shares.get_mut(sku) {
                        share.is_in_doubt = true;
                    }
                }
                return Err(error);
            }
        };
        for (number, units) in swept {
            let (Some(sku), Some(share)) = (
                self.parts.state.catalogue.by_number(number),
                self.shares.get_mut(&number),
            ) else {
                continue;
            };
            share.books.swept += units;
            self.put(&sku, 0, units).await;
        }
        Ok(())
    }
}
