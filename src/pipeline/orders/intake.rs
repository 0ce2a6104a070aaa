//! From a request to an order in the queue.
//!
//! ```text
//!   quote ───────────────┬─ there is stock and room ─► place: claim the key ─► hold stock ─► register ─► enqueue
//!   price, sale window,  │                             (key, sale window and    (or join the
//!   id, stock, room      │                              purchase limit decide)   waiting list)
//!                        └─ there is none ───────────► screen: the order under the key, or the refusal
//! ```
//!
//! An order that accepts to wait for units joins the waiting list if none are free, and takes the same way without
//! holding any.
//!
//! Most requests of a sale end in `screen`, which writes nothing and holds nothing. In `place` each step
//! leaves a guard; if a later step refuses, dropping the guards undoes the earlier ones. No lock is held
//! from one step to the next, nothing here blocks, and nothing is allocated but the order itself.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::task::Waker;
use std::time::{Duration, Instant};

use super::rate_limit::RateLimits;
use crate::clock;
use crate::config::RateLimit;
use crate::faults::bug;
use crate::order::{
    Currency, KeyHash, Lane, Order, OrderId, PayloadHash, Quantity, Refusal, SkuId, UnixMillis,
    UserId,
};
use crate::queue::{DurableQueue, NotDurable, OrderQueue, Permit};
use crate::spans::Trace;
use crate::state::State;
use crate::state::buyers::{BuyerClaim, BuyerOrder, Claimed, Sticky};
use crate::state::pending::PendingOrder;
use crate::state::sticky_refusals::StickyRefusals;
use crate::state::stock::{Draw, DrawPhase, Hold, Joiner, Placed, SaleTerms, Sku, WaitPlace};

/// A client's request for an order, each member validated on its own.
#[derive(Clone, Debug)]
pub struct OrderRequest<'a> {
    /// The buyer.
    pub user_id: UserId,
    /// The SKU.
    pub sku_id: SkuId,
    /// Units, at least 1.
    pub quantity: Quantity,
    /// The shop's surcharge or discount, in minor units of the currency.
    pub adjustment: i64,
    /// The shop's own JSON object.
    pub attributes: Option<&'a str>,
    /// The hash of the idempotency key.
    pub key: Option<KeyHash>,
    /// Time that the client waits for the row, or for the acknowledgement.
    pub wait: Duration,
    /// Acknowledge the order as soon as it is durable in the queue; requires a durable queue.
    pub respond_async: bool,
    /// Join the waiting list if no units are free.
    pub waitlist: bool,
    /// Of a sampled request.
    pub trace: Option<&'a Trace>,
}

/// An admitted order, new or earlier.
#[derive(Debug)]
pub enum Admission {
    /// A new order, in the queue.
    Placed(Arc<PendingOrder>),
    /// An earlier request had the same key and the same body.
    Duplicate {
        /// Its order.
        id: OrderId,
        /// The order, if it is still in flight.
        pending: Option<Arc<PendingOrder>>,
    },
}

/// Orders that are admitted whatever the estimated wait, so that the estimate is corrected.
const PROBE_ORDERS: usize = 64;

/// The id in the quote of an order that cannot be placed. `screen` compares the quote with earlier orders and keeps
/// nothing of it.
const NO_ORDER: OrderId = OrderId::MAX;

const NOT_READY: u8 = 0;
const OPEN: u8 = 1;
const DRAINING: u8 = 2;

/// Admission of orders.
#[derive(Debug)]
pub struct Intake {
    state: Arc<State>,
    queue: Arc<dyn OrderQueue>,
    rate_limits: RateLimits,
    payment_ttl_ms: u64,
    gate: AtomicU8,
}

impl Intake {
    /// An intake that refuses with `not_ready` until it is opened.
    pub fn new(state: Arc<State>, queue: Arc<dyn OrderQueue>, payment_ttl_ms: u64) -> Self {
        Intake {
            state,
            queue,
            rate_limits: RateLimits::new(&RateLimit::default()),
            payment_ttl_ms,
            gate: AtomicU8::new(NOT_READY),
        }
    }

    /// The same with rate limits.
    pub fn with_rate_limits(mut self, config: &RateLimit) -> Self {
        self.rate_limits = RateLimits::new(config);
        self
    }

