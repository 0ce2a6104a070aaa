//! `/v1/payments`: the callback of a payment platform (`notify`), and the platforms whose
//! callbacks are understood ([`providers`]).

pub(super) mod notify;
pub mod providers;
