//! The nodes of a cluster that have not left the database on which a process on its own starts.
//!
//! ```text
//!   their logs can be read? ─► give way for a lease: none comes back? ─► disband ─► own epoch ─► own log
//!     no: nothing changes        one does: nothing changes
//!   ─► their logs, each marked, replayed ─► none answers from its memory any more ─► they have left
//! ```
//!
//! Disbanded, the database is as after a failover: whoever starts next, this process or a node, can go on from there.

use std::sync::Arc;
use std::time::Duration;

use super::joining;
use super::ownership::Ownership;
use super::{StartError, order_log};
use crate::config::{Backend, Config};
use crate::http::control_plane::ControlPlane;
use crate::order::UnixMillis;
use crate::pipeline::cluster::member::Member;
use crate::pipeline::cluster::takeover::{TakeoverParts, Takeovers};
use crate::pipeline::failover::lease::{AcknowledgeLease, now_ms};
use crate::state::lanes::Lanes;
use crate::state::orphans::Orphans;
use crate::store::cluster::disband::{self, Remaining};
use crate::store::cluster::formats::Formats;
use crate::store::cluster::lanes;
use crate::store::postgres::{Connected, Database, lease};

/// Those of which none can be running.
pub(super) struct GoneNodes(Vec<Remaining>);

impl GoneNodes {
    /// Looks for them, on the session that keeps all other processes away. Changes nothing.
    pub(super) async fn look(
        config: &Config,
        control: &ControlPlane,
        database: &Database,
        guard: &Connected,
    ) -> Result<Self, StartError> {
        let nodes = disband::remaining(database, guard).await?;
        check(config, &nodes)?;
        if !nodes.iter().any(|node| node.may_run) {
            return Ok(GoneNodes(nodes));
        }
        let ms = config.cluster.lease_ms;
        let numbers = numbers(&nodes);
        tracing::warn!(
            nodes = numbers,
            ms,
            "nodes have not left this database; waiting for cluster.lease_ms whether one of them is alive"
        );
        control.progress(format!(
            "nodes {numbers} have not left; waiting {} s whether one is alive",
            ms.div_ceil(1_000)
        ));
        lease::give_way(database, guard, Duration::from_millis(ms)).await?;
        // Some may have come and left meanwhile.
        let nodes = disband::remaining(database, guard).await?;
        check(config, &nodes)?;
        Ok(GoneNodes(nodes))
    }

    /// Ends their rights: they can commit nothing any more.
    pub(super) async fn disband(
        &self,
        database: &Database,
        guard: &mut Connected,
    ) -> Result<(), StartError> {
        if self.0.is_empty() {
            return Ok(());
        }
        let nodes: Vec<i16> = self.0.iter().map(|node| node.node).collect();
        disband::disband_gone(database, guard, &nodes).await?;
        tracing::warn!(
            nodes = numbers(&self.0),
            "the nodes that were gone are disbanded; their logs are replayed next"
        );
        Ok(())
    }

    /// Replays their logs, after the own one was replayed, and waits until none of them can answer from its memory.
    pub(super) async fn replay(
        self,
        config: &Config,
        ownership: &mut Ownership,
        orphans: &Orphans,
        control: &ControlPlane,
    ) -> Result<(), StartError> {
        let Some(answer_lease_ms) = self.0.iter().map(|node| node.answer_lease_ms).max() else {
            return Ok(());
        };
        control.progress(format!(
            "replaying the logs of nodes that were gone: {}",
            numbers(&self.0)
        ));
        let settings = &config.cluster;
        let member = Arc::new(Member::new(
            ownership.lease,
            Arc::new(Lanes::new()),
            settings.lease_ms,
            settings.answer_lease_ms,
            Arc::new(AcknowledgeLease::of_log()),
        ));
        // The log of node 0 is the own one, which has its marker.
        member.wait_for_answers_of(now_ms(), answer_lease_ms);
        let database = &ownership.database;
        let takeovers = Takeovers::new(TakeoverParts {
            member,
            database: database.clone(),
            find_log: joining::find_log(config),
            identity: ownership.identity,
            rows_max: config.workers.batch_rows_max,
            clock: ownership.clock,
            changed: Arc::default(),
            metrics: control.metrics().clone(),
        });
        takeovers.finish_disbanded(orphans).await?;
        // Every id of theirs lies before these, those that were leased in a log alone too.
        let rows = lanes::all(database).await?;
        let ids_until = rows.iter().map(|row| row.ids_until).max();
        ownership.id_high_water = ownership
            .id_high_water
            .max(ids_until.unwrap_or(UnixMillis(0)));
        Ok(())
    }
}

/// Checks that every log which may hold orders can be read.
fn check(config: &Config, nodes: &[Remaining]) -> Result<(), StartError> {
    let reading = Formats {
        writes_from: 0,
        ..joining::FORMATS
    };
    reading.fit(nodes.iter().map(|node| (node.node, node.reads_format)))?;
    let is_elsewhere = |node: &&Remaining| {
        let number = u8::try_from(node.node).unwrap_or(u8::MAX);
        let name = order_log::name_of(config, number);
        node.log.as_ref().is_some_and(|log| log.name != name)
    };
    let elsewhere: Vec<_> = nodes.iter().filter(is_elsewhere).collect();
    if elsewhere.is_empty() {
        return Ok(());
    }
    let described = elsewhere.iter().filter_map(|node| {
        let log = node.log.as_ref()?;
        Some(format!("node {}: {} ({})", node.node, log.title, log.name))
    });
    Err(StartError::LogsOfNodes {
        logs: described.collect::<Vec<_>>().join("; "),
        found: match config.queue.backend {
            Backend::Memory => "queue.backend is memory".to_owned(),
            Backend::Journal => "queue.backend is journal".to_owned(),
            Backend::Redis | Backend::Kafka | Backend::RocketMq => {
                "queue names another broker, stream or topic".to_owned()
            }
        },
    })
}

fn numbers(nodes: &[Remaining]) -> String {
    let numbers = nodes.iter().map(|node| node.node.to_string());
    numbers.collect::<Vec<_>>().join(", ")
}
