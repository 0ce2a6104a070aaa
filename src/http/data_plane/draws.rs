//! `GET /v1/skus/{sku_id}/draw`: the published draw, in pages.

use std::time::Instant;

use super::context::{Context, database_problem};
use crate::http::message::{Request, Response};
use crate::http::problem::Problem;
use crate::http::wire::query;
use crate::order::SkuId;
use crate::order::draw::write_line;
use crate::store::postgres::draws;

/// Entries of a page at most, and if the request names no number.
const LIMIT_MAX: u64 = 10_000;

/// Answers with the entries behind `?after=PLACE`, at most `?limit=N` of them, and with the first line of the file before
/// the first entry. All pages one after the other are the file.
pub(super) fn page(
    context: &Context,
    request: &Request<'_>,
    response: &mut Response,
    id: SkuId,
) -> Result<(), Problem> {
    let after = query::number(request.query(), "after")?.unwrap_or(0);
    let limit = query::number(request.query(), "limit")?.unwrap_or(LIMIT_MAX);
    if !(1..=LIMIT_MAX).contains(&limit) {
        let detail = format!("limit: must be 1 to {LIMIT_MAX}");
        return Err(Problem::new(400, "invalid_field", detail));
    }
    if context.state.catalogue.get(&id).is_none() {
        return Err(Problem::new(404, "unknown_sku", "no such SKU"));
    }
    let database = context.database.clone();
    let deadline = Instant::now() + context.order_timeout;
    let (wanted, from) = (id.clone(), i64::try_from(after).unwrap_or(i64::MAX));
    let page = context.on_tokio(request, deadline, async move {
        draws::page(&database, &wanted, from, limit as i64).await
    })?;
    let page = page.map_err(|error| database_problem(&error))?;
    let page = page
        .ok_or_else(|| Problem::new(404, "no_draw", "this SKU is sold first come, first served"))?;
    let mut body = Vec::new();
    let written = if after == 0 {
        write_line(&page.header, &mut body)
    } else {
        Ok(())
    };
    written
        .and_then(|()| {
            page.rows
                .iter()
                .try_for_each(|row| write_line(row, &mut body))
        })
        .map_err(|_| Problem::internal())?;
    response.set_status(200);
    response.header("Content-Type", "application/x-ndjson");
    let last = page.rows.last().map_or(0, |row| row.place);
    if page.rows.len() as u64 == limit && page.header.entries.is_some_and(|all| last < all) {
        // Ids are visible ASCII; those that a target cannot have as they are, are encoded.
        let id =
            percent_encoding::utf8_percent_encode(id.as_str(), percent_encoding::NON_ALPHANUMERIC);
        response.header(
            "Link",
            format_args!("</v1/skus/{id}/draw?after={last}&limit={limit}>; rel=\"next\""),
        );
    }
    response.body_mut().extend_from_slice(&body);
    Ok(())
}