    /// Drops rate limiters that are full again.
    pub fn forget_idle(&self) {
        self.rate_limits.forget_idle();
    }

    /// Admits orders from now on.
    pub fn open(&self) {
        self.gate.store(OPEN, Ordering::Release);
    }

    /// Refuses every further order with `draining`.
    pub fn drain(&self) {
        self.gate.store(DRAINING, Ordering::Release);
    }

    /// Whether orders are admitted.
    ///
    /// # Errors
    /// The refusal that a client gets if they are not.
    pub fn check_open(&self) -> Result<(), Refusal> {
        if self.state.poison.is_set() {
            return Err(Refusal::NotReady);
        }
        match self.gate.load(Ordering::Acquire) {
            OPEN => Ok(()),
            DRAINING => Err(Refusal::Draining),
            _ => Err(Refusal::NotReady),
        }
    }

    /// Counts a request against the rate limits. Call it once a request, however often the request is admitted.
    ///
    /// # Errors
    /// [`Refusal::RateLimited`].
    pub fn check_rate(&self, user_id: &UserId) -> Result<(), Refusal> {
        let lanes = self.state.lanes.as_ref();
        let lanes = lanes.map(|of_node| &*of_node.lanes);
        self.rate_limits.check(user_id, lanes)
    }

    /// Refuses a waiting order that, by estimate, could not be written in time: it would hold units and time
    /// out. Half of its wait may be spent in the queue, because the estimate may be wrong by half. A few orders
    /// are admitted whatever the estimate, so that it is corrected once the database recovers.
    fn check_wait(&self, wait: Duration) -> Result<(), Refusal> {
        let ahead = self.queue.ahead();
        if ahead < PROBE_ORDERS {
            return Ok(());
        }
        let expected_ms = self.state.throughput.wait_ms(ahead);
        let bearable_ms = u64::try_from(wait.as_millis() / 2).unwrap_or(u64::MAX);
        match expected_ms.saturating_sub(bearable_ms) {
            0 => Ok(()),
            too_long => Err(Refusal::Backlogged {
                retry_after_ms: u32::try_from(too_long).unwrap_or(u32::MAX),
            }),
        }
    }

    /// Admits an order: holds its units and queues it. `waker` wakes the waiting client and is shared with the
    /// order.
    ///
    /// # Errors
    /// A [`Refusal`]; nothing is held.
    pub fn admit(
        &self,
        request: &OrderRequest<'_>,
        waker: Option<&Arc<Waker>>,
    ) -> Result<Admission, Refusal> {
        self.check_open()?;
        let (quote, room) = self.quote(request)?;
        match room {
            Ok(room) => self.place(request, waker, quote, room),
            Err(refusal) => self.screen(request, &quote, refusal),
        }
    }

    /// The order as it would be placed, and room for it in the queue, or the refusal if stock or room is
    /// lacking.
    fn quote(
        &self,
        request: &OrderRequest<'_>,
    ) -> Result<(Quote, Result<Room<'_>, Refusal>), Refusal> {
        // Read once: a clock costs as much as a look at the stock.
        let now = clock::now();
        let state = &self.state;
        let sku = state.catalogue.get(&request.sku_id);
        let sku = sku.ok_or(Refusal::UnknownSku)?;
        let terms = sku.terms();
        let window = if state.catalogue.is_paused() {
            Err(Refusal::SalePaused)
        } else {
            sku.window_now()
        };
        // Until the draw, every order of the SKU is an entry, whether units are free or not.
        let draw = terms.draw.as_ref().and_then(|draw| {
            let entered = sku.draw().filter(|draw| !draw.is_drawn())?;
            Some((entered, draw.at))
        });
        let window = window.and_then(|()| match &draw {
            Some((draw, at)) => self.takes_entries(draw, *at, now),
            None => Ok(()),
        });
        let amount = amount(&terms, request).and_then(|amount| window.map(|()| amount));
        let available = sku.counter().free();
        let is_short = available < request.quantity.get() && !bug("hold_without_checking");
        let may_wait =
            || (request.waitlist || draw.is_some()) && request.quantity.get() <= sku.stock().total;
        let (order_id, room) = if is_short && !may_wait() {
            (NO_ORDER, Err(sku.refuse(request.quantity, available)))
        } else if is_short && draw.is_none() && !sku.knows_for_waiting(request.quantity) {
            (NO_ORDER, Err(Refusal::StockElsewhere))
        } else if (is_short || draw.is_some())
            && sku.waitlist().waiting() >= terms.waitlist.max as usize
        {
            (NO_ORDER, Err(Refusal::WaitlistFull))
        } else {
            // A request under a known key is answered even without a new id.
            match state.ids.next_at(now, Lane::of(&request.user_id)) {
                Ok(id) => (id, self.room(request)),
                Err(_) => (NO_ORDER, Err(Refusal::NotReady)),
            }
        };
        let (sku_id, quantity) = (&request.sku_id, request.quantity);
        let entry = BuyerOrder {
            order_id,
            key: request.key,
            payload: PayloadHash::of(
                sku_id,
                quantity,
                request.adjustment,
                request.attributes,
                request.waitlist,
            ),
            sku: sku.number,
            quantity,
            ended: None,
        };
        let quote = Quote {
            now,
            entry,
            amount,
            // One entry of a user: none beside an earlier one, however few units it is for.
            limit: match draw {
                Some(_) if !bug("two_entries_of_a_user") => {
                    let limit = terms.per_user_limit.unwrap_or(u32::MAX);
                    Some(limit.min(request.quantity.get()))
                }
                _ => terms.per_user_limit,
            },
            waitlist_max: terms.waitlist.max,
            draw,
            currency: terms.currency,
            sku,
        };
        Ok((quote, room))
    }

