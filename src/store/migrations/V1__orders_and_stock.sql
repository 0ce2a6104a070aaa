-- Every name is unqualified: the schema is chosen by the session's search_path.

-- The process that writes here, and how far ahead it may give out order ids. Its epoch rises
-- with each start; whoever holds an older one can no longer write.
CREATE TABLE node (
    node                 smallint PRIMARY KEY CHECK (node BETWEEN 0 AND 63),
    epoch                bigint NOT NULL,
    ids_leased_until_ms  bigint NOT NULL,
    started_at           timestamptz NOT NULL,
    -- Set while an operator has paused every sale; kept over restarts.
    paused               boolean NOT NULL DEFAULT false
);

-- One row a worker. Each batch moves `batch` by one in its own transaction, which makes this row
-- three things: the proof whether a commit of unknown outcome happened, the lock that shows an
-- old writer to be gone, and the fence against a process of an older epoch.
CREATE TABLE writer (
    node   smallint NOT NULL REFERENCES node,
    shard  smallint NOT NULL,
    epoch  bigint NOT NULL,
    batch  bigint NOT NULL DEFAULT 0,
    PRIMARY KEY (node, shard)
) WITH (fillfactor = 10);

CREATE TABLE sku (
    id              integer GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    sku_id          text NOT NULL UNIQUE,
    title           text NOT NULL,
    unit_price      bigint NOT NULL CHECK (unit_price >= 0),
    currency        text NOT NULL CHECK (currency ~ '^[A-Z]{3}$'),
    total           bigint NOT NULL CHECK (total BETWEEN 0 AND 4294967295),
    held            bigint NOT NULL DEFAULT 0,
    sold            bigint NOT NULL DEFAULT 0,
    per_user_limit  bigint CHECK (per_user_limit BETWEEN 1 AND 4294967295),
    opens_at        timestamptz,
    closes_at       timestamptz,
    paused          boolean NOT NULL DEFAULT false,
    -- Promise I1, the second guard: whatever memory believes, this refuses to oversell.
    CONSTRAINT sku_not_oversold CHECK (held >= 0 AND sold >= 0 AND held + sold <= total)
) WITH (fillfactor = 50);

-- The hot table. Its time-ordered key is its only index: one more on a random value costs COPY
-- more than half its rate.
CREATE TABLE orders (
    order_id     bigint PRIMARY KEY,
    user_id      text NOT NULL,
    sku          integer NOT NULL,
    quantity     integer NOT NULL,
    adjustment   bigint NOT NULL,
    amount       bigint NOT NULL,
    currency     text NOT NULL,
    status       smallint NOT NULL,
    created_at   timestamptz NOT NULL,
    expires_at   timestamptz NOT NULL,
    key_hash     uuid,
    payload_hash bigint NOT NULL,
    attributes   json
) WITH (fillfactor = 90);

-- Every change of a counter with its cause. The `_after` columns are NOT NULL on purpose: a
-- change to a SKU that does not exist fails here, and its transaction with it.
CREATE TABLE stock_journal (
    id           bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    at           timestamptz NOT NULL DEFAULT clock_timestamp(),
    sku          integer NOT NULL,
    cause        text NOT NULL,
    reference    text NOT NULL,
    total_delta  bigint NOT NULL DEFAULT 0,
    held_delta   bigint NOT NULL DEFAULT 0,
    sold_delta   bigint NOT NULL DEFAULT 0,
    total_after  bigint NOT NULL,
    held_after   bigint NOT NULL,
    sold_after   bigint NOT NULL,
    -- The Idempotency-Key of an operator's request, so that it is carried out once, over restarts.
    request_key  text
);
CREATE UNIQUE INDEX stock_journal_request_key ON stock_journal (sku, request_key) WHERE request_key IS NOT NULL;

-- Orders whose row the database refused, whole, for a person.
CREATE TABLE dead_letters (
    id           bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    at           timestamptz NOT NULL DEFAULT clock_timestamp(),
    order_id     bigint NOT NULL UNIQUE,
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
    attributes   text,
    sqlstate     text NOT NULL,
    reason       text NOT NULL,
    -- Set when a person has decided to leave it at that; the order stays `failed`.
    discarded_at timestamptz,
    note         text
);

CREATE VIEW order_list AS
SELECT o.order_id, o.user_id, s.sku_id, o.quantity, o.adjustment, o.amount, o.currency,
       CASE o.status
           WHEN 1 THEN 'pending_payment'
           WHEN 2 THEN 'paid'
           WHEN 3 THEN 'cancelled'
           WHEN 4 THEN 'expired'
           WHEN 5 THEN 'refund_due'
           WHEN 6 THEN 'refunded'
       END AS status,
       o.created_at, o.expires_at, o.attributes::text AS attributes
  FROM orders o JOIN sku s ON s.id = o.sku
UNION ALL
SELECT d.order_id, d.user_id, s.sku_id, d.quantity, d.adjustment, d.amount, d.currency,
       'failed', d.created_at, d.expires_at, d.attributes
  FROM dead_letters d JOIN sku s ON s.id = d.sku;

CREATE VIEW sku_list AS
SELECT sku_id, title, unit_price, currency, total, total - held - sold AS free, held, sold,
       per_user_limit, opens_at, closes_at, paused
  FROM sku;
