//! The clock of this process: the machine's, after a comparison with the database's. A node of a cluster goes on from the
//! database's, so that all nodes agree.
//!
//! Much depends on the time at start: order ids, the extent of the idempotency window, expired orders. A clock
//! that is days ahead forgets keys, expires payable orders, and leaves its mark in the leased order ids.
//!
//! The database's clock is an independent witness if it runs on another machine. The clock of our own
//! PostgreSQL is not. Then the only evidence is the last use of the database: a clock before that moment is
//! wrong now, or was wrong then. A clock that is too far ahead cannot be told from a machine that was off.

use super::StartError;
use crate::config::Config;
use crate::order::{ClockReading, UnixMillis};
use crate::store::postgres::{Connected, Database, clock};

/// A clock by which orders must not be taken.
#[derive(Debug, thiserror::Error)]
pub enum ClockError {
    /// The clocks of this machine and of the database differ.
    #[error(
        "this machine's clock says {here} and the database's says {there}: they differ by {}, and database.clock_difference_max_ms allows {}. Orders would be given ids, remembered and expired by a wrong time: set the clock that is wrong; or, to start all the same, raise database.clock_difference_max_ms for this start",
        span(*.apart_ms), span(*.allowed_ms)
    )]
    Differ {
        /// The time of this machine.
        here: UnixMillis,
        /// The time of the database.
        there: UnixMillis,
        /// Their least difference, in milliseconds.
        apart_ms: u64,
        /// The allowed difference, in milliseconds.
        allowed_ms: u64,
    },
    /// This machine's clock is behind the last use of a database on the same machine.
    #[error(
        "this machine's clock says {here}, but its own database was in use at {last_used}, {} later, and database.clock_difference_max_ms allows {}. Set the clock; or, if it is right now and was ahead then, raise database.clock_difference_max_ms for this start",
        span(*.apart_ms), span(*.allowed_ms)
    )]
    Behind {
        /// The time of this machine.
        here: UnixMillis,
        /// The moment of the last use.
        last_used: UnixMillis,
        /// The time that it is behind, in milliseconds.
        apart_ms: u64,
        /// The allowed difference, in milliseconds.
        allowed_ms: u64,
    },
}

/// A length of time in words.
fn span(ms: u64) -> String {
    match ms / 1_000 {
        s @ 172_800.. => format!("{} days", s / 86_400),
        s @ 7_200.. => format!("{} hours", s / 3_600),
        s @ 600.. => format!("{} minutes", s / 60),
        s => format!("{s} seconds"),
    }
}

fn behind_ms(earlier: UnixMillis, later: UnixMillis) -> u64 {
    u64::try_from(later.0.saturating_sub(earlier.0)).unwrap_or(0)
}

/// Reads this machine's clock and compares it with the database's. `is_own`: the database runs on the same
/// machine, as our own server.
pub(super) async fn check(
    config: &Config,
    database: &Database,
    session: &Connected,
    is_own: bool,
) -> Result<ClockReading, StartError> {
    let clock = ClockReading::take();
    let allowed_ms = config.database.clock_difference_max_ms;
    let asked = clock.now();
    let server = clock::read(database, session).await?;
    let answered = clock.now();
    // The server read its clock between the two readings.
    let apart_ms = behind_ms(server.now, asked).max(behind_ms(answered, server.now));
    if apart_ms > allowed_ms {
        return Err(StartError::Clock(ClockError::Differ {
            here: answered,
            there: server.now,
            apart_ms,
            allowed_ms,
        }));
    }
    let clock = match config.cluster.enabled {
        false => clock,
        // Of one order several nodes say whether it was paid in time.
        true => {
            let clock = going_on(server.now, asked, answered);
            crate::clock::go_by(clock.now().0);
            clock
        }
    };
    let Some(last_used) = server.last_used else {
        return Ok(clock);
    };
    let apart_ms = behind_ms(answered, last_used);
    if apart_ms > allowed_ms {
        let behind = ClockError::Behind {
            here: answered,
            last_used,
            apart_ms,
            allowed_ms,
        };
        if is_own {
            return Err(StartError::Clock(behind));
        }
        // Two present clocks agree against a past one.
        tracing::warn!(
            here = %answered, %last_used,
            "this database was last used at a time that is in the future by its clock and by ours; continuing with the present clocks"
        );
    } else if is_own {
        tracing::info!(
            now = %answered, %last_used,
            "this machine's clock cannot be compared with another; a wrong time expires orders and forgets keys"
        );
    }
    Ok(clock)
}

/// A clock that goes on from the database's, which was read between these two moments of another one: halfway, so that it is
/// off by half of their distance at most.
fn going_on(there: UnixMillis, asked: UnixMillis, answered: UnixMillis) -> ClockReading {
    ClockReading::of(there.plus_ms(behind_ms(asked, answered) / 2))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_clock_of_a_node_goes_on_from_the_database_s_whatever_its_machine_says() {
        let there = UnixMillis(1_800_000_000_000);
        for apart_ms in [0, 100_000] {
            let asked = UnixMillis(there.0 + apart_ms);
            let now = going_on(there, asked, asked.plus_ms(40)).now();
            assert!(
                (there.plus_ms(20)..there.plus_ms(60_000)).contains(&now),
                "{now}"
            );
        }
    }

    #[test]
    fn a_refusal_names_both_times_the_difference_and_the_remedy() {
        let error = ClockError::Differ {
            here: UnixMillis(1_800_172_800_000),
            there: UnixMillis(1_800_000_000_000),
            apart_ms: 172_800_000,
            allowed_ms: 120_000,
        };
        let said = error.to_string();
        for part in [
            "2027-01-17T08:00:00.000Z",
            "2027-01-15T08:00:00.000Z",
            "differ by 2 days",
            "allows 120 seconds",
            "raise database.clock_difference_max_ms",
        ] {
            assert!(said.contains(part), "{part}: {said}");
        }
    }
}
