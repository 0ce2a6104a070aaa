//! Rows in PostgreSQL. SQL lives nowhere else.
