"""Rankings of "mixed" precision beside float32, on the real model, prompts and few-shot texts of a task."""

from __future__ import annotations

import time

import numpy as np

from bbprompt.config import TuneConfig, load_method
from bbprompt.run import Prepared, prepare
from bbprompt.scoring import labelled

__all__ = ["rankings"]

_LAYERS, _SIGMAS, _POPULATION = (1, 5, 8, 11), (0.01, 0.05), 20
_ROUTERS = 4


def rankings(rounds: int, threads: int, task: str = "lcqmc") -> list[str]:
    """Error, Kendall's tau, what was used and what it saves, for routers and for each layer and sigma of stage II."""
    from scipy.stats import kendalltau

    exact, mixed = (_opened(task, dtype, threads) for dtype in ("float32", "mixed"))
    few = labelled(exact.task, exact.few.train, for_loss=True)
    clock = time.process_time if threads == 1 else time.perf_counter
    lines = [
        f"{task}, {len(few.batch.forms)} texts of {exact.data.source}; {rounds} populations a line.",
        "",
        "| population | sd of loss | sd of error | tau, mean | tau, least | scored in | float32 / mixed |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, populations in _cases(exact, rounds):
        found, seconds = [], np.zeros(2)
        before = dict(mixed.oracle.precisions)  # type: ignore[attr-defined]
        for points in populations:
            losses = []
            for i, run in enumerate((exact, mixed)):
                run.oracle.score(few.batch, points[:1])  # the states below the changed layer
                began = clock()
                scores = run.oracle.score(few.batch, points)
                seconds[i] += clock() - began
                losses.append(exact.readout.losses(scores, few.batch, few.gold).mean(axis=1))
            found.append((losses[0].std(), (losses[1] - losses[0]).std(), kendalltau(*losses).statistic))
        spread, error, tau = np.array(found).T
        after = mixed.oracle.precisions  # type: ignore[attr-defined]
        used = {kind: count - before.get(kind, 0) for kind, count in after.items()}
        kinds = ", ".join(f"{count} {kind}" for kind, count in used.items() if count)
        lines.append(
            f"| {name} | {spread.mean():.1e} | {error.mean():.1e} | {tau.mean():.3f} | {tau.min():.3f} | {kinds} | "
            f"{seconds[0] / seconds[1]:.2f} |"
        )
    return lines


def _opened(task: str, dtype: str, threads: int) -> Prepared:
    run = prepare(TuneConfig.model_validate({"task": task, "dtype": dtype, "threads": threads, "test_limit": 1}))
    if not isinstance(run, Prepared):
        raise ValueError("the default method has prompts")
    return run


def _cases(run: Prepared, rounds: int) -> list[tuple[str, list[np.ndarray]]]:
    space, rng = run.prompt.space, np.random.default_rng(0)
    rule = load_method("mp2-deep").rule
    rows = rng.integers(0, 2, (rounds, _ROUTERS, *space.router_shape)).astype(np.float64)
    cases = [(f"{_ROUTERS} routers", [space.mix(some, rule) for some in rows])]
    for layer in _LAYERS:
        for sigma in _SIGMAS:
            populations = []
            for _ in range(rounds):
                points = np.repeat(space.even()[None], _POPULATION, axis=0)
                points[:, layer] += sigma * rng.standard_normal(points[:, layer].shape)
                populations.append(points)
            cases.append((f"layer {layer}, sigma {sigma}", populations))
    return cases
