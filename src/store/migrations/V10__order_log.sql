-- The order log of a node: the journal on its disk, or a stream or topic of a broker. Its name is `journal_id`.
ALTER TABLE node
    -- For people, as in: the Redis stream `millrace:millrace:0`.
    ADD COLUMN log_title  text,
    -- The place up to which every order in a broker's log is settled: epoch and number of a group, and the broker's
    -- offset of it. It moves with what is committed, and goes back with it in a failover that loses commits.
    ADD COLUMN log_epoch  bigint,
    ADD COLUMN log_number bigint,
    ADD COLUMN log_offset bigint;
