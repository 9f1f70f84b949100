"""The choice among what a search looked at: by the rule of the method, and by train and dev alone."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toyruns
from numpy.typing import NDArray
from toyruns import METHODS, looks_of

from bbprompt.config import method_with
from bbprompt.readout import Readout
from bbprompt.search.choice import clearly_lower
from bbprompt.search.evaluate import DevScore
from bbprompt.search.tuner import Look

# -------------------------------------------------------------------------------------------- the looks


@pytest.mark.parametrize("select", ["dev-loss", "pooled-loss", "dev-metric"])
def test_the_choice_follows_the_rule(select: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bbprompt.search import tuner

    seen: list[Look] = []
    original = tuner._Search.looks

    def watched(self: tuner._Search, *rest: Any, **keys: Any) -> bool:
        made = original(self, *rest, **keys)
        seen.extend(self._looks[len(seen) :])
        return made

    monkeypatch.setattr(tuner._Search, "looks", watched)
    method = method_with(METHODS["both"], {"select": select})
    found, _, _ = toyruns.run(tmp_path, method, 200)
    value = {
        "dev-loss": lambda look: look.dev_loss,
        "pooled-loss": lambda look: look.dev_loss + look.incumbent.loss,
        "dev-metric": lambda look: -look.dev_metric,
    }[select]
    assert len(seen) > 5
    best = min(map(value, seen))
    assert value(found.chosen) == best
    first = next(look for look in seen if value(look) == best)
    assert found.chosen is first, "the earliest of equals"
    assert found.chosen is found.stages[-1].chosen
    # A stage's choice is never worse than the one before.
    values = list(map(value, looks_of(found)))
    assert all(after <= before for before, after in itertools.pairwise(values))


def test_a_searched_prompt_must_lower_both_losses(tmp_path: Path) -> None:
    from bbprompt.search import tuner
    from bbprompt.search.stages import Incumbent

    point = np.zeros((3, 4))
    run = tuner._Search(method_with(METHODS["both"], {"select": "both-losses"}), None, lambda status: None)  # type: ignore[arg-type]

    def chosen(*looks: tuple[float, float, bool]) -> int:
        run._looks = [
            Look(Incumbent(point, train), DevScore(dev, 0.5, ((dev,),)), Readout(), (train,), searched)
            for train, dev, searched in looks
        ]
        return run._looks.index(run.chosen)

    assert chosen((0.7, 0.7, False), (0.4, 0.8, False)) == 1, "unsearched: both losses together"
    assert chosen((0.7, 0.7, False), (0.1, 0.71, True)) == 0, "searched: a low train loss is not enough"
    assert chosen((0.7, 0.7, False), (0.6, 0.65, True)) == 1
    assert chosen((0.4, 0.8, False), (0.9, 0.75, True)) == 0
    assert chosen((0.7, 0.7, False), (0.7, 0.7, False)) == 0, "the earliest of equals"


def test_a_searched_prompt_must_be_clearly_ahead() -> None:
    held = (0.5, 1.0, 0.5, 1.0)
    # The same gain on every text, and one of the same mean that is that of one text alone (standard error .1).
    steady = (0.4, 0.9, 0.4, 0.9)
    lucky = (0.1, 1.0, 0.5, 1.0)
    assert clearly_lower(steady, held, 100.0)
    assert clearly_lower(lucky, held, 0.99)
    assert not clearly_lower(lucky, held, 1.01)
    assert not clearly_lower(held, held, 0.0)


def test_how_sure_a_prompt_is_counts_for_nothing_when_tempered(tmp_path: Path) -> None:
    """A prompt of ten times the scores is as good as itself, and better than one that tells nothing."""
    from bbprompt.readout import TEMPERATURES
    from bbprompt.search import tuner
    from bbprompt.search.stages import Incumbent

    right = np.array([1.0, 1.0, 1.0, -1.0])  # by how much the right option is ahead on each text

    def look(scale: float, ahead: NDArray[np.float64]) -> Look:
        rows = [np.logaddexp(0.0, -scale * ahead / temperature) for temperature in TEMPERATURES]
        dev = DevScore(float(rows[1].mean()), 0.75, tuple(map(tuple, rows)))
        return Look(Incumbent(np.zeros((3, 4)), dev.loss), dev, Readout(), tuple(row.mean() for row in rows))

    sure, unsure, empty = look(10.0, right), look(1.0, right), look(1.0, 0.0 * right)
    method = method_with(METHODS["both"], {"select": "both-losses", "tempered": True})
    assert sure.dev.loss > empty.dev.loss, "by the plain loss it would be the worse one"
    assert tuner.better(method, sure, empty)
    assert not tuner.better(method, empty, sure)
    assert sure.pooled_loss == pytest.approx(unsure.pooled_loss, abs=0.05)
    assert len(sure.dev_losses) == 4
    assert np.mean(sure.dev_losses) < np.mean(empty.dev_losses)


@pytest.mark.parametrize("name", ["joint", "layerwise", "upstream", "both"])
def test_what_is_compared_was_scored_and_is_replayed(tmp_path: Path, name: str) -> None:
    method = method_with(METHODS[name], {"tempered": True, "select": "both-losses"})
    found, ledger, _ = toyruns.run(tmp_path, method, 90)
    assert all(len(look.train) == 6 and np.shape(look.dev.losses) == (6, 10) for look in found.looks)
    again, same, silent = toyruns.run(tmp_path, method, 90)
    assert not silent.calls
    assert same.asked == ledger.asked
    assert [(look.train, look.dev) for look in again.looks] == [(look.train, look.dev) for look in found.looks]


def test_the_margin_keeps_the_search_from_lucky_prompts(tmp_path: Path) -> None:
    method = method_with(METHODS["both"], {"select": "both-losses"})
    free, _, _ = toyruns.run(tmp_path / "free", method, 200)
    held, _, _ = toyruns.run(tmp_path / "held", method_with(method, {"margin": 1e6}), 200)
    assert free.chosen.searched
    assert not held.chosen.searched
