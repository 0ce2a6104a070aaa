//! Finding an installed PostgreSQL server.
//!
//! Distributions keep the server's programs out of `PATH` (Debian) or under one directory a
//! version (Homebrew, Postgres.app, PGDG on RHEL), so all of these are asked for `--version` and
//! the newest wins. A cluster that exists already runs only with its own major version.

use std::{
    fmt,
    path::{Path, PathBuf},
    process::Stdio,
};

use super::{error::EmbeddedError, user::ServerUser};

/// The oldest major version that Millrace runs on.
pub(super) const MAJOR_MIN: u32 = 15;

/// Places of the packagers, in order of preference among equal versions. `*` is any one name
/// part; a directory that is not there costs one failed look-up.
const PLACES: &[&str] = &[
    "/usr/lib/postgresql/*/bin",
    "/usr/pgsql-*/bin",
    "/opt/homebrew/opt/postgresql@*/bin",
    "/usr/local/opt/postgresql@*/bin",
    "/opt/homebrew/bin",
    "/usr/local/bin",
    "/home/linuxbrew/.linuxbrew/opt/postgresql@*/bin",
    "/Applications/Postgres.app/Contents/Versions/*/bin",
    "/usr/local/pgsql/bin",
    "/usr/libexec/postgresql*",
];

/// One installed server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Installation {
    /// The directory of `postgres`, `initdb` and `pg_ctl`, links resolved.
    pub bin: PathBuf,
    /// Its version.
    pub version: Version,
}

/// A server version such as 15.7; betas count as minor 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Version {
    pub major: u32,
    pub minor: u32,
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

impl Version {
    /// Reads `postgres (PostgreSQL) 15.7 (Debian 15.7-0+deb12u1)`, `… 18beta1`, `… 17devel`.
    fn parse(output: &str) -> Option<Self> {
        let number = output.split("(PostgreSQL)").nth(1)?.trim_start();
        let digits = |text: &str| -> String {
            text.chars()
                .take_while(char::is_ascii_digit)
                .collect::<String>()
        };
        let major = digits(number);
        let rest = number.get(major.len()..)?;
        let minor = rest.strip_prefix('.').map(digits).unwrap_or_default();
        Some(Self {
            major: major.parse().ok()?,
            minor: minor.parse().unwrap_or(0),
        })
    }
}

/// The newest installation that `user` may run; of `needed`'s major version where a cluster
/// exists already (its directory is for the message).
pub(super) fn find(
    configured: Option<&Path>,
    user: &ServerUser,
    needed: Option<(u32, &Path)>,
) -> Result<Installation, EmbeddedError> {
    let dirs = match configured {
        Some(dir) => vec![dir.to_owned()],
        None => search_path().chain(packaged(PLACES)).collect(),
    };
    let installed = installed(dirs, user);
    choose(installed, needed).map_err(|error| match (error, configured) {
        (EmbeddedError::NotFound { .. }, Some(dir)) => EmbeddedError::BinDir { dir: dir.into() },
        (other, _) => other,
    })
}

fn choose(
    installed: Vec<Installation>,
    needed: Option<(u32, &Path)>,
) -> Result<Installation, EmbeddedError> {
    let found = installed
        .iter()
        .map(|one| one.version.to_string())
        .collect::<Vec<_>>();
    // The first of equal versions wins: `max_by` would take the last.
    let newest = |wanted: &dyn Fn(u32) -> bool| {
        installed
            .iter()
            .rev()
            .filter(|one| wanted(one.version.major))
            .max_by_key(|one| one.version)
            .cloned()
    };
    match needed {
        None => {
            newest(&|major| major >= MAJOR_MIN).ok_or_else(|| EmbeddedError::NotFound { found })
        }
        Some((major, data)) => {
            newest(&|one| one == major).ok_or_else(|| EmbeddedError::VersionMissing {
                data: data.to_owned(),
                needed: major,
                found,
            })
        }
    }
}

