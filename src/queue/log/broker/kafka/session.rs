//! The way to the leader of the partition, and the check of the topic on it.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use kafka_protocol::{
    messages::{
        MetadataRequest, MetadataResponse, TopicName,
        metadata_request::MetadataRequestTopic,
        metadata_response::{MetadataResponsePartition, MetadataResponseTopic},
    },
    protocol::StrBytes,
};
use parking_lot::Mutex;
use rustls::{
    ClientConfig, RootCertStore,
    crypto::ring,
    pki_types::{CertificateDer, pem::PemObject},
};

use super::{
    BrokerError, KafkaSettings, Tls,
    codes::{
        self, INVALID_PARTITIONS, LEADER_NOT_AVAILABLE, REPLICA_NOT_AVAILABLE,
        TOPIC_ALREADY_EXISTS, UNKNOWN_TOPIC_OR_PARTITION,
    },
    link::{Ask, Fault, Link, Server},
    topic::{self, Facts},
};

/// How long to wait before a topic just made is looked for again.
const PAUSE: Duration = Duration::from_millis(20);

/// Milliseconds that are left, at least 1.
pub(super) fn milliseconds(deadline: Instant) -> i32 {
    let left = deadline
        .saturating_duration_since(Instant::now())
        .as_millis();
    i32::try_from(left).unwrap_or(i32::MAX).max(1)
}

/// A connection to the leader of the partition, whose topic has been checked.
#[derive(Debug)]
pub(super) struct Leader {
    pub(super) link: Link,
    pub(super) epoch: i32,
    pub(super) facts: Facts,
}

impl Leader {
    /// Asks. The answer is not judged yet.
    pub(super) fn call<Q: Ask>(
        &mut self,
        request: &Q,
        deadline: Instant,
    ) -> Result<Q::Answer, BrokerError> {
        ask(&mut self.link, request, deadline)
    }

    /// The one part of an answer that is about one partition.
    pub(super) fn only<T>(&self, mut parts: impl Iterator<Item = T>) -> Result<T, BrokerError> {
        match (parts.next(), parts.next()) {
            (Some(part), None) => Ok(part),
            _ => Err(self.nonsense("no answer for the partition")),
        }
    }

    /// An error, if the code is one.
    pub(super) fn passes(&self, code: i16) -> Result<(), BrokerError> {
        if code == 0 {
            Ok(())
        } else {
            Err(codes::of_question(
                &self.link.server.to_string(),
                code,
                None,
            ))
        }
    }

    pub(super) fn nonsense(&self, reason: &str) -> BrokerError {
        BrokerError::Away(format!("{} answered nonsense: {reason}", self.link.server))
    }
}

/// What metadata say of the partition.
pub(super) enum Found {
    Missing,
    /// The topic is there, and this partition of it is not.
    TooFew(BrokerError),
    /// There is no leader now, and there may be one soon.
    Leaderless(BrokerError),
    Led {
        server: Server,
        epoch: i32,
        replicas: usize,
    },
}

/// The servers, and the way to connect.
#[derive(Debug)]
pub(super) struct Cluster {
    pub(super) settings: KafkaSettings,
    bootstrap: Vec<Server>,
    /// Brokers that metadata named last, for a time when those to begin with are away.
    known: Mutex<Vec<Server>>,
    tls: Option<Arc<ClientConfig>>,
}

impl Cluster {
    pub(super) fn new(settings: KafkaSettings) -> Result<Self, BrokerError> {
        let bootstrap = servers(&settings.bootstrap)?;
        if settings.partition < 0 {
            return Err(BrokerError::Refused(format!(
                "partition {} is negative",
                settings.partition
            )));
        }
        let tls = settings.tls.as_ref().map(client_config).transpose()?;
        Ok(Self {
            settings,
            bootstrap,
            known: Mutex::new(Vec::new()),
            tls,
        })
    }

