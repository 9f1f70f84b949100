"""The benchmarks at their smallest size: every part runs and makes a table, and what they compare is the same.

Servers, clusters and a compiler are stood in for; what they do has tests of its own.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from reference import points_of
from servers import serving

from bbprompt.backends.backbone import Backbone
from bbprompt.backends.local import LocalOracle
from bbprompt.config import TuneConfig
from bbprompt.prompts import ModularPrompt
from bbprompt.run import prepare
from benchmarks import ablation, cluster, overhead, precision, remote
from benchmarks.__main__ import main
from benchmarks.frozen import OPTIONS, Kind, open_frozen, prompt_of, sequences, texts_of
from benchmarks.released import ATTENTION, bbtv2, mp2, plain
from benchmarks.setting import Setting
from benchmarks.timing import swept

TINY = Setting().shrunk(True)


# ------------------------------------------------------------------------------------------- tables


def table(lines: list[str]) -> list[list[str]]:
    """Cells of the one Markdown table in some lines, its head first; all rows must be as wide as the head."""
    rows = [line for line in lines if line.startswith("|")]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert set(map(len, cells)) == {len(cells[0])}
    assert set(cells[1]) == {"---"}
    assert all(all(row) for row in cells), "no cell is empty"
    first, last = lines.index(rows[0]), lines.index(rows[-1])
    assert lines[first : last + 1] == rows, "one table"
    return [cells[0], *cells[2:]]


@pytest.mark.parametrize(
    ("part", "head", "rows"),
    [
        ("published", "what | calls/s | ms a candidate | BBTv2 / this | MP2 / this | plain / this", 8),
        ("base", "what | calls/s | ms a candidate | BBTv2 / this | MP2 / this | plain / this", 8),
        (
            "causal",
            "differs from layer | all layers, ms a candidate | from there on, ms a candidate | times as fast",
            3,
        ),
        ("ablation", "what | ms a candidate | cost against all savings", 15),
        pytest.param(
            "scaling",
            "what | float32, ms a candidate | ratio | bfloat16, ms a candidate | ratio",
            18,
            marks=pytest.mark.slow,
        ),
        ("gpu", "precision | stage | calls | seconds | calls/s | of the bfloat16 floor", 6),
        ("alternatives", "what | ms | ours, float32 / this | relative error", 6),
        ("training", "a step | seconds | examples/s | times as fast | share of the floor", 5),
        ("optimizers", "what | CPU seconds", 4),
    ],
)
def test_a_part_writes_its_table(
    part: str, head: str, rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch, "compile", lambda function: function)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = tmp_path / "table.md"
    main(["--small", "--rounds", "1", "--only", part, "--out", str(out)])
    text = out.read_text(encoding="utf-8")
    assert capsys.readouterr().out == text
    assert text.count("\n### ") == 1
    cells = table(text.splitlines())
    assert " | ".join(cells[0]).startswith(head)
    assert len(cells) == 1 + rows
    assert all("nan" not in cell and "inf" not in cell.split() for row in cells for cell in row)


@pytest.mark.parametrize(("part", "says"), [("what", "there are published, base"), ("gpu", "there is no GPU here")])
def test_a_part_that_cannot_run(
    part: str, says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as error:
        main(["--only", part])
    assert error.value.code == 2
    assert f"--only {part}: {says}" in capsys.readouterr().err


def test_rankings(
    tiny_bert_dir: Path, tiny_prompts: Path, tiny_pair_data: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    def opened(task: str, dtype: str, threads: int) -> Any:
        places = {"data": tiny_pair_data, "prompts": tiny_prompts, "backbone": tiny_bert_dir}
        settings = {"task": task, "dtype": dtype, "threads": threads, "test_limit": 1}
        return prepare(TuneConfig.model_validate(settings | {key: str(place) for key, place in places.items()}))

    monkeypatch.setattr(precision, "_opened", opened)
    monkeypatch.setattr(precision, "_LAYERS", (0, 1))
    head, *rows = table(precision.rankings(1, 1))
    assert len(head) == 7
    assert [row[0] for row in rows] == ["4 routers", *(f"layer {i}, sigma {s}" for i in (0, 1) for s in (0.01, 0.05))]


def test_start_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overhead, "_FIRST_CALL", "print(1.5, 0.25)")
    monkeypatch.setattr(overhead.subprocess, "run", lambda words, **_: SimpleNamespace(stdout="1.5 0.25\n"))
    rows = table(overhead.start_up())
    assert [row[1] for row in rows[2:]] == ["1.50", "0.25"]


def test_a_served_model(
    tiny_prompts: Path, backbone: Backbone, deep: ModularPrompt, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextlib.contextmanager
    def served() -> Iterator[None]:
        with serving(LocalOracle(backbone, deep)) as url:
            process = SimpleNamespace(
                stdout=io.StringIO(json.dumps({"url": url})), terminate=lambda: None, wait=lambda seconds: 0
            )
            monkeypatch.setattr(remote.subprocess, "Popen", lambda *_, **__: process)
            yield

    monkeypatch.setattr(remote, "resolve_prompts", lambda name: tiny_prompts)
    monkeypatch.setattr(remote, "open_oracle", lambda *_, **__: LocalOracle(backbone, deep))
    with served():
        lines = remote.remote(1, 1, 2, 3)
    assert [len(row) for row in table(lines)] == [7] * 4
    assert lines[-1] == "The server ended with 0."


def test_sharing_out(backbone: Backbone, deep: ModularPrompt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "cluster", lambda: contextlib.nullcontext(None))
    monkeypatch.setattr(cluster, "Slots", lambda *_, **__: cluster.Instant())
    assert len(table(cluster.dispatcher(1))) == 3
    assert [row[0].split(",")[0] for row in table(cluster.slow(2, 1, 1))[1:]] == ["upstream", "router", "prompt"]
    monkeypatch.setattr(cluster, "open_ray", lambda *_, workers, **__: Workers(backbone, deep, workers))
    monkeypatch.setattr(cluster.ModularPrompt, "load", lambda folder: deep)
    monkeypatch.setattr(cluster, "bare", lambda *_: 1.9)
    assert [len(row) for row in table(cluster.workers(1, 2))] == [5, 5, 5]


class Workers(LocalOracle):
    """A model here that says it is shared out."""

    def __init__(self, backbone: Backbone, prompt: ModularPrompt, workers: int) -> None:
        super().__init__(backbone, prompt)
        self.workers = range(workers)


# ------------------------------------------------------------------------------------- what is timed


def test_a_way_takes_the_least_of_the_rounds_over_all_steps() -> None:
    steps: list[tuple[str, int]] = []
    ways = {name: lambda step, name=name: steps.append((name, step)) for name in "ab"}
    assert set(swept(ways, range(3), 2, 2)) == {"a", "b"}
    a_round = [(name, step) for step in range(3) for name in "ab"]
    assert steps == [*a_round[2:], *a_round, *a_round]


@pytest.mark.parametrize("kind", ["verbalizer", "span"])
def test_texts_are_as_long_as_they_should_be(kind: Kind) -> None:
    oracle, _ = open_frozen(TINY, TINY.model(), kind)
    texts = sequences(TINY, kind)
    assert [len(text.ids) for text in texts] == TINY.lengths
    assert oracle._head.sequences(texts_of(TINY, kind).batch) == texts
    unknown = 1
    assert not any(unknown in text.ids for text in texts)


def scores(kind: Kind, point: np.ndarray) -> np.ndarray:
    """Ours, `(N, O * C)`; they must depend on the candidate."""
    oracle, prompt = open_frozen(TINY, TINY.model(), kind)
    both = oracle.score(texts_of(TINY, kind).batch, np.stack([point, points_of(prompt, 1, 5)[0]])).logits
    assert np.abs(both[0] - both[1]).max() > 0.01
    return both[0].reshape(TINY.texts, -1)


@pytest.mark.parametrize("layer", [0, TINY.layers - 1])
def test_bbtv2_as_released_scores_as_ours_does(layer: int) -> None:
    prompt = prompt_of(TINY, "verbalizer")
    point = points_of(prompt, 1)[0]
    with torch.inference_mode():
        theirs = bbtv2(TINY.model(ATTENTION), prompt, sequences(TINY, "verbalizer"), point)(layer)
    np.testing.assert_allclose(theirs, scores("verbalizer", point), atol=1e-4)


def test_mp2_as_released_scores_as_ours_does() -> None:
    prompt = prompt_of(TINY, "span")
    weights = np.random.default_rng(4).random(prompt.modules.shape[:2])
    point = np.einsum("lk,lkd->ld", weights, prompt.modules)
    with torch.inference_mode():
        theirs = mp2(TINY.model(ATTENTION), prompt, sequences(TINY, "span"), weights)()
    np.testing.assert_allclose(theirs.flatten(1), scores("span", point), atol=1e-4)


def test_a_plain_loop_scores_as_ours_does() -> None:
    model, prompt, texts = TINY.model(), prompt_of(TINY, "verbalizer"), sequences(TINY, "verbalizer")
    point = points_of(prompt, 1)[0]
    with torch.inference_mode():
        states = plain(model, prompt, texts, point)()
        read = torch.stack([row[text.spans[0][0]] for row, text in zip(states, texts, strict=True)])
        theirs = model.cls(read)[:, list(OPTIONS)]
    np.testing.assert_allclose(theirs, scores("verbalizer", point), atol=1e-4)


def test_without_a_saving_scores_are_the_same() -> None:
    ways = ablation.ways(TINY)
    others = ("lower layers not shared", "padded texts", "mixed", "bfloat16")
    with torch.inference_mode():
        for layer in (*range(TINY.layers), 0):
            found = {name: way(layer).logits for name, way in ways.items()}
            for name, logits in found.items():
                assert np.abs(logits[0] - logits[1]).max() > 1e-3, f"{name}: scores must depend on the candidate"
                if name not in others:
                    np.testing.assert_allclose(logits, found["all savings, float32"], atol=1e-4, err_msg=name)
