//! The response codes of brokers and name servers, sorted once.

use super::super::{BrokerError, SendError};
use super::wire::Answer;

/// The request was carried out.
pub(super) const SUCCESS: i64 = 0;
/// The access list, or the permission of the topic, forbids it.
pub(super) const NO_PERMISSION: i64 = 16;
/// The server has no such topic.
pub(super) const TOPIC_NOT_EXIST: i64 = 17;
/// The queue has no message at this offset.
pub(super) const PULL_NOT_FOUND: i64 = 19;
/// There are messages, but none of them was found this time.
pub(super) const PULL_RETRY_IMMEDIATELY: i64 = 20;
/// The offset lies outside of the queue.
pub(super) const PULL_OFFSET_MOVED: i64 = 21;
/// The broker has no such consumer group, and makes none by itself.
pub(super) const SUBSCRIPTION_GROUP_NOT_EXIST: i64 = 26;

/// Meaning of the answer to a send.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sent {
    Stored,
    Full,
    Away,
    Refused,
    Unknown,
}

/// Answers to a send: code, name, the beginning of the remark (empty: any), meaning. The first that fits
/// counts. A code is `Full`, `Away` or `Refused` only if the broker's sources give it before they append.
/// What is not listed is `Unknown`.
const SENT: &[(i64, &str, &str, Sent)] = &[
    (SUCCESS, "SUCCESS", "", Sent::Stored),
    // The remoting layer of 4.x checks access lists before it hands a request on, and has no code for them.
    (1, "SYSTEM_ERROR", "org.apache.rocketmq.acl.", Sent::Refused),
    // The next file of the commit log could not be made; the message is written behind that only.
    (1, "SYSTEM_ERROR", "create mapped file failed", Sent::Away),
    (1, "SYSTEM_ERROR", "", Sent::Unknown),
    // Rejected on arrival, or taken out of the queue of requests before a thread took it.
    (2, "SYSTEM_BUSY", "[REJECTREQUEST]", Sent::Away),
    (2, "SYSTEM_BUSY", "[OVERLOAD]", Sent::Away),
    (2, "SYSTEM_BUSY", "[TIMEOUT_CLEAN_QUEUE]", Sent::Away),
    (2, "SYSTEM_BUSY", "[PCBUSY_CLEAN_QUEUE]", Sent::Away),
    // "[PC_SYNCHRONIZED]": older DLedger brokers say this of messages that wait for their quorum.
    (2, "SYSTEM_BUSY", "", Sent::Unknown),
    (3, "REQUEST_CODE_NOT_SUPPORTED", "", Sent::Refused),
    (10, "FLUSH_DISK_TIMEOUT", "", Sent::Unknown),
    (11, "SLAVE_NOT_AVAILABLE", "", Sent::Unknown),
    (12, "FLUSH_SLAVE_TIMEOUT", "", Sent::Unknown),
    (13, "MESSAGE_ILLEGAL", "", Sent::Refused),
    (14, "SERVICE_NOT_AVAILABLE", "", Sent::Full),
    (NO_PERMISSION, "NO_PERMISSION", "", Sent::Refused),
    (TOPIC_NOT_EXIST, "TOPIC_NOT_EXIST", "", Sent::Refused),
    (29, "INVALID_PARAMETER", "", Sent::Refused),
    // Static topics find this out after they have appended.
    (501, "NOT_LEADER_FOR_QUEUE", "", Sent::Unknown),
    // The broker is shutting down and took no request any more.
    (1500, "GO_AWAY", "", Sent::Away),
];

/// Codes that no send is answered with, for sentences.
const OTHERS: &[(i64, &str)] = &[
    (PULL_NOT_FOUND, "PULL_NOT_FOUND"),
    (PULL_RETRY_IMMEDIATELY, "PULL_RETRY_IMMEDIATELY"),
    (PULL_OFFSET_MOVED, "PULL_OFFSET_MOVED"),
    (24, "SUBSCRIPTION_NOT_EXIST"),
    (SUBSCRIPTION_GROUP_NOT_EXIST, "SUBSCRIPTION_GROUP_NOT_EXIST"),
];

/// Length up to which a server's own words are repeated.
const REMARK_CHARS_MAX: usize = 300;

/// "NAME (code): remark".
pub(super) fn words(answer: &Answer) -> String {
    let named = SENT
        .iter()
        .map(|&(code, name, ..)| (code, name))
        .chain(OTHERS.iter().copied());
    let name = named
        .into_iter()
        .find(|&(code, _)| code == answer.code)
        .map_or("code", |(_, name)| name);
    let remark: String = answer
        .remark
        .chars()
        .filter(|char| !char.is_control())
        .take(REMARK_CHARS_MAX)
        .collect();
    match remark.is_empty() {
        true => format!("{name} ({})", answer.code),
        false => format!("{name} ({}): {remark}", answer.code),
    }
}

