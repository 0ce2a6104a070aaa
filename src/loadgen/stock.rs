//! Samples of stock over the run, by the public `GET /v1/skus/{sku_id}`.

use std::time::{Duration, Instant};

use hyper::StatusCode;
use serde::Deserialize;
use tokio::time::MissedTickBehavior;

use super::error::LoadError;
use super::get::{GetClient, Got};
use super::report::{StockSample, StockSeries};
use super::sender::Fault;
use super::target::Target;

/// Timeout of a sample.
const TIMEOUT: Duration = Duration::from_secs(5);

/// Pause before a SKU is asked for again.
const AGAIN_AFTER: Duration = Duration::from_millis(200);

/// The most SKUs that are sampled; a chart shows no more.
const WATCHED_MAX: usize = 16;

#[derive(Deserialize)]
struct Sku {
    #[serde(default)]
    title: Option<String>,
    total: u64,
    free: u64,
    held: u64,
    sold: u64,
}

impl Sku {
    fn sample(&self, t_ms: f64) -> StockSample {
        StockSample {
            t_ms,
            free: self.free,
            held: self.held,
            sold: self.sold,
            total: self.total,
        }
    }
}

/// Samples SKUs over a connection of its own.
pub(super) struct StockWatch {
    target: Target,
    client: GetClient,
    series: Vec<StockSeries>,
}

impl StockWatch {
    /// Asks for a SKU, again while it says that it cannot tell yet.
    async fn first_look(&mut self, sku: &str) -> Result<Got, Fault> {
        let deadline = Instant::now() + TIMEOUT;
        loop {
            let reply = self.client.get(&self.target.sku_path(sku)).await?;
            if reply.status != StatusCode::SERVICE_UNAVAILABLE || Instant::now() > deadline {
                return Ok(reply);
            }
            tokio::time::sleep(AGAIN_AFTER).await;
        }
    }

    /// Checks that the target answers, accepts our token and knows the SKUs. A missing SKU is an error only
    /// if `strict`.
    pub(super) async fn open(
        target: &Target,
        skus: &[String],
        watch: bool,
        strict: bool,
    ) -> Result<Self, LoadError> {
        let mut own = Self {
            target: target.clone(),
            client: GetClient::new(&target.addresses, target.get_headers(), TIMEOUT),
            series: Vec::new(),
        };
        own.client
            .connect()
            .await
            .map_err(|source| LoadError::Unreachable {
                target: target.url.clone(),
                source,
            })?;
        if !watch {
            return Ok(own);
        }
        for sku in skus.iter().take(WATCHED_MAX) {
            let reply = own
                .first_look(sku)
                .await
                .map_err(|fault| LoadError::NoAnswer {
                    target: target.url.clone(),
                    reason: fault.name().to_owned(),
                })?;
            let read = serde_json::from_slice::<Sku>(&reply.body);
            match (reply.status.as_u16(), read) {
                (200, Ok(sku_now)) => own.series.push(StockSeries {
                    sku_id: sku.clone(),
                    samples: vec![sku_now.sample(0.0)],
                    title: sku_now.title,
                    sold_out_after_ms: None,
                }),
                (401, _) => {
                    return Err(LoadError::Unauthorized {
                        target: target.url.clone(),
                    });
                }
                _ if !strict => {}
                (404, _) => {
                    return Err(LoadError::UnknownSku {
                        target: target.url.clone(),
                        sku: sku.clone(),
                    });
                }
                (status, _) => {
                    return Err(LoadError::SkuCheck {
                        target: target.url.clone(),
                        sku: sku.clone(),
                        status,
                    });
                }
            }
        }
        Ok(own)
    }

    /// Samples every SKU at this interval, until it is dropped.
    pub(super) async fn keep_sampling(&mut self, start: Instant, every: Duration) {
        let mut tick = tokio::time::interval(every);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tick.tick().await;
            self.sample(start).await;
        }
    }

    /// Samples every SKU once. A failed sample leaves a gap and does not end the load.
    pub(super) async fn sample(&mut self, start: Instant) {
        for series in &mut self.series {
            let Ok(reply) = self.client.get(&self.target.sku_path(&series.sku_id)).await else {
                continue;
            };
            let Ok(sku) = serde_json::from_slice::<Sku>(&reply.body) else {
                continue;
            };
            let t_ms = (start.elapsed().as_secs_f64() * 1e4).round() / 10.0;
            if sku.free == 0 && sku.total > 0 && series.sold_out_after_ms.is_none() {
                series.sold_out_after_ms = Some(t_ms);
            }
            series.samples.push(sku.sample(t_ms));
        }
    }

    /// The samples.
    pub(super) fn into_series(self) -> Vec<StockSeries> {
        self.series
    }
}
