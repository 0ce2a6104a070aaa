//! The database's clock, and the last use of the database by that clock.

use super::{Connected, Database};
use crate::order::UnixMillis;
use crate::store::StoreError;

/// A reading of the server's clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ServerClock {
    /// The server's time at the query.
    pub now: UnixMillis,
    /// The same clock at the last sign of life of a Millrace process: its start, or the last renewal of its
    /// lease.
    pub last_used: Option<UnixMillis>,
}

/// Reads the server's clock.
///
/// # Errors
/// If the database does not answer.
pub async fn read(database: &Database, session: &Connected) -> Result<ServerClock, StoreError> {
    let row = database
        .timed(
            "reading the database's clock",
            session.query_one(
                "SELECT (extract(epoch FROM clock_timestamp()) * 1000)::int8,
                        (SELECT (extract(epoch FROM max(greatest(started_at,
                                     lease_until - lease_ms * interval '1 millisecond'))) * 1000)::int8
                           FROM node)",
                &[],
            ),
        )
        .await?;
    Ok(ServerClock {
        now: UnixMillis(row.get(0)),
        last_used: row.get::<_, Option<i64>>(1).map(UnixMillis),
    })
}
