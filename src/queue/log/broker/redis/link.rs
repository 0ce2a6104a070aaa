//! One connection: commands out in one write, answers back before a deadline.

use std::error::Error;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ::redis::io::tcp::TcpSettings;
use ::redis::{
    Client, Cmd, Connection, ConnectionAddr, ConnectionInfo, ErrorKind, IntoConnectionInfo,
    ProtocolVersion, RedisConnectionInfo, RedisError, Value, cmd,
};

use super::answers::{self, Verdict};
use super::{BrokerError, SendError};

/// A connection that was silent for so long is asked before it carries an append.
const IDLE: Duration = Duration::from_secs(1);

/// Where the server is, and who asks.
pub(super) struct Address {
    client: Client,
    /// `redis host:port`, for sentences.
    pub(super) name: String,
    user: Option<String>,
    password: Option<String>,
    database: i64,
}

/// A connection whose user is known to the server.
pub(super) struct Link {
    connection: Connection,
    /// It has given an answer: a TLS handshake, which comes with the first, has succeeded.
    heard: bool,
    used: Instant,
    /// Every answer to what was sent has been read. A link that is not in step is dropped.
    pub(super) in_step: bool,
    /// The server has `WAITAOF` (Redis 7.2, Valkey), and the user may call it.
    pub(super) has_waitaof: bool,
}

/// Answers to commands: fewer than there were commands if the connection broke.
pub(super) struct Replies {
    answers: std::vec::IntoIter<Value>,
    broken: Option<RedisError>,
    /// It broke before the first answer of the connection.
    new: bool,
}

impl Address {
    /// Reads a URL. The library's own log-in is not used: it hides the server's answer.
    pub(super) fn parse(url: &str) -> Result<Self, BrokerError> {
        let refused = |reason: &str| {
            BrokerError::Refused(format!("queue.redis.url cannot be used: {reason}"))
        };
        let tls = url.starts_with("rediss://");
        if !tls && !url.starts_with("redis://") {
            return Err(refused("it must begin with redis:// or rediss://"));
        }
        if url.contains('#') {
            return Err(refused(
                "a fragment (#…) has no meaning; a # in a password is written %23",
            ));
        }
        // Errors of the library name the part that is wrong and never the URL.
        let info = url
            .into_connection_info()
            .map_err(|error| refused(&error.to_string()))?;
        let named = info.redis_settings();
        let (user, password) = (
            named.username().map(str::to_owned),
            named.password().map(str::to_owned),
        );
        if user.is_some() && password.is_none() {
            return Err(refused("it names a user and no password"));
        }
        let database = named.db();
        let name = match info.addr() {
            ConnectionAddr::Tcp(host, port) | ConnectionAddr::TcpTls { host, port, .. } => {
                format!("redis {host}:{port}")
            }
            _ => return Err(refused("it has no host")),
        };
        // No Nagle: the last segment of a frame would wait for the acknowledgement of the one before.
        let info: ConnectionInfo = info
            .set_tcp_settings(TcpSettings::default().set_nodelay(true))
            .set_redis_settings(
                RedisConnectionInfo::default()
                    .set_protocol(ProtocolVersion::RESP2)
                    .set_skip_set_lib_name(),
            );
        let client = Client::open(info).map_err(|error| refused(&error.to_string()))?;
        Ok(Self {
            client,
            name,
            user,
            password,
            database,
        })
    }

    /// Connects and logs in. No command that changes anything has been sent when it fails.
    pub(super) fn connect(&self, deadline: Instant) -> Result<Link, BrokerError> {
        let connection = self
            .client
            .get_connection_with_timeout(left(deadline))
            .map_err(|error| self.connect_failed(&error))?;
        let mut link = Link {
            connection,
            heard: false,
            used: Instant::now(),
            in_step: true,
            has_waitaof: false,
        };
        if let Some(password) = &self.password {
            let mut auth = cmd("AUTH");
            if let Some(user) = &self.user {
                auth.arg(user);
            }
            auth.arg(password);
            match link.exchange(&[auth], deadline).next(&self.name)? {
                Value::Okay => {}
                // Its text may repeat the arguments, and one of them is the password.
                Value::ServerError(error)
                    if error.code() == "ERR" && answers::verdict(&error) != Verdict::Away =>
                {
                    return Err(BrokerError::Refused(format!(
                        "{} refused AUTH (ERR): correct user and password in queue.redis.url, or leave them out",
                        self.name
                    )));
                }
                Value::ServerError(error) => return Err(answers::of_question(&self.name, &error)),
                _ => return Err(self.strange("AUTH")),
            }
        }
        if self.database != 0 {
            let mut select = cmd("select");
            select.arg(self.database);
            self.ask(&mut link, select, deadline)?;
        }
        Ok(link)
    }

