//! Metrics of orders that wait for units.

use super::SECONDS;

metrics! {
    /// Metrics of waiting lists.
    pub struct Waitlist {
        waiting = gauges("millrace_waitlist_orders", &["sku_id"], "`sku_id`"):
            "Orders that wait for units of each SKU.";
        kept = gauges("millrace_waitlist_kept_units", &["sku_id"], "`sku_id`"):
            "Units of each SKU that are kept for waiting orders; they count as held.";
        oldest_seconds = float_gauge("millrace_waitlist_oldest_seconds"):
            "Time for which the oldest waiting order has waited.";
        overdue_seconds = float_gauge("millrace_waitlist_overdue_seconds"):
            "Time for which units have been kept that the next waiting order could have; alert if it stays above a \
             second.";
        assigned = counter("millrace_waitlist_assigned_total"):
            "Waiting orders that were assigned units.";
        expired = counter("millrace_waitlist_expired_total"):
            "Orders that expired while they waited for units.";
        assign_seconds = histogram("millrace_waitlist_assign_seconds", &SECONDS):
            "Time of a transaction that assigns units to waiting orders.";
    }
}
