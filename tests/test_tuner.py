"""The search on the toy oracle: budget, calls, the choice among looks, and replay."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_prompt
import toyruns
from numpy.typing import NDArray
from toyruns import METHODS, looks_of

from bbprompt.config import method_with
from bbprompt.errors import OracleError, ResumeMismatch
from bbprompt.oracle import OracleInfo, Scores, TextBatch
from bbprompt.readout import Readout
from bbprompt.router import compose
from bbprompt.search.tuner import Found, Status
from bbprompt.testing import FaultyOracle, ToyOracle


def same(one: Found, other: Found) -> bool:
    return np.array_equal(one.points, other.points) and all(
        (a.incumbent.loss, a.dev_loss, a.dev_metric) == (b.incumbent.loss, b.dev_loss, b.dev_metric)
        for a, b in zip(looks_of(one), looks_of(other), strict=True)
    )


# ---------------------------------------------------------------------------------------------- budget


@pytest.mark.parametrize("budget", [23, 24, 42, 43, 44, 63, 64, 65, 100, 121, 122, 123, 144, 200])
@pytest.mark.parametrize("name", ["layerwise", "joint"])
def test_the_budget_is_never_exceeded(name: str, budget: int, tmp_path: Path) -> None:
    found, ledger, oracle = toyruns.run(tmp_path, METHODS[name], budget)
    spent = ledger.by_kind
    assert spent["train"] + spent["dev"] == ledger.reserved == ledger.asked == oracle.calls <= budget
    assert spent["test"] == 0
    # What is left does not hold another population and its look.
    assert budget - ledger.reserved < METHODS[name].prompt.popsize + 1  # type: ignore[union-attr]
    assert sum(trace.calls for trace in found.stages) == ledger.reserved - 2


@pytest.mark.parametrize("budget", range(9, 60, 5))
def test_the_budget_is_never_exceeded_by_two_stages(budget: int, tmp_path: Path) -> None:
    found, ledger, oracle = toyruns.run(tmp_path, METHODS["both"], budget)
    assert oracle.calls == ledger.reserved <= budget
    assert [trace.name for trace in found.stages] == ["router", "prompt"]
    assert found.stages[0].calls <= 12 + 12 // 10 + 1
    assert sum(trace.calls for trace in found.stages) == ledger.reserved - 2


def test_a_call_is_one_candidate_on_one_batch(tmp_path: Path) -> None:
    method = method_with(METHODS["layerwise"], {"prompt.dev_every": 40})
    _, ledger, oracle = toyruns.run(tmp_path, method, 100)
    # Untuned on train and on dev, then generations of 20 with a look after every second, while all fits.
    assert oracle.batches == [1, 1, 20, 20, 1, 20, 20, 1]
    assert ledger.by_kind == {"train": 81, "dev": 3, "test": 0}


def test_only_train_and_dev_are_looked_at(tmp_path: Path) -> None:
    _, _, oracle = toyruns.run(tmp_path, METHODS["both"], 80)
    task = toyruns.TASK
    shown = {
        "".join(part.text for part in task.render(task.example(record)).parts)
        for count, seed in ((12, 1), (10, 2))
        for record in tiny_prompt.pair_records(count, seed)
    }
    assert oracle.texts == shown


def test_tuning_lowers_the_train_loss(tmp_path: Path) -> None:
    found, _, _ = toyruns.run(tmp_path, method_with(METHODS["layerwise"], {"prompt.sigma": 0.2}), 800)
    assert found.stages[0].train_loss < found.before.incumbent.loss - 0.02
    assert found.chosen.incumbent.loss < found.before.incumbent.loss


class Rough(ToyOracle):
    """A mixed oracle whose populations of four, the routers, come out with too low a loss."""

    @property
    def info(self) -> OracleInfo:
        return replace(super().info, precision="mixed")

    def score(self, batch: TextBatch, points: NDArray[np.floating], *rest: Any) -> Scores:
        scores = super().score(batch, points, *rest)
        return replace(scores, normalizer=scores.normalizer - np.float32(0.01)) if len(points) == 4 else scores


@pytest.mark.parametrize("budget", [26, 40, 100])
def test_stage_two_starts_from_a_loss_as_exact_as_its_own(budget: int, tmp_path: Path) -> None:
    method = method_with(METHODS["both"], {"prompt.sigma": 1e-9, "prompt.sigma_first": 1e-9, "select": "pooled-loss"})
    found, ledger, recorder = toyruns.run(tmp_path, method, budget, oracle=Rough())
    router, prompt = found.stages
    assert router.chosen is not found.before
    point = prompt.chosen.incumbent.point
    np.testing.assert_allclose(point, router.chosen.incumbent.point, atol=1e-6)
    data = toyruns.data(12, 1)
    exact = Readout(method.support).losses(ToyOracle().score(data.batch, point[None]), data.batch, data.gold).mean()
    assert prompt.train_loss == pytest.approx(exact, abs=1e-6)
    assert ledger.asked == recorder.calls <= budget
    again, _, _ = toyruns.run(tmp_path, method, budget, oracle=FaultyOracle(Rough(), at=1))
    assert same(again, found)


def test_stage_two_starts_from_the_chosen_router(tmp_path: Path) -> None:
    method = method_with(METHODS["both"], {"prompt.sigma": 1e-9, "prompt.sigma_first": 1e-9})
    found, _, _ = toyruns.run(tmp_path, method, 100)
    start, end = found.stages[0].chosen.incumbent, found.stages[1].chosen.incumbent
    np.testing.assert_allclose(end.point, start.point, atol=1e-6)
    assert end.routing is start.routing


def test_a_look_at_the_same_point_costs_nothing(tmp_path: Path) -> None:
    # Steps so small that in single precision nothing changes: the incumbent stays the untuned prompt.
    method = method_with(
        METHODS["layerwise"], {"prompt.sigma": 1e-19, "prompt.sigma_first": 1e-19, "prompt.dev_every": 1}
    )
    found, ledger, _ = toyruns.run(tmp_path, method, 100)
    assert ledger.by_kind["dev"] == 1
    assert found.chosen is found.before


def test_a_stage_that_dev_gains_nothing_from_ends_and_leaves_the_rest(tmp_path: Path) -> None:
    # Steps that change nothing: every look finds the untuned prompt again.
    still = {"prompt.sigma": 1e-19, "prompt.sigma_first": 1e-19, "prompt.dev_every": 20, "prompt.patience": 3}
    found, ledger, _ = toyruns.run(tmp_path, method_with(METHODS["layerwise"], still), 400)
    assert [trace.ended for trace in found.stages] == ["patience"]
    assert ledger.by_kind == {"train": 1 + 3 * 20, "dev": 1, "test": 0}


def test_patience_begins_anew_with_every_look_that_changes_the_choice(tmp_path: Path) -> None:
    settings = {"prompt.sigma": 0.2, "prompt.sigma_first": 0.2, "prompt.dev_every": 20, "select": "pooled-loss"}
    method = method_with(METHODS["layerwise"], {**settings, "prompt.patience": 2})
    found, ledger, _ = toyruns.run(tmp_path / "patient", method, 800)
    (trace,) = found.stages
    assert trace.ended == "patience"
    assert trace.chosen is not found.before
    assert 1 + 2 * 20 < ledger.by_kind["train"] < 700
    # Up to there it is the search that spends everything.
    (whole,) = toyruns.run(tmp_path / "all", method_with(METHODS["layerwise"], settings), ledger.reserved)[0].stages
    np.testing.assert_array_equal(whole.chosen.incumbent.point, trace.chosen.incumbent.point)


@pytest.mark.parametrize(
    ("name", "budget", "ended"),
    [("router", 60, ["calls"]), ("layerwise", 60, ["budget"]), ("both", 60, ["calls", "budget"]), ("nothing", 60, [])],
)
def test_a_stage_says_why_it_ended(name: str, budget: int, ended: list[str], tmp_path: Path) -> None:
    found, *_ = toyruns.run(tmp_path, METHODS[name], budget)
    assert [trace.ended for trace in found.stages] == ended


@pytest.mark.parametrize(("name", "stages"), [("router", ["router"]), ("layerwise", ["prompt"]), ("nothing", [])])
def test_methods_of_one_stage_or_none(name: str, stages: list[str], tmp_path: Path) -> None:
    found, ledger, _ = toyruns.run(tmp_path, METHODS[name], 60)
    assert [trace.name for trace in found.stages] == stages
    assert found.points.shape == (1 + len(stages), 3, 4)
    if not stages:
        assert found.chosen is found.before
        assert ledger.reserved == 2
    if name == "router":
        assert ledger.by_kind["train"] == 1 + 16, "the stage's own limit"


def test_the_upstream_mixtures_are_tried_before_the_search(tmp_path: Path) -> None:
    found, *_ = toyruns.run(tmp_path, METHODS["upstream"], 60)
    first, second = found.stages
    assert (first.name, first.optimizer, second.name) == ("upstream", "listing", "router")
    known = toyruns.space()
    mixtures = known.mix(known.routers, known.rule)
    assert first.calls == 2 * len(known.routers), "each upstream task on train and on dev"
    best = first.chosen.incumbent
    assert best is found.before.incumbent or any(np.array_equal(best.point, mixture) for mixture in mixtures)
    if best.routing is not None:
        np.testing.assert_allclose(compose(best.routing.weights, known.modules), best.point, rtol=1e-12)


def test_the_bare_backbone_is_tried_before_the_mixtures(tmp_path: Path) -> None:
    oracle = toyruns.Remembering(ToyOracle())
    method = method_with(METHODS["upstream"], {"router.bare": True, "router.optimizer": "listing", "router.batch": 1})
    found, *_ = toyruns.run(tmp_path, method, 60, oracle=oracle)
    assert found.stages[0].calls == 2 + 2 * len(toyruns.space().routers)
    points = [np.frombuffer(key[1], np.float32) for key in oracle.known]
    assert [point.any() for point in points] == [True, True, False, False, *[True] * 4], "train and dev of each"


@pytest.mark.parametrize("budget", [25, 45, 67, 100, 200])
def test_a_calibration_has_the_last_two_calls(budget: int, tmp_path: Path) -> None:
    found, ledger, oracle = toyruns.run(tmp_path, METHODS["calibrated"], budget)
    assert oracle.calls == ledger.reserved <= budget
    assert [trace.name for trace in found.stages] == ["prompt", "calibration"]
    assert oracle.batches[-2:] == [1, 1]
    searched, last = found.stages
    assert last.calls == 2
    assert last.chosen is found.chosen
    np.testing.assert_array_equal(last.chosen.incumbent.point, searched.chosen.incumbent.point)
    assert searched.chosen.readout.offsets == ()
    assert sum(last.chosen.readout.offsets) == pytest.approx(0.0, abs=1e-9)
    # Fitted to both, so both together can only fall.
    sizes = np.array([12, 10])
    before = np.array([searched.chosen.incumbent.loss, searched.chosen.dev_loss]) @ sizes
    after = np.array([last.chosen.incumbent.loss, last.chosen.dev_loss]) @ sizes
    assert after < before - 1e-4


def test_a_method_without_stages_can_be_calibrated_too(tmp_path: Path) -> None:
    method = method_with(METHODS["nothing"], {"calibrate": True})
    assert method.least_budget == 4
    found, ledger, _ = toyruns.run(tmp_path, method, 4)
    assert [trace.name for trace in found.stages] == ["calibration"]
    assert ledger.by_kind == {"train": 2, "dev": 2, "test": 0}
    assert found.before.readout.offsets == ()


def test_reports(tmp_path: Path) -> None:
    reports: list[Status] = []
    found, ledger, _ = toyruns.run(tmp_path, METHODS["both"], 100, report=reports.append)
    assert reports[0] == Status(2, "start", found.before.incumbent.loss, found.before.dev_metric)
    assert [status.calls for status in reports] == sorted(status.calls for status in reports)
    assert reports[-1].calls == ledger.reserved
    assert [name for name, _ in itertools.groupby(status.stage for status in reports)] == ["start", "router", "prompt"]
    assert reports[-1].train_loss == found.stages[-1].train_loss
    assert reports[-1].dev_metric >= max(look.dev_metric for look in found.looks)
    metrics = [status.dev_metric for status in reports]
    assert metrics == sorted(metrics)


# ---------------------------------------------------------------------------------------- determinism


def test_the_same_seed_finds_the_same_and_another_does_not(tmp_path: Path) -> None:
    one, _, _ = toyruns.run(tmp_path / "a", METHODS["both"], 60)
    two, _, _ = toyruns.run(tmp_path / "b", METHODS["both"], 60)
    other, _, _ = toyruns.run(tmp_path / "c", METHODS["both"], 60, seed=2)
    assert same(one, two)
    assert not np.array_equal(one.points[-1], other.points[-1])


def test_a_journal_cut_anywhere_is_gone_on_with_to_the_same_end(tmp_path: Path) -> None:
    whole, ledger, oracle = toyruns.run(tmp_path / "whole", METHODS["all-time"], 60)
    content = (tmp_path / "whole" / "journal.log").read_bytes()
    rng = np.random.default_rng(0)
    ends = {len(content), 0, 1, content.index(b"\n") + 1, *rng.integers(0, len(content), 26).tolist()}
    for number, end in enumerate(sorted(ends)):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "journal.log").write_bytes(content[:end])
        found, again, asked = toyruns.run(folder, METHODS["all-time"], 60)
        assert same(found, whole)
        assert again.by_kind == ledger.by_kind
        assert (folder / "journal.log").read_bytes() == content, "not one byte differs"
        settled = content[:end].decode().splitlines()[: content[:end].count(b"\n")]
        known = sum(line.count('"loss"') for line in settled if '"settle"' in line)
        assert asked.calls == oracle.calls - known, "nothing settled is asked for again"


def test_upstream_mixtures_are_looked_at_together(tmp_path: Path) -> None:
    """So that on a cluster the looks are shared out as the candidates are."""
    recorder = toyruns.Recorder()
    found, _, _ = toyruns.run(tmp_path / "run", METHODS["upstream"], 40, oracle=recorder)
    assert found.stages[0].name == "upstream"
    assert recorder.batches[:4] == [1, 1, 2, 2], "untuned on train and dev, then two tasks on train and dev"


@pytest.mark.parametrize("at", [1, 2, 3, 5])
def test_a_failing_oracle_spends_nothing_twice(at: int, tmp_path: Path) -> None:
    whole, ledger, _ = toyruns.run(tmp_path / "whole", METHODS["all-time"], 60)
    for fault, message in (("error", "as it was told to"), ("nan", "NaN"), ("shape", "shape")):
        folder = tmp_path / fault
        with pytest.raises(OracleError, match=message):
            toyruns.run(folder, METHODS["all-time"], 60, oracle=FaultyOracle(ToyOracle(), at, fault))  # type: ignore[arg-type]
        found, again, _ = toyruns.run(folder, METHODS["all-time"], 60)
        assert same(found, whole)
        assert again.by_kind == ledger.by_kind
        assert (folder / "journal.log").read_bytes() == (tmp_path / "whole" / "journal.log").read_bytes()


def test_a_search_that_takes_another_way_is_noticed(tmp_path: Path) -> None:
    toyruns.run(tmp_path / "whole", METHODS["all-time"], 60)
    content = (tmp_path / "whole" / "journal.log").read_bytes().splitlines(keepends=True)
    # Also where only the last batch is reserved and in doubt.
    for lines in (len(content), 7, 6, 5):
        folder = tmp_path / str(lines)
        folder.mkdir()
        (folder / "journal.log").write_bytes(b"".join(content[:lines]))
        with pytest.raises(ResumeMismatch, match="asks for other calls than the journal holds"):
            toyruns.run(folder, method_with(METHODS["all-time"], {"prompt.sigma": 0.2, "prompt.sigma_first": 0.2}), 60)
        assert (folder / "journal.log").read_bytes() == b"".join(content[:lines]), "nothing was added"


def test_cut_tokens_are_known_after_a_replay(tmp_path: Path) -> None:
    from bbprompt.search.evaluate import Evaluator
    from bbprompt.store.journal import Journal
    from bbprompt.store.ledger import Ledger

    points = toyruns.space().even()[None]
    cuts = []
    for oracle in (ToyOracle(max_tokens=34), FaultyOracle(ToyOracle(), at=1)):
        journal = Journal(tmp_path / "journal.log", "toy")
        data = toyruns.data(8, 1), toyruns.data(6, 2)
        evaluator = Evaluator(oracle, Ledger(journal, 10), Readout(), toyruns.TASK, *data)
        evaluator.train(points)
        train = evaluator.cut
        evaluator.dev(points[:1])
        cuts.append((train, evaluator.cut))
        journal.close()
    assert cuts[0] == cuts[1]
    assert 0 < cuts[0][0] < cuts[0][1]
