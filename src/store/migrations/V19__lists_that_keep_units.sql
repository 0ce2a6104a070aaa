-- The SKUs of which orders wait for units: whatever no order holds is then kept for these, counts as held, and is not
-- free. Noted by the task that assigns units, at its next look after a list begins or ends.
CREATE TABLE waitlists (
    node smallint,
    sku  integer,
    PRIMARY KEY (node, sku)
);

CREATE OR REPLACE VIEW sku_list AS
SELECT s.sku_id, s.title, s.unit_price, s.currency, s.total,
       CASE WHEN w.keeps THEN 0 ELSE s.total - s.held - s.sold - h.held - h.sold END AS free,
       CASE WHEN w.keeps THEN s.total - s.sold - h.sold ELSE s.held + h.held END AS held,
       s.sold + h.sold AS sold, s.per_user_limit, s.opens_at, s.closes_at, s.paused
  FROM sku s,
       LATERAL (SELECT coalesce(sum(held), 0)::bigint AS held, coalesce(sum(sold), 0)::bigint AS sold
                  FROM stock_share WHERE sku = s.id) h,
       -- The list of a node that is gone is another's, which notes it as its own.
       LATERAL (SELECT EXISTS (SELECT FROM waitlists JOIN node USING (node)
                                WHERE sku = s.id AND state NOT IN ('dead', 'left')) AS keeps) w;
