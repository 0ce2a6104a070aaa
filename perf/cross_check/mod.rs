//! A check of our own client: `wrk`, an independent one, asks the same of the same
//! service.

use std::process::{Command, Stdio};

use anyhow::Context;

use crate::fixture::child::{Server, Service};
use crate::fixture::compare::alternate;
use crate::fixture::engine::HOT;
use crate::fixture::flood::{Template, rate};
use crate::fixture::{Finding, Lab, Scratch, blocking};

const CONNECTIONS: usize = 256;

/// Orders by new buyers under new keys, as our own client sends them.
const SCRIPT: &str = r#"
local number = tonumber(os.getenv("FIRST"))
request = function()
  number = number + 1
  local digits = string.format("%010d", number)
  return wrk.format("POST", "/v1/orders",
    { ["Content-Type"] = "application/json", ["Idempotency-Key"] = "key-" .. digits },
    '{"user_id":"u-' .. digits .. '","sku_id":"HOT"}')
end
"#;

/// Runs the case.
pub async fn run(lab: &Lab) -> anyhow::Result<Vec<Finding>> {
    let scratch = Scratch::new()?;
    let server = Server::start(&scratch.dir("millrace")?, &[])?;
    server.put_sku(HOT, u32::MAX)?;
    let constant = Service::start("constant", None, None)?;
    let script = scratch.path().join("order.lua");
    std::fs::write(&script, SCRIPT)?;
    let seconds = lab.pick(4, 2);
    let window = std::time::Duration::from_secs(seconds);
    let mut order = Template::order(HOT, "");
    let mut first = 5_000_000_000_u64;
    let wrk =
        |target: String, script: Option<&std::path::Path>, first: u64| -> anyhow::Result<f64> {
            let mut command = Command::new("wrk");
            command.args(["-t1", &format!("-c{CONNECTIONS}"), &format!("-d{seconds}")]);
            if let Some(script) = script {
                command.arg("-s").arg(script);
            }
            let done = command
                .arg(target)
                .env("FIRST", first.to_string())
                .stderr(Stdio::null())
                .output();
            let done = done.context("cannot start wrk; ./x perf installs what the lab needs")?;
            let text = String::from_utf8_lossy(&done.stdout);
            anyhow::ensure!(!text.contains("Non-2xx"), "wrk met failures: {text}");
            let rate = text
                .lines()
                .find_map(|line| line.strip_prefix("Requests/sec:"));
            rate.and_then(|rate| rate.trim().parse().ok())
                .with_context(|| format!("wrk said: {text}"))
        };
    let names = [
        "orders/s by wrk",
        "orders/s by us",
        "constant/s by wrk",
        "constant/s by us",
    ];
    let rounds = alternate(lab.rounds(), names, async |side| {
        first += 100_000_000;
        match side {
            0 => blocking(|| {
                wrk(
                    format!("http://{}/v1/orders", server.data),
                    Some(&script),
                    first,
                )
            }),
            1 => rate(server.data, CONNECTIONS, window, &mut order, 201),
            2 => blocking(|| wrk(format!("http://{}/", constant.address), None, 0)),
            _ => rate(constant.address, CONNECTIONS, window, &mut order, 200),
        }
    })
    .await?;
    server.audit()?;
    Ok(vec![
        Finding::spread(
            "waiting orders a second, as wrk counts them / as we do",
            rounds.ratio(0, 1),
        ),
        Finding::spread(
            "constant answers a second, as wrk counts them / as we do",
            rounds.ratio(2, 3),
        ),
    ])
}
