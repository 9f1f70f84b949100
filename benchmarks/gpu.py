"""A whole search by `mp2-deep` on a model of CPT-large's shape, with the share of the floor that each stage reaches.

32 texts of 128 tokens, 50 of them prompt, budget 8,000; random weights, ledger and journal on disk included. The floor
is the arithmetic that the calls need at the rate of bare bfloat16 products of as many rows as run at once. "mixed" is
what a run takes of itself on a GPU; random weights pass its check of bfloat16 less often than trained ones do.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from transformers import BertForMaskedLM

from bbprompt.backends.local import LocalOracle
from bbprompt.config import load_method, method_with
from bbprompt.readout import Readout
from bbprompt.search.evaluate import Evaluator
from bbprompt.search.tuner import StageTrace, search
from bbprompt.store.journal import Journal
from bbprompt.store.ledger import Ledger
from bbprompt.tasks.task import load_task
from bbprompt.units import best_batch_tokens
from benchmarks.frozen import open_frozen, texts_of
from benchmarks.goal import goal
from benchmarks.setting import Setting

__all__ = ["deep_run", "device_for"]

_LARGE = Setting(
    layers=24, hidden=1024, inner=4096, heads=16, prompt=50, dim=300, shortest=128, longest=128, vocabulary=21128
)
_BUDGET, _TINY_BUDGET = 8000, 60
_TINY_ROUTERS = {"router.calls": 8, "router.random": 4}
#: Seconds on one H200 that are the goal.
_GOALS = {"whole": 60.0, "router": 3.0}


@dataclass(frozen=True)
class _Run:
    """A finished search: its stages, calls, seconds, those of them that were the model's, and precisions used."""

    stages: tuple[StageTrace, ...]
    calls: int
    seconds: float
    asked: float
    used: dict[str, int]


def device_for(small: bool) -> str | None:
    """Where to run: on a GPU; the small form also without one; None for nowhere."""
    return "cuda" if torch.cuda.is_available() else "cpu" if small else None


def deep_run(small: bool, device: str) -> list[str]:
    """Seconds of both stages, what of it is not the model's, and what of the floor is reached."""
    setting = _LARGE.shrunk(small)
    model, rate = setting.model(), _rate(setting, device)
    needed = {"router": setting.flops(0), "prompt": setting.mean_flops}
    lines = [
        f"{setting.layers} layers of {setting.hidden}, {setting.texts} texts of {setting.longest} tokens; bfloat16 "
        f"products run at {rate / 1e12:.1f} TFLOP/s at these shapes.",
        "",
        "| precision | stage | calls | seconds | calls/s | of the bfloat16 floor |",
        "|---|---|---|---|---|---|",
    ]
    told = []
    for dtype in ("bfloat16", "mixed"):
        run = _searched(setting, model, dtype, small, device)
        for trace in run.stages:
            floor = f"{trace.calls * needed[trace.name] / rate / trace.seconds:.1%}"
            lines.append(_line(dtype, trace.name, trace.calls, trace.seconds, floor))
        whole = sum(trace.calls * needed[trace.name] for trace in run.stages) / rate / run.seconds
        lines.append(_line(dtype, "the whole search", run.calls, run.seconds, f"{whole:.1%}"))
        used = "".join(f", {count} populations in {kind}" for kind, count in run.used.items())
        told += ["", f"{dtype}: {1 - run.asked / run.seconds:.1%} of the whole search was not the model's{used}."]
        if not small:
            spent = {"whole": run.seconds, **{trace.name: trace.seconds for trace in run.stages}}
            for name, most in _GOALS.items():
                told += ["", goal(f"{dtype}, {most:.0f} s / {name}", 1.0, [most / spent[name]])]
    return [*lines, *told]


def _line(dtype: str, stage: str, calls: int, seconds: float, floor: str) -> str:
    return f"| {dtype} | {stage} | {calls} | {seconds:.2f} | {calls / seconds:.1f} | {floor} |"


def _searched(setting: Setting, model: BertForMaskedLM, dtype: str, small: bool, device: str) -> _Run:
    from bbprompt.optimizers import cmaes, fitting  # noqa: F401  what they load is no part of a search

    oracle, prompt = open_frozen(setting, model, "span", dtype, device)
    train, dev = (texts_of(setting, "span", seed) for seed in (1, 2))
    method = method_with(load_method("mp2-deep"), {"prompt.patience": None} | (_TINY_ROUTERS if small else {}))
    oracle.score(train.batch, prompt.space.even()[None])  # what a device does once, at its first product
    asked = _timed(oracle)
    with tempfile.TemporaryDirectory() as folder:
        journal = Journal(Path(folder) / "journal.log", "benchmark")
        try:
            ledger = Ledger(journal, _TINY_BUDGET if small else _BUDGET)
            evaluator = Evaluator(oracle, ledger, Readout(), load_task("lcqmc"), train, dev)
            began = time.perf_counter()
            found = search(method, prompt.space, evaluator, 42, lambda status: None)
            seconds = time.perf_counter() - began
        finally:
            journal.close()
    return _Run(found.stages, evaluator.spent, seconds, sum(asked), oracle.precisions)


def _timed(oracle: LocalOracle) -> list[float]:
    """Have the oracle's requests be timed: seconds of each, as they come."""
    usual, seconds = oracle.score, list[float]()

    def score(*request: Any) -> Any:
        began = time.perf_counter()
        scores = usual(*request)
        seconds.append(time.perf_counter() - began)
        return scores

    oracle.score = score  # type: ignore[method-assign, assignment]
    return seconds


@torch.inference_mode()
def _rate(setting: Setting, device: str) -> float:
    """Operations a second of the feed-forward pair in bfloat16; the best of some."""
    rows = min(setting.population * sum(setting.lengths), best_batch_tokens(device))
    up = torch.randn(setting.inner, setting.hidden, device=device, dtype=torch.bfloat16)
    down = torch.randn(setting.hidden, setting.inner, device=device, dtype=torch.bfloat16)
    states = torch.randn(rows, setting.hidden, device=device, dtype=torch.bfloat16)
    best = float("inf")
    for _ in range(10):
        _wait(device)
        began = time.perf_counter()
        F.linear(F.linear(states, up), down)
        _wait(device)
        best = min(best, time.perf_counter() - began)
    return 4 * rows * setting.hidden * setting.inner / best


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
