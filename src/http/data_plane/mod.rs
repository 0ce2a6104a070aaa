//! The data plane: one plain function from a parsed request to a response, and the engines it
//! mounts on.

pub mod dispatcher;
pub mod hardened;
pub mod message;
pub mod minihttp;
pub mod runtime;
pub mod wake;
