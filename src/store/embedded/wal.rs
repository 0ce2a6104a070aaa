//! WAL segments made ready before a sale.
//!
//! A quiet PostgreSQL has few recycled segments, so a sale makes a new one every 16 MiB: zeros and a sync in the middle
//! of a commit. Segments that a checkpoint has recycled are only renamed. `docs/DATABASE.md` has the figures.

use tokio_postgres::error::Error;

use super::Embedded;
use crate::store::postgres::preflight::{SEGMENTS_READY, free_bytes, remedies};

/// Bytes of a segment; clusters of [`super::cluster::make`] have the default.
const SEGMENT: u64 = 16 << 20;
/// Share of the free disk space that segments may take.
const SHARE_OF_FREE: u64 = 8;

/// The setting with which so many bytes of recycled segments are kept, 256 MB at least.
pub(super) fn setting(bytes: u64) -> (String, String) {
    let megabytes = ((bytes + 4 * SEGMENT) >> 20).max(256);
    ("min_wal_size".to_owned(), format!("{megabytes}MB"))
}

/// Makes the configured segments if fewer than half of them are there: switches through so many, and has a checkpoint
/// recycle them.
///
/// # Errors
/// The server's. Some segments may have been made.
pub(super) async fn make_ready(embedded: &Embedded) -> Result<(), Error> {
    let free = free_bytes(&embedded.home.data()).unwrap_or(u64::MAX);
    let wanted = embedded.options.wal_bytes.min(free / SHARE_OF_FREE) / SEGMENT;
    if wanted == 0 {
        return Ok(());
    }
    let (client, connection) = embedded.connect().await?;
    let ready: i64 = client.query_one(SEGMENTS_READY, &[]).await?.get(0);
    if ready.unsigned_abs() < wanted.div_ceil(2) {
        tracing::info!(
            segments = wanted,
            megabytes = (wanted * SEGMENT) >> 20,
            "making WAL segments ready for the sale"
        );
        client.batch_execute(&remedies::segments(wanted)).await?;
        client.batch_execute(remedies::CHECKPOINT).await?;
    }
    drop(client);
    let _ = connection.await;
    Ok(())
}
