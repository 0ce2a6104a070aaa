//! A payment: the provider's report, its state, and its effect on the order.
//!
//! # The life of a payment
//!
//! ```text
//!               the order exists and fits
//!   orphan ──────────────────────────────────► matched ──┐ (an operator refunds
//!      │                                                 │  the money)
//!      │  the order exists and does not fit, or no       ▼
//!      └─ order was found or recovered ─► refund_due ─► refunded
//! ```
//!
//! A verified payment whose order has a row is stored in the resulting state at once, any other as
//! `orphan`. A payment is in exactly one state at any moment, so money in = matched + orphan +
//! refund due + refunded (I7). [`PaymentState::may_become`] is the transition table; [`judge`]
//! decides the effect of a payment on an order with a row.

use std::fmt;

use super::{Currency, OrderId, OrderStatus, UnixMillis};

/// Longest event id, payment id, order reference and receipt, in bytes.
pub const REFERENCE_BYTES_MAX: usize = 255;

macro_rules! words {
    ($(#[$doc:meta])* $name:ident { $($(#[$variant_doc:meta])* $variant:ident = $word:literal,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum $name {
            $($(#[$variant_doc])* $variant,)*
        }

        impl $name {
            /// Every value.
            pub const ALL: &'static [$name] = &[$($name::$variant,)*];

            /// The name used in paths, JSON and the database.
            pub fn as_str(self) -> &'static str {
                match self {
                    $($name::$variant => $word,)*
                }
            }

            /// The value with this name.
            pub fn from_word(word: &str) -> Option<Self> {
                Self::ALL.iter().copied().find(|one| one.as_str() == word)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.as_str())
            }
        }
    };
}

words!(
    /// A payment provider.
    Provider {
        /// Standard Webhooks: any provider that sends them, and the shop itself.
        Standard = "standard",
        /// Stripe.
        Stripe = "stripe",
        /// Alipay.
        Alipay = "alipay",
        /// WeChat Pay, API version 3.
        Wechatpay = "wechatpay",
    }
);

words!(
    /// State of a payment.
    PaymentState {
        /// Its order has not been found yet.
        Orphan = "orphan",
        /// It has paid its order.
        Matched = "matched",
        /// The money must be refunded.
        RefundDue = "refund_due",
        /// The money was refunded.
        Refunded = "refunded",
    }
);

impl PaymentState {
    /// The transition table: whether a payment in this state may next be in `next`.
    pub fn may_become(self, next: PaymentState) -> bool {
        match self {
            PaymentState::Orphan => next != PaymentState::Orphan,
            PaymentState::Matched => next == PaymentState::Refunded,
            PaymentState::RefundDue => next == PaymentState::Refunded,
            PaymentState::Refunded => false,
        }
    }
}

words!(
    /// Reasons for a refund. `docs/PAYMENTS.md` has the action for each.
    RefundReason {
        /// The buyer had cancelled the order.
        OrderCancelled = "order_cancelled",
        /// The payment arrived after the order had expired.
        OrderExpired = "order_expired",
        /// No units were assigned to the order: it waits for them, or has left the waiting list.
        NotAssigned = "not_assigned",
        /// The database had refused the order.
        OrderFailed = "order_failed",
        /// Another payment had paid the order.
        AlreadyPaid = "already_paid",
        /// The order's money was to be refunded, or was refunded, already.
        AlreadyRefunded = "already_refunded",
        /// The payment's amount differs from the order's.
        AmountMismatch = "amount_mismatch",
        /// The payment's currency differs from the order's.
        CurrencyMismatch = "currency_mismatch",
        /// The order was never found, and the payment brought no receipt to recover it from.
        ReceiptMissing = "receipt_missing",
        /// The order was never found, and the receipt is altered, of another order or database, or
        /// not ours.
        ReceiptInvalid = "receipt_invalid",
        /// The order was lost, and its units have been sold to others.
        SoldOut = "sold_out",
        /// The order was lost, and its buyer has ordered again under the same key.
        OrderedAgain = "ordered_again",
        /// The order was lost, and its SKU is no longer known.
        UnknownSku = "unknown_sku",
    }
);

