#!/usr/bin/env python3
"""Whether a test finds each small change of the core: every mutant of cargo-mutants, all of them in one build.

cargo-mutants itself builds the crate once a mutant, which is days. Here its list becomes one build with a switch a mutant
(switch.py). Each test runs once alone and tells which mutants it comes by; a mutant then meets those tests alone, suite after
suite, until one fails. A test that fails without a mutant is left out and named. Every 50th run has no mutant at all: what fails
there is a test that fails by itself, and the summary counts it.

Results are kept in target/mutants/results.jsonl. A killed mutant stays killed while its file is unchanged; one that lives meets
the tests anew.
"""

import argparse
import collections
import concurrent.futures
import hashlib
import json
import math
import os
import pathlib
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time

import switch

ROOT = pathlib.Path.cwd()
OUT = ROOT / "target/mutants"
TREE = OUT / "tree"
# Those without PostgreSQL first: they take a second where the others take ten.
SUITES = "lib,queue,proof,model,pipeline,store,payments,service,nodes,draw,cluster,events,log_conformance"
# The tests of the suite `proof`: the proofs that need nothing beside the processor, briefly.
PROOFS = ["crash_states 300", "every_byte 300", "nth_call 2", "order_log 40", "simulation 1"]
# Tests of one process, the quickest first: a suite with PostgreSQL starts a server in each.
GROUP = 8


def cargo(*arguments):
    """Runs cargo in the copied tree, and returns its messages and its exit code."""
    # A directory of its own: cargo would take the tree for the repository itself.
    env = dict(os.environ, CARGO_TARGET_DIR=str(OUT / "build"), CARGO_PROFILE_DEV_DEBUG="0", CARGO_INCREMENTAL="1")
    run = subprocess.run(["cargo", *arguments, "--message-format=json"], cwd=TREE, env=env, stdout=subprocess.PIPE)
    return [json.loads(line) for line in run.stdout.splitlines() if line.startswith(b"{")], run.returncode


def write(path, text):
    """Leaves a file alone that has this text, so that cargo does too."""
    if not path.exists() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


# --- The build ------------------------------------------------------------------------------


def listed(files):
    chosen = [word for file in files for word in ("--file", file)]
    text = subprocess.run(["cargo", "mutants", "--list", "--json", *chosen], stdout=subprocess.PIPE, check=True).stdout
    return dict(enumerate(json.loads(text), 1))


def copy_tree(changed):
    """The tree beside the mutants; lints of the crate are not asked of its mutants."""
    names = subprocess.run(["git", "ls-files", "-coz", "--exclude-standard"], stdout=subprocess.PIPE, check=True).stdout
    names = {name for name in names.decode().split("\0") if (ROOT / name).is_file()}
    for name in names - changed - {"src/lib.rs", "Cargo.toml"}:
        source, copy = ROOT / name, TREE / name
        if not copy.exists() or source.read_bytes() != copy.read_bytes():
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, copy)
    for gone in {str(path.relative_to(TREE)) for path in (TREE / "src").rglob("*.rs")} - names - {"src/mutant.rs"}:
        (TREE / gone).unlink()
    before, modules = (ROOT / "src/lib.rs").read_text().split("\npub mod ", 1)
    lints = "#![allow(warnings, arithmetic_overflow, unconditional_panic)]\npub mod mutant;"
    write(TREE / "src/lib.rs", f"{before}\n{lints}\npub mod {modules}")
    write(TREE / "src/mutant.rs", switch.RUNTIME)
    manifest = (ROOT / "Cargo.toml").read_text()
    write(TREE / "Cargo.toml", re.sub(r"(?ms)^\[lints\.\w+\]\n.*?(?=^\[|\Z)", "", manifest))


