-- The counters of every SKU over all shares, as they were at one moment, so that nodes need not add the shares up each for
-- itself: a node that finds them too old brings them up to date for all. One row. What is lost with it is read anew.
CREATE UNLOGGED TABLE sale_counters (
    one         boolean PRIMARY KEY DEFAULT true CHECK (one),
    -- A moment before they were read.
    read_at     timestamptz NOT NULL,
    -- When they were last read and had changed: nodes do not fetch again what they have.
    changed_at  timestamptz NOT NULL,
    -- Active nodes.
    nodes       bigint NOT NULL,
    -- Six `int8send` a SKU: id, total, held, sold, units that are lent to no node, and 1 while its total is lowered.
    counters    bytea NOT NULL
) WITH (fillfactor = 10);
ALTER TABLE sale_counters ALTER counters SET STORAGE EXTERNAL;
