"""A shop's backend on Millrace: a buyer orders or waits in line, pays, and the shop hears of it (docs/SHOP.md)."""

import json
import os
import sqlite3
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
from standardwebhooks import Webhook, WebhookVerificationError

from millrace import DeadlineExceeded, Millrace, MillraceError, Order, OrderStatus, Refused
from millrace.openapi.api.data_plane import get_order

URL, PORT = os.environ["MILLRACE_URL"], int(os.environ["SHOP_PORT"])
PAYMENTS = Webhook(os.environ["PAYMENTS_SECRET"])  # payments.standard.secret
EVENTS = Webhook(os.environ["EVENTS_SECRET"])  # events.sinks.shop.secret

# One each for the whole process; its threads share them.
millrace = Millrace(URL, token=os.environ.get("MILLRACE_TOKEN"))
books = sqlite3.connect(os.environ["SHOP_BOOKS"], isolation_level=None, check_same_thread=False)


def buy(user_id: str, sku_id: str, click_id: str, wait: bool) -> dict[str, Any]:
    """A click on "buy" or on "wait in line": each has a `click_id` of its own, made by the page."""
    return shown(millrace.place(user_id, sku_id, idempotency_key=click_id, waitlist=wait, deadline=20).order)


def shown(order: Order) -> dict[str, Any]:
    """What the page shows. Only an order that is `pending_payment` may be paid."""
    may_pay = order.status == OrderStatus.PENDING_PAYMENT
    return {
        "order_id": order.order_id,
        "status": order.status,
        "position": order.position or None,
        "to_pay": f"{order.amount / 100:.2f} {order.currency}" if may_pay else None,
        "until": order.expires_at.isoformat() if may_pay and order.expires_at else None,
    }


def look(order_id: str) -> Order | None:
    order = get_order.sync(order_id, client=millrace.api)
    return order if isinstance(order, Order) else None


def report_payment(order: Order, payment_id: str) -> None:
    """Tells Millrace of cash at the till. A payment platform sends the same for a payment online."""
    data = {"order_id": order.order_id, "amount": order.amount, "currency": order.currency, "receipt": order.receipt}
    body = json.dumps({"type": "payment.succeeded", "data": {"payment_id": payment_id, **data}})
    message, now = f"msg_{payment_id}", datetime.now(UTC)
    headers = {"webhook-id": message, "webhook-timestamp": str(int(now.timestamp()))}
    headers |= {"webhook-signature": PAYMENTS.sign(message, now, body), "Content-Type": "application/json"}
    httpx.post(f"{URL}/v1/payments/standard/notify", content=body, headers=headers).raise_for_status()


def hear(body: bytes, headers: dict[str, str]) -> int:
    """Answers an event of Millrace, which sends it again until the answer is 2xx."""
    try:
        event = EVENTS.verify(body, headers)
    except WebhookVerificationError:
        return 401
    subject, number = event["id"].rsplit(":", 1)  # an order's id, and 1, 2, 3, …; there may be gaps
    books.execute(  # a number that is not higher changes nothing
        "INSERT INTO heard VALUES (?, ?, ?) ON CONFLICT (subject) DO UPDATE"
        " SET number = excluded.number, type = excluded.type WHERE excluded.number > number",
        (subject, int(number), event["type"]),
    )
    return 204


class Shop(BaseHTTPRequestHandler):
    """The page's calls, and Millrace's."""

    def do_GET(self) -> None:
        order = look(self.path.removeprefix("/orders/"))
        self.answer(200, shown(order)) if order else self.answer(404)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        try:
            match self.path.strip("/").split("/"):
                case ["millrace", "events"]:
                    self.answer(hear(body, dict(self.headers)))
                case ["buy"]:
                    self.answer(200, buy(**json.loads(body)))
                case ["orders", order_id, "leave"]:  # the line; an order that has its unit by now stays
                    self.answer(200, shown(millrace.cancel(order_id, only="waitlisted")))
                case ["orders", order_id, "cancel"]:
                    self.answer(200, shown(millrace.cancel(order_id)))
                case ["orders", order_id, "cash"]:
                    order = look(order_id)
                    if order is None or order.status != OrderStatus.PENDING_PAYMENT:
                        return self.answer(409, {"refused": "not_payable"})  # money for it would have to go back
                    report_payment(order, f"cash-{order_id}")
                    self.answer(204)
                case _:
                    self.answer(404)
        except DeadlineExceeded as late:  # it may exist: the same click, later, tells
            self.answer(503, {"repeat": late.idempotency_key})
        except Refused as refused:
            self.answer(409, {"refused": refused.code})
        except MillraceError as error:
            self.answer(409 if error.status == 409 else 500, {"error": error.code})

    def answer(self, status: int, content: dict[str, Any] | None = None) -> None:
        body = b"" if content is None else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Says nothing."""


if __name__ == "__main__":
    books.execute("CREATE TABLE IF NOT EXISTS heard (subject TEXT PRIMARY KEY, number INTEGER, type TEXT)")
    ThreadingHTTPServer(("127.0.0.1", PORT), Shop).serve_forever()
