//! `/v1/orders`: placing, reading and cancelling orders.

pub(super) mod cancel;
pub(super) mod create;
mod follow;
mod preference;
pub(super) mod read;
