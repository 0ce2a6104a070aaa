-- The moment at which a payment counts as made, where its provider's signed time is earlier than
-- its arrival (`received_at`); otherwise NULL: its arrival counts.
ALTER TABLE payments ADD COLUMN paid_at timestamptz;

-- One message may report several payments: it is identified together with each, and each body is
-- kept. A message about something else is identified by its id alone.
ALTER TABLE payment_events
    DROP CONSTRAINT payment_events_provider_event_id_key,
    ADD CONSTRAINT payment_events_identity UNIQUE NULLS NOT DISTINCT (provider, event_id, payment_id);

-- Rises whenever an older order becomes unpaid again, so that `unpaid_from` is not raised over it.
ALTER TABLE node ADD COLUMN unpaid_changes bigint NOT NULL DEFAULT 0;
