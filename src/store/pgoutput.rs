//! The messages of PostgreSQL's output plugin `pgoutput`, protocol version 1, with values in their types' binary form.
//!
//! Format: PostgreSQL documentation, "Logical Replication Message Formats". All integers big-endian. A transaction is
//! one `Begin`, its changes and one `Commit`, complete and in the order of commits. Each table is described before
//! its first row. `Begin` and `Commit` are read by `pgwire-replication`, which leaves the rows to its users.

use std::collections::HashMap;
use std::sync::Arc;

use bytes::{Buf, Bytes};

use super::StoreError;
use crate::order::UnixMillis;

/// 2000-01-01T00:00:00Z, PostgreSQL's epoch, in Unix milliseconds.
const POSTGRES_EPOCH_MS: i64 = 946_684_800_000;

/// A position in the write-ahead log, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Lsn(pub u64);

impl std::fmt::Display for Lsn {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:X}/{:X}", self.0 >> 32, self.0 & 0xFFFF_FFFF)
    }
}

/// One message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// A new row.
    Insert(Row),
    /// A changed row.
    Update {
        /// As it was, if the table's replica identity tells.
        old: Option<Row>,
        /// As it is.
        new: Row,
    },
    /// A row is gone, or whole tables, or what is said is of no use here.
    Other,
}

/// A table.
#[derive(Debug, PartialEq, Eq)]
struct Relation {
    name: String,
    columns: Vec<String>,
}

/// The value of a column.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Value {
    Null,
    /// A long value that this change left as it was, and that is not told.
    Unchanged,
    Is(Bytes),
}

/// A row of a table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    relation: Arc<Relation>,
    values: Vec<Value>,
}

impl Row {
    /// Name of its table.
    pub fn table(&self) -> &str {
        &self.relation.name
    }

    /// The binary form of a column; `None` if it is NULL, or too long to be told again. Long values are taken from
    /// the row as it was, where it is known.
    ///
    /// # Errors
    /// If the table has no such column.
    pub fn bytes(&self, column: &str) -> Result<Option<&[u8]>, StoreError> {
        let mut columns = self.relation.columns.iter();
        let at = columns.position(|name| name == column);
        match at.and_then(|at| self.values.get(at)) {
            Some(Value::Is(bytes)) => Ok(Some(bytes)),
            Some(Value::Null | Value::Unchanged) => Ok(None),
            None => Err(self.unexpected(column, "there is no such column")),
        }
    }

    /// A text.
    ///
    /// # Errors
    /// If it is none.
    pub fn text(&self, column: &str) -> Result<Option<&str>, StoreError> {
        let text = self.bytes(column)?.map(std::str::from_utf8).transpose();
        text.map_err(|_| self.unexpected(column, "is no text"))
    }

    /// The same of a column that the table may not have had when the change was made.
    ///
    /// # Errors
    /// If it is none.
    pub fn text_if_there(&self, column: &str) -> Result<Option<&str>, StoreError> {
        let is_there = self.relation.columns.iter().any(|name| name == column);
        if is_there {
            self.text(column)
        } else {
            Ok(None)
        }
    }

    /// A whole number of any width.
    ///
    /// # Errors
    /// If it is none.
    pub fn integer(&self, column: &str) -> Result<Option<i64>, StoreError> {
        let Some(mut bytes) = self.bytes(column)? else {
            return Ok(None);
        };
        match bytes.len() {
            2 => Ok(Some(i64::from(bytes.get_i16()))),
            4 => Ok(Some(i64::from(bytes.get_i32()))),
            8 => Ok(Some(bytes.get_i64())),
            _ => Err(self.unexpected(column, "is no whole number")),
        }
    }

    /// A moment, to the millisecond below.
    ///
    /// # Errors
    /// If it is none.
    pub fn moment(&self, column: &str) -> Result<Option<UnixMillis>, StoreError> {
        Ok(self.integer(column)?.map(moment))
    }

    /// A column that is never NULL.
    ///
    /// # Errors
    /// If it is.
    pub fn must<T>(&self, column: &str, value: Option<T>) -> Result<T, StoreError> {
        value.ok_or_else(|| self.unexpected(column, "is NULL"))
    }

