#!/usr/bin/env python3
"""Makes vectors.json: callbacks signed, and judged, by the payment providers' own SDKs.

    python3 -m venv venv
    venv/bin/pip install stripe==16.1.0 standardwebhooks==1.1.0 wechatpayv3==2.0.4 \
        alipay-sdk-python==3.7.1411
    venv/bin/pip install python-alipay-sdk==3.4.0
    venv/bin/python make.py

In this order: both of Alipay's install into the package `alipay` and get along, but only the second
one's __init__ has the `verify` for notifications.

Each vector says what its SDK made of it when its clock showed `at_ms`: what is accepted has to be
read by Millrace as written here, what is refused has to be refused. Where an SDK signs, it signed;
where it only verifies (the encryption of WeChat Pay's resource), it has decrypted what is here.

The keys are for tests only and open nothing. They are kept in keys.json and made where that is
missing, so that running this again changes nothing else. It uses no network.
"""

import base64
import copy
import datetime
import json
import pathlib
import tempfile
from unittest import mock
from urllib.parse import quote, quote_plus

import alipay
import standardwebhooks
import standardwebhooks.webhooks
import stripe
from alipay.aop.api.util.SignatureUtils import get_sign_content, sign_with_rsa2, verify_with_rsa
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.x509.oid import NameOID
from wechatpayv3 import WeChatPay, WeChatPayType
from wechatpayv3.utils import rsa_sign

HERE = pathlib.Path(__file__).parent
AT = 1_794_000_000  # 2026-11-06
ORDER = "7340123456789012480"
RECEIPT = "mr1." + "Ab9_-" * 24
VECTORS = []


def add(name, provider, signed_by, headers, body, expect, at=AT):
    VECTORS.append({
        "name": name, "provider": provider, "signed_by": signed_by, "at_ms": at * 1000,
        "headers": [list(pair) for pair in headers.items()], "body": body, "expect": expect,
    })


def paid(event_id, kind, payment_id, amount, currency="CNY", order_ref=ORDER, receipt=RECEIPT):
    return {"event_id": event_id, "kind": kind, "payment": {
        "payment_id": payment_id, "order_ref": order_ref, "amount": amount, "currency": currency,
        "receipt": receipt}}


def other(event_id, kind):
    return {"event_id": event_id, "kind": kind, "payment": None}


def compact(value):
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def verdict(check):
    """Whether an SDK accepts: some say False, some raise."""
    try:
        return check() is not False
    except Exception:
        return False


def holds(expect, check):
    assert verdict(check) == (expect != "refused"), f"the SDK disagrees: {expect}"
    return expect


# --- Keys -------------------------------------------------------------------------------------

def private_pem(key, form):
    return key.private_bytes(
        serialization.Encoding.PEM, form, serialization.NoEncryption()).decode()


def make_keys():
    pkcs8 = serialization.PrivateFormat.PKCS8
    keys = {"note": "FOR TESTS ONLY. These keys are public and open nothing."}
    for name in ("alipay", "wechatpay", "wechatpay_old", "stranger"):
        key = rsa.generate_private_key(65537, 2048)
        keys[name] = {
            "private": private_pem(key, pkcs8),
            "public": key.public_key().public_bytes(
                serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo,
            ).decode(),
        }
        if name == "wechatpay_old":
            title = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Test only")])
            serial = int("5F2A7C0011223344556677889900AABBCCDDEEFF", 16)
            certificate = (
                x509.CertificateBuilder().subject_name(title).issuer_name(title)
                .public_key(key.public_key()).serial_number(serial)
                .not_valid_before(datetime.datetime(2020, 1, 1))
                .not_valid_after(datetime.datetime(2120, 1, 1)).sign(key, hashes.SHA256()))
            keys[name]["certificate"] = certificate.public_bytes(
                serialization.Encoding.PEM).decode()
            keys[name]["serial"] = f"{serial:X}"
    keys["wechatpay"]["serial"] = "PUB_KEY_ID_0114232134912410000000000000"
    keys["apiv3_key"] = "test-only-apiv3-key-of-32-bytes!"
    keys["standard"] = ["whsec_" + base64.b64encode(bytes(range(24))).decode(),
                        "whsec_" + base64.b64encode(bytes(range(100, 132))).decode()]
    keys["stripe"] = ["whsec_test_only_first_0123456789abcdef", "whsec_test_only_second_0123456789"]
    return keys


