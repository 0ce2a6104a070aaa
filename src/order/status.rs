//! Status of an order.

use std::fmt;

/// Status of an order. Stored statuses have a code, kept in `orders.status`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum OrderStatus {
    /// Durable in the queue, not yet in the database.
    Accepted,
    /// Being written when the wait ran out. It becomes one of the others, or was never written.
    Undecided,
    /// Waiting for units: it holds none, and they count toward the buyer's purchase limit.
    Waitlisted,
    /// Persisted, with its units held, and payable until it expires.
    PendingPayment,
    /// Paid in time and in full; its units are sold.
    Paid,
    /// Cancelled before payment; it holds no units.
    Cancelled,
    /// Not paid in time, or not assigned any units while its waiting list lasted; it holds none.
    Expired,
    /// The database refused the row; its units are free, and a dead letter keeps it for an
    /// operator.
    Failed,
    /// Its payment must be refunded.
    RefundDue,
    /// Its payment was refunded.
    Refunded,
}

impl OrderStatus {
    /// Every status, in the order of an order's life.
    pub const ALL: [OrderStatus; 10] = [
        OrderStatus::Accepted,
        OrderStatus::Undecided,
        OrderStatus::Waitlisted,
        OrderStatus::PendingPayment,
        OrderStatus::Paid,
        OrderStatus::Cancelled,
        OrderStatus::Expired,
        OrderStatus::Failed,
        OrderStatus::RefundDue,
        OrderStatus::Refunded,
    ];

    /// The name used in JSON and in the database's views.
    pub fn as_str(self) -> &'static str {
        match self {
            OrderStatus::Accepted => "accepted",
            OrderStatus::Undecided => "undecided",
            OrderStatus::Waitlisted => "waitlisted",
            OrderStatus::PendingPayment => "pending_payment",
            OrderStatus::Paid => "paid",
            OrderStatus::Cancelled => "cancelled",
            OrderStatus::Expired => "expired",
            OrderStatus::Failed => "failed",
            OrderStatus::RefundDue => "refund_due",
            OrderStatus::Refunded => "refunded",
        }
    }

    /// The status with this name.
    pub fn from_word(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|status| status.as_str() == word)
    }

    /// The code in `orders.status`; `None` for a status that is never stored there. The schema's
    /// views have the same table, and a test compares them.
    pub fn code(self) -> Option<i16> {
        match self {
            OrderStatus::Accepted | OrderStatus::Undecided | OrderStatus::Failed => None,
            OrderStatus::PendingPayment => Some(1),
            OrderStatus::Paid => Some(2),
            OrderStatus::Cancelled => Some(3),
            OrderStatus::Expired => Some(4),
            OrderStatus::RefundDue => Some(5),
            OrderStatus::Refunded => Some(6),
            OrderStatus::Waitlisted => Some(7),
        }
    }

    /// The status with this code in `orders.status`.
    pub fn from_code(code: i16) -> Option<Self> {
        Self::ALL
            .into_iter()
            .find(|status| status.code() == Some(code))
    }

    /// Whether its units count toward the buyer's purchase limit.
    pub fn is_live(self) -> bool {
        Ended::of(self).is_none()
    }

    /// Whether its units are taken from the stock. A waiting order is live and holds none.
    pub fn holds_units(self) -> bool {
        self.is_live() && self != OrderStatus::Waitlisted
    }

    /// The transition table: whether an order in this status may next be in `next`.
    pub fn may_become(self, next: OrderStatus) -> bool {
        use OrderStatus::{
            Accepted, Cancelled, Expired, Failed, Paid, PendingPayment, RefundDue, Refunded,
            Undecided, Waitlisted,
        };
        match self {
            Accepted | Undecided => matches!(next, Waitlisted | PendingPayment | Failed | Expired),
            Waitlisted => matches!(next, PendingPayment | Cancelled | Expired),
            PendingPayment => matches!(next, Paid | Cancelled | Expired | RefundDue),
            Paid => matches!(next, Refunded),
            Cancelled | Expired | Failed => matches!(next, RefundDue),
            RefundDue => matches!(next, Refunded),
            Refunded => false,
        }
    }
}

