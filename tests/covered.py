"""Run the tests of the modules that promises rest on, and see that they reach every line and branch of them.

``python tests/covered.py``; the last line is a JSON object with the counts, and what is not reached is a failure.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

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
}


def measured(folder: Path) -> dict[str, Any]:
    """What coverage reports of `MODULES` after their tests."""
    # Real paths: where a folder of the package is a link, the interpreter may know a module under either name.
    sources = [str((ROOT / "bbprompt" / f"{name}.py").resolve()) for name in MODULES]
    settings = ["[run]", "branch = True", f"data_file = {folder / 'data'}", f"include = {','.join(sources)}"]
    (folder / "settings").write_text("\n".join(settings) + "\n", encoding="utf-8")
    tests = [str(ROOT / "tests" / f"test_{test}.py") for names in MODULES.values() for test in names]
    pytest = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *tests]
    done = _coverage(folder, "run", *pytest)
    assert done.returncode == 0, done.stdout[-4000:]
    done = _coverage(folder, "json", "-o", str(folder / "report"))
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads((folder / "report").read_text(encoding="utf-8"))
    return found


def _coverage(folder: Path, command: str, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "coverage", command, f"--rcfile={folder / 'settings'}", *words],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        report = measured(Path(name))
    missed = 0
    for path, found in report["files"].items():
        summary = found["summary"]
        missed += summary["missing_lines"] + summary["missing_branches"]
        print(f"{path}: {summary['percent_covered']:.1f} %, not reached: {found['missing_lines']}")
        for begin, end in found["missing_branches"]:
            print(f"  from line {begin} to {end}")
    assert len(report["files"]) == len(MODULES), report["files"].keys()
    totals = report["totals"]
    print(json.dumps({"modules": len(MODULES), "lines": totals["num_statements"], "branches": totals["num_branches"]}))
    sys.exit(bool(missed))


if __name__ == "__main__":
    main()
