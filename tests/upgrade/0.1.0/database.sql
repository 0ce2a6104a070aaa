SET statement_timeout = 0;
SET lock_timeout = 0;
SET idle_in_transaction_session_timeout = 0;
SET client_encoding = 'UTF8';
SET standard_conforming_strings = on;
SELECT pg_catalog.set_config('search_path', '', false);
SET check_function_bodies = false;
SET xmloption = content;
SET client_min_messages = warning;
SET row_security = off;
CREATE SCHEMA millrace;
SET default_tablespace = '';
SET default_table_access_method = heap;
CREATE TABLE millrace.dead_letters (
    id bigint NOT NULL,
    at timestamp with time zone DEFAULT clock_timestamp() NOT NULL,
    order_id bigint NOT NULL,
    user_id text NOT NULL,
    sku integer NOT NULL,
    quantity integer NOT NULL,
    adjustment bigint NOT NULL,
    amount bigint NOT NULL,
    currency text NOT NULL,
    created_at timestamp with time zone NOT NULL,
    expires_at timestamp with time zone NOT NULL,
    key_hash uuid,
    payload_hash bigint NOT NULL,
    attributes text,
    sqlstate text NOT NULL,
    reason text NOT NULL,
    discarded_at timestamp with time zone,
    note text,
    status smallint,
    refund_reason text
);
ALTER TABLE millrace.dead_letters ALTER COLUMN id ADD GENERATED ALWAYS AS IDENTITY (
    SEQUENCE NAME millrace.dead_letters_id_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1
);
CREATE TABLE millrace.node (
    node smallint NOT NULL,
    epoch bigint NOT NULL,
    ids_leased_until_ms bigint NOT NULL,
    started_at timestamp with time zone NOT NULL,
    paused boolean DEFAULT false NOT NULL,
    journal_id uuid,
    journal_in_use boolean DEFAULT false NOT NULL,
    lease_until timestamp with time zone,
    unpaid_from bigint DEFAULT 0 NOT NULL,
    CONSTRAINT node_node_check CHECK (((node >= 0) AND (node <= 63)))
);
CREATE TABLE millrace.orders (
    order_id bigint NOT NULL,
    user_id text NOT NULL,
    sku integer NOT NULL,
    quantity integer NOT NULL,
    adjustment bigint NOT NULL,
    amount bigint NOT NULL,
    currency text NOT NULL,
    status smallint NOT NULL,
    created_at timestamp with time zone NOT NULL,
    expires_at timestamp with time zone NOT NULL,
    key_hash uuid,
    payload_hash bigint NOT NULL,
    attributes json,
    refund_reason text
)
WITH (fillfactor='90');
CREATE TABLE millrace.sku (
    id integer NOT NULL,
    sku_id text NOT NULL,
    title text NOT NULL,
    unit_price bigint NOT NULL,
    currency text NOT NULL,
    total bigint NOT NULL,
    held bigint DEFAULT 0 NOT NULL,
    sold bigint DEFAULT 0 NOT NULL,
    per_user_limit bigint,
    opens_at timestamp with time zone,
    closes_at timestamp with time zone,
    paused boolean DEFAULT false NOT NULL,
    CONSTRAINT sku_currency_check CHECK ((currency ~ '^[A-Z]{3}$'::text)),
    CONSTRAINT sku_not_oversold CHECK (((held >= 0) AND (sold >= 0) AND ((held + sold) <= total))),
    CONSTRAINT sku_per_user_limit_check CHECK (((per_user_limit >= 1) AND (per_user_limit <= '4294967295'::bigint))),
    CONSTRAINT sku_total_check CHECK (((total >= 0) AND (total <= '4294967295'::bigint))),
    CONSTRAINT sku_unit_price_check CHECK ((unit_price >= 0))
)
WITH (fillfactor='50');
CREATE VIEW millrace.order_rows AS
 SELECT o.order_id,
    o.user_id,
    s.sku_id,
    o.sku,
    o.quantity,
    o.adjustment,
    o.amount,
    o.currency,
        CASE o.status
            WHEN 1 THEN 'pending_payment'::text
            WHEN 2 THEN 'paid'::text
            WHEN 3 THEN 'cancelled'::text
            WHEN 4 THEN 'expired'::text
            WHEN 5 THEN 'refund_due'::text
            WHEN 6 THEN 'refunded'::text
            ELSE NULL::text
        END AS status,
    o.created_at,
    o.expires_at,
    (o.attributes)::text AS attributes,
    o.refund_reason,
    o.key_hash,
    o.payload_hash
   FROM (millrace.orders o
     JOIN millrace.sku s ON ((s.id = o.sku)))
