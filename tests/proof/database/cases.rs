//! One server, mistreated.

use std::thread::sleep;
use std::time::Duration;

use rand::Rng as _;
use rand::rngs::StdRng;
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use super::fixture::{Fixture, runtime};
use super::{Figures, LONG, STEP, Terms};
use crate::outcome::Why;
use crate::support::postgres::test_dir;
use crate::support::proxy::Cut;
use crate::support::standby::Server;

/// Millrace on a server of its own, which is mistreated under load.
fn alone(
    terms: Terms<'_>,
    mistreat: impl FnOnce(&Fixture, &mut Server, &mut StdRng) -> Result<(), Why>,
) -> Result<Figures, Why> {
    alone_with(terms, &[], mistreat)
}

/// The same with more settings.
fn alone_with(
    terms: Terms<'_>,
    settings: &[(&str, &str)],
    mistreat: impl FnOnce(&Fixture, &mut Server, &mut StdRng) -> Result<(), Why>,
) -> Result<Figures, Why> {
    let (runtime, dir): (_, TempDir) = (runtime(), test_dir());
    let mut server = runtime.block_on(Server::start_in(dir.path(), &[]));
    let fixture = Fixture::start_with(runtime, &server, terms, settings)?;
    under_load(fixture, &mut server, mistreat)
}

fn under_load(
    mut fixture: Fixture,
    server: &mut Server,
    mistreat: impl FnOnce(&Fixture, &mut Server, &mut StdRng) -> Result<(), Why>,
) -> Result<Figures, Why> {
    fixture.under_load(|fixture, random| mistreat(fixture, server, random))?;
    let findings = fixture.finish(server)?;
    Ok(Figures {
        findings,
        ..Figures::default()
    })
}

/// The same with buyers who pay.
fn paying(
    terms: Terms<'_>,
    mistreat: impl FnOnce(&Fixture, &mut Server, &mut StdRng) -> Result<(), Why>,
) -> Result<Figures, Why> {
    let (runtime, dir): (_, TempDir) = (runtime(), test_dir());
    let mut server = runtime.block_on(Server::start_in(dir.path(), &[]));
    let fixture = Fixture::start_paying(runtime, &server, terms)?;
    under_load(fixture, &mut server, mistreat)
}

/// Stopped without a warning and started again, once at once and once after a while.
pub fn restarted(terms: Terms<'_>) -> Result<Figures, Why> {
    alone(terms, |fixture, server, _| {
        for away in [Duration::ZERO, LONG] {
            server.stop_immediately();
            sleep(away);
            fixture.runtime.block_on(server.start());
            fixture.until_written(50)?;
        }
        Ok(())
    })
}

/// The backends of the workers stop in the middle of what they do, one of them after the other.
pub fn stopped_worker_backends(terms: Terms<'_>) -> Result<Figures, Why> {
    alone(terms, |fixture, server, _| {
        for _ in 0..2 {
            stop_for_long(&fixture.runtime.block_on(server.worker_backends()));
            fixture.until_written(50)?;
        }
        Ok(())
    })
}

/// The whole server stops, the postmaster too, and goes on later as if nothing had been.
pub fn stopped_server(terms: Terms<'_>) -> Result<Figures, Why> {
    alone(terms, |fixture, server, _| {
        for _ in 0..2 {
            stop_for_long(&server.processes());
            fixture.until_written(50)?;
        }
        Ok(())
    })
}

fn stop_for_long(processes: &[Pid]) {
    for pid in processes {
        let _ = kill_process(*pid, Signal::STOP);
    }
    sleep(LONG);
    for pid in processes {
        let _ = kill_process(*pid, Signal::CONT);
    }
}

/// Every session of Millrace is ended, again and again.
pub fn terminated_backends(terms: Terms<'_>) -> Result<Figures, Why> {
    alone(terms, terminate)
}

/// The same while payments come in.
pub fn paid_terminated_backends(terms: Terms<'_>) -> Result<Figures, Why> {
    paying(terms, terminate)
}

fn terminate(fixture: &Fixture, server: &mut Server, random: &mut StdRng) -> Result<(), Why> {
    for _ in 0..20 {
        fixture.runtime.block_on(server.sql(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity
              WHERE datname = current_database() AND pid <> pg_backend_pid()",
        ));
        fixture.until_written(random.random_range(1..30))?;
    }
    Ok(())
}

pub fn cut_before_commit(terms: Terms<'_>) -> Result<Figures, Why> {
    cut(terms, Cut::Before, 10)
}

pub fn cut_after_commit(terms: Terms<'_>) -> Result<Figures, Why> {
    cut(terms, Cut::After, 10)
}

pub fn cut_in_silence(terms: Terms<'_>) -> Result<Figures, Why> {
    cut(terms, Cut::AfterInSilence, 6)
}

