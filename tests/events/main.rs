//! Events, on a whole Millrace with a real PostgreSQL: each committed change is heard, none is invented, the order of an
//! order is kept, and no sink holds up the others.

#[path = "../support/mod.rs"]
mod support;

mod brokers;
mod changes;
mod crashes;
mod nodes;
mod numbers;
mod receiver;
mod refill;
mod webhook;
