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
    write::json(response, 200, &SkuView::of(&sku, catalogue.is_paused()));
    Ok(())
}
