//! The real binary under mixed load while its database stalls for longer than the order timeout, in
//! one way after the other. It has to say so, an operator's pause has to take effect meanwhile, and
//! everything that buyers were told has to be true in the end.

use rand::Rng as _;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;

use super::checker::Findings;
use super::database::Terms;
use super::database::fixture::{Crowd, Fixture, runtime};
use super::outcome::{Why, in_series};
use crate::support::http::{Answer, call};
use crate::support::postgres::test_dir;
use crate::support::standby::Server;

/// Ways in which a database stalls.
const WAYS: [Way; 4] = [
    Way::StoppedWorkers,
    Way::StoppedServer,
    Way::SilentNetwork,
    Way::LockedSkus,
];

/// Rounds on one database; the next begin with an empty one.
const SERIES: u64 = 8;

/// The SKU whose sale an operator pauses in an emergency.
const EMERGENCY: &str = "EMERGENCY";

#[derive(Clone, Copy, Debug)]
enum Way {
    /// SIGSTOP for the backends of the workers, and nobody else is let in.
    StoppedWorkers,
    /// SIGSTOP for the postmaster and every process of it.
    StoppedServer,
    /// Connections stay open and nothing comes through.
    SilentNetwork,
    /// Another session holds the row of each SKU.
    LockedSkus,
}

/// Rounds of load, each with a stall.
pub fn run(rounds: u64) -> Result<String, Why> {
    Ok(with_bug(rounds, None)?)
}

/// The same with a deliberate defect, to show that it is found.
pub fn with_bug(rounds: u64, bug: Option<&str>) -> Result<String, String> {
    in_series("progress", rounds, SERIES, |seed, rounds, done| {
        series(Terms { seed, bug }, rounds, done).map_err(|why| match why {
            Why::Failed(why) | Why::NotRun(why) => why,
        })
    })
}

fn series(terms: Terms<'_>, rounds: u64, done: &dyn Fn(u64)) -> Result<Findings, Why> {
    let (runtime, dir) = (runtime(), test_dir());
    let server = runtime.block_on(Server::start_in(dir.path(), &[]));
    let mut crowd = Crowd::new("ALL", 50, true);
    crowd.skus.push(EMERGENCY.to_owned());
    let mut fixture = Fixture::with(runtime, &server, terms, vec![crowd], &[])?;
    let first = fixture.random.random_range(0..WAYS.len());
    for number in 0..rounds {
        done(number);
        let way = WAYS[(first + number as usize) % WAYS.len()];
        fixture
            .load_while(|fixture, _| round(fixture, &server, way))
            .map_err(|why| match why {
                Why::Failed(why) => Why::Failed(format!("{way:?}: {why}")),
                not_run @ Why::NotRun(_) => not_run,
            })?;
    }
    let mut findings = fixture.finish(&server)?;
    if findings.unanswered > 0 {
        findings.fault(format!("{} buyers got no answer", findings.unanswered));
    }
    Ok(findings)
}

fn round(fixture: &Fixture, server: &Server, way: Way) -> Result<(), Why> {
    fixture.until("it is ready", || {
        Ok(fixture.served.failing_checks().is_empty())
    })?;
    let stall = Stall::begin(fixture, server, way);
    fixture.until("readyz names `progress`", || Ok(is_stalled(fixture)))?;
    pause(fixture)?;
    if !is_stalled(fixture) {
        return Err(failed("readyz forgets the stall while orders wait"));
    }
    drop(stall);
    fixture.until("readyz recovers", || {
        Ok(fixture.served.failing_checks().is_empty())
    })?;
    fixture.until_written(100)?;
    // A pause that could not be stored during the stall is stored by now, or will be.
    let stored =
        format!("SELECT count(*) FROM millrace.sku WHERE sku_id = '{EMERGENCY}' AND paused");
    fixture.until("the pause is stored", || {
        Ok(fixture.runtime.block_on(server.number(&stored)) == 1)
    })?;
    if !is_refused(&order(fixture)) {
        return Err(failed("the pause was forgotten with the stall"));
    }
    let resume = format!("/admin/v1/skus/{EMERGENCY}/resume");
    let resumed = call(fixture.served.control, "POST", &resume, &[], "");
    match (resumed.status, state(fixture).as_str()) {
        (200, "open") => Ok(()),
        (_, state) => Err(failed(&format!(
            "its sale is not resumed: {state}: {resumed:?}"
        ))),
    }
}

