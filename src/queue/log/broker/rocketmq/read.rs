//! Reading: pulls by offset, and where the queue ends.

use std::time::Instant;

use super::super::{BrokerError, Stored};
use super::session::{PAUSE, Session};
use super::wire::{Bytes, Fields};
use super::{RocketMqBroker, codes, message, route};

const PULL_MESSAGE: u16 = 11;
const GET_BROKER_RUNTIME_INFO: u16 = 28;
const GET_MAX_OFFSET: u16 = 30;
const GET_MIN_OFFSET: u16 = 31;
const UPDATE_AND_CREATE_SUBSCRIPTIONGROUP: u16 = 200;
/// Messages a pull; brokers hand out 32, or 256 KiB, unless told otherwise.
const PULL_MESSAGES_MAX: u32 = 32;
/// System flag of a pull: it says what it subscribes to, and does not wait for messages.
const WITH_SUBSCRIPTION: u32 = 4;

/// One pull.
enum Pulled {
    /// Messages, in their order, and whether the bytes behind them are no message.
    Messages(Vec<Stored>, Option<String>),
    /// None was found at this offset.
    Nothing,
}

/// A queue where a pull has found nothing.
enum Tail {
    /// It ends there.
    End,
    /// There is more, which is not readable yet.
    More,
}

/// How far the broker has got since reading began.
#[derive(Default)]
struct Dispatch {
    /// End of the commit log when reading began; `None` before the first look.
    goal: Option<u64>,
    /// End of the commit log at the latest look.
    seen: u64,
}

/// The frames behind `after`, by the rules of [`super::super::Broker::read`].
pub(super) fn frames(
    client: &RocketMqBroker,
    session: &mut Session,
    after: Option<u64>,
    bytes_max: usize,
    deadline: Instant,
) -> Result<Vec<Stored>, BrokerError> {
    let mut next = match after {
        Some(offset) => offset.saturating_add(1),
        None => bounds(client, session, deadline)?.0,
    };
    let mut frames: Vec<Stored> = Vec::new();
    let (mut bytes, mut dispatch) = (0_usize, Dispatch::default());
    loop {
        let pulled = pull(client, session, next, deadline);
        let messages = match pulled {
            Err(_) | Ok(Pulled::Nothing) if !frames.is_empty() => return Ok(frames),
            Err(error) => return Err(error),
            Ok(Pulled::Nothing) => {
                match tail(client, session, next, after, &mut dispatch, deadline)? {
                    Tail::End => return Ok(frames),
                    Tail::More => {
                        std::thread::sleep(PAUSE);
                        // Retention may have moved the first message that it still has.
                        if after.is_none() {
                            next = bounds(client, session, deadline)?.0;
                        }
                        continue;
                    }
                }
            }
            Ok(Pulled::Messages(messages, damage)) => {
                if let Some(damage) = damage.filter(|_| frames.is_empty() && messages.is_empty()) {
                    return Err(BrokerError::Lost(format!(
                        "the message at offset {next} is damaged: {damage}"
                    )));
                }
                messages
            }
        };
        if messages.is_empty() {
            return Ok(frames);
        }
        for message in messages {
            let is_first = frames.is_empty();
            if message.offset != next && !(is_first && after.is_none()) {
                return match is_first {
                    false => Ok(frames),
                    true => Err(gone(next, message.offset)),
                };
            }
            bytes = bytes.saturating_add(message.frame.len());
            if !is_first && bytes > bytes_max {
                return Ok(frames);
            }
            next = message.offset.saturating_add(1);
            frames.push(message);
        }
        if bytes >= bytes_max {
            return Ok(frames);
        }
    }
}

