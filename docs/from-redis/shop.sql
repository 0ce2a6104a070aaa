CREATE TABLE sku (sku text PRIMARY KEY, total int NOT NULL, sold int NOT NULL DEFAULT 0 CHECK (sold <= total));
CREATE TABLE orders (id bigint PRIMARY KEY, user_id text NOT NULL, sku text NOT NULL REFERENCES sku,
  status text NOT NULL DEFAULT 'unpaid', created_at timestamptz NOT NULL DEFAULT now());
CREATE UNIQUE INDEX one_each ON orders (user_id, sku) WHERE status <> 'expired';
