//! Waiting for an order that another request placed.

use std::sync::Arc;
use std::task::Waker;
use std::time::{Duration, Instant};

use crate::http::data_plane::context::Context;
use crate::http::message::Request;
use crate::http::problem::Problem;
use crate::http::server::wake::wait;
use crate::order::{Order, OrderId};
use crate::state::pending::{PendingOrder, SlotState};

/// Time that a look-up may take beyond the order timeout, after the client has waited all of that.
pub(super) const GRACE: Duration = Duration::from_secs(1);

/// Interval at which an order on the disk is looked for by requests that wait for it.
const DISK_RECHECK: Duration = Duration::from_millis(100);

/// The location of an order that was followed.
pub(super) enum Followed {
    /// In memory, undecided.
    InFlight(Arc<PendingOrder>),
    /// Durable, on the disk.
    OnDisk(Box<Order>),
    /// Nowhere: it was abandoned.
    Never,
    /// Neither in flight nor on the disk: among the recent orders, in the database, or nowhere.
    Elsewhere,
}

/// Follows an order that may be in memory or on the disk, until it is decided or `until`. A look-up
/// on the disk ends by `deadline`.
pub(super) fn follow(
    context: &Context,
    request: &Request<'_>,
    id: OrderId,
    until: Instant,
    deadline: Instant,
) -> Result<Followed, Problem> {
    loop {
        if let Some(pending) = context.state.pending.get(id) {
            match wait_for_other(context, request, &pending, until, |_| false) {
                SlotState::Appending | SlotState::Waiting | SlotState::Claimed => {
                    return Ok(Followed::InFlight(pending));
                }
                SlotState::Abandoned | SlotState::Unwritten => return Ok(Followed::Never),
                SlotState::Persisted | SlotState::Failed => return Ok(Followed::Elsewhere),
                // Moved there, or left there at shutdown.
                SlotState::OnDisk if context.is_stopping() => {
                    return Ok(Followed::InFlight(pending));
                }
                SlotState::OnDisk => {}
            }
        }
        let Some(order) = context.find_on_disk(request, deadline, id)? else {
            // An order moves from memory to the disk at most once, and back at most once.
            match context.state.pending.get(id) {
                Some(pending) if !pending.slot.state().is_final() => continue,
                // Left to the next process.
                Some(pending) if pending.slot.state() == SlotState::OnDisk => {
                    return Ok(Followed::InFlight(pending));
                }
                _ => return Ok(Followed::Elsewhere),
            }
        };
        if Instant::now() >= until || context.is_stopping() {
            return Ok(Followed::OnDisk(Box::new(order)));
        }
        // Nothing wakes us when it is read back. That is rare enough to poll.
        let left = until.saturating_duration_since(Instant::now());
        context.on_tokio(request, until + DISK_RECHECK, async move {
            tokio::time::sleep(left.min(DISK_RECHECK)).await;
        })?;
    }
}

/// Waits for an order that another request placed: until it is decided, `is_enough` for this
/// request, or `deadline`.
pub(super) fn wait_for_other(
    context: &Context,
    request: &Request<'_>,
    pending: &PendingOrder,
    deadline: Instant,
    is_enough: impl Fn(&PendingOrder) -> bool,
) -> SlotState {
    let over = || {
        pending.slot.state().is_final()
            || is_enough(pending)
            || Instant::now() >= deadline
            || context.is_stopping()
    };
    if !over() {
        wait(request, || {
            // Subscribed before the check: a change in between is either seen or wakes us.
            pending.slot.subscribe(Waker::clone(request.waker));
            context.state.pending.wake_by(pending, deadline);
            over()
        });
    }
    pending.slot.state()
}
