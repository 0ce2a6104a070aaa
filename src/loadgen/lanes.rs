//! Samples of which node has which lane over the run, by the public `GET /v1/lanes`.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::get::GetClient;
use super::target::Target;

/// Timeout of a sample.
const TIMEOUT: Duration = Duration::from_secs(5);

/// The owners of the lanes over the run, as the node that was asked knew them.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct LaneSeries {
    /// When the last sample was taken, in milliseconds after the first request's moment.
    pub until_ms: f64,
    /// By lane: its owners one after the other.
    pub lanes: Vec<Vec<LaneSpan>>,
}

/// A time for which a lane had one owner, or none. It lasts until the next one.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct LaneSpan {
    /// Its beginning, in milliseconds after the first request's moment.
    pub from_ms: f64,
    /// The node; none while the lane was open nowhere.
    pub node: Option<u8>,
}

#[derive(Deserialize)]
struct Lanes {
    lanes: Vec<Lane>,
}

#[derive(Deserialize)]
struct Lane {
    node: Option<u8>,
}

impl LaneSeries {
    fn take(&mut self, t_ms: f64, nodes: impl Iterator<Item = Option<u8>>) {
        self.until_ms = t_ms;
        for (number, node) in nodes.enumerate() {
            if self.lanes.len() <= number {
                self.lanes.push(Vec::new());
            }
            let spans = &mut self.lanes[number];
            if spans.last().is_none_or(|last| last.node != node) {
                spans.push(LaneSpan {
                    from_ms: t_ms,
                    node,
                });
            }
        }
    }

    /// For each lane that `node` had at `since_ms`, how long it took until another one had it open; none if nobody has.
    pub fn closed_ms(&self, node: u8, since_ms: f64) -> Vec<Option<f64>> {
        let of = |spans: &Vec<LaneSpan>| {
            let before = spans.iter().rfind(|span| span.from_ms <= since_ms)?;
            (before.node == Some(node)).then(|| {
                let mut after = spans.iter().filter(|span| span.from_ms > since_ms);
                let open = after.find(|span| span.node.is_some_and(|other| other != node));
                open.map(|span| span.from_ms - since_ms)
            })
        };
        self.lanes.iter().filter_map(of).collect()
    }
}

/// Samples the lanes over a connection of its own.
pub(super) struct LaneWatch {
    target: Target,
    client: GetClient,
    series: LaneSeries,
}

impl LaneWatch {
    pub(super) fn of(target: &Target) -> Self {
        LaneWatch {
            target: target.clone(),
            client: GetClient::new(&target.addresses, target.get_headers(), TIMEOUT),
            series: LaneSeries::default(),
        }
    }

    /// Samples at this interval, until it is dropped. A failed sample leaves a gap.
    pub(super) async fn keep_sampling(&mut self, start: Instant, every: Duration) {
        let mut tick = tokio::time::interval(every);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tick.tick().await;
            let Ok(reply) = self.client.get(&self.target.lanes_path()).await else {
                continue;
            };
            if let Ok(Lanes { lanes }) = serde_json::from_slice(&reply.body) {
                let t_ms = (start.elapsed().as_secs_f64() * 1e4).round() / 10.0;
                let nodes = lanes.into_iter().map(|lane| lane.node);
                self.series.take(t_ms, nodes);
            }
        }
    }

    /// The samples.
    pub(super) fn into_series(self) -> LaneSeries {
        self.series
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lane_is_closed_until_another_node_has_it() {
        let mut series = LaneSeries::default();
        for (t_ms, nodes) in [
            (0.0, [Some(0), Some(1), Some(1)]),
            (100.0, [Some(0), Some(1), Some(1)]),
            (200.0, [Some(0), None, Some(1)]),
            (300.0, [Some(0), Some(0), Some(1)]),
        ] {
            series.take(t_ms, nodes.into_iter());
        }
        assert_eq!(
            series.lanes.iter().map(Vec::len).collect::<Vec<_>>(),
            [1, 3, 1]
        );
        assert_eq!(series.closed_ms(1, 120.0), [Some(180.0), None]);
        assert_eq!(series.closed_ms(0, 120.0), [None]);
        assert_eq!(series.closed_ms(2, 120.0), []);
    }
}
