-- The log of every change of a counter. "Journal" is the log of orders on a node's disk.
ALTER TABLE stock_journal RENAME TO stock_log;
ALTER SEQUENCE stock_journal_id_seq RENAME TO stock_log_id_seq;
ALTER INDEX stock_journal_pkey RENAME TO stock_log_pkey;
ALTER INDEX stock_journal_request_key RENAME TO stock_log_request_key;
ALTER TABLE stock_journal_checkpoint RENAME TO stock_log_checkpoint;
ALTER INDEX stock_journal_checkpoint_pkey RENAME TO stock_log_checkpoint_pkey;

-- A process of the release before that still runs reads and writes under the old names.
CREATE VIEW stock_journal AS SELECT * FROM stock_log;
CREATE VIEW stock_journal_checkpoint AS SELECT * FROM stock_log_checkpoint;
