"""A process that proposes beside this one: the same rows as here, whatever becomes of the process."""

from __future__ import annotations

import gc
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from bbprompt.optimizers import aside, fitting
from bbprompt.optimizers.aside import Aside
from bbprompt.optimizers.posterior import Hyperparameters
from bbprompt.optimizers.proposal import Fits, Question


def question(count: int = 24, seed: int = 0) -> Question:
    rng = np.random.default_rng(7)
    rows = rng.integers(0, 2, (60, 30)).astype(np.float64)
    targets = rows @ rng.standard_normal(30)
    return Question(
        fit_rows=rows[:20],
        fit_targets=targets[:20] - targets[:20].mean(),
        kappa=np.array([2.0]),
        integers=np.array([count, seed, 3, 1, 1, 1, 0]),
        rows=rows[:40],
        targets=(targets[:40] - targets.mean()) / targets.std(),
        believed=rows[40:],
        taken=rows,
        incumbents=rows[:3],
    )


def test_a_fit_is_made_once_for_questions_that_share_it(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    original = fitting.fit

    def counted(rows: NDArray[np.float64], targets: NDArray[np.float64], *, ard: bool, seed: int) -> Hyperparameters:
        made.append(seed)
        return original(rows, targets, ard=ard, seed=seed)

    monkeypatch.setattr(fitting, "fit", counted)
    fits = Fits()
    first = fits.of(question())
    assert fits.of(question(count=3)) is first
    again = fits.of(question(seed=1))
    assert made == [0, 1]
    assert again.lengthscale.tobytes() == first.lengthscale.tobytes()


@pytest.fixture(scope="module")
def running() -> Aside:
    """One whose process runs."""
    helper = Aside()
    helper.start()
    return helper


def process(helper: Aside) -> subprocess.Popen[bytes]:
    assert helper._process is not None
    return helper._process


def test_a_question_survives_its_bytes() -> None:
    asked = question()
    read = Question.decode(asked.encode())
    assert read.encode() == asked.encode() != question(seed=1).encode()
    np.testing.assert_array_equal(read.answer(Fits()), asked.answer(Fits()))


def test_the_process_gives_the_same_bits(running: Aside, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = question().answer(Fits())
    running.begin(question())
    with monkeypatch.context() as patched:
        patched.setattr(Question, "answer", lambda self, fits: pytest.fail("worked out here"))
        found = running.answer(question())
    assert found.tobytes() == expected.tobytes()
    found[0, 0] = 0.5  # and it is the caller's own


def test_before_it_can_fit_the_fit_is_made_here_and_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    original = fitting.fit
    monkeypatch.setattr(fitting, "fit", lambda *given, **named: made.append(1) or original(*given, **named))
    helper = Aside()
    monkeypatch.setattr(helper, "_fits_there", lambda: False)
    for count in (24, 20):
        helper.begin(question(count))
        assert helper.answer(question(count)).tobytes() == question(count).answer(helper._fits).tobytes()
    assert made == [1]


def test_another_question_than_was_begun_is_answered_here(running: Aside) -> None:
    running.begin(question(seed=1))
    assert running.answer(question()).tobytes() == question().answer(Fits()).tobytes()
    running.begin(question(count=17))
    assert running.answer(question(count=17)).shape == (17, 30)


def test_without_a_begin_it_is_answered_here() -> None:
    helper = Aside()
    assert helper.answer(question()).tobytes() == question().answer(Fits()).tobytes()
    assert helper._process is None


@pytest.mark.parametrize("when", ["before", "between"])
def test_a_killed_process_changes_nothing_but_the_log(when: str, caplog: pytest.LogCaptureFixture) -> None:
    helper = Aside()
    helper.start()
    if when == "between":
        helper.begin(question())
    os.kill(process(helper).pid, signal.SIGKILL)
    process(helper).wait()
    with caplog.at_level(logging.WARNING, "bbprompt"):
        helper.begin(question())
        assert helper.answer(question()).tobytes() == question().answer(Fits()).tobytes()
        helper.begin(question(seed=1))
        assert helper.answer(question(seed=1)).tobytes() == question(seed=1).answer(Fits()).tobytes()
    assert caplog.text.count("proposes beside this one was lost") == 1


def test_one_that_cannot_start_is_said_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(aside.sys, "executable", "/nowhere/python")
    helper = Aside()
    for _ in range(2):
        helper.begin(question())
        assert helper.answer(question()).tobytes() == question().answer(Fits()).tobytes()
    assert caplog.text.count("was lost") == 1


def test_it_ends_with_its_owner() -> None:
    helper = Aside()
    helper.start()
    helper.begin(question())
    child = process(helper)
    del helper
    gc.collect()
    assert child.poll() == -signal.SIGKILL


def test_it_ends_when_its_owner_is_killed() -> None:
    """Its input ends then. The owner's own output stays open as long as a child holds it."""
    code = (
        "from bbprompt.optimizers.aside import Aside; import os, time; a = Aside(); a.start();"
        "print(a._process.pid, flush=True); time.sleep(600)"
    )
    root = Path(__file__).parents[1]
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=root, stderr=subprocess.PIPE, stdout=subprocess.PIPE
    ) as owner:
        assert owner.stdout is not None
        assert owner.stderr is not None
        child = int(owner.stdout.readline())
        os.kill(child, 0)
        owner.kill()
        # The child has inherited this pipe: it reads to its end only once both are gone.
        assert owner.stderr.read() == b""
