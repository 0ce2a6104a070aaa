//! Taking the database over: the steps from a checked journal and a fitting schema to the right to write.

use std::sync::Arc;

use tokio::sync::Mutex;

use super::gone_nodes::GoneNodes;
use super::joining::{self, JoinParts, JoinedNode};
use super::open::{OpenDatabase, open_database, prepare_schema};
use super::order_log::{self, FoundLog, OwnedLog};
use super::planes::Planes;
use super::{StartError, clock};
use crate::config::Config;
use crate::order::receipt::{Issuer, ReceiptKeys};
use crate::order::{ClockReading, UnixMillis};
use crate::store::embedded::Embedded;
use crate::store::postgres::lease::{self, NodeGuard, Taken};
use crate::store::postgres::order_log::{LogName, NotedLog};
use crate::store::postgres::{self, Database, NodeLease};

/// The exclusive resources of the process that owns a database, or is a node of a cluster that does.
pub(super) struct Ownership {
    pub(super) database: Database,
    pub(super) embedded: Option<Arc<Mutex<Embedded>>>,
    pub(super) lease: NodeLease,
    /// Keeps other processes away from this database; `None` for a node, whose membership does that.
    pub(super) guard: Option<Arc<Mutex<NodeGuard>>>,
    /// The membership of a node.
    pub(super) node: Option<JoinedNode>,
    /// The nodes whose place a process on its own takes.
    pub(super) gone: Option<GoneNodes>,
    /// The order log and its name, if the queue is durable.
    pub(super) log: Option<(OwnedLog, LogName)>,
    pub(super) clock: ClockReading,
    pub(super) receipts: Arc<ReceiptKeys>,
    /// The identity of the database.
    pub(super) identity: [u8; 16],
    pub(super) writers: Writers,
    /// All ids of predecessors lie before this moment.
    pub(super) id_high_water: UnixMillis,
    /// End of our lease of order ids.
    pub(super) ids_leased_until: UnixMillis,
    /// Whether an operator has paused every sale.
    pub(super) paused: bool,
}

/// A row of `node` that was taken.
pub(super) struct Owned {
    pub(super) lease: NodeLease,
    pub(super) id_high_water: UnixMillis,
    pub(super) ids_leased_until: UnixMillis,
    pub(super) paused: bool,
    pub(super) receipts: Issuer,
}

impl Ownership {
    /// Reads the order log, opens the database, migrates its schema, compares the clocks and takes the node over.
    pub(super) async fn take(
        config: &Config,
        planes: &Planes,
        receipt_secrets: &[String],
    ) -> Result<Self, StartError> {
        let log = order_log::find(config, &planes.control, 0).await?;
        planes.control.progress("opening the database".to_owned());
        let OpenDatabase { database, embedded } = open_database(config).await?;
        let mut guard = lease::claim(&database).await?;
        // Not earlier: another process may be running on this `data_dir`, and its file must not be replaced.
        let noted = planes.write_addresses(&config.data_dir);
        noted.map_err(|source| StartError::data_dir(config, source))?;
        prepare_schema(config, &database).await?;
        let gone = GoneNodes::look(config, &planes.control, &database, &guard).await?;
        let noted = postgres::order_log::noted(&database, &guard, 0).await?;
        order_log::check(config, log.as_ref(), noted.as_ref())?;
        let clock = clock::check(config, &database, &guard, embedded.is_some()).await?;
        let logged = log.as_ref().map(|log| log.id_high_water());
        let ids_from = logged.unwrap_or(UnixMillis(0)).max(clock.now());
        let writers = Writers::beside(config.worker_count());
        gone.disband(&database, &mut guard).await?;
        let Taken {
            lease,
            id_high_water,
            ids_leased_until,
            paused,
            receipts,
            guard,
        } = lease::take_over(guard, writers.count(), ids_from).await?;
        let guard = NodeGuard::keep(database.clone(), guard).await?;
        let owned = Owned {
            lease,
            id_high_water,
            ids_leased_until,
            paused,
            receipts,
        };
        let log = log.map(|log| owned.log(log, noted.as_ref()));
        Ok(Ownership {
            embedded: embedded.map(|embedded| Arc::new(Mutex::new(embedded))),
            guard: Some(Arc::new(Mutex::new(guard))),
            gone: Some(gone),
            ..owned.of(database, log, clock, receipt_secrets, writers)
        })
    }

