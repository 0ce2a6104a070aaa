-- The audit reads a SKU's changes in order and its newest one without reading the others' (within a
-- SKU numbers rise with commits, because an entry is numbered under the lock of its SKU's row).
-- Still one index, so that a batch costs what it did.
ALTER TABLE stock_journal DROP CONSTRAINT stock_journal_pkey;
ALTER TABLE stock_journal ADD PRIMARY KEY (sku, id);

-- The messages that report a payment.
CREATE INDEX payment_events_payment ON payment_events (provider, payment_id) WHERE payment_id IS NOT NULL;

-- Which idempotency window was in force from which order id on. A key may have a second order
-- once its first has left the window that was in force then.
CREATE TABLE idempotency_windows (
    since      bigint PRIMARY KEY,
    window_ms  bigint NOT NULL CHECK (window_ms > 0)
);

-- Checkpoints: the sums of rows that `retention` has deleted. Each moves in the transaction that
-- deletes the rows, so that the audit's sums stay whole.

-- Entries of a SKU up to `through_id`, which follow from one another without a gap. Entries of
-- operators' requests below it are kept for their keys, and are in these sums.
CREATE TABLE stock_journal_checkpoint (
    sku         integer PRIMARY KEY,
    through_id  bigint NOT NULL,
    entries     bigint NOT NULL,
    total       bigint NOT NULL,
    held        bigint NOT NULL,
    sold        bigint NOT NULL
);

-- Orders of a SKU: how many, and the units of those that were paid.
CREATE TABLE orders_checkpoint (
    sku     integer PRIMARY KEY,
    orders  bigint NOT NULL,
    sold    bigint NOT NULL
);

-- The order that this payment has paid was deleted. Payments stay: they are what tells a message
-- that comes again from a new payment.
ALTER TABLE payments ADD COLUMN order_pruned boolean NOT NULL DEFAULT false;

-- One row: messages received before this moment may have been deleted.
CREATE TABLE payment_events_checkpoint (
    single           boolean PRIMARY KEY DEFAULT true CHECK (single),
    received_before  timestamptz NOT NULL,
    events           bigint NOT NULL
);