path = HERE / "keys.json"
if not path.exists():
    path.write_text(json.dumps(make_keys(), indent=1) + "\n")
KEYS = json.loads(path.read_text())


# --- Standard Webhooks --------------------------------------------------------------------------

def standard():
    by = "standardwebhooks 1.1.0, Webhook.sign"

    class Clock(datetime.datetime):
        seconds = AT

        @classmethod
        def now(cls, tz=None):
            return cls.fromtimestamp(cls.seconds, tz)

    def message(name, body, expect, secret=0, id="msg_2KWPBgLlAfxdpx2AI54pPJ85f4W", at=AT,
                sent=AT, extra="", altered=None):
        hook = standardwebhooks.Webhook(KEYS["standard"][secret])
        moment = datetime.datetime.fromtimestamp(sent, datetime.timezone.utc)
        headers = {"webhook-id": id, "webhook-timestamp": str(sent),
                   "webhook-signature": extra + hook.sign(id, moment, body)}
        body = altered or body
        Clock.seconds = at
        with mock.patch.object(standardwebhooks.webhooks, "datetime", Clock):
            add(name, "standard", by, headers, body,
                holds(expect, lambda: hook.verify(body, headers)), at)

    data = {"order_id": ORDER, "payment_id": "pay_1", "amount": 199900, "currency": "CNY",
            "receipt": RECEIPT, "unknown": {"a": [1, {}]}}
    body = json.dumps({"type": "payment.succeeded", "timestamp": "2026-11-06T00:00:00Z",
                       "data": data}, indent=2)
    good = paid("msg_2KWPBgLlAfxdpx2AI54pPJ85f4W", "payment.succeeded", "pay_1", 199900)
    message("a payment", body, good)
    message("a payment, signed with the second secret", body, good, secret=1)
    message("several signatures", body, good,
            extra="v1,AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA= v1a,AAAA ")
    number = compact({"type": "payment.succeeded", "data": {
        "order_id": int(ORDER), "payment_id": "付-1", "amount": 1, "currency": "jpy"}})
    message("the order as a number, no receipt, a name in Chinese", number,
            paid("m1", "payment.succeeded", "付-1", 1, "JPY", receipt=None), id="m1")
    message("another type", compact({"type": "payment.failed", "data": []}),
            other("m2", "payment.failed"), id="m2")
    message("299 seconds late", body, good, at=AT + 299)
    message("299 seconds early", body, good, at=AT - 299)
    message("too late", body, "refused", at=AT + 302)
    message("too early", body, "refused", at=AT - 302)
    message("altered", body, "refused", altered=body.replace("199900", "199901"))


# --- Stripe -------------------------------------------------------------------------------------

def stripe_():
    by = "stripe 16.1.0, WebhookSignature.generate_signature_header"

    def message(name, body, expect, secret=0, at=AT, sent=AT, alter=lambda header: header,
                altered=None, is_sdk_laxer=False):
        secret = KEYS["stripe"][secret]
        header = alter(stripe.WebhookSignature.generate_signature_header(body, secret, sent))
        body = altered or body
        with mock.patch("stripe._webhook.time.time", lambda: at):
            check = lambda: stripe.Webhook.construct_event(body, header, secret, api_key="sk_test")
            assert is_sdk_laxer == (verdict(check) and expect == "refused"), name
            assert expect == "refused" or verdict(check), name
        add(name, "stripe", by, {"Stripe-Signature": header}, body, expect, at)

    intent = {"id": "pi_3MtwBwLkdIwHu7ix28a3tqPa", "object": "payment_intent", "amount": 2000,
              "amount_capturable": 0, "amount_received": 2000, "currency": "usd",
              "latest_charge": None, "livemode": False,
              "metadata": {"order_id": ORDER, "receipt": RECEIPT, "shop": "é"},
              "payment_method_options": {"card": {"network": None}}, "status": "succeeded"}
    event = {"id": "evt_1MtwBwLkdIwHu7ix", "object": "event", "api_version": "2025-01-27.acacia",
             "created": AT, "data": {"object": intent}, "livemode": False,
             "pending_webhooks": 1, "request": {"id": None, "idempotency_key": None},
             "type": "payment_intent.succeeded"}
    body = json.dumps(event, indent=2)
    good = paid(event["id"], event["type"], intent["id"], 2000, "USD")
    message("a payment", body, good)
    message("a payment, signed with the second secret", body, good, secret=1)
    message("an old v1 before, a v0 behind", body, good,
            alter=lambda h: h.replace(",v1=", ",v1=" + "0" * 64 + ",v1=") + ",v0=" + "0" * 64)
    message("only v0", body, "refused", alter=lambda h: h.replace("v1=", "v0="))
    bare = copy.deepcopy(event)
    bare["data"]["object"]["metadata"] = {}
    message("a payment without metadata", compact(bare),
            paid(event["id"], event["type"], intent["id"], 2000, "USD", "", None))
    refund = {"id": "evt_2", "object": "event", "type": "charge.refunded",
              "data": {"object": {"id": "ch_1", "object": "charge"}}}
    message("another type", compact(refund), other("evt_2", "charge.refunded"))
    message("299 seconds late", body, good, at=AT + 299)
    message("too late", body, "refused", at=AT + 302)
    # Stripe's SDK takes any future; a clock that far off would make replays last.
    message("too early", body, "refused", at=AT - 302, is_sdk_laxer=True)
    message("altered", body, "refused", altered=body.replace("2000", "2001"))


