//! The topic: the settings that the promise rests on, made with it or read from it.

use std::collections::HashMap;

use kafka_protocol::{
    messages::{
        CreatePartitionsRequest, CreateTopicsRequest, DescribeConfigsRequest,
        DescribeConfigsResponse, TopicName,
        create_partitions_request::CreatePartitionsTopic,
        create_topics_request::{CreatableTopic, CreatableTopicConfig},
        describe_configs_request::DescribeConfigsResource,
    },
    protocol::StrBytes,
};

use super::BrokerError;

const CLEANUP_POLICY: &str = "cleanup.policy";
const COMPRESSION_TYPE: &str = "compression.type";
const FLUSH_MESSAGES: &str = "flush.messages";
const MAX_MESSAGE_BYTES: &str = "max.message.bytes";
const MIN_INSYNC_REPLICAS: &str = "min.insync.replicas";
const RETENTION_BYTES: &str = "retention.bytes";
const RETENTION_MS: &str = "retention.ms";
const UNCLEAN_ELECTION: &str = "unclean.leader.election.enable";

const ASKED: [&str; 8] = [
    CLEANUP_POLICY,
    COMPRESSION_TYPE,
    FLUSH_MESSAGES,
    MAX_MESSAGE_BYTES,
    MIN_INSYNC_REPLICAS,
    RETENTION_BYTES,
    RETENTION_MS,
    UNCLEAN_ELECTION,
];

/// Settings with the values of which one is needed; the first one is set when the topic is made.
const NEEDED: [(&str, &[&str]); 5] = [
    (CLEANUP_POLICY, &["delete"]),
    (RETENTION_MS, &["-1"]),
    (RETENTION_BYTES, &["-1"]),
    (UNCLEAN_ELECTION, &["false"]),
    (COMPRESSION_TYPE, &["producer", "uncompressed"]),
];

/// Replicas of a topic that Millrace makes, if there are as many brokers.
const REPLICAS: usize = 3;

/// What is known of the topic once its settings are right.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Facts {
    pub(super) warnings: Vec<String>,
    /// Longest record batch that the topic takes.
    pub(super) batch_bytes_max: usize,
}

/// The request that makes a topic with the settings needed.
pub(super) fn creation(
    topic: &str,
    partitions: i32,
    brokers: usize,
    timeout_ms: i32,
) -> CreateTopicsRequest {
    let replicas = brokers.clamp(1, REPLICAS);
    let mut settings: Vec<_> = NEEDED
        .iter()
        .map(|(name, values)| (*name, values[0].to_owned()))
        .collect();
    settings.push((MIN_INSYNC_REPLICAS, (replicas - 1).max(1).to_string()));
    if replicas == 1 {
        settings.push((FLUSH_MESSAGES, "1".to_owned()));
    }
    let settings = settings
        .into_iter()
        .map(|(name, value)| {
            CreatableTopicConfig::default()
                .with_name(StrBytes::from_static_str(name))
                .with_value(Some(value.into()))
        })
        .collect();
    let topic = CreatableTopic::default()
        .with_name(TopicName(topic.to_owned().into()))
        .with_num_partitions(partitions)
        .with_replication_factor(i16::try_from(replicas).unwrap_or(1))
        .with_configs(settings);
    CreateTopicsRequest::default()
        .with_topics(vec![topic])
        .with_timeout_ms(timeout_ms)
}

/// The request that gives a topic the partitions that are missing.
pub(super) fn extension(topic: &str, partitions: i32, timeout_ms: i32) -> CreatePartitionsRequest {
    let topic = CreatePartitionsTopic::default()
        .with_name(TopicName(topic.to_owned().into()))
        .with_count(partitions)
        // Kafka chooses the brokers.
        .with_assignments(None);
    CreatePartitionsRequest::default()
        .with_topics(vec![topic])
        .with_timeout_ms(timeout_ms)
}

/// The request for the settings that are in effect for the topic.
pub(super) fn question(topic: &str) -> DescribeConfigsRequest {
    const TOPIC: i8 = 2;
    let topic = DescribeConfigsResource::default()
        .with_resource_type(TOPIC)
        .with_resource_name(topic.to_owned().into())
        .with_configuration_keys(Some(ASKED.map(StrBytes::from_static_str).to_vec()));
    DescribeConfigsRequest::default().with_resources(vec![topic])
}

/// Settings by their names.
pub(super) type Settings = HashMap<String, String>;

/// The settings of an answer.
pub(super) fn settings(answer: &DescribeConfigsResponse) -> Settings {
    answer
        .results
        .iter()
        .flat_map(|result| &result.configs)
        .filter_map(|config| Some((config.name.to_string(), config.value.as_deref()?.to_owned())))
        .collect()
}

