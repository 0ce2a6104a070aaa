//! The order log in one stream of Redis or Valkey.
//!
//! ```text
//!  send   XADD stream epoch-number f frame ─┐ one write on a connection of its own, because WAIT and
//!         WAIT n, WAITAOF 1 n               ─┘ WAITAOF count the writes of their connection alone
//!            │
//!            ├ id returned, n confirmed ──────────────────────► stored
//!            └ id not above the last ─ XRANGE id id ┬ other ──► Stale: a later marker fences this writer
//!                                                   └ same ─ XGROUP SETID (a fresh write), WAIT ──► stored
//!  read   XRANGE (id +         forget   XTRIM MINID = id        on a second connection
//! ```
//!
//! The id of an entry is the place of its group, so the server itself refuses a writer of an older epoch once the
//! marker `epoch-0` of a later one is in: ids only grow.
//!
//! With `appendfsync always` the server answers `XADD` after the flush. Redis before 7.2 says no more than that;
//! later ones and Valkey confirm it by `WAITAOF`, on the replicas too. A replica without an append-only file never
//! confirms there.

use std::fmt;
use std::time::{Duration, Instant};

use ::redis::{Cmd, Value, cmd};
use parking_lot::Mutex;

use self::answers::Verdict;
use self::inspect::{inspect, require_master};
use self::link::{Address, Link, Replies, unknown};
use super::{Broker, BrokerError, Checked, Place, Position, SendError, Stored};

mod answers;
mod durable;
#[cfg(feature = "fuzz")]
pub mod fuzz;
mod inspect;
mod link;

/// The one field of an entry.
const FIELD: &str = "f";

/// A consumer group that nobody reads. Setting its position is the fresh write that precedes a second wait.
const GROUP: &str = "millrace";

/// Greatest frame, in bytes. Redis takes 512 MiB; one entry holds the server's only thread up while it is copied.
const FRAME_MAX: usize = 1 << 20;

/// Greatest number of entries asked for at once.
const COUNT_MAX: usize = 1024;

/// Settings of the client.
#[derive(Clone)]
pub struct RedisSettings {
    /// `redis://` or, with TLS, `rediss://`; user and password in it.
    pub url: String,
    /// Key of the stream.
    pub stream: String,
    /// Number of replicas that must confirm an append.
    pub replicas_min: u32,
    /// Time limit of a call, connecting included.
    pub timeout: Duration,
}

/// A client of one stream.
pub struct RedisBroker {
    address: Address,
    stream: String,
    replicas_min: u32,
    timeout: Duration,
    /// Appends only: nobody else's write may be waited for.
    sender: Mutex<Option<Link>>,
    /// Everything else.
    reader: Mutex<Option<Link>>,
}

impl RedisBroker {
    /// Makes a client and connects to nothing.
    ///
    /// # Errors
    /// [`BrokerError::Refused`] if the URL cannot be used. The sentence does not contain it.
    pub fn new(settings: RedisSettings) -> Result<Self, BrokerError> {
        if settings.stream.is_empty() {
            return Err(BrokerError::Refused(
                "queue.redis.stream is empty".to_owned(),
            ));
        }
        Ok(Self {
            address: Address::parse(&settings.url)?,
            stream: settings.stream,
            replicas_min: settings.replicas_min,
            timeout: settings.timeout,
            sender: Mutex::new(None),
            reader: Mutex::new(None),
        })
    }

    /// Asks on the second connection, which is made if there is none, and dropped if an answer is outstanding.
    fn with_reader<T>(
        &self,
        question: impl FnOnce(&mut Link, Instant) -> Result<T, BrokerError>,
    ) -> Result<T, BrokerError> {
        let deadline = Instant::now() + self.timeout;
        let Some(mut reader) = self.reader.try_lock_until(deadline) else {
            return Err(BrokerError::Away(format!(
                "{} is slow to answer",
                self.address.name
            )));
        };
        let mut link = match reader.take() {
            Some(link) => link,
            None => {
                let mut link = self.address.connect(deadline)?;
                require_master(&self.address, &mut link, deadline)?;
                link
            }
        };
        let answer = question(&mut link, deadline);
        if link.in_step && answer.is_ok() {
            *reader = Some(link);
        }
        answer
    }

