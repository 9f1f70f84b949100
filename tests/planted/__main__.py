"""Test the tests: plant one bug at a time in a copy of the source, and see that the tests turn red.

``python -m tests.planted [NAME ...]``, from the root of the repository. Each ``*.patch`` beside this file says what it
breaks and which tests must notice: each of them must pass on the copy before the patch, and fail after it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
COPIED = ("bbprompt", "optimizers", "backends", "configs", "tests", "pyproject.toml", "README.md")


def seen_by(patch: Path) -> list[str]:
    """The tests that a patch names."""
    found = re.search(r"^Seen by: (.+)$", patch.read_text(encoding="utf-8"), re.MULTILINE)
    assert found, f"{patch.name} does not say which tests see it"
    return found[1].split()


def copied(folder: Path) -> Path:
    """A copy of what the tests need, links kept as links."""
    skip = shutil.ignore_patterns("__pycache__", ".hypothesis", "*.egg-info")
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, symlinks=True, ignore=skip)
        elif source.exists():
            shutil.copy2(source, folder / name)
    return folder


def applied(folder: Path, patch: Path) -> None:
    """Change the copy as the patch says; raises ``CalledProcessError`` where it no longer fits the source."""
    # Outside of any repository, so that git takes the names as they stand.
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(folder.parent)}
    subprocess.run(["git", "apply", str(patch)], cwd=folder, check=True, capture_output=True, env=environment)


def tested(folder: Path, tests: list[str]) -> tuple[int, str]:
    """Run tests of the copy; the exit code and what was said."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    environment["RAY_worker_niceness"] = "0"  # at Ray's low priority its workers hardly start on a busy machine
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *tests],
        cwd=folder,
        check=False,
        capture_output=True,
        text=True,
        env=environment,
    )
    return done.returncode, done.stdout


def main() -> None:
    patches = sorted(HERE.glob("*.patch"))
    if len(sys.argv) > 1:
        patches = [patch for patch in patches if patch.stem in sys.argv[1:]]
    missed = 0
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        sound = copied(root / "sound")
        tests = sorted({test for patch in patches for test in seen_by(patch)})
        code, said = tested(sound, tests)
        if code:
            print(f"the tests fail without any patch:\n{said[-3000:]}")
            sys.exit(1)
        for patch in patches:
            began = time.monotonic()
            folder = copied(root / patch.stem)
            applied(folder, patch)
            unseen = []
            for test in seen_by(patch):
                code, said = tested(folder, [test])
                if code != 1:  # 2 is a module that cannot be collected, which is no test
                    unseen.append(test)
            missed += bool(unseen)
            verdict = f"NOT SEEN by {' '.join(unseen)}" if unseen else f"seen by {' '.join(seen_by(patch))}"
            print(f"{patch.stem}: {verdict} ({time.monotonic() - began:.0f} s)", flush=True)
            shutil.rmtree(folder)
    print(f"{len(patches) - missed} of {len(patches)} planted bugs turn the tests red")
    print(json.dumps({"planted": len(patches), "caught": len(patches) - missed}))
    sys.exit(bool(missed))


if __name__ == "__main__":
    main()
