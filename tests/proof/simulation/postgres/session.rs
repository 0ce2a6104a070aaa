//! A session of the simulated server: the messages of PostgreSQL's protocol, version 3, and a transaction.

use std::collections::BTreeMap;
use std::mem;
use std::rc::Rc;
use std::time::Duration;

use bytes::{Buf, BufMut, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::time::Instant;
use tokio_postgres::types::{ToSql, Type};

use super::super::here;
use super::copied::copied_rows;
use super::locks::Waits;
use super::statements::{Done, Parameters, Sql, Value};
use super::tables::{Key, View, Written};
use super::{CommitFault, Server, Trigger};

/// Why a statement failed.
#[derive(Debug)]
pub struct Refused {
    /// SQLSTATE.
    pub code: &'static str,
    pub message: String,
}

/// The connection ends.
pub struct Cut;

/// After so long the network notices that nothing is heard.
const UNHEARD: Duration = Duration::from_secs(12);

/// Bytes that are read at once.
const IN_ONE_READ: usize = 1 << 16;

/// A statement with the types of its parameters and columns.
pub type Statement = (Sql, Rc<[Type]>, Rc<[Type]>);

/// A session.
pub struct Session {
    pub server: Rc<Server>,
    pub pid: i32,
    /// What the transaction has written.
    pub written: Written,
    in_transaction: bool,
    has_failed: bool,
    lock_timeout: Duration,
    lock_timeout_here: Option<Duration>,
    statements: BTreeMap<String, Statement>,
    bound: Option<(Statement, Parameters)>,
    /// The trigger on `orders` that the transaction's lock keeps as it is.
    locked_trigger: Option<Option<Trigger>>,
    /// The rows of a COPY that is under way.
    copy: Option<(Sql, Vec<u8>)>,
    /// After an error everything is skipped until the next Sync.
    skips: bool,
    out: BytesMut,
}

impl Drop for Session {
    fn drop(&mut self) {
        self.server.ended(self.pid);
    }
}

impl Session {
    pub fn new(server: Rc<Server>, pid: i32) -> Self {
        Session {
            server,
            pid,
            written: Written::new(),
            in_transaction: false,
            has_failed: false,
            lock_timeout: Duration::from_secs(1),
            lock_timeout_here: None,
            statements: BTreeMap::new(),
            bound: None,
            locked_trigger: None,
            copy: None,
            skips: false,
            out: BytesMut::new(),
        }
    }

    /// Serves a client until the connection ends.
    pub async fn serve(mut self, mut stream: DuplexStream) {
        let mut read = BytesMut::new();
        if self.greet(&mut stream, &mut read).await.is_err() {
            return;
        }
        loop {
            while let Some((tag, body)) = next_message(&mut read) {
                if self.take(tag, body).await.is_err() {
                    return;
                }
            }
            if !self.out.is_empty() {
                self.server.delay().await;
                let out = self.out.split();
                if stream.write_all(&out).await.is_err() {
                    return;
                }
            }
            // All that is there: where a message is cut must not depend on the length of a statement's name.
            read.reserve(IN_ONE_READ);
            match stream.read_buf(&mut read).await {
                Ok(0) | Err(_) => return,
                Ok(_) => self.server.delay().await,
            }
        }
    }

    async fn greet(&mut self, stream: &mut DuplexStream, read: &mut BytesMut) -> Result<(), Cut> {
        loop {
            if read.len() >= 4 {
                let length = i32::from_be_bytes([read[0], read[1], read[2], read[3]]) as usize;
                if read.len() >= length {
                    let startup = read.split_to(length);
                    let words: Vec<_> = startup[8..].split(|byte| *byte == 0).collect();
                    let of = |name: &[u8]| words.iter().position(|word| *word == name);
                    let name = of(b"application_name").and_then(|at| words.get(at + 1));
                    let name = name.map(|name| String::from_utf8_lossy(name).into_owned());
                    self.server.named(self.pid, name.unwrap_or_default());
                    break;
                }
            }
            match stream.read_buf(read).await {
                Ok(0) | Err(_) => return Err(Cut),
                Ok(_) => {}
            }
        }
        self.server.delay().await;
        message(&mut self.out, b'R', |out| out.put_i32(0));
        let pid = self.pid;
        message(&mut self.out, b'K', |out| {
            out.put_i32(pid);
            out.put_i32(0);
        });
        self.ready();
        Ok(())
    }

    /// One message of the client.
    async fn take(&mut self, tag: u8, body: BytesMut) -> Result<(), Cut> {
        if self.copy.is_some() {
            return self.take_copy(tag, &body).await;
        }
        if tag == b'S' {
            if !self.in_transaction {
                self.end_implicit().await?;
            }
            self.skips = false;
            self.ready();
            return Ok(());
        }
        if tag == b'Q' {
            return self.simple(&text(&mut body.clone())).await;
        }
        if tag == b'X' {
            return Err(Cut);
        }
        if self.skips {
            return Ok(());
        }
        match tag {
            b'P' => self.parse(body)?,
            b'D' => self.describe(body),
            b'B' => self.bind(body),
            b'E' => self.execute().await?,
            b'C' => message(&mut self.out, b'3', |_| {}),
            // What is left of a COPY that has failed.
            b'd' | b'c' | b'f' | b'H' => {}
            other => panic!("the simulated server got a message {:?}", other as char),
        }
        Ok(())
    }

    fn parse(&mut self, mut body: BytesMut) -> Result<(), Cut> {
        let (name, sql) = (text(&mut body), text(&mut body));
        let Some(statement) = self.server.statement(&sql) else {
            here(|world| world.stop(format!("the simulated server does not know: {sql}")));
            return Err(Cut);
        };
        self.statements.insert(name, statement);
        message(&mut self.out, b'1', |_| {});
        Ok(())
    }

    fn describe(&mut self, mut body: BytesMut) {
        body.advance(1);
        let (_, parameters, columns) = self.statements[&text(&mut body)].clone();
        message(&mut self.out, b't', |out| {
            out.put_i16(parameters.len() as i16);
            parameters.iter().for_each(|of| out.put_u32(of.oid()));
        });
        if columns.is_empty() {
            return message(&mut self.out, b'n', |_| {});
        }
        message(&mut self.out, b'T', |out| {
            out.put_i16(columns.len() as i16);
            for of in columns.iter() {
                out.put_slice(b"column\0");
                out.put_i32(0);
                out.put_i16(0);
                out.put_u32(of.oid());
                out.put_i16(-1);
                out.put_i32(-1);
                out.put_i16(1);
            }
        });
    }

    fn bind(&mut self, mut body: BytesMut) {
        let _portal = text(&mut body);
        let statement = self.statements[&text(&mut body)].clone();
        let formats = body.get_i16();
        body.advance(2 * formats as usize);
        let count = body.get_i16();
        let parameters = (0..count).map(|_| {
            let length = body.get_i32();
            (length >= 0).then(|| body.split_to(length as usize).to_vec())
        });
        self.bound = Some((statement, Parameters(parameters.collect())));
        message(&mut self.out, b'2', |_| {});
    }

    async fn execute(&mut self) -> Result<(), Cut> {
        let Some(((sql, _, columns), parameters)) = self.bound.take() else {
            panic!("Execute without Bind");
        };
        if self.has_failed {
            self.refuse(aborted());
            return Ok(());
        }
        note(format_args!("  {} {sql:?}", self.pid));
        if matches!(sql, Sql::CopyOrders | Sql::CopyParked) {
            self.copy = Some((sql, Vec::new()));
            let columns = if sql == Sql::CopyOrders { 13 } else { 12 };
            message(&mut self.out, b'G', |out| {
                out.put_u8(1);
                out.put_i16(columns);
                (0..columns).for_each(|_| out.put_i16(1));
            });
            return Ok(());
        }
        match self.run(sql, &parameters).await {
            Ok(done) => self.answer(&columns, done),
            Err(refused) => self.refuse(refused),
        }
        Ok(())
    }

    fn answer(&mut self, columns: &[Type], (rows, count): Done) {
        for row in rows {
            message(&mut self.out, b'D', |out| {
                out.put_i16(columns.len() as i16);
                for (value, of) in row.iter().zip(columns) {
                    put_value(out, value, of);
                }
            });
        }
        complete(&mut self.out, &format!("UPDATE {count}"));
    }

    async fn take_copy(&mut self, tag: u8, body: &BytesMut) -> Result<(), Cut> {
        match tag {
            b'd' => {
                if let Some((_, copy)) = &mut self.copy {
                    copy.extend_from_slice(body);
                }
            }
            // While rows are taken, it means nothing.
            b'S' | b'H' => {}
            b'f' => {
                self.copy = None;
                self.refuse(Refused {
                    code: "57014",
                    message: "COPY from stdin failed".to_owned(),
                });
            }
            b'c' => {
                let Some((to, bytes)) = self.copy.take() else {
                    unreachable!("looked at before");
                };
                match self.copied(to, copied_rows(&bytes)).await {
                    Ok(count) => complete(&mut self.out, &format!("COPY {count}")),
                    Err(refused) => self.refuse(refused),
                }
            }
            other => panic!("message {:?} within a COPY", other as char),
        }
        Ok(())
    }

    async fn simple(&mut self, sql: &str) -> Result<(), Cut> {
        let mut tags = Vec::new();
        for statement in sql.split(';').map(str::trim) {
            let words = statement.split_whitespace().collect::<Vec<_>>().join(" ");
            note(format_args!("  {} {words}", self.pid));
            let tag = match words.as_str() {
                "" => continue,
                "COMMIT" => {
                    if self.has_failed {
                        self.roll_back();
                        "ROLLBACK"
                    } else {
                        self.commit().await?;
                        "COMMIT"
                    }
                }
                "ROLLBACK" => {
                    self.roll_back();
                    "ROLLBACK"
                }
                begin if begin.starts_with("BEGIN") || begin.starts_with("START") => {
                    self.in_transaction = true;
                    "BEGIN"
                }
                set if set.starts_with("SET LOCAL lock_timeout") => {
                    self.lock_timeout_here = Some(milliseconds(set));
                    "SET"
                }
                set if set.starts_with("SET lock_timeout") => {
                    self.lock_timeout = milliseconds(set);
                    "SET"
                }
                lock if lock.starts_with("LOCK TABLE orders") => {
                    self.locked_trigger = Some(self.server.trigger());
                    "LOCK TABLE"
                }
                known if known.starts_with("SET ") || known.starts_with("LOCK TABLE") => "SET",
                known if known.starts_with("SELECT set_config") || known == "SELECT 1" => {
                    "SELECT 0"
                }
                other => panic!("the simulated server does not know {other}"),
            };
            tags.push(tag);
        }
        if tags.is_empty() {
            message(&mut self.out, b'I', |_| {});
        }
        tags.iter().for_each(|tag| complete(&mut self.out, tag));
        self.skips = false;
        self.ready();
        Ok(())
    }

    /// Ends the transaction of a statement outside of an explicit one.
    async fn end_implicit(&mut self) -> Result<(), Cut> {
        if self.has_failed {
            self.roll_back();
            return Ok(());
        }
        self.commit().await
    }

    async fn commit(&mut self) -> Result<(), Cut> {
        let is_numbered = self.written.keys().any(|key| matches!(key, Key::Writer(_)));
        let is_aside = |key: &Key| matches!(key, Key::DeadLetter(_) | Key::Parked(_));
        let fault = if is_numbered || self.written.keys().any(is_aside) {
            self.server.take_commit_fault(is_numbered)
        } else {
            None
        };
        match fault {
            None => {}
            Some(CommitFault::CutBefore) => return Err(Cut),
            Some(CommitFault::HangsBefore) => {
                tokio::time::sleep(UNHEARD).await;
                return Err(Cut);
            }
            Some(CommitFault::CutAfter) => {
                self.server.commit(self.pid, mem::take(&mut self.written));
                return Err(Cut);
            }
            Some(CommitFault::HangsAfter) => {
                self.server.commit(self.pid, mem::take(&mut self.written));
                tokio::time::sleep(UNHEARD).await;
                return Err(Cut);
            }
        }
        self.server.commit(self.pid, mem::take(&mut self.written));
        self.end_transaction();
        Ok(())
    }

    fn roll_back(&mut self) {
        self.written.clear();
        self.server.rolled_back(self.pid);
        self.end_transaction();
    }

    fn end_transaction(&mut self) {
        self.in_transaction = false;
        self.has_failed = false;
        self.lock_timeout_here = None;
        self.locked_trigger = None;
    }

    /// The trigger on `orders`, if somebody has made one.
    pub fn trigger(&self) -> Option<Trigger> {
        self.locked_trigger.unwrap_or_else(|| self.server.trigger())
    }

    fn refuse(&mut self, Refused { code, message: why }: Refused) {
        self.has_failed = true;
        self.skips = true;
        message(&mut self.out, b'E', |out| {
            for (field, word) in [(b'S', "ERROR"), (b'V', "ERROR"), (b'C', code), (b'M', &why)] {
                out.put_u8(field);
                out.put_slice(word.as_bytes());
                out.put_u8(0);
            }
            out.put_u8(0);
        });
    }

    fn ready(&mut self) {
        let state = match (self.in_transaction, self.has_failed) {
            (false, _) => b'I',
            (true, false) => b'T',
            (true, true) => b'E',
        };
        message(&mut self.out, b'Z', |out| out.put_u8(state));
    }

    /// Looks at the rows as the transaction sees them.
    pub fn view<T>(&self, look: impl FnOnce(&View<'_>) -> T) -> T {
        self.server.view(&self.written, look)
    }

    /// Locks a row until the transaction ends. False: it is locked, and is not waited for.
    pub async fn lock(&mut self, key: &Key, waits: Waits) -> Result<bool, Refused> {
        let deadline = Instant::now() + self.lock_timeout_here.unwrap_or(self.lock_timeout);
        loop {
            if self.server.take_lock(key, self.pid) {
                return Ok(true);
            }
            if waits == Waits::Not {
                return Ok(false);
            }
            let released = self.server.released();
            if tokio::time::timeout_at(deadline, released).await.is_err() {
                return Err(Refused {
                    code: "55P03",
                    message: "canceling statement due to lock timeout".to_owned(),
                });
            }
        }
    }
}

fn note(line: impl std::fmt::Display) {
    here(|world| world.note(line));
}

fn aborted() -> Refused {
    Refused {
        code: "25P02",
        message: "current transaction is aborted".to_owned(),
    }
}

fn milliseconds(set: &str) -> Duration {
    let number = set.rsplit(' ').next().and_then(|word| word.parse().ok());
    Duration::from_millis(number.expect("milliseconds"))
}

fn next_message(read: &mut BytesMut) -> Option<(u8, BytesMut)> {
    if read.len() < 5 {
        return None;
    }
    let length = i32::from_be_bytes([read[1], read[2], read[3], read[4]]) as usize;
    if read.len() < 1 + length {
        return None;
    }
    let tag = read.get_u8();
    let mut body = read.split_to(length);
    body.advance(4);
    Some((tag, body))
}

fn text(body: &mut BytesMut) -> String {
    let end = body.iter().position(|byte| *byte == 0).expect("a text");
    let text = String::from_utf8(body.split_to(end).to_vec()).expect("UTF-8");
    body.advance(1);
    text
}

fn message(out: &mut BytesMut, tag: u8, body: impl FnOnce(&mut BytesMut)) {
    out.put_u8(tag);
    let at = out.len();
    out.put_i32(0);
    body(out);
    let length = (out.len() - at) as i32;
    out[at..at + 4].copy_from_slice(&length.to_be_bytes());
}

fn complete(out: &mut BytesMut, tag: &str) {
    message(out, b'C', |out| {
        out.put_slice(tag.as_bytes());
        out.put_u8(0);
    });
}

fn put_value(out: &mut BytesMut, value: &Value, of: &Type) {
    let bytes = match value {
        Value::Null => return out.put_i32(-1),
        Value::I2(value) => value.to_be_bytes().to_vec(),
        Value::I4(value) => value.to_be_bytes().to_vec(),
        Value::I8(value) => value.to_be_bytes().to_vec(),
        Value::Text(value) => value.clone().into_bytes(),
        Value::Bool(value) => vec![u8::from(*value)],
        Value::Bytes(value) => value.clone(),
        Value::I4s(values) => array(values, of),
        Value::I8s(values) => array(values, of),
    };
    out.put_i32(bytes.len() as i32);
    out.put_slice(&bytes);
}

fn array(values: &impl ToSql, of: &Type) -> Vec<u8> {
    let mut bytes = BytesMut::new();
    values.to_sql(of, &mut bytes).expect("an array");
    bytes.to_vec()
}
