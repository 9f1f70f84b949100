"""Run one descent again and again, kill it (SIGKILL) at chosen instants, and go on until it is finished.

Called as `python killeddescent.py CONFIG.json OUT`. Every run is a forked process of its own, so that nothing but the
run directory survives a kill. Writes `OUT/summary.json`: plan -> how often it was killed, how many steps were made in
all, and what came out.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from killed import Killer

from bbprompt.config import TuneConfig
from bbprompt.gradient.checkpoint import CHECKPOINT
from bbprompt.gradient.descent import Descent
from bbprompt.gradient.method import PreparedGradient
from bbprompt.run import prepare, reopen, tune
from bbprompt.store.rundir import RESULT, RunDirectory

PLANS: dict[str, list[tuple[str, int]]] = {
    "never": [],
    "never either": [],
    "first step": [("step", 1)],
    "before a checkpoint": [("step", 2), ("step", 2), ("checkpoint", 1)],
    "each part": [("saved", 1), ("step", 2), ("saved", 1), ("checkpoint", 1), ("testing", 1), ("result", 1)],
    "again and again": [("step", 3)] * 3 + [("saved", 1)],
    "testing": [("testing", 1), ("testing", 1)],
}


def child(run: PreparedGradient, folder: Path, killer: Killer, steps: Path) -> None:
    """Begin or go on, in this process; never returns."""
    step, write = Descent._step, RunDirectory.write_bytes

    def counted(self: Descent, *args: Any) -> dict[str, float]:
        killer.at("step")
        with steps.open("a") as file:
            file.write("x")
        return step(self, *args)

    def watched(self: RunDirectory, name: str, data: bytes) -> None:
        if name == CHECKPOINT:
            killer.at("checkpoint")
        if name == RESULT:
            killer.at("result")
        write(self, name, data)
        if name == CHECKPOINT:
            killer.at("saved")

    try:
        Descent._step, RunDirectory.write_bytes = counted, watched  # type: ignore[method-assign]
        if folder.exists():
            directory, config = reopen(folder, writable=True)
            assert config == run.config
        else:
            directory = RunDirectory.create(folder, run.manifest())
        with directory:
            tune(run, directory, killer)
    except BaseException as error:
        print(f"{killer.kind} {killer.left}: {error!r}", file=sys.stderr)
        os._exit(1)
    os._exit(0)


def outcome(run: PreparedGradient, folder: Path, killer: Killer, steps: Path) -> int:
    pid = os.fork()
    if not pid:
        child(run, folder, killer, steps)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def main() -> None:
    config, out = TuneConfig.model_validate_json(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    run = prepare(config)
    assert isinstance(run, PreparedGradient)
    summary = {}
    for name, plan in PLANS.items():
        folder, steps = out / name.replace(" ", "-"), out / f"{name}.steps"
        killed = 0
        for kind, number in plan:
            code = outcome(run, folder, Killer(kind, number), steps)
            killed += code == -signal.SIGKILL
            if code not in (0, -signal.SIGKILL):
                sys.exit(1)
            assert code == 0 or not (folder / RESULT).exists()
        if outcome(run, folder, Killer("never", 1), steps):
            sys.exit(1)
        result = json.loads((folder / RESULT).read_text())
        summary[name] = {
            "killed": killed,
            "planned": len(plan),
            "steps": len(steps.read_text()),
            "digest": result["digest"],
            "calls": result["calls"],
            "prompt": hashlib.sha256((folder / "prompt.safetensors").read_bytes()).hexdigest(),
            "journal": hashlib.sha256((folder / "journal.log").read_bytes()).hexdigest(),
            "curve": [row.rsplit(",", 2)[0] for row in (folder / "curve.csv").read_text().splitlines()],
            "files": sorted(path.name for path in folder.iterdir()),
        }
    (out / "summary.json").write_text(json.dumps(summary))


if __name__ == "__main__":
    main()
