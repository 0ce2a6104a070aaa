//! The row of the node, its leases and locks.

use super::super::locks::Waits;
use super::super::session::{Refused, Session};
use super::super::tables::{Key, Node, Row, Writer};
use super::Value::{Bool, Bytes, I4, I8, Null, Text};
use super::{Done, Parameters, Sql, changed, rows};

impl Session {
    pub(super) async fn run_node(&mut self, sql: Sql, with: &Parameters) -> Result<Done, Refused> {
        match sql {
            Sql::FenceNode => {
                let epoch = self
                    .view(|view| view.node(&Key::Node))
                    .map(|node| node.epoch);
                let is_ours = epoch == Some(with.i8(2));
                rows(is_ours.then(|| vec![I4(1)]).into_iter().collect())
            }
            // Nobody else is there.
            Sql::LockHolder => rows(Vec::new()),
            Sql::LockOut => rows(vec![vec![Bool(self.server.lock_out(self.pid))]]),
            Sql::Mark => {
                self.server.mark(with.i8(1), self.pid);
                rows(vec![vec![Text(String::new())]])
            }
            Sql::EndMarked => {
                let holder = self.server.marked_by(with.i8(1));
                let ended = holder.is_some_and(|pid| self.server.end_session(pid, None));
                rows(ended.then(|| vec![Bool(true)]).into_iter().collect())
            }
            Sql::IdsOfLanes | Sql::OtherNodes => rows(vec![vec![Null]]),
            Sql::NodeRow => {
                self.lock(&Key::Node, Waits::Long).await?;
                let node = self.view(|view| view.node(&Key::Node));
                let row = |node: Node| vec![I8(node.ids_leased_until_ms)];
                rows(node.map(row).into_iter().collect())
            }
            Sql::RaiseEpoch => {
                self.lock(&Key::Node, Waits::Long).await?;
                let node = self.view(|view| view.node(&Key::Node)).unwrap_or(Node {
                    epoch: 0,
                    ids_leased_until_ms: 0,
                    unpaid_from: 0,
                    unpaid_changes: 0,
                });
                let epoch = node.epoch + 1;
                let ids_leased_until_ms = with.i8(2);
                let node = Node {
                    epoch,
                    ids_leased_until_ms,
                    ..node
                };
                self.put(Key::Node, Row::Node(node));
                rows(vec![vec![I8(epoch), Bool(false)]])
            }
            Sql::RaiseWriters => {
                let epoch = with.i8(2);
                let shards = self.view(|view| view.writers());
                for (shard, _) in &shards {
                    self.lock(&Key::Writer(*shard), Waits::Long).await?;
                    // As it is now that it is ours.
                    if let Some(writer) = self.view(|view| view.writer(&Key::Writer(*shard))) {
                        self.put(Key::Writer(*shard), Row::Writer(Writer { epoch, ..writer }));
                    }
                }
                changed(shards.len())
            }
            Sql::AddWriters => {
                let epoch = with.i8(2);
                for shard in 0..with.i4(3) as i16 {
                    if !self.view(|view| view.has(&Key::Writer(shard))) {
                        self.put(Key::Writer(shard), Row::Writer(Writer { epoch, batch: 0 }));
                    }
                }
                changed(0)
            }
            Sql::Identity => {
                let since = self.view(|view| view.identity(&Key::Identity));
                let since = since.unwrap_or(with.i8(1));
                self.put(Key::Identity, Row::Identity(since));
                rows(vec![vec![Bytes(vec![7; 16]), I8(since)]])
            }
            Sql::Renew => {
                self.lock(&Key::Node, Waits::Long).await?;
                let node = self.view(|view| view.node(&Key::Node));
                let ours = node.filter(|node| node.epoch == with.i8(2));
                self.change_node(ours.map(|node| Node {
                    ids_leased_until_ms: node.ids_leased_until_ms.max(with.i8(3)),
                    ..node
                }))
            }
            Sql::Timeline => rows(vec![vec![Text(self.server.timeline())]]),
            Sql::Single | Sql::TakeUnpaid => changed(0),
            other => unreachable!("{other:?} is of another file"),
        }
    }
}