/// The offsets of the first message and of the one behind the last, as far as they are readable.
pub(super) fn bounds(
    client: &RocketMqBroker,
    session: &mut Session,
    deadline: Instant,
) -> Result<(u64, u64), BrokerError> {
    let mut ask = |code| {
        let answer = session.ask(code, client.queue_fields(), deadline)?;
        match answer
            .number("offset")
            .filter(|_| answer.code == codes::SUCCESS)
        {
            // A queue that was never written has -1.
            Some(offset) => Ok(u64::try_from(offset).unwrap_or(0)),
            None => Err(codes::failed(&answer)),
        }
    };
    let first = ask(GET_MIN_OFFSET)?;
    Ok((first, ask(GET_MAX_OFFSET)?))
}

/// Proves at connect that this client may read, and makes its consumer group if the broker makes none by itself.
pub(super) fn check(
    client: &RocketMqBroker,
    session: &mut Session,
    deadline: Instant,
) -> Result<(), BrokerError> {
    let (_, end) = bounds(client, session, deadline)?;
    let answer = session.ask(PULL_MESSAGE, pull_fields(client, end), deadline)?;
    if answer.code == codes::SUBSCRIPTION_GROUP_NOT_EXIST {
        return make_group(client, session, deadline);
    }
    match answer.code {
        codes::SUCCESS
        | codes::PULL_NOT_FOUND
        | codes::PULL_RETRY_IMMEDIATELY
        | codes::PULL_OFFSET_MOVED => Ok(()),
        _ => Err(codes::failed(&answer)),
    }
}

fn make_group(
    client: &RocketMqBroker,
    session: &mut Session,
    deadline: Instant,
) -> Result<(), BrokerError> {
    let group = &client.settings.topic;
    let body = serde_json::json!({ "groupName": group, "consumeEnable": true, "retryQueueNums": 1, "retryMaxTimes": 16 });
    let answer = session.connection.call(
        UPDATE_AND_CREATE_SUBSCRIPTIONGROUP,
        Fields::new(),
        body.to_string().as_bytes(),
        deadline,
    );
    let answer = answer.map_err(|error| BrokerError::Away(error.into_reason()))?;
    match answer.code {
        codes::SUCCESS => Ok(()),
        _ => Err(BrokerError::Refused(format!(
            "RocketMQ has no consumer group {group}, and does not let Millrace make it ({}): make it (mqadmin updateSubGroup -b ADDRESS -g {group})",
            codes::words(&answer)
        ))),
    }
}

fn pull_fields(client: &RocketMqBroker, offset: u64) -> Fields {
    let mut fields = client.queue_fields();
    fields.extend([
        ("consumerGroup", client.settings.topic.clone()),
        ("queueOffset", offset.to_string()),
        ("maxMsgNums", PULL_MESSAGES_MAX.to_string()),
        ("sysFlag", WITH_SUBSCRIPTION.to_string()),
        ("commitOffset", "0".to_owned()),
        ("suspendTimeoutMillis", "0".to_owned()),
        ("subscription", "*".to_owned()),
        ("subVersion", "0".to_owned()),
        ("expressionType", "TAG".to_owned()),
    ]);
    fields
}

fn pull(
    client: &RocketMqBroker,
    session: &mut Session,
    offset: u64,
    deadline: Instant,
) -> Result<Pulled, BrokerError> {
    let answer = session.ask(PULL_MESSAGE, pull_fields(client, offset), deadline)?;
    match answer.code {
        codes::SUCCESS => {}
        // The words of the last one are "too small" and "too big" alike, so the bounds are asked for all three.
        codes::PULL_NOT_FOUND | codes::PULL_RETRY_IMMEDIATELY | codes::PULL_OFFSET_MOVED => {
            return Ok(Pulled::Nothing);
        }
        _ => return Err(codes::failed(&answer)),
    }
    let (mut bytes, mut messages) = (Bytes(&answer.body), Vec::new());
    while let Some(message) = message::next(&mut bytes) {
        match message {
            Ok(message)
                if message.queue != client.settings.queue
                    || message.topic != client.settings.topic.as_bytes() =>
            {
                return Ok(Pulled::Messages(
                    messages,
                    Some("it is of another queue".to_owned()),
                ));
            }
            Ok(message) => {
                messages.push(Stored {
                    offset: message.offset,
                    place: None,
                    frame: message.body.to_vec(),
                });
            }
            Err(damage) => return Ok(Pulled::Messages(messages, Some(damage.to_owned()))),
        }
    }
    Ok(if messages.is_empty() {
        Pulled::Nothing
    } else {
        Pulled::Messages(messages, None)
    })
}

