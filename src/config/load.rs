//! From a file and the environment to a checked [`Config`].

use std::path::{Path, PathBuf};

use super::{Config, ConfigError, DEFAULT_FILE, environment, log, payments};

impl Config {
    /// Reads the file (`file`, else [`DEFAULT_FILE`] where there is one), lays the environment
    /// over it and checks the whole.
    ///
    /// # Errors
    /// [`ConfigError`] with the place and the remedy.
    pub fn load(file: Option<&Path>) -> Result<Self, ConfigError> {
        let path = match file {
            Some(path) => Some(path.to_path_buf()),
            None => Some(PathBuf::from(DEFAULT_FILE)).filter(|path| path.exists()),
        };
        let (text, origin) = match path {
            Some(path) => match std::fs::read_to_string(&path) {
                Ok(text) => (text, path.display().to_string()),
                Err(source) => return Err(ConfigError::Read { path, source }),
            },
            None => (String::new(), "defaults".to_owned()),
        };
        let settings = environment::read().map_err(|message| ConfigError::Invalid {
            origin: "environment".to_owned(),
            message,
        })?;
        Self::parse(&text, &origin, settings)
    }

    /// The same from texts: TOML, what to call it in messages, and the environment.
    ///
    /// # Errors
    /// As [`Config::load`].
    pub fn parse(
        text: &str,
        origin: &str,
        env: impl IntoIterator<Item = (String, String)>,
    ) -> Result<Self, ConfigError> {
        let invalid = |origin: &str, message: String| ConfigError::Invalid {
            origin: origin.to_owned(),
            message: message.trim_end().to_owned(),
        };
        // Once from the text alone, so that a mistake in the file is shown with its line.
        toml::from_str::<Config>(text).map_err(|e| invalid(origin, e.to_string()))?;
        let mut table: toml::Table =
            toml::from_str(text).map_err(|e| invalid(origin, e.to_string()))?;
        let defaults = toml::Table::try_from(Config::default())
            .map_err(|e| invalid("defaults", e.to_string()))?;
        environment::lay_over(&mut table, &defaults, env)
            .map_err(|(name, message)| invalid(&format!("environment variable {name}"), message))?;
        let config: Config = table
            .try_into()
            .map_err(|e: toml::de::Error| invalid(origin, e.to_string()))?;
        config.check()?;
        Ok(config)
    }

    /// The configuration as TOML, secrets left out.
    pub fn to_toml(&self) -> String {
        let mut shown = self.clone();
        let lists = [
            &mut shown.data_plane.token,
            &mut shown.control_plane.token,
            &mut shown.payments.standard.secret,
            &mut shown.payments.stripe.secret,
            &mut shown.receipt.key,
        ];
        let texts = [
            &mut shown.database.url,
            &mut shown.payments.wechatpay.apiv3_key.0,
        ];
        lists
            .into_iter()
            .flat_map(|list| &mut list.0)
            .chain(texts)
            .filter(|text| !text.is_empty())
            .for_each(|text| *text = "(hidden)".into());
        toml::to_string_pretty(&shown).unwrap_or_default()
    }

    /// Workers that will run.
    pub fn worker_count(&self) -> usize {
        match self.workers.count {
            0 => std::thread::available_parallelism()
                .map_or(2, usize::from)
                .clamp(2, 8),
            count => count,
        }
    }

    /// The directory of the journal.
    pub fn journal_dir(&self) -> std::path::PathBuf {
        let dir = &self.queue.journal.dir;
        if dir.as_os_str().is_empty() {
            self.data_dir.join("journal")
        } else {
            dir.clone()
        }
    }

