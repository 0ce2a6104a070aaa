-- Whether a node is to hand everything over and leave.
ALTER TABLE node ADD COLUMN drain boolean NOT NULL DEFAULT false;
