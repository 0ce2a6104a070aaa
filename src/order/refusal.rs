//! Reasons why an order was refused.

use super::UnixMillis;

/// Reason why an order was refused. Nothing is held for it, and its row will never be written (I5).
///
/// Declared in order of precedence: if several apply, the answer has the first. The state of the
/// service comes before that of the request. Conditions that cannot change (an unknown SKU, another
/// body under the same key) come before those that can.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Refusal {
    /// The process is still recovering, or an internal fault has stopped it.
    NotReady,
    /// The process is shutting down.
    Draining,
    /// The user's rate limit, or the overall one, is exceeded.
    RateLimited {
        /// Time until a request will pass again, in milliseconds.
        retry_after_ms: u32,
    },
    /// The SKU does not exist.
    UnknownSku,
    /// The same key came with another body.
    IdempotencyKeyReused,
    /// The amount would be negative or beyond 2^63.
    AmountOutOfRange,
    /// Sales of this SKU, or all sales, are paused by an operator or a fault.
    SalePaused,
    /// The sale has not opened.
    SaleNotOpen {
        /// Opening time.
        opens_at: UnixMillis,
    },
    /// The sale is over.
    SaleClosed,
    /// The entries of the draw have ended, and it is not made yet.
    DrawUnderWay,
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
    /// This node has too few units, and others may have some: to be looked for, or asked again.
    StockElsewhere,
    /// No unit is free, and as many orders wait for one as the SKU's list may have.
    WaitlistFull,
    /// The estimate says that the order could not be written within its wait.
    Backlogged {
        /// Time until it could be, in milliseconds.
        retry_after_ms: u32,
    },
    /// The queue is full or almost full.
    Overloaded,
    /// The limit of orders kept in memory for keys and purchase limits is reached.
    MemoryFull,
    /// The journal has reached its limit, or the disk is full.
    JournalFull,
    /// The journal's disk has failed; orders that wait for persistence are still taken.
    JournalFailed,
    /// The broker of the order log is away, full or refuses; orders that wait for persistence are still taken.
    QueueUnavailable,
}

impl Refusal {
    /// The stable `code` of API.md.
    pub fn code(self) -> &'static str {
        match self {
            Refusal::NotReady | Refusal::StockElsewhere => "not_ready",
            Refusal::Draining => "draining",
            Refusal::RateLimited { .. } => "rate_limited",
            Refusal::UnknownSku => "unknown_sku",
            Refusal::AmountOutOfRange => "invalid_field",
            Refusal::IdempotencyKeyReused => "idempotency_key_reused",
            Refusal::SalePaused => "sale_paused",
            Refusal::SaleNotOpen { .. } => "sale_not_open",
            Refusal::SaleClosed => "sale_closed",
            Refusal::DrawUnderWay => "draw_under_way",
            Refusal::PurchaseLimit { .. } => "purchase_limit",
            Refusal::SoldOut { .. } => "sold_out",
            Refusal::WaitlistFull => "waitlist_full",
            Refusal::Backlogged { .. } | Refusal::Overloaded | Refusal::MemoryFull => "overloaded",
            Refusal::JournalFull => "journal_full",
            Refusal::JournalFailed => "journal_failed",
            Refusal::QueueUnavailable => "queue_unavailable",
        }
    }

    /// Whether the same request under the same key gets the same answer again, even if a new
    /// decision would be more favourable. Every other refusal is decided afresh.
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
            Refusal::DrawUnderWay,
            Refusal::PurchaseLimit { limit: 1, taken: 1 },
            Refusal::SoldOut { available: 0 },
            Refusal::StockElsewhere,
            Refusal::WaitlistFull,
            Refusal::Backlogged { retry_after_ms: 1 },
            Refusal::Overloaded,
            Refusal::MemoryFull,
            Refusal::JournalFull,
            Refusal::JournalFailed,
            Refusal::QueueUnavailable,
        ];
        assert!(ordered.windows(2).all(|pair| pair[0] < pair[1]));
    }
}
