//! An open-loop load generator that speaks only HTTP.
