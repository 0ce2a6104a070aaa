-- How the units of a SKU are given out: NULL is first come, first served.
ALTER TABLE sku
    ADD COLUMN allocation  text CHECK (allocation = 'draw'),
    ADD COLUMN draw_at     timestamptz,
    ADD COLUMN draw_beacon text,
    ADD CONSTRAINT sku_draw_at CHECK ((allocation IS NULL) = (draw_at IS NULL));

-- The draw of a SKU. A row is made with the SKU's first terms that name a draw, and its secrets never change. Not in any
-- publication: until `drawn_at` the seed must not be known, and the salt never.
CREATE TABLE draws (
    sku          integer PRIMARY KEY REFERENCES sku,
    seed         bytea NOT NULL CHECK (octet_length(seed) = 32),
    salt         bytea NOT NULL CHECK (octet_length(salt) = 32),
    fixed_at     timestamptz,
    units        bigint,
    entries      bigint,
    entries_hash bytea,
    beacon       text,
    drawn_at     timestamptz,
    CHECK ((fixed_at IS NULL) = (entries_hash IS NULL)),
    CHECK (drawn_at IS NULL OR fixed_at IS NOT NULL)
);

-- The entries of a draw from the moment they are fixed until it is made.
CREATE TABLE draw_entries (
    sku      integer,
    order_id bigint,
    user_id  text NOT NULL,
    quantity integer NOT NULL,
    PRIMARY KEY (sku, order_id)
);

-- The entries of a draw that is made, as they are published, with their orders, which are not.
CREATE TABLE draw_places (
    sku      integer,
    place    integer,
    order_id bigint NOT NULL,
    entry    bytea NOT NULL,
    quantity integer NOT NULL,
    rank     text NOT NULL,
    won      boolean NOT NULL,
    PRIMARY KEY (sku, place)
);
