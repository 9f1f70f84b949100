"""Run tests, and see what they reach of the package.

``python tests/covered.py`` runs the tests of the modules that promises rest on: what is not reached of these, line or
branch, is a failure. ``python tests/covered.py --rest [--jobs N]`` runs the whole suite, and of all other modules
together `LEAST` per cent must be reached; `promises.py` does so in its release tier. The last line is a JSON object
with the counts.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from depth import VARIABLE

ROOT = Path(__file__).parent.parent
#: Each module with the tests that stand for it.
MODULES = {
    "store/journal": ["journal"],
    "store/ledger": ["ledger"],
    "store/rundir": ["rundir", "rundir_crashes"],
    "wire": ["wire"],
    "oracle": ["oracle"],
    "backends/http": ["http_oracle", "http_refusals"],
    "backends/calls": ["calls"],
    "backends/deadline": ["deadline"],
}
#: Per cent of the lines and branches of the other modules.
LEAST = 95.0
#: Of these tests, what takes its time in a process of its own, where nothing is measured.
ELSEWHERE = "TestRealServer"
#: Part of the examples that property tests draw here: what they reach, the first ones reach.
DEPTH = "0.1"


def promised(folder: Path) -> dict[str, Any]:
    """What coverage reports of `MODULES` after their tests."""
    tests = [str(ROOT / "tests" / f"test_{test}.py") for names in MODULES.values() for test in names]
    settings = [f"include = {','.join(_modules())}"]
    return _measured(folder, settings, ["-p", "no:xdist", "-k", f"not {ELSEWHERE}", *tests])


def rest(folder: Path, jobs: int) -> dict[str, Any]:
    """What coverage reports of all other modules after the whole suite, its processes included."""
    parts = [str((ROOT / "bbprompt" / name).resolve()) for name in (".", "backends", "optimizers")]
    settings = [
        "parallel = True",
        "patch = subprocess",
        f"include = {','.join(f'{part}/*' for part in parts)}",
        f"omit = {','.join(_modules())}",
    ]
    return _measured(folder, settings, ["-n", str(jobs)])


def _modules() -> list[str]:
    # Real paths: where a folder of the package is a link, the interpreter may know a module under either name.
    return [str((ROOT / "bbprompt" / f"{name}.py").resolve()) for name in MODULES]


def _measured(folder: Path, settings: list[str], tests: list[str]) -> dict[str, Any]:
    text = "\n".join(["[run]", "branch = True", f"data_file = {folder / 'data'}", *settings])
    (folder / "settings").write_text(text + "\n", encoding="utf-8")
    done = _coverage(folder, "run", "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests)
    assert done.returncode == 0, done.stdout[-4000:]
    if "parallel = True" in settings:
        done = _coverage(folder, "combine", "--quiet")
        assert done.returncode == 0, done.stdout + done.stderr
    done = _coverage(folder, "json", "-o", str(folder / "report"))
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads((folder / "report").read_text(encoding="utf-8"))
    return found


def _coverage(folder: Path, command: str, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "coverage", command, f"--rcfile={folder / 'settings'}", *words],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), VARIABLE: DEPTH},
        capture_output=True,
        text=True,
        check=False,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rest", action="store_true")
    parser.add_argument("--jobs", type=int, default=2)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        report = rest(Path(name), given.jobs) if given.rest else promised(Path(name))
    for path, found in report["files"].items():
        summary = found["summary"]
        if given.rest and summary["percent_covered"] >= LEAST:
            continue
        print(f"{path}: {summary['percent_covered']:.1f} %, not reached: {found['missing_lines']}")
        for begin, end in found["missing_branches"]:
            print(f"  from line {begin} to {end}")
    totals = report["totals"]
    reached = round(totals["percent_covered"], 2)
    counts = {"modules": len(report["files"]), "lines": totals["num_statements"], "branches": totals["num_branches"]}
    print(json.dumps({**counts, "per cent": reached}))
    assert given.rest or counts["modules"] == len(MODULES), report["files"].keys()
    sys.exit(reached < (LEAST if given.rest else 100.0))


if __name__ == "__main__":
    main()