    /// An error about a column.
    pub fn unexpected(&self, column: &str, what: &str) -> StoreError {
        let table = self.table();
        StoreError::Data(format!("a change of {table}: {column}: {what}"))
    }

    /// Takes what the change has left as it was from the row before it.
    fn complete(&mut self, old: &Row) {
        for (value, old) in self.values.iter_mut().zip(&old.values) {
            if *value == Value::Unchanged {
                *value = old.clone();
            }
        }
    }
}

/// Decodes the messages of one stream, which describes each table anew.
#[derive(Debug, Default)]
pub struct Decoder {
    relations: HashMap<u32, Arc<Relation>>,
}

impl Decoder {
    /// Decodes one message.
    ///
    /// # Errors
    /// If it is not one of this protocol.
    pub fn decode(&mut self, message: Bytes) -> Result<Message, StoreError> {
        let kind = message.first().copied().unwrap_or(b'?');
        let mut rest = Rest(message);
        self.read(&mut rest).ok_or_else(|| {
            let kind = char::from(kind);
            StoreError::Data(format!(
                "the write-ahead log is decoded into a message {kind:?} that is damaged"
            ))
        })
    }

    fn read(&mut self, rest: &mut Rest) -> Option<Message> {
        let message = match rest.u8()? {
            b'R' => {
                let id = rest.u32()?;
                rest.text()?;
                let name = rest.text()?;
                rest.u8()?;
                let columns = (0..rest.u16()?).map(|_| {
                    rest.u8()?;
                    let column = rest.text();
                    rest.u32()?;
                    rest.u32()?;
                    column
                });
                let columns = columns.collect::<Option<_>>()?;
                // A message that is refused describes nothing.
                rest.0.is_empty().then_some(())?;
                self.relations
                    .insert(id, Arc::new(Relation { name, columns }));
                Message::Other
            }
            b'I' => {
                let relation = self.relations.get(&rest.u32()?)?;
                if rest.u8()? != b'N' {
                    return None;
                }
                Message::Insert(rest.row(relation)?)
            }
            b'U' => {
                let relation = self.relations.get(&rest.u32()?)?;
                let mut tag = rest.u8()?;
                let mut old = None;
                if matches!(tag, b'K' | b'O') {
                    let row = rest.row(relation)?;
                    // A key alone has NULL in every other column.
                    old = (tag == b'O').then_some(row);
                    tag = rest.u8()?;
                }
                if tag != b'N' {
                    return None;
                }
                let mut new = rest.row(relation)?;
                if let Some(old) = &old {
                    new.complete(old);
                }
                Message::Update { old, new }
            }
            // Delete, truncate, origin, type, message.
            b'D' | b'T' | b'O' | b'Y' | b'M' => return Some(Message::Other),
            _ => return None,
        };
        rest.0.is_empty().then_some(message)
    }
}

/// The part of a message that is not read yet.
struct Rest(Bytes);

impl Rest {
    fn u8(&mut self) -> Option<u8> {
        self.0.try_get_u8().ok()
    }

    fn u16(&mut self) -> Option<u16> {
        self.0.try_get_u16().ok()
    }

    fn u32(&mut self) -> Option<u32> {
        self.0.try_get_u32().ok()
    }

    /// A text that ends with a zero.
    fn text(&mut self) -> Option<String> {
        let end = self.0.iter().position(|byte| *byte == 0)?;
        let text = self.0.split_to(end);
        self.0.advance(1);
        String::from_utf8(text.into()).ok()
    }

    fn row(&mut self, relation: &Arc<Relation>) -> Option<Row> {
        let values = (0..self.u16()?)
            .map(|_| self.value())
            .collect::<Option<Vec<_>>>()?;
        let relation = Arc::clone(relation);
        (values.len() == relation.columns.len()).then_some(Row { relation, values })
    }

    fn value(&mut self) -> Option<Value> {
        match self.u8()? {
            b'n' => Some(Value::Null),
            b'u' => Some(Value::Unchanged),
            b'b' => {
                let length = usize::try_from(self.u32()?).ok()?;
                (length <= self.0.len()).then(|| Value::Is(self.0.split_to(length)))
            }
            // Text is sent for types without a binary form alone, and no table has one.
            _ => None,
        }
    }
}