/// A payment as its provider reports it, with a verified signature.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Payment {
    /// The provider's id of it, 1 to [`REFERENCE_BYTES_MAX`] bytes without NUL.
    pub payment_id: String,
    /// The paid order as the provider names it, at most [`REFERENCE_BYTES_MAX`] bytes without NUL.
    /// Empty if it named none.
    pub order_ref: String,
    /// Amount in minor units.
    pub amount: i64,
    /// Its currency.
    pub currency: Currency,
    /// Content of the provider's pass-back field, at most [`REFERENCE_BYTES_MAX`] bytes without
    /// NUL; not verified yet.
    pub receipt: Option<String>,
    /// Time of the payment as the provider signed it. It counts only if it is earlier than the
    /// arrival.
    pub made_at: Option<UnixMillis>,
}

impl Payment {
    /// The paid order; `None` if the reference cannot be an id of ours.
    pub fn order_id(&self) -> Option<OrderId> {
        OrderId::parse(&self.order_ref)
    }
}

/// A provider's verified message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Notice {
    /// The sender.
    pub provider: Provider,
    /// The provider's id of this message, the same in each of its deliveries; 1 to
    /// [`REFERENCE_BYTES_MAX`] bytes without NUL.
    pub event_id: String,
    /// The reported event, in the provider's words, at most [`REFERENCE_BYTES_MAX`] bytes without
    /// NUL.
    pub kind: String,
    /// The body as received, kept as evidence.
    pub body: Box<[u8]>,
    /// The payment that succeeded. `None` if the message is about something else; it is then stored
    /// and answered with success.
    pub payment: Option<Payment>,
}

/// A message and its time of arrival.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Delivery {
    /// The message.
    pub notice: Notice,
    /// Arrival by Millrace's clock, before the message waited for anything.
    pub received_at: UnixMillis,
}

impl Delivery {
    /// Time at which the payment counts as made: its arrival, or the provider's signed time if that
    /// is earlier. Deliveries of one payment may differ; the one that is booked counts.
    pub fn paid_at(&self) -> UnixMillis {
        let made_at = self.notice.payment.as_ref().and_then(|one| one.made_at);
        made_at.map_or(self.received_at, |made_at| made_at.min(self.received_at))
    }
}

/// The facts of an order with a row that a payment is compared with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OrderFacts {
    /// Status.
    pub status: OrderStatus,
    /// Amount in minor units.
    pub amount: i64,
    /// Currency.
    pub currency: Currency,
    /// Whether it ever had time to pay; false for an order that waits for units, or has left the list.
    pub was_payable: bool,
}

/// Effect of a payment on its order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The payment is matched and the order paid.
    Pay,
    /// The money must be refunded.
    Refund {
        /// The reason.
        reason: RefundReason,
        /// Whether the order itself becomes `refund_due`. A second payment does not change an order
        /// that the first has paid.
        order_too: bool,
    },
}

