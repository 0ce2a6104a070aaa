//! `/v1/orders`: placing, reading and cancelling orders.

pub(super) mod batch;
pub(super) mod cancel;
pub(super) mod create;
mod elsewhere;
mod follow;
pub(super) mod read;
