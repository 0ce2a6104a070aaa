//! `millrace demo --draw`: a draw on real parts, from the first entry to the verdict on its published file.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Context;
use futures_util::future::try_join_all;
use serde::Deserialize;
use serde_json::{Value, json};

use super::DemoArgs;
use super::service::Service;
use super::status::{clear, status};
use crate::cli::client::{call_with_token, send};
use crate::cli::draw::words;
use crate::cli::output::print;
use crate::cli::signals::Signals;
use crate::order::draw::verify::{Evidence, Opening, header_of, verify};
use crate::order::draw::{EntryToken, Header};
use crate::order::{UnixMillis, UserId};

const SKU: &str = "GRAND-PIANO";
/// Entries of a request, and requests under way at once.
const BATCH: usize = 500;
const CONNECTIONS: usize = 8;
/// Entries of a page of the published draw.
const PAGE: u64 = 10_000;
/// How long the draw may take after its moment.
const DRAWING: Duration = Duration::from_secs(120);
/// The file of the published draw.
const FILE: &str = "millrace-draw.ndjson";

/// A draw, and how to speak to the server that makes it.
pub(super) struct Draw<'a> {
    pub(super) args: &'a DemoArgs,
    pub(super) data_token: Option<String>,
    pub(super) control_token: Option<String>,
}

/// An answer to an entry.
#[derive(Deserialize)]
struct Answer {
    user_id: Option<String>,
    entry_token: Option<String>,
    detail: Option<String>,
}

