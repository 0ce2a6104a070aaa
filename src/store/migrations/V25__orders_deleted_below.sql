-- One row: orders with lower ids may have been deleted by `retention`. An order log can keep an order for longer than its
-- row is kept, and its replay must not write it again. It moves in the transaction that deletes the rows.
CREATE TABLE orders_deleted (
    single  boolean PRIMARY KEY DEFAULT true CHECK (single),
    below   bigint NOT NULL
);
