-- No order of a SKU is older than the SKU: where its orders are read, this says where to begin.
-- Unknown for those that are there already.
ALTER TABLE sku ADD COLUMN created_at timestamptz;
ALTER TABLE sku ALTER COLUMN created_at SET DEFAULT clock_timestamp();
