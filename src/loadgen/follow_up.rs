//! After the load: the final status of orders answered as `undecided`.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use hyper::StatusCode;
use serde::Deserialize;

use super::get::GetClient;
use super::target::Target;

/// Seconds that one `GET` may wait for its order.
const WAIT_S: u64 = 10;
/// Orders asked for at the same time.
const CONNECTIONS: usize = 16;
/// Pause before asking again about an order that is still undecided, or a server that is away.
const PAUSE: Duration = Duration::from_millis(100);

/// The final status of an order without a row.
const NO_ROW: &str = "unknown_order";

#[derive(Deserialize)]
struct Order {
    status: String,
}

/// Asks for each order until it is decided or the time is up. An order that is missing in the result is
/// still undecided.
pub(super) async fn resolve(
    target: &Target,
    mut order_ids: Vec<u64>,
    limit: Duration,
) -> HashMap<u64, String> {
    order_ids.sort_unstable();
    order_ids.dedup();
    let deadline = Instant::now() + limit;
    let connections = CONNECTIONS.min(order_ids.len());
    let open = parking_lot::Mutex::new(order_ids);
    let finals = parking_lot::Mutex::new(HashMap::new());
    let askers = (0..connections).map(|_| async {
        let mut client = GetClient::new(
            &target.addresses,
            target.get_headers(),
            Duration::from_secs(WAIT_S + 5),
        );
        loop {
            let Some(order_id) = open.lock().pop() else {
                break;
            };
            if let Some(status) = final_status(&mut client, target, order_id, deadline).await {
                finals.lock().insert(order_id, status);
            }
        }
    });
    join_all(askers).await;
    finals.into_inner()
}

async fn final_status(
    client: &mut GetClient,
    target: &Target,
    order_id: u64,
    deadline: Instant,
) -> Option<String> {
    loop {
        let left = deadline.checked_duration_since(Instant::now())?;
        let path = target.order_path(order_id, left.as_secs().clamp(1, WAIT_S));
        let answer = tokio::time::timeout(left, client.get(&path)).await.ok()?;
        if let Ok(reply) = answer {
            match reply.status {
                StatusCode::NOT_FOUND => return Some(NO_ROW.to_owned()),
                StatusCode::OK => {
                    if let Ok(order) = serde_json::from_slice::<Order>(&reply.body)
                        && order.status != "undecided"
                    {
                        return Some(order.status);
                    }
                }
                _ => {}
            }
        }
        tokio::time::sleep(PAUSE).await;
    }
}
