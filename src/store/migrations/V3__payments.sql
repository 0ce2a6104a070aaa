-- Every message of a payment provider whose signature was right, as it came: the evidence.
CREATE TABLE payment_events (
    id           bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    received_at  timestamptz NOT NULL,
    provider     text NOT NULL,
    event_id     text NOT NULL,
    kind         text NOT NULL,
    body         bytea NOT NULL,
    -- The payment that it reports; a message about something else has none.
    payment_id   text,
    UNIQUE (provider, event_id)
);

-- One row a payment, however many messages report it. It is in exactly one state, so money in is
-- matched + orphan + refund due + refunded by construction (promise I7).
CREATE TABLE payments (
    id             bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    received_at    timestamptz NOT NULL,
    provider       text NOT NULL,
    payment_id     text NOT NULL,
    -- The order as the provider named it, and its id where it can be one of ours.
    order_ref      text NOT NULL,
    order_id       bigint,
    amount         bigint NOT NULL,
    currency       text NOT NULL,
    receipt        text,
    state          text NOT NULL CHECK (state IN ('orphan', 'matched', 'refund_due', 'refunded')),
    refund_reason  text,
    changed_at     timestamptz NOT NULL,
    -- Of an orphan: how often its order was looked for, and when it is looked for again.
    checks         integer NOT NULL DEFAULT 0,
    check_at       timestamptz NOT NULL,
    -- What a person noted: the provider's reference of the refund, and words.
    reference      text,
    note           text,
    UNIQUE (provider, payment_id),
    CONSTRAINT payments_refund_has_a_reason CHECK (state <> 'refund_due' OR refund_reason IS NOT NULL),
    CONSTRAINT payments_match_has_an_order CHECK (state <> 'matched' OR order_id IS NOT NULL)
) WITH (fillfactor = 70);
CREATE INDEX payments_order ON payments (order_id);
CREATE INDEX payments_open ON payments (state, check_at) WHERE state IN ('orphan', 'refund_due');
-- Promise I7, the second guard: whatever memory believes, an order is paid by one payment.
CREATE UNIQUE INDEX payments_matched ON payments (order_id) WHERE state = 'matched';

ALTER TABLE orders ADD COLUMN refund_reason text;
-- A refused order that was paid all the same: 5 refund due, 6 refunded; NULL: failed.
ALTER TABLE dead_letters ADD COLUMN status smallint, ADD COLUMN refund_reason text;

-- No unpaid order lies below it that is older than the idempotency window: where a start begins to
-- look for orders that are to expire.
ALTER TABLE node ADD COLUMN unpaid_from bigint NOT NULL DEFAULT 0;

-- Every order as it stands, for Millrace itself. An unpaid order that is past its time and not yet
-- moved is `pending_payment` here; whether it is due is judged by Millrace's own clock.
CREATE VIEW order_rows AS
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
  FROM dead_letters d JOIN sku s ON s.id = d.sku;

-- The same for everybody: who reads it is never shown an order as payable that is past its time.
CREATE OR REPLACE VIEW order_list AS
SELECT order_id, user_id, sku_id, quantity, adjustment, amount, currency,
       CASE WHEN status = 'pending_payment' AND expires_at <= now() THEN 'expired' ELSE status END AS status,
       created_at, expires_at, attributes, refund_reason
  FROM order_rows;

CREATE VIEW payment_list AS
SELECT id, provider, payment_id, order_ref, order_id, amount, currency, state, refund_reason, received_at,
       changed_at, reference, note
  FROM payments;
CREATE VIEW orphan_payments AS
SELECT id, provider, payment_id, order_ref, order_id, amount, currency, receipt, received_at, checks, check_at
  FROM payments WHERE state = 'orphan';
