//! Hints between nodes: something has changed that the others look for anyway, so that they look at once and otherwise
//! seldom. A hint that is lost costs the time until the next look.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use tokio::sync::Notify;

use super::lane_keeper::Neighbours;
use crate::order::SkuId;

/// What this node has been told, and the way to the others.
#[derive(Default)]
pub struct Hints {
    /// Another node wants units.
    is_wanted: AtomicBool,
    terms: Notify,
    /// Set once there are links.
    others: OnceLock<Arc<dyn Neighbours>>,
}

impl fmt::Debug for Hints {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Hints").finish_non_exhaustive()
    }
}

impl Hints {
    /// From now on the others are told.
    pub fn reach(&self, others: Arc<dyn Neighbours>) {
        let _ = self.others.set(others);
    }

    /// Tells the others that this node has left a want, which is committed.
    pub(super) fn tell_want(&self, sku: &SkuId) {
        if let Some(others) = self.others.get() {
            others.want_left(sku);
        }
    }

    /// Tells the others that an operator has changed something here, which is committed.
    pub(super) fn tell_terms(&self) {
        if let Some(others) = self.others.get() {
            others.terms_changed();
        }
    }

    /// Another node has left a want.
    pub fn want_left(&self) {
        // Release: whoever takes it asks the database afterwards.
        self.is_wanted.store(true, Ordering::Release);
    }

    /// An operator has changed something at another node.
    pub fn terms_changed(&self) {
        self.terms.notify_one();
    }

    /// Whether another node has left a want since this was asked last.
    pub(super) fn take_want(&self) -> bool {
        self.is_wanted.load(Ordering::Relaxed) && self.is_wanted.swap(false, Ordering::Acquire)
    }

    /// Waits until an operator has changed something at another node.
    pub(super) async fn terms(&self) {
        self.terms.notified().await;
    }
}
