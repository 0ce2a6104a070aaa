//! Entrances to the decoders of what a RocketMQ server sends, for the target `broker_rocketmq`.

use super::wire::{self, Bytes};
use super::{message, route};

/// A decoded answer, as far as a target looks at it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The number of the request that it answers; `None` if it is a request of the server's own.
    pub answered: Option<i64>,
    /// The response code.
    pub code: i64,
    /// The bytes behind the header.
    pub body: Vec<u8>,
}

/// Decodes a frame behind its total length.
///
/// # Errors
/// The reason why it is none.
pub fn frame(bytes: &[u8]) -> Result<Answer, &'static str> {
    let (answered, answer) = wire::decode(bytes)?;
    Ok(Answer {
        answered,
        code: answer.code,
        body: answer.body,
    })
}

/// The offsets and bodies of the messages in a pull's answer, and the damage behind them.
pub fn messages(bytes: &[u8]) -> (Vec<(u64, &[u8])>, Option<&'static str>) {
    let (mut rest, mut found) = (Bytes(bytes), Vec::new());
    while let Some(message) = message::next(&mut rest) {
        match message {
            Ok(message) => found.push((message.offset, message.body)),
            Err(damage) => return (found, Some(damage)),
        }
    }
    (found, None)
}

/// The broker names in a name server's route of a topic.
///
/// # Errors
/// The reason why it cannot be read.
pub fn route(body: &[u8]) -> Result<Vec<String>, String> {
    let places = route::topic(body)?;
    Ok(places.into_iter().map(|place| place.broker).collect())
}

/// The broker names in a name server's list of a cluster.
///
/// # Errors
/// The reason why it cannot be read.
pub fn cluster(body: &[u8]) -> Result<Vec<String>, String> {
    let groups = route::cluster(body)?;
    Ok(groups.into_iter().map(|group| group.broker_name).collect())
}

/// The number of rows in a broker's table of its state.
///
/// # Errors
/// The reason why it cannot be read.
pub fn table(body: &[u8]) -> Result<usize, String> {
    route::table(body).map(|table| table.len())
}
