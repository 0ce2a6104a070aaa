"""The shop of examples/shop.py, and what the documents quote of it."""

from __future__ import annotations

import os
import re
import secrets
import socket
import sqlite3
import subprocess
import sys
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import REPOSITORY, SECRET, TOKEN, Server, temporary_server, until

SHOP = Path(__file__).parents[1] / "examples/shop.py"
EVENTS_SECRET = b64encode(secrets.token_bytes(32)).decode()


@pytest.mark.parametrize("name", ["EVENTS.md", "PAYMENTS.md"])
def test_documents_quote_the_shop(name: str) -> None:
    document = (REPOSITORY / "docs" / name).read_text(encoding="utf-8")
    quotes = re.findall(r"^```python\n(.*?)^```$", document, re.MULTILINE | re.DOTALL)
    assert quotes
    for quote in quotes:
        assert quote in SHOP.read_text(encoding="utf-8")


@contextmanager
def shop(directory: Path, server: Server, port: int) -> Iterator[Callable[..., httpx.Response]]:
    """Runs it; the calls of its page."""
    environment = os.environ | {
        "MILLRACE_URL": server.url,
        "MILLRACE_TOKEN": TOKEN,
        "NO_PROXY": "127.0.0.1",
        "PAYMENTS_SECRET": f"whsec_{SECRET}",
        "EVENTS_SECRET": EVENTS_SECRET,
        "SHOP_PORT": str(port),
        "SHOP_BOOKS": str(directory / "books.sqlite"),
    }
    command = [sys.executable, "-W", "error", str(SHOP)]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=60) as page:

        def listens() -> bool:
            assert process.poll() is None, process.communicate()[1]
            try:
                return page.get("/orders/1").status_code == 404
            except httpx.TransportError:
                return False

        def post(path: str, **content: Any) -> httpx.Response:
            return page.post(path, json=content)

        try:
            until(listens, "the shop")
            yield post
        finally:
            process.terminate()
            assert process.communicate(timeout=60)[1] == ""


def test_the_shop_sells_has_buyers_wait_and_hears_of_it(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    sink = {
        "MILLRACE_EVENTS__SINKS__SHOP__URL": f"http://127.0.0.1:{port}/millrace/events",
        "MILLRACE_EVENTS__SINKS__SHOP__SECRET": EVENTS_SECRET,
    }
    with temporary_server(sink) as server, shop(tmp_path, server, port) as post:
        server.put_sku("PIANO", 1, title="A piano", unit_price=199_900)

        def click(user: str, key: str, wait: bool = False) -> httpx.Response:
            return post("/buy", user_id=user, sku_id="PIANO", click_id=key, wait=wait)

        def heard(order_id: str) -> str | None:
            with closing(sqlite3.connect(tmp_path / "books.sqlite")) as books:
                row = books.execute("SELECT type FROM heard WHERE subject = ?", (order_id,)).fetchone()
            return row and str(row[0])

        def hears(order_id: str, kind: str) -> None:
            until(lambda: heard(order_id) == kind, f"{kind} of {order_id}")

        first = click("ann", "a").json()
        assert (first["status"], first["to_pay"]) == ("pending_payment", "1999.00 EUR")
        assert click("ann", "a").json() == first
        hears(first["order_id"], "order.placed")

        refused = click("bob", "b-1")
        assert (refused.status_code, refused.json()) == (409, {"refused": "sold_out"})
        waits = click("bob", "b-2", wait=True).json()
        assert (waits["status"], waits["position"], waits["to_pay"]) == ("waitlisted", 1, None)
        behind = click("cleo", "c", wait=True).json()
        assert behind["position"] == 2
        hears(waits["order_id"], "order.waitlisted")
        assert post(f"/orders/{waits['order_id']}/cash").json() == {"refused": "not_payable"}

        assert post(f"/orders/{first['order_id']}/cancel").json()["status"] == "cancelled"
        hears(waits["order_id"], "order.placed")
        assert post(f"/orders/{waits['order_id']}/leave").json() == {"error": "already_assigned"}
        assert post(f"/orders/{waits['order_id']}/cash").status_code == 204
        hears(waits["order_id"], "order.paid")
        assert post(f"/orders/{behind['order_id']}/leave").json()["status"] == "cancelled"
        hears(behind["order_id"], "order.cancelled")

        stranger = post("/millrace/events", type="order.paid")
        assert stranger.status_code == 401
        assert server.admin("GET", "audit")["ok"]