    /// A connection for appends, on a server whose settings have just been read.
    fn connect_sender(&self, deadline: Instant) -> Result<Link, BrokerError> {
        let mut link = self.address.connect(deadline)?;
        inspect(
            &self.address,
            &mut link,
            &self.stream,
            self.replicas_min,
            deadline,
        )?;
        Ok(link)
    }

    fn append(
        &self,
        link: &mut Link,
        id: &str,
        frame: &[u8],
        deadline: Instant,
    ) -> Result<(), SendError> {
        let mut xadd = self.on_stream("XADD", &[id, FIELD]);
        xadd.arg(frame);
        let mut commands = vec![xadd];
        commands.extend(durable::waits(link, self.replicas_min, deadline));
        let mut replies = link.exchange(&commands, deadline);
        match replies.next(&self.address.name).map_err(unknown)? {
            Value::BulkString(stored) if stored == id.as_bytes() => self.confirmed(link, replies),
            Value::ServerError(error) if answers::verdict(&error) == Verdict::NotAbove => {
                self.there_already(link, id, frame, deadline)
            }
            Value::ServerError(error) => Err(answers::of_send(&self.address.name, &error)),
            _ => Err(unknown(self.address.strange("XADD"))),
        }
    }

    /// The server refused the id. Either this very frame was stored by an earlier attempt, or this writer is too late.
    fn there_already(
        &self,
        link: &mut Link,
        id: &str,
        frame: &[u8],
        deadline: Instant,
    ) -> Result<(), SendError> {
        if !link.in_step {
            return Err(SendError::Unknown(format!(
                "{} broke off after refusing {id}",
                self.address.name
            )));
        }
        let found = link
            .exchange(&[self.on_stream("XRANGE", &[id, id])], deadline)
            .next(&self.address.name);
        let found = match found.map_err(unknown)? {
            // The append was refused, and an earlier one of the same frame may be there.
            Value::ServerError(error) => {
                return Err(SendError::Unknown(answers::sentence(
                    &self.address.name,
                    &error,
                )));
            }
            found => self.entries(found),
        };
        match found.as_deref() {
            Ok([stored, ..]) if stored.frame == frame => self.wait_again(link, deadline),
            // Another frame, or an entry that is none.
            Ok([_, ..]) | Err(BrokerError::Refused(_)) => Err(SendError::Stale(format!(
                "another group has the id {id} on {}",
                self.address.name
            ))),
            Err(error) => Err(unknown(error.clone())),
            Ok([]) => Err(SendError::Stale(format!(
                "{} has an id above {id} in the stream {}, and no group under {id}",
                self.address.name, self.stream
            ))),
        }
    }

    /// Waits for a frame that an earlier attempt stored, perhaps on another connection.
    ///
    /// A wait without a write of this connection before it returns at once and proves nothing. The write has to be
    /// propagated, to name no other key (permissions, slot of a cluster), and to touch neither entries nor ids.
    /// `XGROUP SETID` does all that; `XSETID` could lower the last id and so let a fenced writer in, a key of its own
    /// may be forbidden, and `XTRIM` that removes nothing is not propagated.
    fn wait_again(&self, link: &mut Link, deadline: Instant) -> Result<(), SendError> {
        let mut commands = vec![
            self.on_stream("XGROUP CREATE", &[GROUP, "0"]),
            self.on_stream("XGROUP SETID", &[GROUP, "0"]),
        ];
        commands.extend(durable::waits(link, self.replicas_min, deadline));
        let mut replies = link.exchange(&commands, deadline);
        // Refused if the group exists; the second command says whether it does.
        replies.next(&self.address.name).map_err(unknown)?;
        match replies.next(&self.address.name).map_err(unknown)? {
            Value::Okay => self.confirmed(link, replies),
            // The frame is there, so no certain refusal may be reported.
            Value::ServerError(error) => Err(SendError::Unknown(answers::sentence(
                &self.address.name,
                &error,
            ))),
            _ => Err(unknown(self.address.strange("XGROUP SETID"))),
        }
    }

