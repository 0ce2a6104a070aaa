//! Reads.

use std::collections::BTreeMap;

use sha2::{Digest, Sha256};

use super::super::session::{Refused, Session};
use super::super::tables::{Key, Order, Payment, Sku, View};
use super::Value::{Bool, Bytes, I4, I8, Null, Text};
use super::{Done, Parameters, Sql, Value, i8_or_null, is_open, rows, text, units, window_row};

impl Session {
    pub(super) fn run_reads(&mut self, sql: Sql, with: &Parameters) -> Result<Done, Refused> {
        match sql {
            Sql::Skus => {
                let sku = |(id, one): (i32, Sku)| {
                    let counters = [one.total, one.held, one.sold].map(I8);
                    let [total, held, sold] = counters;
                    let (name, title) = (Text(one.name.clone()), Text(one.name));
                    let (price, currency) = (I8(one.price), Text("EUR".to_owned()));
                    vec![
                        I4(id),
                        name,
                        title,
                        price,
                        currency,
                        total,
                        held,
                        sold,
                        i8_or_null(one.limit),
                        Null,
                        Null,
                        Bool(false),
                        Null,
                        Bool(one.skips),
                        Null,
                        Null,
                        Null,
                        Bool(false),
                    ]
                };
                rows(self.view(|view| view.skus()).into_iter().map(sku).collect())
            }
            // Nothing is pruned here.
            Sql::DeletedBelow => rows(Vec::new()),
            Sql::SkuNumbers => {
                let skus = self.view(|view| view.skus()).into_iter();
                rows(skus.map(|(id, one)| vec![Text(one.name), I4(id)]).collect())
            }
            Sql::OrphanedOrders => {
                let mut least: BTreeMap<i64, i64> = BTreeMap::new();
                for (_, one) in self.view(|view| view.payments(|_, one| one.state == "orphan")) {
                    if let Some(id) = one.order {
                        let at = least.entry(id).or_insert(i64::MAX);
                        *at = (*at).min(one.counts_at());
                    }
                }
                rows(
                    least
                        .into_iter()
                        .map(|(id, at)| vec![I8(id), I8(at)])
                        .collect(),
                )
            }
            Sql::CountOpen => {
                let is_open =
                    |_: i64, one: &Payment| one.state == "orphan" || one.state == "refund_due";
                let payments = self.view(|view| view.payments(is_open));
                let of = |state: &str| {
                    let all = payments.iter().filter(|(_, one)| one.state == state);
                    all.map(|(_, one)| one.clone()).collect::<Vec<Payment>>()
                };
                let (orphans, due) = (of("orphan"), of("refund_due"));
                let oldest = orphans.iter().map(|one| one.received_ms).min();
                let oldest_due = due.iter().map(|one| one.changed_ms).min();
                let counts = [orphans.len(), due.len()].map(|count| I8(count as i64));
                let [orphans, due] = counts;
                rows(vec![vec![
                    orphans,
                    i8_or_null(oldest),
                    due,
                    i8_or_null(oldest_due),
                ]])
            }
            Sql::OrphansWithOrder => {
                let (after, limit) = (with.i8(1), with.i8(2) as usize);
                let all =
                    self.view(|view| payments(view, |id, one| id > after && one.state == "orphan"));
                let with_order = all.into_iter().filter(|row| matches!(row[16], Bool(true)));
                rows(with_order.take(limit).collect())
            }
            Sql::DueOrphans => {
                let (now, limit) = (with.i8(1), with.i8(2) as usize);
                let all = self.view(|view| view.payments(|_, one| one.state == "orphan"));
                let is_first = |id: i64, order: Option<i64>| {
                    !all.iter()
                        .any(|(other, one)| order.is_some() && one.order == order && *other < id)
                };
                let mut due = self.view(|view| {
                    payments(view, |id, one| {
                        one.state == "orphan" && one.check_ms <= now && is_first(id, one.order)
                    })
                });
                due.sort_by_key(|row| match row[13] {
                    I8(check_at) => check_at,
                    _ => 0,
                });
                due.truncate(limit);
                rows(due)
            }
            Sql::DigestOfRange => {
                let (from, to, limit) = (with.i8(1), with.i8(2), with.i8(3) as usize);
                let one = |(id, one): (i64, &Order)| {
                    let numbers = [id.to_be_bytes(), one.payload.to_be_bytes()];
                    [numbers.as_flattened(), one.user.as_bytes()].concat()
                };
                let found: Vec<Vec<u8>> = self.view(|view| {
                    let found = view.first_orders(from, to, limit).into_iter();
                    found.map(one).collect()
                });
                let digest = Sha256::digest(found.join(&0));
                let digest = (!found.is_empty()).then(|| Bytes(digest.to_vec()));
                rows(vec![vec![digest.unwrap_or(Null)]])
            }
            Sql::PresentInRange => {
                let (from, to, limit) = (with.i8(1), with.i8(2), with.i8(3) as usize);
                let found = self.view(|view| {
                    let letters = view.letters(from, to).into_iter();
                    let letters = letters.map(|(id, letter)| (id, letter.order)).collect();
                    [view.orders(from, to), letters, view.all_parked(from, to)]
                });
                let of_table = |(table, found): (i32, Vec<(i64, Order)>)| {
                    let found = found.into_iter().take(limit);
                    found.map(move |(id, one)| {
                        vec![I8(id), Text(one.user), I8(one.payload), I4(table)]
                    })
                };
                rows((0..).zip(found).flat_map(of_table).collect())
            }
            Sql::PresentByIds => {
                let of_id = |id: i64| {
                    let found = self.view(|view| {
                        let letter = view.letter(&Key::DeadLetter(id)).map(|one| one.order);
                        [
                            view.order(&Key::Order(id)),
                            letter,
                            view.parked(&Key::Parked(id)),
                        ]
                    });
                    let found = found.into_iter().flatten();
                    found.map(move |one| vec![I8(id), Text(one.user), I8(one.payload)])
                };
                rows(with.i8s(1).into_iter().flat_map(of_id).collect())
            }
            Sql::Absent => {
                let absent = with.i8s(1).into_iter().filter(|id| {
                    let keys = [Key::Order(*id), Key::DeadLetter(*id), Key::Parked(*id)];
                    !self.view(|view| keys.iter().any(|key| view.has(key)))
                });
                rows(absent.map(|id| vec![I8(id)]).collect())
            }
            Sql::OpenAmong => {
                let open = with.i8s(1).into_iter().filter(|id| {
                    let order = self.view(|view| view.order(&Key::Order(*id)));
                    order.is_some_and(|one| is_open(&one))
                });
                rows(open.map(|id| vec![I8(id)]).collect())
            }
            Sql::OpenBelow => {
                let node = self.view(|view| view.node(&Key::Node));
                let from = node.map_or(0, |node| node.unpaid_from);
                let below = with.i8(2).saturating_sub(1);
                let open = self.view(|view| view.orders_where(from, below, |_, one| is_open(one)));
                let row = |(id, one): (i64, Order)| {
                    let mut row = units(id, &one);
                    row.push(I8(one.expires_ms));
                    row
                };
                rows(open.into_iter().map(row).collect())
            }
            Sql::Ends => {
                let ends = self.view(|view| {
                    let all = view.first_orders(with.i8(1), with.i8(2), usize::MAX);
                    [all.first(), all.last()].map(|end| i8_or_null(end.map(|(id, _)| *id)))
                });
                let [first, last] = ends;
                rows(vec![vec![first, last, Bool(false)]])
            }
            Sql::Window => {
                let limit = with.i8(3) as usize;
                let row = |(id, one): (i64, &Order)| {
                    let until = is_open(one).then_some(one.expires_ms);
                    window_row(id, one, one.status, until)
                };
                rows(self.view(|view| {
                    let found = view.first_orders(with.i8(1), with.i8(2), limit);
                    found.into_iter().map(row).collect()
                }))
            }
            // Tables that stay empty here.
            Sql::Draws => rows(Vec::new()),
            Sql::FirstOfSkus => rows(vec![vec![I8(0)]]),
            Sql::Live => {
                let (skus, live) = (with.i4s(4), with.i2s(6));
                let limit = with.i8(3) as usize;
                rows(self.view(|view| {
                    let part = view.first_orders(with.i8(1), with.i8(2), limit);
                    let (last, count) = (part.last().map(|(id, _)| *id), part.len());
                    let is_wanted =
                        |one: &Order| skus.contains(&one.sku) && live.contains(&one.status);
                    let wanted = part.into_iter().filter(|(_, one)| is_wanted(one));
                    let mut found: Vec<_> = wanted.map(|(id, one)| units(id, one)).collect();
                    found.push(vec![i8_or_null(last), Null, Null, I4(count as i32)]);
                    found
                }))
            }
            Sql::StatusOf => {
                let status = self.view(|view| word_of(view, with.i8(1)));
                let row = |(_, word): (Order, &str)| vec![Text(word.to_owned())];
                rows(status.map(row).into_iter().collect())
            }
            Sql::Find => {
                let id = with.i8(1);
                let found = self.view(|view| stored(view, id));
                rows(found.into_iter().collect())
            }
            other => unreachable!("{other:?} is of another file"),
        }
    }
}

