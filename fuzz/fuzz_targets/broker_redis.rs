//! What a Redis server answers, in any shape that the client library hands over: what is taken is what a second, naive reader
//! takes; an append is confirmed only by the numbers that were demanded, and a missing one never reads as "not stored"; and
//! a server passes only with every setting that the promise rests on.
//!
//! The first byte chooses the question, the second the number of replicas. Each line behind them is a part of an answer:
//! `+text`, `-error`, `:number`, `$bytes` (where `|` stands for a line break), `_` for nothing, `[` and `]` around a list.

#![no_main]

use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use millrace::queue::log::broker::redis::{RedisBroker, RedisSettings, fuzz};
use millrace::queue::log::broker::{BrokerError, SendError};

#[derive(Clone, Debug)]
enum Answer {
    Text(String),
    Error(String),
    Number(i64),
    Bytes(Vec<u8>),
    Nothing,
    List(Vec<Answer>),
}

use Answer::{Bytes, Error, List, Nothing, Number, Text};

impl Answer {
    fn write(&self, to: &mut Vec<u8>) {
        match self {
            Text(text) => to.extend(format!("+{text}\r\n").into_bytes()),
            Error(text) => to.extend(format!("-{text}\r\n").into_bytes()),
            Number(number) => to.extend(format!(":{number}\r\n").into_bytes()),
            Bytes(bytes) => {
                to.extend(format!("${}\r\n", bytes.len()).into_bytes());
                to.extend(bytes);
                to.extend(b"\r\n");
            }
            Nothing => to.extend(b"$-1\r\n"),
            List(parts) => {
                to.extend(format!("*{}\r\n", parts.len()).into_bytes());
                parts.iter().for_each(|part| part.write(to));
            }
        }
    }

    fn resp(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        self.write(&mut bytes);
        bytes
    }

    fn list(&self) -> Option<&[Answer]> {
        match self {
            List(parts) => Some(parts),
            _ => None,
        }
    }

    fn bytes(&self) -> Option<&[u8]> {
        match self {
            Bytes(bytes) => Some(bytes),
            _ => None,
        }
    }

    fn text(&self) -> Option<String> {
        match self {
            Text(text) if text == "OK" => None,
            Text(text) => Some(text.clone()),
            Bytes(bytes) => Some(String::from_utf8_lossy(bytes).into_owned()),
            _ => None,
        }
    }

    /// The server does not have the command, or this user may not call it.
    fn is_forbidden(&self) -> bool {
        let Error(text) = self else {
            return false;
        };
        let (code, rest) = text.split_once(' ').unwrap_or((text, ""));
        code == "NOPERM" || code == "ERR" && rest.to_ascii_lowercase().starts_with("unknown")
    }
}

/// The answers in these lines; lists are at most four deep.
fn answers(lines: &[u8]) -> Vec<Answer> {
    let mut open: Vec<Vec<Answer>> = vec![Vec::new()];
    for line in lines.split(|byte| *byte == b'\n') {
        let (kind, rest) = line.split_first().unwrap_or((&b' ', &[]));
        let text = || String::from_utf8_lossy(rest).replace('\r', "");
        let part = match kind {
            b'+' => Text(text()),
            b'-' => Error(text()),
            b':' => Number(text().parse().unwrap_or(0)),
            b'$' => {
                let broken = |byte: &u8| if *byte == b'|' { b'\n' } else { *byte };
                Bytes(rest.iter().map(broken).collect())
            }
            b'_' => Nothing,
            b'[' if open.len() < 5 => {
                open.push(Vec::new());
                continue;
            }
            b']' if open.len() > 1 => List(open.pop().unwrap_or_default()),
            _ => continue,
        };
        if let Some(last) = open.last_mut() {
            last.push(part);
        }
    }
    while open.len() > 1 {
        let list = List(open.pop().unwrap_or_default());
        open.last_mut().expect("the outermost").push(list);
    }
    open.pop().unwrap_or_default()
}

fn entries(broker: &RedisBroker, answer: &Answer) {
    let entry = |entry: &Answer| {
        let [id, fields, ..] = entry.list()? else {
            return None;
        };
        let id = std::str::from_utf8(id.bytes()?).ok()?;
        let (epoch, sequence) = id.split_once('-')?;
        // As the server writes it: digits, and no zero before them.
        let number = |text: &str| {
            let plain = text == "0" || text.starts_with(|c: char| ('1'..='9').contains(&c));
            let plain = plain && text.bytes().all(|byte| byte.is_ascii_digit());
            text.parse::<u64>().ok().filter(|_| plain)
        };
        let place = (number(epoch)?, number(sequence)?);
        match fields.list()? {
            [field, frame] if field.bytes()? == b"f" => Some((place, frame.bytes()?.to_vec())),
            _ => None,
        }
    };
    let wanted: Option<Vec<_>> = answer
        .list()
        .and_then(|entries| entries.iter().map(entry).collect());
    match fuzz::entries(broker, &answer.resp()) {
        Ok(found) => {
            let found = found.into_iter().map(|stored| {
                let place = stored.place.expect("an id says it");
                ((place.epoch, place.number), stored.frame)
            });
            assert_eq!(Some(found.collect::<Vec<_>>()), wanted);
        }
        Err(error) => {
            assert!(!matches!(error, BrokerError::Lost(_)));
            assert!(wanted.is_none(), "{error}");
        }
    }
}

