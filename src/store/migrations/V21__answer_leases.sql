-- Milliseconds for which the process on this row may answer from its memory after a contact. Whoever takes it over waits that
-- long, if its own is not longer.
ALTER TABLE node ADD COLUMN answer_lease_ms bigint NOT NULL DEFAULT 0 CHECK (answer_lease_ms >= 0);
