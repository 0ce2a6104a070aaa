-- The first order id that names the lane of its buyer, where earlier ids have the number of a node. NULL until the first
-- start of a release that gives such ids out; 1 in a database without earlier ids.
ALTER TABLE database_identity ADD COLUMN lanes_from bigint;
UPDATE database_identity SET lanes_from = 1 WHERE NOT EXISTS (SELECT FROM node);