def build(mutants):
    """Writes all mutants into the tree but those that the compiler refuses. Returns why each of the others is not in it."""
    by_file = collections.defaultdict(dict)
    for n, mutant in mutants.items():
        by_file[mutant["file"]][n] = mutant
    files = {name: switch.File((ROOT / name).read_bytes(), some) for name, some in by_file.items()}
    out = {n: why for file in files.values() for n, why in file.left.items()}
    copy_tree(set(files))
    # A mutant that was refused once needs no second compilation while its file is unchanged.
    memory = OUT / "refused.json"
    known = json.loads(memory.read_text()) if memory.exists() else {}
    out |= {n: known[key(mutant)] for n, mutant in mutants.items() if key(mutant) in known}
    while True:
        texts = {name: file.render(out) for name, file in files.items()}
        for name, text in texts.items():
            write(TREE / name, text)
        messages, code = cargo("check", "--lib", "--features", "faults,fuzz")
        if code == 0:
            return out
        refused, unplaced = {}, []
        for message in (each["message"] for each in messages if each["reason"] == "compiler-message"):
            if message["level"] == "error" and message["spans"]:
                blamed = blame(message, texts, by_file, out)
                refused |= {n: f"refused: {(message['code'] or {}).get('code')}" for n in blamed}
                unplaced += [] if blamed else [message["rendered"]]
        print(f"the compiler refuses {len(refused)} more", flush=True)
        if not refused:
            sys.exit("the tree with its mutants does not compile:\n" + "\n".join(unplaced))
        out |= refused
        known |= {key(mutants[n]): why for n, why in refused.items()}
        write(memory, json.dumps(known))


def blame(message, texts, by_file, out):
    """The mutants that an error is due to: those around its place, else those of its function that can cause such a one."""
    spans = sorted((span for span in message["spans"] if span["file_name"] in texts), key=lambda span: not span["is_primary"])
    for span in spans:
        text = texts[span["file_name"]].encode()
        blamed = [n for n in switch.blamed(text, span["byte_start"], span["byte_end"]) if n not in out]
        if blamed:
            return blamed
    genre = "MatchArm" if (message["code"] or {}).get("code") == "E0004" else "FnValue"
    for span in spans:
        # A switch adds no line, so lines are those of the source.
        blamed = [
            n
            for n, mutant in by_file[span["file_name"]].items()
            if n not in out and mutant["genre"] == genre and mutant["function"]
            and mutant["function"]["span"]["start"]["line"] <= span["line_start"] <= mutant["function"]["span"]["end"]["line"]
        ]
        if blamed:
            return blamed
    return []


def binaries(suites):
    """The test program of each suite, in this order."""
    chosen = [word for suite in suites for word in (["--lib"] if suite == "lib" else ["--test", suite])]
    messages, code = cargo("test", "--no-run", *chosen)
    if code != 0:
        sys.exit("the tests do not compile with the mutants")
    made = {
        "lib" if "lib" in each["target"]["kind"] else each["target"]["name"]: each["executable"]
        for each in messages
        if each["reason"] == "compiler-artifact" and each["executable"] and each["profile"]["test"]
    }
    return {suite: made[suite] for suite in suites}


# --- The runs -------------------------------------------------------------------------------


