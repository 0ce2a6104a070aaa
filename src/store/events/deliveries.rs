//! Events that wait for a sink, and its dead letters. Only the process that reads the slot of a sink delivers what
//! waits for it; operators change dead letters.

use std::time::Duration;

use tokio_postgres::Row;

use crate::order::UnixMillis;
use crate::store::StoreError;
use crate::store::postgres::Database;

/// An event that a sink has not taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Waiting<'a> {
    /// The event's id.
    pub event_id: &'a str,
    /// What it is about.
    pub subject: &'a str,
    /// Its type.
    pub kind: &'a str,
    /// Its JSON.
    pub body: &'a str,
    /// The trace that it belongs to.
    pub traceparent: Option<&'a str>,
    /// Attempts that failed.
    pub attempts: i32,
    /// Why the last one failed, or why there was none.
    pub error: &'a str,
    /// Whether it is a dead letter at once.
    pub is_dead: bool,
}

/// The same as it is stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Delivery {
    /// The number of the row.
    pub id: i64,
    /// The sink.
    pub sink: String,
    /// The event's id.
    pub event_id: String,
    /// What it is about.
    pub subject: String,
    /// Its type.
    pub kind: String,
    /// Its JSON.
    pub body: String,
    /// The trace that it belongs to.
    pub traceparent: Option<String>,
    /// Attempts that failed.
    pub attempts: i32,
    /// When the first attempt failed.
    pub first_failed_at: UnixMillis,
    /// When it is tried again.
    pub next_attempt_at: UnixMillis,
    /// Why the last attempt failed.
    pub last_error: String,
    /// Since when it is a dead letter.
    pub dead_at: Option<UnixMillis>,
}

const COLUMNS: &str = "id, sink, event_id, subject, type, body, attempts,
    (extract(epoch FROM first_failed_at) * 1000)::int8, (extract(epoch FROM next_attempt_at) * 1000)::int8, last_error,
    (extract(epoch FROM dead_at) * 1000)::int8, traceparent";

fn from_row(row: &Row) -> Delivery {
    Delivery {
        id: row.get(0),
        sink: row.get(1),
        event_id: row.get(2),
        subject: row.get(3),
        kind: row.get(4),
        body: row.get(5),
        attempts: row.get(6),
        first_failed_at: UnixMillis(row.get(7)),
        next_attempt_at: UnixMillis(row.get(8)),
        last_error: row.get(9),
        dead_at: row.get::<_, Option<i64>>(10).map(UnixMillis),
        traceparent: row.get(11),
    }
}

/// Has events wait, in this order. One that waits already is left alone.
///
/// # Errors
/// If the database does not answer.
pub async fn add(
    database: &Database,
    sink: &str,
    events: &[Waiting<'_>],
    pause: Duration,
) -> Result<(), StoreError> {
    if events.is_empty() {
        return Ok(());
    }
    fn column<'a, T>(events: &[Waiting<'a>], of: impl Fn(&Waiting<'a>) -> T) -> Vec<T> {
        events.iter().map(of).collect()
    }
    let pause_ms = i64::try_from(pause.as_millis()).unwrap_or(i64::MAX);
    let client = database.pooled().await?;
    database
        .timed(
            "storing events that a sink did not take",
            client.execute(
                "INSERT INTO event_deliveries (sink, event_id, subject, type, body, attempts, first_failed_at,
                        next_attempt_at, last_error, dead_at, traceparent)
                 SELECT $1, e.event_id, e.subject, e.type, e.body, e.attempts, clock_timestamp(),
                        clock_timestamp() + CASE WHEN e.attempts > 0 THEN $2::int8 * interval '1 millisecond'
                                                 ELSE interval '0' END,
                        e.error, CASE WHEN e.is_dead THEN clock_timestamp() END, e.traceparent
                   FROM unnest($3::text[], $4::text[], $5::text[], $6::text[], $7::int4[], $8::text[], $9::bool[],
                               $10::text[]) WITH ORDINALITY
                        AS e (event_id, subject, type, body, attempts, error, is_dead, traceparent, place)
                  ORDER BY e.place
                 ON CONFLICT (sink, event_id) DO NOTHING",
                &[
                    &sink,
                    &pause_ms,
                    &column(events, |event| event.event_id),
                    &column(events, |event| event.subject),
                    &column(events, |event| event.kind),
                    &column(events, |event| event.body),
                    &column(events, |event| event.attempts),
                    &column(events, |event| event.error),
                    &column(events, |event| event.is_dead),
                    &column(events, |event| event.traceparent),
                ],
            ),
        )
        .await
        .map(|_| ())
}

/// The subjects of events that wait for a sink.
///
/// # Errors
/// If the database does not answer.
pub async fn waiting_subjects(database: &Database, sink: &str) -> Result<Vec<String>, StoreError> {
    let client = database.pooled().await?;
    let rows = database
        .timed(
            "reading what waits for a sink",
            client.query(
                "SELECT subject FROM event_deliveries WHERE sink = $1 AND dead_at IS NULL ORDER BY id",
                &[&sink],
            ),
        )
        .await?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}