/// Compares a payment of `amount` in `currency` with its order. The order's status takes precedence
/// over the payment's data. A `pending_payment` order is paid even by a late payment, because its
/// units are still held. Whether a payment came in time only decides whether its order may expire
/// meanwhile.
pub fn judge(order: &OrderFacts, amount: i64, currency: Currency) -> Verdict {
    let refund = |reason, order_too| Verdict::Refund { reason, order_too };
    match order.status {
        // The first two are never rows; a payment of an order in flight waits for its row.
        OrderStatus::Accepted | OrderStatus::Undecided | OrderStatus::PendingPayment => {
            if currency != order.currency {
                refund(RefundReason::CurrencyMismatch, true)
            } else if amount != order.amount {
                refund(RefundReason::AmountMismatch, true)
            } else {
                Verdict::Pay
            }
        }
        OrderStatus::Paid => refund(RefundReason::AlreadyPaid, false),
        // It keeps its place, and gains none.
        OrderStatus::Waitlisted => refund(RefundReason::NotAssigned, false),
        OrderStatus::Cancelled | OrderStatus::Expired if !order.was_payable => {
            refund(RefundReason::NotAssigned, true)
        }
        OrderStatus::Cancelled => refund(RefundReason::OrderCancelled, true),
        OrderStatus::Expired => refund(RefundReason::OrderExpired, true),
        OrderStatus::Failed => refund(RefundReason::OrderFailed, true),
        OrderStatus::RefundDue | OrderStatus::Refunded => {
            refund(RefundReason::AlreadyRefunded, false)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn eur() -> Currency {
        Currency::new("EUR").unwrap()
    }

    #[test]
    fn words_round_trip() {
        for provider in Provider::ALL {
            assert_eq!(Provider::from_word(provider.as_str()), Some(*provider));
        }
        for reason in RefundReason::ALL {
            assert_eq!(RefundReason::from_word(reason.as_str()), Some(*reason));
        }
        for state in PaymentState::ALL {
            assert_eq!(PaymentState::from_word(state.as_str()), Some(*state));
        }
    }

    #[test]
    fn money_never_leaves_the_books_and_never_becomes_an_orphan_again() {
        for from in PaymentState::ALL {
            for to in PaymentState::ALL {
                let expected = match (from, to) {
                    (PaymentState::Orphan, to) => *to != PaymentState::Orphan,
                    (PaymentState::Matched | PaymentState::RefundDue, PaymentState::Refunded) => {
                        true
                    }
                    _ => false,
                };
                assert_eq!(from.may_become(*to), expected, "{from} -> {to}");
            }
        }
    }

    /// Every status with every kind of payment; each verdict must be a permitted transition.
    #[test]
    fn every_status_and_every_payment_have_a_verdict_that_the_transition_table_allows() {
        for status in OrderStatus::ALL {
            let order = OrderFacts {
                status,
                amount: 100,
                currency: eur(),
                was_payable: status != OrderStatus::Waitlisted,
            };
            let usd = Currency::new("USD").unwrap();
            for (amount, currency) in [
                (100, eur()),
                (99, eur()),
                (101, eur()),
                (100, usd),
                (99, usd),
            ] {
                let verdict = judge(&order, amount, currency);
                let fits = (amount, currency) == (100, eur());
                let next = match verdict {
                    Verdict::Pay => {
                        assert!(fits, "{status}: {amount} {currency:?}");
                        Some(OrderStatus::Paid)
                    }
                    Verdict::Refund { order_too, .. } => {
                        order_too.then_some(OrderStatus::RefundDue)
                    }
                };
                let Some(next) = next else {
                    assert!(
                        !status.may_become(OrderStatus::RefundDue),
                        "{status} is left as it is"
                    );
                    continue;
                };
                if status.code().is_some() || status == OrderStatus::Failed {
                    assert!(status.may_become(next), "{status} -> {next}");
                }
            }
        }
    }

    #[test]
    fn a_payment_buys_no_place_on_a_waiting_list() {
        for (status, order_too) in [
            (OrderStatus::Waitlisted, false),
            (OrderStatus::Cancelled, true),
            (OrderStatus::Expired, true),
        ] {
            let order = OrderFacts {
                status,
                amount: 100,
                currency: eur(),
                was_payable: false,
            };
            let reason = RefundReason::NotAssigned;
            assert_eq!(
                judge(&order, 100, eur()),
                Verdict::Refund { reason, order_too },
                "{status}"
            );
        }
    }

    #[test]
    fn only_what_can_be_an_order_id_is_one() {
        let payment = |order_ref: &str| Payment {
            payment_id: "p".into(),
            order_ref: order_ref.into(),
            amount: 1,
            currency: eur(),
            receipt: None,
            made_at: None,
        };
        assert_eq!(payment("42").order_id(), OrderId::new(42));
        for other in ["", "042", "x", "42 ", "-1", "99999999999999999999"] {
            assert_eq!(payment(other).order_id(), None, "{other:?}");
        }
    }

    #[test]
    fn a_payment_counts_as_made_at_its_arrival_or_earlier_and_never_later() {
        for (made_at, paid_at) in [(None, 50), (Some(40), 40), (Some(60), 50)] {
            let delivery = Delivery {
                notice: Notice {
                    provider: Provider::Standard,
                    event_id: "e".into(),
                    kind: "k".into(),
                    body: Box::default(),
                    payment: Some(Payment {
                        payment_id: "p".into(),
                        order_ref: "42".into(),
                        amount: 1,
                        currency: eur(),
                        receipt: None,
                        made_at: made_at.map(UnixMillis),
                    }),
                },
                received_at: UnixMillis(50),
            };
            assert_eq!(delivery.paid_at(), UnixMillis(paid_at), "{made_at:?}");
        }
    }
}
