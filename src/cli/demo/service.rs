//! The Millrace that a demo's sale is held on: one in this process, or several nodes in processes of their own.

use std::net::SocketAddr;

use anyhow::Context;

use super::nodes::Nodes;
use crate::app::Millrace;
use crate::store::postgres::Database;

pub(super) enum Service {
    /// In this process.
    One(Box<Millrace>),
    /// Each in its own.
    Several(Box<Nodes>),
}

impl Service {
    /// Where buyers and payment platforms call.
    pub(super) fn data_planes(&self) -> Vec<SocketAddr> {
        match self {
            Service::One(millrace) => vec![millrace.data_plane],
            Service::Several(nodes) => nodes.running(|node| node.data),
        }
    }

    /// Where operators call.
    pub(super) fn control_planes(&self) -> Vec<SocketAddr> {
        match self {
            Service::One(millrace) => vec![millrace.control_plane],
            Service::Several(nodes) => nodes.running(|node| node.control),
        }
    }

    /// The first of them, which is not killed.
    pub(super) fn data_plane(&self) -> anyhow::Result<String> {
        let first = self.data_planes().first().map(ToString::to_string);
        first.context("no node runs any more")
    }

    /// The control plane of the same.
    pub(super) fn control_plane(&self) -> anyhow::Result<String> {
        let first = self.control_planes().first().map(ToString::to_string);
        first.context("no node runs any more")
    }

    pub(super) fn database(&self) -> &Database {
        match self {
            Service::One(millrace) => millrace.database(),
            Service::Several(nodes) => nodes.database(),
        }
    }

    pub(super) fn nodes(&self) -> Option<&Nodes> {
        match self {
            Service::One(_) => None,
            Service::Several(nodes) => Some(nodes),
        }
    }

    /// Waits until it can serve no more, and returns the reason.
    pub(super) async fn failed(&self) -> String {
        match self {
            Service::One(millrace) => {
                let reason = millrace.poisoned().await;
                format!("Millrace stopped itself: {reason}")
            }
            Service::Several(nodes) => nodes.ended().await,
        }
    }

    /// Stops it. True: nothing was left over.
    pub(super) async fn drain(self) -> bool {
        match self {
            Service::One(millrace) => millrace.drain().await,
            Service::Several(nodes) => nodes.drain().await,
        }
    }
}