# --- Alipay -------------------------------------------------------------------------------------

def alipay_():
    private = serialization.load_pem_private_key(KEYS["alipay"]["private"].encode(), None)
    pkcs1 = "".join(private_pem(
        private, serialization.PrivateFormat.TraditionalOpenSSL).splitlines()[1:-1])
    public = "".join(KEYS["alipay"]["public"].splitlines()[1:-1])
    client = alipay.AliPay(
        appid="2021000000000001", app_private_key_string=private_pem(
            private, serialization.PrivateFormat.TraditionalOpenSSL),
        alipay_public_key_string=KEYS["alipay"]["public"], sign_type="RSA2")
    by = "alipay-sdk-python 3.7.1411, sign_with_rsa2; verified also by python-alipay-sdk 3.4.0"

    def message(name, change, expect, charset="utf-8", skip_empty=False, alter=lambda form: form):
        form = dict(notify, **change)
        form = {name: value for name, value in form.items() if value is not None}
        signed = {name: value for name, value in form.items() if value or not skip_empty}
        sign = sign_with_rsa2(pkcs1, get_sign_content(signed), charset)
        form = alter(dict(form, sign=sign, sign_type="RSA2"))
        # Both SDKs have to agree about what was signed.
        sent = {name: value for name, value in form.items()
                if name not in ("sign", "sign_type") and (value or not skip_empty)}
        text = get_sign_content(sent).encode(charset)
        for check in (lambda: verify_with_rsa(public, text, form["sign"]),
                      lambda: client.verify(dict(sent), form["sign"])):
            if charset == "utf-8" and expect != "not ours":
                holds(expect, check)
        body = "&".join(f"{name}={quote_plus(value, encoding=charset)}"
                        for name, value in form.items())
        add(name, "alipay", by, {"Content-Type": f"application/x-www-form-urlencoded; charset={charset}"},
            body, expect)

    # After the example of a notification in Alipay's documentation.
    notify = {
        "gmt_create": "2026-11-06 18:20:32", "charset": "utf-8",
        "seller_email": "shop@example.com", "subject": "限量 球鞋+礼盒 100% 正品 & 包邮",
        "buyer_open_id": "01501o8f93I3nJAGB1jG4ONhtxVeDdp1qJGNdTWqWXr3yo3",
        "invoice_amount": "1999.00", "notify_id": "2026110600222182037083001436823498",
        "fund_bill_list": '[{"amount":"1999.00","fundChannel":"ALIPAYACCOUNT"}]',
        "notify_type": "trade_status_sync", "trade_status": "TRADE_SUCCESS",
        "receipt_amount": "1999.00", "buyer_pay_amount": "1999.00", "app_id": "2021000000000001",
        "seller_id": "2088000000000001", "gmt_payment": "2026-11-06 18:20:37",
        "notify_time": "2026-11-06 18:20:38", "passback_params": RECEIPT, "version": "1.0",
        "out_trade_no": ORDER, "total_amount": "1999.00", "trade_no": "2026110622001483081430551234",
        "auth_app_id": "2021000000000001", "point_amount": "0.00", "a_new_field": "a=b",
    }
    trade = notify["trade_no"]
    good = paid(notify["notify_id"], "TRADE_SUCCESS", trade, 199900)
    message("a payment", {}, good)
    message("the same payment, finished", {"trade_status": "TRADE_FINISHED", "notify_id": "n2"},
            paid("n2", "TRADE_FINISHED", trade, 199900))
    message("pass-back encoded once more", {"passback_params": quote("mr1.a=b/c", safe="")},
            paid(notify["notify_id"], "TRADE_SUCCESS", trade, 199900, receipt="mr1.a=b/c"))
    message("no pass-back, no notify_id", {"passback_params": None, "notify_id": None},
            paid(f"{trade} TRADE_SUCCESS", "TRADE_SUCCESS", trade, 199900, receipt=None))
    message("empty values, signed", {"body": "", "gmt_refund": ""}, good)
    message("empty values, not signed", {"body": "", "gmt_refund": ""}, good, skip_empty=True)
    message("an amount with one decimal", {"total_amount": "0.1"},
            paid(notify["notify_id"], "TRADE_SUCCESS", trade, 10))
    message("another currency", {"total_amount": "5000", "trans_currency": "JPY"},
            paid(notify["notify_id"], "TRADE_SUCCESS", trade, 5000, "JPY"))
    message("waiting for the buyer", {"trade_status": "WAIT_BUYER_PAY"},
            other(notify["notify_id"], "WAIT_BUYER_PAY"))
    message("a refund of a part", {"refund_fee": "10.00", "gmt_refund": "2026-11-07 10:00:00.123"},
            other(notify["notify_id"], "TRADE_SUCCESS"))
    message("a refund of all", {"trade_status": "TRADE_CLOSED", "refund_fee": "1999.00"},
            other(notify["notify_id"], "TRADE_CLOSED"))
    message("a refund of nothing", {"refund_fee": "0.00"}, good)
    message("an agreement", {"trade_status": None, "trade_no": None, "out_trade_no": None,
                             "notify_type": "dut_user_sign"},
            other(notify["notify_id"], "dut_user_sign"))
    message("another application", {"app_id": "2021000000000002"}, "not ours")
    message("another seller", {"seller_id": "2088000000000002"}, "not ours")
    message("no seller", {"seller_id": None}, "not ours")
    message("in GBK", {"charset": "GBK"}, "refused", charset="gbk")
    message("altered", {}, "refused", alter=lambda form: dict(form, total_amount="1999.01"))
    message("a field more", {}, "refused", alter=lambda form: dict(form, extra="1"))
    message("a field less", {}, "refused",
            alter=lambda form: {k: v for k, v in form.items() if k != "point_amount"})


