//! The data plane, for the shop's backend: one plain function from a parsed request to a response
//! ([`service`]), and the two engines that it mounts on ([`hardened`], [`minihttp`]).

pub mod bridge;
mod callbacks;
pub mod dispatcher;
pub mod hardened;
pub mod message;
pub mod minihttp;
mod orders;
pub mod payments;
mod placing;
mod preference;
pub mod runtime;
pub mod service;
pub mod wake;