class Suite:
    """A test program, and which mutants each of its tests comes by."""

    def __init__(self, name, program, jobs):
        self.name, self.program = name, program
        self.group = 1 if name == "proof" else GROUP
        digest = hashlib.sha256(pathlib.Path(program).read_bytes()).hexdigest()
        memory = OUT / f"reached-{name}.json"
        if memory.exists() and (known := json.loads(memory.read_text()))["digest"] == digest:
            self.tests = known["tests"]
        else:
            with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
                names = sorted(set(self.list()) - set(self.list("--ignored")))
                self.tests = dict(zip(names, pool.map(self.reach, names)))
            write(memory, json.dumps({"digest": digest, "tests": self.tests}))
        self.by_mutant = collections.defaultdict(list)
        for test, run in sorted(self.tests.items(), key=lambda item: item[1]["seconds"]):
            for n in run["mutants"] if run["end"] is None else ():
                self.by_mutant[n].append(test)
        fail = {test: run["end"] for test, run in self.tests.items() if run["end"]}
        print(f"{name}: {len(self.tests)} tests come by {len(self.by_mutant)} mutants; without a mutant fail {fail or 'none'}", flush=True)

    def list(self, *options):
        if self.name == "proof":
            return [] if options else PROOFS
        command = [self.program, "--list", "--format", "terse", *options]
        lines = subprocess.run(command, cwd=TREE, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()
        return [line.removesuffix(": test") for line in lines if line.endswith(": test")]

    def reach(self, test):
        with tempfile.NamedTemporaryFile() as reached:
            began = time.monotonic()
            end = self.run([test], {"MUTANTS_REACHED": reached.name}, 600, 600)
            return {"seconds": time.monotonic() - began, "end": end, "mutants": sorted(set(map(int, reached.read().split())))}

    def meet(self, n, most=None):
        """The test that fails with mutant `n`, or what else ends it; None if it lives."""
        tests = self.by_mutant[n][:most]
        for at in range(0, len(tests), self.group):
            group = tests[at:at + self.group]
            seconds = sum(self.tests[test]["seconds"] for test in group)
            # A busy loop is told by its processor time, which a loaded machine does not stretch.
            end = self.run(group, {"MUTANT": str(n)}, 20 + 5 * int(seconds), 60 + 10 * int(seconds))
            if end:
                return end
        return None

    def run(self, tests, variables, processor_seconds, seconds):
        def limit():
            resource.setrlimit(resource.RLIMIT_CPU, (processor_seconds, processor_seconds))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_AS, (16 << 30, 16 << 30))

        with tempfile.TemporaryDirectory(prefix="mutants-", ignore_cleanup_errors=True) as own:
            os.chmod(own, 0o755)
            arguments = tests[0].split() if self.name == "proof" else ["--exact", "--test-threads", "2", *tests]
            process = subprocess.Popen(
                [self.program, *arguments], cwd=TREE, start_new_session=True, preexec_fn=limit,
                env=dict(os.environ, TMPDIR=own, RUST_BACKTRACE="0", MILLRACE_SEED="1", PROPTEST_FAILURE_PERSISTENCE="off", **variables),
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, errors="replace",
            )
            late = threading.Event()
            timer = threading.Timer(seconds, lambda: (late.set(), kill(process)))
            timer.start()
            failed = None
            for line in process.stdout:
                if match := re.match(r"test (\S+).* \.\.\. FAILED", line):
                    failed = match.group(1)
                    kill(process)
                    break
            code = process.wait()
            timer.cancel()
            end_servers(pathlib.Path(own))
        if failed:
            return failed
        if late.is_set() or code in (-signal.SIGXCPU, -signal.SIGKILL):
            return "timeout"
        return f"{tests[0] if self.name == 'proof' else 'exit'} {code}" if code else None


def kill(process):
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def end_servers(directory):
    """Ends what a killed test left behind: PostgreSQL has a session of its own."""
    for file in directory.glob("**/postmaster.pid"):
        try:
            server = int(file.read_text().split()[0])
            os.kill(server, signal.SIGQUIT)
            for _ in range(200):
                os.kill(server, 0)
                time.sleep(0.05)
        except (OSError, ValueError, IndexError):
            pass


DIGESTS = {}


def key(mutant):
    """A mutant's name with the text of its file, up to the file's own tests."""
    file = mutant["file"]
    if file not in DIGESTS:
        code = re.split(rb"\n#\[cfg\(test\)\]\n(?:pub\S* )?mod tests", (ROOT / file).read_bytes())[0]
        DIGESTS[file] = hashlib.sha256(code).hexdigest()[:12]
    return f"{DIGESTS[file]} {mutant['name']}"


class Results:
    """What became of each mutant: the last line about it counts."""

    def __init__(self):
        self.path = OUT / "results.jsonl"
        self.lock = threading.Lock()
        lines = self.path.read_text().splitlines() if self.path.exists() else ()
        self.of = {line["key"]: line for line in map(json.loads, lines)}

    def add(self, mutant, suite, end, reached):
        line = {"key": key(mutant), "suite": suite, "end": end, "reached": reached}
        with self.lock, self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
            self.of[line["key"]] = line


