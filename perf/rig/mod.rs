//! What every case of the lab stands on: processes, a PostgreSQL, clients, comparisons, findings.

pub mod child;
pub mod compare;
pub mod database;
pub mod engine;
pub mod flood;
pub mod load;
pub mod machine;

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Serialize;

use compare::Spread;

/// How thorough a run is.
#[derive(Clone, Copy, Debug)]
pub struct Lab {
    /// Minutes instead of an hour: fewer rounds, smaller amounts.
    pub quick: bool,
    /// Minutes that a soak lasts.
    pub soak_minutes: f64,
    /// Results are written to the cases' folders.
    pub record: bool,
}

impl Lab {
    /// One of two values.
    pub fn pick<T>(&self, whole: T, quick: T) -> T {
        if self.quick { quick } else { whole }
    }

    /// Rounds of a comparison.
    pub fn rounds(&self) -> usize {
        self.pick(7, 3)
    }

    /// How long one side of a round is measured.
    pub fn window(&self) -> Duration {
        Duration::from_millis(self.pick(4_000, 2_000))
    }
}

/// What a figure has to reach.
#[derive(Clone, Copy, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Target {
    /// Not less.
    AtLeast(f64),
    /// Not more.
    AtMost(f64),
}

impl Target {
    /// Whether a value reaches it.
    pub fn is_met_by(self, value: f64) -> bool {
        match self {
            Target::AtLeast(least) => value >= least,
            Target::AtMost(most) => value <= most,
        }
    }

    /// The number itself.
    pub fn number(self) -> f64 {
        match self {
            Target::AtLeast(number) | Target::AtMost(number) => number,
        }
    }
}

/// One figure of a case.
#[derive(Clone, Debug, Serialize)]
pub struct Finding {
    /// The target that it belongs to, as the table names it.
    pub id: Option<&'static str>,
    /// What was measured, against what.
    pub what: String,
    /// The figure; its median where it was measured several times.
    pub value: f64,
    /// Least and greatest, where it was measured several times.
    pub spread: Option<(f64, f64)>,
    /// What it has to reach.
    pub target: Option<Target>,
}

impl Finding {
    /// A figure for its own sake.
    pub fn of(what: impl Into<String>, value: f64) -> Self {
        Finding {
            id: None,
            what: what.into(),
            value,
            spread: None,
            target: None,
        }
    }

    /// A figure that was measured several times.
    pub fn spread(what: impl Into<String>, spread: Spread) -> Self {
        Finding {
            spread: Some((spread.least, spread.greatest)),
            ..Finding::of(what, spread.median)
        }
    }

    /// The same with the target that it is held against.
    pub fn against(mut self, id: &'static str, target: Target) -> Self {
        (self.id, self.target) = (Some(id), Some(target));
        self
    }
}

/// A directory for everything that a case writes, removed with this.
pub struct Scratch(tempfile::TempDir);

impl Scratch {
    /// A fresh one, below `MILLRACE_LAB_DIR` or the system's own place.
    ///
    /// # Errors
    /// Where there is no room for one.
    pub fn new() -> anyhow::Result<Self> {
        let dir = match std::env::var_os("MILLRACE_LAB_DIR") {
            Some(place) => tempfile::tempdir_in(place)?,
            None => tempfile::tempdir()?,
        };
        // PostgreSQL may run as another user and has to come through.
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o755))?;
        }
        Ok(Scratch(dir))
    }

    /// A directory in it, made if missing.
    ///
    /// # Errors
    /// Where it cannot be made.
    pub fn dir(&self, name: &str) -> anyhow::Result<PathBuf> {
        let path = self.0.path().join(name);
        std::fs::create_dir_all(&path)?;
        Ok(path)
    }

    /// The directory itself.
    pub fn path(&self) -> &Path {
        self.0.path()
    }
}

/// Runs what blocks, without holding up the lab's own tasks.
pub fn blocking<T>(work: impl FnOnce() -> T) -> T {
    tokio::task::block_in_place(work)
}
