-- The entries of a node's share, newest last. A single node's entries have no node and are not in it.
CREATE INDEX stock_log_of_a_share ON stock_log (sku, node, id) WHERE node IS NOT NULL;

-- Changes of SKUs' terms, totals and pauses by operators, numbered in the order of their commits; and the last one that
-- a node has taken over.
ALTER TABLE database_identity ADD COLUMN terms bigint NOT NULL DEFAULT 0;
ALTER TABLE node ADD COLUMN terms_seen bigint NOT NULL DEFAULT 0;

-- Sums over the life of a row, so that a node learns what became of a transaction whose answer was lost, whatever else has
-- moved `lent` meanwhile.
ALTER TABLE stock_share
    -- Units lent by the pool, less those given back to it.
    ADD COLUMN borrowed bigint NOT NULL DEFAULT 0,
    -- Sold units moved to `sku` by the node's lending.
    ADD COLUMN swept bigint NOT NULL DEFAULT 0;
