//! Rows in PostgreSQL. SQL lives nowhere else.

pub mod embedded;