impl Draw<'_> {
    /// Takes entries, waits for the draw, and checks what is published. True: every check holds.
    pub(super) async fn run(
        &self,
        service: Service,
        signals: &mut Signals,
    ) -> anyhow::Result<bool> {
        let held = tokio::select! {
            held = self.hold(&service) => held,
            reason = service.failed() => Err(anyhow::anyhow!(reason)),
            signal = signals.recv() => Err(anyhow::anyhow!("{signal} came before the draw was made")),
        };
        let clean = service.drain().await;
        Ok(held? && clean)
    }

    async fn hold(&self, service: &Service) -> anyhow::Result<bool> {
        let (data, control) = (service.data_plane()?, service.control_plane()?);
        let count = u64::from(self.args.rate()) * u64::from(self.args.duration);
        let draw_at = self.put(&control).await?;
        let earlier = header_of(&*self.page(&data, 0).await?)?;
        status(&format!(
            "On sale at http://{control}: {} units, which are drawn among {count} entries at {}; the promised seed has the \
             SHA-256 {}",
            self.args.stock, draw_at, earlier.commitment
        ));
        let started = Instant::now();
        let openings = self.enter(&data, count).await?;
        let seconds = started.elapsed().as_secs_f64();
        status(&format!(
            "{} entries in {seconds:.1} s, {:.0} a second; waiting for the draw ...",
            openings.len(),
            openings.len() as f64 / seconds
        ));
        let file = self.drawn(&data, draw_at).await?;
        std::fs::write(FILE, &file).with_context(|| format!("cannot write {FILE}"))?;
        let path = Path::new(FILE).display();
        let verdict = verify(
            &*file,
            &Evidence {
                earlier: vec![earlier],
                openings,
            },
        )?;
        let audit = self.call(&control, "GET", "/admin/v1/audit", None).await?;
        clear();
        print(&match self.args.json {
            true => format!("{:#}\n", serde_json::to_value(&verdict)?),
            false => format!(
                "{}\nThe published draw is in {path}; `millrace draw verify {path}` checks it again.\n",
                words(&verdict)
            ),
        })?;
        anyhow::ensure!(audit["ok"] == true, "the audit has found: {audit:#}");
        Ok(verdict.ok)
    }

    /// Puts the SKU on sale. Its entries end when the rush does.
    async fn put(&self, control: &str) -> anyhow::Result<UnixMillis> {
        let now = UnixMillis::now();
        let draw_at = now.plus_ms(u64::from(self.args.duration) * 1_000 + 1_000);
        let body = json!({
            "title": "Grand piano", "unit_price": 1_999_900, "currency": "CNY", "total": self.args.stock,
            "allocation": "draw", "draw_at": draw_at.to_string(), "waitlist_max": 10_000_000,
            "opens_at": UnixMillis(now.0 - 1_000).to_string(), "closes_at": draw_at.plus_ms(86_400_000).to_string(),
        });
        let path = format!("/admin/v1/skus/{SKU}");
        self.call(control, "PUT", &path, Some(&body)).await?;
        Ok(draw_at)
    }

    /// Sends the entries and returns the tokens. What is refused after the moment of the draw is no entry.
    async fn enter(&self, data: &str, count: u64) -> anyhow::Result<Vec<Opening>> {
        let users: Vec<String> = (0..count).map(|number| format!("buyer-{number}")).collect();
        let share = users.len().div_ceil(CONNECTIONS).max(1);
        let senders = users.chunks(share).map(|users| async move {
            let mut openings = Vec::with_capacity(users.len());
            for users in users.chunks(BATCH) {
                openings.extend(self.enter_batch(data, users).await?);
            }
            anyhow::Ok(openings)
        });
        Ok(try_join_all(senders).await?.into_iter().flatten().collect())
    }

    async fn enter_batch(&self, data: &str, users: &[String]) -> anyhow::Result<Vec<Opening>> {
        let lines = users.iter().map(|user| {
            let line = json!({ "user_id": user, "sku_id": SKU, "idempotency_key": "entry" });
            format!("{line}\n")
        });
        let token = self.data_token.as_deref();
        let (path, media_type) = ("/v1/orders:batch", Some("application/x-ndjson"));
        let (status, body) = send(data, "POST", path, media_type, lines.collect(), token).await?;
        let text = String::from_utf8_lossy(&body);
        anyhow::ensure!(status.is_success(), "entering: {status}: {text}");
        let mut openings = Vec::with_capacity(users.len());
        for line in text.lines() {
            let answer: Answer = serde_json::from_str(line).context("an answer to an entry")?;
            match (answer.user_id, answer.entry_token) {
                (Some(user), Some(token)) => openings.push(Opening {
                    user_id: UserId::new(&user)?,
                    token: EntryToken::from_hex(&token).context("an entry token")?,
                }),
                _ => tracing::debug!(detail = answer.detail, "an entry was refused"),
            }
        }
        Ok(openings)
    }

    /// The whole published file, once the draw is made.
    async fn drawn(&self, data: &str, draw_at: UnixMillis) -> anyhow::Result<Vec<u8>> {
        let until_draw = draw_at.0 - UnixMillis::now().0;
        tokio::time::sleep(Duration::from_millis(until_draw.try_into().unwrap_or(0))).await;
        let deadline = Instant::now() + DRAWING;
        let header = loop {
            let header: Header = header_of(&*self.page(data, 0).await?)?;
            if header.seed.is_some() {
                break header;
            }
            anyhow::ensure!(
                Instant::now() < deadline,
                "the draw is not made: see the log"
            );
            tokio::time::sleep(Duration::from_millis(50)).await;
        };
        let mut file = Vec::new();
        for after in (0..header.entries.unwrap_or(0).max(1)).step_by(PAGE as usize) {
            file.extend_from_slice(&self.page(data, after).await?);
        }
        Ok(file)
    }

    async fn page(&self, data: &str, after: u64) -> anyhow::Result<bytes::Bytes> {
        let path = format!("/v1/skus/{SKU}/draw?after={after}&limit={PAGE}");
        let token = self.data_token.as_deref();
        let (status, body) = send(data, "GET", &path, None, String::new(), token).await?;
        anyhow::ensure!(
            status.is_success(),
            "GET {path}: {status}: {}",
            String::from_utf8_lossy(&body)
        );
        Ok(body)
    }

    async fn call(
        &self,
        control: &str,
        method: &str,
        path: &str,
        body: Option<&Value>,
    ) -> anyhow::Result<Value> {
        call_with_token(control, method, path, body, self.control_token.as_deref()).await
    }
}
