"""A real Millrace on its own PostgreSQL, and clients of it. Nothing here stands in for anything."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from millrace import Millrace

REPOSITORY = Path(__file__).parents[3]
TOKEN = "a-shop"
SECRET = base64.b64encode(b"the payment platform and Millrace know it").decode()
SERVER_WAIT = 10
"""Seconds that the server waits at most; so much that a busy machine does not run out of it."""
IMPATIENT = 2
"""Seconds that the clients of tests wait in which the database stands still."""


def until(condition: Callable[[], Any], what: str, seconds: float = 60) -> Any:
    """The first true value of a condition."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.02)
    raise AssertionError(f"not within {seconds} s: {what}")


class Server:
    """`millrace serve`, in a directory of its own. Stopped and started again, it keeps its addresses."""

    def __init__(self, directory: Path, settings: Mapping[str, str]) -> None:
        self.directory, self.settings = directory, settings
        self.binary = Path(os.environ.get("MILLRACE_BINARY") or REPOSITORY / "target/debug/millrace").absolute()
        self.data_plane = self.control_plane = "127.0.0.1:0"
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        # Millrace takes every MILLRACE_… for a setting and refuses an unknown one.
        environment = {name: value for name, value in os.environ.items() if name != "MILLRACE_BINARY"}
        environment |= {
            "MILLRACE_DATA_DIR": str(self.directory / "data"),
            "MILLRACE_DATA_PLANE__LISTEN": self.data_plane,
            "MILLRACE_DATA_PLANE__TOKEN": TOKEN,
            "MILLRACE_CONTROL_PLANE__LISTEN": self.control_plane,
            "MILLRACE_DATABASE__EMBEDDED_WAL_BYTES": "0",
            "MILLRACE_ORDERS__TIMEOUT_MS": str(SERVER_WAIT * 1000),
            "MILLRACE_RATE_LIMIT__PER_USER": "20/s",
            "MILLRACE_PAYMENTS__STANDARD__SECRET": f"whsec_{SECRET}",
            **self.settings,
        }
        with (self.directory / "log").open("ab") as log:
            process = subprocess.Popen(
                [self.binary, "serve"], cwd=self.directory, env=environment, stdout=log, stderr=log
            )
        self.process = process

        def listening() -> dict[str, Any] | None:
            assert process.poll() is None, f"the server ended: {(self.directory / 'log').read_text()[-3000:]}"
            try:
                addresses: dict[str, Any] = json.loads((self.directory / "data/addresses.json").read_text())
            except (FileNotFoundError, json.JSONDecodeError):
                return None
            return addresses if addresses["pid"] == process.pid else None

        addresses = until(listening, "addresses.json")
        self.data_plane, self.control_plane = addresses["data_plane"], addresses["control_plane"]

        def ready() -> bool:
            assert process.poll() is None, f"the server ended: {(self.directory / 'log').read_text()[-3000:]}"
            return httpx.get(f"http://{self.control_plane}/readyz", trust_env=False).is_success

        until(ready, "readyz", 120)

    @property
    def url(self) -> str:
        return f"http://{self.data_plane}"

    def terminate(self) -> None:
        assert self.process
        self.process.terminate()

    def ended(self, seconds: float = 60) -> None:
        assert self.process
        self.process.wait(seconds)

    def kill(self) -> None:
        assert self.process
        self.process.kill()
        self.process.wait()

    def client(self, token: str | None = TOKEN, server_wait: int = SERVER_WAIT, **http: Any) -> Millrace:
        return Millrace(self.url, token, server_wait=server_wait, trust_env=False, **http)

    def put_sku(self, sku_id: str, total: int, **terms: Any) -> str:
        terms = {"unit_price": 1000, "currency": "EUR", "total": total, **terms}
        self.admin("PUT", f"skus/{sku_id}", terms)
        return sku_id

    def admin(self, method: str, path: str, body: Any = None) -> Any:
        url = f"http://{self.control_plane}/admin/v1/{path}"
        return httpx.request(method, url, json=body, trust_env=False, timeout=30).raise_for_status().json()

    def held(self, sku_id: str) -> int:
        """Units that orders hold, as the server counts them in memory."""
        held = [sku["held"] for sku in self.admin("GET", "skus")["skus"] if sku["sku_id"] == sku_id]
        return int(held[0])

    def pay(self, order_id: str, amount: int) -> None:
        """What a payment platform sends by Standard Webhooks."""
        data = {"order_id": order_id, "payment_id": f"p-{order_id}", "amount": amount, "currency": "EUR"}
        body = json.dumps({"type": "payment.succeeded", "data": data})
        event, now = f"e-{order_id}", str(int(time.time()))
        signature = hmac.new(base64.b64decode(SECRET), f"{event}.{now}.{body}".encode(), hashlib.sha256).digest()
        headers = {
            "webhook-id": event,
            "webhook-timestamp": now,
            "webhook-signature": f"v1,{base64.b64encode(signature).decode()}",
            "Content-Type": "application/json",
        }
        url = f"{self.url}/v1/payments/standard/notify"
        httpx.post(url, content=body, headers=headers, trust_env=False).raise_for_status()

    # --- Its database ----------------------------------------------------------------------

    def postmaster(self) -> list[str]:
        return (self.directory / "data/postgres/data/postmaster.pid").read_text().splitlines()

    def orders(self, sku_id: str) -> dict[str, int]:
        """How many orders each buyer has, counted by the database, in a session of psql's."""
        query = f"SELECT user_id, count(*) FROM millrace.order_list WHERE sku_id = '{sku_id}' GROUP BY user_id"
        psql = Path((self.directory / "data/postgres/data/postmaster.opts").read_text().split()[0]).with_name("psql")
        command = [
            psql if psql.exists() else "psql",
            "-h",
            self.postmaster()[4],
            "-U",
            "millrace",
            "-d",
            "millrace",
            "-AtXc",
            query,
        ]
        lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
        return {user: int(count) for user, _, count in (line.rpartition("|") for line in lines)}

    @contextmanager
    def frozen_database(self) -> Iterator[None]:
        """Stops every process of PostgreSQL until the end of the block."""
        postmaster = int(self.postmaster()[0])
        stopped: list[int] = []

        def stop() -> bool:
            """Stops those that are not yet; whether there were none. The first one can make no more of them."""
            family = subprocess.run(["pgrep", "-P", str(postmaster)], check=False, capture_output=True, text=True)
            new = [pid for pid in (postmaster, *map(int, family.stdout.split())) if pid not in stopped]
            for pid in new:
                os.kill(pid, signal.SIGSTOP)
                stopped.append(pid)
            return not new

        try:
            until(stop, "the database stands still")
            yield
        finally:
            for pid in stopped:
                os.kill(pid, signal.SIGCONT)


