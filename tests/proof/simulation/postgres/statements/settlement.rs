//! Payments, expiry and waiting lists.

use tokio_postgres::types::Type;

use super::super::locks::Waits;
use super::super::session::{Refused, Session};
use super::super::tables::{Key, Node, Order, Payment, Row};
use super::Value::{I4, I4s, I8, I8s, Null, Text};
use super::{
    Done, EXPIRED, PAYABLE, Parameters, Sql, WAITING, changed, facts, i8_or_null, refused, rows,
    sorted, units,
};

impl Session {
    pub(super) async fn run_settlement(
        &mut self,
        sql: Sql,
        with: &Parameters,
    ) -> Result<Done, Refused> {
        match sql {
            Sql::Events => {
                let (providers, ids, payments) = (with.texts(2), with.texts(3), with.texts(6));
                let mut new = 0;
                for at in 0..ids.len() {
                    let name = |texts: &[Option<String>]| texts[at].clone().unwrap_or_default();
                    let key = Key::Event(name(&providers), name(&ids), payments[at].clone());
                    if !self.view(|view| view.has(&key)) {
                        self.put(key, Row::Event);
                        new += 1;
                    }
                }
                changed(new)
            }
            Sql::Known => {
                let names = with.texts(1).into_iter().zip(with.texts(2)).enumerate();
                let known = names.filter_map(|(at, (provider, id))| {
                    let key = Key::PaymentId(provider?, id?);
                    self.view(|view| view.has(&key))
                        .then(|| vec![I8(at as i64 + 1)])
                });
                rows(known.collect())
            }
            Sql::Payments => self.store_payments(with),
            Sql::Waiting => {
                let ids = with.i8s(1);
                let orphan = |_: i64, one: &Payment| {
                    one.state == "orphan" && one.order.is_some_and(|id| ids.contains(&id))
                };
                let mut found = Vec::new();
                for (id, _) in self.view(|view| view.payments(orphan)) {
                    self.lock(&Key::Payment(id), Waits::Long).await?;
                    let payment = self.view(|view| view.payment(&Key::Payment(id)));
                    if let Some(one) = payment.filter(|one| one.state == "orphan") {
                        let order = one.order.map_or(Null, I8);
                        let (currency, name) = (Text(one.currency), Text(one.payment_id));
                        found.push(vec![I8(id), order, I8(one.amount), currency, name]);
                    }
                }
                rows(found)
            }
            Sql::TryOrders => {
                let mut found = Vec::new();
                for id in sorted(with.i8s(1)) {
                    if let Some(one) = self.locked_order(id, Waits::Not).await? {
                        found.push(facts(id, one));
                    }
                }
                rows(found)
            }
            Sql::MoveOrders => {
                let (was, now, reasons) = (with.i2s(2), with.i2s(3), with.texts(4));
                let mut moved = 0;
                for (at, id) in with.i8s(1).into_iter().enumerate() {
                    let Some(mut order) = self.locked_order(id, Waits::Long).await? else {
                        continue;
                    };
                    if order.status == was[at] {
                        order.status = now[at];
                        order.reason = reasons[at].clone().or(order.reason);
                        self.put(Key::Order(id), Row::Order(order));
                        moved += 1;
                    }
                }
                changed(moved)
            }
            Sql::MovePayments => {
                let (states, reasons, now) = (with.texts(2), with.texts(3), with.i8(4));
                let mut moved = 0;
                for (at, id) in with.i8s(1).into_iter().enumerate() {
                    let state = states[at].clone().unwrap_or_default();
                    moved += self
                        .move_orphan(id, &state, reasons[at].clone(), now)
                        .await?;
                }
                changed(moved)
            }
            Sql::GiveUp => {
                let (id, now) = (with.i8(1), with.i8(3));
                let order = self.view(|view| view.payment(&Key::Payment(id)));
                let has_order = order.and_then(|one| one.order).is_some_and(|id| {
                    self.view(|view| view.has(&Key::Order(id)) || view.has(&Key::DeadLetter(id)))
                });
                if has_order {
                    return changed(0);
                }
                let reason = Some(with.text(2));
                let moved = self.move_orphan(id, "refund_due", reason, now).await?;
                changed(moved)
            }
            Sql::Look => {
                let (limit, now) = (with.i8(3) as usize, with.i8(4));
                let of: Option<i32> = with.get(5, &Type::INT4);
                rows(self.view(|view| {
                    let looked = view.first_orders(with.i8(1), with.i8(2), limit);
                    let is_due = |one: &Order| {
                        let is_wanted = of.is_none_or(|sku| one.sku == sku);
                        one.status == PAYABLE && one.expires_ms <= now && is_wanted
                    };
                    let due: Vec<_> = looked.iter().filter(|(_, one)| is_due(one)).collect();
                    let last = i8_or_null(looked.last().map(|(id, _)| *id));
                    let count = I8(looked.len() as i64);
                    if due.is_empty() {
                        return vec![vec![count, last, Null, Null, Null]];
                    }
                    let ids = due.iter().map(|(id, _)| *id).collect();
                    let skus = due.iter().map(|(_, one)| one.sku).collect();
                    let until = due.iter().map(|(_, one)| one.expires_ms).collect();
                    vec![vec![count, last, I8s(ids), I4s(skus), I8s(until)]]
                }))
            }
            Sql::LockOverdue => {
                let mut locked = Vec::new();
                for id in sorted(with.i8s(1)) {
                    let order = self.locked_order(id, Waits::Not).await?;
                    let is_due =
                        |one: &Order| one.status == PAYABLE && one.expires_ms <= with.i8(2);
                    if order.is_some_and(|one| is_due(&one)) {
                        locked.push(vec![I8(id)]);
                    }
                }
                rows(locked)
            }
            Sql::Expire => {
                let (now, with_orphans) = (with.i8(2), with.flag(3));
                let mut ended = Vec::new();
                for id in sorted(with.i8s(1)) {
                    let Some(mut order) = self.locked_order(id, Waits::Not).await? else {
                        continue;
                    };
                    let in_time = |one: &Payment| one.counts_at() < order.expires_ms;
                    let is_due = order.status == PAYABLE && order.expires_ms <= now;
                    let is_paid = with_orphans && self.orphans_of(id).iter().any(in_time);
                    if is_due && !is_paid {
                        order.status = EXPIRED;
                        ended.push(units(id, &order));
                        self.put(Key::Order(id), Row::Order(order));
                    }
                }
                rows(ended)
            }
            Sql::Assign => {
                let mut assigned = Vec::new();
                for id in sorted(with.i8s(1)) {
                    let Some(mut order) = self.locked_order(id, Waits::Long).await? else {
                        continue;
                    };
                    if order.status == WAITING {
                        (order.status, order.expires_ms) = (PAYABLE, with.i8(2));
                        order.assigned_ms = Some(with.i8(3));
                        assigned.push(units(id, &order));
                        self.put(Key::Order(id), Row::Order(order));
                    }
                }
                rows(assigned)
            }
            Sql::EndWaiting => {
                let unservable = with.flag(2);
                let mut ended = Vec::new();
                for id in sorted(with.i8s(1)) {
                    let Some(mut order) = self.locked_order(id, Waits::Not).await? else {
                        continue;
                    };
                    let total = self.view(|view| view.sku(&Key::Sku(order.sku)));
                    let fits = total.is_some_and(|sku| i64::from(order.quantity) <= sku.total);
                    if order.status == WAITING && !(unservable && fits) {
                        order.status = EXPIRED;
                        ended.push(units(id, &order));
                        self.put(Key::Order(id), Row::Order(order));
                    }
                }
                rows(ended)
            }
            Sql::NoteLists => {
                let skus = with.i4s(2);
                for sku in self.view(|view| view.lists()) {
                    if !skus.contains(&sku) {
                        self.delete(Key::List(sku));
                    }
                }
                let count = skus.len();
                for sku in skus {
                    self.put(Key::List(sku), Row::List);
                }
                changed(count)
            }
            Sql::FreeSkus | Sql::LockSkus => {
                let mut locked = Vec::new();
                for sku in with.i4s(1) {
                    let waits = match sql {
                        Sql::FreeSkus => Waits::Not,
                        _ => Waits::Long,
                    };
                    if self.lock(&Key::Sku(sku), waits).await? {
                        locked.push(vec![I4(sku)]);
                    }
                }
                rows(locked)
            }
            Sql::UnpaidChanges => {
                let node = self.view(|view| view.node(&Key::Node));
                rows(
                    node.map(|node| vec![I8(node.unpaid_changes)])
                        .into_iter()
                        .collect(),
                )
            }
            Sql::UnpaidFrom => {
                if !self.lock(&Key::Node, Waits::Not).await? {
                    return changed(0);
                }
                let node = self.view(|view| view.node(&Key::Node));
                let ours = node
                    .filter(|node| node.epoch == with.i8(2) && node.unpaid_changes == with.i8(3));
                self.change_node(ours.map(|node| Node {
                    unpaid_from: with.i8(4),
                    ..node
                }))
            }
            Sql::NoteCheck | Sql::NoteOrder => {
                let key = Key::Payment(with.i8(1));
                self.lock(&key, Waits::Long).await?;
                let payment = self.view(|view| view.payment(&key));
                let Some(mut payment) = payment.filter(|one| one.state == "orphan") else {
                    return changed(0);
                };
                if sql == Sql::NoteCheck {
                    (payment.checks, payment.check_ms) = (with.i4(2), with.i8(3));
                } else {
                    payment.order = payment.order.or(Some(with.i8(2)));
                }
                self.put(key, Row::Payment(payment));
                changed(1)
            }
            Sql::Recover => {
                let id = with.i8(1);
                self.lock(&Key::Order(id), Waits::Long).await?;
                if self.view(|view| view.has(&Key::Order(id)) || view.has(&Key::DeadLetter(id))) {
                    return changed(0);
                }
                let order = Order {
                    status: with.get(8, &Type::INT2),
                    created_ms: with.i8(9),
                    expires_ms: with.i8(10),
                    key: with.0[10].clone(),
                    payload: with.i8(12),
                    reason: with.get(13, &Type::TEXT),
                    ..with.bought()
                };
                let is_in = self.insert(id, order)?;
                changed(usize::from(is_in))
            }
            other => unreachable!("{other:?} is of another file"),
        }
    }

