"""Figures as SVG to be put into a page. Only here is matplotlib imported, and only when a figure is drawn."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bbprompt.compare.runs import Curve
from bbprompt.compare.statistics import step_values
from bbprompt.errors import UsageError
from bbprompt.report.page import Html

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["method_curves", "partition", "run_curves"]

_LOSS, _DEV, _FAINT = "#1f5fa8", "#c4571b", "#8a94a3"
_PALETTE = (
    "#1f5fa8",
    "#c4571b",
    "#2e8b57",
    "#8e44ad",
    "#b8860b",
    "#c2185b",
    "#00838f",
    "#5d4037",
    "#607d8b",
    "#7cb342",
)
_LONG = 50  # from here on the early stages are seen on a logarithmic axis only
_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: it can be searched, and the browser has the glyphs
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _FAINT,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e7eaef",
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "figure.constrained_layout.use": True,
}


def run_curves(curve: Curve, metric: str, before: float) -> Html:
    """Train loss and best dev metric against calls, with the boundaries of the stages.

    Args:
        curve: Of the run; at least one row.
        metric: Name of the dev metric.
        before: Dev metric of the untuned prompt.
    """
    with _figure("run", 9.4, 5.2) as (figure, finished):
        upper, lower = figure.subplots(2, 1, sharex=True)
        upper.step(curve.calls, curve.loss, where="post", color=_LOSS, linewidth=1.8)
        upper.set_ylabel("train loss, best of the stage")
        lower.step(curve.calls, [100 * value for value in curve.dev], where="post", color=_DEV, linewidth=1.8)
        lower.axhline(100 * before, color=_FAINT, linewidth=1, linestyle=(0, (4, 3)))
        at = ("axes fraction", "data")
        lower.annotate("before", (1, 100 * before), xycoords=at, ha="right", va="bottom", color=_FAINT)
        lower.set_ylabel(f"dev {metric}, %")
        lower.set_xlabel("calls (train and dev)")
        first, last = curve.calls[0], curve.calls[-1]
        place: Callable[[float], float] = float
        if last > _LONG * first:
            _log_scale(lower)
            place = math.log
        for name, begin, end in _spans(curve):
            for axes in (upper, lower):
                axes.axvline(max(begin, first), color=_FAINT, linewidth=0.8)
            # A stage too short for its name to stand beside the next one is only marked.
            if place(end) - place(max(begin, first)) > 0.07 * (place(last) - place(first)):
                upper.annotate(
                    _plain(name),
                    (max(begin, first), 1),
                    xycoords=("data", "axes fraction"),
                    xytext=(2, 3),
                    textcoords="offset points",
                    color=_FAINT,
                )
        return finished()


def method_curves(curves: Mapping[str, Mapping[str, Sequence[Curve]]]) -> Html:
    """Dev metric against calls, a panel for each task and a line for each method: mean over seeds, each seed faintly.

    Args:
        curves: Task -> method -> curves with at least one row each.
    """
    methods = list(dict.fromkeys(name for rows in curves.values() for name in rows))
    colours = {name: _PALETTE[place % len(_PALETTE)] for place, name in enumerate(methods)}
    columns = min(3, len(curves))
    lines = math.ceil(len(curves) / columns)
    with _figure("sweep", 3.6 * columns if columns > 1 else 7.0, 2.5 * lines + 0.6) as (figure, finished):
        grid = figure.subplots(lines, columns, squeeze=False, sharex=True)
        for axes, (task, rows) in zip(grid.flat, curves.items(), strict=False):
            for name, own in rows.items():
                _mean_line(axes, own, colours[name])
            axes.set_title(_plain(task))
            _log_scale(axes)
        for axes in list(grid.flat)[len(curves) :]:
            axes.set_visible(False)
        for axes in grid[-1]:
            axes.set_xlabel("calls")
        from matplotlib.lines import Line2D

        handles = [Line2D([], [], color=colours[name], linewidth=2, label=_plain(name)) for name in methods]
        figure.legend(handles=handles, loc="outside upper left", ncols=min(4, len(methods)), frameon=False)
        return finished()


def partition(
    links: NDArray[np.float64], names: Sequence[str], weights: NDArray[np.float64], layers: int, cut: float
) -> Html:
    """Hierarchical clustering of tasks by their routers beside the routers themselves (MP2, figure 5).

    Args:
        links: Of `scipy.cluster.hierarchy.linkage`.
        names: Of the T tasks.
        weights: `(T, L * K)`, layer by layer.
        layers: L.
        cut: Distance under which tasks are one group.
    """
    from scipy.cluster.hierarchy import dendrogram

    with _figure("partition", 11.0, 0.21 * len(names) + 1.0) as (figure, finished):
        tree, shades = figure.subplots(1, 2, width_ratios=(1, 2.2))
        plan = dendrogram(links, orientation="left", no_plot=True)
        for xs, ys in zip(plan["dcoord"], plan["icoord"], strict=True):
            tree.plot(xs, ys, color=_LOSS if max(xs) < cut else _FAINT, linewidth=1.2)
        tree.axvline(cut, color=_DEV, linewidth=1, linestyle=(0, (4, 3)))
        tree.invert_xaxis()
        tree.set_ylim(0, 10 * len(names))
        tree.set_yticks([])
        tree.set_title("distance")
        tree.spines["left"].set_visible(False)
        order = plan["leaves"]
        # The dendrogram counts its leaves from below, at 5, 15, 25, ...
        image = shades.imshow(
            weights[order], aspect="auto", cmap="Blues", origin="lower", interpolation="nearest", vmin=0.0
        )
        shades.set_yticks(range(len(names)), [_plain(names[place]) for place in order], fontsize=8)
        wide = weights.shape[1] // layers
        shades.set_xticks([wide * layer + (wide - 1) / 2 for layer in range(layers)], range(1, layers + 1))
        if layers == 1:
            shades.set_xticks(range(wide), [f"z{number + 1}" for number in range(wide)])
        for layer in range(1, layers):
            shades.axvline(wide * layer - 0.5, color="#ffffff", linewidth=1.5)
        shades.grid(False)
        shades.set_title(f"mixing weights of the {wide} modules, by layer" if layers > 1 else "mixing weights")
        figure.colorbar(image, ax=shades, shrink=0.5, pad=0.01)
        return finished()


def _mean_line(axes: Any, curves: Sequence[Curve], colour: str) -> None:
    first, last = max(curve.calls[0] for curve in curves), max(curve.calls[-1] for curve in curves)
    at = np.unique(np.concatenate([[first, last], *(curve.calls for curve in curves)]))
    at = at[(at >= first) & (at <= last)].astype(np.float64)
    lines = [100 * step_values(curve.calls, curve.dev, at) for curve in curves]
    if len(lines) > 1:
        for line in lines:
            axes.step(at, line, where="post", color=colour, linewidth=0.7, alpha=0.3)
    # A method without a search has one row a run, which is no line.
    axes.step(
        at, np.mean(lines, axis=0), where="post", color=colour, linewidth=1.9, marker="o" if first == last else ""
    )


def _log_scale(axes: Any) -> None:
    """A logarithmic axis of calls, with whole numbers at 1, 2 and 5 of each power of ten."""
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:.0f}"))


def _spans(curve: Curve) -> Iterator[tuple[str, int, int]]:
    """Name, first and last number of calls of each stage; a stage begins where the one before it ended."""
    begins = [(0, curve.stage[0])]
    for (before, then), (_, now) in pairwise(zip(curve.calls, curve.stage, strict=True)):
        if now != then:
            begins.append((before, now))
    ends = [begin for begin, _ in begins[1:]] + [curve.calls[-1]]
    for (begin, name), end in zip(begins, ends, strict=True):
        yield name, begin, end


def _plain(text: str) -> str:
    """A text for a figure: matplotlib measures texts with a font of its own, which has few scripts."""
    return text.encode("ascii", "backslashreplace").decode("ascii")


@contextmanager
def _figure(name: str, width: float, height: float) -> Iterator[tuple[Figure, Callable[[], Html]]]:
    """An empty figure of inches, and the function that turns it into markup."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError(f"report: {error.name} is not installed; pip install 'bbprompt[report]'") from None

    # The salt makes names inside the SVG the same in every process, and different between figures of one page.
    with matplotlib.rc_context({**_SETTINGS, "svg.hashsalt": name}):
        figure = Figure(figsize=(width, height))

        def finished() -> Html:
            buffer = io.StringIO()
            figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
            text = buffer.getvalue()
            return Html(f'<div class="figure">{text[text.index("<svg") :]}</div>')

        yield figure, finished
