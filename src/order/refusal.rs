//! Why an order was not taken.

use super::UnixMillis;

/// Why an order was not taken. Nothing is held for it and no row will ever be written (I5).
///
/// Declared in order of precedence: where several apply, a buyer is told the first. The state of
/// the service comes before that of the request, and what cannot change (an unknown SKU, another
/// body under the same key) before what can.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Refusal {
    /// Still recovering, or stopped by an internal fault.
    NotReady,
    /// Shutting down.
    Draining,
    /// The user's rate, or the overall one, is used up.
    RateLimited {
        /// When a request will pass again, in milliseconds.
        retry_after_ms: u32,
    },
    /// No such SKU.
    UnknownSku,
    /// The same key came with another body.
    IdempotencyKeyReused,
    /// The amount would be negative or beyond 2^63.
    AmountOutOfRange,
    /// Sales of this SKU, or all sales, are paused by an operator or a fault.
    SalePaused,
    /// The sale has not opened.
    SaleNotOpen {
        /// When it does.
        opens_at: UnixMillis,
    },
    /// The sale is over.
    SaleClosed,
    /// The buyer's live orders would exceed the SKU's limit.
    PurchaseLimit {
        /// The limit in units.
        limit: u32,
        /// Units that the buyer's live orders hold already.
        taken: u32,
    },
    /// Not enough units are free.
    SoldOut {
        /// Units that are free.
        available: u32,
    },
    /// As far as can be told it could not be written within its wait.
    Backlogged {
        /// When it could be, in milliseconds.
        retry_after_ms: u32,
    },
    /// The queue is full, or as good as full.
    Overloaded,
    /// As many orders are remembered for their keys and limits as may be.
    MemoryFull,
    /// The journal has reached its limit, or the disk its end.
    JournalFull,
    /// The journal's disk has failed; orders that wait for persistence are still taken.
    JournalFailed,
}

impl Refusal {
    /// The stable `code` of API.md.
    pub fn code(self) -> &'static str {
        match self {
            Refusal::NotReady => "not_ready",
            Refusal::Draining => "draining",
            Refusal::RateLimited { .. } => "rate_limited",
            Refusal::UnknownSku => "unknown_sku",
            Refusal::AmountOutOfRange => "invalid_field",
            Refusal::IdempotencyKeyReused => "idempotency_key_reused",
            Refusal::SalePaused => "sale_paused",
            Refusal::SaleNotOpen { .. } => "sale_not_open",
            Refusal::SaleClosed => "sale_closed",
            Refusal::PurchaseLimit { .. } => "purchase_limit",
            Refusal::SoldOut { .. } => "sold_out",
            Refusal::Backlogged { .. } | Refusal::Overloaded | Refusal::MemoryFull => "overloaded",
            Refusal::JournalFull => "journal_full",
            Refusal::JournalFailed => "journal_failed",
        }
    }

    /// Whether the same request under the same key shall be told the same again, although another
    /// judgment might come out better meanwhile. Every other refusal is judged afresh.
    pub fn is_sticky(self) -> bool {
        matches!(
            self,
            Refusal::SoldOut { .. } | Refusal::PurchaseLimit { .. }
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_are_ordered_by_precedence() {
        let ordered = [
            Refusal::NotReady,
            Refusal::Draining,
            Refusal::RateLimited { retry_after_ms: 1 },
            Refusal::UnknownSku,
            Refusal::IdempotencyKeyReused,
            Refusal::AmountOutOfRange,
            Refusal::SalePaused,
            Refusal::SaleNotOpen {
                opens_at: UnixMillis(0),
            },
            Refusal::SaleClosed,
            Refusal::PurchaseLimit { limit: 1, taken: 1 },
            Refusal::SoldOut { available: 0 },
            Refusal::Backlogged { retry_after_ms: 1 },
            Refusal::Overloaded,
            Refusal::MemoryFull,
            Refusal::JournalFull,
            Refusal::JournalFailed,
        ];
        assert!(ordered.windows(2).all(|pair| pair[0] < pair[1]));
    }
}