    /// Finds the leader, connects to it, and checks the topic, after making it or its partition if `make` allows that.
    pub(super) fn open(&self, deadline: Instant, make: bool) -> Result<Leader, BrokerError> {
        let mut link = self.any(deadline)?;
        let mut made = false;
        loop {
            let metadata = self.metadata(&mut link, deadline)?;
            match self.find(&link.server, &metadata)? {
                Found::Led {
                    server,
                    epoch,
                    replicas,
                } => {
                    let link = if server == link.server {
                        link
                    } else {
                        self.link(&server, deadline)?
                    };
                    return self.checked(link, epoch, replicas, deadline);
                }
                Found::Missing if make && !made => {
                    self.create(&metadata, deadline)?;
                    made = true;
                }
                Found::TooFew(_) if make && !made => {
                    self.extend(&metadata, deadline)?;
                    made = true;
                }
                // What was just made is not known everywhere at once.
                Found::Missing | Found::TooFew(_) | Found::Leaderless(_)
                    if made && milliseconds(deadline) > 1 =>
                {
                    std::thread::sleep(PAUSE);
                }
                Found::Missing => {
                    return Err(BrokerError::Away(format!(
                        "topic {} is missing",
                        self.settings.topic
                    )));
                }
                Found::TooFew(error) | Found::Leaderless(error) => return Err(error),
            }
        }
    }

    /// The leader of each partition of the topic, by number. It has to be there.
    pub(super) fn leaders(&self, deadline: Instant) -> Result<Vec<Server>, BrokerError> {
        let mut link = self.any(deadline)?;
        let metadata = self.metadata(&mut link, deadline)?;
        self.find_all(&link.server, &metadata)
    }

    /// A connection to one server.
    pub(super) fn link(&self, server: &Server, deadline: Instant) -> Result<Link, BrokerError> {
        Link::open(
            server,
            self.tls.as_ref(),
            self.settings.sasl.as_ref(),
            deadline,
        )
        .map_err(of_fault)
    }

    /// A connection to any broker. Each gets its share of the time, so one that is silent does not use up all of it.
    fn any(&self, deadline: Instant) -> Result<Link, BrokerError> {
        let mut servers = self.bootstrap.clone();
        for server in self.known.lock().iter() {
            if !servers.contains(server) {
                servers.push(server.clone());
            }
        }
        let mut said = Vec::new();
        for (tried, server) in servers.iter().enumerate() {
            let now = Instant::now();
            let share = deadline.saturating_duration_since(now)
                / u32::try_from(servers.len() - tried).unwrap_or(u32::MAX);
            match self.link(server, now + share) {
                Err(BrokerError::Away(reason) | BrokerError::Lost(reason)) => said.push(reason),
                done => return done,
            }
        }
        Err(BrokerError::Away(said.join("; ")))
    }

    fn metadata(
        &self,
        link: &mut Link,
        deadline: Instant,
    ) -> Result<MetadataResponse, BrokerError> {
        let topic = MetadataRequestTopic::default().with_name(Some(TopicName(
            StrBytes::from_string(self.settings.topic.clone()),
        )));
        let request = MetadataRequest::default()
            .with_topics(Some(vec![topic]))
            .with_allow_auto_topic_creation(false);
        let answer = ask(link, &request, deadline)?;
        *self.known.lock() = named(&answer);
        Ok(answer)
    }

    pub(super) fn find(
        &self,
        asked: &Server,
        metadata: &MetadataResponse,
    ) -> Result<Found, BrokerError> {
        let of = |code| self.of_topic(asked, code);
        let Some(found) = self.topic(metadata) else {
            return Ok(Found::Missing);
        };
        match found.error_code {
            0 => {}
            LEADER_NOT_AVAILABLE => return Ok(Found::Leaderless(of(LEADER_NOT_AVAILABLE))),
            code => return Err(of(code)),
        }
        let wanted = self.settings.partition;
        let Some(partition) = found
            .partitions
            .iter()
            .find(|p| p.partition_index == wanted)
        else {
            return Ok(Found::TooFew(BrokerError::Refused(format!(
                "topic {} has {} partitions and must have {} for partition {wanted}",
                self.settings.topic,
                found.partitions.len(),
                i64::from(wanted) + 1
            ))));
        };
        Ok(match led(metadata, partition) {
            Ok(server) => Found::Led {
                server,
                epoch: partition.leader_epoch,
                replicas: partition.replica_nodes.len(),
            },
            Err(code) => Found::Leaderless(of(code)),
        })
    }

