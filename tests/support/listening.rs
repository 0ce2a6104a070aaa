//! A PostgreSQL that listens on TCP, with TLS and with rules about who may come in how.
//!
//! Millrace's own server does neither, so this one is started by hand, on a copy of the template
//! in [`super::postgres`].

use std::{
    net::TcpListener,
    os::unix::{
        fs::{MetadataExt, PermissionsExt},
        process::CommandExt,
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use rcgen::{
    BasicConstraints, Certificate, CertificateParams, DnType, IsCa, Issuer, KeyPair, SigningKey,
    date_time_ymd,
};
use tempfile::TempDir;
use tokio_postgres::Client;
use x509_cert::certificate::Version;
use x509_cert::der::asn1::BitString;
use x509_cert::der::pem::LineEnding;
use x509_cert::der::{DecodePem, Encode, EncodePem};

use super::postgres::{connect, copy_template, test_dir};

const PATIENCE: Duration = Duration::from_secs(30);

/// The password of every role of [`Listening`].
pub const PASSWORD: &str = "p@ss/w?rd &%";
/// The same as it stands in a URL.
pub const PASSWORD_IN_URL: &str = "p%40ss%2Fw%3Frd%20%26%25";

/// Who may come in how; everybody else is turned away.
const RULES: &str = "
local     all millrace              trust
local     all all                   scram-sha-256
host      all shop   127.0.0.1/32   scram-sha-256
hostnossl all plain  127.0.0.1/32   scram-sha-256
";

/// The same over TLS. A server that is built without it does not start with such rules.
const RULES_OF_TLS: &str = "
hostssl   all tls    127.0.0.1/32   scram-sha-256
hostssl   all holder 127.0.0.1/32   cert
";

/// The running server. Its database `shop` belongs to no one but the superuser; the roles may
/// connect and make schemas in it, as a careful administrator would have it.
pub struct Listening {
    /// Where certificates, rules and sockets are; gone at the end.
    pub dir: TempDir,
    /// The TCP port on 127.0.0.1.
    pub port: u16,
    server: Child,
    user: (u32, u32),
}

impl Listening {
    /// Starts one that can [`Self::present`] certificates; `None` if the PostgreSQL of this run is built without TLS.
    pub async fn start_for_tls() -> Option<Self> {
        let listening = Self::start().await;
        let client = listening.administrator().await;
        let library = client.query_one("SHOW ssl_library", &[]).await;
        let library: String = library.expect("a setting").get(0);
        if library.is_empty() {
            println!("not run: TLS to PostgreSQL: this one is built without it");
            return None;
        }
        listening.write("hba.conf", &format!("{RULES}{RULES_OF_TLS}"));
        Some(listening)
    }

    /// Starts one without TLS.
    pub async fn start() -> Self {
        let dir = test_dir();
        copy_template(dir.path()).await;
        let home = dir.path().join("postgres");
        let meta = std::fs::metadata(home.join("data")).expect("the cluster");
        let user = (meta.uid(), meta.gid());
        // Who made the template wrote down with which program.
        let options = std::fs::read_to_string(home.join("data/postmaster.opts"))
            .expect("the template's server has run");
        let program = options.split_whitespace().next().expect("its program");
        let port = free_port();
        let place = dir.path();
        write(place, "hba.conf", RULES, user);
        write(place, "postgresql.conf", "ssl = off\n", user);
        let setting = |name: &str, value: String| ["-c".to_owned(), format!("{name}={value}")];
        let path = |name: &str| place.join(name).display().to_string();
        std::os::unix::fs::chown(place, Some(user.0), Some(user.1)).expect("give the directory");
        let mut command = as_user(program, user);
        command
            .arg("-D")
            .arg(home.join("data"))
            .args(setting("config_file", path("postgresql.conf")))
            .args(setting("hba_file", path("hba.conf")))
            .args(setting("port", port.to_string()))
            .args(setting("listen_addresses", "127.0.0.1".into()))
            .args(setting("unix_socket_directories", path("")))
            .args(setting("ssl_cert_file", path("server.crt")))
            .args(setting("ssl_key_file", path("server.key")))
            .args(setting("fsync", "off".into()))
            .args(setting("shared_buffers", "64MB".into()))
            .args(setting("max_connections", "200".into()))
            .current_dir(&home)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(std::fs::File::create(place.join("server.log")).expect("its log"));
        let server = command.spawn().expect("start PostgreSQL");
        let mut listening = Listening {
            dir,
            port,
            server,
            user,
        };
        listening.wait_until_up().await;
        listening.make_roles().await;
        listening
    }

    async fn wait_until_up(&mut self) {
        let deadline = Instant::now() + PATIENCE;
        let socket = self.dir.path().join(format!(".s.PGSQL.{}", self.port));
        while std::os::unix::net::UnixStream::connect(&socket).is_err()
            || self
                .superuser("postgres")
                .connect(tokio_postgres::NoTls)
                .await
                .is_err()
        {
            if Instant::now() > deadline || !matches!(self.server.try_wait(), Ok(None)) {
                let log = std::fs::read_to_string(self.dir.path().join("server.log"));
                panic!("PostgreSQL did not come up: {}", log.unwrap_or_default());
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    async fn make_roles(&self) {
        let client = connect(&self.superuser("postgres")).await;
        client
            .batch_execute("CREATE DATABASE shop")
            .await
            .expect("create the database");
        for role in ["shop", "tls", "plain", "holder"] {
            client
                .batch_execute(&format!(
                    "CREATE ROLE {role} LOGIN NOSUPERUSER PASSWORD '{PASSWORD}';
                     GRANT CONNECT, CREATE ON DATABASE shop TO {role}"
                ))
                .await
                .expect("create a role");
        }
    }

    /// Lets every role open streams of changes.
    pub async fn let_all_stream(&self) {
        let roles =
            ["shop", "tls", "plain", "holder"].map(|role| format!("ALTER ROLE {role} REPLICATION"));
        let client = self.administrator().await;
        client
            .batch_execute(&roles.join(";"))
            .await
            .expect("the right to stream");
    }

    fn superuser(&self, database: &str) -> tokio_postgres::Config {
        let mut config = tokio_postgres::Config::new();
        config
            .host_path(self.dir.path())
            .port(self.port)
            .user("millrace")
            .dbname(database);
        config
    }

    /// A superuser's session in the database `shop`.
    pub async fn administrator(&self) -> Client {
        connect(&self.superuser("shop")).await
    }

    /// How the superuser reaches the database, over the socket.
    pub fn superuser_url(&self) -> String {
        let socket = self.dir.path().display().to_string().replace('/', "%2F");
        format!("postgresql://millrace@{socket}:{}/shop", self.port)
    }

    /// How `role` reaches the database over TCP, by a name that resolves to 127.0.0.1.
    pub fn url(&self, role: &str, parameters: &str) -> String {
        format!(
            "postgresql://{role}:{PASSWORD_IN_URL}@localhost:{}/shop?{parameters}",
            self.port
        )
    }

    /// Puts a file into the server's directory, readable by it alone.
    pub fn write(&self, name: &str, text: &str) -> PathBuf {
        write(self.dir.path(), name, text, self.user)
    }

    /// Has the server use TLS with this certificate from here on, or no TLS. Where there is a file
    /// `clients.crt`, the authorities in it vouch for clients.
    pub async fn present(&self, certificate: Option<&Presented>) {
        let loaded = self.loaded_at().await;
        if let Some(Presented { certificate, key }) = certificate {
            self.write("server.crt", certificate);
            self.write("server.key", key);
            let clients = self.dir.path().join("clients.crt");
            let clients = match clients.exists() {
                true => format!("ssl_ca_file = '{}'\n", clients.display()),
                false => String::new(),
            };
            self.write("postgresql.conf", &format!("ssl = on\n{clients}"));
        } else {
            self.write("postgresql.conf", "ssl = off\n");
        }
        let deadline = Instant::now() + PATIENCE;
        let client = self.administrator().await;
        client
            .batch_execute("SELECT pg_reload_conf()")
            .await
            .expect("reload");
        while self.loaded_at().await == loaded {
            assert!(Instant::now() < deadline, "not reloaded in time");
        }
    }

    /// When the postmaster last read its files: a new session inherits it.
    async fn loaded_at(&self) -> String {
        self.administrator()
            .await
            .query_one("SELECT pg_conf_load_time()::text", &[])
            .await
            .expect("ask when it was configured")
            .get(0)
    }

    /// A command that runs as the server's user: neither PostgreSQL nor PgBouncer runs as root.
    pub fn as_server(&self, program: &Path) -> Command {
        as_user(program, self.user)
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        let _ = rustix::process::kill_process(
            rustix::process::Pid::from_child(&self.server),
            rustix::process::Signal::QUIT,
        );
        let _ = self.server.wait();
    }
}

fn as_user(program: impl AsRef<std::ffi::OsStr>, (uid, gid): (u32, u32)) -> Command {
    let mut command = Command::new(program);
    if rustix::process::geteuid().is_root() {
        command.uid(uid).gid(gid);
    }
    command
}

fn write(dir: &Path, name: &str, text: &str, (uid, gid): (u32, u32)) -> PathBuf {
    let path = dir.join(name);
    std::fs::write(&path, text).expect("write a file for the server");
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).expect("close it");
    std::os::unix::fs::chown(&path, Some(uid), Some(gid)).expect("give it to the server");
    path
}

/// A port that was free a moment ago.
pub fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0")
        .and_then(|listener| listener.local_addr())
        .expect("a free port")
        .port()
}

/// What a server shows, as PEM.
pub struct Presented {
    /// Its certificate.
    pub certificate: String,
    /// The certificate's key.
    pub key: String,
}

/// A certificate authority.
pub struct Authority {
    /// Its own certificate as PEM.
    pub certificate: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    /// Makes one.
    pub fn new(name: &str) -> Self {
        let mut parameters = CertificateParams::default();
        parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        parameters.distinguished_name.push(DnType::CommonName, name);
        let key = KeyPair::generate().expect("a key");
        let certificate: Certificate = parameters.self_signed(&key).expect("a certificate");
        Authority {
            certificate: certificate.pem(),
            issuer: Issuer::new(parameters, key),
        }
    }

    /// Vouches for `common_name` under these names until the first of January of `year`.
    pub fn vouch(&self, common_name: &str, names: &[&str], year: i32) -> Presented {
        let names: Vec<String> = names.iter().map(|&name| name.to_owned()).collect();
        let mut parameters = CertificateParams::new(names).expect("names");
        parameters.not_before = date_time_ymd(2020, 1, 1);
        parameters.not_after = date_time_ymd(year, 1, 1);
        parameters
            .distinguished_name
            .push(DnType::CommonName, common_name);
        let key = KeyPair::generate().expect("a key");
        let certificate = parameters
            .signed_by(&key, &self.issuer)
            .expect("a certificate");
        Presented {
            certificate: certificate.pem(),
            key: key.serialize_pem(),
        }
    }
}

/// A certificate that vouches for itself, as `openssl req -x509` makes it.
pub fn self_signed(names: &[&str], year: i32) -> Presented {
    let names: Vec<String> = names.iter().map(|&name| name.to_owned()).collect();
    let mut parameters = CertificateParams::new(names).expect("names");
    parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    parameters.not_before = date_time_ymd(2020, 1, 1);
    parameters.not_after = date_time_ymd(year, 1, 1);
    let key = KeyPair::generate().expect("a key");
    let certificate = parameters.self_signed(&key).expect("a certificate");
    Presented {
        certificate: certificate.pem(),
        key: key.serialize_pem(),
    }
}

/// Makes the certificate one of X.509 version 1: without names and purposes.
pub fn of_version_1(presented: Presented) -> Presented {
    let mut certificate =
        x509_cert::Certificate::from_pem(&presented.certificate).expect("a certificate");
    certificate.tbs_certificate.version = Version::V1;
    certificate.tbs_certificate.extensions = None;
    let key = KeyPair::from_pem(&presented.key).expect("its key");
    let text = certificate.tbs_certificate.to_der().expect("encode it");
    let signature = key.sign(&text).expect("sign it");
    certificate.signature = BitString::from_bytes(&signature).expect("a signature");
    Presented {
        certificate: certificate.to_pem(LineEnding::LF).expect("encode it"),
        key: presented.key,
    }
}