    fn store_payments(&mut self, with: &Parameters) -> Result<Done, Refused> {
        let (received, paid, orders) = (with.i8s(1), with.i8s_or_null(2), with.i8s_or_null(6));
        let (amounts, words) = (with.i8s(7), |number| with.texts(number));
        let [providers, ids, refs, currencies, receipts, states, reasons] =
            [3, 4, 5, 8, 9, 10, 11].map(words);
        for at in 0..ids.len() {
            let word = |of: &[Option<String>]| of[at].clone().unwrap_or_default();
            let name = Key::PaymentId(word(&providers), word(&ids));
            if self.view(|view| view.has(&name)) {
                return Err(refused(
                    "23505",
                    "duplicate key value violates payments_payment",
                ));
            }
            self.put(name, Row::PaymentId);
            let payment = Payment {
                received_ms: received[at],
                paid_ms: paid[at],
                provider: word(&providers),
                payment_id: word(&ids),
                order_ref: word(&refs),
                order: orders[at],
                amount: amounts[at],
                currency: word(&currencies),
                receipt: receipts[at].clone(),
                state: word(&states),
                reason: reasons[at].clone(),
                changed_ms: with.i8(12),
                checks: 0,
                check_ms: with.i8(13),
                reference: None,
            };
            let id = self.server.next_payment();
            self.put(Key::Payment(id), Row::Payment(payment));
        }
        changed(ids.len())
    }

    async fn move_orphan(
        &mut self,
        id: i64,
        state: &str,
        reason: Option<String>,
        now: i64,
    ) -> Result<usize, Refused> {
        let key = Key::Payment(id);
        self.lock(&key, Waits::Long).await?;
        let payment = self.view(|view| view.payment(&key));
        let Some(mut payment) = payment.filter(|one| one.state == "orphan") else {
            return Ok(0);
        };
        payment.state = state.to_owned();
        (payment.reason, payment.changed_ms) = (reason, now);
        self.put(key, Row::Payment(payment));
        Ok(1)
    }

    fn orphans_of(&self, order: i64) -> Vec<Payment> {
        let orphan = |_: i64, one: &Payment| one.order == Some(order) && one.state == "orphan";
        let payments = self.view(|view| view.payments(orphan)).into_iter();
        payments.map(|(_, one)| one).collect()
    }

    pub(super) fn change_node(&mut self, node: Option<Node>) -> Result<Done, Refused> {
        let count = usize::from(node.is_some());
        if let Some(node) = node {
            self.put(Key::Node, Row::Node(node));
        }
        changed(count)
    }
}
