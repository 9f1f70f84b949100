"""A real server and what its OpenAPI document says of it, compared by schemathesis.

``python tests/openapi.py --examples 300 --seed 1`` sends sound messages, mutants of them and random bytes to every
route, by methods that there are and others, with the token, without and with another. No answer may be a 5xx, have a
status, type or form that the document does not name, or come without the token. The last line is a JSON object with the
counts.
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

import fuzztargets
from attacks import DIGEST, SCORE, SETTINGS, TEXTS
from servers import TOKEN, serving

from bbprompt.testing import ToyOracle
from bbprompt.wire import CONTENT_TYPE

HERE = Path(__file__).parent
ROUTES = 5


def campaign(examples: int, seed: int, *more: str, token: str | None = TOKEN) -> dict[str, Any]:
    """Compare, with so many examples a route and more words for schemathesis; the counts.

    Raises:
        AssertionError: The server does not do as it says; the text has the requests.
    """
    limits = {"points": SETTINGS.points, "texts": SETTINGS.texts, "body": SETTINGS.body}
    sound = (TEXTS, SCORE)
    mutants = [body.hex() for body in fuzztargets.mutants(sound, examples, f"{seed}")]
    messages = {"type": CONTENT_TYPE, "digest": DIGEST, "sound": [body.hex() for body in sound], "mutants": mutants}
    with tempfile.TemporaryDirectory() as folder, serving(ToyOracle(), token=token, **limits) as url:
        (Path(folder) / "messages.json").write_text(json.dumps(messages), encoding="ascii")
        words = ["--config-file", str(HERE / "openapi.toml"), "run", f"{url}/v1/openapi.json"]
        words += ["--header", f"Authorization: Bearer {TOKEN}", "--checks", "all", "--no-color"]
        words += ["--max-examples", str(examples), "--seed", str(seed)]
        words += ["--report", "json", "--report-json-path", "report.json", *more]
        done = subprocess.run(
            [sys.executable, "-m", "schemathesis.cli", *words],
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, str(HERE)])},
        )
        assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
        report = json.loads((Path(folder) / "report.json").read_text())
    assert report["complete"], report["stop_reason"]
    assert report["operations"]["tested"] == ROUTES, report["operations"]
    accepted = sum(part["accepted"] for route in report["valid_rates"].values() for part in route.values())
    return {"seed": seed, "routes": ROUTES, "requests": report["test_cases"]["generated"], "accepted": accepted}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    print(json.dumps(campaign(given.examples, given.seed)))


if __name__ == "__main__":
    main()