fn is_stalled(fixture: &Fixture) -> bool {
    let failing = fixture.served.failing_checks();
    failing.iter().any(|(name, _)| name == "progress")
}

/// An operator pauses a sale while the database stalls. The pause is in force before the stall is over.
fn pause(fixture: &Fixture) -> Result<(), Why> {
    let control = fixture.served.control;
    let answer = std::thread::scope(|scope| {
        let target = format!("/admin/v1/skus/{EMERGENCY}/pause");
        let operator = scope.spawn(move || call(control, "POST", &target, &[], ""));
        fixture.until("the pause is in force", || Ok(state(fixture) == "paused"))?;
        let next = order(fixture);
        if !is_refused(&next) {
            return Err(failed(&format!("after the pause: {next:?}")));
        }
        Ok(operator.join().expect("the operator's answer"))
    })?;
    // Only what is stored is called done.
    let detail = answer.json()["detail"].to_string();
    match (answer.status, answer.code().as_str()) {
        (200, _) => Ok(()),
        (503, "not_stored") if detail.contains("IS paused") => Ok(()),
        _ => Err(failed(&format!("the operator is told {answer:?}"))),
    }
}

fn state(fixture: &Fixture) -> String {
    let target = format!("/v1/skus/{EMERGENCY}");
    let sku = call(fixture.served.data, "GET", &target, &[], "").json();
    sku["state"].as_str().unwrap_or_default().to_owned()
}

/// An order that has to be refused, so nobody keeps account of it: if it were placed its row would
/// be one that nobody asked for.
fn order(fixture: &Fixture) -> Answer {
    let body = json!({ "user_id": "too-late", "sku_id": EMERGENCY });
    let fields = [("Content-Type", "application/json")];
    call(
        fixture.served.data,
        "POST",
        "/v1/orders",
        &fields,
        &body.to_string(),
    )
}

fn is_refused(answer: &Answer) -> bool {
    (answer.status, answer.code().as_str()) == (409, "sale_paused")
}

fn failed(why: &str) -> Why {
    Why::Failed(why.to_owned())
}

/// A database that stalls until this is dropped.
struct Stall<'a> {
    fixture: &'a Fixture,
    way: Way,
    stopped: Vec<Pid>,
    holder: Option<tokio_postgres::Client>,
}

impl<'a> Stall<'a> {
    fn begin(fixture: &'a Fixture, server: &Server, way: Way) -> Self {
        let mut stall = Stall {
            fixture,
            way,
            stopped: Vec::new(),
            holder: None,
        };
        match way {
            Way::StoppedWorkers => {
                fixture.proxy.shut(true);
                stall.stopped = fixture.runtime.block_on(server.worker_backends());
            }
            Way::StoppedServer => stall.stopped = server.processes(),
            Way::SilentNetwork => fixture.proxy.freeze(true),
            Way::LockedSkus => {
                let holder = fixture.runtime.block_on(async {
                    let session = server.session().await;
                    let lock = "BEGIN; SELECT 1 FROM millrace.sku FOR UPDATE";
                    session.batch_execute(lock).await.expect("take the lock");
                    session
                });
                stall.holder = Some(holder);
            }
        }
        for pid in &stall.stopped {
            let _ = kill_process(*pid, Signal::STOP);
        }
        stall
    }
}

impl Drop for Stall<'_> {
    fn drop(&mut self) {
        for pid in &self.stopped {
            let _ = kill_process(*pid, Signal::CONT);
        }
        match self.way {
            Way::StoppedWorkers => self.fixture.proxy.shut(false),
            Way::SilentNetwork => self.fixture.proxy.freeze(false),
            Way::StoppedServer | Way::LockedSkus => {}
        }
        if let Some(holder) = self.holder.take() {
            let rolled_back = self
                .fixture
                .runtime
                .block_on(holder.batch_execute("ROLLBACK"));
            rolled_back.expect("let the lock go");
        }
    }
}