class Seen:
    """The statuses of all answers that a client was given, in their order. Every `lost`-th never arrives."""

    def __init__(self, lost: int | None = None) -> None:
        self.requests = self.answers = 0
        self.statuses: list[int] = []
        self._lost, self._lock = lost, threading.Lock()

    @property
    def hooks(self) -> dict[str, list[Callable[..., None]]]:
        return {"request": [self._sent], "response": [self._answered]}

    def _sent(self, _request: httpx.Request) -> None:
        with self._lock:
            self.requests += 1

    def _answered(self, response: httpx.Response) -> None:
        with self._lock:
            self.answers += 1
            if self._lost and self.answers % self._lost == 0:
                raise httpx.ReadError("the connection broke before the answer came")
            self.statuses.append(response.status_code)


@contextmanager
def temporary_server(settings: Mapping[str, str]) -> Iterator[Server]:
    # Not pytest's directory: as root, PostgreSQL runs as another user, who may not enter that.
    directory = Path(tempfile.mkdtemp(prefix="millrace-client-"))
    directory.chmod(0o755)
    server = Server(directory, settings)
    try:
        yield server
        server.terminate()
        server.ended()
    finally:
        if server.process and server.process.poll() is None:
            server.kill()
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    with temporary_server({}) as server:
        yield server


@pytest.fixture
def millrace(server: Server) -> Iterator[Millrace]:
    with server.client() as client:
        yield client


@pytest.fixture
def key() -> str:
    """One of this test's own: keys are scoped to the buyer, and buyers have the same names in every test."""
    return uuid.uuid4().hex
