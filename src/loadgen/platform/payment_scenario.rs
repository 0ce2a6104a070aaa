//! Decides which orders are paid, how and when: a pure function of the seed, the buyer and the SKU.
//!
//! Neither the order's id nor its moment matters, so that two runs of one plan pay alike whatever the
//! server's timing was.

use super::payment::{Forgery, PaymentKind};
use crate::loadgen::schedule::{fraction, mix};

/// Keeps these draws apart from those of the schedule.
const SALT: u64 = 0x7061_7965_7200_0005;

const MS: f64 = 1e6;
const S: f64 = 1e9;

/// Share of payments made at once, before an acknowledged order has its row.
const AT_ONCE_SHARE: f64 = 0.15;
/// Share of payments made too late, if the run is long enough for them.
const LATE_SHARE: f64 = 0.02;
/// Shares of the other kinds.
const WRONG_AMOUNT_SHARE: f64 = 0.005;
const SECOND_SHARE: f64 = 0.005;
const LOST_SHARE: f64 = 0.005;
/// Forged deliveries for each true one.
const FORGED_SHARE: f64 = 0.01;

/// The last delivery of a payment falls due no later than this after the first.
const SPREAD_NS: f64 = 2.0 * S;
/// A late payment's first delivery is due no later than this after the order expired.
const LATE_NS_MAX: f64 = S;

/// From an order's expiry to the last planned delivery of a payment that is late for it.
pub(in crate::loadgen) const LATE_TAIL_NS: u64 = (LATE_NS_MAX + SPREAD_NS) as u64;

/// One payment that will be made.
#[derive(Debug, Clone, PartialEq)]
pub(in crate::loadgen) struct PlannedPayment {
    pub kind: PaymentKind,
    /// A payment that nobody made: each of its deliveries has a false signature.
    pub forgery: Option<Forgery>,
    /// When each delivery is due, in nanoseconds after the order's answer; the first comes first.
    pub deliveries_ns: Vec<u64>,
    /// One more draw, for made-up ids and amounts.
    pub lot: u64,
}

/// Decides how each order is paid.
#[derive(Debug, Clone, Copy)]
pub(in crate::loadgen) struct PaymentScenario {
    seed: u64,
    /// The share of orders that are paid, 0 to 1.
    share: f64,
}

impl PaymentScenario {
    pub(in crate::loadgen) fn new(seed: u64, share: f64) -> Self {
        Self {
            seed: mix(seed ^ SALT),
            share,
        }
    }

    /// The payments for an order. `expires_in_ns`: when the order expires; none if a payment after that
    /// would lie beyond the run.
    pub(in crate::loadgen) fn of(
        &self,
        buyer: u32,
        sku: u16,
        expires_in_ns: Option<u64>,
    ) -> Vec<PlannedPayment> {
        let mut dice = Dice(self.seed ^ mix(u64::from(buyer) << 16 | u64::from(sku)));
        let mut planned = Vec::new();
        let mut true_deliveries = 1;
        if dice.fraction() < self.share {
            let mut lot = dice.fraction();
            let mut drawn = |share: f64| {
                lot -= share;
                (-share..0.0).contains(&lot)
            };
            let wrong_amount = drawn(WRONG_AMOUNT_SHARE);
            let second = drawn(SECOND_SHARE);
            let lost = drawn(LOST_SHARE);
            let late = drawn(LATE_SHARE);
            let soon = dice.soon();
            let (kind, first) = match expires_in_ns.filter(|_| late) {
                Some(expires_in_ns) => {
                    let after = dice.between(0.1 * LATE_NS_MAX, LATE_NS_MAX);
                    (PaymentKind::Late, expires_in_ns + after)
                }
                None if wrong_amount => (PaymentKind::WrongAmount, soon),
                None => (PaymentKind::Regular, soon),
            };
            planned.push(dice.payment(kind, first));
            true_deliveries = planned[0].deliveries_ns.len();
            for (drawn, kind) in [(second, PaymentKind::Second), (lost, PaymentKind::Lost)] {
                if drawn {
                    let first = dice.soon();
                    planned.push(dice.payment(kind, first));
                }
            }
        }
        // For unpaid orders too: a forgery that is believed would pay them.
        for _ in 0..true_deliveries {
            if dice.fraction() < FORGED_SHARE {
                planned.push(dice.forged());
            }
        }
        planned
    }
}

/// SplitMix64 as a stream.
struct Dice(u64);

impl Dice {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// From 0 to below 1.
    fn fraction(&mut self) -> f64 {
        fraction(self.next())
    }

    fn between(&mut self, from: f64, to: f64) -> u64 {
        (from + self.fraction() * (to - from)) as u64
    }

    /// A part at once, most within a second, the rest within two.
    fn soon(&mut self) -> u64 {
        if self.fraction() < AT_ONCE_SHARE {
            return self.between(0.0, 5.0 * MS);
        }
        let share = self.fraction();
        (50.0 * MS + share * share * 1.95 * S) as u64
    }

    /// Most payments are told once or twice, some up to eight times.
    fn deliveries(&mut self) -> u64 {
        match self.fraction() {
            lot if lot < 0.60 => 1,
            lot if lot < 0.85 => 2,
            lot if lot < 0.93 => 3,
            _ => 4 + self.next() % 5,
        }
    }

