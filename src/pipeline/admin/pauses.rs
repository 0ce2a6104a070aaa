//! Pausing and resuming sales. A pause takes effect at once, whatever other operators do and even if the
//! database is away, and is then stored, to survive a restart. A resume takes effect once it is stored. Of
//! several calls the last one wins, in memory and in the database.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::Notify;

use crate::faults::bug;
use crate::order::SkuNumber;
use crate::state::State;
use crate::state::stock::Sku;
use crate::store::StoreError;
use crate::store::postgres::{Database, NodeLease, skus};

/// Interval between attempts to store a switch.
const RETRY: Duration = Duration::from_secs(1);

/// The target of a pause or resume.
#[derive(Clone, Debug)]
enum Target {
    Sku(Arc<Sku>),
    Everything,
}

/// Pauses and resumes sales.
#[derive(Debug)]
pub struct Pauses {
    state: Arc<State>,
    database: Database,
    lease: NodeLease,
    /// By SKU that was ever paused or resumed; under `None`, the switch of every sale.
    switches: Mutex<HashMap<Option<SkuNumber>, Arc<Switch>>>,
    unstored: Notify,
}

#[derive(Debug)]
struct Switch {
    target: Target,
    wanted: Mutex<Wanted>,
    /// Held while the switch is being stored.
    storing: tokio::sync::Mutex<()>,
}

/// The wish of the last call, and the last call that is stored.
#[derive(Debug, Default)]
struct Wanted {
    calls: u64,
    paused: bool,
    /// The last call that is stored, or was superseded by a stored one.
    stored: u64,
}

impl Pauses {
    /// Pauses of this state. They need the pool of `database` to themselves.
    pub fn new(state: Arc<State>, database: Database, lease: NodeLease) -> Self {
        Pauses {
            state,
            database,
            lease,
            switches: Mutex::default(),
            unstored: Notify::new(),
        }
    }

    /// Pauses or resumes one sale.
    ///
    /// # Errors
    /// If it was not stored. A pause is in force all the same and is stored as soon as possible; a resume
    /// changes nothing.
    pub async fn set(&self, sku: &Arc<Sku>, paused: bool) -> Result<(), StoreError> {
        let target = || Target::Sku(Arc::clone(sku));
        self.set_target(Some(sku.number), target, paused).await
    }

    /// Pauses or resumes every sale.
    ///
    /// # Errors
    /// Those of [`Pauses::set`].
    pub async fn set_all(&self, paused: bool) -> Result<(), StoreError> {
        self.set_target(None, || Target::Everything, paused).await
    }

    async fn set_target(
        &self,
        key: Option<SkuNumber>,
        target: impl FnOnce() -> Target,
        paused: bool,
    ) -> Result<(), StoreError> {
        let switch = {
            let mut switches = self.switches.lock();
            let switch = switches.entry(key).or_insert_with(|| {
                Arc::new(Switch {
                    target: target(),
                    wanted: Mutex::default(),
                    storing: tokio::sync::Mutex::default(),
                })
            });
            Arc::clone(switch)
        };
        let call = {
            let mut wanted = switch.wanted.lock();
            wanted.calls += 1;
            wanted.paused = paused;
            if paused && !bug("pause_when_stored") {
                self.put_in_force(&switch.target, true);
            }
            wanted.calls
        };
        self.store(&switch, call).await
    }

    /// Takes over whether a sale is paused as another node has stored it, unless an operator of this one wants something
    /// that is not stored yet.
    pub fn adopt(&self, sku: &Arc<Sku>, paused: bool) {
        if self.is_stored(Some(sku.number)) {
            sku.set_paused(paused);
        }
    }

    /// The same for every sale.
    pub fn adopt_all(&self, paused: bool) {
        if self.is_stored(None) {
            self.state.catalogue.set_paused(paused);
        }
    }

    fn is_stored(&self, key: Option<SkuNumber>) -> bool {
        let switches = self.switches.lock();
        let wanted = switches.get(&key).map(|switch| switch.wanted.lock());
        wanted.is_none_or(|wanted| wanted.stored == wanted.calls)
    }

    /// Stores the wish of the last call, unless an earlier turn has stored `call` or a later one.
    async fn store(&self, switch: &Switch, call: u64) -> Result<(), StoreError> {
        let _turn = switch.storing.lock().await;
        let (calls, paused) = {
            let wanted = switch.wanted.lock();
            if wanted.stored >= call {
                return Ok(());
            }
            (wanted.calls, wanted.paused)
        };
        let stored = match &switch.target {
            Target::Sku(sku) => {
                let stored = skus::set_paused(&self.database, self.lease, &sku.id, paused).await;
                stored.map(|_| ())
            }
            Target::Everything => skus::set_all_paused(&self.database, self.lease, paused).await,
        };
        let mut wanted = switch.wanted.lock();
        let is_last = wanted.calls == calls;
        if let Err(error) = stored {
            if is_last && !paused {
                // The caller gets an error, yet the database may have stored the resume: store the state in
                // force again.
                wanted.calls += 1;
                wanted.paused = self.is_in_force(&switch.target);
            }
            self.unstored.notify_one();
            return Err(error);
        }
        wanted.stored = calls;
        if is_last {
            self.put_in_force(&switch.target, paused);
        }
        Ok(())
    }

    fn put_in_force(&self, target: &Target, paused: bool) {
        match target {
            Target::Sku(sku) => sku.set_paused(paused),
            Target::Everything => self.state.catalogue.set_paused(paused),
        }
    }

    fn is_in_force(&self, target: &Target) -> bool {
        match target {
            Target::Sku(sku) => sku.is_paused(),
            Target::Everything => self.state.catalogue.is_paused(),
        }
    }

    /// Retries storing switches until the future is dropped.
    pub async fn keep_storing(self: Arc<Self>) {
        loop {
            self.unstored.notified().await;
            loop {
                tokio::time::sleep(RETRY).await;
                let switches: Vec<_> = self.switches.lock().values().map(Arc::clone).collect();
                let mut all_stored = true;
                for switch in switches {
                    let calls = {
                        let wanted = switch.wanted.lock();
                        (wanted.stored < wanted.calls).then_some(wanted.calls)
                    };
                    if let Some(calls) = calls
                        && let Err(error) = self.store(&switch, calls).await
                    {
                        all_stored = false;
                        tracing::warn!(reason = %error, "a pause or resume could not be stored yet; retrying");
                    }
                }
                if all_stored {
                    break;
                }
            }
        }
    }
}
