"""A trained head on its encoder: against plain products, as a backbone, and what is refused."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_prompt
import tinylm
import torch
from reference import plain_states

import bbprompt
from bbprompt.backends import trained_head
from bbprompt.backends.backbone import DEFAULT_BACKBONE, load_backbone
from bbprompt.backends.language import LocalLanguageModel
from bbprompt.backends.trained_head import HeadCard, TrainedHead, Transform
from bbprompt.errors import ArtifactError, DataError
from bbprompt.pretrain.lm_card import head_card
from bbprompt.prompts import ModularPrompt, resolve_prompts
from bbprompt.tasks.example import Form, Part

KEPT = [*range(5), *range(60, 3000, 2)]
FORM = Form((Part("天的地", cut=True), Part("是", cut=False), Part("好", cut=False)), ("天", "地"), -1, gap=2)


@pytest.fixture(scope="module")
def encoder(tiny_bert_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tinylm.headless_dir(tmp_path_factory.mktemp("encoder") / "bare", tiny_bert_dir)


def nameable(encoder: Path, *extra: str) -> list[int]:
    """Some ids, with those of the label words in the tests."""
    vocabulary = load_backbone(str(encoder)).tokenizer.get_vocab()
    words = "".join(("天地相似矛盾", *extra, *tiny_prompt.PAIR["labels"].values()))
    return sorted({*KEPT, *(vocabulary[char] for char in words)})


def head_dir(folder: Path, encoder: Path, **changes: Any) -> Path:
    """Write a head of random numbers."""
    backbone = load_backbone(str(encoder))
    tokens = nameable(encoder)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        transform = Transform(backbone.hidden, 24)
        tensors = {name: value.numpy() for name, value in transform.state_dict().items()}
        tensors["bias"] = torch.randn(len(tokens)).numpy()
    card = {
        "backbone": str(encoder),
        "backbone_digest": backbone.digest,
        "hidden": backbone.hidden,
        "width": 24,
        "tokens": len(tokens),
    }
    head = TrainedHead(HeadCard.model_validate(card | changes), {**tensors, "tokens": np.array(tokens)})
    folder.mkdir(parents=True)
    for name, content in head.files().items():
        (folder / name).write_bytes(content)
    return folder


def test_it_equals_plain_products(encoder: Path, tmp_path: Path) -> None:
    folder = head_dir(tmp_path / "head", encoder)
    backbone = load_backbone(str(folder), head=True)
    assert backbone.id == str(folder)
    model = LocalLanguageModel(backbone)
    tokenizer, embedding = backbone.tokenizer, backbone.model.get_input_embeddings().weight
    tensors = TrainedHead.load(folder)._tensors
    transform = Transform(backbone.hidden, 24)
    transform.load_state_dict({k: torch.from_numpy(tensors[k]).float() for k in transform.state_dict()})
    ids = [tokenizer.cls_token_id, *tokenizer("天的地是", add_special_tokens=False)["input_ids"]]
    gap = len(ids)
    ids += [tokenizer.mask_token_id, *tokenizer("好", add_special_tokens=False)["input_ids"], tokenizer.sep_token_id]
    state = torch.from_numpy(plain_states(backbone.model, [ids])[0][gap])
    kept = torch.from_numpy(tensors["tokens"]).long()
    logits = embedding[kept] @ transform(state) + torch.from_numpy(tensors["bias"]).float()
    logs = torch.log_softmax(logits, -1).detach().numpy()
    whole = model.vocabulary([FORM]).logs[0]
    assert whole.shape == (len(embedding),)
    np.testing.assert_allclose(whole[tensors["tokens"]], logs, atol=1e-4)
    assert np.isneginf(np.delete(whole, tensors["tokens"])).all()
    words = tokenizer.convert_tokens_to_ids(list(FORM.options))
    by_id = dict(zip(tensors["tokens"].tolist(), logits.tolist(), strict=True))
    np.testing.assert_allclose(model.words([FORM]).logits[0, :, 0], [by_id[word] for word in words], atol=1e-4)


def test_words_that_it_cannot_name_are_refused(encoder: Path, tmp_path: Path) -> None:
    model = LocalLanguageModel(load_backbone(str(head_dir(tmp_path / "head", encoder)), head=True))
    missing = next(
        char for char in "一丁七万丈三上下不与" if model._head._known is not None and not_named(encoder, char)
    )
    with pytest.raises(
        DataError, match=f"option word '{missing}' has a token that the language model head cannot name"
    ):
        model.words([Form(FORM.parts, ("天", missing), -1, gap=2)])


def not_named(encoder: Path, char: str) -> bool:
    return load_backbone(str(encoder)).tokenizer.get_vocab()[char] not in nameable(encoder)


def test_the_head_of_the_package_is_found_by_the_weights(
    encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(trained_head, "_BUNDLED", tmp_path / "heads")
    with pytest.raises(ArtifactError, match="no language model head, neither of its own nor trained"):
        load_backbone(str(encoder), head=True)
    head_dir(tmp_path / "heads" / "mine", encoder)
    shutil.copytree(encoder, tmp_path / "copy")
    with caplog.at_level(logging.INFO, "bbprompt"):
        headed = load_backbone(str(tmp_path / "copy"), head=True)
    assert f"language model head mine, which names {len(nameable(encoder))} tokens" in caplog.text
    bare = load_backbone(str(tmp_path / "copy"))
    assert bare.head is None
    assert bare.digest != headed.digest
    assert headed.digest == load_backbone(str(tmp_path / "heads" / "mine"), head=True).digest
    assert bare.digest == load_backbone(str(tmp_path / "heads" / "mine")).digest


def test_a_model_with_its_own_head_keeps_it(
    tiny_bert_dir: Path, encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trained_head, "_BUNDLED", tmp_path / "heads")
    own = load_backbone(str(tiny_bert_dir), head=True)
    head_dir(tmp_path / "heads" / "mine", encoder)
    again = load_backbone(str(tiny_bert_dir), head=True)
    assert own.digest == again.digest
    assert again.head is not None
    assert again.head.tokens is None


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "config.json").write_text('{"kind": "lm-head"}'), "damaged language model head"),
        (lambda f: (f / "model.safetensors").write_bytes(b"x" * 40), "damaged language model head"),
        (lambda f: flip(f / "model.safetensors"), "does not match its checksum"),
        (lambda f: change(f, '"tokens": ', '"tokens": 1'), "not the .* token ids"),
        (lambda f: change(f, '"width": 24', '"width": 25'), "no usable dense.weight"),
        (lambda f: change(f, '"backbone_digest": "', '"backbone_digest": "0'), "was trained for .* not for"),
    ],
)
def test_what_is_damaged_is_refused(encoder: Path, tmp_path: Path, spoil: Any, message: str) -> None:
    folder = head_dir(tmp_path / "head", encoder)
    spoil(folder)
    with pytest.raises(ArtifactError, match=message):
        load_backbone(str(folder), head=True)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-9] ^= 1
    file.write_bytes(bytes(content))


def change(folder: Path, old: str, new: str) -> None:
    text = (folder / "config.json").read_text(encoding="utf-8")
    assert old in text
    (folder / "config.json").write_text(text.replace(old, new), encoding="utf-8")


@pytest.mark.parametrize("method", ["zero-shot-lm", "bbt", "bbtv2", "promptboosting"])
def test_methods_run_on_it(method: str, encoder: Path, tiny_pair_data: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {}
    if method.startswith("bbt"):
        changes = {"projection.dim": 6, "projection.prompt_length": 3, "prompt.popsize": 4, "prompt.dev_every": 8}
    result = bbprompt.tune(
        task=str(tiny_pair_data / "task.yaml"),
        data=str(tiny_pair_data),
        method=method,
        backbone=str(head_dir(tmp_path / "head", encoder)),
        budget=40,
        threads=1,
        run_dir=str(tmp_path / "run"),
        set=changes,
    )
    assert result.test.n == 30
    with bbprompt.load_prompt(str(tmp_path / "run")) as prompt:
        assert len(prompt.predict([{"text_a": "天天", "text_b": "地地"}])) == 1


def test_the_head_of_the_default_backbone() -> None:
    prompts = ModularPrompt.load(resolve_prompts("e5-small-mp2-deep")).config
    head = trained_head.bundled_head(prompts.backbone_digest)
    assert head is not None
    assert head.card.backbone == prompts.backbone == DEFAULT_BACKBONE
    assert head.folder is not None
    assert sum(file.stat().st_size for file in head.folder.iterdir()) < 15e6
    held = head.card.training["held_out"].values()
    assert all(text["top1"] > text["unigram1"] for text in held)
    assert (head.folder / "README.md").read_text(encoding="utf-8") == head_card(head.card)