    /// One question, whose errors are sorted.
    pub(super) fn ask(
        &self,
        link: &mut Link,
        question: Cmd,
        deadline: Instant,
    ) -> Result<Value, BrokerError> {
        match link.exchange(&[question], deadline).next(&self.name)? {
            Value::ServerError(error) => Err(answers::of_question(&self.name, &error)),
            value => Ok(value),
        }
    }

    /// An answer of a form that the command does not have.
    pub(super) fn strange(&self, command: &str) -> BrokerError {
        BrokerError::Away(format!(
            "{} gave {command} an answer that is none",
            self.name
        ))
    }

    fn connect_failed(&self, error: &RedisError) -> BrokerError {
        let said = format!("{} cannot be reached: {}", self.name, reason(error));
        if error.kind() == ErrorKind::Client || is_mistrust(error) {
            BrokerError::Refused(said)
        } else {
            BrokerError::Away(said)
        }
    }
}

impl Link {
    /// Sends the commands in one piece and reads an answer to each.
    pub(super) fn exchange(&mut self, commands: &[Cmd], deadline: Instant) -> Replies {
        let mut bytes = Vec::new();
        for command in commands {
            command.write_packed_command(&mut bytes);
        }
        self.in_step = false;
        let mut answers = Vec::with_capacity(commands.len());
        let sent = self
            .limit(deadline)
            .and_then(|()| self.connection.send_packed_command(&bytes));
        let mut broken = sent.err();
        while broken.is_none() && answers.len() < commands.len() {
            // The library's own pipeline would wait the whole time limit for each answer of a dead connection.
            match self
                .limit(deadline)
                .and_then(|()| self.connection.recv_response())
            {
                Ok(value) => answers.push(value),
                Err(error) => broken = Some(error),
            }
        }
        self.in_step = broken.is_none();
        self.used = Instant::now();
        let new = !self.heard;
        self.heard |= !answers.is_empty();
        Replies {
            answers: answers.into_iter(),
            broken,
            new,
        }
    }

    /// The link if it can be written to. One that was just used is not asked.
    ///
    /// Servers and balancers close idle connections, and an append on such a one is in doubt for nothing.
    pub(super) fn alive(mut self, deadline: Instant) -> Option<Self> {
        if self.used.elapsed() >= IDLE {
            self.exchange(&[cmd("PING")], deadline);
        }
        self.in_step.then_some(self)
    }

    fn limit(&self, deadline: Instant) -> Result<(), RedisError> {
        let left = Some(left(deadline));
        self.connection.set_read_timeout(left)?;
        self.connection.set_write_timeout(left)
    }
}

impl Replies {
    /// Answers that came in whole.
    #[cfg(feature = "fuzz")]
    pub(super) fn whole(answers: Vec<Value>) -> Self {
        Self {
            answers: answers.into_iter(),
            broken: None,
            new: false,
        }
    }

    /// The next answer, or the reason why there is none.
    pub(super) fn next(&mut self, server: &str) -> Result<Value, BrokerError> {
        if let Some(answer) = self.answers.next() {
            return Ok(answer);
        }
        let Some(error) = &self.broken else {
            return Err(BrokerError::Away(format!("{server} left an answer out")));
        };
        let said = format!("{server} did not answer: {}", reason(error));
        Err(if self.new && is_mistrust(error) {
            BrokerError::Refused(said)
        } else {
            BrokerError::Away(said)
        })
    }
}

/// The time until `deadline`; never 0, which sockets take for "no limit".
pub(super) fn left(deadline: Instant) -> Duration {
    deadline
        .saturating_duration_since(Instant::now())
        .max(Duration::from_millis(1))
}

fn reason(error: &RedisError) -> String {
    if error.is_timeout() {
        "the time limit has passed".to_owned()
    } else {
        error.to_string()
    }
}

/// A certificate that is not trusted, or no TLS at the other end: no retry mends that.
fn is_mistrust(error: &RedisError) -> bool {
    // The library shows the box of the cause, not the cause.
    let cause = error
        .source()
        .and_then(|source| source.downcast_ref::<Arc<dyn Error + Send + Sync>>());
    let cause = cause.and_then(|boxed| boxed.downcast_ref::<io::Error>());
    cause.is_some_and(|cause| cause.kind() == io::ErrorKind::InvalidData)
}

/// Anything that goes wrong once an append is on its way.
pub(super) fn unknown(error: BrokerError) -> SendError {
    match error {
        BrokerError::Away(said) | BrokerError::Refused(said) | BrokerError::Lost(said) => {
            SendError::Unknown(said)
        }
    }
}
