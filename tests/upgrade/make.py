#!/usr/bin/env python3
"""Makes the data that a release leaves behind when it is killed in the middle of a sale.

    tests/upgrade/make.py COMMIT [VERSION [--binary PATH]]

Builds COMMIT's debug binary in target/upgrade (or takes PATH). Without VERSION it prints the binary's path, for
MILLRACE_OTHER_PROGRAM (CONTRIBUTING.md). Otherwise it sells with the binary on a fresh PostgreSQL of
the oldest version that is supported, and ends it with SIGKILL while orders that it has acknowledged are
in its journal alone. What is left goes to tests/upgrade/VERSION, from which tests/service/upgrade.rs starts:

    database.sql   the schema, by pg_dump --inserts
    journal/       the segments, without the zeros at their ends
    sale.json      settings, every answer that acknowledged an order, and the counters before the kill

Needs git, cargo, and PostgreSQL with psql and pg_dump (postgresql-client-15); everything listens on
loopback alone.
"""

import argparse
import base64
import hashlib
import hmac
import http.client
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
MAJOR = "15"
SECRET = base64.b64encode(b"the secret of the release's tests").decode()
RECEIPT_KEY = "a key that the tests sign receipts with"
YEAR_MS = 31_536_000_000
SEGMENT_BYTES = 65_536
# Seconds that any step may take.
PATIENCE = 60


def main():
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("commit")
    arguments.add_argument("version", nargs="?")
    arguments.add_argument("--binary", type=pathlib.Path)
    arguments = arguments.parse_args()
    commit = output("git", "-C", ROOT, "rev-parse", f"{arguments.commit}^{{commit}}")
    binary = arguments.binary or build(commit)
    if not arguments.version:
        print(binary)
        return
    with tempfile.TemporaryDirectory(prefix="millrace-release-") as place:
        place = pathlib.Path(place)
        place.chmod(0o755)
        with Postgres(place) as postgres:
            sale = sell(binary, postgres, place)
            dump = postgres.dump()
        write(ROOT / "tests/upgrade" / arguments.version, commit, sale, dump, place / "data/journal")


def output(*command):
    return subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True).stdout.strip()


def build(commit):
    """The commit's binary, built as users of plain cargo would."""
    home = ROOT / "target/upgrade"
    source, target = home / commit, home / "build"
    if not source.exists():
        home.mkdir(parents=True, exist_ok=True)
        archive = subprocess.Popen(["git", "-C", ROOT, "archive", commit], stdout=subprocess.PIPE)
        source.mkdir()
        subprocess.run(["tar", "-x", "-C", source], stdin=archive.stdout, check=True)
        if archive.wait() != 0:
            sys.exit("git archive failed")
    environment = os.environ | {"CARGO_TARGET_DIR": str(target)}
    command = ["cargo", "build", "--locked", "--bin", "millrace"]
    subprocess.run(command, cwd=source, env=environment, check=True)
    return target / "debug/millrace"


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Postgres:
    """A server of its own, which ends with the block."""

    def __init__(self, place):
        self.bin = pathlib.Path(output(ROOT / "tests/postgres/install", MAJOR))
        self.data, self.port = place / "postgres", free_port()
        # PostgreSQL refuses to run as root.
        self.user = "postgres" if os.geteuid() == 0 else None
        self.data.mkdir(mode=0o700)
        if self.user:
            shutil.chown(self.data, self.user, self.user)

    def run(self, program, *arguments, **more):
        command = [str(self.bin / program), *map(str, arguments)]
        return subprocess.run(command, user=self.user, check=True, cwd="/", stdout=subprocess.PIPE, **more).stdout

    def __enter__(self):
        self.run("initdb", "-D", self.data, "-U", "millrace", "-A", "trust", "-E", "UTF8", "--no-locale", "--no-sync")
        options = f"-h 127.0.0.1 -p {self.port} -k {self.data} -F"
        self.run("pg_ctl", "-D", self.data, "-l", self.data / "log", "-o", options, "-w", "start", stdin=subprocess.DEVNULL)
        self.sql("CREATE DATABASE millrace", "postgres")
        return self

    def __exit__(self, *_):
        self.run("pg_ctl", "-D", self.data, "-m", "immediate", "-w", "stop")

    def psql(self, database="millrace"):
        return ["-h", "127.0.0.1", "-p", self.port, "-U", "millrace", "-d", database, "-v", "ON_ERROR_STOP=1", "-qAt"]

    def sql(self, statement, database="millrace"):
        return self.run("psql", *self.psql(database), "-c", statement).decode().strip()

    def url(self):
        return f"postgres://millrace@127.0.0.1:{self.port}/millrace?sslmode=disable"

    def dump(self):
        arguments = ["-h", "127.0.0.1", "-p", self.port, "-U", "millrace", "-n", "millrace", "--inserts", "--no-owner", "--no-privileges"]
        text = self.run("pg_dump", *arguments, "millrace").decode()
        # Newer minor versions also write commands for psql alone, and comments name the day's version.
        lines = (line for line in text.splitlines() if not line.startswith(("\\", "--")))
        return "\n".join(line for line in lines if line) + "\n"


