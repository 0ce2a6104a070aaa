//! Connecting: the topic's broker from a name server, the broker's settings, a topic that is missing.

use std::time::{Duration, Instant};

use super::super::BrokerError;
use super::route::Route;
use super::wire::{Answer, Connection, Fields};
use super::{RocketMqBroker, codes, promise, read, route};

const UPDATE_AND_CREATE_TOPIC: u16 = 17;
const GET_BROKER_CONFIG: u16 = 26;
const GET_ROUTEINFO_BY_TOPIC: u16 = 105;
const GET_BROKER_CLUSTER_INFO: u16 = 106;
/// Permission of a topic to be read and written.
const READ_AND_WRITE: u32 = 4 | 2;
/// Pause between two looks at something that the servers do in their own time.
pub(super) const PAUSE: Duration = Duration::from_millis(5);

/// A connection to the master that has the queue.
pub(super) struct Session {
    /// The connection.
    pub(super) connection: Connection,
}

/// What the name servers know of the topic.
enum Known {
    /// It is there.
    Topic(Route),
    /// This process has never seen it, and the group of this name is the only one.
    Never { broker: String, master: String },
}

impl Session {
    /// The answer to one request.
    pub(super) fn ask(
        &mut self,
        code: u16,
        fields: Fields,
        deadline: Instant,
    ) -> Result<Answer, BrokerError> {
        let answer = self.connection.call(code, fields, &[], deadline);
        answer.map_err(|error| BrokerError::Away(error.into_reason()))
    }
}

fn open(client: &RocketMqBroker, address: &str, deadline: Instant) -> Result<Session, BrokerError> {
    let connection = Connection::open(address, client.credentials.clone(), deadline);
    Ok(Session {
        connection: connection.map_err(BrokerError::Away)?,
    })
}

/// A connection on which frames may be sent: the topic is there with its queue, and every setting of the broker
/// that the promise rests on was read on this connection. With warnings, a sentence each.
pub(super) fn open_to_write(
    client: &RocketMqBroker,
    deadline: Instant,
) -> Result<(Session, Vec<String>), BrokerError> {
    let route = match look_up(client, deadline)? {
        Known::Topic(route) => route,
        Known::Never { broker, master } => {
            let mut session = open(client, &master, deadline)?;
            make_topic(client, &mut session, &broker, None, deadline)?;
            wait_for_topic(client, deadline)?
        }
    };
    let queues = client.settings.queue.saturating_add(1);
    if route.permission & READ_AND_WRITE != READ_AND_WRITE {
        return Err(BrokerError::Refused(format!(
            "The RocketMQ topic {} has perm = {}; Millrace needs 6, to read and write",
            client.settings.topic, route.permission
        )));
    }
    let mut session = open(client, master_of(&route)?, deadline)?;
    let warnings = judge_settings(&mut session, &route, deadline)?;
    if route.read_queues < queues || route.write_queues < queues {
        make_topic(client, &mut session, &route.broker, Some(&route), deadline)?;
        wait_for_topic(client, deadline)?;
    }
    read::check(client, &mut session, deadline)?;
    Ok((session, warnings))
}

/// Calls `asks` with the connection for reading, or `None` if the topic was never made.
pub(super) fn with_reader<T>(
    client: &RocketMqBroker,
    asks: impl FnOnce(Option<&mut Session>, Instant) -> Result<T, BrokerError>,
) -> Result<T, BrokerError> {
    let deadline = client.deadline();
    let mut reader = client.reader.lock();
    let mut session = match reader.take().filter(|session| session.connection.is_open()) {
        Some(session) => session,
        None => match look_up(client, deadline)? {
            Known::Topic(route) => open(client, master_of(&route)?, deadline)?,
            Known::Never { .. } => return asks(None, deadline),
        },
    };
    let told = asks(Some(&mut session), deadline)?;
    *reader = Some(session);
    Ok(told)
}