/// A row of `order_rows`: its status in words.
fn word_of(view: &View<'_>, id: i64) -> Option<(Order, &'static str)> {
    let word = |code: Option<i16>| {
        let status = code.and_then(millrace::order::OrderStatus::from_code);
        status.map(|status| status.as_str())
    };
    if let Some(order) = view.order(&Key::Order(id)) {
        let word = word(order.status)?;
        return Some((order, word));
    }
    if let Some(letter) = view.letter(&Key::DeadLetter(id)) {
        let word = word(letter.order.status).unwrap_or("failed");
        return Some((letter.order, word));
    }
    Some((view.parked(&Key::Parked(id))?, "accepted"))
}

fn stored(view: &View<'_>, id: i64) -> Option<Vec<Value>> {
    let (one, status) = word_of(view, id)?;
    let sku = view.sku(&Key::Sku(one.sku))?;
    Some(vec![
        I8(id),
        Text(one.user),
        Text(sku.name),
        I4(one.quantity),
        I8(one.adjustment),
        I8(one.amount),
        Text(one.currency),
        Text(status.to_owned()),
        I8(one.created_ms),
        I8(one.expires_ms),
        one.attributes.map_or(Null, |text| Text(text.to_string())),
        I4(one.sku),
        text(&one.reason),
        one.key.map_or(Null, Bytes),
        I8(one.payload),
    ])
}

fn payments(view: &View<'_>, is_wanted: impl Fn(i64, &Payment) -> bool) -> Vec<Vec<Value>> {
    let wanted = view.payments(is_wanted).into_iter();
    let row = |(id, one): (i64, Payment)| {
        let has = |id| view.has(&Key::Order(id)) || view.has(&Key::DeadLetter(id));
        let (has_order, counts_at) = (one.order.is_some_and(has), one.counts_at());
        vec![
            I8(id),
            Text(one.provider),
            Text(one.payment_id),
            Text(one.order_ref),
            i8_or_null(one.order),
            I8(one.amount),
            Text(one.currency),
            text(&one.receipt),
            Text(one.state),
            text(&one.reason),
            I8(one.received_ms),
            I8(one.changed_ms),
            I4(one.checks),
            I8(one.check_ms),
            Null,
            Null,
            Bool(has_order),
            I8(counts_at),
        ]
    };
    wanted.map(row).collect()
}