class Millrace:
    """The release, with settings that live in its environment alone."""

    def __init__(self, binary, postgres, data):
        self.settings = {
            "database.url": postgres.url(),
            "data_dir": str(data),
            "data_plane.listen": "127.0.0.1:0",
            "control_plane.listen": "127.0.0.1:0",
            "orders.payment_ttl_ms": str(YEAR_MS),
            "orders.idempotency_window_ms": str(YEAR_MS),
            "payments.standard.secret": SECRET,
            "queue.journal.bytes_max": str(16 * SEGMENT_BYTES),
            "receipt.key": RECEIPT_KEY,
            "workers.count": "2",
        }
        data.mkdir()
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MILLRACE_")}
        for name, value in self.settings.items():
            environment["MILLRACE_" + name.upper().replace(".", "__")] = value
        self.log = open(data.parent / "millrace.log", "wb")
        self.process = subprocess.Popen([binary, "serve"], env=environment, stderr=self.log, stdout=self.log)
        self.wait_until_ready(data / "addresses.json")

    def wait_until_ready(self, addresses):
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                break
            try:
                known = json.loads(addresses.read_text())
                self.data, self.control = known["data_plane"], known["control_plane"]
                if self.call(self.control, "GET", "/readyz")[0] == 200:
                    return
            except (OSError, ValueError, KeyError):
                pass
            time.sleep(0.05)
        sys.exit(f"the release did not get ready: {pathlib.Path(self.log.name).read_text()}")

    def call(self, address, method, target, body=None, fields=()):
        connection = http.client.HTTPConnection(address, timeout=PATIENCE)
        text = body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()
        fields = {"Content-Type": "application/json"} | dict(fields) if text else dict(fields)
        connection.request(method, target, text, fields)
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        return answer.status, json.loads(content) if content else None

    def put_sku(self, sku_id, total, **more):
        body = {"unit_price": 100, "currency": "EUR", "total": total} | more
        status, answer = self.call(self.control, "PUT", f"/admin/v1/skus/{sku_id}", body)
        assert 200 <= status < 300, answer

    def order(self, body, key, is_async):
        fields = {"Prefer": "respond-async"} if is_async else {}
        fields |= {"Idempotency-Key": key} if key else {}
        # As it is sent: the attributes count to the byte.
        text = json.dumps(body)
        status, answer = self.call(self.data, "POST", "/v1/orders", text.encode(), fields)
        assert status == (202 if is_async else 201), (status, answer)
        return {"request": body, "body": text, "key": key, "answer": answer}

    def pay(self, number, order_id, amount, receipt):
        data = {"order_id": order_id, "payment_id": f"p-{number}", "amount": amount, "currency": "EUR", "receipt": receipt}
        body = json.dumps({"type": "payment.succeeded", "data": data}).encode()
        at = str(int(time.time()))
        signed = f"m-{number}.{at}.".encode() + body
        signature = base64.b64encode(hmac.digest(base64.b64decode(SECRET), signed, hashlib.sha256)).decode()
        fields = {"webhook-id": f"m-{number}", "webhook-timestamp": at, "webhook-signature": f"v1,{signature}"}
        status, answer = self.call(self.data, "POST", "/v1/payments/standard/notify", body, fields)
        assert 200 <= status < 300, (status, answer)

    def status(self, order):
        order_id = order["answer"]["order_id"]
        return self.call(self.data, "GET", f"/v1/orders/{order_id}")[1]["status"]

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