    pub(super) fn find_all(
        &self,
        asked: &Server,
        metadata: &MetadataResponse,
    ) -> Result<Vec<Server>, BrokerError> {
        let Some(found) = self.topic(metadata) else {
            return Err(BrokerError::Away(format!(
                "topic {} is missing: make it, with the partitions and the retention that its readers want",
                self.settings.topic
            )));
        };
        if found.error_code != 0 {
            return Err(self.of_topic(asked, found.error_code));
        }
        let mut partitions: Vec<_> = found.partitions.iter().collect();
        partitions.sort_by_key(|partition| partition.partition_index);
        let leader = |(number, partition): (i32, &MetadataResponsePartition)| {
            if partition.partition_index != number {
                return Err(LEADER_NOT_AVAILABLE);
            }
            led(metadata, partition)
        };
        let leaders: Result<_, _> = (0..).zip(partitions).map(leader).collect();
        leaders.map_err(|code| self.of_topic(asked, code))
    }

    /// The topic, if it is there.
    fn topic<'a>(&self, metadata: &'a MetadataResponse) -> Option<&'a MetadataResponseTopic> {
        let is_ours = |name: &TopicName| name.0.as_str() == self.settings.topic;
        metadata
            .topics
            .iter()
            .find(|topic| topic.name.as_ref().is_some_and(is_ours))
            .filter(|topic| topic.error_code != UNKNOWN_TOPIC_OR_PARTITION)
    }

    fn of_topic(&self, asked: &Server, code: i16) -> BrokerError {
        let topic = format!("topic {}", self.settings.topic);
        codes::of_question(&asked.to_string(), code, Some(&topic))
    }

    /// A connection to the controller: older brokers do not pass requests for new topics and partitions on.
    fn controller(
        &self,
        metadata: &MetadataResponse,
        deadline: Instant,
    ) -> Result<Link, BrokerError> {
        let controller = metadata
            .brokers
            .iter()
            .find(|broker| broker.node_id == metadata.controller_id)
            .and_then(|broker| server(&broker.host, broker.port))
            .ok_or_else(|| BrokerError::Away("kafka has no controller now".to_owned()))?;
        self.link(&controller, deadline)
    }

    /// Gives the topic the partitions that are missing, as another node may do at the same time.
    fn extend(&self, metadata: &MetadataResponse, deadline: Instant) -> Result<(), BrokerError> {
        let topic = &self.settings.topic;
        let mut link = self.controller(metadata, deadline)?;
        let partitions = self.settings.partition.saturating_add(1);
        let request = topic::extension(topic, partitions, milliseconds(deadline));
        let answer = ask(&mut link, &request, deadline)?;
        let code = answer.results.first().map(|result| result.error_code);
        match code {
            Some(0 | INVALID_PARTITIONS) => Ok(()),
            Some(code) => Err(codes::of_question(
                &link.server.to_string(),
                code,
                Some(&format!("topic {topic} cannot get {partitions} partitions")),
            )),
            None => Err(BrokerError::Away(format!(
                "{} did not answer for topic {topic}",
                link.server
            ))),
        }
    }

    /// Makes the topic.
    fn create(&self, metadata: &MetadataResponse, deadline: Instant) -> Result<(), BrokerError> {
        let topic = &self.settings.topic;
        let mut link = self.controller(metadata, deadline)?;
        let controller = link.server.clone();
        let partitions = self.settings.partition.saturating_add(1);
        let request = topic::creation(
            topic,
            partitions,
            metadata.brokers.len(),
            milliseconds(deadline),
        );
        let answer = ask(&mut link, &request, deadline)?;
        match answer.topics.first() {
            Some(result) if matches!(result.error_code, 0 | TOPIC_ALREADY_EXISTS) => Ok(()),
            Some(result) => Err(codes::of_question(
                &controller.to_string(),
                result.error_code,
                Some(&format!(
                    "topic {topic} cannot be made: {}",
                    result.error_message.as_deref().unwrap_or_default()
                )),
            )),
            None => Err(BrokerError::Away(format!(
                "{controller} did not answer for topic {topic}"
            ))),
        }
    }

    fn checked(
        &self,
        mut link: Link,
        epoch: i32,
        replicas: usize,
        deadline: Instant,
    ) -> Result<Leader, BrokerError> {
        let name = &self.settings.topic;
        let answer = ask(&mut link, &topic::question(name), deadline)?;
        if let Some(result) = answer.results.iter().find(|result| result.error_code != 0) {
            return Err(codes::of_question(
                &link.server.to_string(),
                result.error_code,
                result.error_message.as_deref(),
            ));
        }
        let facts = topic::judge(name, replicas, &topic::settings(&answer))?;
        Ok(Leader { link, epoch, facts })
    }
}

