-- The identity of this database: random, so that one that was lost and made anew, or another shop's,
-- has another. Receipts of orders are bound to it.
CREATE TABLE database_identity (
    only_row             boolean PRIMARY KEY DEFAULT true CHECK (only_row),
    id                   uuid NOT NULL,
    -- Receipts of version 1 name no database. They are taken for orders whose id was given out
    -- before this moment: the first start of a release that signs version 2. A database that such a
    -- release has made has none (0); NULL until that start.
    receipts_1_until_ms  bigint
);
INSERT INTO database_identity (id, receipts_1_until_ms)
SELECT gen_random_uuid(), CASE WHEN EXISTS (SELECT FROM node) THEN NULL ELSE 0 END;

-- How long the process that renewed `lease_until` may acknowledge orders after each renewal.
ALTER TABLE node ADD COLUMN lease_ms bigint;
