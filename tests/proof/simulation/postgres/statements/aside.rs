//! Orders that are no rows: parked ones and dead letters, and what an operator does with these.

use std::collections::BTreeMap;
use std::rc::Rc;

use tokio_postgres::types::Type;

use super::super::locks::Waits;
use super::super::session::{Refused, Session};
use super::super::tables::{Key, Letter, Node, Order, Row};
use super::Value::{Bool, Bytes, I4, I8, Null, Text};
use super::{
    Done, PAYABLE, Parameters, Sql, Value, changed, facts, rows, sorted, units, window_row,
};

impl Session {
    pub(super) async fn run_aside(&mut self, sql: Sql, with: &Parameters) -> Result<Done, Refused> {
        match sql {
            Sql::TakeParked => {
                let mut taken = 0;
                for id in sorted(with.i8s(1)) {
                    taken += usize::from(self.take_parked(id).await?.is_some());
                }
                changed(taken)
            }
            Sql::ParkedBySku => {
                let mut of_sku: BTreeMap<i32, [i64; 2]> = BTreeMap::new();
                for (_, one) in self.parked(i64::MIN, i64::MAX) {
                    let sum = of_sku.entry(one.sku).or_default();
                    *sum = [sum[0] + 1, sum[1] + i64::from(one.quantity)];
                }
                let row = |(sku, sum): (i32, [i64; 2])| vec![I4(sku), I8(sum[0]), I8(sum[1])];
                rows(of_sku.into_iter().map(row).collect())
            }
            Sql::ParkedOf => {
                let mut found = self.parked(i64::MIN, i64::MAX);
                found.retain(|(_, one)| one.sku == with.i4(1));
                found.truncate(with.i8(2) as usize);
                rows(self.parked_rows(found))
            }
            Sql::ParkedDue => {
                let after = (with.i8(2), with.i8(3));
                let place = |(id, one): &(i64, Order)| (one.expires_ms, *id);
                let mut found = self.parked(i64::MIN, i64::MAX);
                found.retain(|one| one.1.expires_ms <= with.i8(1) && place(one) > after);
                found.sort_by_key(place);
                found.truncate(with.i8(4) as usize);
                rows(self.parked_rows(found))
            }
            Sql::IsParked => {
                let is_there = self.view(|view| view.has(&Key::Parked(with.i8(1))));
                rows(is_there.then(Vec::new).into_iter().collect())
            }
            Sql::WindowParked => {
                let found = self.parked(with.i8(1), with.i8(2)).into_iter();
                let row = |(id, one): (i64, Order)| window_row(id, &one, PAYABLE, None);
                rows(found.take(with.i8(3) as usize).map(row).collect())
            }
            Sql::WindowDead => {
                let found = self.view(|view| view.letters(with.i8(1), with.i8(2)));
                let row = |(id, one): (i64, Letter)| window_row(id, &one.order, None, None);
                rows(
                    found
                        .into_iter()
                        .take(with.i8(3) as usize)
                        .map(row)
                        .collect(),
                )
            }
            Sql::LiveParked => {
                let (skus, limit) = (with.i4s(4), with.i8(3) as usize);
                let found = self.parked(with.i8(1), with.i8(2)).into_iter();
                let found = found.filter(|(_, one)| skus.contains(&one.sku)).take(limit);
                rows(found.map(|(id, one)| units(id, &one)).collect())
            }
            Sql::HeldUnits => {
                let (node, skus) = (self.view(|view| view.node(&Key::Node)), with.i4s(4));
                let from = node.map_or(0, |node| node.unpaid_from).min(with.i8(2));
                let mut of_sku: BTreeMap<i32, i64> = BTreeMap::new();
                let is_held = |_, one: &Order| one.status == PAYABLE && skus.contains(&one.sku);
                for (_, one) in self.view(|view| view.orders_where(from, i64::MAX, is_held)) {
                    *of_sku.entry(one.sku).or_default() += i64::from(one.quantity);
                }
                let row = |(sku, units): (i32, i64)| vec![I4(sku), I8(units)];
                rows(of_sku.into_iter().map(row).collect())
            }
            Sql::TryCounters => {
                self.move_counters(&[(with.i4(1), [0, with.i8(2), 0])])
                    .await
            }
            Sql::TotalOf => {
                let skus = self.view(|view| view.skus());
                let of_name = skus.into_iter().find(|(_, sku)| sku.name == with.text(1));
                rows(
                    of_name
                        .map(|(_, sku)| vec![I8(sku.total)])
                        .into_iter()
                        .collect(),
                )
            }
            Sql::EndParked => {
                let (id, now) = (with.i8(1), with.get::<i64>(3, &Type::INT8));
                let in_time = |one: &Order| now.is_none_or(|now| one.expires_ms > now);
                let parked = self.view(|view| view.parked(&Key::Parked(id)));
                if !with.flag(4) || !parked.is_some_and(|one| in_time(&one)) {
                    return rows(Vec::new());
                }
                let Some(mut order) = self.take_parked(id).await? else {
                    return rows(Vec::new());
                };
                order.status = with.get(2, &Type::INT2);
                let row = vec![Text(order.user.clone()), I4(order.sku), I4(order.quantity)];
                let is_in = self.insert(id, order)?;
                let of_no_row = vec![Null, Null, Null];
                rows(vec![if is_in { row } else { of_no_row }])
            }
            Sql::BuryParked => {
                let id = with.i8(1);
                let key = Key::DeadLetter(id);
                let is_one_already = self.view(|view| view.has(&key));
                let node = self.view(|view| view.node(&Key::Node));
                let is_ours = node.map(|node| node.epoch) == Some(with.i8(5));
                let order = if is_ours {
                    self.take_parked(id).await?
                } else {
                    None
                };
                let is_made = order.is_some();
                if let Some(order) = order {
                    self.bury(id, order);
                }
                rows(vec![vec![Bool(is_made || is_one_already)]])
            }
            Sql::DeadLetter => {
                let node = self.view(|view| view.node(&Key::Node));
                let key = Key::DeadLetter(with.i8(1));
                self.lock(&key, Waits::Long).await?;
                let is_ours = node.map(|node| node.epoch) == Some(with.i8(16));
                if !is_ours || self.view(|view| view.has(&key)) {
                    return changed(0);
                }
                let order = Order {
                    created_ms: with.i8(8),
                    expires_ms: with.i8(9),
                    key: with.0[9].clone(),
                    payload: with.i8(11),
                    attributes: with.get::<&str>(12, &Type::TEXT).map(Rc::from),
                    ..with.bought()
                };
                self.bury(with.i8(1), order);
                changed(1)
            }
            Sql::LockDeadLetters => {
                let mut found = Vec::new();
                for id in sorted(with.i8s(1)) {
                    if let Some(letter) = self.locked_letter(id).await? {
                        found.push(facts(id, letter.order));
                    }
                }
                rows(found)
            }
            Sql::MoveDeadLetters => {
                let (statuses, reasons) = (with.i2s(2), with.texts(3));
                let mut moved = 0;
                for (at, id) in with.i8s(1).into_iter().enumerate() {
                    let Some(mut letter) = self.locked_letter(id).await? else {
                        continue;
                    };
                    letter.order.status = statuses[at];
                    letter.order.reason = reasons[at].clone().or(letter.order.reason);
                    self.put(Key::DeadLetter(id), Row::DeadLetter(letter));
                    moved += 1;
                }
                changed(moved)
            }
            Sql::FindLetter => {
                let Some((id, letter)) = self.numbered(with.i8(1)) else {
                    return rows(Vec::new());
                };
                let one = letter.order;
                let sku = self.view(|view| view.sku(&Key::Sku(one.sku)));
                rows(vec![vec![
                    I8(letter.number),
                    I8(0),
                    I8(id),
                    Text(one.user),
                    sku.map_or(Null, |sku| Text(sku.name)),
                    I4(one.sku),
                    I4(one.quantity),
                    I8(one.amount),
                    Text(one.currency),
                    Text("P0001".to_owned()),
                    Text("refused".to_owned()),
                    one.attributes.map_or(Null, |text| Text(text.to_string())),
                    if letter.is_discarded { I8(0) } else { Null },
                    Null,
                ]])
            }
            Sql::LockLetter => {
                let Some((id, _)) = self.numbered(with.i8(1)) else {
                    return rows(Vec::new());
                };
                let letter = self.locked_letter(id).await?;
                rows(letter.map(|_| Vec::new()).into_iter().collect())
            }
            Sql::Discard => {
                let Some((id, _)) = self.numbered(with.i8(1)) else {
                    return changed(0);
                };
                let letter = self.locked_letter(id).await?;
                let Some(mut letter) = letter.filter(|letter| !letter.is_discarded) else {
                    return changed(0);
                };
                letter.is_discarded = true;
                self.put(Key::DeadLetter(id), Row::DeadLetter(letter));
                changed(1)
            }
            Sql::Revive => {
                let Some((id, _)) = self.numbered(with.i8(1)) else {
                    return rows(Vec::new());
                };
                let is_open =
                    |letter: &Letter| !letter.is_discarded && letter.order.status.is_none();
                let letter = self.locked_letter(id).await?.filter(is_open);
                let Some(letter) = letter else {
                    return rows(Vec::new());
                };
                let mut order = letter.order;
                (order.status, order.expires_ms) = (PAYABLE, with.i8(2));
                let row = vec![I8(id), I4(order.sku), I4(order.quantity)];
                self.delete(Key::DeadLetter(id));
                let is_in = self.insert(id, order)?;
                rows(is_in.then_some(row).into_iter().collect())
            }
            Sql::NoteUnpaid => {
                self.lock(&Key::Node, Waits::Long).await?;
                let node = self.view(|view| view.node(&Key::Node));
                let changed = node.map(|node| Node {
                    unpaid_from: node.unpaid_from.min(with.i8(2)),
                    unpaid_changes: node.unpaid_changes + 1,
                    ..node
                });
                self.change_node(changed)
            }
            other => unreachable!("{other:?} is of another file"),
        }
    }