    fn check(&self) -> Result<(), ConfigError> {
        fn range<T: PartialOrd + std::fmt::Display>(
            field: &'static str,
            value: T,
            least: T,
            most: T,
        ) -> Result<(), ConfigError> {
            if value >= least && value <= most {
                return Ok(());
            }
            Err(ConfigError::Field {
                field,
                message: format!("{value} is not {least} to {most}"),
            })
        }
        let fault = |field, message: &str| {
            Err(ConfigError::Field {
                field,
                message: message.to_owned(),
            })
        };
        range("database.pool_size", self.database.pool_size, 1, 100)?;
        range(
            "database.step_timeout_ms",
            self.database.step_timeout_ms,
            100,
            600_000,
        )?;
        range(
            "database.clock_difference_max_ms",
            self.database.clock_difference_max_ms,
            1_000,
            3_155_760_000_000,
        )?;
        range(
            "queue.journal.bytes_max",
            self.queue.journal.bytes_max,
            1 << 20,
            1 << 40,
        )?;
        range(
            "queue.journal.lease_ms",
            self.queue.journal.lease_ms,
            1_000,
            86_400_000,
        )?;
        range("data_plane.threads", self.data_plane.threads, 0, 256)?;
        range(
            "data_plane.connections_max",
            self.data_plane.connections_max,
            1,
            1_000_000,
        )?;
        range(
            "data_plane.head_bytes_max",
            self.data_plane.head_bytes_max,
            1_024,
            1_048_576,
        )?;
        range(
            "data_plane.body_bytes_max",
            self.data_plane.body_bytes_max,
            1_024,
            1_048_576,
        )?;
        // The least holds a batch and the largest callback in their shares.
        range(
            "data_plane.body_bytes_total_max",
            self.data_plane.body_bytes_total_max,
            8 << 20,
            1 << 40,
        )?;
        range(
            "data_plane.request_timeout_ms",
            self.data_plane.request_timeout_ms,
            100,
            600_000,
        )?;
        range(
            "data_plane.idle_timeout_ms",
            self.data_plane.idle_timeout_ms,
            100,
            3_600_000,
        )?;
        range(
            "control_plane.audit_timeout_ms",
            self.control_plane.audit_timeout_ms,
            1_000,
            86_400_000,
        )?;
        range("queue.capacity", self.queue.capacity, 1, 10_000_000)?;
        range("workers.count", self.workers.count, 0, 64)?;
        range(
            "workers.batch_rows_max",
            self.workers.batch_rows_max,
            1,
            100_000,
        )?;
        range("orders.timeout_ms", self.orders.timeout_ms, 50, 600_000)?;
        range(
            "orders.payment_ttl_ms",
            self.orders.payment_ttl_ms,
            1_000,
            31_536_000_000,
        )?;
        range(
            "orders.idempotency_window_ms",
            self.orders.idempotency_window_ms,
            1_000,
            31_536_000_000,
        )?;
        range(
            "orders.remembered_max",
            self.orders.remembered_max,
            1,
            1_000_000_000,
        )?;
        range(
            "orders.sticky_refusals_max",
            self.orders.sticky_refusals_max,
            1,
            100_000_000,
        )?;
        range("payments.orphan_checks", self.payments.orphan_checks, 1, 30)?;
        range(
            "payments.orphan_check_ms",
            self.payments.orphan_check_ms,
            100,
            3_600_000,
        )?;
        payments::check(&self.payments, &self.receipt)?;
        self.check_retention()?;
        log::check(&self.log)?;
        let schema = self.database.schema.as_bytes();
        if schema.is_empty()
            || schema.len() > 63
            || schema[0].is_ascii_digit()
            || !schema
                .iter()
                .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || *b == b'_')
        {
            return fault(
                "database.schema",
                "must be 1 to 63 of a-z, 0-9 and _, not starting with a digit",
            );
        }
        if schema.starts_with(b"pg_") || schema == b"information_schema" {
            return fault(
                "database.schema",
                "is a name that PostgreSQL keeps for itself; take another",
            );
        }
        for (field, tokens) in [
            ("data_plane.token", &self.data_plane.token),
            ("control_plane.token", &self.control_plane.token),
        ] {
            let can_be_sent = |token: &String| token.bytes().all(|byte| byte.is_ascii_graphic());
            if !tokens.0.iter().all(can_be_sent) {
                return fault(
                    field,
                    "must be visible ASCII without spaces: no header field carries another",
                );
            }
        }
        let (data, control) = (self.data_plane.listen, self.control_plane.listen);
        if data.port() != 0 && data == control {
            return fault(
                "control_plane.listen",
                "is the address of data_plane.listen; each plane needs one of its own",
            );
        }
        if self.orders.remembered_max < self.queue.capacity {
            return fault(
                "orders.remembered_max",
                "must be at least queue.capacity: every order in the queue is remembered",
            );
        }
        if !self.data_plane.listen.ip().is_loopback()
            && self.data_plane.token.0.is_empty()
            && !self.data_plane.trust_network
        {
            return fault(
                "data_plane.listen",
                "is not loopback: set data_plane.token, or data_plane.trust_network = true where only the shop's backend can reach it",
            );
        }
        if !self.control_plane.listen.ip().is_loopback() && self.control_plane.token.0.is_empty() {
            return fault(
                "control_plane.listen",
                "is not loopback: set control_plane.token",
            );
        }
        Ok(())
    }
}

