//! Taking the database over: the steps from a checked journal and a fitting schema to the right to write.

use std::sync::Arc;

use tokio::sync::Mutex;

use super::open::{OpenDatabase, open_database, prepare_schema};
use super::order_log::{self, OwnedLog};
use super::planes::Planes;
use super::{StartError, clock};
use crate::config::Config;
use crate::order::receipt::ReceiptKeys;
use crate::order::{ClockReading, UnixMillis};
use crate::store::embedded::Embedded;
use crate::store::postgres::lease::{self, NodeGuard, Taken};
use crate::store::postgres::order_log::LogName;
use crate::store::postgres::{self, Database, NodeLease};

/// The exclusive resources of the process that owns a database.
pub(super) struct Ownership {
    pub(super) database: Database,
    pub(super) embedded: Option<Arc<Mutex<Embedded>>>,
    pub(super) lease: NodeLease,
    /// Keeps other processes away from this database.
    pub(super) guard: Arc<Mutex<NodeGuard>>,
    /// The order log and its name, if the queue is durable.
    pub(super) log: Option<(OwnedLog, LogName)>,
    pub(super) clock: ClockReading,
    pub(super) receipts: Arc<ReceiptKeys>,
    pub(super) writers: Writers,
    /// All ids of predecessors lie before this moment.
    pub(super) id_high_water: UnixMillis,
    /// End of our lease of order ids.
    pub(super) ids_leased_until: UnixMillis,
    /// Whether an operator has paused every sale.
    pub(super) paused: bool,
}

impl Ownership {
    /// Reads the order log, opens the database, migrates its schema, compares the clocks and takes the node over.
    pub(super) async fn take(
        config: &Config,
        planes: &Planes,
        receipt_secrets: &[String],
    ) -> Result<Self, StartError> {
        let log = order_log::find(config, &planes.control).await?;
        planes.control.progress("opening the database".to_owned());
        let OpenDatabase { database, embedded } = open_database(config).await?;
        let guard = lease::claim(&database).await?;
        // Not earlier: another process may be running on this `data_dir`, and its file must not be replaced.
        let noted = planes.write_addresses(&config.data_dir);
        noted.map_err(|source| StartError::data_dir(config, source))?;
        prepare_schema(config, &database).await?;
        let noted = postgres::order_log::noted(&database, &guard).await?;
        order_log::check(config, log.as_ref(), noted.as_ref())?;
        let clock = clock::check(config, &database, &guard, embedded.is_some()).await?;
        let logged = log.as_ref().map(|log| log.id_high_water());
        let ids_from = logged.unwrap_or(UnixMillis(0)).max(clock.now());
        let writers = Writers::beside(config.worker_count());
        let Taken {
            lease,
            id_high_water,
            ids_leased_until,
            paused,
            receipts: issuer,
            guard,
        } = lease::take_over(guard, writers.count(), ids_from).await?;
        let guard = NodeGuard::keep(database.clone(), guard).await?;
        Ok(Ownership {
            database,
            embedded: embedded.map(|embedded| Arc::new(Mutex::new(embedded))),
            lease,
            guard: Arc::new(Mutex::new(guard)),
            log: log.map(|log| {
                let name = LogName {
                    id: log.name(),
                    title: log.title(),
                };
                (log.owned(issuer.database, lease, noted.as_ref()), name)
            }),
            clock,
            receipts: Arc::new(ReceiptKeys::new(receipt_secrets, &issuer)),
            writers,
            id_high_water,
            ids_leased_until,
            paused,
        })
    }
}

/// The numbers of the rows of `writer`: the workers have the first ones, replay and restore share the next.
#[derive(Clone, Copy, Debug)]
pub(super) struct Writers {
    workers: i16,
}

impl Writers {
    fn beside(workers: usize) -> Self {
        let workers = i16::try_from(workers).unwrap_or(i16::MAX - 6);
        Writers { workers }
    }

    fn count(self) -> i16 {
        self.workers + 6
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
