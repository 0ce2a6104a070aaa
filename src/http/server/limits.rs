//! The bounds of a server, and the targets whose bodies may be larger.

use std::time::Duration;

/// The bounds of a server.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Connections at a time. When it is reached, the oldest one with an incomplete request, or
    /// else the longest idle one, makes room; when all are being served, a new one gets `503`.
    pub connections_max: usize,
    /// Bytes of a request line and its header fields; beyond, `431`.
    pub head_bytes_max: usize,
    /// Bytes of one request body; beyond, `413`.
    pub bodies: BodyLimits,
    /// Bytes of bodies over all connections, a quarter of them for [`BodyRule::is_anonymous`]
    /// targets; beyond, `503`. A body that fits the least buffer of a connection is not counted.
    pub body_bytes_total_max: usize,
    /// From the first byte of a request to its last, and for the client to take an answer.
    pub request_timeout: Duration,
    /// Between requests.
    pub idle_timeout: Duration,
}

impl Default for Limits {
    /// The defaults of the configuration reference, without any [`BodyRule`].
    fn default() -> Self {
        Self {
            connections_max: 20_000,
            head_bytes_max: 16 * 1024,
            bodies: BodyLimits {
                bytes_max: 16 * 1024,
                rules: &[],
            },
            body_bytes_total_max: 256 * 1024 * 1024,
            request_timeout: Duration::from_secs(10),
            idle_timeout: Duration::from_secs(60),
        }
    }
}

/// The longest body of a request, by its target.
#[derive(Clone, Copy, Debug)]
pub struct BodyLimits {
    /// Bytes of the body of a request that no rule is about.
    pub bytes_max: usize,
    /// The targets with a limit of their own. The first rule that matches applies.
    pub rules: &'static [BodyRule],
}

impl BodyLimits {
    /// The longest body, in bytes, of a request to `target`.
    pub fn bytes_max(&self, target: &str) -> usize {
        let least = self.rule(target).map_or(0, |rule| rule.bytes_max_least);
        self.bytes_max.max(least)
    }

    /// Whether `target` is open to senders without a token.
    pub fn is_anonymous(&self, target: &str) -> bool {
        self.rule(target).is_some_and(|rule| rule.is_anonymous)
    }

    fn rule(&self, target: &str) -> Option<&BodyRule> {
        self.rules.iter().find(|rule| rule.targets.contain(target))
    }
}

/// Targets whose bodies may be larger, or are counted apart.
#[derive(Clone, Copy, Debug)]
pub struct BodyRule {
    /// The targets that it is about.
    pub targets: Targets,
    /// Bytes that a body may have even if [`BodyLimits::bytes_max`] is less.
    pub bytes_max_least: usize,
    /// Whether anybody may send these bodies. They have a share of
    /// [`Limits::body_bytes_total_max`] apart, so that strangers cannot use up the share of
    /// authenticated clients.
    pub is_anonymous: bool,
}

/// A set of request targets in origin form.
#[derive(Clone, Copy, Debug)]
pub enum Targets {
    /// This path, without a query.
    Exactly(&'static str),
    /// Every target that begins with this path.
    Below(&'static str),
}

impl Targets {
    fn contain(self, target: &str) -> bool {
        match self {
            Targets::Exactly(path) => target == path,
            Targets::Below(path) => target.starts_with(path),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rule_raises_the_limit_of_its_targets_and_lowers_none() {
        const RULES: &[BodyRule] = &[
            BodyRule {
                targets: Targets::Exactly("/batch"),
                bytes_max_least: 1_000,
                is_anonymous: false,
            },
            BodyRule {
                targets: Targets::Below("/notify/"),
                bytes_max_least: 500,
                is_anonymous: true,
            },
        ];
        let limits = |bytes_max| BodyLimits {
            bytes_max,
            rules: RULES,
        };
        for (target, bytes_max, expected) in [
            ("/batch", 100, 1_000),
            ("/batch?x", 100, 100),
            ("/batches", 100, 100),
            ("/notify/a?b", 100, 500),
            ("/notify", 100, 100),
            ("/notify/a", 600, 600),
            ("/", 600, 600),
        ] {
            assert_eq!(limits(bytes_max).bytes_max(target), expected, "{target}");
            let is_anonymous = limits(bytes_max).is_anonymous(target);
            assert_eq!(is_anonymous, target.starts_with("/notify/"), "{target}");
        }
    }
}
