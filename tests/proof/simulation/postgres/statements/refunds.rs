//! Refunds, cancellations and pauses.

use tokio_postgres::types::Type;

use super::super::locks::Waits;
use super::super::session::{Refused, Session};
use super::super::tables::{Key, Payment, Row};
use super::Value::{Bool, I4, Text};
use super::{Done, NEVER_MS, Parameters, Sql, changed, facts, rows, sorted};

impl Session {
    pub(super) async fn run_refunds(
        &mut self,
        sql: Sql,
        with: &Parameters,
    ) -> Result<Done, Refused> {
        match sql {
            Sql::LockOrders => {
                let mut found = Vec::new();
                for id in sorted(with.i8s(1)) {
                    if let Some(one) = self.locked_order(id, Waits::Long).await? {
                        found.push(facts(id, one));
                    }
                }
                rows(found)
            }
            Sql::MarkRefunded => {
                let (order, from) = (with.i8(1), with.text(2));
                let is_wanted =
                    |_: i64, one: &Payment| one.order == Some(order) && one.state == from;
                let mut marked = 0;
                for (id, _) in self.view(|view| view.payments(is_wanted)) {
                    let key = Key::Payment(id);
                    self.lock(&key, Waits::Long).await?;
                    let payment = self.view(|view| view.payment(&key));
                    let Some(mut payment) = payment.filter(|one| one.state == from) else {
                        continue;
                    };
                    payment.state = "refunded".to_owned();
                    payment.changed_ms = with.i8(3);
                    payment.reference = with.get(4, &Type::TEXT);
                    self.put(key, Row::Payment(payment));
                    marked += 1;
                }
                changed(marked)
            }
            Sql::IsRefunded => {
                let reference: Option<String> = with.get(2, &Type::TEXT);
                let is_it = |_: i64, one: &Payment| {
                    let is_refunded = one.order == Some(with.i8(1)) && one.state == "refunded";
                    is_refunded && reference.is_some() && one.reference == reference
                };
                let found = self.view(|view| view.payments(is_it));
                rows(found.into_iter().map(|_| Vec::new()).take(1).collect())
            }
            Sql::RefundOrder => {
                let id = with.i8(1);
                let Some(mut order) = self.locked_order(id, Waits::Long).await? else {
                    return changed(0);
                };
                order.status = with.get(2, &Type::INT2);
                self.put(Key::Order(id), Row::Order(order));
                changed(1)
            }
            Sql::RefundLetter => {
                let id = with.i8(1);
                let Some(mut letter) = self.locked_letter(id).await? else {
                    return changed(0);
                };
                letter.order.status = with.get(2, &Type::INT2);
                self.put(Key::DeadLetter(id), Row::DeadLetter(letter));
                changed(1)
            }
            // Nobody pauses here; a sale that was never paused is resumed.
            Sql::Pause => changed(1),
            Sql::EndOrder => {
                let (id, from) = (with.i8(1), with.i2s(2));
                let now: Option<i64> = with.get(4, &Type::INT8);
                let Some(mut order) = self.locked_order(id, Waits::Long).await? else {
                    return rows(Vec::new());
                };
                let in_time = now.is_none_or(|now| order.expires_ms > now);
                if !from.contains(&order.status) || !in_time {
                    return rows(Vec::new());
                }
                order.status = Some(with.i2(3));
                let waited = order.expires_ms == NEVER_MS;
                let (user, sku, quantity) = (order.user.clone(), order.sku, order.quantity);
                self.put(Key::Order(id), Row::Order(order));
                rows(vec![vec![Text(user), I4(sku), I4(quantity), Bool(waited)]])
            }
            other => unreachable!("{other:?} is of another file"),
        }
    }
}
