//! A SKU that several nodes sell, as one of them sees it: the counters of the whole sale, for people, and the requests
//! that found this node's share dry.
//!
//! ```text
//!   hold fails ──► sold out within the last second? ──► yes: refused
//!                     │ no
//!                     ▼
//!                   Ask ──► lending looks: pool, then the other nodes ──► units came, or it is sold out: woken
//! ```

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use arc_swap::ArcSwapOption;

use super::{Sku, StockSnapshot};
use crate::sync::Guarded;

/// Time for which a SKU that was found sold out may be said to be.
const SOLD_OUT_FOR: Duration = Duration::from_secs(1);
/// Age up to which the counters of the whole sale may be said.
const SALE_AGE: Duration = Duration::from_millis(250);
/// Requests that may wait for units of one SKU.
const ASKS_MAX: usize = 2_048;

/// The counters of the whole sale, read at one moment.
#[derive(Clone, Copy, Debug)]
pub struct SaleStock {
    /// For people.
    pub stock: StockSnapshot,
    /// Units that are lent to no node.
    pub pool: u32,
    /// A moment before they were read.
    pub read_at: Instant,
}

/// What a node knows of a SKU beside its own share.
#[derive(Debug)]
pub struct Shared {
    /// The node.
    pub node: i16,
    sale: ArcSwapOption<SaleStock>,
    base: Instant,
    /// The SKU is sold out until this many milliseconds after `base`, for orders of `sold_out_from` units or more.
    sold_out_until: AtomicU64,
    sold_out_from: AtomicU32,
    /// Whether a request was refused since it was found sold out.
    was_said: AtomicBool,
    asking: AtomicUsize,
    asks: Guarded<Asks>,
}

#[derive(Debug, Default)]
struct Asks {
    next: u64,
    waiting: BTreeMap<u64, Waiting>,
}

#[derive(Debug)]
struct Waiting {
    units: u32,
    may_join: bool,
    waker: Option<Waker>,
    is_answered: bool,
}

/// What requests wait for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// Units of the smallest order.
    pub least: u32,
    /// Units of all of them.
    pub units: u32,
    /// Whether one of them would rather join the waiting list than be refused.
    pub may_join: bool,
}

impl Shared {
    /// Of a node that knows nothing yet.
    pub fn new(node: i16) -> Self {
        Shared {
            node,
            sale: ArcSwapOption::empty(),
            base: Instant::now(),
            sold_out_until: AtomicU64::new(0),
            sold_out_from: AtomicU32::new(0),
            was_said: AtomicBool::new(false),
            asking: AtomicUsize::new(0),
            asks: Guarded::default(),
        }
    }

    /// The counters of the whole sale, as they were read last.
    pub fn sale(&self) -> Option<SaleStock> {
        self.sale.load().as_deref().copied()
    }

    /// Whether they are young enough to be said.
    pub fn is_fresh(&self) -> bool {
        let sale = self.sale();
        sale.is_some_and(|sale| sale.read_at.elapsed() <= SALE_AGE)
    }

    /// Notes the counters of the whole sale.
    pub fn set_sale(&self, sale: SaleStock) {
        self.sale.store(Some(Arc::new(sale)));
    }

    /// Whether the pool and every share had too few units for an order of `units` within the last second.
    pub fn is_sold_out(&self, units: u32) -> bool {
        let until = self.sold_out_until.load(Ordering::Acquire);
        let is_sold_out = self.base.elapsed().as_millis() < u128::from(until)
            && units >= self.sold_out_from.load(Ordering::Acquire);
        if is_sold_out && !self.was_said.load(Ordering::Relaxed) {
            self.was_said.store(true, Ordering::Relaxed);
        }
        is_sold_out
    }

    /// Notes that at `looked_at` nobody had `least` units.
    pub fn set_sold_out(&self, least: u32, looked_at: Instant) {
        let until = looked_at.saturating_duration_since(self.base) + SOLD_OUT_FOR;
        self.sold_out_until.store(0, Ordering::Release);
        self.sold_out_from.store(least, Ordering::Release);
        self.was_said.store(false, Ordering::Relaxed);
        let until = u64::try_from(until.as_millis()).unwrap_or(u64::MAX);
        self.sold_out_until.store(until, Ordering::Release);
    }