/// The events that are due, the first of each subject alone, oldest first.
///
/// # Errors
/// If the database does not answer.
pub async fn due(database: &Database, sink: &str, limit: i64) -> Result<Vec<Delivery>, StoreError> {
    let client = database.pooled().await?;
    let sql = format!(
        "SELECT {COLUMNS} FROM (SELECT DISTINCT ON (subject) * FROM event_deliveries
                                 WHERE sink = $1 AND dead_at IS NULL ORDER BY subject, id) first
          WHERE next_attempt_at <= clock_timestamp() ORDER BY id LIMIT $2"
    );
    let rows = database
        .timed(
            "reading what waits for a sink",
            client.query(&sql, &[&sink, &limit]),
        )
        .await?;
    Ok(rows.iter().map(from_row).collect())
}

/// An event that waited has been delivered.
///
/// # Errors
/// If the database does not answer.
pub async fn delivered(database: &Database, ids: &[i64]) -> Result<(), StoreError> {
    let client = database.pooled().await?;
    database
        .timed(
            "noting a delivery",
            client.execute("DELETE FROM event_deliveries WHERE id = ANY ($1)", &[&ids]),
        )
        .await
        .map(|_| ())
}

/// An attempt to deliver an event has failed: it waits for `pause`, or is a dead letter once the first attempt is
/// `patience` ago. Returns whether it is one.
///
/// # Errors
/// If the database does not answer.
pub async fn failed(
    database: &Database,
    id: i64,
    error: &str,
    pause: Duration,
    patience: Duration,
) -> Result<bool, StoreError> {
    let milliseconds = |time: Duration| i64::try_from(time.as_millis()).unwrap_or(i64::MAX);
    let client = database.pooled().await?;
    let row = database
        .timed(
            "noting an attempt to deliver",
            client.query_opt(
                "UPDATE event_deliveries SET attempts = attempts + 1, last_error = $2,
                        next_attempt_at = clock_timestamp() + $3::int8 * interval '1 millisecond',
                        dead_at = CASE WHEN first_failed_at <= clock_timestamp() - $4::int8 * interval '1 millisecond'
                                       THEN clock_timestamp() END
                  WHERE id = $1 RETURNING dead_at IS NOT NULL",
                &[&id, &error, &milliseconds(pause), &milliseconds(patience)],
            ),
        )
        .await?;
    Ok(row.is_some_and(|row| row.get(0)))
}

/// How many events wait for a sink, and how many dead letters it has.
///
/// # Errors
/// If the database does not answer.
pub async fn counts(database: &Database, sink: &str) -> Result<(i64, i64), StoreError> {
    let client = database.pooled().await?;
    let row = database
        .timed(
            "counting what waits for a sink",
            client.query_one(
                "SELECT count(*) FILTER (WHERE dead_at IS NULL), count(*) FILTER (WHERE dead_at IS NOT NULL)
                   FROM event_deliveries WHERE sink = $1",
                &[&sink],
            ),
        )
        .await?;
    Ok((row.get(0), row.get(1)))
}

/// Dead letters of all sinks or of one, newest first.
///
/// # Errors
/// If the database does not answer.
pub async fn dead_letters(
    database: &Database,
    sink: Option<&str>,
    limit: i64,
) -> Result<Vec<Delivery>, StoreError> {
    let client = database.pooled().await?;
    let sql = format!(
        "SELECT {COLUMNS} FROM event_deliveries
          WHERE dead_at IS NOT NULL AND ($1::text IS NULL OR sink = $1) ORDER BY id DESC LIMIT $2"
    );
    let rows = database
        .timed(
            "listing dead letters of events",
            client.query(&sql, &[&sink, &limit]),
        )
        .await?;
    Ok(rows.iter().map(from_row).collect())
}

/// Has a dead letter delivered again, as if it had never been tried. Returns it; `None` if there is none.
///
/// # Errors
/// If the database does not answer.
pub async fn retry(database: &Database, id: i64) -> Result<Option<Delivery>, StoreError> {
    let sql = format!(
        "UPDATE event_deliveries SET dead_at = NULL, first_failed_at = clock_timestamp(),
                next_attempt_at = clock_timestamp()
          WHERE id = $1 AND dead_at IS NOT NULL RETURNING {COLUMNS}"
    );
    one(database, "retrying a dead letter of an event", &sql, id).await
}

/// Deletes a dead letter: its event is not delivered to this sink. Returns it; `None` if there is none.
///
/// # Errors
/// If the database does not answer.
pub async fn discard(database: &Database, id: i64) -> Result<Option<Delivery>, StoreError> {
    let sql = format!(
        "DELETE FROM event_deliveries WHERE id = $1 AND dead_at IS NOT NULL RETURNING {COLUMNS}"
    );
    one(database, "discarding a dead letter of an event", &sql, id).await
}

async fn one(
    database: &Database,
    doing: &'static str,
    sql: &str,
    id: i64,
) -> Result<Option<Delivery>, StoreError> {
    let client = database.pooled().await?;
    let row = database.timed(doing, client.query_opt(sql, &[&id])).await?;
    Ok(row.as_ref().map(from_row))
}