# --- WeChat Pay -----------------------------------------------------------------------------------

def wechatpay():
    by = "wechatpayv3 2.0.4, utils.rsa_sign; verified and decrypted by WeChatPay.callback"
    private = {name: serialization.load_pem_private_key(KEYS[name]["private"].encode(), None)
               for name in ("wechatpay", "wechatpay_old", "stranger")}

    def client(directory, **more):
        return WeChatPay(
            wechatpay_type=WeChatPayType.NATIVE, mchid="1900000001",
            private_key="".join(KEYS["stranger"]["private"].splitlines()[1:-1]),
            cert_serial_no="0", apiv3_key=KEYS["apiv3_key"], appid="wx0000000000000001",
            cert_dir=directory, **more)

    def message(name, change, expect, key="wechatpay", serial=None, event=None, at=AT,
                alter=lambda body: body, signature=None, secret=None):
        transaction = merged(TRANSACTION, change)
        encrypted = AESGCM((secret or KEYS["apiv3_key"]).encode()).encrypt(
            b"fdasflkja484", compact(transaction).encode(), b"transaction")
        body = compact(merged({
            "id": "EV-2018022511223320873", "create_time": "2026-11-06T18:20:38+08:00",
            "resource_type": "encrypt-resource", "event_type": "TRANSACTION.SUCCESS",
            "summary": "支付成功", "resource": {
                "original_type": "transaction", "algorithm": "AEAD_AES_256_GCM",
                "ciphertext": base64.b64encode(encrypted).decode(),
                "associated_data": "transaction", "nonce": "fdasflkja484"}}, event or {}))
        signature = signature or rsa_sign(private[key], f"{AT}\nnonce/1+=\n{body}\n")
        body = alter(body)
        headers = {
            "Wechatpay-Timestamp": str(AT), "Wechatpay-Nonce": "nonce/1+=",
            "Wechatpay-Signature": signature, "Wechatpay-Serial": serial or KEYS[key]["serial"],
            "Wechatpay-Signature-Type": "WECHATPAY2-SHA256-RSA2048"}
        if expect == "not ours" or at != AT:
            pass  # The SDK leaves both to its caller.
        else:
            with tempfile.TemporaryDirectory() as directory:
                pathlib.Path(directory, "old.pem").write_text(KEYS["wechatpay_old"]["certificate"])
                more = {} if key == "wechatpay_old" else {
                    "public_key": KEYS["wechatpay"]["public"],
                    "public_key_id": KEYS["wechatpay"]["serial"]}

                def check():
                    with mock.patch("requests.get", side_effect=OSError("no network")):
                        read = client(directory, **more).callback(headers, body)
                    assert read["resource"] == transaction
                holds("refused" if expect == "refused" else "accepted", check)
        add(name, "wechatpay", by, headers, body, expect, at)

    def merged(base, change):
        value = dict(base, **change)
        return {name: member for name, member in value.items() if member is not None}

    TRANSACTION = {
        "transaction_id": "1217752501201407033233368018",
        "amount": {"payer_total": 199900, "total": 199900, "currency": "CNY",
                   "payer_currency": "CNY"},
        "mchid": "1900000001", "trade_state": "SUCCESS", "bank_type": "CMC",
        "promotion_detail": [{"amount": 100, "goods_detail": [{"goods_id": "M1"}]}],
        "success_time": "2026-11-06T18:20:37+08:00",
        "payer": {"openid": "oUpF8uMuAJO_M2pxb1Q9zNjWeS6o"}, "out_trade_no": ORDER,
        "appid": "wx0000000000000001", "trade_state_desc": "支付成功", "trade_type": "NATIVE",
        "attach": RECEIPT, "scene_info": {"device_id": "013467007045764"}}
    id, kind, trade = ("EV-2018022511223320873", "TRANSACTION.SUCCESS",
                       TRANSACTION["transaction_id"])
    good = paid(id, kind, trade, 199900)
    message("a payment", {}, good)
    message("a payment, by a certificate's key", {}, good, key="wechatpay_old")
    message("a serial in small letters", {}, good, key="wechatpay_old",
            serial=KEYS["wechatpay_old"]["serial"].lower())
    message("nothing attached, no currency", {"attach": None, "amount": {"total": 1}},
            paid(id, kind, trade, 1, receipt=None))
    message("not paid yet", {"trade_state": "USERPAYING"}, other(id, kind))
    message("a refund", {}, other(id, "REFUND.SUCCESS"), event={"event_type": "REFUND.SUCCESS"})
    message("another merchant", {"mchid": "1900000002"}, "not ours")
    message("another application", {"appid": "wx0000000000000002"}, "not ours")
    message("another key", {}, "refused", key="stranger", serial=KEYS["wechatpay"]["serial"])
    message("an unknown serial", {}, "refused", key="stranger", serial="5F2A")
    message("a probe", {}, "refused", signature="WECHATPAY/SIGNTEST/" + "A" * 300)
    message("encrypted with another key", {}, "refused", secret="another-key-of-32-bytes-for-test")
    message("altered", {}, "refused", alter=lambda body: body.replace("EV-", "EW-"))
    message("299 seconds late", {}, good, at=AT + 299)
    message("too late", {}, "refused", at=AT + 302)
    message("too early", {}, "refused", at=AT - 302)


standard()
stripe_()
alipay_()
wechatpay()
out = {"note": "Made by make.py. Signed with keys for tests only.", "vectors": VECTORS}
(HERE / "vectors.json").write_text(json.dumps(out, indent=1, ensure_ascii=False) + "\n")
print(f"{len(VECTORS)} vectors")
