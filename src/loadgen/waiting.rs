//! Buyers who wait for units: they ask for their orders until these have units, and pay them then.
//!
//! A list serves its orders in their sequence, so only the first known orders of each SKU are asked for: of a single node until
//! one still waits; of several, whose sequence is not that of ids, a few beyond it. Once a SKU
//! has neither free nor held units, nobody who waits for it will be served any more.

use std::collections::{BTreeMap, HashMap};
use std::ops::Bound::{Excluded, Unbounded};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{self, TryRecvError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::arrival::Arrival;
use super::buyers::RunShared;
use super::get::GetClient;
use super::platform::PlacedOrder;

/// Pause between two rounds in which nobody was served.
const PAUSE: Duration = Duration::from_millis(20);
/// Interval at which a SKU is looked at for units that may still come back.
const LOOK: Duration = Duration::from_millis(500);
/// Orders that may still wait before no further one is asked for, where several nodes sell.
const BEYOND: usize = 16;
/// Timeout of a look.
const TIMEOUT: Duration = Duration::from_secs(5);

/// An order that waits for units, as its answer describes it.
#[derive(Debug, Clone, Copy)]
pub(super) struct WaitingOrder {
    pub buyer: u32,
    pub sku: u16,
    pub order_id: u64,
}

/// What became of orders that waited for units.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct WaitlistReport {
    /// Orders that joined a list.
    pub joined: u64,
    /// Of these, those that were assigned units.
    pub assigned: u64,
    /// Of these, those that ended without units.
    pub ended: u64,
    /// The rest, which still wait.
    pub waiting: u64,
}

#[derive(Deserialize)]
struct Order {
    status: String,
}

#[derive(Deserialize)]
struct Sku {
    free: u64,
    held: u64,
}

/// The orders that wait for units, by SKU and by id.
pub(super) struct WaitingBuyers {
    pub shared: Arc<RunShared>,
    pub orders: mpsc::Receiver<WaitingOrder>,
    /// Takes orders with units to the payment platform.
    pub payments_tx: Option<mpsc::Sender<PlacedOrder>>,
    /// How long they wait after the last answer.
    pub wait_after: Duration,
}

impl WaitingBuyers {
    /// Asks until nobody waits any more, or will be served, or the time is up.
    pub(super) async fn ask(self) -> WaitlistReport {
        let WaitingBuyers {
            shared,
            orders: joined,
            payments_tx,
            wait_after,
        } = self;
        let asker = Asker {
            shared: Arc::clone(&shared),
            payments_tx,
        };
        let target = &shared.target;
        let mut client = GetClient::new(&target.addresses, target.get_headers(), TIMEOUT);
        let mut by_sku: HashMap<u16, BTreeMap<u64, u32>> = HashMap::new();
        let mut report = WaitlistReport::default();
        let (mut looked_at, mut over_at) = (Instant::now(), None);
        loop {
            loop {
                match joined.try_recv() {
                    Ok(WaitingOrder {
                        buyer,
                        sku,
                        order_id,
                    }) => {
                        report.joined += 1;
                        by_sku.entry(sku).or_default().insert(order_id, buyer);
                    }
                    Err(TryRecvError::Empty) => break,
                    Err(TryRecvError::Disconnected) => {
                        over_at.get_or_insert_with(|| Instant::now() + wait_after);
                        break;
                    }
                }
            }
            let mut has_moved = false;
            for (sku, orders) in &mut by_sku {
                has_moved |= asker.serve(&mut client, *sku, orders, &mut report).await;
            }
            if over_at.is_some() && looked_at.elapsed() >= LOOK {
                looked_at = Instant::now();
                for (sku, orders) in by_sku.iter_mut().filter(|(_, orders)| !orders.is_empty()) {
                    if asker.is_over(&mut client, *sku).await {
                        report.waiting += orders.len() as u64;
                        orders.clear();
                    }
                }
            }
            let is_over = over_at
                .is_some_and(|at| Instant::now() >= at || by_sku.values().all(BTreeMap::is_empty));
            if is_over || shared.stop.load(Ordering::Relaxed) {
                let left = by_sku.values().map(BTreeMap::len).sum::<usize>();
                report.waiting += left as u64;
                return report;
            }
            if !has_moved {
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

/// Asks for orders.
struct Asker {
    shared: Arc<RunShared>,
    payments_tx: Option<mpsc::Sender<PlacedOrder>>,
}

impl Asker {
    /// Asks for the first orders of a SKU, as long as they have left the list, or few have not. Returns whether any has.
    async fn serve(
        &self,
        client: &mut GetClient,
        sku: u16,
        orders: &mut BTreeMap<u64, u32>,
        report: &mut WaitlistReport,
    ) -> bool {
        let mut has_moved = false;
        let beyond = match self.shared.target.addresses.len() {
            1 => 1,
            _ => BEYOND,
        };
        let (mut after, mut waiting) = (0, 0);
        while waiting < beyond {
            let next = orders.range((Excluded(after), Unbounded)).next();
            let Some((order_id, buyer)) = next.map(|(id, buyer)| (*id, *buyer)) else {
                break;
            };
            after = order_id;
            let path = self.shared.target.order_path(order_id, 0);
            let Ok(got) = client.get(&path).await else {
                break;
            };
            match serde_json::from_slice::<Order>(&got.body) {
                Ok(order) if ["waitlisted", "undecided"].contains(&&*order.status) => {
                    waiting += 1;
                    continue;
                }
                Ok(order) if order.status == "pending_payment" => {
                    report.assigned += 1;
                    let arrival = Arrival {
                        scheduled_ns: 0,
                        buyer,
                        sku,
                        double: false,
                    };
                    if let Some(payments_tx) = &self.payments_tx
                        && let Some(order) = PlacedOrder::read(&arrival, &got.body)
                    {
                        // A platform that has given up takes no more orders.
                        let _ = payments_tx.send(order);
                    }
                }
                Ok(_) => report.ended += 1,
                // The server is away, or pushes back.
                Err(_) => break,
            }
            has_moved = true;
            orders.remove(&order_id);
        }
        has_moved
    }

    /// Whether no unit of a SKU is free or will come back by itself.
    async fn is_over(&self, client: &mut GetClient, sku: u16) -> bool {
        let path = self.shared.target.sku_path(self.shared.template.sku(sku));
        let Ok(got) = client.get(&path).await else {
            return false;
        };
        serde_json::from_slice::<Sku>(&got.body).is_ok_and(|sku| sku.free == 0 && sku.held == 0)
    }
}
