//! Wire types and the two planes: data (for the shop's backend) and control (for operators).

pub mod control_plane;
pub mod data_plane;
pub mod origin;
pub mod problem;
pub mod tokens;
pub mod wire;

/// The OpenAPI 3.1 document of both planes. `tests/openapi.rs` holds it against the routes and
/// against real answers.
pub const OPENAPI: &str = include_str!("openapi.json");
