"""Each saving switched off in turn, in a full sweep over the layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from bbprompt.backends import local
from bbprompt.backends.head import Head, Plan
from bbprompt.backends.layout import Layout
from bbprompt.oracle import Scores, Support, TextBatch
from bbprompt.texts.mrc import Encoded
from benchmarks.frozen import Sweep, open_frozen, texts_of
from benchmarks.setting import Setting
from benchmarks.timing import swept

__all__ = ["ablation", "ways"]

_Oracle = Any  # a LocalOracle whose inside is at hand
_Switch = Callable[[_Oracle, TextBatch], None]
_Output = Callable[[Tensor], Any]


def ablation(rounds: int, threads: int, small: bool) -> list[str]:
    """Each saving switched off, at the shape of the bundled model and LCQMC, read by label words."""
    setting = Setting(population=8, vocabulary=50265).shrunk(small)
    taken = swept(ways(setting), range(setting.layers), rounds, threads)
    full, calls = taken["all savings, float32"], setting.layers * setting.population
    lines = [
        f"{setting.texts} texts of {setting.shortest} to {setting.longest} tokens, a vocabulary of "
        f"{setting.vocabulary}, all layers in turn with populations of {setting.population}.",
        "",
        "| what | ms a candidate | cost against all savings |",
        "|---|---|---|",
    ]
    return lines + [f"| {name} | {1e3 * t / calls:.1f} | {t / full:.2f} |" for name, t in taken.items()]


def ways(setting: Setting) -> dict[str, Sweep]:
    """All savings, each of them off, and other precisions; the candidates are the same but for two."""
    model = setting.model()

    def vocabulary(states: Tensor) -> Tensor:
        logits: Tensor = model.cls(states.float())
        return logits

    def ours(off: _Switch = lambda *_: None, of: Setting = setting, dtype: str = "float32") -> Sweep:
        oracle, _ = open_frozen(of, model, "verbalizer", dtype)
        data = texts_of(of, "verbalizer")
        off(oracle, data.batch)
        return Sweep(oracle, data, of.population)

    return {
        "all savings, float32": ours(),
        "lower layers not shared": replace(ours(), everywhere=True),
        "states not kept between generations": ours(_states_anew),
        "texts tokenized and embedded for each generation": ours(_texts_anew),
        "one candidate at a time": ours(_one_by_one),
        "changed layer's projections not shared": ours(_projections_anew),
        "prompts of all layers made for each candidate": ours(_prompts_anew),
        "last layer at all rows": ours(lambda oracle, _: _read_all(oracle, lambda states: None)),
        "the same, and the whole vocabulary at all rows": ours(lambda oracle, _: _read_all(oracle, vocabulary)),
        "whole vocabulary at the gap": ours(lambda oracle, _: _name_all(oracle, vocabulary)),
        "padded texts": ours(of=setting.but(shortest=setting.longest)),
        "attention padded to one length": ours(_one_group),
        "weights not pre-packed": ours(_unpacked),
        "mixed": ours(dtype="mixed"),
        "bfloat16": ours(dtype="bfloat16"),
    }


def _before(oracle: _Oracle, work: Callable[[], None]) -> None:
    """Have each request begin with some work."""
    usual = oracle.score

    def score(*request: Any) -> Scores:
        work()
        answer: Scores = usual(*request)
        return answer

    oracle.score = score


def _states_anew(oracle: _Oracle, batch: TextBatch) -> None:
    def forget() -> None:
        for chunk in oracle._chunks(batch, "candidates"):
            trunk = chunk.main.trunk
            trunk.points = trunk.shared = None
            del trunk.states[1:]

    _before(oracle, forget)


def _texts_anew(oracle: _Oracle, batch: TextBatch) -> None:
    """The states of the layers stay, for that is another saving."""

    def prepare() -> None:
        with patch.object(oracle, "_kept", type(oracle._kept)()):
            for chunk in oracle._chunks(batch, "candidates"):
                oracle._lane(chunk, oracle._runner)

    _before(oracle, prepare)


def _one_by_one(oracle: _Oracle, batch: TextBatch) -> None:
    patch.object(oracle, "at_once", lambda *_: 1).start()


def _projections_anew(oracle: _Oracle, batch: TextBatch) -> None:
    patch.object(oracle._runner, "_shared", lambda *_: None).start()


def _prompts_anew(oracle: _Oracle, batch: TextBatch) -> None:
    runner = oracle._runner

    def made(own: Any, layer: int) -> Tensor:
        prompts: Tensor = runner._made_of(own.some(torch.from_numpy(own.of.points[:, layer])), layer)
        return prompts

    def common(population: Any, layer: int) -> Tensor:
        prompts: Tensor = runner._made_of(population.common[layer][None], layer)
        return prompts

    patch.object(runner, "_prompts", made).start()
    patch.object(runner, "_common", common).start()


def _one_group(oracle: _Oracle, batch: TextBatch) -> None:
    with patch.object(local, "_SLACK", 1000):
        oracle._chunks(batch, "candidates")


def _unpacked(oracle: _Oracle, batch: TextBatch) -> None:
    for layer in oracle._encoder.layers:
        for name in ("query", "key_value", "query_key_value", "attention_out", "up", "down"):
            getattr(layer, name).packed = None


def _name_all(oracle: _Oracle, output: _Output) -> None:
    """Have the head's output be computed for the whole vocabulary beside that of the words in question."""
    usual = oracle._head.apply

    def apply(plan: Plan, states: Tensor) -> Tensor:
        output(states)
        features: Tensor = usual(plan, states)
        return features

    oracle._head.apply = apply


def _read_all(oracle: _Oracle, output: _Output) -> None:
    oracle._head = _AllRows(oracle._head, output)


@dataclass(frozen=True)
class _AllRead:
    """Reads all rows for what a plan reads a few of."""

    few: Any
    read: None = None


class _AllRows:
    """A head that asks for all rows of the last layer, computes the output of all, and answers as another does."""

    def __init__(self, head: Head, output: _Output) -> None:
        self._head, self._output = head, output

    def sequences(self, batch: TextBatch) -> list[Encoded]:
        return self._head.sequences(batch)

    def plan(self, sequences: Sequence[Encoded], layout: Layout, support: Support) -> _AllRead:
        return _AllRead(self._head.plan(sequences, layout, support))

    def apply(self, plan: _AllRead, states: Tensor) -> Tensor:
        self._output(states)
        return self._head.apply(plan.few, states[:, plan.few.read])

    def scores(
        self, batch: TextBatch, plans: Sequence[_AllRead], outputs: Sequence[Tensor], longest_answer: int | None
    ) -> Scores:
        return self._head.scores(batch, [plan.few for plan in plans], outputs, longest_answer)
