//! Error codes of Redis and Valkey, sorted once: what each says about the command that it answers.

use ::redis::ServerError;

use super::{BrokerError, SendError};

/// The consequence of an error code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Not executed: no memory left.
    Full,
    /// Not executed: the server takes no such command now, and may later.
    Away,
    /// Not executed, until a person changes something.
    Refused,
    /// Not executed: the id is not above the last one of the stream.
    NotAbove,
    /// Nothing is certain.
    Unknown,
}

use Verdict::{Away, Full, NotAbove, Refused, Unknown};

/// Codes, with their consequence and the remedy. The server sends each of them before it executes the command.
///
/// `MISCONF` is [`Away`], not [`Full`]: the code says that a snapshot failed, and does not say that the disk is full (the cause may
/// be a failed fork or a missing directory). A full disk under `appendfsync always` ends the server instead.
const CODES: [(&str, Verdict, &str); 16] = [
    (
        "OOM",
        Full,
        "raise maxmemory, or wait until older groups are forgotten",
    ),
    (
        "MISCONF",
        Away,
        "look for the failed snapshot in the server's log",
    ),
    (
        "READONLY",
        Away,
        "it is a replica now; point queue.redis.url at the master",
    ),
    ("LOADING", Away, "it is reading its files"),
    ("MASTERDOWN", Away, "it is a replica without its master"),
    (
        "CLUSTERDOWN",
        Away,
        "the cluster has no owner for the stream's slot",
    ),
    ("TRYAGAIN", Away, "the stream's slot is moving"),
    (
        "NOREPLICAS",
        Away,
        "fewer replicas are connected than min-replicas-to-write demands",
    ),
    ("BUSY", Away, "a script keeps it busy"),
    (
        "MOVED",
        Refused,
        "the stream's slot is on the node named; point queue.redis.url there",
    ),
    (
        "ASK",
        Refused,
        "the stream's slot is moving to the node named; point queue.redis.url there",
    ),
    ("NOAUTH", Refused, "queue.redis.url needs a password"),
    (
        "WRONGPASS",
        Refused,
        "correct user and password in queue.redis.url",
    ),
    (
        "NOPERM",
        Refused,
        "the user needs xadd, xrange, xtrim, xlen, xgroup, wait and waitaof on this key",
    ),
    (
        "DENIED",
        Refused,
        "protected mode takes local connections only; set a password or a bind address",
    ),
    (
        "WRONGTYPE",
        Refused,
        "the key of queue.redis.stream holds something else; choose another",
    ),
];

/// Texts behind the code `ERR`, which stands for anything.
const TEXTS: [(&str, Verdict, &str); 5] = [
    (
        "equal or smaller than the target stream top item",
        NotAbove,
        "a later group is stored",
    ),
    ("max number of clients reached", Away, "raise maxclients"),
    ("unknown command", Refused, "Redis 6.2 or Valkey is needed"),
    ("appendonly is disabled", Refused, "set appendonly yes"),
    (
        "DB index is out of range",
        Refused,
        "correct the database number in queue.redis.url",
    ),
];

fn sort(code: &str, text: &str) -> (Verdict, &'static str) {
    let found = if code == "ERR" {
        TEXTS.iter().find(|(part, ..)| text.contains(part))
    } else {
        CODES.iter().find(|(name, ..)| *name == code)
    };
    found.map_or(
        (Unknown, "this code says nothing certain"),
        |(_, verdict, remedy)| (*verdict, *remedy),
    )
}

/// The consequence of an answer.
pub(super) fn verdict(error: &ServerError) -> Verdict {
    sort(error.code(), error.details().unwrap_or_default()).0
}

/// Names the server, its answer and the remedy.
pub(super) fn sentence(server: &str, error: &ServerError) -> String {
    let (code, text) = (error.code(), error.details().unwrap_or_default());
    format!("{server} answered {code} {text} ({})", sort(code, text).1)
}

/// The error of an append that the server answered so.
pub(super) fn of_send(server: &str, error: &ServerError) -> SendError {
    let said = sentence(server, error);
    match verdict(error) {
        Full => SendError::Full(said),
        Away => SendError::Away(said),
        Refused => SendError::Refused(said),
        NotAbove => SendError::Stale(said),
        Unknown => SendError::Unknown(said),
    }
}

