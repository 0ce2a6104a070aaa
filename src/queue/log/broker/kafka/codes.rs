//! Error codes of Kafka, sorted once: what each says about the request that it answers.

use super::{BrokerError, SendError};

/// The consequence of an error code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Not done; the same request may succeed later.
    Away,
    /// Not done until a person changes something.
    Refused,
    /// Nothing is certain.
    Unknown,
}

use Verdict::{Away, Refused, Unknown};

pub(super) const OFFSET_OUT_OF_RANGE: i16 = 1;
pub(super) const UNKNOWN_TOPIC_OR_PARTITION: i16 = 3;
pub(super) const LEADER_NOT_AVAILABLE: i16 = 5;
pub(super) const REPLICA_NOT_AVAILABLE: i16 = 9;
pub(super) const UNSUPPORTED_SASL_MECHANISM: i16 = 33;
pub(super) const TOPIC_ALREADY_EXISTS: i16 = 36;
pub(super) const INVALID_PARTITIONS: i16 = 37;

/// Codes with their name, their consequence and the remedy.
///
/// A code is certain for a produce request only while the answer has no base offset ([`of_send`]): a leader that
/// appends the record and loses its leadership before the replicas have it answers `NOT_LEADER_OR_FOLLOWER`, too,
/// and then keeps the offset in the answer.
///
/// `KAFKA_STORAGE_ERROR` is unknown: the write failed half-way, and a recovery may find the record whole.
const CODES: [(i16, &str, Verdict, &str); 39] = [
    (
        -1,
        "UNKNOWN_SERVER_ERROR",
        Unknown,
        "look into the server's log",
    ),
    (
        OFFSET_OUT_OF_RANGE,
        "OFFSET_OUT_OF_RANGE",
        Unknown,
        "the log does not have this offset",
    ),
    (
        2,
        "CORRUPT_MESSAGE",
        Away,
        "the record was damaged on its way",
    ),
    (
        UNKNOWN_TOPIC_OR_PARTITION,
        "UNKNOWN_TOPIC_OR_PARTITION",
        Away,
        "the topic is missing",
    ),
    (
        LEADER_NOT_AVAILABLE,
        "LEADER_NOT_AVAILABLE",
        Away,
        "a leader is being elected",
    ),
    (6, "NOT_LEADER_OR_FOLLOWER", Away, "the leader has moved"),
    (
        7,
        "REQUEST_TIMED_OUT",
        Unknown,
        "the replicas did not confirm in time",
    ),
    (8, "BROKER_NOT_AVAILABLE", Away, "a broker is missing"),
    (
        REPLICA_NOT_AVAILABLE,
        "REPLICA_NOT_AVAILABLE",
        Away,
        "a replica is missing",
    ),
    (
        10,
        "MESSAGE_TOO_LARGE",
        Refused,
        "raise max.message.bytes of the topic",
    ),
    (
        13,
        "NETWORK_EXCEPTION",
        Unknown,
        "the broker lost a connection",
    ),
    (
        17,
        "INVALID_TOPIC_EXCEPTION",
        Refused,
        "correct queue.kafka.topic",
    ),
    (
        18,
        "RECORD_LIST_TOO_LARGE",
        Refused,
        "raise segment.bytes of the topic",
    ),
    (
        19,
        "NOT_ENOUGH_REPLICAS",
        Away,
        "fewer replicas are in sync than min.insync.replicas demands",
    ),
    (
        20,
        "NOT_ENOUGH_REPLICAS_AFTER_APPEND",
        Unknown,
        "replicas left after the record was written",
    ),
    (
        21,
        "INVALID_REQUIRED_ACKS",
        Refused,
        "the server does not know acks = all",
    ),
    (29, "TOPIC_AUTHORIZATION_FAILED", Refused, TOPIC_ACL),
    (
        31,
        "CLUSTER_AUTHORIZATION_FAILED",
        Refused,
        "allow the user this operation on the cluster",
    ),
    (
        32,
        "INVALID_TIMESTAMP",
        Refused,
        "set the clocks, or message.timestamp.after.max.ms of the topic",
    ),
    (
        UNSUPPORTED_SASL_MECHANISM,
        "UNSUPPORTED_SASL_MECHANISM",
        Refused,
        "choose another mechanism",
    ),
    (
        34,
        "ILLEGAL_SASL_STATE",
        Refused,
        "configure credentials exactly if the listener asks for them",
    ),
    (
        35,
        "UNSUPPORTED_VERSION",
        Refused,
        "Kafka 2.4 or newer is needed",
    ),
    (
        TOPIC_ALREADY_EXISTS,
        "TOPIC_ALREADY_EXISTS",
        Away,
        "somebody has just made it",
    ),
    (
        INVALID_PARTITIONS,
        "INVALID_PARTITIONS",
        Refused,
        "make the topic by hand",
    ),
    (
        38,
        "INVALID_REPLICATION_FACTOR",
        Refused,
        "make the topic by hand",
    ),
    (40, "INVALID_CONFIG", Refused, "make the topic by hand"),
    (41, "NOT_CONTROLLER", Away, "a controller is being elected"),
    (
        42,
        "INVALID_REQUEST",
        Refused,
        "Kafka 2.4 or newer is needed",
    ),
    (
        43,
        "UNSUPPORTED_FOR_MESSAGE_FORMAT",
        Refused,
        "set message.format.version 2.4 or newer",
    ),
    (
        44,
        "POLICY_VIOLATION",
        Refused,
        "make the topic by hand, with cleanup.policy delete",
    ),
    (
        56,
        "KAFKA_STORAGE_ERROR",
        Unknown,
        "look at the broker's disk and log",
    ),
    (
        57,
        "LOG_DIR_NOT_FOUND",
        Unknown,
        "look at the broker's disk and log",
    ),
    (
        58,
        "SASL_AUTHENTICATION_FAILED",
        Refused,
        "correct user and password of queue.kafka",
    ),
    (
        72,
        "LISTENER_NOT_FOUND",
        Away,
        "the leader has no such listener",
    ),
    (
        74,
        "FENCED_LEADER_EPOCH",
        Away,
        "a new leader has been elected",
    ),
    (
        75,
        "UNKNOWN_LEADER_EPOCH",
        Away,
        "this broker does not know yet of a new leader",
    ),
    (
        78,
        "OFFSET_NOT_AVAILABLE",
        Away,
        "a new leader is asking its replicas up to where records are safe",
    ),
    (
        87,
        "INVALID_RECORD",
        Refused,
        "the topic demands other records",
    ),
    (
        89,
        "THROTTLING_QUOTA_EXCEEDED",
        Away,
        "the user's quota is used up",
    ),
];

