"""Finished runs that were never run: directories with chosen results, for tables and pages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from bbprompt.config import TuneConfig, load_method
from bbprompt.result import Result
from bbprompt.store.rundir import PROMPT, RESULT, RunDirectory
from bbprompt.tasks.task import load_task


def fake_result(task: str, method: str, seed: int, test: float, **keys: Any) -> Result:
    """A result.

    `keys` may say before, majority, upstream, routed and prompt (scores after stages; a calibration follows a named
    prompt), n, source, budget, metric, baselines, train_calls, seconds.
    """
    metric = keys.get("metric", "accuracy")
    stages = [("upstream", "listing", keys["upstream"])] if "upstream" in keys else []
    stages += [("router", "bo-ucb", keys["routed"])] if "routed" in keys else []
    stages.append(("prompt", "cmaes", keys.get("prompt", test)))
    stages += [("calibration", "newton", test)] if "prompt" in keys else []
    return Result.model_validate(
        {
            "task": task,
            "data": {"source": keys.get("source", "path"), "id": "x", "train": 32, "dev": 32, "test": 100},
            "method": method,
            "backbone": "tiny",
            "prompts": f"prompts of {method}",
            "backend": "local",
            "seed": seed,
            "budget": keys.get("budget", 100),
            "calls": {"train": keys.get("train_calls", 80), "dev": 10, "test": 2},
            "before": {
                "metric": metric,
                "dev": 0.5,
                "test": keys.get("before", 0.5),
                "majority": keys.get("majority", 0.5),
            },
            "stages": [
                {
                    "name": name,
                    "optimizer": optimizer,
                    "calls": 45,
                    "train_loss": 0.4,
                    "dev": 0.75,
                    "test": value,
                    "seconds": 2.0,
                }
                for name, optimizer, value in stages
            ],
            "dev": 0.75,
            "test": {"metric": metric, "value": test, "stderr": 0.04, "n": keys.get("n", 100)},
            "cut_tokens": 0,
            "baselines": [
                {"name": name, "reads": "text", "dev": 0.6, "test": value, "stderr": 0.04, "seconds": 1.0}
                for name, value in keys.get("baselines", {}).items()
            ],
            "seconds": {"total": keys.get("seconds", 10.0), "oracle": 7.0, "optimizer": 1.0, "load": 1.0, "test": 1.0},
            "digest": "0" * 64,
        }
    )


def fake_run(folder: Path, task: str, method: str, seed: int, test: float | None, **keys: Any) -> Path:
    """A run directory of a bundled task and method; without a `test` score it is not finished.

    `keys` as in `fake_result`; also `curve` (rows of calls, stage, loss, dev), `split`, `router`, `weights`, `named`.
    """
    path = folder / keys.get("named", f"{task}-{method}-{seed}")
    manifest = {
        "config": TuneConfig(task=task, method=method, seed=seed).model_dump(mode="json"),
        "method": load_method(method).model_dump(mode="json"),
        "task": load_task(task).model_dump(mode="json"),
        "data": {"source": "path", "id": "x", "few_shot": keys.get("split", f"{task}{seed}"), "test": task},
        "model": {"backbone": "tiny"},
        "threads": 1,
        "versions": {"bbprompt": "0"},
    }
    with RunDirectory.create(path, manifest) as directory:
        for calls, stage, loss, dev in keys.get("curve", [(2, "start", 0.7, 0.5), (90, "prompt", 0.4, 0.75)]):
            directory.append_curve(calls, stage, loss, dev, (1.0, 0.0))
        if test is not None:
            tensors = {"point": np.zeros((2, 3), np.float32)}
            if "router" in keys:
                tensors["router"] = np.asarray(keys["router"], np.float32)
            if "weights" in keys:
                tensors["weights"] = np.asarray(keys["weights"], np.float32)
            directory.write_bytes(PROMPT, save(tensors))
            directory.write_json(RESULT, fake_result(task, method, seed, test, **keys).model_dump(mode="json"))
    return path
