"""What is said before a run: of workers that a method cannot keep busy."""

from __future__ import annotations

import pytest

from bbprompt.advice import warn_of_idle_workers
from bbprompt.config import load_method, method_with


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
