-- The entries of the stock log that name one order, for its history. Entries of batches, which name none, are not in it,
-- so that a batch costs what it did.
CREATE INDEX stock_log_order ON stock_log (reference) WHERE reference ~ '^[0-9]+$';