fn ask<Q: Ask>(link: &mut Link, request: &Q, deadline: Instant) -> Result<Q::Answer, BrokerError> {
    link.call(request, deadline).map_err(of_fault)
}

fn of_fault(fault: Fault) -> BrokerError {
    match fault {
        Fault::Unsent(said) | Fault::Broken(said) => BrokerError::Away(said),
        Fault::Refused(said) => BrokerError::Refused(said),
    }
}

/// The leader of a partition, or the code that says why there is none.
fn led(metadata: &MetadataResponse, partition: &MetadataResponsePartition) -> Result<Server, i16> {
    // A replica that is missing does not keep the leader from answering.
    if !matches!(partition.error_code, 0 | REPLICA_NOT_AVAILABLE) {
        return Err(partition.error_code);
    }
    metadata
        .brokers
        .iter()
        .find(|broker| broker.node_id == partition.leader_id)
        .and_then(|leader| server(&leader.host, leader.port))
        .ok_or(LEADER_NOT_AVAILABLE)
}

/// The brokers that metadata name.
pub(super) fn named(metadata: &MetadataResponse) -> Vec<Server> {
    let brokers = metadata.brokers.iter();
    brokers
        .filter_map(|broker| server(&broker.host, broker.port))
        .take(16)
        .collect()
}

/// A host of the characters that Kafka's own clients take, and a port.
fn server(host: &str, port: i32) -> Option<Server> {
    let port = u16::try_from(port).ok().filter(|port| *port != 0)?;
    let is_of_host = |byte: u8| byte.is_ascii_alphanumeric() || b"-%._:".contains(&byte);
    (!host.is_empty() && host.bytes().all(is_of_host)).then(|| Server {
        host: host.to_owned(),
        port,
    })
}

pub(super) fn servers(list: &str) -> Result<Vec<Server>, BrokerError> {
    let parsed = |item: &str| {
        let (host, port) = item.rsplit_once(':')?;
        let host = host
            .strip_prefix('[')
            .and_then(|h| h.strip_suffix(']'))
            .unwrap_or(host);
        let is_number = port.bytes().all(|byte| byte.is_ascii_digit());
        server(host, is_number.then(|| port.parse().ok())??)
    };
    let items = list
        .split(',')
        .map(str::trim)
        .filter(|item| !item.is_empty());
    // The item is not repeated: somebody may have put credentials into it.
    let servers: Option<Vec<_>> = items.map(parsed).collect();
    servers
        .filter(|servers| !servers.is_empty())
        .ok_or_else(|| {
            BrokerError::Refused(
                "the brokers to begin with must be a list of host:port, separated by commas"
                    .to_owned(),
            )
        })
}

