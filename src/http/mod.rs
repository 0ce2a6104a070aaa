//! HTTP: a server that knows no route, the JSON of requests and answers, and the two planes.
//!
//! | module | content |
//! |---|---|
//! | [`server`] | the server on coroutines that carries the data plane |
//! | [`message`], [`problem`] | requests and responses; errors as RFC 9457 documents |
//! | [`wire`] | the JSON of both planes |
//! | [`peers`] | the link between the nodes of a cluster |
//! | [`tokens`], [`origin`] | who may ask: bearer tokens, and requests that other sites make a browser send |
//! | [`data_plane`] | for the shop's backend and payment platforms |
//! | [`control_plane`] | for operators |
//! | [`webhook`], [`webhook_secret`] | the client that sends events to others; secrets of Standard Webhooks, of both directions |
//! | [`otlp`] | the client that sends spans to a collector |
//! | [`outgoing`] | the connections of both clients |

pub mod control_plane;
pub mod data_plane;
pub mod message;
pub mod origin;
pub mod otlp;
pub mod outgoing;
pub mod peers;
pub mod problem;
pub mod server;
pub mod tokens;
pub mod webhook;
pub mod webhook_secret;
pub mod wire;

/// The OpenAPI 3.1 document of both planes as JSON, made from `openapi.yaml` by `build.rs`.
/// `tests/service/openapi.rs` holds it against the routes and against real answers.
pub const OPENAPI: &str = include_str!(concat!(env!("OUT_DIR"), "/openapi.json"));