def sell(binary, postgres, place):
    millrace = Millrace(binary, postgres, place / "data")
    millrace.put_sku("PHONE", 40, per_user_limit=2, title="A phone")
    millrace.put_sku("CASE", 1_000)

    # Rows, in every status that a buyer can bring about.
    rows = []
    for number in range(24):
        body = {"user_id": f"row-{number}", "sku_id": "PHONE" if number % 2 else "CASE", "quantity": 1 + number % 2}
        if number % 3 == 0:
            body |= {"adjustment": 50, "attributes": {"address_id": f"a-{number}", "note": "ü"}}
        rows.append(millrace.order(body, f"key-row-{number}" if number % 4 else None, is_async=number % 5 == 0))
    deadline = time.monotonic() + PATIENCE
    while any(millrace.status(order) == "accepted" for order in rows):
        assert time.monotonic() < deadline, "the first orders are no rows yet"
        time.sleep(0.05)
    pay = lambda number: millrace.pay(number, *(rows[number]["answer"][name] for name in ("order_id", "amount", "receipt")))
    for number in (0, 1, 2):
        pay(number)
    for number in (3, 4):
        order_id = rows[number]["answer"]["order_id"]
        status, answer = millrace.call(millrace.data, "POST", f"/v1/orders/{order_id}/cancel")
        assert status == 200, (status, answer)
    # Too late: its money has to go back.
    pay(4)
    # Nobody's: an orphan.
    millrace.pay(99, "1", 100, None)
    for order in rows:
        order["status"] = millrace.status(order)

    # Acknowledged, and in the journal alone: no batch can be written any more.
    lock = subprocess.Popen(
        [str(postgres.bin / "psql"), *map(str, postgres.psql())], user=postgres.user, cwd="/", stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    lock.stdin.write("BEGIN; LOCK TABLE millrace.orders; SELECT 'locked';\n")
    lock.stdin.flush()
    assert lock.stdout.readline().strip() == "locked"
    in_flight = []
    for number in range(20):
        body = {"user_id": f"flight-{number}", "sku_id": "PHONE" if number % 4 == 0 else "CASE", "quantity": 1 + number % 3 % 2}
        if number % 2:
            body |= {"adjustment": -10, "attributes": {"n": number}}
        in_flight.append(millrace.order(body, f"key-flight-{number}" if number % 5 else None, is_async=True))
    for order in in_flight:
        order["status"] = millrace.status(order)
        assert order["status"] == "accepted", order
    skus = {name: millrace.call(millrace.data, "GET", f"/v1/skus/{name}")[1] for name in ("PHONE", "CASE")}
    millrace.kill()
    postgres.sql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND application_name <> 'psql'")
    lock.stdin.write("ROLLBACK;\n")
    lock.stdin.close()
    lock.wait()
    ids = ",".join(order["answer"]["order_id"] for order in in_flight)
    written = postgres.sql(f"SELECT count(*) FROM millrace.orders WHERE order_id IN ({ids})")
    assert written == "0", f"{written} orders of the journal are rows"
    return {"rows": rows, "in_flight": in_flight, "skus": skus}


def write(place, commit, sale, dump, journal):
    shutil.rmtree(place, ignore_errors=True)
    (place / "journal").mkdir(parents=True)
    (place / "database.sql").write_text(dump)
    for segment in sorted(journal.glob("*.segment")):
        content = segment.read_bytes()
        assert len(content) == SEGMENT_BYTES, segment
        (place / "journal" / segment.name).write_bytes(content.rstrip(b"\0"))
    facts = {
        "commit": commit,
        "made_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "made_by": f"tests/upgrade/make.py {commit[:7]} {place.name}",
        "postgres": MAJOR,
        "segment_bytes": SEGMENT_BYTES,
        "receipt_key": RECEIPT_KEY,
        "secret": SECRET,
    }
    (place / "sale.json").write_text(json.dumps(facts | sale, indent=1, ensure_ascii=False) + "\n")
    print(f"{place}: {len(sale['rows'])} rows, {len(sale['in_flight'])} orders in flight")


if __name__ == "__main__":
    main()