UNION ALL
 SELECT d.order_id,
    d.user_id,
    s.sku_id,
    d.sku,
    d.quantity,
    d.adjustment,
    d.amount,
    d.currency,
        CASE d.status
            WHEN 5 THEN 'refund_due'::text
            WHEN 6 THEN 'refunded'::text
            ELSE 'failed'::text
        END AS status,
    d.created_at,
    d.expires_at,
    d.attributes,
    d.refund_reason,
    d.key_hash,
    d.payload_hash
   FROM (millrace.dead_letters d
     JOIN millrace.sku s ON ((s.id = d.sku)));
CREATE VIEW millrace.order_list AS
 SELECT order_rows.order_id,
    order_rows.user_id,
    order_rows.sku_id,
    order_rows.quantity,
    order_rows.adjustment,
    order_rows.amount,
    order_rows.currency,
        CASE
            WHEN ((order_rows.status = 'pending_payment'::text) AND (order_rows.expires_at <= now())) THEN 'expired'::text
            ELSE order_rows.status
        END AS status,
    order_rows.created_at,
    order_rows.expires_at,
    order_rows.attributes,
    order_rows.refund_reason
   FROM millrace.order_rows;
CREATE TABLE millrace.payments (
    id bigint NOT NULL,
    received_at timestamp with time zone NOT NULL,
    provider text NOT NULL,
    payment_id text NOT NULL,
    order_ref text NOT NULL,
    order_id bigint,
    amount bigint NOT NULL,
    currency text NOT NULL,
    receipt text,
    state text NOT NULL,
    refund_reason text,
    changed_at timestamp with time zone NOT NULL,
    checks integer DEFAULT 0 NOT NULL,
    check_at timestamp with time zone NOT NULL,
    reference text,
    note text,
    CONSTRAINT payments_match_has_an_order CHECK (((state <> 'matched'::text) OR (order_id IS NOT NULL))),
    CONSTRAINT payments_refund_has_a_reason CHECK (((state <> 'refund_due'::text) OR (refund_reason IS NOT NULL))),
    CONSTRAINT payments_state_check CHECK ((state = ANY (ARRAY['orphan'::text, 'matched'::text, 'refund_due'::text, 'refunded'::text])))
)
WITH (fillfactor='70');
CREATE VIEW millrace.orphan_payments AS
 SELECT payments.id,
    payments.provider,
    payments.payment_id,
    payments.order_ref,
    payments.order_id,
    payments.amount,
    payments.currency,
    payments.receipt,
    payments.received_at,
    payments.checks,
    payments.check_at
   FROM millrace.payments
  WHERE (payments.state = 'orphan'::text);
CREATE TABLE millrace.payment_events (
    id bigint NOT NULL,
    received_at timestamp with time zone NOT NULL,
    provider text NOT NULL,
    event_id text NOT NULL,
    kind text NOT NULL,
    body bytea NOT NULL,
    payment_id text
);
ALTER TABLE millrace.payment_events ALTER COLUMN id ADD GENERATED ALWAYS AS IDENTITY (
    SEQUENCE NAME millrace.payment_events_id_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1
);
CREATE VIEW millrace.payment_list AS
 SELECT payments.id,
    payments.provider,
    payments.payment_id,
    payments.order_ref,
    payments.order_id,
    payments.amount,
    payments.currency,
    payments.state,
    payments.refund_reason,
    payments.received_at,
    payments.changed_at,
    payments.reference,
    payments.note
   FROM millrace.payments;
ALTER TABLE millrace.payments ALTER COLUMN id ADD GENERATED ALWAYS AS IDENTITY (
    SEQUENCE NAME millrace.payments_id_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1
);
CREATE TABLE millrace.refinery_schema_history (
    version integer NOT NULL,
    name character varying(255),
    applied_on character varying(255),
    checksum character varying(255)
);
ALTER TABLE millrace.sku ALTER COLUMN id ADD GENERATED ALWAYS AS IDENTITY (
    SEQUENCE NAME millrace.sku_id_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1
);
CREATE VIEW millrace.sku_list AS
 SELECT sku.sku_id,
    sku.title,
    sku.unit_price,
    sku.currency,
    sku.total,
    ((sku.total - sku.held) - sku.sold) AS free,
    sku.held,
    sku.sold,
    sku.per_user_limit,
    sku.opens_at,
    sku.closes_at,
    sku.paused
   FROM millrace.sku;
