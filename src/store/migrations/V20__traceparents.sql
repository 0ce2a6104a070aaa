-- The `traceparent` of the request that placed an order (W3C Trace Context), where it is traced; events carry it. An
-- untraced order has none: COPY does not name the column, and a NULL takes no room in a row.
ALTER TABLE orders           ADD COLUMN traceparent text;
ALTER TABLE dead_letters     ADD COLUMN traceparent text;
ALTER TABLE event_deliveries ADD COLUMN traceparent text;