    /// Units move: nothing is said about them until somebody has looked again.
    pub fn forget_sold_out(&self) {
        self.sold_out_until.store(0, Ordering::Release);
    }

    /// What requests wait for; without any, what has been refused for a while and has to be looked for again.
    pub fn wanted(&self) -> Option<Wanted> {
        if self.asking.load(Ordering::Acquire) > 0 {
            let wanted = self.asks.with(|asks| {
                let waiting = asks.waiting.values().filter(|one| !one.is_answered);
                waiting.fold(None, |wanted: Option<Wanted>, one| {
                    let before = wanted.unwrap_or(Wanted {
                        least: one.units,
                        units: 0,
                        may_join: false,
                    });
                    Some(Wanted {
                        least: before.least.min(one.units),
                        units: before.units.saturating_add(one.units),
                        may_join: before.may_join || one.may_join,
                    })
                })
            });
            if wanted.is_some() {
                return wanted;
            }
        }
        let until = self.sold_out_until.load(Ordering::Acquire);
        let half = self.base.elapsed() + SOLD_OUT_FOR / 2;
        let is_due = until > 0 && half.as_millis() >= u128::from(until);
        let least = self.sold_out_from.load(Ordering::Acquire);
        (is_due && self.was_said.load(Ordering::Relaxed)).then_some(Wanted {
            least,
            units: least,
            may_join: false,
        })
    }

    /// Wakes every request that waits: units came, or it is known that none will.
    pub fn answer_all(&self) {
        let woken: Vec<Waker> = self.asks.with(|asks| {
            let waiting = asks.waiting.values_mut();
            waiting
                .filter_map(|one| {
                    one.is_answered = true;
                    one.waker.take()
                })
                .collect()
        });
        woken.into_iter().for_each(Waker::wake);
    }
}

/// Too many requests wait for units of this SKU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TooManyAsk;

/// A request that waits for units of a SKU. Completes once it is worth trying again; dropping it ends the wait.
#[derive(Debug)]
#[must_use = "futures do nothing unless polled"]
pub struct Ask {
    sku: Arc<Sku>,
    number: u64,
}

impl Ask {
    /// Asks for `units`, or, with `may_join`, whether it may be the first to wait. `None`: the SKU is not shared.
    ///
    /// # Errors
    /// [`TooManyAsk`].
    pub fn new(sku: &Arc<Sku>, units: u32, may_join: bool) -> Result<Option<Self>, TooManyAsk> {
        let Some(shared) = sku.shared() else {
            return Ok(None);
        };
        let number = shared.asks.with(|asks| {
            if asks.waiting.len() >= ASKS_MAX {
                return Err(TooManyAsk);
            }
            asks.next += 1;
            let waiting = Waiting {
                units,
                may_join,
                waker: None,
                is_answered: false,
            };
            asks.waiting.insert(asks.next, waiting);
            shared.asking.store(asks.waiting.len(), Ordering::Release);
            Ok(asks.next)
        })?;
        Ok(Some(Ask {
            sku: Arc::clone(sku),
            number,
        }))
    }
}

impl Future for Ask {
    type Output = ();

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        let Some(shared) = self.sku.shared() else {
            return Poll::Ready(());
        };
        shared
            .asks
            .with(|asks| match asks.waiting.get_mut(&self.number) {
                Some(one) if !one.is_answered => {
                    one.waker = Some(context.waker().clone());
                    Poll::Pending
                }
                Some(_) | None => Poll::Ready(()),
            })
    }
}

impl Drop for Ask {
    fn drop(&mut self) {
        if let Some(shared) = self.sku.shared() {
            shared.asks.with(|asks| {
                asks.waiting.remove(&self.number);
                shared.asking.store(asks.waiting.len(), Ordering::Release);
            });
        }
    }
}
