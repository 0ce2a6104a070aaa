"""The examples of README.md, as they stand there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TOKEN, Server, until

from millrace import Millrace, Sku
from millrace.openapi.api.data_plane import get_sku

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def run(server: Server, example: str) -> subprocess.Popen[str]:
    environment = os.environ | {"MILLRACE_URL": server.url, "MILLRACE_TOKEN": TOKEN, "NO_PROXY": "127.0.0.1"}
    # -W error: none warns, of a connection that was not closed for example.
    command = [sys.executable, "-W", "error", "-c", example]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_there_are_examples() -> None:
    assert len(EXAMPLES) == 3


@pytest.mark.parametrize("example", EXAMPLES[:2], ids=["threads", "asyncio"])
def test_the_example_runs(server: Server, example: str) -> None:
    server.put_sku("IPHONE-15", 100)
    ran = run(server, example)
    out, errors = ran.communicate(timeout=120)
    assert (ran.returncode, errors) == (0, "")
    assert re.fullmatch(r"pay [0-9]+ EUR for order [0-9]+\n", out), out


def test_the_example_waits_in_line(server: Server, millrace: Millrace) -> None:
    server.put_sku("PIANO", 1)
    first = millrace.place("u-1", "PIANO").order
    ran = run(server, EXAMPLES[2])

    def waits() -> bool:
        assert ran.poll() is None, ran.communicate()
        sku = get_sku.sync("PIANO", client=millrace.api)
        return isinstance(sku, Sku) and sku.waiting == 1

    until(waits, "the example waits")
    millrace.cancel(first.order_id)
    out, errors = ran.communicate(timeout=120)
    assert (ran.returncode, errors) == (0, "")
    assert re.fullmatch(r"number 1 in line\npay [0-9]+ EUR for order [0-9]+ until .*\n", out), out