/// Judges a queue in which nothing was found at `next`.
fn tail(
    client: &RocketMqBroker,
    session: &mut Session,
    next: u64,
    after: Option<u64>,
    dispatch: &mut Dispatch,
    deadline: Instant,
) -> Result<Tail, BrokerError> {
    // First how far the broker has dispatched, then where the queue ends: never the other way round.
    let is_dispatched = is_dispatched(session, dispatch, deadline)?;
    let (first, end) = bounds(client, session, deadline)?;
    match after {
        Some(_) if next < first => Err(gone(next, first)),
        Some(after) if next > end && is_dispatched => Err(BrokerError::Lost(format!(
            "the queue ends before offset {end}, and the messages up to {after} were there"
        ))),
        _ if next >= end && is_dispatched => Ok(Tail::End),
        _ => Ok(Tail::More),
    }
}

/// Whether everything that was in the commit log when reading began is in the queues. A broker answers this with an
/// error in the first second after its start, before it has statistics.
fn is_dispatched(
    session: &mut Session,
    dispatch: &mut Dispatch,
    deadline: Instant,
) -> Result<bool, BrokerError> {
    let answer = session.ask(GET_BROKER_RUNTIME_INFO, Fields::new(), deadline)?;
    if answer.code != codes::SUCCESS {
        return Err(codes::failed(&answer));
    }
    let table = route::table(&answer.body).map_err(BrokerError::Away)?;
    let number = |key: &str| {
        let number = table.get(key).and_then(|value| value.parse::<i64>().ok());
        number.ok_or_else(|| BrokerError::Away(format!("the broker does not tell its {key}")))
    };
    let behind = u64::try_from(number("dispatchBehindBytes")?).unwrap_or(0);
    let end = u64::try_from(number("commitLogMaxOffset")?).unwrap_or(0);
    // The two numbers are not of one moment, so the end that counts is that of the look before: it is too low rather
    // than too high.
    let is_done = behind == 0
        || dispatch
            .goal
            .is_some_and(|goal| dispatch.seen.saturating_sub(behind) >= goal);
    dispatch.goal.get_or_insert(end);
    dispatch.seen = end;
    Ok(is_done)
}

