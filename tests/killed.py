"""Run one search again and again, kill it (SIGKILL) at chosen instants, and go on until it is finished.

Called as `python killed.py CONFIG.json OUT`. Every run is a forked process of its own, so that nothing but the run
directory survives a kill. Writes `OUT/summary.json`: instant -> {"killed": how often, "digest": ..., "prompt": hex}.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from bbprompt.config import TuneConfig
from bbprompt.run import Prepared, Watcher, prepare, reopen, tune
from bbprompt.store.rundir import RESULT, RunDirectory


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Killer(Watcher):
    """Kills the process at the n-th of its kind of event."""

    def __init__(self, kind: str, number: int) -> None:
        self.kind, self.left = kind, number

    def at(self, kind: str) -> None:
        if kind == self.kind:
            self.left -= 1
            if not self.left:
                die()

    def status(self, status: Any) -> None:
        self.at("settled")

    def testing(self, done: int, total: int) -> None:
        self.at("testing")


class Watched:
    """An oracle that tells the killer before and after it scores."""

    def __init__(self, inner: Any, killer: Killer) -> None:
        self.inner, self.killer, self.info = inner, killer, inner.info

    def score(self, *request: Any) -> Any:
        self.killer.at("sent")
        scores = self.inner.score(*request)
        self.killer.at("answered")
        return scores

    def close(self) -> None:
        self.inner.close()


def child(run: Prepared, folder: Path, killer: Killer) -> None:
    """Begin or go on, in this process; never returns."""
    try:
        if folder.exists():
            directory, config = reopen(folder, writable=True)
            assert config == run.config
        else:
            directory = RunDirectory.create(folder, run.manifest())
        if killer.kind == "result":
            # Between prompt.safetensors and result.json.
            directory.write_json = lambda name, value: die()  # type: ignore[method-assign]
        with directory:
            tune(replace(run, oracle=Watched(run.oracle, killer)), directory, killer)
    except BaseException as error:
        print(f"{killer.kind} {killer.left}: {error!r}", file=sys.stderr)
        os._exit(1)
    os._exit(0)


def outcome(run: Prepared, folder: Path, killer: Killer) -> int:
    pid = os.fork()
    if not pid:
        child(run, folder, killer)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def main() -> None:
    config, out = TuneConfig.model_validate_json(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    run = prepare(config)
    summary = {}
    plans: dict[str, list[tuple[str, int]]] = {
        "never": [],
        "first call": [("sent", 1)],
        "each part": [("answered", 2), ("sent", 3), ("settled", 2), ("answered", 4), ("testing", 1), ("result", 1)],
        "again and again": [("sent", 3)] * 3 + [("answered", 2)] * 2 + [("settled", 4)],
        "testing": [("testing", 1), ("testing", 1)],
        "result": [("result", 1)],
    }
    for name, plan in plans.items():
        folder = out / name.replace(" ", "-")
        killed = 0
        for kind, number in plan:
            code = outcome(run, folder, Killer(kind, number))
            killed += code == -signal.SIGKILL
            if code not in (0, -signal.SIGKILL):
                sys.exit(1)
            assert code == 0 or not (folder / RESULT).exists()
        if outcome(run, folder, Killer("never", 1)):
            sys.exit(1)
        result = json.loads((folder / RESULT).read_text())
        summary[name] = {
            "killed": killed,
            "planned": len(plan),
            "digest": result["digest"],
            "calls": result["calls"],
            "cut": result["cut_tokens"],
            "prompt": hashlib.sha256((folder / "prompt.safetensors").read_bytes()).hexdigest(),
            "journal": hashlib.sha256((folder / "journal.log").read_bytes()).hexdigest(),
            "curve": [row.rsplit(",", 2)[0] for row in (folder / "curve.csv").read_text().splitlines()],
        }
    (out / "summary.json").write_text(json.dumps(summary))


if __name__ == "__main__":
    main()
