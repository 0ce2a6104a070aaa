//! What an operator may do to a draw: change its terms until somebody enters, and supply its beacon once its entries are
//! fixed.

use super::operator::OperatorError;
use crate::order::draw::{Beacon, Header};
use crate::state::stock::{DrawChange, Sku};
use crate::store::cluster::lists;
use crate::store::postgres::draws::{self, BeaconStored};
use crate::store::postgres::{Database, NodeLease};

/// The terms that may change after the first entry: the title is for people, and a restock enlarges the draw.
const MAY_CHANGE: [&str; 2] = ["title", "total"];

/// Checks that `changed` terms of a SKU may change. While the guard lives, nobody enters its draw.
///
/// # Errors
/// [`OperatorError::DrawFixed`], [`OperatorError::AllocationFixed`], or the database's error.
pub(super) async fn begin_change(
    database: &Database,
    sku: &Sku,
    changed: &[&'static str],
) -> Result<Option<DrawChange>, OperatorError> {
    let changed = changed.iter().copied();
    let changed: Vec<&'static str> = changed.filter(|name| !MAY_CHANGE.contains(name)).collect();
    if changed.is_empty() {
        return Ok(None);
    }
    // Somebody may wait at another node.
    let is_waited = match sku.shared() {
        None => !sku.waitlist().is_empty(),
        Some(_) => lists::is_listed(database, sku.number).await?,
    };
    if let Some(draw) = sku.draw() {
        let change = sku.waitlist().locked(|| draw.begin_change());
        return match change.filter(|_| !is_waited) {
            None => Err(OperatorError::DrawFixed { changed }),
            unentered => Ok(unentered),
        };
    }
    if changed.contains(&"allocation") && is_waited {
        return Err(OperatorError::AllocationFixed);
    }
    Ok(None)
}

/// Stores the beacon, after which the draw is made. Returns the first line of the published draw.
pub(super) async fn supply_beacon(
    database: &Database,
    lease: NodeLease,
    sku: &Sku,
    beacon: &Beacon,
) -> Result<Header, OperatorError> {
    let no_draw = || OperatorError::NoDraw((*sku.id).clone());
    let draw = sku.draw().ok_or_else(no_draw)?;
    if sku
        .terms()
        .draw
        .as_ref()
        .is_none_or(|terms| terms.beacon.is_none())
    {
        return Err(OperatorError::NoBeaconWanted);
    }
    match draws::store_beacon(database, lease, sku.number, beacon).await? {
        BeaconStored::Stored => {}
        BeaconStored::NotFixed => return Err(OperatorError::EntriesNotFixed),
        BeaconStored::Other(other) => {
            return Err(OperatorError::BeaconFixed(other.as_str().to_owned()));
        }
    }
    draw.note_beacon();
    tracing::info!(sku_id = %sku.id, beacon = beacon.as_str(), "an operator has supplied the beacon of a draw");
    let page = draws::page(database, &sku.id, 0, 0).await?;
    page.map(|page| page.header).ok_or_else(no_draw)
}