const TOPIC_ACL: &str =
    "allow the user Create, Describe, DescribeConfigs, Read, Write and Delete on the topic";

fn sort(code: i16) -> (&'static str, Verdict, &'static str) {
    CODES.iter().find(|(number, ..)| *number == code).map_or(
        ("error", Unknown, "this code says nothing certain"),
        |(_, name, verdict, remedy)| (*name, *verdict, *remedy),
    )
}

/// The consequence of a code.
pub(super) fn verdict(code: i16) -> Verdict {
    sort(code).1
}

/// Names the server, its answer, its message if it has one, and the remedy.
pub(super) fn sentence(server: &str, code: i16, message: Option<&str>) -> String {
    let (name, _, remedy) = sort(code);
    match message.filter(|text| !text.is_empty()) {
        Some(text) => {
            format!(
                "{server} answered {name} ({code}): {} ({remedy})",
                text.trim_end_matches('.')
            )
        }
        None => format!("{server} answered {name} ({code}): {remedy}"),
    }
}

/// The error of a produce request that was answered by this code and base offset. An offset says that the leader
/// has appended the record, whatever happened afterwards.
pub(super) fn of_send(server: &str, code: i16, base: i64, message: Option<&str>) -> SendError {
    let said = sentence(server, code, message);
    match verdict(code) {
        Away if base < 0 => SendError::Away(said),
        Refused if base < 0 => SendError::Refused(said),
        Away | Refused | Unknown => SendError::Unknown(said),
    }
}

