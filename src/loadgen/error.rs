//! Errors that end a load before it gives a report.

use std::path::PathBuf;

/// Why a load could not run. Each message names what was tried, on what, and what to do.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// A field of the plan, or two of them together, make no sense.
    #[error("the load plan cannot run: {0}")]
    BadPlan(String),
    /// The base URL is not one that the generator can speak to.
    #[error(
        "cannot use {url:?} as the target: {reason}; give it like http://127.0.0.1:8080 (TLS is left to a proxy)"
    )]
    BadTarget {
        /// The URL as it was given.
        url: String,
        /// What is wrong with it.
        reason: String,
    },
    /// Nothing answered at the target before the load began.
    #[error(
        "cannot reach {target}: {source}; start the server with `millrace serve`, or give its address"
    )]
    Unreachable {
        /// The base URL.
        target: String,
        /// The connection's error.
        source: std::io::Error,
    },
    /// Something answered at the target, but not in HTTP.
    #[error(
        "{target} accepted a connection but gave no HTTP answer ({reason}); check that the address is Millrace's data plane"
    )]
    NoAnswer {
        /// The base URL.
        target: String,
        /// What happened instead.
        reason: String,
    },
    /// The data plane wants a token, or another one.
    #[error(
        "{target} refused the bearer token (401); give the one of `data_plane.token` in the server's configuration"
    )]
    Unauthorized {
        /// The base URL.
        target: String,
    },
    /// A SKU of the plan is not on sale at the target.
    #[error(
        "{target} does not know the SKU {sku:?}; create it with PUT /admin/v1/skus/{sku} on the control plane, or name another"
    )]
    UnknownSku {
        /// The base URL.
        target: String,
        /// The SKU as the plan has it.
        sku: String,
    },
    /// The look at a SKU before the load was answered with an unexpected status.
    #[error(
        "{target} answered GET /v1/skus/{sku} with status {status}; check that the address is Millrace's data plane and that it is ready"
    )]
    SkuCheck {
        /// The base URL.
        target: String,
        /// The SKU that was asked for.
        sku: String,
        /// The status of the answer.
        status: u16,
    },
    /// The file of orders could not be read.
    #[error(
        "cannot read the orders file {}: {source}; give a file with one JSON object a line", path.display()
    )]
    ReadOrders {
        /// The file.
        path: PathBuf,
        /// The error of the system.
        source: std::io::Error,
    },
    /// A line of the file of orders is not an order.
    #[error(
        "line {line} of the orders file {}: {reason}; each line is one JSON object, the body of POST /v1/orders", path.display()
    )]
    OrdersLine {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What is wrong with it.
        reason: String,
    },
    /// A thread of the generator could not be started, or died.
    #[error("the load generator could not run its {what}: {reason}")]
    Thread {
        /// The part that failed.
        what: &'static str,
        /// How.
        reason: String,
    },
}
