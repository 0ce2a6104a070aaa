//! The data plane: one plain function from a parsed request to a response, and the engines it
//! mounts on.

pub mod message;
