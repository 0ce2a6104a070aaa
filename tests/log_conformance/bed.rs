//! A server with clients of the crate, and what all files need.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use millrace::queue::log::broker::kafka::{KafkaBroker, KafkaSettings};
use millrace::queue::log::broker::redis::{RedisBroker, RedisSettings};
use millrace::queue::log::broker::rocketmq::{RocketMqBroker, RocketMqSettings};
use millrace::queue::log::broker::{
    Broker, BrokerError, Owner, Pages, Place, Position, SendError, Stored, while_away,
};

use crate::support::broker_admin::redis;
use crate::support::brokers::{Broker as Server, Kind, Setup};
use crate::support::wire::Wire;

/// For anything that a server does in its own time.
pub const PATIENCE: Duration = Duration::from_secs(90);
/// Time limit of a call whose failure is not awaited.
pub const LONG: Duration = Duration::from_secs(20);
/// Time limit of a call whose failure is awaited.
pub const SHORT: Duration = Duration::from_millis(400);
/// MiB of the file system for the data of a server that is harmed.
pub const ROOM_MIB: u32 = 160;

/// Kafka's listeners with SASL and with TLS, counted from the plain one.
pub const SASL: u16 = 2;
pub const TLS: u16 = 3;
pub const USER: &str = "shop";
pub const PASSWORD: &str = "right-secret";
pub const OWNER: Owner = Owner {
    database: [5; 16],
    node: 0,
};

/// A server, and the proxy in front of it if it may be harmed.
pub struct Bed {
    pub kind: Kind,
    pub server: Server,
    wire: Option<Wire>,
}

/// Runs a property on the server that is not harmed.
pub fn calm(kind: Kind, property: impl FnOnce(&Bed)) {
    static BEDS: [OnceLock<Option<Bed>>; 3] = [const { OnceLock::new() }; 3];
    if let Some(bed) = BEDS[kind as usize].get_or_init(|| Bed::start(kind, calm_setup(kind))) {
        property(bed);
    }
}

/// Runs a property on the server that may be harmed, one at a time.
pub fn rough(kind: Kind, property: impl FnOnce(&mut Bed)) {
    static BEDS: [OnceLock<Option<Mutex<Bed>>>; 3] = [const { OnceLock::new() }; 3];
    let start = || {
        let (wire, server) = Wire::before_broker(kind, rough_setup(kind))?;
        let wire = Some(wire);
        Some(Mutex::new(Bed { kind, server, wire }))
    };
    if let Some(bed) = BEDS[kind as usize].get_or_init(start) {
        let mut bed = bed.lock().unwrap_or_else(PoisonError::into_inner);
        // As the property before it may have left it.
        bed.server.start_again();
        bed.wire().heal();
        property(&mut bed);
    }
}

/// Kafka with listeners for TLS and SASL beside the plain one, RocketMQ with access lists.
fn calm_setup(kind: Kind) -> Setup {
    let lines: fn(u16, &Path) -> String = match kind {
        Kind::Redis => |_, _| String::new(),
        Kind::Kafka => |port, dir| {
            crate::settings::make_certificates(dir);
            let at = |name: &str, port| format!("{name}://127.0.0.1:{port}");
            let open = [
                at("PLAINTEXT", port),
                at("SASL", port + SASL),
                at("TLS", port + TLS),
            ]
            .join(",");
            let login = "org.apache.kafka.common.security";
            format!(
                "listeners={open},{}\nadvertised.listeners={open}\n\
                 listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT,SASL:SASL_PLAINTEXT,TLS:SSL\n\
                 listener.name.sasl.sasl.enabled.mechanisms=PLAIN,SCRAM-SHA-256,SCRAM-SHA-512\n\
                 listener.name.sasl.plain.sasl.jaas.config={login}.plain.PlainLoginModule required \
                 user_{USER}=\"{PASSWORD}\";\n\
                 listener.name.sasl.scram-sha-256.sasl.jaas.config={login}.scram.ScramLoginModule required;\n\
                 listener.name.sasl.scram-sha-512.sasl.jaas.config={login}.scram.ScramLoginModule required;\n\
                 listener.name.tls.ssl.keystore.type=PEM\n\
                 listener.name.tls.ssl.keystore.location={}/server.pem\n",
                at("CONTROLLER", port + 1),
                dir.display()
            )
        },
        Kind::RocketMq => |_, _| {
            let auth = "org.apache.rocketmq.auth";
            format!(
                "authenticationEnabled=true\nauthorizationEnabled=true\n\
                 authenticationProvider={auth}.authentication.provider.DefaultAuthenticationProvider\n\
                 authenticationMetadataProvider={auth}.authentication.provider.LocalAuthenticationMetadataProvider\n\
                 authorizationProvider={auth}.authorization.provider.DefaultAuthorizationProvider\n\
                 authorizationMetadataProvider={auth}.authorization.provider.LocalAuthorizationMetadataProvider\n\
                 initAuthenticationUser={{\"username\":\"{USER}\",\"password\":\"{PASSWORD}\"}}\n\
                 innerClientAuthenticationCredentials={{\"accessKey\":\"{USER}\",\"secretKey\":\"{PASSWORD}\"}}\n"
            )
        },
    };
    Setup {
        lines: Some(Box::new(lines)),
        scram: (kind == Kind::Kafka).then_some("shop:right-secret"),
        ..Setup::default()
    }
}