    fn confirmed(&self, link: &Link, mut replies: Replies) -> Result<(), SendError> {
        durable::confirmed(
            &self.address,
            link.has_waitaof,
            self.replicas_min,
            &mut replies,
        )
    }

    /// Entries of an answer to `XRANGE`.
    fn entries(&self, answer: Value) -> Result<Vec<Stored>, BrokerError> {
        let Value::Array(entries) = answer else {
            return Err(self.address.strange("XRANGE"));
        };
        entries.into_iter().map(|entry| self.entry(entry)).collect()
    }

    fn entry(&self, entry: Value) -> Result<Stored, BrokerError> {
        let Value::Array(entry) = entry else {
            return Err(self.address.strange("XRANGE"));
        };
        let mut parts = entry.into_iter();
        let (Some(Value::BulkString(id)), Some(Value::Array(fields))) =
            (parts.next(), parts.next())
        else {
            return Err(self.address.strange("XRANGE"));
        };
        let id = String::from_utf8_lossy(&id).into_owned();
        let place = id.split_once('-').and_then(|(epoch, number)| {
            Some(Place {
                epoch: epoch.parse().ok()?,
                number: number.parse().ok()?,
            })
        });
        let place = place.filter(|place| id_of(*place) == id);
        let mut fields = fields.into_iter();
        match (place, fields.next(), fields.next(), fields.next()) {
            (Some(_), Some(Value::BulkString(field)), Some(Value::BulkString(frame)), None)
                if field == FIELD.as_bytes() =>
            {
                Ok(Stored {
                    offset: 0,
                    place,
                    frame,
                })
            }
            _ => Err(BrokerError::Refused(format!(
                "the entry {id} of the stream {} on {} was not written by Millrace; choose another queue.redis.stream",
                self.stream, self.address.name
            ))),
        }
    }

    /// Whether groups behind `after` are known to be gone: `first` does not follow on it, and nothing up to it is there.
    fn cut_off(
        &self,
        link: &mut Link,
        after: Place,
        first: Place,
        deadline: Instant,
    ) -> Result<bool, BrokerError> {
        let follows = if first.epoch == after.epoch {
            after.number.checked_add(1) == Some(first.number)
        } else {
            first.number == 0
        };
        if follows {
            return Ok(false);
        }
        let oldest = self.on_stream("XRANGE", &["-", &id_of(after), "COUNT", "1"]);
        let oldest = self.address.ask(link, oldest, deadline)?;
        Ok(self.entries(oldest)?.is_empty())
    }

    fn read_on(
        &self,
        link: &mut Link,
        after: Option<Position>,
        bytes_max: usize,
        deadline: Instant,
    ) -> Result<Vec<Stored>, BrokerError> {
        let mut start = after.map_or_else(
            || "-".to_owned(),
            |after| format!("({}", id_of(after.place)),
        );
        let (mut frames, mut bytes, mut largest) = (Vec::new(), 0, 1);
        // No frame is above FRAME_MAX, so the first answer is not above `bytes_max`. Later ones go by what has been seen.
        let mut count = (bytes_max / FRAME_MAX).clamp(1, COUNT_MAX);
        loop {
            let question = self.on_stream("XRANGE", &[&start, "+", "COUNT", &count.to_string()]);
            let chunk = self
                .address
                .ask(link, question, deadline)
                .and_then(|answer| self.entries(answer));
            let chunk = match chunk {
                Ok(chunk) => chunk,
                // What has been read is true; the next call meets the error.
                Err(_) if !frames.is_empty() => return Ok(frames),
                Err(error) => return Err(error),
            };
            if let (true, Some(after), Some(first)) = (
                frames.is_empty(),
                after,
                chunk.first().and_then(|c| c.place),
            ) && self.cut_off(link, after.place, first, deadline)?
            {
                return Err(BrokerError::Lost(format!(
                    "the stream {} on {} begins at {}, and {} was asked for",
                    self.stream,
                    self.address.name,
                    id_of(first),
                    id_of(after.place)
                )));
            }
            let last_chunk = chunk.len() < count;
            for stored in chunk {
                if !frames.is_empty() && bytes + stored.frame.len() > bytes_max {
                    return Ok(frames);
                }
                bytes += stored.frame.len();
                largest = largest.max(stored.frame.len());
                if let Some(place) = stored.place {
                    start = format!("({}", id_of(place));
                }
                frames.push(stored);
            }
            let room = bytes_max.saturating_sub(bytes) / largest;
            if last_chunk || room == 0 {
                return Ok(frames);
            }
            count = room.min(count * 4).min(COUNT_MAX);
        }
    }

