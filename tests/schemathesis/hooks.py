"""What an OpenAPI document cannot say.

NDJSON, which it describes as an array with one item on each line. And the signature of a payment
callback: every other one is signed as Standard Webhooks, so that what is behind it is tried too.
"""

import base64
import hashlib
import hmac
import itertools
import json
import os
import time

import requests
import schemathesis


@schemathesis.serializer("application/x-ndjson")
def to_lines(ctx, value):
    lines = value if isinstance(value, list) else [value]
    return "\n".join(json.dumps(line) for line in lines).encode() + b"\n"


@schemathesis.deserializer("application/x-ndjson")
def from_lines(ctx, response):
    return [json.loads(line) for line in response.content.splitlines()]


deliveries = itertools.count(1)


@schemathesis.hook.apply_to(operation_id="notifyPayment")
def before_call(ctx, case, kwargs):
    number = next(deliveries)
    if number % 2 or (case.path_parameters or {}).get("provider") != "standard":
        return
    request = requests.Request(**case.as_transport_kwargs(base_url="http://localhost"))
    body = request.prepare().body or b""
    body = body if isinstance(body, bytes) else body.encode()
    key = base64.b64decode(os.environ["CONTRACT_SECRET"].removeprefix("whsec_"))
    event, now = f"contract-{number}", str(int(time.time()))
    text = f"{event}.{now}.".encode() + body
    signature = base64.b64encode(hmac.new(key, text, hashlib.sha256).digest()).decode()
    case.headers["webhook-id"] = event
    case.headers["webhook-timestamp"] = now
    case.headers["webhook-signature"] = f"v1,{signature}"
