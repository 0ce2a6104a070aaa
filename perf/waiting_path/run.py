#!/usr/bin/env python3
"""Compares two builds of millrace on the path of orders that wait for their row, alternating, and
measures what an acknowledged order costs.

    perf/waiting_path/run.py --before BINARY --after BINARY [--rounds 6] [--seconds 5]

Each round runs each build once, in changing order, on a PostgreSQL of its own: once offered more
than it can take (orders placed a second), once half of the first build's rate (p99 of `201`, and the server's own processor time for each order, which
says more than either where the machine has other work to do). Prints the
ratio after/before of each round's pair: median, least, greatest. With only --after: a lone
acknowledged order (one connection, `respond-async`) beside a lone append and fdatasync of 4 KiB on the same
directory, alternating.
"""
import argparse, itertools, json, os, pathlib, statistics, subprocess, tempfile, time, urllib.request


class Server:
    def __init__(self, binary, scratch):
        self.dir = tempfile.mkdtemp(dir=scratch)
        os.chmod(self.dir, 0o755)
        env = dict(
            os.environ,
            MILLRACE_DATA_DIR=self.dir,
            MILLRACE_DATA_PLANE__LISTEN="127.0.0.1:0",
            MILLRACE_CONTROL_PLANE__LISTEN="127.0.0.1:0",
        )
        self.process = subprocess.Popen([binary, "serve"], env=env, stderr=subprocess.DEVNULL)
        deadline = time.time() + 60
        addresses = pathlib.Path(self.dir, "addresses.json")
        while time.time() < deadline:
            try:
                found = json.loads(addresses.read_text())
                self.data, self.control = found["data_plane"], found["control_plane"]
                urllib.request.urlopen(f"http://{self.control}/readyz").read()
                break
            except Exception:
                time.sleep(0.02)
        for sku, total in (("HOT", 4_000_000_000), ("SOLD-OUT", 1)):
            body = json.dumps({"unit_price": 100, "currency": "EUR", "total": total}).encode()
            request = urllib.request.Request(
                f"http://{self.control}/admin/v1/skus/{sku}", data=body, method="PUT"
            )
            urllib.request.urlopen(request).read()

    def cpu_seconds(self):
        """Of the process itself, so not of PostgreSQL."""
        fields = pathlib.Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def metric(self, name):
        text = urllib.request.urlopen(f"http://{self.control}/metrics").read().decode()
        return next(float(line.split()[1]) for line in text.splitlines() if line.startswith(name + " "))

    def stop(self):
        self.process.terminate()
        self.process.wait()
        subprocess.run(["rm", "-rf", self.dir], check=True)


SEEDS = itertools.count(1)


def load(loader, server, rate, seconds, mode, connections=256, sku="HOT"):
    command = [
        loader, "load", "--target", f"http://{server.data}", "--sku", sku, "--rate", str(rate),
        "--duration", str(seconds), "--mode", mode, "--connections", str(connections),
        "--buyers", "4000000", "--json",
        # Other buyers each time, or they would be told what they bought before.
        "--seed", str(next(SEEDS)),
    ]  # fmt: skip
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    report = json.loads(done.stdout)
    placed = any(row["kind"] in ("created", "accepted") and row["count"] for row in report["answers"])
    if not placed and sku == "HOT":
        raise SystemExit(f"nothing was placed: {report['codes']}")
    return report


def answer(report, kind):
    return next((row for row in report["answers"] if row["kind"] == kind), None)


def spread(ratios):
    return f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"


def compare(options, scratch):
    builds = {"before": options.before, "after": options.after}
    rates, tails, costs, half = [], [], [], None
    for number in range(options.rounds):
        order = ["before", "after"] if number % 2 == 0 else ["after", "before"]
        rate, tail, cost = {}, {}, {}
        for name in order:
            server = Server(builds[name], scratch)
            try:
                load(options.after, server, 2_000, 1, "wait")
                report = load(options.after, server, options.flood, options.seconds, "wait")
                rate[name] = answer(report, "created")["count"] / options.seconds
                half = half or int(rate[name] / 2)
                before = server.cpu_seconds()
                report = load(options.after, server, half, options.seconds, "wait")
                placed = answer(report, "created")
                tail[name] = placed["latency"]["p99_ms"]
                cost[name] = round((server.cpu_seconds() - before) / placed["count"] * 1e6, 2)
            finally:
                server.stop()
        print(
            f"round {number + 1}: placed/s {rate}, at {half}/s p99 ms {tail}, processor µs an order {cost}",
            flush=True,
        )
        rates.append(rate["after"] / rate["before"])
        tails.append(tail["after"] / tail["before"])
        costs.append(cost["after"] / cost["before"])
    print(f"orders placed a second, after/before: {spread(rates)}")
    print(f"p99 of a placed order, after/before:  {spread(tails)}")
    print(f"processor time an order, after/before: {spread(costs)}")


def sync_ms(directory, count):
    path = os.path.join(directory, "probe")
    file = os.open(path, os.O_CREAT | os.O_RDWR)
    os.pwrite(file, bytes(4096 * count), 0)
    os.fsync(file)
    times = []
    for index in range(count):
        started = time.perf_counter()
        os.pwrite(file, os.urandom(4096), index * 4096)
        os.fdatasync(file)
        times.append((time.perf_counter() - started) * 1000)
    os.close(file)
    os.unlink(path)
    return statistics.median(times)


def lone(options, scratch):
    ratios = []
    for number in range(options.rounds):
        # A fresh one each time: the same buyers would be told what they bought before.
        server = Server(options.after, scratch)
        try:
            sync = sync_ms(server.dir, 200)
            report = load(options.after, server, 100, options.seconds, "async", 1)
            accepted = answer(report, "accepted")["latency"]["p50_ms"]
            # What the same way costs without a disk.
            refused = load(options.after, server, 100, options.seconds, "async", 1, sku="SOLD-OUT")
            without = max(refused["answers"], key=lambda row: row["count"])["latency"]["p50_ms"]
            groups = server.metric("millrace_journal_groups_total")
            orders = server.metric("millrace_journal_orders_total")
        finally:
            server.stop()
        print(
            f"round {number + 1}: a sync {sync:.3f} ms, an acknowledged order {accepted:.3f} ms, "
            f"a refused one {without:.3f} ms, syncs an order {groups / orders:.3f}",
            flush=True,
        )
        ratios.append(accepted - without - sync)
    print(f"a lone acknowledged order, beyond a refused one and a sync, ms: {spread(ratios)}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--before")
    parser.add_argument("--after", required=True)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--seconds", type=int, default=5)
    parser.add_argument("--flood", type=int, default=60_000, help="orders a second that are too many")
    parser.add_argument("--scratch", default=None, help="directory on the disk to measure")
    options = parser.parse_args()
    scratch = options.scratch or tempfile.gettempdir()
    if options.before:
        compare(options, scratch)
    lone(options, scratch)


if __name__ == "__main__":
    main()