fn client_config(tls: &Tls) -> Result<Arc<ClientConfig>, BrokerError> {
    let mut roots = RootCertStore::empty();
    match tls {
        Tls::File(path) => {
            let unreadable = |reason: String| {
                BrokerError::Refused(format!("certificates {}: {reason}", path.display()))
            };
            let found: Vec<_> = CertificateDer::pem_file_iter(path)
                .and_then(Iterator::collect)
                .map_err(|e| unreadable(e.to_string()))?;
            for certificate in found {
                roots
                    .add(certificate)
                    .map_err(|e| unreadable(e.to_string()))?;
            }
            if roots.is_empty() {
                return Err(unreadable("there is none in it".to_owned()));
            }
        }
        Tls::System => {
            // Some certificates of a machine's store are always too old to be parsed.
            roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
            if roots.is_empty() {
                return Err(BrokerError::Refused(
                    "this machine trusts no certificate authority; install the package ca-certificates, or name a file"
                        .to_owned(),
                ));
            }
        }
    }
    let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(|e| BrokerError::Refused(format!("TLS cannot be used: {e}")))?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(Arc::new(config))
}

#[cfg(test)]
mod tests {
    use super::*;
    use kafka_protocol::messages::{BrokerId, metadata_response::MetadataResponseBroker};

    #[test]
    fn addresses_are_host_and_port() {
        let told = |list: &str| {
            servers(list).map(|found| found.iter().map(ToString::to_string).collect::<Vec<_>>())
        };
        assert_eq!(
            told("a:1, [::1]:9092,b.example:65535,").unwrap(),
            ["kafka a:1", "kafka [::1]:9092", "kafka b.example:65535"]
        );
        for list in [
            "",
            ",",
            "a",
            "a:0",
            ":1",
            "a:65536",
            "a:+1",
            "[::1:1",
            "a b:1",
            "user:secret@a:1",
            "kafka://a:1",
        ] {
            let error = told(list).unwrap_err().to_string();
            assert!(!error.contains("secret"), "{error}");
        }
    }

    /// Metadata of a topic in whose partitions one and its leader are odd.
    fn metadata(partitions: &[(i32, i32)]) -> MetadataResponse {
        let broker = |(id, host, port)| {
            MetadataResponseBroker::default()
                .with_node_id(BrokerId(id))
                .with_host(StrBytes::from_static_str(host))
                .with_port(port)
        };
        let partition = |(index, leader): &(i32, i32)| {
            MetadataResponsePartition::default()
                .with_partition_index(*index)
                .with_leader_id(BrokerId(*leader))
        };
        let topic = MetadataResponseTopic::default()
            .with_name(Some(TopicName(StrBytes::from_static_str("t"))))
            .with_partitions(partitions.iter().map(partition).collect());
        let brokers = [(1, "a", 9092), (2, "b", 0), (3, "", 9092)];
        MetadataResponse::default()
            .with_brokers(brokers.map(broker).to_vec())
            .with_topics(vec![topic])
    }

    #[test]
    fn the_leaders_are_those_of_every_partition_or_none() {
        let cluster = Cluster::new(KafkaSettings {
            bootstrap: "a:9092".to_owned(),
            topic: "t".to_owned(),
            partition: 0,
            tls: None,
            sasl: None,
            timeout: Duration::from_secs(1),
        })
        .unwrap();
        let asked = &cluster.bootstrap[0];
        let all = |partitions: &[_]| cluster.find_all(asked, &metadata(partitions));
        assert_eq!(
            all(&[(1, 1), (0, 1)]).unwrap(),
            [asked.clone(), asked.clone()]
        );
        // A gap, a partition twice, and leaders that nobody can connect to.
        for partitions in [
            [(0, 1), (2, 1)],
            [(0, 1), (0, 1)],
            [(0, 1), (1, 2)],
            [(0, 3), (1, 1)],
        ] {
            assert!(
                matches!(all(&partitions), Err(BrokerError::Away(_))),
                "{partitions:?}"
            );
        }
        let mut other = metadata(&[(0, 1)]);
        other.topics[0].name = Some(TopicName(StrBytes::from_static_str("other")));
        assert!(matches!(cluster.find(asked, &other), Ok(Found::Missing)));
    }
}
