//! The settings of a broker that an acknowledgement rests on.

use std::collections::HashMap;

use super::super::BrokerError;
use super::{FRAME_BYTES_MAX, MESSAGE_OVERHEAD_BYTES};

/// Settings without which `SUCCESS` does not say that a message is on the disk: name, the only good value, and
/// why. A broker that does not know a setting passes.
const NEEDED: &[(&str, &str, &str)] = &[
    (
        "flushDiskType",
        "SYNC_FLUSH",
        "otherwise it acknowledges orders before they are on its disk",
    ),
    (
        "enableDLegerCommitLog",
        "false",
        "DLedger acknowledges orders before they are on a disk",
    ),
    (
        "duplicationEnable",
        "false",
        "otherwise messages get no offsets of their own",
    ),
];

/// Judges the settings that the broker `name` printed, one `key=value` a line. Returns warnings, a sentence each.
///
/// # Errors
/// [`BrokerError::Refused`] names the setting, its value and the value needed; [`BrokerError::Away`] if the broker
/// is no master now.
pub(super) fn judge(
    name: &str,
    printed: &str,
    replicas: usize,
) -> Result<Vec<String>, BrokerError> {
    let settings: HashMap<&str, &str> = printed
        .lines()
        .filter_map(|line| line.split_once('='))
        .map(|(key, value)| (key.trim(), value.trim()))
        .collect();
    let number = |key: &str| {
        settings
            .get(key)
            .and_then(|value| value.parse::<usize>().ok())
    };
    for &(key, needed, why) in NEEDED {
        if let Some(&value) = settings.get(key)
            && !value.eq_ignore_ascii_case(needed)
        {
            let sentence = format!(
                "The RocketMQ broker {name} has {key} = {value}; Millrace needs {needed}, {why}"
            );
            return Err(BrokerError::Refused(sentence));
        }
    }
    let size_min = FRAME_BYTES_MAX + MESSAGE_OVERHEAD_BYTES;
    if let Some(size) = number("maxMessageSize").filter(|&size| size < size_min) {
        let sentence = format!(
            "The RocketMQ broker {name} has maxMessageSize = {size}; Millrace needs at least {size_min}, the length of its greatest group"
        );
        return Err(BrokerError::Refused(sentence));
    }
    let mut warnings = Vec::new();
    match settings.get("brokerRole").copied() {
        Some("SLAVE") => {
            return Err(BrokerError::Away(format!("the broker {name} is a replica now (brokerRole = SLAVE)")));
        }
        Some("ASYNC_MASTER") if replicas > 0 => warnings.push(format!(
            "The RocketMQ broker {name} has brokerRole = ASYNC_MASTER: an acknowledged order is on its disk only, and a failover to a replica may lose it."
        )),
        // From 5.0 on the number counts the master itself, and 1 is its default.
        Some("SYNC_MASTER")
            if number("inSyncReplicas").is_some_and(|count| count < 2)
                && settings.get("allAckInSyncStateSet").copied() != Some("true") =>
        {
            warnings.push(format!(
                "The RocketMQ broker {name} has brokerRole = SYNC_MASTER with inSyncReplicas = 1: it acknowledges orders without waiting for a replica."
            ));
        }
        _ => {}
    }
    match (number("fileReservedTime"), number("diskMaxUsedSpaceRatio")) {
        (Some(hours), Some(percent)) => warnings.push(format!(
            "The RocketMQ broker {name} deletes orders after {hours} hours whether they were read or not (fileReservedTime), and earlier once its disk is {percent} % full (diskMaxUsedSpaceRatio)."
        )),
        (Some(hours), None) => warnings.push(format!(
            "The RocketMQ broker {name} deletes orders after {hours} hours whether they were read or not (fileReservedTime)."
        )),
        (None, _) => {}
    }
    if !settings.contains_key("flushDiskType") {
        warnings.push(unread(name, "its settings have no flushDiskType"));
    }
    Ok(warnings)
}

/// The warning that the settings could not be judged.
pub(super) fn unread(name: &str, why: &str) -> String {
    format!(
        "The settings of the RocketMQ broker {name} could not be read ({why}); make sure that flushDiskType is SYNC_FLUSH, or acknowledged orders may be lost."
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "brokerRole=ASYNC_MASTER\nflushDiskType=SYNC_FLUSH\nmaxMessageSize=4194304\nenableDLegerCommitLog=false\nfileReservedTime=72\nduplicationEnable=false\ninSyncReplicas=1\n";

    fn with(changes: &[(&str, &str)], replicas: usize) -> Result<Vec<String>, BrokerError> {
        let printed = changes.iter().fold(GOOD.to_owned(), |printed, (from, to)| {
            assert!(printed.contains(from), "{from}");
            printed.replace(from, to)
        });
        judge("a", &printed, replicas)
    }

    #[test]
    fn each_setting_that_breaks_the_promise_is_refused_with_its_value_and_the_value_needed() {
        for (from, to, needed) in [
            ("SYNC_FLUSH", "ASYNC_FLUSH", "SYNC_FLUSH"),
            (
                "enableDLegerCommitLog=false",
                "enableDLegerCommitLog=true",
                "false",
            ),
            ("duplicationEnable=false", "duplicationEnable=true", "false"),
            ("maxMessageSize=4194304", "maxMessageSize=65536", "1114112"),
        ] {
            let Err(BrokerError::Refused(sentence)) = with(&[(from, to)], 0) else {
                panic!("{to} was not refused")
            };
            let value = to.rsplit('=').next().unwrap();
            assert!(
                sentence.contains(value) && sentence.contains(needed),
                "{sentence}"
            );
        }
    }

    #[test]
    fn replication_that_an_acknowledgement_does_not_wait_for_is_warned_of() {
        assert_eq!(with(&[], 0).unwrap().len(), 1);
        assert!(with(&[], 1).unwrap()[0].contains("ASYNC_MASTER"));
        assert!(
            with(&[("ASYNC_MASTER", "SYNC_MASTER")], 1).unwrap()[0].contains("inSyncReplicas = 1")
        );
        assert_eq!(
            with(
                &[
                    ("ASYNC_MASTER", "SYNC_MASTER"),
                    ("inSyncReplicas=1", "inSyncReplicas=2")
                ],
                1
            )
            .unwrap()
            .len(),
            1
        );
    }

    #[test]
    fn the_retention_is_named_in_hours() {
        assert!(with(&[("=72", "=48")], 0).unwrap()[0].contains("48 hours"));
    }

    #[test]
    fn a_replica_takes_no_orders() {
        assert!(matches!(
            with(&[("ASYNC_MASTER", "SLAVE")], 0),
            Err(BrokerError::Away(_))
        ));
    }

    #[test]
    fn settings_that_say_nothing_are_warned_of() {
        assert!(judge("a", "", 0).unwrap()[0].contains("flushDiskType"));
    }
}
