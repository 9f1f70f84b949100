"""The best cheap method beside each run: what tunes no prompt and was fitted and tested on the same examples.

It counts as a run of its own, where the sweep has some, and as what a search's result shows beside it.
"""

from __future__ import annotations

from collections.abc import Sequence

from bbprompt.compare.runs import FinishedRun

__all__ = ["best_cheap"]


def best_cheap(runs: Sequence[FinishedRun]) -> dict[int, tuple[str, float]]:
    """Place of a run -> name and test score of the best cheap method on its examples, where there is one.

    Best on test, which flatters them: the rows that they stand against are chosen on train and dev alone.
    """
    best: dict[tuple[str, int, str, str], tuple[str, float]] = {}
    for run in runs:
        found = [(rival.name, rival.test) for rival in run.result.baselines]
        found += [(run.row, run.result.test.value)] if run.baseline else []
        for name, test in found:
            if _examples(run) not in best or test > best[_examples(run)][1]:
                best[_examples(run)] = name, test
    return {run.place: best[_examples(run)] for run in runs if _examples(run) in best}


def _examples(run: FinishedRun) -> tuple[str, int, str, str]:
    return run.result.task, run.result.seed, run.split, run.test