    fn parked(&self, from: i64, to: i64) -> Vec<(i64, Order)> {
        self.view(|view| view.all_parked(from, to))
    }

    fn parked_rows(&self, found: Vec<(i64, Order)>) -> Vec<Vec<Value>> {
        let row = |(id, one): (i64, Order)| {
            let sku = self.view(|view| view.sku(&Key::Sku(one.sku)))?;
            Some(vec![
                I8(id),
                Text(one.user),
                Text(sku.name),
                I4(one.sku),
                I4(one.quantity),
                I8(one.adjustment),
                I8(one.amount),
                Text(one.currency),
                I8(one.created_ms),
                I8(one.expires_ms),
                one.key.map_or(Null, Bytes),
                I8(one.payload),
                one.attributes.map_or(Null, |text| Text(text.to_string())),
            ])
        };
        found.into_iter().filter_map(row).collect()
    }

    async fn take_parked(&mut self, id: i64) -> Result<Option<Order>, Refused> {
        let key = Key::Parked(id);
        if !self.view(|view| view.has(&key)) {
            return Ok(None);
        }
        self.lock(&key, Waits::Long).await?;
        let parked = self.view(|view| view.parked(&key));
        if parked.is_some() {
            self.delete(key);
        }
        Ok(parked)
    }

    fn bury(&mut self, id: i64, order: Order) {
        let letter = Letter {
            number: self.server.next_letter(),
            order,
            is_discarded: false,
        };
        self.put(Key::DeadLetter(id), Row::DeadLetter(letter));
    }

    /// The dead letter of an order, locked.
    pub(super) async fn locked_letter(&mut self, id: i64) -> Result<Option<Letter>, Refused> {
        let key = Key::DeadLetter(id);
        if !self.view(|view| view.has(&key)) {
            return Ok(None);
        }
        self.lock(&key, Waits::Long).await?;
        Ok(self.view(|view| view.letter(&key)))
    }

    /// The dead letter of this number, with its order's id.
    fn numbered(&self, number: i64) -> Option<(i64, Letter)> {
        let letters = self.view(|view| view.letters(i64::MIN, i64::MAX));
        letters
            .into_iter()
            .find(|(_, letter)| letter.number == number)
    }
}
