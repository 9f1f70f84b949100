"""What is not the model: the optimizers of a run, and the time before its first call."""

from __future__ import annotations

import subprocess
import sys
import time

import numpy as np

from bbprompt.config import load_method
from bbprompt.prompts import ModularPrompt, resolve_prompts
from bbprompt.search.stages import Incumbent, prompt_stage, router_stage

__all__ = ["optimizers", "start_up"]

_FIRST_CALL = """
import time; began = time.monotonic()
from bbprompt.config import TuneConfig
from bbprompt.run import prepare
from bbprompt.scoring import labelled
run = prepare(TuneConfig(task="lcqmc", data="sample"))
ready = time.monotonic()
run.oracle.score(labelled(run.task, run.few.train, True).batch, run.prompt.space.even()[None])
print(ready - began, time.monotonic() - ready)
"""


def optimizers(call_ms: float, generations: int = 60) -> list[str]:
    """Seconds that the optimizers of an `mp2-deep` run of 8,000 calls take, losses made up."""
    method = load_method("mp2-deep")
    space = ModularPrompt.load(resolve_prompts(method.prompts)).space
    start, rng = Incumbent(space.even(), 1.0), np.random.default_rng(0)
    if method.router is None or method.prompt is None:
        raise ValueError("mp2-deep has two stages")
    first = router_stage(method.router, space, method.rule, start, 0)
    began, calls = time.process_time(), 0
    while calls < method.router.calls:
        points = first.ask()
        first.tell(rng.normal(size=len(points)))
        calls += len(points)
    router = time.process_time() - began
    second = prompt_stage(method.prompt, start, 0)
    began = time.process_time()
    for _ in range(generations):
        second.tell(rng.normal(size=len(second.ask())))
    each = (time.process_time() - began) / generations
    total = router + each * (8000 - calls) / method.prompt.popsize
    return [
        "| what | CPU seconds |",
        "|---|---|",
        f"| stage I, Gaussian process, {calls} calls | {router:.1f} |",
        f"| stage II, CMA-ES, a generation of {method.prompt.popsize} | {each:.4f} |",
        f"| a run of 8,000 calls | {total:.1f} |",
        f"| share of it at {call_ms:.0f} ms a call | {total / (total + 8 * call_ms):.1%} |",
    ]


def start_up() -> list[str]:
    """Wall seconds of the help and of everything before and in the first call, the best of two."""
    times: list[list[float]] = []
    for _ in range(2):
        began = time.monotonic()
        subprocess.run([sys.executable, "-m", "bbprompt", "--help"], capture_output=True, check=True)
        seconds = time.monotonic() - began
        out = subprocess.run([sys.executable, "-c", _FIRST_CALL], capture_output=True, text=True, check=True).stdout
        times.append([seconds, *map(float, out.split())])
    least = [min(column) for column in zip(*times, strict=True)]
    names = ("`bbprompt --help`", "from start to a ready oracle (imports, model, data)", "the first call itself")
    return ["| what | seconds |", "|---|---|"] + [f"| {n} | {s:.2f} |" for n, s in zip(names, least, strict=True)]