CREATE TABLE millrace.stock_journal (
    id bigint NOT NULL,
    at timestamp with time zone DEFAULT clock_timestamp() NOT NULL,
    sku integer NOT NULL,
    cause text NOT NULL,
    reference text NOT NULL,
    total_delta bigint DEFAULT 0 NOT NULL,
    held_delta bigint DEFAULT 0 NOT NULL,
    sold_delta bigint DEFAULT 0 NOT NULL,
    total_after bigint NOT NULL,
    held_after bigint NOT NULL,
    sold_after bigint NOT NULL,
    request_key text
);
ALTER TABLE millrace.stock_journal ALTER COLUMN id ADD GENERATED ALWAYS AS IDENTITY (
    SEQUENCE NAME millrace.stock_journal_id_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1
);
CREATE TABLE millrace.writer (
    node smallint NOT NULL,
    shard smallint NOT NULL,
    epoch bigint NOT NULL,
    batch bigint DEFAULT 0 NOT NULL
)
WITH (fillfactor='10');
INSERT INTO millrace.node VALUES (0, 1, 1795984151418, '2026-11-29 20:28:10.269601+00', false, '16c53b90-2350-9fa4-6a5c-c3039cffe65f', true, '2026-11-29 20:38:11.425841+00', 253255814532300800);
INSERT INTO millrace.orders VALUES (385527387028193280, 'row-6', 2, 1, 50, 150, 'EUR', 1, '2026-11-29 20:28:11.82+00', '2027-11-29 20:28:11.82+00', '144a186d-398e-9834-34e6-3917f7c8fa50', 1184878238884923603, '{"address_id": "a-6", "note": "\u00fc"}', NULL);
INSERT INTO millrace.orders VALUES (385527386986250240, 'row-5', 1, 2, 0, 200, 'EUR', 1, '2026-11-29 20:28:11.81+00', '2027-11-29 20:28:11.81+00', '640fa3da-24f6-baff-4232-5438e79579ca', -1735616362921450239, NULL, NULL);
INSERT INTO millrace.orders VALUES (385527387044970496, 'row-7', 1, 2, 0, 200, 'EUR', 1, '2026-11-29 20:28:11.824+00', '2027-11-29 20:28:11.824+00', '9b501ca6-653e-3fdf-04a4-98ac42089bf8', -1735616362921450239, NULL, NULL);
INSERT INTO millrace.orders VALUES (385527387057553408, 'row-8', 2, 1, 0, 100, 'EUR', 1, '2026-11-29 20:28:11.827+00', '2027-11-29 20:28:11.827+00', NULL, 4792261818167613179, NULL, NULL);
INSERT INTO millrace.orders VALUES (385527387095302144, 'row-9', 1, 2, 50, 250, 'EUR', 1, '2026-11-29 20:28:11.836+00', '2027-11-29 20:28:11.836+00', 'b74fabe9-9aae-d61d-097e-7bf86b3cd825', 8291208933991041217, '{"address_id": "a-9", "note": "\u00fc"}', NULL);
INSERT INTO millrace.orders VALUES (385527387191771136, 'row-11', 1, 2, 0, 200, 'EUR', 1, '2026-11-29 20:28:11.859+00', '2027-11-29 20:28:11.859+00', '9ad4769d-2d8d-d06a-b72e-557628705aa4', -1735616362921450239, NULL, NULL);
INSERT INTO millrace.orders VALUES (385527387154022400, 'row-10', 2, 1, 0, 100, 'EUR', 1, '2026-11-29 20:28:11.85+00', '2027-11-29 20:28:11.85+00', 'be37a80e-583e-fa54-af51-3bcc72e729e5', 4792261818167613179, NULL, NULL);
INSERT INTO millrace.orders VALUES (385527387229519872, 'row-12', 2, 1, 50, 150, 'EUR', 1, '2026-11-29 20:28:11.868+00', '2027-11-29 20:28:11.868+00', NULL, 3229928769286244668, '{"address_id": "a-12", "note": "\u00fc"}', NULL);
INSERT INTO millrace.orders VALUES (385527387237908480, 'row-13', 1, 2, 0, 200, 'EUR', 1, '2026-11-29 20:28:11.87+00', '2027-11-29 20:28:11.87+00', 'cf049241-06d8-2d8b-e38e-0a578deb2f1f', -1735616362921450239, NULL, NULL);
INSERT INTO millrace.orders VALUES (385527387325988864, 'row-14', 2, 1, 0, 100, 'EUR', 1, '2026-11-29 20:28:11.891+00', '2027-11-29 20:28:11.891+00', '1bd049a2-5b53-0530-aea6-18e60c618ed7', 4792261818167613179, NULL, NULL);
INSERT INTO millrace.orders VALUES (385527387363737600, 'row-15', 1, 2, 50, 250, 'EUR', 1, '2026-11-29 20:28:11.9+00', '2027-11-29 20:28:11.9+00', '34753483-c0ab-c20c-9a7e-9aa1958deed7', 1837225161216901235, '{"address_id": "a-15", "note": "\u00fc"}', NULL);
INSERT INTO millrace.orders VALUES (385527387397292032, 'row-16', 2, 1, 0, 100, 'EUR', 1, '2026-11-29 20:28:11.908+00', '2027-11-29 20:28:11.908+00', NULL, 4792261818167613179, NULL, NULL);
INSERT INTO millrace.orders VALUES (385527387409874944, 'row-17', 1, 2, 0, 200, 'EUR', 1, '2026-11-29 20:28:11.911+00', '2027-11-29 20:28:11.911+00', 'c634dc47-1950-397c-8d1d-ae0fe5a4bee8', -1735616362921450239, NULL, NULL);
INSERT INTO millrace.orders VALUES (385527387464400896, 'row-18', 2, 1, 50, 150, 'EUR', 1, '2026-11-29 20:28:11.924+00', '2027-11-29 20:28:11.924+00', '39127e3d-7129-af15-b875-563cd643f5a3', 7868007485745541862, '{"address_id": "a-18", "note": "\u00fc"}', NULL);
INSERT INTO millrace.orders VALUES (385527387514732544, 'row-19', 1, 2, 0, 200, 'EUR', 1, '2026-11-29 20:28:11.936+00', '2027-11-29 20:28:11.936+00', 'edb2a508-0694-bf1a-3fa6-ceeea0df97fd', -1735616362921450239, NULL, NULL);
INSERT INTO millrace.orders VALUES (385527387539898368, 'row-20', 2, 1, 0, 100, 'EUR', 1, '2026-11-29 20:28:11.942+00', '2027-11-29 20:28:11.942+00', NULL, 4792261818167613179, NULL, NULL);
INSERT INTO millrace.orders VALUES (385527387762196480, 'row-21', 1, 2, 50, 250, 'EUR', 1, '2026-11-29 20:28:11.995+00', '2027-11-29 20:28:11.995+00', '4c0d3698-9c22-5ddf-fec4-6cabf3c3db18', 636452635407277185, '{"address_id": "a-21", "note": "\u00fc"}', NULL);
INSERT INTO millrace.orders VALUES (385527387825111040, 'row-22', 2, 1, 0, 100, 'EUR', 1, '2026-11-29 20:28:12.01+00', '2027-11-29 20:28:12.01+00', 'aa443a68-030c-d015-252f-b42ef1680f2f', 4792261818167613179, NULL, NULL);
INSERT INTO millrace.orders VALUES (385527387967717376, 'row-23', 1, 2, 0, 200, 'EUR', 1, '2026-11-29 20:28:12.044+00', '2027-11-29 20:28:12.044+00', 'a87ca7ca-ab76-d4b8-cff9-80b62306f18e', -1735616362921450239, NULL, NULL);
INSERT INTO millrace.orders VALUES (385527386499710976, 'row-0', 2, 1, 50, 150, 'EUR', 2, '2026-11-29 20:28:11.694+00', '2027-11-29 20:28:11.694+00', NULL, 3102013972333664209, '{"address_id": "a-0", "note": "\u00fc"}', NULL);
INSERT INTO millrace.orders VALUES (385527386625540096, 'row-1', 1, 2, 0, 200, 'EUR', 2, '2026-11-29 20:28:11.724+00', '2027-11-29 20:28:11.724+00', 'ed202282-feea-d295-bdee-1ab182a00691', -1735616362921450239, NULL, NULL);
INSERT INTO millrace.orders VALUES (385527386680066048, 'row-2', 2, 1, 0, 100, 'EUR', 2, '2026-11-29 20:28:11.737+00', '2027-11-29 20:28:11.737+00', 'd4597024-739d-8128-5937-a5a1fef4b090', 4792261818167613179, NULL, NULL);
INSERT INTO millrace.orders VALUES (385527386692648960, 'row-3', 1, 2, 50, 250, 'EUR', 3, '2026-11-29 20:28:11.74+00', '2027-11-29 20:28:11.74+00', 'b03e351e-2797-0501-9bb1-76b1a50d5b0d', -7968283043996265689, '{"address_id": "a-3", "note": "\u00fc"}', NULL);
INSERT INTO millrace.orders VALUES (385527386793312256, 'row-4', 2, 1, 0, 100, 'EUR', 5, '2026-11-29 20:28:11.764+00', '2027-11-29 20:28:11.764+00', NULL, 4792261818167613179, NULL, 'order_cancelled');
INSERT INTO millrace.payment_events OVERRIDING SYSTEM VALUE VALUES (1, '2026-11-29 20:28:12.368+00', 'standard', 'm-0', 'payment.succeeded', '\x7b2274797065223a20227061796d656e742e737563636565646564222c202264617461223a207b226f726465725f6964223a2022333835353237333836343939373130393736222c20227061796d656e745f6964223a2022702d30222c2022616d6f756e74223a203135302c202263757272656e6379223a2022455552222c202272656365697074223a20224541586c76377257414149425a4179704149437769667671415a594242566d724859754141414172444a46467a5438583058362d5165344d373856446f53337269636d6f464b67227d7d', 'p-0');
INSERT INTO millrace.payment_events OVERRIDING SYSTEM VALUE VALUES (2, '2026-11-29 20:28:12.711+00', 'standard', 'm-1', 'payment.succeeded', '\x7b2274797065223a20227061796d656e742e737563636565646564222c202264617461223a207b226f726465725f6964223a2022333835353237333836363235353430303936222c20227061796d656e745f6964223a2022702d31222c2022616d6f756e74223a203230302c202263757272656e6379223a2022455552222c202272656365697074223a20224641586c76377257494145434141797041494377696676714163674242566d72485a4d414141447449434b435f7572536c623375477247436f416152352d6e61485257324a514659304959306741387861457152446c7a5032354a58227d7d', 'p-1');
INSERT INTO millrace.payment_events OVERRIDING SYSTEM VALUE VALUES (3, '2026-11-29 20:28:12.821+00', 'standard', 'm-2', 'payment.succeeded', '\x7b2274797065223a20227061796d656e742e737563636565646564222c202264617461223a207b226f726465725f6964223a2022333835353237333836363830303636303438222c20227061796d656e745f6964223a2022702d32222c2022616d6f756e74223a203130302c202263757272656e6379223a2022455552222c202272656365697074223a20224641586c763772575141494241417970414943776966767141575146576173646c6b4141414e525a6343527a6e59456f5754656c6f663730734a424367596937726f78572d7834415945545663387163567041304b4970304c6767227d7d', 'p-2');
INSERT INTO millrace.payment_events OVERRIDING SYSTEM VALUE VALUES (4, '2026-11-29 20:28:13.192+00', 'standard', 'm-4', 'payment.succeeded', '\x7b2274797065223a20227061796d656e742e737563636565646564222c202264617461223a207b226f726465725f6964223a2022333835353237333836373933333132323536222c20227061796d656e745f6964223a2022702d34222c2022616d6f756e74223a203130302c202263757272656e6379223a2022455552222c202272656365697074223a20224541586c763772576741494241417970414943776966767141575146576173646e51414141454b42694c75756a46623731624e42556e54535a6b42754e657a53644336786451227d7d', 'p-4');
INSERT INTO millrace.payment_events OVERRIDING SYSTEM VALUE VALUES (5, '2026-11-29 20:28:13.305+00', 'standard', 'm-99', 'payment.succeeded', '\x7b2274797065223a20227061796d656e742e737563636565646564222c202264617461223a207b226f726465725f6964223a202231222c20227061796d656e745f6964223a2022702d3939222c2022616d6f756e74223a203130302c202263757272656e6379223a2022455552222c202272656365697074223a206e756c6c7d7d', 'p-99');
INSERT INTO millrace.payments OVERRIDING SYSTEM VALUE VALUES (1, '2026-11-29 20:28:12.368+00', 'standard', 'p-0', '385527386499710976', 385527386499710976, 150, 'EUR', 'EAXlv7rWAAIBZAypAICwifvqAZYBBVmrHYuAAAArDJFFzT8X0X6-Qe4M78VDoS3ricmoFKg', 'matched', NULL, '2026-11-29 20:28:12.368+00', 0, '2026-11-29 20:28:13.368+00', NULL, NULL);
INSERT INTO millrace.payments OVERRIDING SYSTEM VALUE VALUES (2, '2026-11-29 20:28:12.711+00', 'standard', 'p-1', '385527386625540096', 385527386625540096, 200, 'EUR', 'FAXlv7rWIAECAAypAICwifvqAcgBBVmrHZMAAADtICKC_urSlb3uGrGCoAaR5-naHRW2JQFY0IY0gA8xaEqRDlzP25JX', 'matched', NULL, '2026-11-29 20:28:12.711+00', 0, '2026-11-29 20:28:13.711+00', NULL, NULL);
INSERT INTO millrace.payments OVERRIDING SYSTEM VALUE VALUES (3, '2026-11-29 20:28:12.821+00', 'standard', 'p-2', '385527386680066048', 385527386680066048, 100, 'EUR', 'FAXlv7rWQAIBAAypAICwifvqAWQFWasdlkAAANRZcCRznYEoWTelof70sJBCgYi7roxW-x4AYETVc8qcVpA0KIp0Lgg', 'matched', NULL, '2026-11-29 20:28:12.821+00', 0, '2026-11-29 20:28:13.821+00', NULL, NULL);
INSERT INTO millrace.payments OVERRIDING SYSTEM VALUE VALUES (4, '2026-11-29 20:28:13.192+00', 'standard', 'p-4', '385527386793312256', 385527386793312256, 100, 'EUR', 'EAXlv7rWgAIBAAypAICwifvqAWQFWasdnQAAAEKBiLuujFb71bNBUnTSZkBuNezSdC6xdQ', 'refund_due', 'order_cancelled', '2026-11-29 20:28:13.192+00', 0, '2026-11-29 20:28:14.192+00', NULL, NULL);
INSERT INTO millrace.payments OVERRIDING SYSTEM VALUE VALUES (5, '2026-11-29 20:28:13.305+00', 'standard', 'p-99', '1', 1, 100, 'EUR', NULL, 'orphan', NULL, '2026-11-29 20:28:13.305+00', 0, '2026-11-29 20:28:14.305+00', NULL, NULL);
INSERT INTO millrace.refinery_schema_history VALUES (1, 'orders_and_stock', '2026-11-29T20:28:09.727661733Z', '7035320460865547385');
INSERT INTO millrace.refinery_schema_history VALUES (2, 'journal', '2026-11-29T20:28:10.007699575Z', '16801112961239650393');
INSERT INTO millrace.refinery_schema_history VALUES (3, 'payments', '2026-11-29T20:28:10.019672385Z', '16670692874255371446');
INSERT INTO millrace.sku OVERRIDING SYSTEM VALUE VALUES (1, 'PHONE', 'A phone', 100, 'EUR', 40, 20, 2, 2, NULL, NULL, false);
INSERT INTO millrace.sku OVERRIDING SYSTEM VALUE VALUES (2, 'CASE', 'CASE', 100, 'EUR', 1000, 9, 2, NULL, NULL, NULL, false);
INSERT INTO millrace.stock_journal OVERRIDING SYSTEM VALUE VALUES (1, '2026-11-29 20:28:11.592299+00', 1, 'admin', 'put', 40, 0, 0, 40, 0, 0, NULL);
INSERT INTO millrace.stock_journal OVERRIDING SYSTEM VALUE VALUES (2, '2026-11-29 20:28:11.686947+00', 2, 'admin', 'put', 1000, 0, 0, 1000, 0, 0, NULL);
INSERT INTO millrace.stock_journal OVERRIDING SYSTEM VALUE VALUES (3, '2026-11-29 20:28:11.736445+00', 1, 'orders', 'batch 0/1/1', 0, 2, 0, 40, 2, 0, NULL);
INSERT INTO millrace.stock_journal OVERRIDING SYSTEM VALUE VALUES (4, '2026-11-29 20:28:11.739675+00', 2, 'orders', 'batch 0/1/2', 0, 1, 0, 1000, 1, 0, NULL);
INSERT INTO millrace.stock_journal OVERRIDING SYSTEM VALUE VALUES (5, '2026-11-29 20:28:11.752205+00', 2, 'orders', 'batch 0/0/1', 0, 1, 0, 1000, 2, 0, NULL);
INSERT INTO millrace.stock_journal OVERRIDING SYSTEM VALUE VALUES (6, '2026-11-29 20:28:11.755715+00', 1, 'orders', 'batch 0/1/3', 0, 2, 0, 40, 4, 0, NULL);
INSERT INTO millrace.stock_journal OVERRIDING SYSTEM VALUE VALUES (7, '2026-11-29 20:28:11.783852+00', 2, 'orders', 'batch 0/0/2', 0, 1, 0, 1000, 3, 0, NULL);
INSERT INTO millrace.stock_journal OVERRIDING SYSTEM VALUE VALUES (8, '2026-11-29 20:28:11.824176+00', 2, 'orders', 'batch 0/0/3', 0, 1, 0, 1000, 4, 0, NULL);
INSERT INTO millrace.stock_journal OVERRIDING SYSTEM VALUE VALUES (9, '2026-11-29 20:28:11.824481+00', 1, 'orders', 'batch 0/1/4', 0, 2, 0, 40, 6, 0, NULL);
INSERT INTO millrace.stock_journal OVERRIDING SYSTEM VALUE VALUES (10, '2026-11-29 20:28:11.827232+00', 1, 'orders', 'batch 0/0/4', 0, 2, 0, 40, 8, 0, NULL);
INSERT INTO millrace.stock_journal OVERRIDING SYSTEM VALUE VALUES (11, '2026-11-29 20:28:11.832788+00', 2, 'orders', 'batch 0/0/5', 0, 1, 0, 1000, 5, 0, NULL);
INSERT INTO millrace.stock_journal OVERRIDING SYSTEM VALUE VALUES (12, '2026-11-29 20:28:11.847765+00', 1, 'orders', 'batch 0/0/6', 0, 2, 0, 40, 10, 0, NULL);
INSERT INTO millrace.stock_journal OVERRIDING SYSTEM VALUE VALUES (13, '2026-11-29 20:28:11.867622+00', 1, 'orders', 'batch 0/0/7', 0, 2, 0, 40, 12, 0, NULL);
INSERT INTO millrace.stock_journal OVERRIDING SYSTEM VALUE VALUES (14, '2026-11-29 20:28:11.870411+00', 2, 'orders', 'batch 0/1/5', 0, 1, 0, 1000, 6, 0, NULL);
INSERT INTO millrace.stock_journal OVERRIDING SYSTEM VALUE VALUES (15, '2026-11-29 20:28:11.870621+00', 2, 'orders', 'batch 0/0/8', 0, 1, 0, 1000, 7, 0, NULL);
INSERT INTO millrace.stock_journal OVERRIDING SYSTEM VALUE VALUES (16, '2026-11-29 20:28:11.887909+00', 1, 'orders', 'batch 0/1/6', 0, 2, 0, 40, 14, 0, NULL);
INSERT INTO millrace.stock_journal OVERRIDING SYSTEM VALUE VALUES (17, '2026-11-29 20:28:11.89962+00', 2, 'orders', 'batch 0/0/9', 0, 1, 0, 1000, 8, 0, NULL);
INSERT INTO millrace.stock_journal OVERRIDING SYSTEM VALUE VALUES (18, '2026-11-29 20:28:11.910318+00', 1, 'orders', 'batch 0/1/7', 0, 2, 0, 40, 16, 0, NULL);
INSERT INTO millrace.stock_journal OVERRIDING SYSTEM VALUE VALUES (19, '2026-11-29 20:28:11.910529+00', 2, 'orders', 'batch 0/0/10', 0, 1, 0, 1000, 9, 0, NULL);
INSERT INTO millrace.stock_journal OVERRIDING SYSTEM VALUE VALUES (20, '2026-11-29 20:28:11.923715+00', 1, 'orders', 'batch 0/0/11', 0, 2, 0, 40, 18, 0, NULL);
INSERT INTO millrace.stock_journal OVERRIDING SYSTEM VALUE VALUES (21, '2026-11-29 20:28:11.935684+00', 2, 'orders', 'batch 0/1/8', 0, 1, 0, 1000, 10, 0, NULL);
INSERT INTO millrace.stock_journal OVERRIDING SYSTEM VALUE VALUES (22, '2026-11-29 20:28:11.939638+00', 1, 'orders', 'batch 0/0/12', 0, 2, 0, 40, 20, 0, NULL);
INSERT INTO millrace.stock_journal OVERRIDING SYSTEM VALUE VALUES (23, '2026-11-29 20:28:11.996875+00', 2, 'orders', 'batch 0/0/13', 0, 1, 0, 1000, 11, 0, NULL);
INSERT INTO millrace.stock_journal OVERRIDING SYSTEM VALUE VALUES (24, '2026-11-29 20:28:11.997389+00', 1, 'orders', 'batch 0/0/14', 0, 2, 0, 40, 22, 0, NULL);
INSERT INTO millrace.stock_journal OVERRIDING SYSTEM VALUE VALUES (25, '2026-11-29 20:28:12.044107+00', 2, 'orders', 'batch 0/0/15', 0, 1, 0, 1000, 12, 0, NULL);
INSERT INTO millrace.stock_journal OVERRIDING SYSTEM VALUE VALUES (26, '2026-11-29 20:28:12.071804+00', 1, 'orders', 'batch 0/1/9', 0, 2, 0, 40, 24, 0, NULL);
INSERT INTO millrace.stock_journal OVERRIDING SYSTEM VALUE VALUES (27, '2026-11-29 20:28:12.664207+00', 2, 'paid', '1 payments from 1', 0, -1, 1, 1000, 11, 1, NULL);
INSERT INTO millrace.stock_journal OVERRIDING SYSTEM VALUE VALUES (28, '2026-11-29 20:28:12.763775+00', 1, 'paid', '1 payments from 2', 0, -2, 2, 40, 22, 2, NULL);
INSERT INTO millrace.stock_journal OVERRIDING SYSTEM VALUE VALUES (29, '2026-11-29 20:28:12.909354+00', 2, 'paid', '1 payments from 3', 0, -1, 1, 1000, 10, 2, NULL);
INSERT INTO millrace.stock_journal OVERRIDING SYSTEM VALUE VALUES (30, '2026-11-29 20:28:12.963926+00', 1, 'cancelled', '385527386692648960', 0, -2, 0, 40, 20, 2, NULL);
INSERT INTO millrace.stock_journal OVERRIDING SYSTEM VALUE VALUES (31, '2026-11-29 20:28:13.090594+00', 2, 'cancelled', '385527386793312256', 0, -1, 0, 1000, 9, 2, NULL);
INSERT INTO millrace.writer VALUES (0, 2, 1, 0);
INSERT INTO millrace.writer VALUES (0, 0, 1, 15);
INSERT INTO millrace.writer VALUES (0, 1, 1, 9);
INSERT INTO millrace.writer VALUES (0, 3, 1, 5);
SELECT pg_catalog.setval('millrace.dead_letters_id_seq', 1, false);
SELECT pg_catalog.setval('millrace.payment_events_id_seq', 5, true);
SELECT pg_catalog.setval('millrace.payments_id_seq', 5, true);
SELECT pg_catalog.setval('millrace.sku_id_seq', 2, true);
SELECT pg_catalog.setval('millrace.stock_journal_id_seq', 31, true);
ALTER TABLE ONLY millrace.dead_letters
    ADD CONSTRAINT dead_letters_order_id_key UNIQUE (order_id);