    fn payment(&mut self, kind: PaymentKind, first_ns: u64) -> PlannedPayment {
        let mut deliveries_ns = vec![first_ns];
        for _ in 1..self.deliveries() {
            // Half of them almost at once, over another connection.
            let spread = if self.fraction() < 0.5 {
                3.0 * MS
            } else {
                SPREAD_NS
            };
            deliveries_ns.push(first_ns + self.between(0.0, spread));
        }
        PlannedPayment {
            kind,
            forgery: None,
            deliveries_ns,
            lot: self.next(),
        }
    }

    fn forged(&mut self) -> PlannedPayment {
        let forgery = match self.next() % 3 {
            0 => Forgery::ForeignKey,
            1 => Forgery::AlteredBody,
            _ => Forgery::AlteredSignature,
        };
        PlannedPayment {
            kind: PaymentKind::Regular,
            forgery: Some(forgery),
            deliveries_ns: vec![self.soon()],
            lot: self.next(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ORDERS: u32 = 100_000;
    const EXPIRES_IN_NS: u64 = 10_000_000_000;

    fn all(seed: u64, share: f64, expires_in_ns: Option<u64>) -> Vec<Vec<PlannedPayment>> {
        let scenario = PaymentScenario::new(seed, share);
        (0..ORDERS)
            .map(|buyer| scenario.of(buyer, (buyer % 3) as u16, expires_in_ns))
            .collect()
    }

    fn share_of(orders: &[Vec<PlannedPayment>], keep: impl Fn(&PlannedPayment) -> bool) -> f64 {
        let count = orders.iter().flatten().filter(|p| keep(p)).count();
        count as f64 / f64::from(ORDERS)
    }

    fn assert_near(found: f64, expected: f64) {
        assert!(
            (found / expected - 1.0).abs() < 0.2,
            "{found} instead of {expected}"
        );
    }

    #[test]
    fn the_same_seed_gives_the_same_payments_and_another_seed_others() {
        let first = all(1, 0.7, None);
        assert_eq!(first, all(1, 0.7, None));
        assert_ne!(first, all(2, 0.7, None));
    }

    #[test]
    fn shares_are_those_of_the_plan() {
        use PaymentKind::*;
        let orders = all(1, 0.7, Some(EXPIRES_IN_NS));
        let is =
            |kind: PaymentKind| move |p: &PlannedPayment| p.forgery.is_none() && p.kind == kind;
        assert_near(share_of(&orders, is(Regular)), 0.7 * 0.975);
        assert_near(share_of(&orders, is(Late)), 0.7 * LATE_SHARE);
        assert_near(share_of(&orders, is(WrongAmount)), 0.7 * WRONG_AMOUNT_SHARE);
        assert_near(share_of(&orders, is(Second)), 0.7 * SECOND_SHARE);
        assert_near(share_of(&orders, is(Lost)), 0.7 * LOST_SHARE);
        let deliveries = |forged: bool| -> usize {
            let of_kind = orders.iter().flatten();
            let of_kind = of_kind.filter(|p| p.forgery.is_some() == forged);
            of_kind.map(|p| p.deliveries_ns.len()).sum()
        };
        let forged = deliveries(true) as f64 / (deliveries(true) + deliveries(false)) as f64;
        assert!((0.008..0.016).contains(&forged), "{forged}");
        assert!(
            all(1, 0.0, None)
                .iter()
                .flatten()
                .all(|p| p.forgery.is_some())
        );
    }

    #[test]
    fn an_order_has_at_most_one_payment_that_could_pay_it_but_for_a_second() {
        for planned in all(3, 1.0, Some(EXPIRES_IN_NS)) {
            let of = |kind| planned.iter().filter(|p| p.kind == kind).count();
            let true_ones = planned.iter().filter(|p| p.forgery.is_none()).count();
            assert!((1..=2).contains(&true_ones));
            assert_eq!(
                of(PaymentKind::Second) + of(PaymentKind::Lost),
                true_ones - 1
            );
        }
    }

    #[test]
    fn payments_come_at_once_soon_or_after_expiry_in_one_to_eight_deliveries() {
        let orders = all(1, 1.0, Some(EXPIRES_IN_NS));
        let mut at_once = 0.0;
        let mut times = [0_u32; 9];
        for payment in orders.iter().flatten().filter(|p| p.forgery.is_none()) {
            let first = payment.deliveries_ns[0];
            let last = *payment.deliveries_ns.iter().max().unwrap();
            times[payment.deliveries_ns.len()] += 1;
            assert!(payment.deliveries_ns.iter().all(|&ns| ns >= first));
            if payment.kind == PaymentKind::Late {
                assert!(first > EXPIRES_IN_NS);
                assert!(last <= EXPIRES_IN_NS + LATE_TAIL_NS);
            } else {
                assert!(last <= 4_000_000_000);
                at_once += f64::from(u8::from(first <= 5_000_000));
            }
        }
        assert_near(at_once / f64::from(ORDERS), AT_ONCE_SHARE);
        assert_eq!(times[0], 0);
        assert!(times[1..].iter().all(|&n| n > 0), "{times:?}");
        assert!(times[1] + times[2] > 8 * (times[3..].iter().sum::<u32>()) / 2);
    }

    #[test]
    fn nobody_is_late_in_a_run_that_ends_before() {
        let orders = all(1, 1.0, None);
        assert_eq!(share_of(&orders, |p| p.kind == PaymentKind::Late), 0.0);
    }
}
