"""The examples of README.md, as they stand there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TOKEN, Server

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def test_there_are_examples() -> None:
    assert len(EXAMPLES) == 2


@pytest.mark.parametrize("example", EXAMPLES, ids=["threads", "asyncio"])
def test_the_example_runs(server: Server, example: str) -> None:
    server.put_sku("IPHONE-15", 100)
    environment = os.environ | {"MILLRACE_URL": server.url, "MILLRACE_TOKEN": TOKEN, "NO_PROXY": "127.0.0.1"}
    # -W error: neither warns, of a connection that was not closed for example.
    command = [sys.executable, "-W", "error", "-c", example]
    ran = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, timeout=120)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert re.fullmatch(r"pay [0-9]+ EUR for order [0-9]+\n", ran.stdout), ran.stdout
