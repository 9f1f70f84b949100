"""Prompt pre-training on raw text: corpus, examples, forms, and a short training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import tiny_prompt
from tinytrain import corpus

from bbprompt.backends.backbone import load_backbone
from bbprompt.backends.local import LocalOracle
from bbprompt.backends.tokens import frame_for, tokenize_with
from bbprompt.errors import DataError, UsageError
from bbprompt.pretrain.ppt_batches import PptBatches, open_ppt
from bbprompt.pretrain.recipe import PptSettings, PretrainConfig
from bbprompt.pretrain.run import pretrain
from bbprompt.prompts import ModularPrompt

pytestmark = pytest.mark.usefixtures("token_cache")


# ------------------------------------------------------------------------------------------------ training


def settings(file: Path, **changes: Any) -> PptSettings:
    return PptSettings.model_validate({"corpus": [str(file)], "window": 16, "options": [2, 6]} | changes)


def test_examples_are_made_once_and_drawn_alike(
    tiny_bert_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = corpus(tmp_path / "corpus.txt.gz", 60)
    tokenizer = load_backbone(str(tiny_bert_dir)).tokenizer
    frame, tokenize = frame_for(tokenizer, (300, 301), 100), tokenize_with(tokenizer)
    made: list[str] = []

    def counted(text: str) -> Any:
        made.append(text)
        return tokenize(text)

    def annotate(texts: Any) -> Any:
        return np.array([[0.95, 0.05] if len(text) % 2 else [0.5, 0.5] for text in texts])

    def open_again(seed: int = 1) -> PptBatches:
        stores, digest = open_ppt(
            settings(file, formats=["choice", "pair", "single"], annotator="run"),
            counted,
            frame,
            cache=tmp_path / "cache",
            tokenizer_digest="t",
            seed=seed,
            annotate=annotate,
            annotator_words=("坏", "好"),
        )
        return PptBatches(
            stores, "c", digest, seed=3, tasks_per_step=3, per_task=4, valid_size=8, weights={"pair": 2}, slices=2
        )

    one = open_again()
    first = len(made)
    two = open_again()
    assert len(made) == first > 0, "nothing is tokenized a second time"
    assert one.names == ("ppt-choice", "ppt-pair", "ppt-single")
    assert one.digests == two.digests
    assert open_again(seed=2).digests != one.digests
    for step in range(4):
        assert one.batch(step).ids == two.batch(step).ids
        assert len(one.batch(step).ids) == 12
        assert not set(one.batch(step, 0).uids) & set(one.batch(step, 1).uids)
    assert max(len(ids) for ids in one.batch(0).ids) <= 100
    held = {uid.split()[-1] for index in range(3) for batch in one.valid(index, 8, 8) for uid in batch.uids}
    drawn = {uid.split()[-1] for step in range(30) for uid in one.batch(step).uids}
    assert held
    assert not held & drawn, "validation has documents of its own"
    # Only the label that the annotator is sure of is left.
    single = one.valid(2, 8, 8)[0]
    assert single.gold.unique().tolist() == [0]
    assert single.present.sum(1).unique().tolist() == [2]


def test_examples_of_a_format_are_the_same_beside_others(tiny_bert_dir: Path, tmp_path: Path) -> None:
    """The cache holds each format for itself."""
    file = corpus(tmp_path / "corpus.txt.gz", 60)
    tokenizer = load_backbone(str(tiny_bert_dir)).tokenizer
    frame, tokenize = frame_for(tokenizer, (300, 301), 100), tokenize_with(tokenizer)
    found = []
    for number, formats in enumerate((["pair"], ["choice", "pair"])):
        cache = tmp_path / str(number)
        stores, _ = open_ppt(
            settings(file, formats=formats), tokenize, frame, cache=cache, tokenizer_digest="t", seed=1
        )
        found.append([stores["pair"][at][0].ids for at in range(len(stores["pair"].keys))])
    assert found[0] == found[1]


@pytest.mark.parametrize("examples", [1000, 60])
def test_every_file_is_trained_on_and_validated_on(examples: int, tiny_bert_dir: Path, tmp_path: Path) -> None:
    files = [corpus(tmp_path / f"{number}.txt", 60, number) for number in range(2)]
    for file, mark in zip(files, "甲乙", strict=True):
        file.write_text(file.read_text(encoding="utf-8").replace("。", f"{mark}。"), encoding="utf-8")
    tokenizer = load_backbone(str(tiny_bert_dir)).tokenizer
    frame, few = frame_for(tokenizer, (300, 301), 100), {"corpus": [str(file) for file in files], "examples": examples}
    stores, digest = open_ppt(
        settings(files[0], formats=["choice"], **few),
        tokenize_with(tokenizer),
        frame,
        cache=tmp_path / "cache",
        tokenizer_digest="t",
        seed=1,
    )
    batches = PptBatches(stores, "c", digest, seed=3, tasks_per_step=1, per_task=40, valid_size=40, files=2)
    marks = {tokenizer.convert_tokens_to_ids(mark) for mark in "甲乙"}
    (valid,) = batches.valid(0, 1000, 40)
    for batch in (batches.batch(0), valid):
        assert {token for ids in batch.ids for token in ids} >= marks


def test_pairs_are_cut_at_their_outer_ends(tiny_bert_dir: Path, tmp_path: Path) -> None:
    file = corpus(tmp_path / "corpus.txt", 60)
    tokenizer = load_backbone(str(tiny_bert_dir)).tokenizer
    written = {}
    for limit in (34, 200):
        frame = frame_for(tokenizer, (300, 301), limit)
        given = {"cache": tmp_path / "cache", "tokenizer_digest": "t", "seed": 1}
        stores, _ = open_ppt(settings(file, formats=["pair"]), tokenize_with(tokenizer), frame, **given)
        store = stores["pair"]
        written[limit] = [tokenizer.decode(store[i][0].ids).replace(" ", "") for i in range(len(store.keys))]
    short = 0
    for cut, whole in zip(written[34], written[200], strict=True):
        (before, behind), (first, second) = (text.split('"')[1::2] for text in (cut, whole))
        assert first.endswith(before)
        assert second.startswith(behind)
        short += cut != whole
    assert short > 20


def recipe(file: Path, backbone: Path, **changes: Any) -> PretrainConfig:
    values = {
        "kind": "ppt",
        "backbone": str(backbone),
        "modules": 1,
        "intrinsic_dim": 4,
        "prompt_length": 2,
        "first_placeholder": 300,
        "steps": 6,
        "tasks_per_step": 2,
        "per_task": 3,
        "max_tokens": 100,
        "valid_size": 4,
        "valid_every": 4,
        "save_every": 2,
        "dtype": "float32",
        "threads": 1,
        "ppt": settings(file, formats=["choice", "pair"], terms="made up").model_dump(mode="json"),
    }
    return PretrainConfig.model_validate(values | changes)


class KilledError(Exception):
    """Stands for the death of the process."""


def test_training_on_text_goes_on_where_it_was_killed(tiny_bert_dir: Path, tmp_path: Path) -> None:
    file = corpus(tmp_path / "corpus.txt", 80)
    config = recipe(file, tiny_bert_dir)
    scores = pretrain(config, tmp_path / "whole", None, lambda *_: None)
    assert set(scores) == {"ppt-choice", "ppt-pair"}

    def killer(progress: Any, steps: int) -> None:
        if progress.step == 3:
            raise KilledError

    with pytest.raises(KilledError):
        pretrain(config, tmp_path / "out", None, killer)
    pretrain(config, tmp_path / "out", None, lambda *_: None, resume=True)
    for name in ("checkpoint.safetensors", "artifact/model.safetensors", "artifact/config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    prompt = ModularPrompt.load(tmp_path / "out" / "artifact")
    assert (prompt.config.kind, prompt.config.layers, prompt.config.modules) == ("ppt", 1, 1)
    assert prompt.config.tasks == ()
    assert prompt.config.sources == ("ppt-choice: corpus.txt (made up)", "ppt-pair: corpus.txt (made up)")
    assert str(tmp_path) not in (tmp_path / "out" / "artifact" / "README.md").read_text(encoding="utf-8")
    assert prompt.config.training["recipe"]["ppt"]["corpus"] == ["corpus.txt"]
    LocalOracle(load_backbone(str(tiny_bert_dir)), prompt)


def test_next_sentences_can_be_learnt(tiny_bert_dir: Path, tmp_path: Path) -> None:
    # Each document has a character of its own, so the next sentence is easy to tell from those of others.
    file, rng = tmp_path / "corpus.txt", np.random.default_rng(0)
    blocks = []
    for number in range(60):
        mark = tiny.HANZI[500 + number] * 3
        blocks.append("\n".join(mark + tiny_prompt.words(rng, 2, 4) + "。" for _ in range(6)))
    file.write_text("\n\n".join(blocks), encoding="utf-8")
    options = settings(file, options=[2, 2]).model_dump(mode="json")
    quick = {"prompt_scale": 1.0, "head_rate": 0.05, "module_rate": 0.1, "projection_rate": 0.05}
    config = recipe(file, tiny_bert_dir, steps=60, per_task=8, tasks_per_step=1, ppt=options, noise_from=1.0, **quick)
    losses: list[float] = []
    pretrain(config, tmp_path / "out", None, lambda progress, _: losses.append(progress.loss))
    assert np.mean(losses[-10:]) < 0.9 * np.mean(losses[:10])


def test_a_corpus_that_will_not_do(tiny_bert_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"ppt\.corpus: .*nowhere\.txt: no such file"):
        pretrain(recipe(tmp_path / "nowhere.txt", tiny_bert_dir), tmp_path / "a", None, lambda *_: None)
    few = corpus(tmp_path / "few.txt", 1)
    with pytest.raises(DataError, match="too few documents for the format"):
        pretrain(recipe(few, tiny_bert_dir), tmp_path / "b", None, lambda *_: None)