/// Refuses settings that break the promise, all of them in one sentence.
pub(super) fn judge(
    topic: &str,
    replicas: usize,
    settings: &Settings,
) -> Result<Facts, BrokerError> {
    let value = |name: &str| settings.get(name).map_or("unknown", String::as_str);
    let number = |name: &str| value(name).parse::<u64>().ok();
    let mut wrong: Vec<String> = NEEDED
        .iter()
        .filter(|(name, values)| !values.contains(&value(name)))
        .map(|(name, values)| {
            format!(
                "{name} is {} and must be {}",
                value(name),
                values.join(" or ")
            )
        })
        .collect();
    let in_sync = number(MIN_INSYNC_REPLICAS).unwrap_or(0);
    let least = if replicas >= REPLICAS { 2 } else { 1 };
    if in_sync < least {
        wrong.push(format!(
            "{MIN_INSYNC_REPLICAS} is {} and must be at least {least} with {replicas} replicas",
            value(MIN_INSYNC_REPLICAS)
        ));
    } else if in_sync > replicas as u64 {
        wrong.push(format!(
            "{MIN_INSYNC_REPLICAS} is {in_sync} and must be at most the number of replicas, {replicas}"
        ));
    }
    let batch_bytes_max = number(MAX_MESSAGE_BYTES).and_then(|bytes| usize::try_from(bytes).ok());
    let Some(batch_bytes_max) = batch_bytes_max else {
        return Err(BrokerError::Refused(format!(
            "topic {topic}: {MAX_MESSAGE_BYTES} is {} and must be a number; allow the user DescribeConfigs",
            value(MAX_MESSAGE_BYTES)
        )));
    };
    if !wrong.is_empty() {
        return Err(BrokerError::Refused(format!(
            "topic {topic}: {}",
            wrong.join("; ")
        )));
    }
    Ok(Facts {
        warnings: warnings(topic, replicas, in_sync, value(FLUSH_MESSAGES)),
        batch_bytes_max,
    })
}

fn warnings(topic: &str, replicas: usize, in_sync: u64, flush: &str) -> Vec<String> {
    let warning = match (replicas, flush) {
        (1, "1") => format!(
            "topic {topic} has 1 replica: an acknowledged order survives a crash and a power loss of its broker, \
             not the loss of its disk; use 3 brokers and replicas"
        ),
        (1, _) => format!(
            "topic {topic} has 1 replica: an acknowledged order survives a crash of its broker, not a power loss or \
             the loss of its disk; use 3 brokers and replicas, or at least set {FLUSH_MESSAGES} of the topic to 1 \
             (it is {flush})"
        ),
        (2, _) if in_sync < 2 => format!(
            "topic {topic} has 2 replicas and {MIN_INSYNC_REPLICAS} 1: while one of them is away, an acknowledged \
             order is on the other one alone; use 3 replicas"
        ),
        _ => return Vec::new(),
    };
    vec![warning]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(changes: &[(&str, &str)]) -> Settings {
        let good = NEEDED.iter().map(|(name, values)| (*name, values[0]));
        good.chain([
            (MAX_MESSAGE_BYTES, "1048588"),
            (MIN_INSYNC_REPLICAS, "2"),
            (FLUSH_MESSAGES, "9"),
        ])
        .chain(changes.iter().copied())
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .collect()
    }

    fn refused(replicas: usize, changes: &[(&str, &str)]) -> String {
        judge("t", replicas, &with(changes))
            .unwrap_err()
            .to_string()
    }

    #[test]
    fn every_broken_setting_is_named_with_its_value_and_the_value_needed() {
        assert_eq!(
            judge("t", 3, &with(&[])).unwrap().warnings,
            Vec::<String>::new()
        );
        assert_eq!(
            refused(
                3,
                &[(RETENTION_MS, "604800000"), (MIN_INSYNC_REPLICAS, "1")]
            ),
            "topic t: retention.ms is 604800000 and must be -1; min.insync.replicas is 1 and must be at least 2 with \
             3 replicas",
        );
        assert!(
            refused(2, &[(MIN_INSYNC_REPLICAS, "3")])
                .contains("is 3 and must be at most the number of replicas, 2")
        );
        assert!(
            refused(3, &[(CLEANUP_POLICY, "compact,delete")])
                .contains("is compact,delete and must be delete")
        );
        assert!(refused(3, &[(MAX_MESSAGE_BYTES, "many")]).contains("max.message.bytes is many"));
        let mut silent = with(&[]);
        silent.remove(UNCLEAN_ELECTION);
        assert!(
            judge("t", 3, &silent)
                .unwrap_err()
                .to_string()
                .contains("enable is unknown and must be false")
        );
    }

    #[test]
    fn too_few_replicas_are_warned_of() {
        let said = |replicas, changes: &[(&str, &str)]| {
            judge("t", replicas, &with(changes)).unwrap().warnings
        };
        let alone = [(MIN_INSYNC_REPLICAS, "1")];
        assert!(said(1, &alone)[0].contains("set flush.messages of the topic to 1"));
        let flushed = [(MIN_INSYNC_REPLICAS, "1"), (FLUSH_MESSAGES, "1")];
        assert!(said(1, &flushed)[0].contains("survives a crash and a power loss"));
        assert!(said(2, &alone)[0].contains("on the other one alone"));
        assert!(said(2, &[]).is_empty());
    }
}
