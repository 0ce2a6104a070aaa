-- A waiting order is a row with status 7 that holds no units. It has no time to pay yet: `expires_at` is
-- 9999-01-01, and stays so if the order ends while it waits (3 or 4). Assignment makes it an ordinary unpaid
-- order (1) with a time to pay.
ALTER TABLE orders
    -- When units were assigned to a waiting order; NULL for every other order.
    ADD COLUMN assigned_at timestamptz;

-- Terms of a SKU's waiting list; NULL is the default.
ALTER TABLE sku
    ADD COLUMN waitlist_max            bigint CHECK (waitlist_max BETWEEN 0 AND 10000000),
    ADD COLUMN waitlist_skips          boolean NOT NULL DEFAULT false,
    ADD COLUMN waitlist_payment_ttl_ms bigint CHECK (waitlist_payment_ttl_ms > 0),
    -- Two times of day with their offsets, as in 09:00+08:00/22:00+08:00.
    ADD COLUMN assign_between          text,
    -- Orders assigned before this moment may have been served out of order, because the list skipped then.
    -- NULL: it never did; infinity: it does now.
    ADD COLUMN waitlist_strict_since   timestamptz;

CREATE OR REPLACE VIEW order_rows AS
SELECT o.order_id, o.user_id, s.sku_id, o.sku, o.quantity, o.adjustment, o.amount, o.currency,
       CASE o.status
           WHEN 1 THEN 'pending_payment'
           WHEN 2 THEN 'paid'
           WHEN 3 THEN 'cancelled'
           WHEN 4 THEN 'expired'
           WHEN 5 THEN 'refund_due'
           WHEN 6 THEN 'refunded'
           WHEN 7 THEN 'waitlisted'
       END AS status,
       o.created_at, o.expires_at, o.attributes::text AS attributes, o.refund_reason, o.key_hash, o.payload_hash,
       o.assigned_at
  FROM orders o JOIN sku s ON s.id = o.sku
UNION ALL
SELECT d.order_id, d.user_id, s.sku_id, d.sku, d.quantity, d.adjustment, d.amount, d.currency,
       CASE d.status WHEN 5 THEN 'refund_due' WHEN 6 THEN 'refunded' ELSE 'failed' END,
       d.created_at, d.expires_at, d.attributes, d.refund_reason, d.key_hash, d.payload_hash, NULL
  FROM dead_letters d JOIN sku s ON s.id = d.sku
UNION ALL
SELECT p.order_id, p.user_id, s.sku_id, p.sku, p.quantity, p.adjustment, p.amount, p.currency,
       'accepted', p.created_at, p.expires_at, p.attributes::text, NULL, p.key_hash, p.payload_hash, NULL
  FROM parked_orders p JOIN sku s ON s.id = p.sku;

CREATE OR REPLACE VIEW order_list AS
SELECT order_id, user_id, sku_id, quantity, adjustment, amount, currency,
       CASE WHEN status = 'pending_payment' AND expires_at <= now() THEN 'expired' ELSE status END AS status,
       created_at, nullif(expires_at, '9999-01-01 00:00:00+00') AS expires_at, attributes, refund_reason,
       assigned_at
  FROM order_rows;