/// The error of a question that was answered by this code: one that is not understood may be asked again.
pub(super) fn of_question(server: &str, code: i16, message: Option<&str>) -> BrokerError {
    let said = sentence(server, code, message);
    match verdict(code) {
        Refused => BrokerError::Refused(said),
        Away | Unknown => BrokerError::Away(said),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kafka_protocol::ResponseError;

    /// Every code up to the newest of Kafka 4.1, with the consequence that it must have. Spelled out by the name
    /// in Kafka's own list, so that a wrong number in the table is found.
    const CERTAIN: [(ResponseError, Verdict); 32] = [
        (ResponseError::CorruptMessage, Away),
        (ResponseError::UnknownTopicOrPartition, Away),
        (ResponseError::LeaderNotAvailable, Away),
        (ResponseError::NotLeaderOrFollower, Away),
        (ResponseError::BrokerNotAvailable, Away),
        (ResponseError::ReplicaNotAvailable, Away),
        (ResponseError::MessageTooLarge, Refused),
        (ResponseError::InvalidTopicException, Refused),
        (ResponseError::RecordListTooLarge, Refused),
        (ResponseError::NotEnoughReplicas, Away),
        (ResponseError::InvalidRequiredAcks, Refused),
        (ResponseError::TopicAuthorizationFailed, Refused),
        (ResponseError::ClusterAuthorizationFailed, Refused),
        (ResponseError::InvalidTimestamp, Refused),
        (ResponseError::UnsupportedSaslMechanism, Refused),
        (ResponseError::IllegalSaslState, Refused),
        (ResponseError::UnsupportedVersion, Refused),
        (ResponseError::TopicAlreadyExists, Away),
        (ResponseError::InvalidPartitions, Refused),
        (ResponseError::InvalidReplicationFactor, Refused),
        (ResponseError::InvalidConfig, Refused),
        (ResponseError::NotController, Away),
        (ResponseError::InvalidRequest, Refused),
        (ResponseError::UnsupportedForMessageFormat, Refused),
        (ResponseError::PolicyViolation, Refused),
        (ResponseError::SaslAuthenticationFailed, Refused),
        (ResponseError::ListenerNotFound, Away),
        (ResponseError::FencedLeaderEpoch, Away),
        (ResponseError::UnknownLeaderEpoch, Away),
        (ResponseError::OffsetNotAvailable, Away),
        (ResponseError::InvalidRecord, Refused),
        (ResponseError::ThrottlingQuotaExceeded, Away),
    ];

    #[test]
    fn a_code_is_certain_only_if_this_list_says_so() {
        for code in -1..=200_i16 {
            let wanted = CERTAIN
                .iter()
                .find(|(error, _)| error.code() == code)
                .map_or(Unknown, |(_, verdict)| *verdict);
            assert_eq!(verdict(code), wanted, "{code}");
        }
    }

    #[test]
    fn names_are_those_of_kafka_and_no_code_comes_twice() {
        for (code, name, ..) in CODES {
            assert_eq!(
                CODES.iter().filter(|(other, ..)| *other == code).count(),
                1,
                "{code}"
            );
            let known = format!("{:?}", ResponseError::try_from_code(code)).to_uppercase();
            assert!(
                known.contains(&name.replace('_', "")),
                "{code} {name} {known}"
            );
        }
    }

    #[test]
    fn an_answer_with_an_offset_is_never_certain() {
        for (code, ..) in CODES {
            for base in [0, 7] {
                let meaning = of_send("kafka", code, base, None);
                assert!(matches!(meaning, SendError::Unknown(_)), "{code}");
            }
        }
        assert!(matches!(of_send("kafka", 6, -1, None), SendError::Away(_)));
        assert!(matches!(
            of_send("kafka", 10, -1, None),
            SendError::Refused(_)
        ));
        for unknown in [7, 20, 56] {
            assert!(matches!(
                of_send("kafka", unknown, -1, None),
                SendError::Unknown(_)
            ));
        }
    }

    #[test]
    fn the_sentence_has_the_answer_and_the_remedy() {
        assert_eq!(
            of_send("kafka h:1", 10, -1, Some("too big.")).to_string(),
            "the broker refuses: kafka h:1 answered MESSAGE_TOO_LARGE (10): too big (raise max.message.bytes of \
             the topic)",
        );
        assert_eq!(
            of_question("kafka h:1", 999, None),
            BrokerError::Away(
                "kafka h:1 answered error (999): this code says nothing certain".to_owned()
            ),
        );
    }
}