ALTER TABLE ONLY millrace.dead_letters
    ADD CONSTRAINT dead_letters_pkey PRIMARY KEY (id);
ALTER TABLE ONLY millrace.node
    ADD CONSTRAINT node_pkey PRIMARY KEY (node);
ALTER TABLE ONLY millrace.orders
    ADD CONSTRAINT orders_pkey PRIMARY KEY (order_id);
ALTER TABLE ONLY millrace.payment_events
    ADD CONSTRAINT payment_events_pkey PRIMARY KEY (id);
ALTER TABLE ONLY millrace.payment_events
    ADD CONSTRAINT payment_events_provider_event_id_key UNIQUE (provider, event_id);
ALTER TABLE ONLY millrace.payments
    ADD CONSTRAINT payments_pkey PRIMARY KEY (id);
ALTER TABLE ONLY millrace.payments
    ADD CONSTRAINT payments_provider_payment_id_key UNIQUE (provider, payment_id);
ALTER TABLE ONLY millrace.refinery_schema_history
    ADD CONSTRAINT refinery_schema_history_pkey PRIMARY KEY (version);
ALTER TABLE ONLY millrace.sku
    ADD CONSTRAINT sku_pkey PRIMARY KEY (id);
ALTER TABLE ONLY millrace.sku
    ADD CONSTRAINT sku_sku_id_key UNIQUE (sku_id);
ALTER TABLE ONLY millrace.stock_journal
    ADD CONSTRAINT stock_journal_pkey PRIMARY KEY (id);
ALTER TABLE ONLY millrace.writer
    ADD CONSTRAINT writer_pkey PRIMARY KEY (node, shard);
CREATE UNIQUE INDEX payments_matched ON millrace.payments USING btree (order_id) WHERE (state = 'matched'::text);
CREATE INDEX payments_open ON millrace.payments USING btree (state, check_at) WHERE (state = ANY (ARRAY['orphan'::text, 'refund_due'::text]));
CREATE INDEX payments_order ON millrace.payments USING btree (order_id);
CREATE UNIQUE INDEX stock_journal_request_key ON millrace.stock_journal USING btree (sku, request_key) WHERE (request_key IS NOT NULL);
ALTER TABLE ONLY millrace.writer
    ADD CONSTRAINT writer_node_fkey FOREIGN KEY (node) REFERENCES millrace.node(node);