fn judge_settings(
    session: &mut Session,
    route: &Route,
    deadline: Instant,
) -> Result<Vec<String>, BrokerError> {
    let answer = session.ask(GET_BROKER_CONFIG, Fields::new(), deadline)?;
    match answer.code {
        codes::SUCCESS => promise::judge(
            &route.broker,
            &String::from_utf8_lossy(&answer.body),
            route.replicas,
        ),
        _ if codes::is_forbidden(&answer) => {
            Ok(vec![promise::unread(&route.broker, &codes::words(&answer))])
        }
        _ => Err(codes::failed(&answer)),
    }
}

/// Asks the name servers in their order. If none answers, the last known place is as good as any: a topic does
/// not move by itself.
fn look_up(client: &RocketMqBroker, deadline: Instant) -> Result<Known, BrokerError> {
    judge_own_settings(client)?;
    let (mut reasons, mut never) = (Vec::new(), None);
    for address in &client.name_servers {
        match look_up_at(client, address, deadline) {
            // Another one may know it: one that was just started learns of a broker within 30 seconds.
            Ok(known @ Known::Never { .. }) => never = never.or(Some(known)),
            Err(BrokerError::Away(reason)) => reasons.push(reason),
            known => return known,
        }
    }
    if let Some(route) = client.pinned.lock().clone() {
        return Ok(Known::Topic(route));
    }
    never.ok_or_else(|| BrokerError::Away(format!("no name server helps: {}", reasons.join("; "))))
}

fn judge_own_settings(client: &RocketMqBroker) -> Result<(), BrokerError> {
    let sentence = match &client.settings {
        _ if client.name_servers.is_empty() => {
            "RocketMQ needs a name server in namesrv, as host:port"
        }
        settings if settings.queue < 0 => "RocketMQ numbers its queues from 0; queue is below that",
        settings if settings.access_key.is_some() != settings.secret_key.is_some() => {
            "RocketMQ needs access_key and secret_key together; one of them is missing"
        }
        _ => return Ok(()),
    };
    Err(BrokerError::Refused(sentence.to_owned()))
}

fn look_up_at(
    client: &RocketMqBroker,
    address: &str,
    deadline: Instant,
) -> Result<Known, BrokerError> {
    // Leaves time for the next name server, and for the broker.
    let deadline = deadline.min(Instant::now() + client.settings.timeout / 3);
    let mut session = open(client, address, deadline)?;
    let topic = &client.settings.topic;
    let fields = Fields::from([
        ("topic", topic.clone()),
        ("acceptStandardJsonOnly", "true".to_owned()),
    ]);
    let answer = session.ask(GET_ROUTEINFO_BY_TOPIC, fields, deadline)?;
    let unreadable = |reason| BrokerError::Away(format!("{address}: {reason}"));
    match answer.code {
        codes::SUCCESS => {
            pin(client, route::topic(&answer.body).map_err(unreadable)?).map(Known::Topic)
        }
        codes::TOPIC_NOT_EXIST => {
            let answer = session.ask(GET_BROKER_CLUSTER_INFO, Fields::new(), deadline)?;
            if answer.code != codes::SUCCESS {
                return Err(codes::failed(&answer));
            }
            missing(client, &route::cluster(&answer.body).map_err(unreadable)?)
        }
        _ => Err(codes::failed(&answer)),
    }
}

/// The one place of the topic, which is remembered.
fn pin(client: &RocketMqBroker, mut places: Vec<Route>) -> Result<Route, BrokerError> {
    let topic = &client.settings.topic;
    if places.len() > 1 {
        let names: Vec<&str> = places.iter().map(|place| place.broker.as_str()).collect();
        return Err(BrokerError::Refused(format!(
            "The RocketMQ topic {topic} is on the brokers {}; Millrace needs it on one, since only one queue has an order",
            names.join(", ")
        )));
    }
    let Some(route) = places.pop() else {
        return Err(BrokerError::Away(format!(
            "the name server knows no broker of the topic {topic} now"
        )));
    };
    let mut pinned = client.pinned.lock();
    if let Some(pinned) = pinned
        .as_ref()
        .filter(|pinned| pinned.broker != route.broker)
    {
        return Err(BrokerError::Refused(format!(
            "The RocketMQ topic {topic} is on the broker {} now; its orders are on {}",
            route.broker, pinned.broker
        )));
    }
    *pinned = Some(route.clone());
    Ok(route)
}

