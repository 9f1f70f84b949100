"""Training a language model head: masked texts, what is learned, kills, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tinylm
import torch

from bbprompt import cli
from bbprompt.backends.backbone import load_backbone
from bbprompt.backends.cache import cache_root
from bbprompt.backends.tokens import frame_for, tokenize_with
from bbprompt.backends.trained_head import TrainedHead
from bbprompt.errors import DataError, ResumeMismatch, UsageError
from bbprompt.pretrain.lm_recipe import HeadConfig
from bbprompt.pretrain.lm_run import train_head
from bbprompt.pretrain.lm_texts import MaskedTexts, kept_tokens, open_pieces
from bbprompt.pretrain.lm_trainer import HeadTrainer

HERE = Path(__file__).parent
pytestmark = pytest.mark.usefixtures("token_cache")


def silent(*_: Any) -> None:
    """Nothing is shown."""


@pytest.fixture(scope="module")
def encoder(tiny_bert_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tinylm.headless_dir(tmp_path_factory.mktemp("encoder") / "bare", tiny_bert_dir)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, int]:
    root = tmp_path_factory.mktemp("texts")
    return {tinylm.corpus(root / "a.txt", 400, 1): 2, tinylm.corpus(root / "b.txt", 200, 2): 1}


def texts_of(recipe: HeadConfig) -> tuple[MaskedTexts, np.ndarray]:
    backbone = load_backbone(recipe.backbone)
    frame = frame_for(backbone.tokenizer, (), recipe.max_tokens)
    stores, digests = open_pieces(recipe.corpus, tokenize_with(backbone.tokenizer), frame, cache_root(), "tiny")
    kept, counts = kept_tokens(stores, len(backbone.tokenizer), recipe.vocabulary, recipe.least)
    assert (counts >= recipe.least).all()
    return MaskedTexts(recipe, stores, digests, kept, backbone.gap_token, frame), kept


def test_what_is_masked(encoder: Path, files: dict[Path, int]) -> None:
    recipe = tinylm.make_recipe(encoder, files, masked=0.25, files_per_step=3, per_file=32, bucket=1)
    texts, kept = texts_of(recipe)
    tokenizer = load_backbone(str(encoder)).tokenizer
    named = dict(enumerate(kept.tolist()))
    fates = {"masked": 0, "left": 0, "replaced": 0}
    for step in range(6):
        batch = texts.batch(step)
        again = texts.batch(step)
        assert (batch.ids, batch.uids) == (again.ids, again.uids)
        assert torch.equal(batch.gold, again.gold)
        assert len(batch.ids) == 96
        from_a = sum(uid.startswith("a.txt") for uid in batch.uids)
        assert from_a == 64, "visited as often as its weight says"
        for ids, places, present, gold in zip(batch.ids, batch.places, batch.present, batch.gold, strict=True):
            inner = len(ids) - 2
            assert int(present.sum()) == max(round(0.25 * inner), 1)
            chosen = places[present].tolist()
            assert len(set(chosen)) == len(chosen)
            assert 0 not in chosen
            assert len(ids) - 1 not in chosen
            assert (ids[0], ids[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id)
            for at, right in zip(chosen, gold[present].tolist(), strict=True):
                now, was = ids[at], named[right]
                fates["masked" if now == tokenizer.mask_token_id else "left" if now == was else "replaced"] += 1
    total = sum(fates.values())
    # One in about twenty replacements is by chance the token itself.
    assert {name: round(count / total, 1) for name, count in fates.items()} == {
        "masked": 0.8,
        "left": 0.1,
        "replaced": 0.1,
    }
    assert texts.batch(0).ids != texts.batch(6).ids


def test_documents_to_measure_on_are_never_trained_on(encoder: Path, files: dict[Path, int]) -> None:
    recipe = tinylm.make_recipe(encoder, files)
    texts, _ = texts_of(recipe)
    held = {uid for index in range(2) for batch in texts.valid(index, 3) for uid in batch.uids}
    assert held
    assert held.isdisjoint(uid for step in range(60) for uid in texts.batch(step).uids)


def test_tokens_that_it_cannot_name(encoder: Path, files: dict[Path, int]) -> None:
    recipe = tinylm.make_recipe(encoder, files, vocabulary=10)
    texts, kept = texts_of(recipe)
    assert len(kept) == 10
    golds = torch.cat([batch.gold[batch.present] for batch in map(texts.batch, range(6))])
    assert 0.2 < (golds < 0).float().mean() < 0.8


def test_it_learns_and_says_how_well(encoder: Path, files: dict[Path, int], tmp_path: Path) -> None:
    recipe = tinylm.make_recipe(
        encoder, files, steps=150, rate=0.01, per_file=16, save_every=50, valid_every=75, note="A trial."
    )
    steps: list[float] = []
    found = train_head(recipe, tmp_path / "out", lambda progress, _: steps.append(progress.loss))
    assert len(steps) == 150
    assert list(found) == ["a.txt", "b.txt"]
    for guesses in found.values():
        # The characters of the cycle are all about equally frequent.
        assert guesses.unigram1 < 0.2 < 0.7 < guesses.top1 <= guesses.top5
        assert guesses.known == 1.0
    assert steps[0] == pytest.approx(np.log(20), abs=0.4), "it begins with the frequencies"
    lines = [json.loads(line) for line in (tmp_path / "out" / "train.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [50, 75, 100, 150, 150]
    assert lines[-1]["valid"] == {name: asdict(guesses) for name, guesses in found.items()}
    card = (tmp_path / "out" / "artifact" / "README.md").read_text(encoding="utf-8")
    assert f"| a.txt | {found['a.txt'].tokens} | 1.000 | {found['a.txt'].top1:.3f} |" in card
    assert "- a.txt (our own)" in card
    assert "A trial." in card
    assert str(tmp_path) not in card + (tmp_path / "out" / "artifact" / "config.json").read_text(encoding="utf-8")


def test_killed_at_any_instant_it_ends_the_same(encoder: Path, files: dict[Path, int], tmp_path: Path) -> None:
    recipe = tinylm.make_recipe(encoder, files)
    (tmp_path / "recipe.json").write_text(recipe.model_dump_json(), encoding="utf-8")
    words = [sys.executable, str(HERE / "killedtrain.py"), str(tmp_path / "recipe.json"), "-", str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    undisturbed = summary.pop("never")
    assert set(undisturbed["files"]) == {"checkpoint.safetensors", "artifact/model.safetensors", "artifact/config.json"}
    assert sum(found["killed"] for found in summary.values()) == 11
    for name, found in summary.items():
        assert found["files"] == undisturbed["files"], name
        assert found["log"] == undisturbed["log"], name


def test_what_is_not_finite_stops_it(
    encoder: Path, files: dict[Path, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    features = HeadTrainer._features

    def broken(self: HeadTrainer, batch: Any) -> Any:
        states, gold = features(self, batch)
        return (states * (float("nan") if self.step == 3 else 1.0)), gold

    monkeypatch.setattr(HeadTrainer, "_features", broken)
    recipe = tinylm.make_recipe(encoder, files)
    with pytest.raises(UsageError, match=r"step 3: the loss is not finite, with texts of [ab]\.txt, document \d+"):
        train_head(recipe, tmp_path / "out", silent)
    monkeypatch.undo()
    train_head(recipe, tmp_path / "out", silent, resume=True)
    train_head(recipe, tmp_path / "whole", silent)
    for name in ("checkpoint.safetensors", "artifact/model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_other_texts_or_recipe_are_not_gone_on_with(encoder: Path, tmp_path: Path) -> None:
    file = tinylm.corpus(tmp_path / "a.txt", 60)
    recipe = tinylm.make_recipe(encoder, {file: 1})
    train_head(recipe, tmp_path / "out", silent)
    with pytest.raises(UsageError, match="holds a training already"):
        train_head(recipe, tmp_path / "out", silent)
    with pytest.raises(ResumeMismatch, match="another recipe"):
        train_head(recipe.model_copy(update={"rate": 0.5}), tmp_path / "out", silent, resume=True)
    tinylm.corpus(file, 70, 5)
    with pytest.raises(ResumeMismatch, match="other texts"):
        train_head(recipe, tmp_path / "out", silent, resume=True)


def test_too_little_text(encoder: Path, tmp_path: Path) -> None:
    recipe = tinylm.make_recipe(encoder, {tinylm.corpus(tmp_path / "a.txt", 1): 1})
    with pytest.raises(DataError, match=r"a\.txt: too few documents"):
        train_head(recipe, tmp_path / "out", silent)
    (tmp_path / "b.txt").write_text("\n\n".join(["你好", "再见", "谢谢"] * 30) + "\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"b\.txt: too few documents"):
        train_head(tinylm.make_recipe(encoder, {tmp_path / "b.txt": 1}), tmp_path / "other", silent)


def test_the_command(encoder: Path, files: dict[Path, int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tinylm.make_recipe(encoder, files)
    (tmp_path / "recipe.yaml").write_text(recipe.model_dump_json(), encoding="utf-8")
    words = ["pretrain", "lm-head", "--config", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "out")]
    assert cli.run([*words, "--device", "cpu"]) == 0
    out, err = capsys.readouterr()
    assert "a.txt" in out
    assert f"--method zero-shot-lm --backbone {tmp_path / 'out' / 'artifact'}" in out
    assert "6/6 steps, loss" in err
    assert len(TrainedHead.load(tmp_path / "out" / "artifact").files()) == 2
    assert (
        cli.run(["pretrain", "lm-head", "--resume", str(tmp_path / "out"), "--json", "--quiet", "--device", "cpu"]) == 0
    )
    held = json.loads(capsys.readouterr().out)["held_out"]
    assert held["a.txt"]["tokens"] > 0
    assert cli.run(["pretrain", "mp2", "--config", str(tmp_path / "recipe.yaml")]) == 2
    assert "run `bbprompt pretrain lm-head`" in capsys.readouterr().err


def test_the_bundled_recipe_names_files_that_are_yours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.run(["pretrain", "lm-head", "--device", "cpu", "--quiet"]) == 2
    assert "corpus: zh_lctt.txt.gz: no such file; name yours in a copy" in capsys.readouterr().err


def test_a_file_that_stands_twice(encoder: Path, files: dict[Path, int]) -> None:
    twice = [{"file": str(next(iter(files)))}] * 2
    with pytest.raises(ValueError, match=r"'a\.txt' stands twice; raise its weight"):
        tinylm.make_recipe(encoder, files, corpus=twice)
