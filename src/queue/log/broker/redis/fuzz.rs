//! Entrances to the decoders of what a Redis server answers, for the target `broker_redis`. Answers come in RESP2, which the
//! client library reads.

use ::redis::Value;

use super::link::Replies;
use super::{BrokerError, RedisBroker, SendError, Stored, answers, durable, inspect};

fn value(resp: &[u8]) -> Value {
    ::redis::parse_redis_value(resp).expect("the target writes RESP2")
}

fn replies(answers: &[Vec<u8>]) -> Replies {
    Replies::whole(answers.iter().map(|resp| value(resp)).collect())
}

/// The groups in an answer to `XRANGE`.
///
/// # Errors
/// The reason why it has none.
pub fn entries(broker: &RedisBroker, answer: &[u8]) -> Result<Vec<Stored>, BrokerError> {
    broker.entries(value(answer))
}

/// Whether the answers to `WAIT` and `WAITAOF` confirm an append.
///
/// # Errors
/// The reason why they do not.
pub fn confirmed(
    broker: &RedisBroker,
    has_waitaof: bool,
    answers: &[Vec<u8>],
) -> Result<(), SendError> {
    let needed = broker.replicas_min;
    durable::confirmed(&broker.address, has_waitaof, needed, &mut replies(answers))
}

/// The sentences about a server with these answers to `ROLE`, `INFO`, `CONFIG GET` (of `appendonly`, `appendfsync`,
/// `no-appendfsync-on-rewrite`, `maxmemory-policy`), `WAITAOF` and `XLEN`, and whether it has `WAITAOF`.
///
/// # Errors
/// The reason why it cannot keep the log.
pub fn judge(
    broker: &RedisBroker,
    answers: &[Vec<u8>],
) -> Result<(Vec<String>, bool), BrokerError> {
    inspect::judge(&broker.address, &mut replies(answers), broker.replicas_min)
}

/// The consequence of an error that answers `XADD`; `None` if the answer is none.
pub fn refusal(broker: &RedisBroker, answer: &[u8]) -> Option<SendError> {
    match value(answer) {
        Value::ServerError(error) => Some(answers::of_send(&broker.address.name, &error)),
        _ => None,
    }
}
