//! The configuration of the demo: the configured one, except for settings that the demo decides itself.

use std::path::PathBuf;

use super::DemoArgs;
use crate::config::{self, Config, OneOrMany};
use crate::loadgen::WebhookSecret;

/// Fields, or sections with a dot at the end, that the demo decides, and why.
const DECIDED: [(&str, &str); 6] = [
    (
        "data_dir",
        "it has a directory of its own; name one with --data-dir",
    ),
    (
        "database.url",
        "it never touches a configured database; name one for it with --database-url",
    ),
    ("database.schema", "it keeps to a schema of its own"),
    (
        "queue.journal.dir",
        "its journal is in its own directory; name one with --data-dir",
    ),
    (
        "orders.payment_ttl_ms",
        "its buyers have 10 s to pay, and it waits for what expires",
    ),
    ("payments.", "it plays the payment platform itself"),
];

/// The settings of the demo.
pub(super) struct Settings {
    /// The configuration of the server.
    pub(super) config: Config,
    /// Whether the log is configured; otherwise it is shown only if something went wrong.
    pub(super) show_log: bool,
}

impl Settings {
    /// Loads the configuration, and refuses settings that the demo decides.
    pub(super) fn load(
        args: &DemoArgs,
        data_dir: PathBuf,
        secret: &WebhookSecret,
    ) -> anyhow::Result<Self> {
        let mut config = args.config.load()?;
        let given = config::given_fields(args.config.config.as_deref());
        refuse(&given)?;
        config.data_dir = data_dir;
        let is_given = |field: &str| given.iter().any(|given| given == field);
        // Free ports, so that the demo can run beside a server.
        if !is_given("data_plane.listen") {
            config.data_plane.listen.set_port(0);
        }
        if !is_given("control_plane.listen") {
            config.control_plane.listen.set_port(0);
        }
        if !is_given("database.embedded_wal_bytes") {
            // Several times what it writes.
            config.database.embedded_wal_bytes = 320 << 20;
        }
        config.payments.standard.secret = OneOrMany(vec![secret.text().to_owned()]);
        config.orders.payment_ttl_ms = super::PAYMENT_TTL_MS;
        if let Some(url) = &args.database_url {
            config.database.url.clone_from(url);
            // Never among the orders of a real sale.
            config.database.schema = "millrace_demo".into();
        }
        let show_log = is_given("log.level");
        if !show_log {
            config.log.level = "warn".into();
        }
        Ok(Settings { config, show_log })
    }
}

fn refuse(given: &[String]) -> anyhow::Result<()> {
    for (decided, why) in DECIDED {
        let is_decided = |field: &&String| match decided.ends_with('.') {
            true => field.starts_with(decided),
            false => field.as_str() == decided,
        };
        if let Some(field) = given.iter().find(is_decided) {
            let variable = field.to_ascii_uppercase().replace('.', "__");
            anyhow::bail!(
                "the demo cannot use {field} (set in its configuration file or by MILLRACE_{variable}): {why}"
            );
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_demo_decides_itself_is_refused_with_the_remedy() {
        let refused = |field: &str| refuse(&[field.to_owned()]).map_err(|e| e.to_string());
        for field in ["database.embedded_bin_dir", "workers.count", "log.level"] {
            assert_eq!(refused(field), Ok(()));
        }
        for (field, words) in [
            ("database.url", "--database-url"),
            ("data_dir", "--data-dir"),
            ("payments.alipay.app_id", "plays the payment platform"),
            ("queue.journal.dir", "MILLRACE_QUEUE__JOURNAL__DIR"),
        ] {
            let message = refused(field).unwrap_err();
            assert!(
                message.contains(field) && message.contains(words),
                "{message}"
            );
        }
    }
}
