//! Payments and what they do to orders, on a whole Millrace with a real PostgreSQL: callbacks that
//! come early, late, twice or for an order that nobody has.

#[path = "../support/mod.rs"]
mod support;

mod fixture;
mod identity;
mod life;
mod moments;
mod orphans;
mod races;
mod worklist;
