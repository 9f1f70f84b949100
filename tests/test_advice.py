"""What is said before a run: of workers that a method cannot keep busy."""

from __future__ import annotations

import pytest
from servers import serving

from bbprompt.advice import warn_of_idle_workers, warn_of_single_words
from bbprompt.backends.http import HttpOracle
from bbprompt.config import load_method, method_with
from bbprompt.tasks.task import load_task
from bbprompt.testing import ToyOracle


@pytest.mark.parametrize(
    ("workers", "changes", "expected"),
    [
        (None, {}, None),
        (4, {}, None),
        (16, {}, "--set router.batch=16 (another search)"),
        (64, {}, "--set router.batch=64 --set prompt.popsize=64 (another search)"),
        (64, {"router.batch": 64, "router.calls": 640}, "prompt.popsize=20 candidates at once leave workers idle"),
        (64, {"router": None, "prompt.popsize": 64}, None),
    ],
)
def test_idle_workers_are_said_in_one_line(
    workers: int | None, changes: dict[str, object], expected: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    warn_of_idle_workers(workers, method_with(load_method("mp2-deep"), changes))
    lines = caplog.messages
    assert (not lines) if expected is None else (len(lines) == 1 and expected in lines[0])


@pytest.mark.parametrize(
    ("workers", "points", "expected"),
    [
        (None, 1024, None),
        (1, 1024, None),
        (4, 19, None),
        (4, 20, "--workers 4 has no effect: a request takes all candidates of a batch (20; --max-points of the"),
        (64, 1024, "--workers 64 has no effect: "),
        (64, 2, "leave workers idle"),
    ],
)
def test_workers_without_effect_are_said_in_one_line(
    workers: int | None, points: int, expected: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(ToyOracle(), points=points) as url:
        oracle = HttpOracle(url)
        warn_of_idle_workers(workers, load_method("mp2-deep"), oracle)
        oracle.close()
    assert (not caplog.messages) if expected is None else (len(caplog.messages) == 1 and expected in caplog.messages[0])


@pytest.mark.parametrize(
    ("method", "words", "said"),
    [
        ("bbt-rgb", {"0": "bad", "1": "good"}, True),
        ("bbt-rgb", {}, True),
        ("bbt-rgb", {"0": "bad", "1": ["good", "great"]}, False),
        ("bbt", {"0": "bad", "1": "good"}, False),
    ],
)
def test_words_that_a_task_does_not_have_are_said_in_one_line(
    method: str, words: dict[str, str | list[str]], said: bool, caplog: pytest.LogCaptureFixture
) -> None:
    task = load_task("sst2").model_copy(update={"words": words})
    warn_of_single_words(load_method(method), task)
    assert [line for line in caplog.messages if "the task sst2 gives each label one" in line] == caplog.messages
    assert bool(caplog.messages) == said
