//! Detection of a pooler that shares sessions behind `database.url`.
//!
//! Millrace keeps state in its sessions: the search path and timeouts, prepared statements, the advisory lock
//! that keeps a second process away. A pooler that assigns a free server session to each transaction (or
//! statement) breaks all of that silently. No server reports a pooler in between, so it is detected by its
//! behaviour:
//!
//! ```text
//!   a  ──► SET millrace.probe = <random>             a is idle now: a pooler has its session back
//!   b1 ──► BEGIN; who am I, which probe do I see?    the transaction stays open
//!   a  ──► who am I, which probe do I see?           must be as before
//!   b2 ──► BEGIN; …
//! ```
//!
//! Each `b` holds a server session. A sharing pooler hands out idle sessions before it opens new ones, and
//! `a`'s is idle. So either some `b` gets `a`'s session (and sees its probe or its process), or `a` itself gets
//! another. If a `b` gets a session younger than the search, no idle session was left, so `a`'s is not in the
//! pool but `a`'s alone. On a quiet pooler that is a proof.
//!
//! On a busy pooler another client may have held `a`'s session at just that moment and returned it since (seen
//! once in 400 searches with eight other clients working without a pause). So the search ends only after
//! several such sessions, and `a` looks many times in between: the others would have to return the same session
//! to it each time.

use super::{Connected, Database};
use crate::store::StoreError;

/// Maximum of sessions held at once. Only a session pooler with this many idle sessions needs them.
const HELD_MAX: usize = 6;
/// Number of held sessions that must be younger than the search.
const YOUNG_MIN: usize = 3;
/// Looks at the first session after each held one.
const LOOKS: usize = 8;

/// A session's answer about itself.
#[derive(Debug, PartialEq, Eq)]
struct Seen {
    process: String,
    probe: String,
    /// Whether the server session is younger than the search.
    young: bool,
}

/// Checks that a server session is ours for as long as we are connected.
///
/// # Errors
/// [`StoreError::SharedSessions`] if a pooler shares it between transactions; otherwise the reason why the
/// check failed.
pub async fn check(database: &Database) -> Result<(), StoreError> {
    let probe = format!("{:016x}", rand::random::<u64>());
    let ours = database.connect("millrace probe").await?;
    let rows = send(database, &ours, "SELECT clock_timestamp()::text").await?;
    let began = rows.into_iter().next().unwrap_or_default();
    send(database, &ours, &format!("SET millrace.probe = '{probe}'")).await?;
    let who = format!(
        "SELECT pg_backend_pid(), coalesce(current_setting('millrace.probe', true), ''),
                (SELECT backend_start > '{began}' FROM pg_stat_activity WHERE pid = pg_backend_pid())"
    );
    let first = seen_by(database, &ours, &who).await?;
    let mut shared = first.probe != probe;
    let mut held = Vec::new();
    let mut young = 0;
    while !shared && young < YOUNG_MIN && held.len() < HELD_MAX {
        let other = match database.connect("millrace probe").await {
            Ok(other) => other,
            // A session pooler may be full by now.
            Err(_) if !held.is_empty() => break,
            Err(error) => return Err(error),
        };
        send(database, &other, "BEGIN").await?;
        let seen = seen_by(database, &other, &who).await?;
        held.push(other);
        young += usize::from(seen.young);
        shared = seen.process == first.process || seen.probe == probe;
        // Only now: if `other` held the pool's last session, `ours` would wait before.
        for _ in 0..LOOKS {
            shared = shared || seen_by(database, &ours, &who).await? != first;
        }
    }
    for other in &held {
        // A pooler would close the session of a client that disconnects inside a transaction.
        let _ = send(database, other, "ROLLBACK").await;
    }
    match shared {
        true => Err(StoreError::SharedSessions),
        false => Ok(()),
    }
}

async fn seen_by(
    database: &Database,
    session: &Connected,
    question: &str,
) -> Result<Seen, StoreError> {
    let mut answers = send(database, session, question).await?.into_iter();
    let mut next = || answers.next().unwrap_or_default();
    Ok(Seen {
        process: next(),
        probe: next(),
        young: next() == "t",
    })
}

/// Sends one statement by itself, unprepared, and gives the texts of its first row.
async fn send(
    database: &Database,
    session: &Connected,
    sql: &str,
) -> Result<Vec<String>, StoreError> {
    let doing = "looking for a connection pooler";
    let answer = match database.timed(doing, session.simple_query(sql)).await {
        Err(StoreError::Statement { source, .. }) if forbids_transactions(&source) => {
            return Err(StoreError::SharedSessions);
        }
        answer => answer?,
    };
    let row = answer.iter().find_map(|message| match message {
        tokio_postgres::SimpleQueryMessage::Row(row) => Some(row),
        _ => None,
    });
    Ok(row.map_or_else(Vec::new, |row| {
        (0..row.len())
            .map(|column| row.get(column).unwrap_or_default().to_owned())
            .collect()
    }))
}

/// PgBouncer in statement mode reports: "transaction blocks not allowed in statement pooling mode".
fn forbids_transactions(error: &tokio_postgres::Error) -> bool {
    error
        .as_db_error()
        .is_some_and(|error| error.message().contains("statement pooling"))
}
