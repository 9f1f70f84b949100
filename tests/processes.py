"""Commands as processes of their own, for tests that send signals."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest


def start(words: list[str], python: Sequence[str] = ("-m", "bbprompt")) -> subprocess.Popen[str]:
    """Start a command, or another way of starting it that `python` says."""
    return subprocess.Popen(
        [sys.executable, *python, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def until(process: subprocess.Popen[str], reached: Callable[[], bool]) -> None:
    """Go on as soon as something has happened; it must happen before the process ends."""
    while not reached():
        try:
            process.wait(timeout=0.02)
        except subprocess.TimeoutExpired:
            continue
        pytest.fail(f"ended with {process.returncode}: {process.communicate()[1]}")


def rows(run: Path) -> int:
    """Rows of a run's curve; 0 before there is one."""
    curve = run / "curve.csv"
    return len(curve.read_bytes().splitlines()) if curve.exists() else 0