/// The way in which an order stopped holding units, or waiting for them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Ended {
    /// Cancelled, or its money must be or was refunded.
    Cancelled,
    /// Not paid in time, or still waiting when its list ended.
    Expired,
    /// Refused by the database: a dead letter.
    Failed,
}

impl Ended {
    /// How an order with this status has ended; `None` if it is live.
    pub fn of(status: OrderStatus) -> Option<Self> {
        match status {
            OrderStatus::Accepted
            | OrderStatus::Undecided
            | OrderStatus::Waitlisted
            | OrderStatus::PendingPayment
            | OrderStatus::Paid => None,
            OrderStatus::Cancelled | OrderStatus::RefundDue | OrderStatus::Refunded => {
                Some(Ended::Cancelled)
            }
            OrderStatus::Expired => Some(Ended::Expired),
            OrderStatus::Failed => Some(Ended::Failed),
        }
    }

    /// The status of an order that ended this way, as far as memory knows.
    pub fn status(self) -> OrderStatus {
        match self {
            Ended::Cancelled => OrderStatus::Cancelled,
            Ended::Expired => OrderStatus::Expired,
            Ended::Failed => OrderStatus::Failed,
        }
    }
}

impl fmt::Display for OrderStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_round_trip_and_codes_are_distinct() {
        let mut codes = Vec::new();
        for status in OrderStatus::ALL {
            assert_eq!(OrderStatus::from_word(status.as_str()), Some(status));
            codes.extend(status.code());
            if let Some(code) = status.code() {
                assert_eq!(OrderStatus::from_code(code), Some(status));
            }
        }
        codes.sort_unstable();
        codes.dedup();
        assert_eq!(codes, [1, 2, 3, 4, 5, 6, 7]);
    }

    #[test]
    fn an_order_is_live_until_it_has_ended_and_holds_units_unless_it_waits() {
        for status in OrderStatus::ALL {
            let ended = Ended::of(status);
            assert_eq!(status.is_live(), ended.is_none(), "{status}");
            assert!(ended.is_none_or(|ended| Ended::of(ended.status()) == Some(ended)));
            let holds = status.is_live() && status != OrderStatus::Waitlisted;
            assert_eq!(status.holds_units(), holds, "{status}");
        }
        let live = OrderStatus::ALL.map(OrderStatus::is_live);
        assert_eq!(
            live,
            [
                true, true, true, true, true, false, false, false, false, false
            ]
        );
        assert_eq!(Ended::of(OrderStatus::RefundDue), Some(Ended::Cancelled));
        assert_eq!(Ended::of(OrderStatus::Refunded), Some(Ended::Cancelled));
    }

    #[test]
    fn every_pair_of_statuses_is_decided_and_units_never_come_back_to_life() {
        for from in OrderStatus::ALL {
            assert!(!from.may_become(from), "{from} must not become itself");
            for to in OrderStatus::ALL {
                if !from.is_live() {
                    assert!(
                        !(from.may_become(to) && to.is_live()),
                        "{from} -> {to} revives units"
                    );
                }
                if to == OrderStatus::Accepted || to == OrderStatus::Undecided {
                    assert!(!from.may_become(to), "{from} -> {to} forgets a row");
                }
            }
        }
        assert!(OrderStatus::PendingPayment.may_become(OrderStatus::Paid));
        assert!(!OrderStatus::Refunded.may_become(OrderStatus::RefundDue));
        assert!(!OrderStatus::Expired.may_become(OrderStatus::Paid));
        // Money buys no place on a waiting list.
        assert!(!OrderStatus::Waitlisted.may_become(OrderStatus::Paid));
        assert!(!OrderStatus::Waitlisted.may_become(OrderStatus::RefundDue));
        // A paid order stays paid until the money is refunded.
        assert!(!OrderStatus::Paid.may_become(OrderStatus::RefundDue));
    }
}