/// From microseconds since 2000.
pub(super) fn moment(micros: i64) -> UnixMillis {
    UnixMillis(micros.div_euclid(1_000).saturating_add(POSTGRES_EPOCH_MS))
}

#[cfg(test)]
mod tests {
    use bytes::{BufMut, BytesMut};

    use super::*;

    fn relation(id: u32, name: &str, columns: &[&str]) -> Bytes {
        let mut message = BytesMut::from(&b"R"[..]);
        message.put_u32(id);
        for text in ["millrace", name] {
            message.put_slice(text.as_bytes());
            message.put_u8(0);
        }
        message.put_u8(b'd');
        message.put_u16(columns.len() as u16);
        for column in columns {
            message.put_u8(0);
            message.put_slice(column.as_bytes());
            message.put_u8(0);
            message.put_u32(20);
            message.put_i32(-1);
        }
        message.freeze()
    }

    fn row(message: &mut BytesMut, values: &[Option<&[u8]>]) {
        message.put_u16(values.len() as u16);
        for value in values {
            match value {
                None => message.put_u8(b'n'),
                Some(b"?") => message.put_u8(b'u'),
                Some(value) => {
                    message.put_u8(b'b');
                    message.put_u32(value.len() as u32);
                    message.put_slice(value);
                }
            }
        }
    }

    fn update(id: u32, old: &[Option<&[u8]>], new: &[Option<&[u8]>]) -> Bytes {
        let mut message = BytesMut::from(&b"U"[..]);
        message.put_u32(id);
        message.put_u8(b'O');
        row(&mut message, old);
        message.put_u8(b'N');
        row(&mut message, new);
        message.freeze()
    }

    #[test]
    fn a_changed_row_is_read_by_the_names_of_its_columns() {
        let mut decoder = Decoder::default();
        assert_eq!(
            decoder
                .decode(relation(7, "orders", &["id", "note", "long"]))
                .unwrap(),
            Message::Other
        );
        let number = 42_i64.to_be_bytes();
        let change = update(
            7,
            &[Some(&number), Some(b"was"), Some(b"a long one")],
            &[Some(&number), None, Some(b"?")],
        );
        let Message::Update {
            old: Some(old),
            new,
        } = decoder.decode(change).unwrap()
        else {
            panic!("no update");
        };
        assert_eq!(new.table(), "orders");
        assert_eq!(new.integer("id").unwrap(), Some(42));
        assert_eq!(
            (old.text("note").unwrap(), new.text("note").unwrap()),
            (Some("was"), None)
        );
        assert_eq!(
            new.text("long").unwrap(),
            Some("a long one"),
            "from the row before"
        );
        assert!(new.integer("nothing").is_err());
        assert!(new.integer("long").is_err());
    }

    #[test]
    fn a_damaged_message_is_refused_at_every_length() {
        let mut decoder = Decoder::default();
        let table = relation(7, "orders", &["id"]);
        let number = 42_i64.to_be_bytes();
        let change = update(7, &[Some(&number)], &[Some(&number)]);
        assert!(
            decoder.decode(change.clone()).is_err(),
            "of a table that was not described"
        );
        for length in 0..table.len() {
            assert!(
                Decoder::default().decode(table.slice(..length)).is_err(),
                "{length}"
            );
        }
        let longer = [&table[..], b"x"].concat();
        assert!(decoder.decode(longer.into()).is_err());
        assert!(decoder.decode(change.clone()).is_err(), "still not");
        decoder.decode(table).unwrap();
        for length in 0..change.len() {
            assert!(decoder.decode(change.slice(..length)).is_err(), "{length}");
        }
        let longer = [&change[..], b"x"].concat();
        assert!(decoder.decode(longer.into()).is_err());
        assert!(decoder.decode(change).is_ok());
        assert!(
            decoder.decode(Bytes::from_static(b"S")).is_err(),
            "of a later protocol"
        );
    }

    #[test]
    fn moments_begin_in_2000() {
        assert_eq!(moment(1_500), UnixMillis(POSTGRES_EPOCH_MS + 1));
        assert_eq!(moment(-1), UnixMillis(POSTGRES_EPOCH_MS - 1));
    }
}
