-- The number of an order's newest transition, which names its event, and the status before it. NULL is 1, the
-- first: COPY writes nothing for it, and a row that exists already need not be rewritten.
ALTER TABLE orders
    ADD COLUMN transition      smallint,
    ADD COLUMN previous_status smallint;
-- `previous_status` 0 is `failed`, which `status` has as NULL.
ALTER TABLE dead_letters
    ADD COLUMN transition      smallint,
    ADD COLUMN previous_status smallint;
-- The same of a payment's states.
ALTER TABLE payments
    ADD COLUMN transition      smallint;

-- Triggers number the transitions, so that no statement can forget it, and those of the release before do it too.
-- They are of updates alone: a COPY of new rows has none.
CREATE FUNCTION number_transition() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    NEW.transition := coalesce(OLD.transition, 1) + 1;
    NEW.previous_status := coalesce(OLD.status, 0);
    RETURN NEW;
END $$;
CREATE FUNCTION number_payment_transition() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    NEW.transition := coalesce(OLD.transition, 1) + 1;
    RETURN NEW;
END $$;
CREATE TRIGGER orders_transition BEFORE UPDATE ON orders FOR EACH ROW
    WHEN (NEW.status IS DISTINCT FROM OLD.status) EXECUTE FUNCTION number_transition();
CREATE TRIGGER dead_letters_transition BEFORE UPDATE ON dead_letters FOR EACH ROW
    WHEN (NEW.status IS DISTINCT FROM OLD.status) EXECUTE FUNCTION number_transition();
CREATE TRIGGER payments_transition BEFORE UPDATE ON payments FOR EACH ROW
    WHEN (NEW.state IS DISTINCT FROM OLD.state) EXECUTE FUNCTION number_payment_transition();

-- Readers of the write-ahead log see what these rows were, which tells a change of state from another one. Both
-- change seldom. A row of `orders` changes in nothing but its status.
ALTER TABLE dead_letters REPLICA IDENTITY FULL;
ALTER TABLE payments REPLICA IDENTITY FULL;

-- The place of each sink of events.
CREATE TABLE event_sinks (
    sink             text PRIMARY KEY,
    -- Transactions with a lower number have been delivered to it: from there on it is refilled from the rows where its
    -- slot is gone. Rises at most once a second.
    place_xid        bigint NOT NULL,
    -- When the newest delivered change was committed.
    place_at         timestamptz,
    -- A refill that is due: of what changed in transaction `refill_xid` or later, and of ids above `refill_after`.
    refill_xid       bigint,
    refill_after     bigint,
    -- Set while nothing is delivered to it, with the reason.
    disabled_at      timestamptz,
    disabled_reason  text
);

-- Events that a sink did not take while it took others. They wait here, so that its slot goes on; once they have
-- waited for too long they are dead letters.
CREATE TABLE event_deliveries (
    id               bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    sink             text NOT NULL,
    event_id         text NOT NULL,
    -- What it is about: events of one subject are delivered one after the other.
    subject          text NOT NULL,
    type             text NOT NULL,
    body             text NOT NULL,
    attempts         integer NOT NULL,
    first_failed_at  timestamptz NOT NULL,
    next_attempt_at  timestamptz NOT NULL,
    last_error       text NOT NULL,
    -- Set once it is a dead letter.
    dead_at          timestamptz,
    UNIQUE (sink, event_id)
);
