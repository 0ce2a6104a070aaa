//! A real PostgreSQL for tests: one server a test process, one database a test.
//!
//! The server is Millrace's own embedded one. It starts with the first [`TestDatabase`] and stops
//! with the last. `initdb` takes about a second, so its result is kept under cargo's target
//! directory and copied.
//!
//! It is of the newest version that is installed, or, if the environment has
//! `MILLRACE_DATABASE__EMBEDDED_BIN_DIR`, that of this directory (`./x test --postgres`).

use std::{
    fs::{File, Permissions},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Arc, Weak,
        atomic::{AtomicU64, Ordering},
    },
};

use millrace::store::embedded::{Embedded, EmbeddedError, EmbeddedOptions};
use tempfile::TempDir;
use tokio::sync::Mutex;

/// The server shared by the tests of this process; it stops when the last handle is dropped.
pub struct Cluster {
    embedded: Embedded,
    _dir: TempDir,
}

static SHARED: Mutex<Weak<Cluster>> = Mutex::const_new(Weak::new());

impl Cluster {
    /// The running server of this process, started if there is none.
    pub async fn shared() -> Arc<Self> {
        let mut shared = SHARED.lock().await;
        if let Some(running) = shared.upgrade() {
            return running;
        }
        let cluster = Arc::new(Self::start().await);
        *shared = Arc::downgrade(&cluster);
        cluster
    }

    /// The server itself.
    pub fn embedded(&self) -> &Embedded {
        &self.embedded
    }

    async fn start() -> Self {
        end_orphans().await;
        let dir = test_dir();
        copy_template(dir.path()).await;
        let embedded = match Embedded::start(options(dir.path())).await {
            Ok(embedded) => embedded,
            // PostgreSQL was upgraded since the template was made.
            Err(EmbeddedError::VersionMissing { .. }) => {
                std::fs::remove_dir_all(template()).expect("remove the outdated template");
                std::fs::remove_dir_all(dir.path().join("postgres")).expect("remove its copy");
                copy_template(dir.path()).await;
                Embedded::start(options(dir.path()))
                    .await
                    .expect("start PostgreSQL")
            }
            Err(error) => panic!("{error}"),
        };
        Self {
            embedded,
            _dir: dir,
        }
    }
}

/// A fresh, empty database for one test. It keeps the shared server running.
pub struct TestDatabase {
    name: String,
    cluster: Arc<Cluster>,
}

impl TestDatabase {
    /// Makes one with a name of its own.
    pub async fn create() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let name = format!("test_{}", NEXT.fetch_add(1, Ordering::Relaxed));
        let cluster = Cluster::shared().await;
        cluster
            .embedded
            .create_database(&name)
            .await
            .expect("create the test's database");
        Self { name, cluster }
    }

    /// How to connect to it.
    pub fn config(&self) -> tokio_postgres::Config {
        self.cluster.embedded.config(&self.name)
    }

    /// The same as a URL.
    pub fn url(&self) -> String {
        self.cluster.embedded.url(&self.name)
    }

    /// A connected client; its connection runs as a task of the current runtime.
    pub async fn connect(&self) -> tokio_postgres::Client {
        connect(&self.config()).await
    }
}

impl Drop for TestDatabase {
    fn drop(&mut self) {
        if Arc::strong_count(&self.cluster) == 1 {
            // The whole server goes with this handle.
            return;
        }
        let (cluster, name) = (Arc::clone(&self.cluster), self.name.clone());
        // A test's own runtime may be ending, and blocks here: so another thread does it. What
        // fails is gone with the server anyway.
        let _ = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build();
            if let Ok(runtime) = runtime {
                let _ = runtime.block_on(cluster.embedded.drop_database(&name));
            }
        })
        .join();
    }
}

/// Connects, with the connection as a task of the current runtime.
pub async fn connect(config: &tokio_postgres::Config) -> tokio_postgres::Client {
    let (client, connection) = config
        .connect(tokio_postgres::NoTls)
        .await
        .expect("connect to the test's database");
    tokio::spawn(async move {
        let _ = connection.await;
    });
    client
}

/// A temporary directory that the server's user may enter also where the tests run as root.
pub fn test_dir() -> TempDir {
    let dir = tempfile::Builder::new()
        .prefix(&format!("{PREFIX}{}-", std::process::id()))
        .tempdir()
        .expect("make a temporary directory");
    std::fs::set_permissions(dir.path(), Permissions::from_mode(0o755)).expect("open it");
    dir
}

