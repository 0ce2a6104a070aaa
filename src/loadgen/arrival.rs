//! One request of a buyer, as the schedule makes it.

/// One request that is due at a moment. Small, because one is made and dropped for each request; the
/// `RequestTemplate` writes its texts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Arrival {
    /// Nanoseconds after the start.
    pub scheduled_ns: u64,
    /// The buyer's number, or the line of the orders file.
    pub buyer: u32,
    /// The SKU's place in `RequestTemplate::skus`.
    pub sku: u16,
    /// The second request of a double click.
    pub double: bool,
}
