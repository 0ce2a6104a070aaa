//! Where a topic is, as a name server tells it.

use std::collections::BTreeMap;

use serde::Deserialize;

/// Number of a group's master among its brokers.
const MASTER: &str = "0";

/// The place of a topic.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Route {
    /// Name of the broker group.
    pub(super) broker: String,
    /// Address of its master; `None` while it has none.
    pub(super) master: Option<String>,
    /// Number of its other brokers.
    pub(super) replicas: usize,
    /// Queues of the topic that can be read.
    pub(super) read_queues: i32,
    /// Queues of the topic that can be written.
    pub(super) write_queues: i32,
    /// Permission of the topic: 4 to read, 2 to write.
    pub(super) permission: u32,
    /// System flags of the topic.
    pub(super) flags: i32,
}

/// A broker group.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Group {
    /// Its name.
    pub(super) broker_name: String,
    broker_addrs: BTreeMap<String, String>,
}

impl Group {
    /// Address of its master; `None` while it has none.
    pub(super) fn master(&self) -> Option<&String> {
        self.broker_addrs.get(MASTER)
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct TopicRoute {
    #[serde(default)]
    broker_datas: Vec<Group>,
    #[serde(default)]
    queue_datas: Vec<Queues>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Queues {
    broker_name: String,
    perm: u32,
    read_queue_nums: i32,
    write_queue_nums: i32,
    #[serde(default, alias = "topicSynFlag")]
    topic_sys_flag: i32,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Cluster {
    #[serde(default)]
    broker_addr_table: BTreeMap<String, Group>,
}

/// The places of a topic, one for each broker group that has it.
pub(super) fn topic(body: &[u8]) -> Result<Vec<Route>, String> {
    let route: TopicRoute = json(body)?;
    let places = route.queue_datas.into_iter().map(|queues| {
        let group = route
            .broker_datas
            .iter()
            .find(|group| group.broker_name == queues.broker_name);
        let master = group.and_then(Group::master).cloned();
        let brokers = group.map_or(0, |group| group.broker_addrs.len());
        Route {
            broker: queues.broker_name,
            replicas: brokers.saturating_sub(usize::from(master.is_some())),
            master,
            read_queues: queues.read_queue_nums,
            write_queues: queues.write_queue_nums,
            permission: queues.perm,
            flags: queues.topic_sys_flag,
        }
    });
    Ok(places.collect())
}

/// All broker groups that a name server knows.
pub(super) fn cluster(body: &[u8]) -> Result<Vec<Group>, String> {
    let cluster: Cluster = json(body)?;
    Ok(cluster.broker_addr_table.into_values().collect())
}

/// The table of a broker's present state.
pub(super) fn table(body: &[u8]) -> Result<BTreeMap<String, String>, String> {
    #[derive(Deserialize)]
    struct Table {
        table: BTreeMap<String, String>,
    }
    Ok(json::<Table>(body)?.table)
}

/// JSON, in which the servers write keys that are numbers without quotation marks.
fn json<T: serde::de::DeserializeOwned>(body: &[u8]) -> Result<T, String> {
    let read =
        serde_json::from_slice(body).or_else(|_| serde_json::from_slice(&quote_numeric_keys(body)));
    read.map_err(|error| format!("an answer that is no JSON: {error}"))
}

/// Puts quotation marks around numbers that stand before a colon, outside of strings.
fn quote_numeric_keys(body: &[u8]) -> Vec<u8> {
    let mut quoted = Vec::with_capacity(body.len() + 16);
    let (mut in_string, mut rest) = (false, body);
    while let Some((&byte, behind)) = rest.split_first() {
        let digits = rest.iter().take_while(|byte| byte.is_ascii_digit()).count();
        match byte {
            b'\\' if in_string => {
                let pair = rest.get(..2).unwrap_or(rest);
                quoted.extend_from_slice(pair);
                rest = rest.get(2..).unwrap_or_default();
            }
            b'0'..=b'9' if !in_string => {
                let (number, behind) = rest.split_at(digits);
                if behind.first() == Some(&b':') {
                    quoted.push(b'"');
                    quoted.extend_from_slice(number);
                    quoted.push(b'"');
                } else {
                    quoted.extend_from_slice(number);
                }
                rest = behind;
            }
            _ => {
                in_string ^= byte == b'"';
                quoted.push(byte);
                rest = behind;
            }
        }
    }
    quoted
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_route_with_bare_numbers_as_keys_is_read() {
        let body = br#"{"brokerDatas":[{"brokerAddrs":{0:"127.0.0.1:10911",1:"127.0.0.1:20911"},"brokerName":"a \"12:\" b","cluster":"c"}],
            "filterServerTable":{},"queueDatas":[{"brokerName":"a \"12:\" b","perm":6,"readQueueNums":4,"topicSysFlag":0,"writeQueueNums":3}]}"#;
        let read = topic(body).unwrap();
        let wanted = Route {
            broker: "a \"12:\" b".to_owned(),
            master: Some("127.0.0.1:10911".to_owned()),
            replicas: 1,
            read_queues: 4,
            write_queues: 3,
            permission: 6,
            flags: 0,
        };
        assert_eq!(read, [wanted]);
    }

    #[test]
    fn a_group_without_a_master_has_none() {
        let body = br#"{"brokerDatas":[{"brokerAddrs":{"1":"h:1"},"brokerName":"a"}],"queueDatas":[{"brokerName":"a","perm":6,"readQueueNums":1,"writeQueueNums":1}]}"#;
        let read = topic(body).unwrap();
        assert_eq!((read[0].master.clone(), read[0].replicas), (None, 1));
    }

    proptest::proptest! {
        #[test]
        fn no_body_makes_the_parsers_panic(
            parts in proptest::collection::vec(proptest::sample::select(vec![
                "{", "}", "[", "]", ":", ",", "\"", "\\", "0", "17", "brokerDatas", "\"queueDatas\"", "table", "-", " ",
            ]), 0..64),
            noise in proptest::collection::vec(proptest::num::u8::ANY, 0..64),
        ) {
            for body in [parts.concat().into_bytes(), noise] {
                let _ = (topic(&body), cluster(&body), table(&body));
            }
        }
    }
}