fn rough_setup(kind: Kind) -> Setup {
    let lines: fn(u16, &Path) -> String = match kind {
        // Small files; quick looks at the disk, once it has run for a minute; no deletion of orders in need.
        Kind::RocketMq => |_, _| {
            "mappedFileSizeCommitLog=4194304\ncleanResourceInterval=300\ncleanFileForciblyEnable=false\n".to_owned()
        },
        Kind::Kafka | Kind::Redis => |_, _| String::new(),
    };
    Setup {
        lines: Some(Box::new(lines)),
        room_mib: (kind != Kind::Redis).then_some(ROOM_MIB),
        ..Setup::default()
    }
}

impl Bed {
    pub fn start(kind: Kind, setup: Setup) -> Option<Self> {
        let (server, wire) = (Server::start_with(kind, setup)?, None);
        Some(Bed { kind, server, wire })
    }

    /// The proxy of a server that may be harmed.
    pub fn wire(&self) -> &Wire {
        self.wire.as_ref().expect("this server has a proxy")
    }

    /// The address that takes frames, for whoever is not a client under test.
    pub fn address(&self) -> SocketAddr {
        *self.server.addresses().last().expect("an address")
    }

    /// A client that has not connected yet.
    pub fn client(&self, log: &str, timeout: Duration) -> Arc<dyn Broker> {
        match self.kind {
            Kind::Redis => Arc::new(redis_client(self.redis_settings(log, timeout))),
            Kind::Kafka => {
                Arc::new(KafkaBroker::new(self.kafka_settings(log, timeout)).expect("settings"))
            }
            Kind::RocketMq => Arc::new(RocketMqBroker::new(self.rocketmq_settings(log, timeout))),
        }
    }

    /// A client that has connected.
    pub fn ready(&self, log: &str) -> Arc<dyn Broker> {
        let client = self.client(log, LONG);
        connect(&*client);
        client
    }

    fn front(&self) -> SocketAddr {
        let wire = self.wire.as_ref().map(Wire::address);
        wire.unwrap_or_else(|| self.address())
    }

    pub fn redis_settings(&self, log: &str, timeout: Duration) -> RedisSettings {
        RedisSettings {
            url: format!("redis://{}/", self.front()),
            stream: log.to_owned(),
            replicas_min: 0,
            timeout,
        }
    }

    pub fn kafka_settings(&self, log: &str, timeout: Duration) -> KafkaSettings {
        KafkaSettings {
            bootstrap: self.front().to_string(),
            topic: log.to_owned(),
            partition: 0,
            tls: None,
            sasl: None,
            timeout,
        }
    }

    pub fn rocketmq_settings(&self, log: &str, timeout: Duration) -> RocketMqSettings {
        let keys = self.wire.is_none().then_some((USER, PASSWORD)).unzip();
        RocketMqSettings {
            namesrv: self.server.address().to_string(),
            topic: log.to_owned(),
            queue: 0,
            access_key: keys.0.map(str::to_owned),
            secret_key: keys.1.map(str::to_owned),
            timeout,
        }
    }

