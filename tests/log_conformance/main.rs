//! The order log's clients on real servers: one suite, whose properties hold for every broker, and the settings and
//! replicas that each of them has for itself. A broker that cannot be had here is said not to have been run.
//!
//! | file | property |
//! |---|---|
//! | `order` | frames come back in their order, byte for byte; repeats; reading anywhere; forgetting |
//! | `log` | groups of the order log, on every broker and on the journal |
//! | `writers` | a later process fences this one, paused or not |
//! | `cuts` | a connection that breaks at any byte: nothing is said that is not so |
//! | `outages` | full, killed, away, back without its data or a part of it |
//! | `settings` | settings of the server that break the promise, credentials, TLS |
//! | `replicas` | replicas that are missing, lag or take over |
//!
//! Tests that harm nothing share one server of each kind; those that do take turns on a second one, which is behind a
//! proxy. `MILLRACE_CUTS=N` tries N times as many places to cut.

#[path = "../support/mod.rs"]
mod support;

/// The same property for each broker: `calm` on the server that nobody harms, `rough` on the one behind a proxy.
macro_rules! on_each_broker {
    ($($server:ident: $($property:ident),+;)+) => { $($(
        mod $property {
            #[test]
            fn redis() {
                $crate::bed::$server($crate::support::brokers::Kind::Redis, super::$property);
            }

            #[test]
            fn kafka() {
                $crate::bed::$server($crate::support::brokers::Kind::Kafka, super::$property);
            }

            #[test]
            fn rocketmq() {
                $crate::bed::$server($crate::support::brokers::Kind::RocketMq, super::$property);
            }
        }
    )+)+ };
}

mod bed;
mod cuts;
mod log;
mod order;
mod outages;
mod replicas;
mod settings;
mod writers;
