-- The timeline of the server at the last join of a node. A promoted standby has another one and may lack commits, so rights
-- end with it: the next join makes every node dead, and its log is replayed before anybody has a lane again.
ALTER TABLE database_identity ADD COLUMN timeline text;

-- A dead node that nobody replays yet waits for its own process, or for one that takes it over.
ALTER TABLE node
    DROP CONSTRAINT node_taken,
    ADD CONSTRAINT node_taken CHECK (
        (taken_by IS NULL OR state = 'dead') AND (taken_by IS NULL) = (taken_epoch IS NULL)
    );
