//! Loads a checked [`Config`] from a file and the environment.

use std::path::{Path, PathBuf};

use super::{Config, ConfigError, DEFAULT_FILE, check, cluster, environment};

impl Config {
    /// Reads the file (`file`, else [`DEFAULT_FILE`] if it exists), overlays the environment and
    /// checks the result.
    ///
    /// # Errors
    /// [`ConfigError`] with the source and the remedy.
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

    /// Same as [`Config::load`], from texts: TOML, its name in messages, and environment variables.
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
        // Parsed once on its own, so that a mistake in the file is shown with its line.
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
        check::check(&config)?;
        Ok(config)
    }

    /// The configuration as TOML, without secrets.
    pub fn to_toml(&self) -> String {
        let mut shown = self.clone();
        for sink in shown.events.sinks.values_mut() {
            hide(sink.secret.0.iter_mut());
            // An address may have a password in it.
            hide([&mut sink.url].into_iter().filter(|url| url.contains('@')));
        }
        let lists = [
            &mut shown.data_plane.token,
            &mut shown.control_plane.token,
            &mut shown.payments.standard.secret,
            &mut shown.payments.stripe.secret,
            &mut shown.receipt.key,
        ];
        let texts = [
            &mut shown.database.url,
            &mut shown.events.database_url,
            &mut shown.queue.redis.url,
            &mut shown.queue.kafka.sasl_password.0,
            &mut shown.queue.rocketmq.secret_key.0,
            &mut shown.cluster.secret.0,
            &mut shown.payments.wechatpay.apiv3_key.0,
        ];
        hide(lists.into_iter().flat_map(|list| &mut list.0).chain(texts));
        toml::to_string_pretty(&shown).unwrap_or_default()
    }

    /// Number of workers to run.
    pub fn worker_count(&self) -> usize {
        match self.workers.count {
            0 => std::thread::available_parallelism()
                .map_or(2, usize::from)
                .clamp(2, 8),
            count => count,
        }
    }

    /// The key of the stream in Redis that is a node's order log.
    pub fn redis_stream(&self, node: u8) -> String {
        match self.queue.redis.stream.as_str() {
            "" => format!("millrace:{}:{node}", self.database.schema),
            stream => stream.replace(cluster::NODE, &node.to_string()),
        }
    }

    /// The order log's topic in Kafka.
    pub fn kafka_topic(&self) -> String {
        self.topic(&self.queue.kafka.topic)
    }

    /// The order log's topic in RocketMQ.
    pub fn rocketmq_topic(&self) -> String {
        self.topic(&self.queue.rocketmq.topic)
    }

    fn topic(&self, configured: &str) -> String {
        match configured {
            "" => format!("millrace-{}", self.database.schema),
            topic => topic.to_owned(),
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
}

/// Hides the texts that are not empty.
fn hide<'a>(texts: impl Iterator<Item = &'a mut String>) {
    texts
        .filter(|text| !text.is_empty())
        .for_each(|text| *text = "(hidden)".into());
}

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
        // A public key is not secret.
        let mut shown = config;
        shown.payments.wechatpay.public_keys.clear();
        assert!(!format!("{shown:?}").contains(secret));
        assert!(!shown.to_toml().contains(secret));
    }

    #[test]
    fn a_sink_comes_from_the_environment_and_its_secret_is_never_shown() {
        let config = parse(
            "[events.sinks.erp]\nurl = \"https://erp.example\"\nsecret = [\"s3cret1\", \"s3cret2\"]",
            &[
                ("MILLRACE_EVENTS__SINKS__SHOP__URL", "https://me:s3cret3@shop.example"),
                ("MILLRACE_EVENTS__SINKS__SHOP__SECRET", "s3cret4"),
                ("MILLRACE_EVENTS__SINKS__SHOP__IN_FLIGHT_MAX", "4"),
                ("MILLRACE_EVENTS__INCLUDE", "receipt"),
            ],
        )
        .unwrap();
        assert_eq!(config.events.sinks.len(), 2);
        assert_eq!(config.events.sinks["shop"].in_flight_max, 4);
        assert_eq!(config.events.sinks["erp"].secret.0.len(), 2);
        assert_eq!(config.events.include, [crate::config::EventMember::Receipt]);
        assert!(!config.to_toml().contains("s3cret"), "{}", config.to_toml());
        for (text, why) in [
            ("[events.sinks.a_b]\nurl = \"u\"\nsecret = \"s\"", "a to z"),
            ("[events.sinks.a]\nsecret = \"s\"", "url"),
            ("[events.sinks.a]\nurl = \"u\"", "secret is missing"),
            (
                "[payments.standard]\nsecret = \"whsec_c2VjcmV0\"\n[events.sinks.a]\nurl = \"u\"\nsecret = \"c2VjcmV0\"",
                "make another one",
            ),
            (
                "[events.sinks.a]\nurl = \"u\"\nsecret = \"s\"\nin_flight_max = 0",
                "in_flight_max",
            ),
            (
                "[events.sinks.a]\nurl = \"u\"\nsecret = \"s\"\nurls = \"\"",
                "urls",
            ),
        ] {
            let message = parse(text, &[]).unwrap_err().to_string();
            assert!(message.contains(why), "{text}: {message}");
        }
        let unknown = parse("", &[("MILLRACE_EVENTS__SINKS__SHOP__URLS", "u")]);
        assert!(
            unknown
                .unwrap_err()
                .to_string()
                .contains("no configuration field")
        );
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
