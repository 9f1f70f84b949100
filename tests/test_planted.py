"""The planted bugs of `tests/planted` still fit the source; ``python -m tests.planted`` sees whether the tests do."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PATCHES = sorted((ROOT / "tests" / "planted").glob("*.patch"))


def test_there_are_as_many_as_are_promised() -> None:
    assert len(PATCHES) == 12


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.stem)
def test_a_planted_bug_still_applies(patch: Path) -> None:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    done = subprocess.run(
        ["git", "apply", "--check", str(patch)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"rewrite {patch.name}: {done.stderr}"
