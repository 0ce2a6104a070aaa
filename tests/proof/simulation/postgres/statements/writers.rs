//! Writers: their rows, batches and counters.

use super::super::locks::Waits;
use super::super::session::{Refused, Session};
use super::super::tables::{Key, Order, Row, Writer};
use super::Value::{Bool, I2, I4, I8};
use super::{Done, Parameters, Sql, changed, refused, rows};

impl Session {
    pub(super) async fn run_writers(
        &mut self,
        sql: Sql,
        with: &Parameters,
    ) -> Result<Done, Refused> {
        match sql {
            Sql::Resolve => {
                let key = Key::Writer(with.i2(2));
                self.lock(&key, Waits::Long).await?;
                let writer = self.view(|view| view.writer(&key));
                let pid = self.pid;
                let row = |writer: Writer| vec![I8(writer.epoch), I8(writer.batch), I4(pid)];
                rows(writer.map(row).into_iter().collect())
            }
            Sql::EndSuspect => {
                let ended = self.server.end_session(with.i4(1), Some(&with.text(2)));
                rows(ended.then(|| vec![Bool(true)]).into_iter().collect())
            }
            Sql::FenceBatch | Sql::Fence => {
                let (key, epoch, batch) = (Key::Writer(with.i2(2)), with.i8(3), with.i8(4));
                self.lock(&key, Waits::Long).await?;
                let writer = self.view(|view| view.writer(&key));
                let ours =
                    writer.filter(|writer| writer.epoch == epoch && writer.batch == batch - 1);
                let Some(writer) = ours else {
                    return changed(0);
                };
                self.put(key, Row::Writer(Writer { batch, ..writer }));
                match sql {
                    Sql::FenceBatch => rows(vec![vec![Bool(self.trigger().is_some())]]),
                    _ => changed(1),
                }
            }
            Sql::Counter => {
                self.move_counters(&[(with.i4(1), [0, with.i8(2), 0])])
                    .await
            }
            Sql::EndCounter => {
                let units = with.i8(2);
                self.move_counters(&[(with.i4(1), [0, -units, 0])]).await
            }
            Sql::Counters => {
                let moved: Vec<_> = with
                    .i4s(1)
                    .into_iter()
                    .zip(with.i8s(2))
                    .map(|(sku, units)| (sku, [0, units, 0]))
                    .collect();
                self.move_counters(&moved).await
            }
            Sql::SettleCounters => {
                let (total, held, sold) = (with.i8s(2), with.i8s(3), with.i8s(4));
                let skus = with.i4s(1).into_iter().enumerate();
                let moved: Vec<_> = skus
                    .map(|(at, sku)| (sku, [total[at], held[at], sold[at]]))
                    .collect();
                self.move_counters(&moved).await
            }
            Sql::Epoch => {
                let node = self.view(|view| view.node(&Key::Node));
                rows(node.map(|node| vec![I8(node.epoch)]).into_iter().collect())
            }
            Sql::Batches => {
                let writers = self.view(|view| view.writers());
                let writers = writers.into_iter();
                rows(
                    writers
                        .map(|(shard, one)| vec![I2(shard), I8(one.batch)])
                        .collect(),
                )
            }
            other => unreachable!("{other:?} is of another file"),
        }
    }

    /// The rows of a COPY.
    pub async fn copied(&mut self, to: Sql, orders: Vec<(i64, Order)>) -> Result<u64, Refused> {
        let mut count = 0;
        for (id, order) in orders {
            let key = match to {
                Sql::CopyParked => Key::Parked(id),
                _ => Key::Order(id),
            };
            self.lock(&key, Waits::Long).await?;
            if self.view(|view| view.has(&key)) {
                return Err(refused(
                    "23505",
                    "duplicate key value violates a primary key",
                ));
            }
            if to == Sql::CopyParked {
                self.put(key, Row::Parked(order));
                count += 1;
            } else if order.status.is_none() {
                return Err(refused("23502", "null value in column status"));
            } else {
                count += u64::from(self.insert(id, order)?);
            }
        }
        Ok(count)
    }

    /// Writes a row of `orders`, unless a trigger has something against it. False: it has dropped the row.
    pub(super) fn insert(&mut self, id: i64, order: Order) -> Result<bool, Refused> {
        let trigger = self.trigger();
        if let Some(trigger) = trigger.filter(|trigger| trigger.quantity == order.quantity) {
            self.server.note_refused(id);
            return match trigger.drops {
                true => Ok(false),
                false => Err(refused("P0001", "a trigger does not want this quantity")),
            };
        }
        self.put(Key::Order(id), Row::Order(order));
        Ok(true)
    }

    /// Moves total, held and sold of SKUs.
    pub(super) async fn move_counters(
        &mut self,
        moved: &[(i32, [i64; 3])],
    ) -> Result<Done, Refused> {
        for (sku, _) in moved {
            self.lock(&Key::Sku(*sku), Waits::Long).await?;
        }
        for (sku, [total, held, sold]) in moved {
            let Some(mut row) = self.view(|view| view.sku(&Key::Sku(*sku))) else {
                return Err(refused("23502", "null value in column total_after"));
            };
            row.total += total;
            row.held += held;
            row.sold += sold;
            if row.held < 0 || row.sold < 0 || row.held + row.sold > row.total {
                return Err(refused("23514", "new row violates check sku_not_oversold"));
            }
            if self
                .server
                .held_max(*sku)
                .is_some_and(|most| row.held > most)
            {
                return Err(refused("23514", "new row violates a check of somebody's"));
            }
            self.put(Key::Sku(*sku), Row::Sku(row));
        }
        changed(moved.len())
    }
}
