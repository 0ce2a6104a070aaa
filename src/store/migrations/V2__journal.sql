-- The journal that may hold acknowledged orders which are not rows yet. While it is in use, no
-- process without it may sell what its orders hold.
ALTER TABLE node
    ADD COLUMN journal_id     uuid,
    ADD COLUMN journal_in_use boolean NOT NULL DEFAULT false,
    -- By the database's clock: until then the process that renewed it may acknowledge orders.
    ADD COLUMN lease_until    timestamptz;
