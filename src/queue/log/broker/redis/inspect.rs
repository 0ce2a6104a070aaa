//! The settings of the server that the promise rests on.

use std::time::Instant;

use ::redis::{Cmd, ServerError, Value, cmd};

use super::BrokerError;
use super::answers;
use super::link::{Address, Link, Replies};

/// A setting that the promise rests on.
struct Setting {
    name: &'static str,
    needed: &'static str,
    reason: &'static str,
    /// The field of `INFO` that says it too, and its value if all is well.
    in_info: Option<(&'static str, &'static str)>,
}

const SETTINGS: [Setting; 4] = [
    Setting {
        name: "appendonly",
        needed: "yes",
        reason: "without it a restart loses groups",
        in_info: Some(("aof_enabled", "1")),
    },
    Setting {
        name: "appendfsync",
        needed: "always",
        reason: "with any other a power cut loses groups that were acknowledged",
        in_info: None,
    },
    Setting {
        name: "no-appendfsync-on-rewrite",
        needed: "no",
        reason: "with yes nothing is flushed while the file is rewritten",
        in_info: None,
    },
    Setting {
        name: "maxmemory-policy",
        needed: "noeviction",
        reason: "any other may evict the log",
        in_info: Some(("maxmemory_policy", "noeviction")),
    },
];

/// The role alone, for a connection that only reads: a lagging replica would seem to have lost groups.
pub(super) fn require_master(
    address: &Address,
    link: &mut Link,
    deadline: Instant,
) -> Result<(), BrokerError> {
    let mut replies = link.exchange(&[cmd("ROLE")], deadline);
    role(address, &replies.next(&address.name)?, "").map(|_| ())
}

/// Reads role, settings and abilities, and writes nothing. Returns a sentence for each thing that could not be checked,
/// or that is not as demanded now.
pub(super) fn inspect(
    address: &Address,
    link: &mut Link,
    stream: &str,
    replicas_min: u32,
    deadline: Instant,
) -> Result<Vec<String>, BrokerError> {
    let mut questions = vec![cmd("ROLE"), cmd("INFO")];
    for setting in SETTINGS {
        questions.push(two("CONFIG", "GET", setting.name));
    }
    // With nothing written on this connection it returns at once.
    let mut probe = two("WAITAOF", "1", "0");
    probe.arg(1);
    questions.push(probe);
    let mut length = cmd("XLEN");
    length.arg(stream);
    questions.push(length);

    let mut replies = link.exchange(&questions, deadline);
    let warnings;
    (warnings, link.has_waitaof) = judge(address, &mut replies, replicas_min)?;
    Ok(warnings)
}

/// The sentences about the answers to all of these questions, and whether the server has `WAITAOF`.
pub(super) fn judge(
    address: &Address,
    replies: &mut Replies,
    replicas_min: u32,
) -> Result<(Vec<String>, bool), BrokerError> {
    let name = &address.name;
    let role_answer = replies.next(name)?;
    let info = match replies.next(name)? {
        Value::BulkString(text) => String::from_utf8_lossy(&text).into_owned(),
        Value::ServerError(error) if forbidden(&error) => String::new(),
        Value::ServerError(error) => return Err(answers::of_question(name, &error)),
        _ => return Err(address.strange("INFO")),
    };
    let mut warnings = Vec::new();
    match role(address, &role_answer, &info)? {
        Some(replicas) if replicas < u64::from(replicas_min) => warnings.push(format!(
            "{name} has {replicas} of the {replicas_min} replicas that queue.redis.replicas_min demands; until they \
             are connected no append is acknowledged"
        )),
        // Half of the servers, without the master, which is the other one of a majority.
        Some(replicas) if u64::from(replicas_min) < replicas.div_ceil(2) => warnings.push(format!(
            "{name} has {replicas} replicas, and queue.redis.replicas_min = {replicas_min} acknowledges groups that no majority \
             of the servers has: after a failover, or with two masters in a partition, they may be missing; set it to \
             {} or more",
            replicas.div_ceil(2)
        )),
        Some(_) => {}
        None => warnings.push(format!(
            "{name} answers this user neither ROLE nor INFO: its being the master could not be checked"
        )),
    }
    check_version(name, &info)?;
    let unchecked = check_settings(address, replies, &info)?;
    check_first_file(name, &info)?;
    let has_waitaof = match replies.next(name)? {
        Value::ServerError(error) if forbidden(&error) => false,
        Value::ServerError(error) => return Err(answers::of_question(name, &error)),
        _ => true,
    };
    // It says which node of a cluster has the slot, and whether the key is a stream's.
    match replies.next(name)? {
        Value::ServerError(error) if error.code() == "NOPERM" => {}
        Value::ServerError(error) => return Err(answers::of_question(name, &error)),
        _ => {}
    }
    if !unchecked.is_empty() {
        warnings.push(format!(
            "{name} does not show its CONFIG to this user: {} could not be checked{}",
            unchecked.join(", "),
            if has_waitaof {
                "; WAITAOF confirms the flush of every append all the same"
            } else {
                ""
            }
        ));
    }
    Ok((warnings, has_waitaof))
}