fn confirmed(broker: &RedisBroker, replicas_min: u32, has_waitaof: bool, answers: &[Answer]) {
    let needed = i64::from(replicas_min);
    let mut rest = answers.iter();
    let mut holds = true;
    if needed > 0 {
        holds &= matches!(rest.next(), Some(Number(count)) if *count >= needed);
    }
    if has_waitaof {
        holds &= matches!(rest.next().and_then(Answer::list), Some([Number(local), Number(count)])
            if *local >= 1 && *count >= needed);
    }
    let resp: Vec<_> = answers.iter().map(Answer::resp).collect();
    match fuzz::confirmed(broker, has_waitaof, &resp) {
        Ok(()) => assert!(holds),
        Err(SendError::Unknown(_)) => assert!(!holds),
        Err(certain) => panic!("{certain} of a group that is stored"),
    }
}

const SETTINGS: [(&str, Option<(&str, &str)>); 4] = [
    ("yes", Some(("aof_enabled", "1"))),
    ("always", None),
    ("no", None),
    ("noeviction", Some(("maxmemory_policy", "noeviction"))),
];

fn judge(broker: &RedisBroker, replicas_min: u32, answers: &[Answer]) {
    let resp: Vec<_> = answers.iter().map(Answer::resp).collect();
    let Ok((warnings, has_waitaof)) = fuzz::judge(broker, &resp) else {
        return;
    };
    let [role, info, settings @ .., waitaof, length] = &answers[..8] else {
        unreachable!();
    };
    assert_eq!(has_waitaof, !matches!(waitaof, Error(_)));
    assert!(!matches!(length, Error(text) if !text.starts_with("NOPERM")));
    let info = info.text().unwrap_or_default();
    let line = |field: &str| {
        let mut lines = info.lines().filter_map(|line| line.split_once(':'));
        let (_, value) = lines.find(|(name, _)| *name == field)?;
        Some(value.trim().to_owned())
    };
    if let Some(version) = line("redis_version") {
        let mut parts = version.split('.').map(|part| part.parse().unwrap_or(0));
        let version: (u32, u32) = (parts.next().unwrap_or(0), parts.next().unwrap_or(0));
        assert!(version >= (6, 2));
    }
    let mut hidden = 0;
    for (answer, (needed, in_info)) in settings.iter().zip(SETTINGS) {
        let shown = answer.list().and_then(|pair| pair.get(1)?.text());
        match (shown, in_info) {
            (Some(value), _) => assert_eq!(value, needed),
            (None, Some((field, wanted))) => match line(field) {
                Some(value) => assert_eq!(value, wanted),
                None => hidden += 1,
            },
            (None, None) => hidden += 1,
        }
    }
    let (says, replicas) = match role {
        List(parts) => (
            parts.first().and_then(Answer::text),
            parts
                .get(2)
                .and_then(Answer::list)
                .map(|list| list.len() as u64),
        ),
        role => {
            assert!(role.is_forbidden());
            (
                line("role"),
                line("connected_slaves").and_then(|count| count.parse().ok()),
            )
        }
    };
    assert!(says.is_none() || says.as_deref() == Some("master"));
    if warnings.is_empty() {
        assert_eq!((says.as_deref(), hidden), (Some("master"), 0));
        assert!(replicas.is_some_and(|count| count >= u64::from(replicas_min)));
    }
}

fn refusal(broker: &RedisBroker, answer: &Answer) {
    let Some(error) = fuzz::refusal(broker, &answer.resp()) else {
        assert!(!matches!(answer, Error(_)));
        return;
    };
    let Error(text) = answer else {
        panic!("{error} of {answer:?}");
    };
    match error {
        SendError::Full(_) => assert!(text.starts_with("OOM")),
        SendError::Stale(_) => {
            assert!(text.starts_with("ERR ") && text.contains("equal or smaller"))
        }
        SendError::Away(_) | SendError::Refused(_) => {
            assert!(text.starts_with(|c: char| c.is_ascii_uppercase()));
        }
        SendError::Unknown(_) => {}
    }
}

fuzz_target!(|input: &[u8]| {
    let [kind, replicas_min, lines @ ..] = input else {
        return;
    };
    let replicas_min = u32::from(replicas_min % 4);
    let broker = RedisBroker::new(RedisSettings {
        url: "redis://localhost".into(),
        stream: "orders".into(),
        replicas_min,
        timeout: Duration::from_secs(1),
    })
    .expect("a client");
    let mut answers = answers(lines);
    match kind % 5 {
        0 => {
            if let Some(answer) = answers.first() {
                entries(&broker, answer);
            }
        }
        1 => confirmed(&broker, replicas_min, false, &answers),
        2 => confirmed(&broker, replicas_min, true, &answers),
        3 => {
            answers.resize(8, Nothing);
            judge(&broker, replicas_min, &answers);
        }
        _ => answers.iter().for_each(|answer| refusal(&broker, answer)),
    }
});