    /// Whether a draw takes entries at `now`, by the clock that also says when an order was created.
    fn takes_entries(&self, draw: &Draw, until: UnixMillis, now: Instant) -> Result<(), Refusal> {
        if draw.is_changing() {
            Err(Refusal::SalePaused)
        } else if draw.phase() == DrawPhase::Open && self.state.ids.real_at(now) < until {
            Ok(())
        } else {
            Err(Refusal::DrawUnderWay)
        }
    }

    /// Reserves room for one order in the queue, before its stock is held.
    fn room(&self, request: &OrderRequest<'_>) -> Result<Room<'_>, Refusal> {
        match self.queue.durable().filter(|_| request.respond_async) {
            Some(queue) => match queue.reserve(request.attributes) {
                Ok(permit) => Ok(Room::Durable(queue, permit)),
                Err(NotDurable::NoLease) => Err(Refusal::NotReady),
                Err(NotDurable::Busy) => Err(Refusal::Overloaded),
                Err(NotDurable::Full) => Err(Refusal::JournalFull),
                Err(NotDurable::Failed) => Err(Refusal::JournalFailed),
                Err(NotDurable::Away) => Err(Refusal::QueueUnavailable),
            },
            None if self.queue.is_full() => Err(Refusal::Overloaded),
            None => self.check_wait(request.wait).map(|()| Room::InMemory),
        }
    }

    /// Answers an order that cannot be placed now: with the earlier order under its key, or the refusal of
    /// highest precedence. Costs one look at the buyer's record and holds nothing, not even for a moment.
    fn screen(
        &self,
        request: &OrderRequest<'_>,
        quote: &Quote,
        refusal: Refusal,
    ) -> Result<Admission, Refusal> {
        let (user_id, entry) = (&request.user_id, &quote.entry);
        let sticky = self.under_key(request, quote);
        let gate = quote.amount.map(drop);
        let earlier =
            self.state
                .buyers
                .peek(user_id, entry, quote.limit, gate, refusal, &sticky)?;
        Ok(self.duplicate(earlier))
    }

    /// Claims the key, holds the units or joins the waiting list, and queues the order.
    fn place(
        &self,
        request: &OrderRequest<'_>,
        waker: Option<&Arc<Waker>>,
        mut quote: Quote,
        room: Room<'_>,
    ) -> Result<Admission, Refusal> {
        let state = &self.state;
        let sticky = self.under_key(request, &quote);
        let (claim, share) = if request.waitlist || quote.draw.is_some() {
            match self.claim_share_or_place(request, &mut quote, &sticky)? {
                Ok(claimed) => claimed,
                Err(duplicate) => return Ok(self.duplicate(duplicate)),
            }
        } else {
            let claim = match self.claim(request, &quote, &sticky)? {
                Claimed::Fresh(claim) => claim,
                Claimed::Duplicate(id) => return Ok(self.duplicate(id)),
            };
            match quote.sku.hold(request.quantity) {
                Ok(hold) => (claim, Share::Units(hold)),
                Err(refusal) => return Err(claim.refuse(refusal, &sticky)),
            }
        };
        let began = quote.now;
        let deadline = began + request.wait;
        let order = self.order(request, quote, &share)?;
        let pending = Arc::new(match room {
            Room::InMemory => PendingOrder::new(order, deadline, waker.cloned()),
            Room::Durable(..) => PendingOrder::appending(order, deadline, waker.cloned()),
        });
        // Registered before a worker can see it, so that it is found in the map when it is settled.
        state.pending.insert(&pending);
        // From here on the code that settles the order accounts for both: once registered, the order may
        // already be past its deadline and abandoned.
        share.commit();
        claim.commit();
        if let Some(trace) = request.trace {
            trace.admitted(pending.order.id, began);
        }
        let enqueued = match room {
            Room::InMemory => self.queue.push(Arc::clone(&pending)),
            Room::Durable(queue, permit) => queue.append(Arc::clone(&pending), permit),
        };
        if let Err(rejected) = enqueued {
            // The slot decides which side undoes the order, so that its units return once; a duplicate waiting
            // for it is woken.
            let _ = state.abandon(&pending);
            pending.slot.take_wakers(Waker::wake);
            if let Some(trace) = request.trace {
                trace.given_up(pending.order.id);
            }
            return Err(if rejected.closed {
                Refusal::Draining
            } else {
                Refusal::Overloaded
            });
        }
        Ok(Admission::Placed(pending))
    }

    /// Claims the key of a fresh order.
    fn claim<'a>(
        &'a self,
        request: &'a OrderRequest<'_>,
        quote: &Quote,
        sticky: &UnderKey<'_>,
    ) -> Result<Claimed<'a>, Refusal> {
        let gate = quote.amount.map(drop);
        let buyers = &self.state.buyers;
        buyers.claim(&request.user_id, quote.entry, quote.limit, gate, sticky)
    }

    /// Claims the key of an order that accepts to wait, and holds its units or joins the list, in one step under
    /// the list's lock, with a fresh id: on a list the order of ids is the order of joining. An entry of a draw joins in
    /// any case; under the lock the draw takes it or is closed. The inner error is the earlier order under the key.
    fn claim_share_or_place<'a>(
        &'a self,
        request: &'a OrderRequest<'_>,
        quote: &mut Quote,
        sticky: &UnderKey<'_>,
    ) -> Result<Result<(BuyerClaim<'a>, Share), OrderId>, Refusal> {
        let sku = Arc::clone(&quote.sku);
        let draw = quote.draw.clone();
        let joiner = Joiner {
            units: request.quantity.get(),
            max: quote.waitlist_max,
            total: sku.stock().total,
            is_shared: draw.is_none() && sku.shared().is_some(),
        };
        let claim = || -> Result<(OrderId, BuyerClaim<'a>), Result<OrderId, Refusal>> {
            let id = self
                .state
                .ids
                .next_at(quote.now, Lane::of(&request.user_id));
            quote.entry.order_id = id.map_err(|_| Err(Refusal::NotReady))?;
            if let (Ok(_), Some((draw, at))) = (quote.amount, &draw)
                && let Err(refusal) = self.takes_entries(draw, *at, quote.now)
            {
                quote.amount = Err(refusal);
            }
            match self.claim(request, quote, sticky).map_err(Err)? {
                Claimed::Fresh(claim) => {
                    if let Some((draw, _)) = &draw {
                        draw.note_entry();
                    }
                    Ok((quote.entry.order_id, claim))
                }
                Claimed::Duplicate(id) => Err(Ok(id)),
            }
        };
        let (list, counter) = (sku.waitlist(), sku.counter());
        let placed = match &draw {
            Some(_) => list.enter(counter, joiner, claim),
            None => list.hold_or_join(counter, joiner, claim),
        };
        let (placed, id, claim) = match placed {
            Ok(placed) => placed,
            Err(Ok(duplicate)) => return Ok(Err(duplicate)),
            Err(Err(refusal)) => return Err(refusal),
        };
        let refusal = match placed {
            Placed::Held => {
                return Ok(Ok((claim, Share::Units(Hold::of(&sku, request.quantity)))));
            }
            Placed::Joined => return Ok(Ok((claim, Share::Place(WaitPlace::of(&sku, id))))),
            Placed::Full => Refusal::WaitlistFull,
            Placed::Elsewhere => Refusal::StockElsewhere,
            Placed::TooMany => Refusal::SoldOut {
                available: sku.counter().free(),
            },
        };
        Err(claim.refuse(refusal, sticky))
    }

    fn order(
        &self,
        request: &OrderRequest<'_>,
        quote: Quote,
        share: &Share,
    ) -> Result<Order, Refusal> {
        // By the same clock that later decides whether it is late.
        let created_at = self.state.ids.real_at(quote.now);
        let expires_at = match share {
            Share::Units(_) => created_at.plus_ms(self.payment_ttl_ms),
            Share::Place(_) => UnixMillis::NEVER,
        };
        Ok(Order {
            id: quote.entry.order_id,
            sku: quote.sku.number,
            quantity: request.quantity,
            adjustment: request.adjustment,
            amount: quote.amount?,
            currency: quote.currency,
            created_at,
            expires_at,
            key: request.key,
            payload: quote.entry.payload,
            attributes: request.attributes.map(Box::from),
            user_id: request.user_id.clone(),
            sku_id: Arc::clone(&quote.sku.id),
        })
    }

    fn duplicate(&self, id: OrderId) -> Admission {
        Admission::Duplicate {
            id,
            pending: self.state.pending.get(id),
        }
    }

    fn under_key<'a>(&'a self, request: &'a OrderRequest<'_>, quote: &Quote) -> UnderKey<'a> {
        UnderKey {
            refusals: &self.state.sticky_refusals,
            user_id: &request.user_id,
            key: request.key,
            payload: quote.entry.payload,
        }
    }
}