/// Settings that could be read nowhere.
fn check_settings(
    address: &Address,
    replies: &mut Replies,
    info: &str,
) -> Result<Vec<String>, BrokerError> {
    let name = &address.name;
    let mut unchecked = Vec::new();
    for Setting {
        name: setting,
        needed,
        reason,
        in_info,
    } in SETTINGS
    {
        let value = match replies.next(name)? {
            Value::Array(pair) => text(pair.get(1)),
            Value::Map(pairs) => text(pairs.first().map(|(_, value)| value)),
            Value::ServerError(error) if forbidden(&error) => None,
            Value::ServerError(error) => return Err(answers::of_question(name, &error)),
            _ => return Err(address.strange("CONFIG GET")),
        };
        let (value, wanted) = match (value, in_info) {
            (Some(value), _) => (Some(value), needed),
            (None, Some((field, wanted))) => (line(info, field).map(str::to_owned), wanted),
            (None, None) => (None, needed),
        };
        match value {
            Some(value) if value == wanted => {}
            Some(value) => {
                let value = if wanted == needed {
                    value
                } else {
                    "no".to_owned()
                };
                return Err(BrokerError::Refused(format!(
                    "{name} has {setting} {value} and needs {needed}, since {reason}: run CONFIG SET {setting} \
                     {needed} there, and write the same into its configuration file"
                )));
            }
            None => unchecked.push(format!("{setting} ({needed} is needed)")),
        }
    }
    Ok(unchecked)
}

/// The number of connected replicas of a master; `None` if neither answer says anything.
fn role(address: &Address, answer: &Value, info: &str) -> Result<Option<u64>, BrokerError> {
    let name = &address.name;
    let (role, of, replicas) = match answer {
        Value::Array(parts) => {
            let replicas = match parts.get(2) {
                Some(Value::Array(list)) => Some(list.len() as u64),
                _ => None,
            };
            (text(parts.first()), text(parts.get(1)), replicas)
        }
        Value::ServerError(error) if forbidden(error) => {
            let replicas = line(info, "connected_slaves").and_then(|count| count.parse().ok());
            (
                line(info, "role").map(str::to_owned),
                line(info, "master_host").map(str::to_owned),
                replicas,
            )
        }
        Value::ServerError(error) => return Err(answers::of_question(name, error)),
        _ => return Err(address.strange("ROLE")),
    };
    match role.as_deref() {
        None => Ok(None),
        Some("master") => Ok(replicas),
        Some("slave") => Err(BrokerError::Away(format!(
            "{name} is a replica of {}; it takes no groups until it is promoted, or until queue.redis.url points at \
             the master",
            of.as_deref().unwrap_or("another server")
        ))),
        Some(other) => Err(BrokerError::Refused(format!(
            "{name} is a {other} and keeps no streams; point queue.redis.url at the master"
        ))),
    }
}

/// `XTRIM MINID` came with 6.2.
fn check_version(name: &str, info: &str) -> Result<(), BrokerError> {
    let Some(version) = line(info, "redis_version") else {
        return Ok(());
    };
    let mut parts = version
        .split('.')
        .map(|part| part.parse::<u32>().unwrap_or(0));
    if (parts.next().unwrap_or(0), parts.next().unwrap_or(0)) < (6, 2) {
        return Err(BrokerError::Refused(format!(
            "{name} is Redis {version}; 6.2 or newer is needed"
        )));
    }
    Ok(())
}

/// `CONFIG SET appendonly yes`, and a replica's first synchronisation, begin a file that counts once it is complete: a
/// server killed before that comes back without it. Redis before 7.2 acknowledges all the same. The second such file
/// of a process cannot be told from a rewrite of the first: there only `WAITAOF` helps.
fn check_first_file(name: &str, info: &str) -> Result<(), BrokerError> {
    let says = |field, value| line(info, field) == Some(value);
    let incomplete = says("aof_rewrite_in_progress", "1")
        || says("aof_rewrite_scheduled", "1")
        || says("aof_last_bgrewrite_status", "err");
    if says("aof_base_size", "0") && incomplete {
        return Err(BrokerError::Away(format!(
            "{name} is writing its first append-only file and would lose groups until that is complete"
        )));
    }
    Ok(())
}

/// The command is not there (old, renamed, managed) or not allowed to this user.
fn forbidden(error: &ServerError) -> bool {
    let text = error.details().unwrap_or_default().to_ascii_lowercase();
    error.code() == "NOPERM" || (error.code() == "ERR" && text.starts_with("unknown"))
}

fn line<'a>(info: &'a str, field: &str) -> Option<&'a str> {
    info.lines()
        .find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))
        .map(str::trim)
}

fn text(value: Option<&Value>) -> Option<String> {
    match value? {
        Value::BulkString(bytes) => Some(String::from_utf8_lossy(bytes).into_owned()),
        Value::SimpleString(text) => Some(text.clone()),
        _ => None,
    }
}

fn two(command: &str, first: &str, second: &str) -> Cmd {
    let mut made = cmd(command);
    made.arg(first).arg(second);
    made
}