def meet_all(mutants, numbers, suites, results, options):
    controls, spurious = 0, []
    began, last = time.monotonic(), time.monotonic()

    def one(n):
        reached = 0
        for suite in suites:
            tests = suite.by_mutant[n]
            reached += len(tests)
            if end := suite.meet(n, options.tests):
                results.add(mutants[n], suite.name, end, reached)
                return
        results.add(mutants[n], None, None, reached)

    def control(n):
        for suite in suites:
            if tests := suite.by_mutant[n][: options.tests]:
                if end := suite.run(tests[: suite.group], {"MUTANT": "0"}, 600, 600):
                    spurious.append((suite.name, end))
                return

    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        runs = []
        for at, n in enumerate(numbers):
            if at % 50 == 49:
                controls += 1
                runs.append(pool.submit(control, n))
            runs.append(pool.submit(one, n))
        try:
            for done, run in enumerate(concurrent.futures.as_completed(runs), 1):
                run.result()
                if time.monotonic() - last > 60:
                    last = time.monotonic()
                    print(f"{done} of {len(runs)} in {last - began:.0f} s", flush=True)
        except KeyboardInterrupt:
            print("interrupted: the rest is not run")
            pool.shutdown(cancel_futures=True)
    print(f"controls: {controls} runs without a mutant, {len(spurious)} failed {spurious or ''}")


# --- The summary ----------------------------------------------------------------------------


def interval(part, whole):
    """Wilson's 95 % interval of a share, in per cent."""
    z, p = 1.96, part / whole
    middle, width = p + z * z / (2 * whole), z * math.sqrt(p * (1 - p) / whole + z * z / (4 * whole * whole))
    return tuple(100 * (middle + sign * width) / (1 + z * z / whole) for sign in (-1, 1))


def area(file):
    folders = file.removeprefix("src/").split("/")[:-1]
    return "::".join(folders[:2]) if folders[0] != "store" else "store::batch"


def summary(mutants, out, results):
    counts = collections.defaultdict(collections.Counter)
    lives = []
    for n, mutant in mutants.items():
        result = results.of.get(key(mutant))
        if n in out:
            kind = "unviable" if out[n].startswith("refused") else "no switch"
        elif result is None:
            kind = "not run"
        elif result["end"]:
            kind = "timeout" if result["end"] == "timeout" else "killed"
        else:
            kind = "missed"
            lives.append(f"{mutant['name']}{'' if result['reached'] else ' (no test comes by)'}")
        for row in (area(mutant["file"]), "all"):
            counts[row][kind] += 1
    kinds = ["killed", "timeout", "missed", "unviable", "no switch", "not run"]
    print(f"{'area':24}" + "".join(f"{kind:>10}" for kind in kinds) + "   found")
    for row in sorted(counts, key=lambda row: (row == "all", row)):
        found, whole = counts[row]["killed"] + counts[row]["timeout"], sum(counts[row][kind] for kind in kinds[:3])
        share = "" if not whole else f"   {100 * found / whole:.1f} %"
        if whole and counts[row]["not run"]:
            share += " ({:.1f} to {:.1f})".format(*interval(found, whole))
        print(f"{row:24}" + "".join(f"{counts[row][kind]:10}" for kind in kinds) + share)
    write(OUT / "missed.txt", "".join(f"{line}\n" for line in lives))
    print("missed: target/mutants/missed.txt")


def main():
    parser = argparse.ArgumentParser(prog="./x mutants", description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="*", metavar="FILE", help="only mutants of these files")
    parser.add_argument("--sample", type=int, metavar="N", help="N mutants, chosen by the seed")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--suites", default=SUITES, help=f"in this order ({SUITES})")
    parser.add_argument("--tests", type=int, metavar="N", help="at most the N quickest tests of a suite")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    options = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    mutants = listed(options.files)
    out = build(mutants)
    results = Results()
    programs = binaries(options.suites.split(","))
    suites = [Suite(name, program, options.jobs) for name, program in programs.items()]
    numbers = [n for n in mutants if n not in out]
    if options.sample:
        numbers = random.Random(options.seed).sample(numbers, min(options.sample, len(numbers)))
    numbers = [n for n in numbers if not (results.of.get(key(mutants[n])) or {}).get("end")]
    meet_all(mutants, numbers, suites, results, options)
    summary(mutants, out, results)


main()