/// Every directory with a server that answers `--version` when run as `user`.
fn installed(dirs: Vec<PathBuf>, user: &ServerUser) -> Vec<Installation> {
    let mut seen = Vec::new();
    let mut found = Vec::new();
    for dir in dirs {
        // `PATH` often holds a link into one of the packagers' places: follow it, so that it
        // counts once and `initdb` finds its siblings.
        let Ok(postgres) = dir.join("postgres").canonicalize() else {
            continue;
        };
        let Some(bin) = postgres.parent().map(Path::to_owned) else {
            continue;
        };
        if seen.contains(&bin) {
            continue;
        }
        seen.push(bin.clone());
        let complete = ["initdb", "pg_ctl"]
            .iter()
            .all(|program| bin.join(program).is_file());
        if !complete {
            continue;
        }
        if let Some(version) = ask(&postgres, user) {
            found.push(Installation { bin, version });
        }
    }
    found
}

fn ask(postgres: &Path, user: &ServerUser) -> Option<Version> {
    let output = user
        .command(postgres)
        .arg("--version")
        .current_dir("/")
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .output()
        .ok()?;
    Version::parse(&String::from_utf8_lossy(&output.stdout))
}

fn search_path() -> impl Iterator<Item = PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .filter(|dir| dir.is_absolute())
        .collect::<Vec<_>>()
        .into_iter()
}

fn packaged(patterns: &[&str]) -> Vec<PathBuf> {
    patterns
        .iter()
        .flat_map(|pattern| expand(pattern))
        .collect()
}

/// Expands at most one `*` in a path.
fn expand(pattern: &str) -> Vec<PathBuf> {
    let Some((before, after)) = pattern.split_once('*') else {
        return vec![PathBuf::from(pattern)];
    };
    let (parent, prefix) = before.rsplit_once('/').unwrap_or(("", before));
    let Ok(entries) = std::fs::read_dir(parent) else {
        return Vec::new();
    };
    let mut paths = entries
        .flatten()
        .filter(|entry| {
            entry
                .file_name()
                .to_str()
                .is_some_and(|name| name.starts_with(prefix))
        })
        .map(|entry| {
            let mut path = entry.path().into_os_string();
            path.push(after);
            PathBuf::from(path)
        })
        .collect::<Vec<_>>();
    paths.sort();
    paths
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(bin: &str, major: u32, minor: u32) -> Installation {
        Installation {
            bin: bin.into(),
            version: Version { major, minor },
        }
    }

    #[test]
    fn versions_of_every_packager_are_read() {
        for (text, major, minor) in [
            (
                "postgres (PostgreSQL) 15.7 (Debian 15.7-0+deb12u1)\n",
                15,
                7,
            ),
            ("postgres (PostgreSQL) 17.2 (Homebrew)", 17, 2),
            ("postgres (PostgreSQL) 18beta1", 18, 0),
            ("postgres (PostgreSQL) 16devel", 16, 0),
        ] {
            assert_eq!(Version::parse(text), Some(Version { major, minor }));
        }
        assert_eq!(Version::parse("postgres: command not found"), None);
        assert_eq!(Version::parse("postgres (PostgreSQL) new"), None);
    }

    #[test]
    fn the_newest_wins_and_the_first_of_equals() {
        let installed = vec![at("/a", 15, 9), at("/b", 17, 1), at("/c", 17, 1)];
        assert_eq!(choose(installed, None).unwrap(), at("/b", 17, 1));
    }

    #[test]
    fn an_existing_cluster_gets_its_own_major_version_or_an_error_that_names_it() {
        let installed = vec![at("/a", 15, 9), at("/b", 17, 1)];
        let data = Path::new("/d");
        assert_eq!(
            choose(installed.clone(), Some((15, data))).unwrap(),
            at("/a", 15, 9)
        );
        let error = choose(installed, Some((16, data))).unwrap_err().to_string();
        assert!(
            error.contains("PostgreSQL 16") && error.contains("15.9, 17.1"),
            "{error}"
        );
    }

    #[test]
    fn too_old_is_not_found_and_says_what_was_found() {
        let error = choose(vec![at("/a", 14, 3)], None).unwrap_err().to_string();
        assert!(
            error.contains("(found: 14.3)") && error.contains("apt-get install postgresql"),
            "{error}"
        );
    }
}