/// The meaning of the answer to a send; `Ok` says that the broker keeps its promise for it.
///
/// # Errors
/// [`SendError`], by the table.
pub(super) fn sent(answer: &Answer) -> Result<(), SendError> {
    let fits = |&&(code, _, remark, _): &&(i64, _, &str, _)| {
        code == answer.code && answer.remark.starts_with(remark)
    };
    match SENT
        .iter()
        .find(fits)
        .map_or(Sent::Unknown, |&(.., meaning)| meaning)
    {
        Sent::Stored => Ok(()),
        Sent::Full => Err(SendError::Full(words(answer))),
        Sent::Away => Err(SendError::Away(words(answer))),
        Sent::Refused => Err(SendError::Refused(words(answer))),
        Sent::Unknown => Err(SendError::Unknown(words(answer))),
    }
}

/// Whether access control refused a request.
pub(super) fn is_forbidden(answer: &Answer) -> bool {
    answer.code == NO_PERMISSION
        || (answer.code == 1 && answer.remark.starts_with("org.apache.rocketmq.acl."))
}

/// The error of any other request that was not carried out.
pub(super) fn failed(answer: &Answer) -> BrokerError {
    match answer.code {
        3 | 13 | NO_PERMISSION | 24 | SUBSCRIPTION_GROUP_NOT_EXIST | 29 => {
            BrokerError::Refused(words(answer))
        }
        TOPIC_NOT_EXIST => BrokerError::Lost(words(answer)),
        _ if is_forbidden(answer) => BrokerError::Refused(words(answer)),
        _ => BrokerError::Away(words(answer)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn meaning(code: i64, remark: &str) -> &'static str {
        match sent(&Answer {
            code,
            remark: remark.to_owned(),
            ..Answer::default()
        }) {
            Ok(()) => "stored",
            Err(SendError::Full(_)) => "full",
            Err(SendError::Away(_)) => "away",
            Err(SendError::Refused(_)) => "refused",
            Err(SendError::Unknown(_)) => "unknown",
            Err(SendError::Stale(_)) => "stale",
        }
    }

    #[test]
    fn only_what_precedes_the_append_is_certain() {
        let expected = [
            (0, "", "stored"),
            (1, "UNKNOWN_ERROR", "unknown"),
            (1, "in-sync replicas not enough", "unknown"),
            (1, "store putMessage return null", "unknown"),
            (
                1,
                "org.apache.rocketmq.acl.common.AclException: Check signature failed",
                "refused",
            ),
            (
                1,
                "create mapped file failed, server is busy or broken.",
                "away",
            ),
            (
                2,
                "[REJECTREQUEST]system busy, start flow control for a while",
                "away",
            ),
            (
                2,
                "[OVERLOAD]system busy, start flow control for a while",
                "away",
            ),
            (
                2,
                "[TIMEOUT_CLEAN_QUEUE]broker busy, start flow control for a while",
                "away",
            ),
            (
                2,
                "[PCBUSY_CLEAN_QUEUE]broker busy, start flow control for a while",
                "away",
            ),
            (
                2,
                "[PC_SYNCHRONIZED]broker busy, start flow control for a while",
                "unknown",
            ),
            (2, "", "unknown"),
            (3, "", "refused"),
            (10, "", "unknown"),
            (11, "", "unknown"),
            (12, "", "unknown"),
            (13, "the message is illegal", "refused"),
            (14, "service not available now", "full"),
            (16, "", "refused"),
            (17, "", "refused"),
            (29, "request queueId[7] is illegal", "refused"),
            (501, "", "unknown"),
            (1500, "please go away", "away"),
            (-1, "", "unknown"),
            (4711, "", "unknown"),
        ];
        for (code, remark, wanted) in expected {
            assert_eq!(meaning(code, remark), wanted, "code {code}, {remark:?}");
        }
    }

    #[test]
    fn an_operator_reads_the_name_the_code_and_a_line_of_the_remark() {
        let told = |code, remark: &str| {
            words(&Answer {
                code,
                remark: remark.to_owned(),
                ..Answer::default()
            })
        };
        assert_eq!(told(1500, ""), "GO_AWAY (1500)");
        assert_eq!(
            told(24, "no\r\nsuch"),
            "SUBSCRIPTION_NOT_EXIST (24): nosuch"
        );
        assert_eq!(
            told(4711, &"x".repeat(900)).len(),
            "code (4711): ".len() + 300
        );
    }

    #[test]
    fn every_code_outside_of_the_table_is_unknown() {
        let listed: Vec<i64> = SENT.iter().map(|&(code, ..)| code).collect();
        for code in (-2000..4000).filter(|code| !listed.contains(code)) {
            assert_eq!(meaning(code, ""), "unknown", "code {code}");
        }
    }

    #[test]
    fn nothing_is_stored_but_success() {
        for code in -2000..4000 {
            assert_eq!(
                meaning(code, "") == "stored",
                code == SUCCESS,
                "code {code}"
            );
        }
    }
}
