"""Verifies messages by the Python library of Standard Webhooks."""

import json
import sys

from standardwebhooks import Webhook, WebhookVerificationError

recorded = json.load(open(sys.argv[1]))
count = 0
for message in recorded["messages"]:
    for secret in recorded["secrets"]:
        webhook = Webhook(secret)
        event = webhook.verify(message["body"], message["headers"])
        assert event["id"] == message["headers"]["webhook-id"], event
        try:
            webhook.verify(message["body"].replace("EUR", "USD"), message["headers"])
        except WebhookVerificationError:
            count += 1
        else:
            raise SystemExit("an altered message passes")
assert count >= 2, "no messages"
print(f"Python: {count} verified")
