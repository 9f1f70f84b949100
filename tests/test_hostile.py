"""A real server under requests that mean no good; the counts here are those of every commit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import attacks
import pytest

pytestmark = pytest.mark.slow


def test_there_are_hundreds_of_attacks_and_none_twice() -> None:
    found = list(attacks.attacks())
    assert len({attack.raw for attack in found}) == len(found) > 400
    assert len({attack.name for attack in found}) == len(found)


def test_no_request_harms_the_server() -> None:
    script = Path(__file__).parent / "hostile.py"
    words = [sys.executable, str(script), "--mutants", "40"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    counts = json.loads(done.stdout.splitlines()[-1])
    assert counts["requests"] > 440
    assert counts["401"] > 70
