//! Messages of PostgreSQL's output plugin. The first byte chooses: any bytes, each message behind its length in one byte, where
//! a second, naive reader finds the same tables and values or refuses the same; or messages that were made from the
//! input, which say what they were made of, at no other length.

#![no_main]

use std::collections::HashMap;

use arbitrary::{Arbitrary, Unstructured};
use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use millrace::order::UnixMillis;
use millrace::store::pgoutput::{Decoder, Message, Row};

/// The name of a table and those of its columns.
type Table = (String, Vec<String>);

#[derive(Arbitrary, Clone, Debug, PartialEq, Eq)]
enum Value {
    Null,
    Unchanged,
    Is(Vec<u8>),
}

#[derive(Arbitrary, Clone, Debug, PartialEq, Eq)]
enum Said {
    Relation {
        id: u8,
        name: String,
        columns: Vec<String>,
    },
    Insert {
        id: u8,
        row: Vec<Value>,
    },
    Update {
        id: u8,
        old: Option<(bool, Vec<Value>)>,
        new: Vec<Value>,
    },
    Other(u8),
}

/// A reader of one message, which takes from the front.
struct Front<'a>(&'a [u8]);

impl<'a> Front<'a> {
    fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let (front, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(front)
    }

    fn number(&mut self, bytes: usize) -> Option<u64> {
        let bytes = self.take(bytes)?;
        Some(
            bytes
                .iter()
                .fold(0, |sum, byte| sum << 8 | u64::from(*byte)),
        )
    }

    fn text(&mut self) -> Option<String> {
        let length = self.0.iter().position(|byte| *byte == 0)?;
        let text = String::from_utf8(self.take(length)?.to_vec()).ok()?;
        self.take(1)?;
        Some(text)
    }

    fn row(&mut self) -> Option<Vec<Value>> {
        let mut row = Vec::new();
        for _ in 0..self.number(2)? {
            row.push(match self.number(1)? as u8 {
                b'n' => Value::Null,
                b'u' => Value::Unchanged,
                b'b' => {
                    let length = self.number(4)?;
                    Value::Is(self.take(length as usize)?.to_vec())
                }
                _ => return None,
            });
        }
        Some(row)
    }

    /// The message, which has to end where the bytes do, with the number of its table.
    fn message(mut self) -> Option<(Said, u32)> {
        let mut table = 0;
        let said = match self.number(1)? as u8 {
            b'R' => {
                table = self.number(4)? as u32;
                self.text()?;
                let name = self.text()?;
                self.take(1)?;
                let mut columns = Vec::new();
                for _ in 0..self.number(2)? {
                    self.take(1)?;
                    columns.push(self.text()?);
                    self.take(8)?;
                }
                Said::Relation {
                    id: 0,
                    name,
                    columns,
                }
            }
            b'I' => {
                table = self.number(4)? as u32;
                (self.take(1)? == b"N").then_some(())?;
                Said::Insert {
                    id: 0,
                    row: self.row()?,
                }
            }
            b'U' => {
                table = self.number(4)? as u32;
                let mut old = None;
                let mut tag = self.take(1)?;
                if tag == b"K" || tag == b"O" {
                    old = Some((tag == b"O", self.row()?));
                    tag = self.take(1)?;
                }
                (tag == b"N").then_some(())?;
                Said::Update {
                    id: 0,
                    old,
                    new: self.row()?,
                }
            }
            kind @ (b'D' | b'T' | b'O' | b'Y' | b'M') => {
                self.0 = &[];
                Said::Other(kind)
            }
            _ => return None,
        };
        self.0.is_empty().then_some((said, table))
    }
}

fn put_row(bytes: &mut Vec<u8>, row: &[Value]) {
    bytes.extend((row.len() as u16).to_be_bytes());
    for value in row {
        match value {
            Value::Null => bytes.push(b'n'),
            Value::Unchanged => bytes.push(b'u'),
            Value::Is(value) => {
                bytes.push(b'b');
                bytes.extend((value.len() as u32).to_be_bytes());
                bytes.extend(value);
            }
        }
    }
}

/// The message in the form of the protocol.
fn written(said: &Said) -> Vec<u8> {
    let mut bytes = Vec::new();
    match said {
        Said::Relation { id, name, columns } => {
            bytes.extend([b'R', 0, 0, 0, *id]);
            bytes.extend(b"millrace\0");
            bytes.extend(name.replace('\0', "").as_bytes());
            bytes.extend(b"\0d");
            bytes.extend((columns.len() as u16).to_be_bytes());
            for column in columns {
                bytes.push(0);
                bytes.extend(column.replace('\0', "").as_bytes());
                bytes.extend(b"\0\0\0\0\x14\xff\xff\xff\xff");
            }
        }
        Said::Insert { id, row } => {
            bytes.extend([b'I', 0, 0, 0, *id, b'N']);
            put_row(&mut bytes, row);
        }
        Said::Update { id, old, new } => {
            bytes.extend([b'U', 0, 0, 0, *id]);
            if let Some((is_whole, old)) = old {
                bytes.push(if *is_whole { b'O' } else { b'K' });
                put_row(&mut bytes, old);
            }
            bytes.push(b'N');
            put_row(&mut bytes, new);
        }
        Said::Other(kind) => bytes.push(b"DTOYM"[usize::from(*kind) % 5]),
    }
    bytes
}

