//! The payment platform that the load generator plays.
//!
//! The tests' platforms send the same [`PaymentMessage`], signed with the same [`WebhookSecret`]; what they have of
//! their own is when they deliver it.
//!
//! ```text
//!  placed order ─► payment_scenario ─► payments, each with its deliveries ─► webhook_delivery
//!                  (by the seed)                                             signs (webhook), sends,
//!                                                                            retries
//!                                                                               │
//!                                                payment_stats ◄────────────────┘
//! ```

mod payment;
mod payment_scenario;
mod payment_stats;
mod webhook;
mod webhook_delivery;

#[cfg(test)]
mod tests;

pub use payment::PaymentKind;
pub(super) use payment::PlacedOrder;
pub use payment_stats::{FalseSignatures, Money, PaymentKindCount, PaymentOutcome, PaymentReport};
pub(super) use webhook::Signer;
pub use webhook::{PaymentMessage, WebhookSecret};
pub(super) use webhook_delivery::WebhookDelivery;