/// Puts an `initdb`ed cluster into a fresh `data_dir`.
pub async fn copy_template(data_dir: &Path) {
    let template = template();
    let tmp = template.parent().expect("the template has a parent");
    std::fs::create_dir_all(tmp).expect("make cargo's directory for tests");
    // Test binaries may run at the same time; closing the file unlocks it.
    let lock = File::create(tmp.join("postgres-template.lock")).expect("open the template's lock");
    lock.lock().expect("lock the template");
    if !template.exists() {
        let dir = test_dir();
        let embedded = Embedded::start(options(dir.path()))
            .await
            .unwrap_or_else(|error| panic!("{error}"));
        let home = embedded.home().to_owned();
        embedded.stop().await.expect("stop the template's server");
        let partial = template.with_extension("partial");
        let _ = std::fs::remove_dir_all(&partial);
        copy(&home, &partial);
        std::fs::rename(&partial, &template).expect("put the template in its place");
    }
    copy(&template, &data_dir.join("postgres"));
}

/// Options for a test's server. Without `fsync` only a power loss could hurt it.
pub fn options(data_dir: &Path) -> EmbeddedOptions {
    let mut options = EmbeddedOptions::new(data_dir);
    options.bin_dir = bin_dir();
    options.logical = true;
    options.settings = [
        ("fsync", "off"),
        ("shared_buffers", "64MB"),
        ("max_connections", "300"),
        // A sink of events has one, and many tests have sinks.
        ("max_replication_slots", "100"),
    ]
    .map(|(name, value)| (name.to_owned(), value.to_owned()))
    .to_vec();
    options
}

const PREFIX: &str = "millrace-test-";

/// The setting that chooses the server of all tests.
pub const BIN_DIR: &str = "MILLRACE_DATABASE__EMBEDDED_BIN_DIR";

/// The directory of the programs that were chosen for the tests.
fn bin_dir() -> Option<PathBuf> {
    let dir = std::env::var_os(BIN_DIR).filter(|dir| !dir.is_empty());
    dir.map(PathBuf::from)
}

/// One for each server that was chosen, for a cluster runs only with the version that made it.
fn template() -> PathBuf {
    let uid = rustix::process::geteuid().as_raw();
    let mut name = format!("postgres-template-{uid}");
    if let Some(dir) = bin_dir() {
        name.push_str(&dir.to_string_lossy().replace('/', "-"));
    }
    Path::new(env!("CARGO_TARGET_TMPDIR")).join(name)
}

/// Keeps owners and modes, which the server insists on.
fn copy(from: &Path, to: &Path) {
    let status = Command::new("cp").arg("-a").arg(from).arg(to).status();
    assert!(
        status.is_ok_and(|status| status.success()),
        "cannot copy {} to {}",
        from.display(),
        to.display()
    );
}

/// Ends the servers of test processes that were killed, such as by a Ctrl-C.
async fn end_orphans() {
    let Ok(entries) = std::fs::read_dir(std::env::temp_dir()) else {
        return;
    };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let owner = name
            .to_str()
            .and_then(|name| name.strip_prefix(PREFIX)?.split('-').next()?.parse().ok())
            .and_then(rustix::process::Pid::from_raw);
        let Some(owner) = owner else { continue };
        let dead = rustix::process::test_kill_process(owner) == Err(rustix::io::Errno::SRCH);
        if !dead {
            continue;
        }
        if entry.path().join("postgres/data/postmaster.pid").exists() {
            match Embedded::start(options(&entry.path())).await {
                Ok(embedded) => {
                    let _ = embedded.stop_and_erase().await;
                }
                // Another test binary is at it, or it is beyond help.
                Err(_) => continue,
            }
        }
        // A test may have put its cluster deeper: never delete under a server.
        if !holds_server(&entry.path()) {
            let _ = std::fs::remove_dir_all(entry.path());
        }
    }
}

fn holds_server(dir: &Path) -> bool {
    let Ok(entries) = std::fs::read_dir(dir) else {
        return false;
    };
    entries.flatten().any(|entry| {
        entry.file_name() == "postmaster.pid"
            || (entry.file_type().is_ok_and(|kind| kind.is_dir()) && holds_server(&entry.path()))
    })
}
