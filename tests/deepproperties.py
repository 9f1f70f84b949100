"""Run the property tests with more examples than every commit has.

``python tests/deepproperties.py --times N [--seed N]``; the last line is a JSON object with the counts.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

from depth import VARIABLE

ROOT = Path(__file__).parent.parent


def files() -> list[Path]:
    """The test files whose number of examples can be multiplied."""
    tests = sorted((ROOT / "tests").glob("test_*.py"))
    found = [path for path in tests if "max_examples=deep(" in path.read_text("utf-8")]
    if not found:  # pytest without a file runs all of them
        raise LookupError("no test takes its number of examples from depth.deep")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=float, required=True)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    flags = [
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        f"--hypothesis-seed={given.seed}",
        "--hypothesis-show-statistics",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *flags, *map(str, files())],
        cwd=ROOT,
        env={**os.environ, VARIABLE: str(given.times)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        print(done.stdout[-4000:], done.stderr[-1000:])
        sys.exit(1)
    tests = re.findall(r"^tests/\S+::.+:$", done.stdout, re.MULTILINE)
    passing = [int(count) for count in re.findall(r"(\d+) passing", done.stdout)]
    print(json.dumps({"tests": len(tests), "examples": sum(passing)}))


if __name__ == "__main__":
    main()
