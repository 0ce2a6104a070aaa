//! The checks of the sale after the rush: every answer and every payment against the database.

pub mod orders;
mod payments;

use super::CURRENCY;
