//! A Redis stream as a sink: an entry for each event, with the fields `id`, `type`, `key` and `event`, and `traceparent`
//! if its order is traced.
//!
//! Entries are added in transactions (`MULTI`), so that of those sent together none stands before an earlier one of its
//! order that was refused. Nobody but its readers trims the stream.

use std::sync::Arc;
use std::time::Duration;

use ::redis::{Client, Connection, RedisError, pipe};
use parking_lot::Mutex;

use super::{Delivering, Delivery, Event, Sink};

/// Time limit for a connection and for an answer.
const TIMEOUT: Duration = Duration::from_secs(10);
/// Entries in one transaction.
const TOGETHER: usize = 500;

/// A stream.
#[derive(Clone)]
pub struct RedisStream {
    client: Client,
    stream: String,
    connection: Arc<Mutex<Option<Connection>>>,
}

impl std::fmt::Debug for RedisStream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("RedisStream").field(&self.stream).finish()
    }
}

impl RedisStream {
    /// A stream that is connected to when it is needed.
    ///
    /// # Errors
    /// What is wrong with the address. The address itself is not repeated: it may have a password in it.
    pub fn new(url: &str, stream: String) -> Result<Self, String> {
        if !url.starts_with("redis://") && !url.starts_with("rediss://") {
            return Err("url: must begin with redis:// or rediss://".to_owned());
        }
        let client = Client::open(url).map_err(|error| format!("url: {error}"))?;
        Ok(RedisStream {
            client,
            stream,
            connection: Arc::default(),
        })
    }

    fn connect(&self) -> Result<Connection, RedisError> {
        let connection = self.client.get_connection_with_timeout(TIMEOUT)?;
        connection.set_read_timeout(Some(TIMEOUT))?;
        connection.set_write_timeout(Some(TIMEOUT))?;
        Ok(connection)
    }

    fn add(&self, events: &[Event]) -> Result<(), RedisError> {
        let mut kept = self.connection.lock();
        let mut connection = match kept.take() {
            Some(connection) => connection,
            None => self.connect()?,
        };
        let mut entries = pipe();
        entries.atomic();
        for event in events {
            entries.cmd("XADD").arg(&self.stream).arg("*");
            for (name, value) in [
                ("id", &event.id),
                ("type", &event.kind),
                ("key", &event.subject),
                ("event", &event.body),
            ] {
                entries.arg(name).arg(value);
            }
            if let Some(traceparent) = &event.traceparent {
                entries.arg("traceparent").arg(traceparent);
            }
        }
        let ids: Vec<String> = entries.query(&mut connection)?;
        debug_assert_eq!(ids.len(), events.len());
        // One that failed is closed: an answer may be on its way still.
        *kept = Some(connection);
        Ok(())
    }
}

impl Sink for RedisStream {
    fn title(&self) -> String {
        format!("Redis stream {}", self.stream)
    }

    fn deliver<'a>(&'a self, events: &'a [Event]) -> Delivering<'a> {
        Box::pin(async move {
            let mut outcomes = Vec::with_capacity(events.len());
            for together in events.chunks(TOGETHER) {
                let (sink, sent) = (self.clone(), together.to_vec());
                let added = tokio::task::spawn_blocking(move || sink.add(&sent)).await;
                let reason = match added {
                    Ok(Ok(())) => {
                        outcomes.extend(together.iter().map(|_| Delivery::Delivered));
                        continue;
                    }
                    Ok(Err(error)) => error.to_string(),
                    Err(panic) => panic.to_string(),
                };
                outcomes.extend(together.iter().map(|_| Delivery::Failed(reason.clone())));
                break;
            }
            outcomes.resize(events.len(), Delivery::Untried);
            outcomes
        })
    }
}