/// The error of a question that the server answered so: one that is not understood may be asked again.
pub(super) fn of_question(server: &str, error: &ServerError) -> BrokerError {
    let said = sentence(server, error);
    match verdict(error) {
        Refused => BrokerError::Refused(said),
        Full | Away | NotAbove | Unknown => BrokerError::Away(said),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(line: &str) -> ServerError {
        let value = ::redis::parse_redis_value(format!("-{line}\r\n").as_bytes()).unwrap();
        match value {
            ::redis::Value::ServerError(error) => error,
            other => panic!("{other:?}"),
        }
    }

    /// Lines as Redis 7.0 and Valkey 9 send them.
    const LINES: [(&str, Verdict); 25] = [
        (
            "OOM command not allowed when used memory > 'maxmemory'.",
            Full,
        ),
        (
            "MISCONF Redis is configured to save RDB snapshots, but it's currently unable to persist to disk.",
            Away,
        ),
        (
            "MISCONF Errors writing to the AOF file: No space left on device",
            Away,
        ),
        (
            "READONLY You can't write against a read only replica.",
            Away,
        ),
        ("LOADING Redis is loading the dataset in memory", Away),
        (
            "MASTERDOWN Link with MASTER is down and replica-serve-stale-data is set to 'no'.",
            Away,
        ),
        ("CLUSTERDOWN The cluster is down", Away),
        (
            "TRYAGAIN Multiple keys request during rehashing of slot",
            Away,
        ),
        ("NOREPLICAS Not enough good replicas to write.", Away),
        ("BUSY Redis is busy running a script.", Away),
        ("MOVED 3999 127.0.0.1:6381", Refused),
        ("ASK 3999 127.0.0.1:6381", Refused),
        ("NOAUTH Authentication required.", Refused),
        (
            "WRONGPASS invalid username-password pair or user is disabled.",
            Refused,
        ),
        (
            "NOPERM this user has no permissions to run the 'xadd' command",
            Refused,
        ),
        ("DENIED Redis is running in protected mode", Refused),
        (
            "WRONGTYPE Operation against a key holding the wrong kind of value",
            Refused,
        ),
        (
            "ERR The ID specified in XADD is equal or smaller than the target stream top item",
            NotAbove,
        ),
        ("ERR max number of clients reached", Away),
        (
            "ERR unknown command 'XADD', with args beginning with: ",
            Refused,
        ),
        (
            "ERR WAITAOF cannot be used when numlocal is set but appendonly is disabled.",
            Refused,
        ),
        ("ERR DB index is out of range", Refused),
        ("ERR something new", Unknown),
        (
            "UNBLOCKED force unblock from blocking operation, instance state changed (master -> replica?)",
            Unknown,
        ),
        ("NEWCODE OOM in its text decides nothing", Unknown),
    ];

    #[test]
    fn every_code_has_its_verdict_and_is_named_in_the_sentence() {
        for (line, wanted) in LINES {
            let error = answer(line);
            assert_eq!(verdict(&error), wanted, "{line}");
            assert!(
                sentence("redis h:1", &error).contains(line.split(' ').next().unwrap()),
                "{line}"
            );
            let sent = of_send("redis h:1", &error);
            let fits = match wanted {
                Full => matches!(sent, SendError::Full(_)),
                Away => matches!(sent, SendError::Away(_)),
                Refused => matches!(sent, SendError::Refused(_)),
                NotAbove => matches!(sent, SendError::Stale(_)),
                Unknown => matches!(sent, SendError::Unknown(_)),
            };
            assert!(fits, "{line}: {sent:?}");
            let asked = of_question("redis h:1", &error);
            assert_eq!(
                matches!(asked, BrokerError::Refused(_)),
                wanted == Refused,
                "{line}"
            );
        }
    }

    #[test]
    fn every_row_of_the_tables_has_a_line() {
        for (code, ..) in CODES {
            assert!(
                LINES
                    .iter()
                    .any(|(line, _)| line.starts_with(&format!("{code} "))),
                "{code}"
            );
        }
        for (text, ..) in TEXTS {
            assert!(LINES.iter().any(|(line, _)| line.contains(text)), "{text}");
        }
    }

    #[test]
    fn the_address_of_the_node_that_has_the_slot_is_named() {
        let SendError::Refused(said) = of_send("redis h:1", &answer("MOVED 3999 127.0.0.1:6381"))
        else {
            panic!()
        };
        assert!(said.contains("127.0.0.1:6381"), "{said}");
    }
}
