//! A purchase limit counts every live order, including orders that have left memory: they are read from the
//! database before a limit takes effect.

use crate::order::{Lane, LaneSet, OrderId, SkuId};
use crate::state::State;
use crate::state::buyers::Counting;
use crate::state::stock::SaleTerms;
use crate::store::StoreError;
use crate::store::postgres::{Database, window};

/// Makes sure that memory has the live orders of a SKU, if `terms` need them. Memory keeps them as long as the
/// guard lives, and then as long as the terms in force need them.
///
/// # Errors
/// The database's error; nothing has changed.
pub(in crate::pipeline) async fn count<'a>(
    state: &'a State,
    database: &Database,
    id: &SkuId,
    terms: &SaleTerms,
) -> Result<Option<Counting<'a>>, StoreError> {
    // A SKU that does not exist yet has no orders.
    let sku = state.catalogue.get(id);
    let needed = sku.filter(|_| terms.need_units(state.ids.real_now()));
    let Some(sku) = needed else { return Ok(None) };
    let counting = state.buyers.counting(sku.number);
    if !counting.is_complete() {
        // A lane that comes meanwhile has its orders counted by whoever loads it.
        let lanes = state.lanes.as_ref();
        let lanes = lanes.map_or(LaneSet::ALL, |of| of.lanes.not_elsewhere());
        let skus = [sku.number];
        let (mut orders, started) = (0_u64, std::time::Instant::now());
        window::load_live_orders(
            database,
            &skus,
            OrderId::MAX,
            LaneSet::ALL,
            |user_id, order| {
                if lanes.has(Lane::of(&user_id)) {
                    orders += 1;
                    counting.add(user_id, order);
                }
            },
            |progress| {
                tracing::info!(sku_id = %id, "reading the orders of a SKU that gets a limit: {progress}");
            },
        )
        .await?;
        counting.complete();
        let ms = started.elapsed().as_millis() as u64;
        tracing::info!(sku_id = %id, orders, ms, "read the orders of a SKU that gets a limit");
    }
    Ok(Some(counting))
}
