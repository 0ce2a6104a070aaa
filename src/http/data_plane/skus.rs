//! `GET /v1/skus/{sku_id}`.

use super::context::Context;
use crate::http::message::Response;
use crate::http::problem::Problem;
use crate::http::wire::{SkuView, write};
use crate::order::SkuId;

/// Answers with the terms and the units of a SKU.
pub(super) fn get(context: &Context, response: &mut Response, id: &SkuId) -> Result<(), Problem> {
    let catalogue = &context.state.catalogue;
    let sku = catalogue
        .get(id)
        .ok_or_else(|| Problem::new(404, "unknown_sku", "no such SKU"))?;
    // What a node says of the whole sale is at most 250 ms old.
    if sku.shared().is_some_and(|shared| !shared.is_fresh()) {
        let detail = "this node has not read the counters of the whole sale for too long";
        return Err(Problem::new(503, "not_ready", detail).retry_after(1));
    }
    write::json(response, 200, &SkuView::of(&sku, catalogue.is_paused()));
    Ok(())
}
