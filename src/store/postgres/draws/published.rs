//! The published draw, in pages.

use tokio_postgres::Row as DatabaseRow;

use super::{COLUMNS, StoredDraw, bytes_32, data, from_row, quantity};
use crate::order::draw::{EntryHash, Header, RankDigits, Row, State, VERSION};
use crate::order::{SkuId, UnixMillis};
use crate::store::StoreError;
use crate::store::postgres::Database;

/// A part of a published draw.
#[derive(Debug)]
pub struct Page {
    /// The first line of the file.
    pub header: Header,
    /// The entries behind the place that was asked for.
    pub rows: Vec<Row>,
}

/// The published draw of a SKU: its first line, and at most `limit` entries behind the place `after`; none if the terms of
/// the SKU name no draw.
///
/// # Errors
/// If the database does not answer.
pub async fn page(
    database: &Database,
    sku_id: &SkuId,
    after: i64,
    limit: i64,
) -> Result<Option<Page>, StoreError> {
    let client = database.pooled().await?;
    let found = database
        .timed(
            "reading a draw",
            client.query_opt(
                &format!(
                    "SELECT {COLUMNS}, (extract(epoch FROM s.draw_at) * 1000)::int8, s.draw_beacon
                       FROM draws d JOIN sku s ON s.id = d.sku WHERE s.sku_id = $1 AND s.allocation = 'draw'"
                ),
                &[&sku_id.as_str()],
            ),
        )
        .await?;
    let Some(found) = found else {
        return Ok(None);
    };
    let draw = from_row(&found)?;
    let rows = match draw.is_drawn {
        false => Vec::new(),
        true => {
            let found = database
                .timed(
                    "reading a draw",
                    client.query(
                        "SELECT place, entry, quantity, rank, won FROM draw_places
                          WHERE sku = $1 AND place::int8 > $2 ORDER BY place LIMIT $3",
                        &[&draw.sku.0, &after, &limit],
                    ),
                )
                .await?;
            found.iter().map(published).collect::<Result<_, _>>()?
        }
    };
    let header = header(sku_id, &draw, UnixMillis(found.get(10)), found.get(11));
    Ok(Some(Page { header, rows }))
}

/// The only place where a seed leaves, and only of a draw that is made.
fn header(sku_id: &SkuId, draw: &StoredDraw, at: UnixMillis, beacon: Option<String>) -> Header {
    let fixed = draw.fixed;
    Header {
        draw: VERSION.to_owned(),
        sku_id: sku_id.to_string(),
        state: match (draw.is_drawn, fixed) {
            (true, _) => State::Drawn,
            (false, Some(_)) => State::EntriesFixed,
            (false, None) => State::EntriesOpen,
        },
        draw_at: at.to_string(),
        draw_beacon: beacon,
        commitment: draw.seed.commitment(),
        fixed_at: fixed.map(|fixed| fixed.at.to_string()),
        units: fixed.map(|fixed| fixed.units),
        entries: fixed.map(|fixed| fixed.entries),
        entries_hash: fixed.map(|fixed| fixed.hash),
        beacon: draw.beacon.clone(),
        seed: draw.is_drawn.then_some(draw.seed),
    }
}

fn published(row: &DatabaseRow) -> Result<Row, StoreError> {
    let place: i32 = row.get(0);
    Ok(Row {
        place: u64::try_from(place).map_err(data)?,
        entry: EntryHash(bytes_32(row, 1)?),
        quantity: quantity(row.get(2))?,
        rank: RankDigits::new(row.get(3)).ok_or_else(|| data("a rank is not of digits"))?,
        won: row.get(4),
    })
}