    /// Opens the database, migrates its schema, compares the clocks and joins the cluster, then finds the order log of the
    /// node that this process has become. From the joining on its membership is renewed.
    pub(super) async fn join(
        parts: JoinParts<'_>,
        receipt_secrets: &[String],
    ) -> Result<Self, StartError> {
        let (config, planes) = (parts.config, parts.planes);
        let control = &planes.control;
        control.progress("opening the database".to_owned());
        let OpenDatabase { database, .. } = open_database(config).await?;
        let shared = lease::share(&database, joining::NAME).await?;
        let noted = planes.write_addresses(&config.data_dir);
        noted.map_err(|source| StartError::data_dir(config, source))?;
        prepare_schema(config, &database).await?;
        let clock = clock::check(config, &database, &shared, false).await?;
        let (owned, node) = joining::join(parts, &database, shared, clock).await?;
        let database = database.of_node(owned.lease.node)?;
        let number = u8::try_from(owned.lease.node).unwrap_or(u8::MAX);
        let log = order_log::find(config, control, number).await?;
        let session = database.connect(joining::NAME).await?;
        let noted = postgres::order_log::noted(&database, &session, owned.lease.node).await?;
        order_log::check(config, log.as_ref(), noted.as_ref())?;
        let log = log.map(|log| owned.log(log, noted.as_ref()));
        let writers = Writers::beside(config.worker_count());
        Ok(Ownership {
            node: Some(node),
            ..owned.of(database, log, clock, receipt_secrets, writers)
        })
    }
}

impl Owned {
    fn log(&self, log: FoundLog, noted: Option<&NotedLog>) -> (OwnedLog, LogName) {
        let name = LogName {
            id: log.name(),
            title: log.title(),
        };
        (log.owned(self.receipts.database, self.lease, noted), name)
    }

    fn of(
        self,
        database: Database,
        log: Option<(OwnedLog, LogName)>,
        clock: ClockReading,
        receipt_secrets: &[String],
        writers: Writers,
    ) -> Ownership {
        Ownership {
            database,
            embedded: None,
            lease: self.lease,
            guard: None,
            node: None,
            gone: None,
            log,
            clock,
            receipts: Arc::new(ReceiptKeys::new(receipt_secrets, &self.receipts)),
            identity: self.receipts.database,
            writers,
            id_high_water: self.id_high_water,
            ids_leased_until: self.ids_leased_until,
            paused: self.paused,
        }
    }
}

/// The numbers of the rows of `writer`: the workers have the first ones, replay and restore share the next.
#[derive(Clone, Copy, Debug)]
pub(super) struct Writers {
    workers: i16,
}

impl Writers {
    pub(super) fn beside(workers: usize) -> Self {
        let workers = i16::try_from(workers).unwrap_or(i16::MAX - 6);
        Writers { workers }
    }

    pub(super) fn count(self) -> i16 {
        self.workers + 6
    }

    pub(super) fn replay(self) -> i16 {
        self.workers
    }

    pub(super) fn parking(self) -> i16 {
        self.workers + 1
    }

    pub(super) fn expiry(self) -> i16 {
        self.workers + 2
    }

    pub(super) fn processor(self) -> i16 {
        self.workers + 3
    }

    pub(super) fn callbacks(self) -> i16 {
        self.workers + 4
    }

    pub(super) fn assigner(self) -> i16 {
        self.workers + 5
    }
}