impl Config {
    fn check_retention(&self) -> Result<(), ConfigError> {
        let fault = |field, message: String| Err(ConfigError::Field { field, message });
        for (field, days) in [
            ("retention.orders_days", self.retention.orders_days),
            ("retention.events_days", self.retention.events_days),
            ("retention.stock_log_days", self.retention.stock_log_days),
        ] {
            if days > 36_500 {
                return fault(field, format!("{days} is not 0 to 36500"));
            }
        }
        let days = u64::from(self.retention.orders_days);
        let shortest = [
            (
                7 * DAY_MS,
                "7 days, for payments may be delivered that late",
            ),
            (
                self.orders.idempotency_window_ms,
                "orders.idempotency_window_ms",
            ),
            (self.orders.payment_ttl_ms, "orders.payment_ttl_ms"),
        ];
        for (ms, what) in shortest {
            if days > 0 && days * DAY_MS < ms {
                let message = format!("{days} days are shorter than {what}; or set 0: never");
                return fault("retention.orders_days", message);
            }
        }
        Ok(())
    }
}

const DAY_MS: u64 = 86_400_000;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Migrate;

    fn parse(text: &str, env: &[(&str, &str)]) -> Result<Config, ConfigError> {
        let env = env
            .iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        Config::parse(text, "test.toml", env)
    }

    #[test]
    fn nothing_given_is_the_default() {
        assert_eq!(parse("", &[]).unwrap(), Config::default());
    }

    #[test]
    fn the_environment_overrides_the_file_by_type() {
        let config = parse(
            "[queue]\ncapacity = 5\n[data_plane]\ntoken = [\"a\", \"b\"]",
            &[
                ("MILLRACE_QUEUE__CAPACITY", "7"),
                ("MILLRACE_CONTROL_PLANE__TOKEN", "00123"),
                ("MILLRACE_DATA_PLANE__TRUST_NETWORK", "true"),
                ("MILLRACE_DATABASE__MIGRATE", "never"),
                ("MILLRACE_DATA_DIR", "/x"),
            ],
        )
        .unwrap();
        assert_eq!(config.queue.capacity, 7);
        assert_eq!(config.control_plane.token.0, ["00123"]);
        assert_eq!(config.data_plane.token.0, ["a", "b"]);
        assert!(config.data_plane.trust_network);
        assert_eq!(config.database.migrate, Migrate::Never);
        assert_eq!(config.data_dir, PathBuf::from("/x"));
    }

    #[test]
    fn rates_are_read_by_count_and_unit() {
        let config = parse(
            "[rate_limit]\nper_user = \"5/s\"",
            &[("MILLRACE_RATE_LIMIT__OVERALL", "100/min")],
        )
        .unwrap();
        assert_eq!(String::from(config.rate_limit.per_user), "5/s");
        assert_eq!(String::from(config.rate_limit.overall), "100/min");
        for bad in ["5", "0/s", "5/h", "-1/s"] {
            let text = format!("[rate_limit]\nper_user = \"{bad}\"");
            assert!(
                parse(&text, &[]).unwrap_err().to_string().contains("rate"),
                "{bad}"
            );
        }
    }

    #[test]
    fn a_secret_is_read_from_its_file_and_never_shown() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("token");
        std::fs::write(&file, "s3cret\n").unwrap();
        let config = parse(
            "",
            &[("MILLRACE_DATA_PLANE__TOKEN_FILE", file.to_str().unwrap())],
        )
        .unwrap();
        assert_eq!(config.data_plane.token.0, ["s3cret"]);
        assert!(!format!("{config:?}").contains("s3cret"));
        assert!(!config.to_toml().contains("s3cret"));
    }

    #[test]
    fn secrets_about_money_come_from_files_and_are_never_shown() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("secret");
        let secret = "s3cret-s3cret-s3cret-s3cret-s3cr";
        std::fs::write(&file, format!("{secret}\n")).unwrap();
        let file = file.to_str().unwrap();
        let config = parse(
            "[payments.wechatpay]\nmchid = \"m\"\nappid = \"a\"\npublic_keys.PUB_KEY_ID_1 = \"old\"",
            &[
                ("MILLRACE_PAYMENTS__STANDARD__SECRET_FILE", file),
                ("MILLRACE_PAYMENTS__STRIPE__SECRET_FILE", file),
                ("MILLRACE_PAYMENTS__WECHATPAY__APIV3_KEY_FILE", file),
                ("MILLRACE_PAYMENTS__WECHATPAY__PUBLIC_KEYS__PUB_KEY_ID_1_FILE", file),
                ("MILLRACE_PAYMENTS__WECHATPAY__PUBLIC_KEYS__5F2A", "pem"),
                ("MILLRACE_RECEIPT__KEY_FILE", file),
            ],
        )
        .unwrap();
        assert_eq!(config.payments.standard.secret.0, [secret]);
        assert_eq!(config.payments.stripe.secret.0, [secret]);
        assert_eq!(config.receipt.key.0, [secret]);
        let mut wechatpay = config.payments.wechatpay.clone();
        assert_eq!(wechatpay.apiv3_key.0, secret);
        let keys = std::mem::take(&mut wechatpay.public_keys);
        let keys: Vec<_> = keys.iter().map(|(a, b)| (a.as_str(), b.as_str())).collect();
        assert_eq!(keys, [("5f2a", "pem"), ("pub_key_id_1", secret)]);
        // A public key may be seen.
        let mut shown = config;
        shown.payments.wechatpay.public_keys.clear();
        assert!(!format!("{shown:?}").contains(secret));
        assert!(!shown.to_toml().contains(secret));
    }

    #[test]
    fn half_a_provider_is_a_mistake() {
        let key = "k".repeat(32);
        for (text, field) in [
            (
                "[payments.alipay]\napp_id = \"1\"",
                "payments.alipay.public_key",
            ),
            (
                "[payments.alipay]\npublic_key = \"1\"",
                "payments.alipay.app_id",
            ),
            (
                "[payments.alipay]\nseller_id = \"1\"",
                "payments.alipay.app_id",
            ),
            (
                "[payments.wechatpay]\nmchid = \"1\"",
                "payments.wechatpay.appid",
            ),
            (
                "[payments.wechatpay]\nappid = \"1\"",
                "payments.wechatpay.mchid",
            ),
            (
                "[payments.wechatpay.public_keys]\n1 = \"1\"",
                "payments.wechatpay.mchid",
            ),
            (
                "[payments.wechatpay]\nmchid = \"1\"\nappid = \"1\"\napiv3_key = \"short\"",
                "payments.wechatpay.apiv3_key",
            ),
            (
                &format!(
                    "[payments.wechatpay]\nmchid = \"1\"\nappid = \"1\"\napiv3_key = \"{key}\""
                ),
                "payments.wechatpay.public_keys",
            ),
            (
                &format!(
                    "[payments.wechatpay]\nmchid = \"1\"\nappid = \"1\"\napiv3_key = \"{key}\"\n\
                          public_keys.a = \"1\"\npublic_keys.A = \"2\""
                ),
                "has A twice",
            ),
            (
                "[receipt]\nkey = [\"0123456789abcdef\", \"short\"]",
                "receipt.key",
            ),
        ] {
            let message = parse(text, &[]).unwrap_err().to_string();
            assert!(message.contains(field), "{text}: {message}");
        }
    }

    #[test]
    fn mistakes_are_named() {
        let message = |text: &str, env: &[(&str, &str)]| parse(text, env).unwrap_err().to_string();
        assert!(message("[queue]\ncapasity = 5", &[]).contains("capasity"));
        assert!(message("queue = 5", &[]).contains("test.toml"));
        assert!(message("", &[("MILLRACE_QUEUE__CAPASITY", "5")]).contains("queue.capasity"));
        assert!(message("", &[("MILLRACE_QUEUE__CAPACITY", "five")]).contains("whole number"));
        assert!(message("[queue]\ncapacity = 0", &[]).contains("queue.capacity"));
        for (text, why) in [
            ("[retention]\norders_days = 6", "7 days"),
            ("[retention]\nevents_days = 40000", "retention.events_days"),
            (
                "[retention]\norders_days = 30\n[orders]\nidempotency_window_ms = 3000000000",
                "idempotency_window_ms",
            ),
        ] {
            assert!(message(text, &[]).contains(why), "{text}");
        }
        for schema in ["a;b", "", "1a", "A", "pg_shop", "pg_", "information_schema"] {
            let text = format!("[database]\nschema = \"{schema}\"");
            assert!(message(&text, &[]).contains("database.schema"), "{schema}");
        }
        for word in ["user", "order", "select", "public"] {
            let text = format!("[database]\nschema = \"{word}\"");
            assert!(parse(&text, &[]).is_ok(), "{word}");
        }
        assert!(
            message("[control_plane]\nlisten = \"127.0.0.1:8080\"", &[])
                .contains("control_plane.listen")
        );
        assert!(message("[data_plane]\nlisten = \"0.0.0.0:80\"", &[]).contains("trust_network"));
        assert!(
            message("[control_plane]\nlisten = \"0.0.0.0:80\"", &[])
                .contains("control_plane.token")
        );
    }
}
