//! The wait until an append is durable, behind it in the same pipeline.

use std::time::Instant;

use ::redis::{Cmd, Value, cmd};

use super::SendError;
use super::answers;
use super::link::{Address, Link, Replies, left, unknown};

/// The commands that wait for durability, if there is something to wait for.
///
/// `WAIT` in front of `WAITAOF` is for speed: a replica answers the question for its offset before it flushes, and
/// then speaks once a second by itself. Asked again once it has the group, it answers with the flushed offset at
/// once (Valkey 9, an append on one replica: 0.4 ms, and 1,010 ms by `WAITAOF` alone).
///
/// Both get three fifths of the time that is left, so that their answers come before the socket's time limit, and
/// time remains to compare a frame that is there already.
pub(super) fn waits(link: &Link, replicas_min: u32, deadline: Instant) -> Vec<Cmd> {
    // 0 would wait without end.
    let fifth_ms = (left(deadline).as_millis() as u64 / 5).max(1);
    let mut waits = Vec::new();
    if replicas_min > 0 {
        let mut wait = cmd("WAIT");
        wait.arg(replicas_min).arg(fifth_ms);
        waits.push(wait);
    }
    if link.has_waitaof {
        let mut wait = cmd("WAITAOF");
        wait.arg(1).arg(replicas_min).arg(2 * fifth_ms);
        waits.push(wait);
    }
    waits
}

/// Reads the answers to [`waits`]. The group is stored, so whatever is missing is [`SendError::Unknown`].
pub(super) fn confirmed(
    address: &Address,
    has_waitaof: bool,
    replicas_min: u32,
    replies: &mut Replies,
) -> Result<(), SendError> {
    let name = &address.name;
    let needed = i64::from(replicas_min);
    let lacking = |what: String| {
        Err(SendError::Unknown(format!(
            "{name} stored the group, and {what} in time"
        )))
    };
    let mut next = |command: &str| match replies.next(name).map_err(unknown)? {
        Value::ServerError(error) => Err(SendError::Unknown(answers::sentence(name, &error))),
        Value::Int(count) if command == "WAIT" => Ok((1, count)),
        Value::Array(counts) if command == "WAITAOF" => match counts.as_slice() {
            [Value::Int(local), Value::Int(count)] => Ok((*local, *count)),
            _ => Err(unknown(address.strange(command))),
        },
        _ => Err(unknown(address.strange(command))),
    };
    if needed > 0 {
        let (_, have) = next("WAIT")?;
        if have < needed {
            return lacking(format!("{have} of {needed} replicas received it"));
        }
    }
    if has_waitaof {
        let (local, have) = next("WAITAOF")?;
        if local < 1 {
            return lacking("it was not flushed there".to_owned());
        }
        if have < needed {
            return lacking(format!(
                "{have} of {needed} replicas (each needs appendonly yes) flushed it"
            ));
        }
    }
    Ok(())
}