fn gone(wanted: u64, first: u64) -> BrokerError {
    BrokerError::Lost(format!(
        "the messages from offset {wanted} to before {first} are gone"
    ))
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::net::{TcpListener, TcpStream};
    use std::time::Duration;

    use serde_json::{Value, json};

    use super::super::RocketMqSettings;
    use super::super::message::{MAGIC, tests::message};
    use super::super::wire::{Connection, decode};
    use super::*;

    /// Offset of the one message in its queue, and where it ends in the commit log.
    const OFFSET: u64 = 42;
    const MESSAGE_END: u64 = 1_000;

    /// A broker's commit log at a moment: its end, and how far its messages are in their queues.
    #[derive(Clone, Copy)]
    struct CommitLog {
        end: u64,
        dispatched: u64,
    }

    /// Number of frames that are read behind `after` from a broker whose commit log is `at(request, look)`: requests
    /// and looks at its state are counted from 1. The broker notes how far it is behind, and then its end.
    fn read(after: Option<u64>, at: impl Fn(u32, u32) -> CommitLog + Sync) -> usize {
        let client = RocketMqBroker::new(RocketMqSettings {
            namesrv: String::new(),
            topic: "t".to_owned(),
            queue: 3,
            access_key: None,
            secret_key: None,
            timeout: Duration::from_secs(20),
        });
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let deadline = client.deadline();
        std::thread::scope(|scope| {
            scope.spawn(|| serve(&listener.accept().unwrap().0, &at));
            let connection = Connection::open(&address, None, deadline).unwrap();
            let mut session = Session { connection };
            let frames = frames(&client, &mut session, after, 1 << 20, deadline);
            drop(session);
            frames.unwrap().len()
        })
    }

    fn serve(mut client: &TcpStream, at: impl Fn(u32, u32) -> CommitLog) {
        let (mut request, mut look, mut length) = (0, 0, [0; 4]);
        while client.read_exact(&mut length).is_ok() {
            let mut frame = vec![0; u32::from_be_bytes(length) as usize];
            client.read_exact(&mut frame).unwrap();
            let (_, asked) = decode(&frame).unwrap();
            let code = u16::try_from(asked.code).unwrap();
            request += 1;
            look += u32::from(code == GET_BROKER_RUNTIME_INFO);
            let CommitLog { end, dispatched } = at(request, look);
            let is_readable = dispatched >= MESSAGE_END;
            let bound = |offset: u64| {
                (
                    codes::SUCCESS,
                    json!({ "offset": offset.to_string() }),
                    Vec::new(),
                )
            };
            let (code, fields, body) = match code {
                PULL_MESSAGE
                    if is_readable && asked.number("queueOffset") == Some(OFFSET as i64) =>
                {
                    (codes::SUCCESS, Value::Null, message(0, MAGIC, b"frame"))
                }
                PULL_MESSAGE => (codes::PULL_NOT_FOUND, Value::Null, Vec::new()),
                GET_MIN_OFFSET => bound(OFFSET),
                GET_MAX_OFFSET => bound(OFFSET + u64::from(is_readable)),
                GET_BROKER_RUNTIME_INFO => {
                    let table = json!({ "table": {
                        "dispatchBehindBytes": (end - dispatched).to_string(),
                        "commitLogMaxOffset": at(request, look + 1).end.to_string(),
                    } });
                    (codes::SUCCESS, Value::Null, table.to_string().into_bytes())
                }
                code => panic!("nothing asks for {code}"),
            };
            let header = json!({ "code": code, "flag": 1, "opaque": request, "extFields": fields })
                .to_string();
            let total = (4 + header.len() + body.len()) as u32;
            let lengths = [total.to_be_bytes(), (header.len() as u32).to_be_bytes()].concat();
            client
                .write_all(&[&lengths, header.as_bytes(), &body].concat())
                .unwrap();
        }
    }

    #[test]
    fn a_message_is_found_whenever_the_broker_dispatches_it() {
        for after in [None, Some(OFFSET - 1)] {
            for moment in 1..=12 {
                let found = read(after, |request, _| CommitLog {
                    end: MESSAGE_END,
                    dispatched: MESSAGE_END - if request < moment { 80 } else { 0 },
                });
                assert_eq!(
                    found, 1,
                    "after {after:?}, dispatched before request {moment}"
                );
            }
        }
    }

    #[test]
    fn a_broker_that_is_always_behind_tells_its_messages_and_their_end() {
        for moment in 1..=6 {
            let grown = |look: u32| 100 * u64::from(look.saturating_sub(moment));
            let found = read(Some(OFFSET - 1), |_, look| CommitLog {
                end: MESSAGE_END + grown(look),
                dispatched: MESSAGE_END + grown(look) - 150,
            });
            assert_eq!(found, 1, "dispatched from look {moment} on");
        }
        let nothing = read(Some(OFFSET), |_, look| CommitLog {
            end: MESSAGE_END + 100 * u64::from(look),
            dispatched: MESSAGE_END + 100 * u64::from(look) - 10,
        });
        assert_eq!(nothing, 0);
    }
}
