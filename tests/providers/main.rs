//! The providers' half of a payment callback. `vectors` holds it against what the providers' own
//! SDKs signed and judged, `conformance` asks the same of all four, `answers` and `keys` look at
//! what is said and at what it is configured with.

mod answers;
mod conformance;
mod fixture;
mod keys;
mod vectors;
