-- Acknowledged orders of SKUs whose counters the database refuses. They wait here until somebody has
-- mended the row in `sku`, so that the journal need not keep them. Their units are held in memory and
-- are not part of `sku.held`.
CREATE TABLE parked_orders (
    order_id     bigint PRIMARY KEY,
    parked_at    timestamptz NOT NULL DEFAULT clock_timestamp(),
    user_id      text NOT NULL,
    sku          integer NOT NULL,
    quantity     integer NOT NULL,
    adjustment   bigint NOT NULL,
    amount       bigint NOT NULL,
    currency     text NOT NULL,
    created_at   timestamptz NOT NULL,
    expires_at   timestamptz NOT NULL,
    key_hash     uuid,
    payload_hash bigint NOT NULL,
    attributes   json
);
CREATE INDEX parked_orders_sku ON parked_orders (sku, order_id);
CREATE INDEX parked_orders_expires_at ON parked_orders (expires_at, order_id);

CREATE OR REPLACE VIEW order_rows AS
SELECT o.order_id, o.user_id, s.sku_id, o.sku, o.quantity, o.adjustment, o.amount, o.currency,
       CASE o.status
           WHEN 1 THEN 'pending_payment'
           WHEN 2 THEN 'paid'
           WHEN 3 THEN 'cancelled'
           WHEN 4 THEN 'expired'
           WHEN 5 THEN 'refund_due'
           WHEN 6 THEN 'refunded'
       END AS status,
       o.created_at, o.expires_at, o.attributes::text AS attributes, o.refund_reason, o.key_hash, o.payload_hash
  FROM orders o JOIN sku s ON s.id = o.sku
UNION ALL
SELECT d.order_id, d.user_id, s.sku_id, d.sku, d.quantity, d.adjustment, d.amount, d.currency,
       CASE d.status WHEN 5 THEN 'refund_due' WHEN 6 THEN 'refunded' ELSE 'failed' END,
       d.created_at, d.expires_at, d.attributes, d.refund_reason, d.key_hash, d.payload_hash
  FROM dead_letters d JOIN sku s ON s.id = d.sku
UNION ALL
SELECT p.order_id, p.user_id, s.sku_id, p.sku, p.quantity, p.adjustment, p.amount, p.currency,
       'accepted', p.created_at, p.expires_at, p.attributes::text, NULL, p.key_hash, p.payload_hash
  FROM parked_orders p JOIN sku s ON s.id = p.sku;