    /// A command of one or two words on the stream.
    fn on_stream(&self, command: &str, arguments: &[&str]) -> Cmd {
        let mut words = command.split(' ');
        let mut made = cmd(words.next().unwrap_or_default());
        for word in words {
            made.arg(word);
        }
        made.arg(&self.stream);
        for argument in arguments {
            made.arg(*argument);
        }
        made
    }
}

impl Broker for RedisBroker {
    fn check(&self) -> Result<Checked, BrokerError> {
        let is_anew = {
            let mut sender = self.sender.lock();
            let deadline = Instant::now() + self.timeout;
            let kept = sender.take().and_then(|link| link.alive(deadline));
            let is_anew = kept.is_none();
            *sender = match kept {
                Some(link) => Some(link),
                None => {
                    // The server may be another one: both connections lead to the same.
                    *self.reader.lock() = None;
                    Some(self.connect_sender(deadline)?)
                }
            };
            is_anew
        };
        let warnings = self.with_reader(|link, deadline| {
            inspect(
                &self.address,
                link,
                &self.stream,
                self.replicas_min,
                deadline,
            )
        })?;
        Ok(Checked { warnings, is_anew })
    }

    fn send(&self, place: Place, frame: &[u8]) -> Result<u64, SendError> {
        if frame.len() > FRAME_MAX {
            return Err(SendError::Refused(format!(
                "a group of {} bytes is above {FRAME_MAX}",
                frame.len()
            )));
        }
        let mut sender = self.sender.lock();
        let deadline = Instant::now() + self.timeout;
        let Some(mut link) = sender.take().and_then(|link| link.alive(deadline)) else {
            return Err(SendError::Away(format!(
                "{} is not connected",
                self.address.name
            )));
        };
        let outcome = self.append(&mut link, &id_of(place), frame, deadline);
        // A server that does not take writes is looked for anew, and its settings are read again.
        let elsewhere = matches!(outcome, Err(SendError::Away(_) | SendError::Refused(_)));
        if link.in_step && !elsewhere {
            *sender = Some(link);
        }
        outcome.map(|()| 0)
    }

    fn read(&self, after: Option<Position>, bytes_max: usize) -> Result<Vec<Stored>, BrokerError> {
        self.with_reader(|link, deadline| self.read_on(link, after, bytes_max, deadline))
    }

    fn forget(&self, before: Position) -> Result<(), BrokerError> {
        // Exactly: the approximate form keeps whole blocks, and the place would not say what is left.
        let trim = self.on_stream("XTRIM", &["MINID", "=", &id_of(before.place)]);
        self.with_reader(|link, deadline| self.address.ask(link, trim, deadline).map(|_| ()))
    }

    fn frame_max(&self) -> usize {
        FRAME_MAX
    }

    fn title(&self) -> String {
        format!("the Redis stream `{}`", self.stream)
    }

    fn fences(&self) -> bool {
        true
    }
}

impl fmt::Debug for RedisBroker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RedisBroker")
            .field("server", &self.address.name)
            .field("stream", &self.stream)
            .field("replicas_min", &self.replicas_min)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for RedisSettings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The URL has the password in it.
        f.debug_struct("RedisSettings")
            .field("stream", &self.stream)
            .field("replicas_min", &self.replicas_min)
            .field("timeout", &self.timeout)
            .finish_non_exhaustive()
    }
}

fn id_of(place: Place) -> String {
    format!("{}-{}", place.epoch, place.number)
}