    /// Deletes frames before `before`, perhaps more, as somebody else or the broker's own retention may.
    pub fn trim(&mut self, log: &str, before: Position) {
        match self.kind {
            Kind::Redis => {
                let least = before.place.to_string();
                redis(self.address(), &["XTRIM", log, "MINID", "=", &least]);
            }
            // The client's own request is all that there is.
            Kind::Kafka => self.ready(log).forget(before).expect("records are deleted"),
            // It deletes whole files by age, at most once a minute: by hand, then.
            Kind::RocketMq => {
                self.server.kill9();
                let files = std::fs::read_dir(self.server.dir().join("data/store/commitlog"));
                let files = files
                    .expect("its files")
                    .map(|file| file.expect("a file").path());
                let mut files: Vec<_> = files.collect();
                files.sort();
                for file in &files[..files.len() - 3] {
                    std::fs::remove_file(file).expect("a file is deleted");
                }
                self.server.start_again();
            }
        }
    }
}

pub fn redis_client(settings: RedisSettings) -> RedisBroker {
    RedisBroker::new(settings).expect("settings")
}

/// Connects, once the server is there.
pub fn connect(client: &dyn Broker) -> Vec<String> {
    while_away(PATIENCE, || client.check())
        .unwrap_or_else(|error| panic!("{}: {error}", client.title()))
        .warnings
}

/// A name that no other log has.
pub fn fresh(name: &str) -> String {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    format!("{name}-{}", NEXT.fetch_add(1, Ordering::Relaxed))
}

pub fn place(epoch: u64, number: u64) -> Place {
    Place { epoch, number }
}

/// Bytes that no other number has.
pub fn bytes(number: u64, length: usize) -> Vec<u8> {
    let mut state = number.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut bytes = number.to_be_bytes().to_vec();
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend((state >> 16).to_be_bytes());
    }
    bytes.truncate(length.max(8));
    bytes
}

/// Stores a frame.
pub fn send(client: &dyn Broker, place: Place, frame: &[u8]) -> Position {
    let offset = client
        .send(place, frame)
        .unwrap_or_else(|error| panic!("{}: {place}: {error}", client.title()));
    Position { place, offset }
}

/// Everything that is there.
pub fn all(client: &dyn Broker) -> Vec<Stored> {
    let (mut pages, mut found) = (Pages::after(client, None), Vec::new());
    loop {
        let page = while_away(PATIENCE, || pages.read()).expect("the log is read");
        if page.is_empty() {
            return found;
        }
        found.extend(page);
    }
}

/// Holds an outcome of a send against what is stored. Says whether it is there.
pub fn judge(
    found: &[Stored],
    frame: &[u8],
    said: &Result<u64, SendError>,
) -> Result<bool, String> {
    let there: Vec<u64> = found
        .iter()
        .filter(|one| one.frame == frame)
        .map(|one| one.offset)
        .collect();
    match said {
        Ok(offset) if there == [*offset] => Ok(true),
        Err(SendError::Unknown(_)) if there.len() <= 1 => Ok(there.len() == 1),
        Ok(_) | Err(SendError::Unknown(_)) => Err(format!("{said:?}, and it is at {there:?}")),
        // Every other one says that it is certainly not stored.
        Err(_) if there.is_empty() => Ok(false),
        Err(error) => Err(format!("{error}, but it is at {there:?}")),
    }
}

/// A sentence has all of these parts.
pub fn says(sentence: impl ToString, parts: &[&str]) {
    let sentence = sentence.to_string();
    for part in parts {
        assert!(
            sentence.contains(part),
            "`{part}` is missing in: {sentence}"
        );
    }
}

/// The sentence of a refusal.
pub fn refused<T>(checked: Result<T, BrokerError>) -> String {
    match checked {
        Err(BrokerError::Refused(sentence)) => sentence,
        Err(other) => panic!("refused was expected: {other:?}"),
        Ok(_) => panic!("refused was expected, and all is well"),
    }
}
