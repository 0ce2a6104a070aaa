//! An operator's changes and checks.
//!
//! * [`operator`]: SKUs, stock, dead letters; `limits`: loads the live orders that a new purchase limit counts;
//!   `lost_answers`: resolves changes whose COMMIT is in doubt; `changes`: applies stored changes to memory;
//!   `draws`: terms and beacons of draws;
//! * [`pauses`]: pausing a SKU or the sale in an emergency;
//! * [`audit`]: compares memory and database; [`pruning`]: deletes rows past their retention;
//! * [`preflight`]: tells whether database and order log will hold a sale.

pub mod audit;
pub(in crate::pipeline) mod changes;
mod draws;
pub(in crate::pipeline) mod limits;
pub(in crate::pipeline) mod lost_answers;
pub mod open_letters;
pub mod operator;
pub mod pauses;
pub mod preflight;
pub mod pruning;