/// Judges a topic that the name server does not know, which also happens while its broker is down.
fn missing(client: &RocketMqBroker, groups: &[route::Group]) -> Result<Known, BrokerError> {
    let topic = &client.settings.topic;
    let masters: Vec<(&String, &String)> = groups
        .iter()
        .filter_map(|group| Some((&group.broker_name, group.master()?)))
        .collect();
    if let Some(pinned) = client.pinned.lock().as_ref() {
        let broker = &pinned.broker;
        return Err(match masters.iter().any(|(name, _)| *name == broker) {
            true => BrokerError::Lost(format!(
                "The RocketMQ broker {broker} has no topic {topic} any more, and none of its orders; make the topic again if this was meant"
            )),
            false => BrokerError::Away(format!(
                "the name server does not know the broker {broker} now"
            )),
        });
    }
    match masters.as_slice() {
        [] => Err(BrokerError::Away(
            "the name server knows no broker now".to_owned(),
        )),
        [(name, master)] => Ok(Known::Never {
            broker: (*name).clone(),
            master: (*master).clone(),
        }),
        several => {
            let names: Vec<&str> = several.iter().map(|(name, _)| name.as_str()).collect();
            Err(BrokerError::Refused(format!(
                "The RocketMQ cluster has no topic {topic}, and several brokers ({}): make the topic on one of them (mqadmin updateTopic -b ADDRESS -t {topic} -r 1 -w 1)",
                names.join(", ")
            )))
        }
    }
}

/// Makes the topic, or gives it the queues that are missing.
fn make_topic(
    client: &RocketMqBroker,
    session: &mut Session,
    broker: &str,
    existing: Option<&Route>,
    deadline: Instant,
) -> Result<(), BrokerError> {
    let (topic, queues) = (
        &client.settings.topic,
        client.settings.queue.saturating_add(1),
    );
    let read = existing.map_or(0, |route| route.read_queues).max(queues);
    let write = existing.map_or(0, |route| route.write_queues).max(queues);
    let fields = Fields::from([
        ("topic", topic.clone()),
        ("defaultTopic", topic.clone()),
        ("readQueueNums", read.to_string()),
        ("writeQueueNums", write.to_string()),
        (
            "perm",
            existing
                .map_or(READ_AND_WRITE, |route| route.permission)
                .to_string(),
        ),
        ("topicFilterType", "SINGLE_TAG".to_owned()),
        (
            "topicSysFlag",
            existing.map_or(0, |route| route.flags).to_string(),
        ),
        ("order", "false".to_owned()),
    ]);
    let answer = session.ask(UPDATE_AND_CREATE_TOPIC, fields, deadline)?;
    match codes::failed(&answer) {
        _ if answer.code == codes::SUCCESS => Ok(()),
        BrokerError::Away(reason) => Err(BrokerError::Away(reason)),
        BrokerError::Refused(reason) | BrokerError::Lost(reason) => {
            Err(BrokerError::Refused(format!(
                "The RocketMQ broker {broker} has no topic {topic} with {queues} queues, and does not let Millrace make it ({reason}): make it (mqadmin updateTopic -b ADDRESS -t {topic} -r {queues} -w {queues})"
            )))
        }
    }
}

/// Waits until the name server has the topic with its queue.
fn wait_for_topic(client: &RocketMqBroker, deadline: Instant) -> Result<Route, BrokerError> {
    let queues = client.settings.queue.saturating_add(1);
    while Instant::now() < deadline {
        if let Known::Topic(route) = look_up(client, deadline)?
            && route.read_queues >= queues
            && route.write_queues >= queues
        {
            return Ok(route);
        }
        std::thread::sleep(PAUSE);
    }
    Err(BrokerError::Away(
        "the name server has not learned of the new topic in time".to_owned(),
    ))
}

fn master_of(route: &Route) -> Result<&str, BrokerError> {
    let missing = || BrokerError::Away(format!("the broker {} has no master now", route.broker));
    route.master.as_deref().ok_or_else(missing)
}