/// An order as it would be placed.
struct Quote {
    now: Instant,
    sku: Arc<Sku>,
    entry: BuyerOrder,
    /// Its amount in minor units; or the refusal of a new order, though an earlier one under the key is still
    /// answered.
    amount: Result<i64, Refusal>,
    limit: Option<u32>,
    waitlist_max: u32,
    /// Of an order that enters a draw: the draw, and when its entries end.
    draw: Option<(Arc<Draw>, UnixMillis)>,
    currency: Currency,
}

/// What an order has of its SKU: units, or a place on the waiting list. Dropping it gives it back.
enum Share {
    Units(Hold),
    Place(WaitPlace),
}

impl Share {
    /// Leaves it to the order.
    fn commit(self) {
        match self {
            Share::Units(hold) => hold.commit(),
            Share::Place(place) => place.commit(),
        }
    }
}

/// Room for one order, in memory or in a durable queue.
enum Room<'a> {
    InMemory,
    Durable(&'a dyn DurableQueue, Permit),
}

/// `unit_price × quantity + adjustment`, in minor units.
fn amount(terms: &SaleTerms, request: &OrderRequest<'_>) -> Result<i64, Refusal> {
    // In 128 bits, so that only the sum can be out of range, not a step on the way to it.
    let amount = i128::from(terms.unit_price) * i128::from(request.quantity.get())
        + i128::from(request.adjustment);
    let amount = i64::try_from(amount).ok();
    amount
        .filter(|amount| *amount >= 0)
        .ok_or(Refusal::AmountOutOfRange)
}

/// The sticky refusals under a request's key.
struct UnderKey<'a> {
    refusals: &'a StickyRefusals,
    user_id: &'a UserId,
    key: Option<KeyHash>,
    payload: PayloadHash,
}

impl Sticky for UnderKey<'_> {
    fn resolve(&self, outcome: Result<(), Refusal>) -> Result<(), Refusal> {
        let Some(key) = self.key else {
            return outcome;
        };
        self.refusals.check(self.user_id, key, self.payload)?;
        if let Err(refusal) = outcome
            && refusal.is_sticky()
        {
            self.refusals
                .remember(self.user_id, key, self.payload, refusal);
        }
        outcome
    }

    fn withdraw(&self) {
        if let Some(key) = self.key {
            self.refusals.withdraw(self.user_id, key);
        }
    }
}
