"""Schedules, stored tokens and the settings of a recipe."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tinytrain
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from bbprompt.backends.backbone import load_backbone
from bbprompt.backends.tokens import frame_for, tokenize_with
from bbprompt.errors import ArtifactError, UsageError
from bbprompt.pretrain import upstream
from bbprompt.pretrain.mixture import Mixture
from bbprompt.pretrain.recipe import PretrainConfig
from bbprompt.pretrain.schedule import epoch_order, positions, visits
from bbprompt.pretrain.speed import gemm_rate, step_flops
from bbprompt.pretrain.tokens import stored
from bbprompt.pretrain.upstream import data_beside, load_upstream, upstream_tasks
from bbprompt.texts.mrc import Encoded


@given(st.integers(1, 60), st.integers(1, 7), st.integers(1, 5), st.integers(0, 3))
def test_an_epoch_is_a_permutation(count: int, size: int, bucket: int, epoch: int) -> None:
    lengths = np.random.default_rng(count).integers(5, 90, count)
    order = epoch_order(3, 1, epoch, lengths, size, bucket)
    assert sorted(order.tolist()) == list(range(count))


def test_buckets_bring_texts_of_a_length_together() -> None:
    lengths = np.random.default_rng(0).integers(10, 100, 4000)

    def spread(bucket: int) -> float:
        return float(np.mean([np.ptp(lengths[positions(1, 0, visit, lengths, 8, bucket)]) for visit in range(400)]))

    assert spread(20) < 0.15 * spread(1)
    # What a visit is like says nothing of the next: short and long ones come in random order.
    means = [lengths[positions(1, 0, visit, lengths, 8, 20)].mean() for visit in range(400)]
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.15


def test_slices_of_a_visit_are_the_visit() -> None:
    lengths = np.ones(50)
    assert positions(0, 2, 7, lengths, 6) == positions(0, 2, 14, lengths, 3) + positions(0, 2, 15, lengths, 3)
    rounds = [task for step in range(6) for task, _ in visits(0, step, 2, [1, 2, 1])]
    assert [Counter(rounds[i : i + 4]) for i in (0, 4, 8)] == [Counter({0: 1, 1: 2, 2: 1})] * 3


def test_a_store_gives_back_what_was_put_in(tmp_path: Path) -> None:
    items = [
        (7, Encoded((1, 2, 3), ((0, 1), (2, 2)), (0, 0), (), 0), 1),
        (3, Encoded((9,), ((0, 0),), (0, 1), ((0, 1),), 0), -1),
    ]
    made: list[int] = []

    def examples(notes: dict[str, int]) -> Any:
        made.append(1)
        notes["train"] = 1
        yield from items

    store = stored(tmp_path, "a" * 64, examples)
    again = stored(tmp_path, "a" * 64, examples)
    assert len(made) == 1, "built once"
    for one in (store, again):
        assert len(one) == 2
        assert one[0] == (items[0][1], 1)
        assert one[1] == (Encoded((9,), ((0, 0),), (0, 1), (), 0), -1)
        assert one.keys.tolist() == [7, 3]
        assert one.lengths.tolist() == [3, 1]
        assert one.notes == {"train": 1}
    (tmp_path / ("a" * 64) / "ids.bin").write_bytes(b"")
    with pytest.raises(ArtifactError, match="delete"):
        stored(tmp_path, "a" * 64, examples)


@pytest.mark.parametrize("shuffle", [False, True])
def test_stored_tokens_are_those_made_when_drawn(
    shuffle: bool, tiny_bert_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tinytrain.data_root(tmp_path / "data")
    recipe = tinytrain.make_recipe(data, tiny_bert_dir)
    tokenizer = load_backbone(recipe.backbone).tokenizer
    frame, tokenize = frame_for(tokenizer, (300, 301), 60), tokenize_with(tokenizer)

    def mixture(cache: Path | None) -> Mixture:
        tasks = load_upstream(
            upstream_tasks(recipe.tasks),
            data,
            tokenize=tokenize,
            frame=frame,
            option_limit=3,
            option_characters=40,
            spare_seeds=[1],
            cap=30,
            valid=8,
            seed=4,
            cache=cache,
            shuffle=shuffle,
        )
        return Mixture(
            tasks,
            tokenize,
            frame,
            seed=3,
            tasks_per_step=3,
            per_task=4,
            option_limit=3,
            option_characters=40,
            shuffle_options=shuffle,
        )

    plain, kept = mixture(None), mixture(tmp_path / "cache")
    monkeypatch.setattr(upstream, "encode", None)  # a second time nothing is encoded
    again = mixture(tmp_path / "cache")
    for step in range(6):
        for other in (kept, again):
            one, two = plain.batch(step), other.batch(step)
            assert (one.ids, one.uids) == (two.ids, two.uids)
            for name in ("tasks", "support", "present", "gold", "extractive"):
                assert torch.equal(getattr(one, name), getattr(two, name)), name
    assert plain.valid(1, 8, 4)[1].ids == again.valid(1, 8, 4)[1].ids
    assert plain.digests == again.digests


def test_temperature() -> None:
    recipe = PretrainConfig(kind="mp2-deep", steps=101, noise_from=0.0, temperature=1.0, temperature_to=0.01)
    assert recipe.temperature_at(0) == 1.0
    assert recipe.temperature_at(50) == pytest.approx(0.1)
    assert recipe.temperature_at(100) == pytest.approx(0.01)
    assert PretrainConfig(kind="mp2-deep", temperature=0.7).temperature_at(3999) == 0.7


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"kind": "spot"}, "modules: kind spot is one prompt"),
        ({"kind": "mp2-deep", "depth": "input"}, "depth"),
        ({"kind": "ppt", "modules": 1}, "ppt: kind ppt needs"),
        ({"kind": "mp2-deep", "ppt": {"corpus": ["a"]}}, "the other kinds have none"),
        ({"kind": "ppt", "modules": 1, "ppt": {"corpus": ["a"], "options": [5, 3]}}, "5 to 3"),
        ({"kind": "ppt", "modules": 1, "ppt": {"corpus": ["a"], "formats": ["single"]}}, "annotator"),
    ],
)
def test_recipes_that_contradict_themselves(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        PretrainConfig.model_validate(values)


def test_a_directory_of_tasks(tmp_path: Path) -> None:
    data = tinytrain.data_root(tmp_path / "tasks")
    assert [task.name for task in upstream_tasks(str(data))] == sorted(tinytrain.NAMES)
    assert data_beside(str(data)) == {name: data / name for name in tinytrain.NAMES}
    flat = data / "tiny-pair.yaml"
    flat.write_bytes((data / "tiny-pair" / "task.yaml").read_bytes())
    with pytest.raises(UsageError, match="two tasks have the name 'tiny-pair'"):
        upstream_tasks(str(data))
    assert data_beside([str(flat), "afqmc"]) == {"tiny-pair": data / "tiny-pair"}
    for wrong, said in ((str(tmp_path / "no"), "is no directory"), (str(data / "tiny-pair"), None)):
        if said:
            with pytest.raises(UsageError, match=said):
                upstream_tasks(wrong)
        else:
            assert [task.name for task in upstream_tasks(wrong)] == ["tiny-pair"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"has no \*\.yaml"):
        upstream_tasks(str(tmp_path / "empty"))


def test_speed() -> None:
    assert gemm_rate(torch.float32, torch.device("cpu"), 16, 16, 16, 0.0) > 0
    # One layer, all of whose positions are read: 4 operations a weight and token, and attention.
    hidden, ffn = 8, 32
    every = step_flops([5], 1, hidden, ffn, 5)
    assert every == 4 * 5 * (4 * hidden**2 + 2 * hidden * ffn) + 12 * hidden * 25
    assert step_flops([5], 2, hidden, ffn, 5) == 2 * every
    assert step_flops([5, 5], 2, hidden, ffn, 10) == 4 * every
