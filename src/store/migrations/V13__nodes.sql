-- Several nodes on one database. PostgreSQL is their arbiter: each right of a node is a row here, and every change of a
-- right is a transaction that checks the epoch of the node that asks.
--
-- One node alone (state `single`) has all lanes and all stock, reads and writes nothing of this, and its counters are
-- those of `sku`.
ALTER TABLE node
    ADD COLUMN state text NOT NULL DEFAULT 'single'
        CHECK (state IN ('single', 'joining', 'active', 'dead', 'left')),
    -- Moves with every renewal. A node whose counter stands still is suspect; no clock is compared with another.
    ADD COLUMN renewals bigint NOT NULL DEFAULT 0,
    -- The `data_dir` of its process, which takes this row again when it starts.
    ADD COLUMN home uuid UNIQUE,
    -- Where other nodes reach it: host and port.
    ADD COLUMN address text,
    -- The newest format of a group in an order log that it can read.
    ADD COLUMN reads_format smallint NOT NULL DEFAULT 1,
    -- The node that has fenced it and replays its log, and the epoch of that node.
    ADD COLUMN taken_by smallint REFERENCES node,
    ADD COLUMN taken_epoch bigint,
    ADD CONSTRAINT node_taken CHECK ((state = 'dead') = (taken_by IS NOT NULL) AND (taken_by IS NULL) = (taken_epoch IS NULL));

-- The lanes of buyers. A lane without a node is nobody's, and units of its unpaid orders are in `sku.held`.
CREATE TABLE lane (
    lane          smallint PRIMARY KEY CHECK (lane BETWEEN 0 AND 63),
    node          smallint REFERENCES node,
    -- Rises whenever the lane changes hands.
    epoch         bigint NOT NULL DEFAULT 0,
    -- Every id given out in this lane by earlier owners lies before it.
    ids_until_ms  bigint NOT NULL DEFAULT 0,
    -- The node whose log has to be replayed before the lane opens.
    blocked_by    smallint REFERENCES node,
    CONSTRAINT lane_blocked CHECK (blocked_by IS NULL OR node IS NOT NULL)
) WITH (fillfactor = 50);
INSERT INTO lane (lane) SELECT generate_series(0, 63);

-- Units that a node may sell. `held` and `sold` are part of `lent`; sold units are swept into `sku.sold`.
CREATE TABLE stock_share (
    sku       integer NOT NULL REFERENCES sku,
    node      smallint NOT NULL REFERENCES node,
    lent      bigint NOT NULL,
    held      bigint NOT NULL DEFAULT 0,
    sold      bigint NOT NULL DEFAULT 0,
    -- The newest want that this node has looked at, and given what it had free.
    answered  bigint NOT NULL DEFAULT 0,
    PRIMARY KEY (sku, node),
    CONSTRAINT stock_share_not_oversold CHECK (held >= 0 AND sold >= 0 AND held + sold <= lent)
) WITH (fillfactor = 50);

-- A node that has run dry. Served in the order of the numbers; until then the pool lends to nobody else.
CREATE TABLE stock_want (
    number  bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    sku     integer NOT NULL REFERENCES sku,
    node    smallint NOT NULL REFERENCES node,
    units   bigint NOT NULL CHECK (units > 0),
    UNIQUE (sku, node)
);

-- `lent` is the sum of the shares, kept by the trigger below. `held` and `sold` of `sku` are units outside of any share.
ALTER TABLE sku
    ADD COLUMN lent bigint NOT NULL DEFAULT 0,
    -- The total that an operator wants to lower it to. Nothing is lent until that is settled.
    ADD COLUMN recall bigint;
ALTER TABLE sku
    DROP CONSTRAINT sku_not_oversold,
    ADD CONSTRAINT sku_not_oversold CHECK (held >= 0 AND sold >= 0 AND lent >= 0 AND held + sold + lent <= total);

-- Entries about a node's share, whose `total` is what is lent; NULL: about units outside of any share.
ALTER TABLE stock_log ADD COLUMN node smallint;

-- The functions of a trigger run with the search path of the session that fires it, which is this schema.
CREATE FUNCTION stock_share_lent() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP <> 'INSERT' THEN
        UPDATE sku SET lent = lent - OLD.lent WHERE id = OLD.sku;
    END IF;
    IF TG_OP <> 'DELETE' THEN
        UPDATE sku SET lent = lent + NEW.lent WHERE id = NEW.sku;
    END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER stock_share_lent AFTER INSERT OR DELETE ON stock_share FOR EACH ROW EXECUTE FUNCTION stock_share_lent();
CREATE TRIGGER stock_share_lent_moved AFTER UPDATE OF lent ON stock_share FOR EACH ROW
    WHEN (OLD.lent IS DISTINCT FROM NEW.lent) EXECUTE FUNCTION stock_share_lent();

CREATE OR REPLACE VIEW sku_list AS
SELECT s.sku_id, s.title, s.unit_price, s.currency, s.total,
       s.total - s.held - s.sold - h.held - h.sold AS free, s.held + h.held AS held, s.sold + h.sold AS sold,
       s.per_user_limit, s.opens_at, s.closes_at, s.paused
  FROM sku s, LATERAL (SELECT coalesce(sum(held), 0)::bigint AS held, coalesce(sum(sold), 0)::bigint AS sold
                         FROM stock_share WHERE sku = s.id) h;