/// Connections are cut around their commits, one after the other.
fn cut(terms: Terms<'_>, cut: Cut, times: u64) -> Result<Figures, Why> {
    alone(terms, |fixture, _, random| {
        for _ in 0..times {
            fixture.proxy.cut(cut);
            fixture.until("a cut", || Ok(fixture.proxy.has_cut()))?;
            fixture.until_written(random.random_range(1..30))?;
        }
        Ok(())
    })
}

pub fn paid_cut_before_commit(terms: Terms<'_>) -> Result<Figures, Why> {
    cut_settlement(terms, Cut::Before)
}

pub fn paid_cut_after_commit(terms: Terms<'_>) -> Result<Figures, Why> {
    cut_settlement(terms, Cut::After)
}

pub fn paid_cut_in_silence(terms: Terms<'_>) -> Result<Figures, Why> {
    cut_settlement(terms, Cut::AfterInSilence)
}

pub fn paid_late_commits(terms: Terms<'_>) -> Result<Figures, Why> {
    cut_settlement(terms, Cut::Late(STEP + STEP / 2))
}

/// The connection of the settlement is cut around its commits, and now and then a worker's.
fn cut_settlement(terms: Terms<'_>, cut: Cut) -> Result<Figures, Why> {
    paying(terms, |fixture, _, random| {
        while fixture.has_bitten().is_err() {
            fixture.proxy.cut(cut);
            fixture.until("a cut", || Ok(fixture.proxy.has_cut()))?;
            fixture.until("its end", || Ok(fixture.proxy.late() == 0))?;
            fixture.until_written(random.random_range(1..30))?;
        }
        for _ in 0..8 {
            fixture.proxy.cut_beside_workers(cut);
            fixture.until("a cut", || Ok(fixture.proxy.has_cut()))?;
            fixture.until("its end", || Ok(fixture.proxy.late() == 0))?;
            fixture.until_written(random.random_range(1..30))?;
        }
        Ok(())
    })
}

/// Commits of workers, and of others, reach the server only after everybody has given them up.
pub fn late_commits(terms: Terms<'_>) -> Result<Figures, Why> {
    alone(terms, |fixture, _, _| {
        for _ in 0..3 {
            fixture.proxy.cut(Cut::Late(STEP + STEP / 2));
            fixture.until("a late commit", || Ok(fixture.proxy.has_cut()))?;
            fixture.until("its arrival", || Ok(fixture.proxy.late() == 0))?;
            fixture.until_written(50)?;
        }
        Ok(())
    })
}

/// Cancellations commit after they were given up, and after somebody has looked what came of
/// them, but before the server has ended their session.
pub fn late_cancellations(terms: Terms<'_>) -> Result<Figures, Why> {
    // As patient as the default in proportion to what else happens: given up after 2 s, looked at
    // a second later, ended by the server after 4 s.
    let settings = [("DATABASE__STEP_TIMEOUT_MS", "2000")];
    alone_with(terms, &settings, |fixture, _, _| {
        for _ in 0..3 {
            fixture
                .proxy
                .cut_beside_workers(Cut::Late(Duration::from_millis(3_500)));
            fixture.until("a late commit", || Ok(fixture.proxy.has_cut()))?;
        }
        fixture.until("its arrival", || Ok(fixture.proxy.late() == 0))
    })
}

/// Nothing comes through in either direction for a while; what was sent meanwhile arrives then.
pub fn silent_network(terms: Terms<'_>) -> Result<Figures, Why> {
    alone(terms, |fixture, _, _| {
        for _ in 0..2 {
            fixture.proxy.freeze(true);
            sleep(LONG);
            fixture.proxy.freeze(false);
            fixture.until_written(50)?;
        }
        Ok(())
    })
}

/// Somebody else holds the rows of every SKU.
pub fn locked_sku(terms: Terms<'_>) -> Result<Figures, Why> {
    locked(terms, "SELECT 1 FROM millrace.sku FOR UPDATE")
}

/// Somebody else holds the table of orders, as a careless migration would.
pub fn locked_orders(terms: Terms<'_>) -> Result<Figures, Why> {
    locked(terms, "LOCK TABLE millrace.orders IN ACCESS EXCLUSIVE MODE")
}

fn locked(terms: Terms<'_>, lock: &str) -> Result<Figures, Why> {
    alone(terms, |fixture, server, _| {
        let holder = fixture.runtime.block_on(server.session());
        for _ in 0..2 {
            let statements = format!("BEGIN; {lock}");
            fixture
                .runtime
                .block_on(holder.batch_execute(&statements))
                .expect("take the lock");
            sleep(LONG);
            fixture
                .runtime
                .block_on(holder.batch_execute("ROLLBACK"))
                .expect("let it go");
            fixture.until_written(50)?;
        }
        Ok(())
    })
}
