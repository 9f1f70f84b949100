"""Run one training again and again, kill it (SIGKILL) at chosen instants, and go on until it is finished.

Called as `python killedtrain.py RECIPE.json DATA OUT`, with a recipe for prompts or for a language model head. Every
run is a forked process of its own. Writes `OUT/summary.json`: instant -> {"killed": how often, "files": digests of what
is left}.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from bbprompt.backends.trained_head import TrainedHead
from bbprompt.pretrain.lm_recipe import HeadConfig
from bbprompt.pretrain.lm_run import train_head
from bbprompt.pretrain.recipe import PretrainConfig
from bbprompt.pretrain.run import pretrain
from bbprompt.prompts import ModularPrompt
from bbprompt.store.disk import RealDisk

FILES = ("checkpoint.safetensors", "best.safetensors", "artifact/model.safetensors", "artifact/config.json")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(kind: str, number: int) -> None:
    """From now on the process dies at its `number`-th operation of this kind on a file of tensors."""
    left = [number]

    def due(path: Path) -> bool:
        left[0] -= ".safetensors" in path.name
        return not left[0] and ".safetensors" in path.name

    write, sync, replace = RealDisk.write, RealDisk.sync, RealDisk.replace

    def torn(self: RealDisk, file: Any, data: bytes) -> None:
        if due(file.path):
            write(self, file, data[: len(data) // 2])
            die()
        write(self, file, data)

    def unsynced(self: RealDisk, file: Any) -> None:
        if due(file.path):
            die()
        sync(self, file)

    def renamed(self: RealDisk, source: Path, target: Path) -> None:
        replace(self, source, target)
        if due(source):
            die()

    if kind == "write":
        RealDisk.write = torn  # type: ignore[method-assign]
    elif kind == "sync":
        RealDisk.sync = unsynced  # type: ignore[method-assign]
    elif kind == "replace":
        RealDisk.replace = renamed  # type: ignore[method-assign]
    elif kind == "artifact":
        ModularPrompt.save = lambda self, folder, half=True: die()  # type: ignore[method-assign]
        TrainedHead.files = lambda self: die()  # type: ignore[assignment,method-assign]


def outcome(config: PretrainConfig | HeadConfig, data: Path, folder: Path, kind: str, number: int) -> int:
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    try:
        arm(kind, number)
        reports = [number if kind == "step" else 0]

        def report(progress: Any, steps: int) -> None:
            reports[0] -= 1
            if not reports[0]:
                die()

        resume = (folder / "recipe.json").exists()
        if isinstance(config, HeadConfig):
            train_head(config, folder, report, resume=resume)
        else:
            pretrain(config, folder, data, report, resume=resume)
    except BaseException as error:
        print(f"{kind} {number}: {error!r}", file=sys.stderr)
        os._exit(1)
    os._exit(0)


def main() -> None:
    text = Path(sys.argv[1]).read_text()
    kind = HeadConfig if json.loads(text)["kind"] == "lm-head" else PretrainConfig
    config: PretrainConfig | HeadConfig = kind.model_validate_json(text)
    data, out = Path(sys.argv[2]), Path(sys.argv[3])
    plans: dict[str, list[tuple[str, int]]] = {
        "never": [],
        "before the first checkpoint": [("step", 1)],
        "again and again": [("step", 2), ("step", 2), ("write", 1), ("sync", 2), ("replace", 1), ("step", 1)],
        "torn": [("write", 2), ("write", 2)],
        "best but no checkpoint": [("replace", 2)],
        "at the end": [("artifact", 1)],
    }
    summary = {}
    for name, plan in plans.items():
        folder = out / name.replace(" ", "-")
        codes = [outcome(config, data, folder, *instant) for instant in plan]
        if any(code != -signal.SIGKILL for code in codes) or outcome(config, data, folder, "never", 0):
            sys.exit(f"{name}: {codes}")
        lines = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
        for line in lines:
            line.pop("speed", None)
        written = [file for file in FILES if (folder / file).is_file()]
        files = {file: hashlib.sha256((folder / file).read_bytes()).hexdigest() for file in written}
        summary[name] = {"killed": len(codes), "files": files, "log": lines}
    (out / "summary.json").write_text(json.dumps(summary))


if __name__ == "__main__":
    main()