fn same_row(row: &Row, (name, columns): &Table, values: &[Value]) {
    assert_eq!(row.table(), name);
    for column in columns {
        // The first of its name, as in any table.
        let at = columns.iter().position(|other| other == column);
        let value = match &values[at.expect("it is there")] {
            Value::Is(bytes) => Some(bytes.as_slice()),
            Value::Null | Value::Unchanged => None,
        };
        assert_eq!(row.bytes(column).expect("a column"), value);
        let text = value.map(std::str::from_utf8).transpose();
        assert_eq!(row.text(column).ok(), text.ok());
        let number = value.map(|bytes| {
            let wide = bytes
                .iter()
                .fold(0_u64, |sum, byte| sum << 8 | u64::from(*byte));
            match bytes.len() {
                2 => Some(i64::from(wide as u16 as i16)),
                4 => Some(i64::from(wide as u32 as i32)),
                8 => Some(wide as i64),
                _ => None,
            }
        });
        match number {
            Some(None) => assert!(row.integer(column).is_err() && row.moment(column).is_err()),
            number => {
                assert_eq!(row.integer(column).expect("a number"), number.flatten());
                let moment = row.moment(column).expect("a moment");
                assert_eq!(moment, number.flatten().map(moment_of));
            }
        }
    }
    let missing = columns.concat() + "?";
    assert!(row.bytes(&missing).is_err());
    assert!(matches!(row.text_if_there(&missing), Ok(None)));
}

fn moment_of(micros: i64) -> UnixMillis {
    let millis = i128::from(micros).div_euclid(1_000) + 946_684_800_000;
    UnixMillis(i64::try_from(millis).unwrap_or(i64::MAX))
}

/// Decodes one message and compares; whether it was taken.
fn check(decoder: &mut Decoder, tables: &mut HashMap<u32, Table>, bytes: &[u8]) -> bool {
    let decoded = decoder.decode(Bytes::copy_from_slice(bytes));
    let read = Front(bytes).message().filter(|(said, table)| {
        let Some((_, columns)) = tables.get(table) else {
            return !matches!(said, Said::Insert { .. } | Said::Update { .. });
        };
        let fits = |row: &Vec<Value>| row.len() == columns.len();
        match said {
            Said::Insert { row, .. } => fits(row),
            Said::Update { old, new, .. } => {
                fits(new) && old.as_ref().is_none_or(|(_, old)| fits(old))
            }
            _ => true,
        }
    });
    let Some((said, table)) = read else {
        assert!(decoded.is_err(), "{decoded:?}");
        return false;
    };
    match (decoded.expect("a message"), said) {
        (Message::Insert(row), Said::Insert { row: wanted, .. }) => {
            same_row(&row, &tables[&table], &wanted);
        }
        (
            Message::Update { old, new },
            Said::Update {
                old: was,
                new: mut wanted,
                ..
            },
        ) => {
            // A key alone is no row.
            let was = was.and_then(|(is_whole, row)| is_whole.then_some(row));
            assert_eq!(old.is_some(), was.is_some());
            if let (Some(old), Some(was)) = (old, was) {
                same_row(&old, &tables[&table], &was);
                for (value, was) in wanted.iter_mut().zip(was) {
                    if *value == Value::Unchanged {
                        *value = was;
                    }
                }
            }
            same_row(&new, &tables[&table], &wanted);
        }
        (Message::Other, Said::Relation { name, columns, .. }) => {
            tables.insert(table, (name, columns));
        }
        (Message::Other, Said::Other(_)) => {}
        (decoded, said) => panic!("{decoded:?} of {said:?}"),
    }
    true
}

fuzz_target!(|input: &[u8]| {
    let Some((kind, mut rest)) = input.split_first() else {
        return;
    };
    let (mut decoder, mut tables) = (Decoder::default(), HashMap::new());
    if kind % 2 == 0 {
        while let Some((length, more)) = rest.split_first() {
            let (message, after) = more.split_at(usize::from(*length).min(more.len()));
            check(&mut decoder, &mut tables, message);
            rest = after;
        }
        return;
    }
    let Ok(mut messages) = Unstructured::new(rest).arbitrary::<Vec<Said>>() else {
        return;
    };
    messages.truncate(16);
    for mut said in messages {
        // Few tables, and rows that mostly fit.
        if let Said::Relation { id, .. } | Said::Insert { id, .. } | Said::Update { id, .. } =
            &mut said
        {
            *id %= 2;
            let width = tables
                .get(&u32::from(*id))
                .map(|(_, columns): &Table| columns.len());
            let fit = |row: &mut Vec<Value>| row.resize(width.unwrap_or(0), Value::Unchanged);
            match &mut said {
                Said::Insert { row, .. } => fit(row),
                Said::Update { old, new, .. } => {
                    fit(new);
                    if let Some((_, old)) = old {
                        fit(old);
                    }
                }
                _ => {}
            }
        }
        let bytes = written(&said);
        let is_row = matches!(said, Said::Insert { .. } | Said::Update { .. });
        let taken = check(&mut decoder, &mut tables, &bytes);
        let Some((_, table)) = Front(&bytes).message() else {
            panic!("{said:?} is written wrongly");
        };
        assert_eq!(taken, !is_row || tables.contains_key(&table));
        if !matches!(said, Said::Other(_)) {
            for length in 0..bytes.len().min(600) {
                assert!(
                    decoder
                        .decode(Bytes::copy_from_slice(&bytes[..length]))
                        .is_err()
                );
            }
            let longer = [bytes.as_slice(), b"\0"].concat();
            assert!(decoder.decode(longer.into()).is_err());
        }
    }
});
