"""What the figures of a page show."""

from __future__ import annotations

from typing import Any

import pytest

from bbprompt.compare.runs import Curve
from bbprompt.report.figures import run_curves


def test_the_boundaries_of_the_stages_stand_in_the_curve(monkeypatch: pytest.MonkeyPatch) -> None:
    matplotlib_axes = pytest.importorskip("matplotlib.axes")
    drawn: list[float] = []
    plain = matplotlib_axes.Axes.axvline

    def axvline(self: Any, x: float, **settings: Any) -> Any:
        drawn.append(x)
        return plain(self, x, **settings)

    monkeypatch.setattr(matplotlib_axes.Axes, "axvline", axvline)
    stages = {"start": (2,), "upstream": (10, 40), "router": (60, 80), "prompt": (120, 400)}
    calls = tuple(call for own in stages.values() for call in own)
    names = tuple(name for name, own in stages.items() for _ in own)
    curve = Curve(calls, names, tuple(1 / call for call in calls), (0.5,) * len(calls))
    text = str(run_curves(curve, "accuracy", 0.5))
    assert sorted(set(drawn)) == [2, 40, 80], "where each stage begins"
    assert all(f">{name}<" in text for name in ("upstream", "router", "prompt"))
