"""Model tuning: the forward and the gradients of all weights, and what is kept of them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from test_gradient import data_of

from bbprompt.backends.backbone import Backbone, load_backbone, weights_digest
from bbprompt.backends.local import LocalOracle
from bbprompt.backends.overlay import PREFIX, Rows, overlaid, rows_read, weights_of, with_rows, written_weights
from bbprompt.descent_settings import ModelDescentConfig
from bbprompt.errors import ArtifactError
from bbprompt.frozen import written_out
from bbprompt.gradient.forward import Forward
from bbprompt.gradient.soft import SoftModel
from bbprompt.oracle import ReadoutKind
from bbprompt.prompts import ModularPrompt, Pooling
from bbprompt.readout import Readout
from bbprompt.router import PAPER
from bbprompt.scoring import Labelled


def start(backbone: Backbone, readout: ReadoutKind = "span", length: int = 0) -> ModularPrompt:
    """No prompt, or one of zeros, with an answer head of some size."""
    rng = np.random.default_rng(1)
    rows = 2 if readout == "span" else 0
    head = rng.normal(0, 0.3, (rows, backbone.hidden)), rng.normal(0, 0.1, rows)
    zeros = np.zeros((1, length, backbone.hidden), dtype=np.float32)
    names = backbone.id, backbone.digest
    return written_out(zeros, range(300, 300 + length), head, names, readout, Pooling(scale=7.0, prefix="问："))[0]


def learning(
    backbone: Backbone, prompt: ModularPrompt, data: Labelled, batch_tokens: int = 100
) -> tuple[SoftModel, Forward]:
    """A model that can learn, and its forward; so few tokens at once that the texts are cut into pieces."""
    own = torch.from_numpy(prompt.head_weight), torch.from_numpy(prompt.head_bias)
    keys: dict[str, Any] = {
        "device": "cpu",
        "dtype": "float32",
        "limit": backbone.limit(None),
        "support": "candidates",
        "batch_tokens": batch_tokens,
    }
    read = rows_read(backbone, Forward(backbone, prompt.config, own, **keys).tokens(data.batch))
    soft = SoftModel(prompt, PAPER, 3, with_rows(backbone.model, read))
    learns = Backbone(
        backbone.id, soft.model, backbone.tokenizer, backbone.digest, backbone.token_type, backbone.source
    )
    return soft, Forward(learns, prompt.config, (soft.head_weight, soft.head_bias), **keys, learns=True)


def loss(backbone: Backbone, prompt: ModularPrompt, data: Labelled) -> float:
    """The mean loss that an oracle answers."""
    scores = LocalOracle(backbone, prompt).score(data.batch, np.ones((1, 1, 1), dtype=np.float32), "candidates")
    return float(Readout("candidates").losses(scores, data.batch, data.gold).mean())


def electra_dir(folder: Path, bert: Path) -> Path:
    """An ELECTRA whose embeddings are narrower than its states: a projection stands between."""
    from transformers import ElectraConfig, ElectraModel

    shutil.copytree(bert, folder)
    config = ElectraConfig(
        vocab_size=len((bert / "vocab.txt").read_text(encoding="utf-8").split()),
        embedding_size=16,
        hidden_size=tiny.HIDDEN,
        num_hidden_layers=tiny.LAYERS,
        num_attention_heads=tiny.HEADS,
        intermediate_size=tiny.FFN,
        max_position_embeddings=128,
        initializer_range=0.3,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        ElectraModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["bert", "roberta", "electra", "cpt"])
def model(
    request: pytest.FixtureRequest, tiny_bert_dir: Path, tiny_roberta_dir: Path, tmp_path_factory: Any
) -> Backbone:
    if request.param == "cpt":
        folder = tiny.cpt_dir(tmp_path_factory.mktemp("cpt") / "cpt", words=len(tiny.WORDS), positions=96)
        return load_backbone(str(folder))
    if request.param == "electra":
        return load_backbone(str(electra_dir(tmp_path_factory.mktemp("electra") / "electra", tiny_bert_dir)))
    return load_backbone(str({"bert": tiny_bert_dir, "roberta": tiny_roberta_dir}[request.param]))


@pytest.mark.parametrize(("readout", "kind", "length"), [("span", "pair", 0), ("span", "choice", 2)])
def test_before_the_first_step_it_is_the_frozen_model(
    readout: ReadoutKind, kind: str, length: int, model: Backbone
) -> None:
    prompt, data = start(model, readout, length), data_of(kind, readout)
    soft, forward = learning(model, prompt, data)
    pieces = forward.pieces(data)
    assert len(pieces) > 1
    found = forward.scores(pieces, soft.current(), None)
    expected = LocalOracle(model, prompt).score(data.batch, np.ones((1, 1, 1), dtype=np.float32), "candidates")
    np.testing.assert_allclose(found.logits, expected.logits, atol=1e-5)
    np.testing.assert_allclose(found.normalizer, expected.normalizer, atol=1e-5)
    soft.moved(ModelDescentConfig(epochs=1, rate=1.0))  # from here on the forward that gradients are taken of
    losses = torch.cat([forward.losses(piece, soft.current()) for piece in pieces])
    assert float(losses.detach().mean()) == pytest.approx(loss(model, prompt, data), abs=1e-5)


@pytest.mark.parametrize(("readout", "kind"), [("span", "pair"), ("span", "extract"), ("prototype", "choice")])
def test_the_gradient_of_the_weights_is_that_of_the_oracles_loss(
    readout: ReadoutKind, kind: str, model: Backbone
) -> None:
    prompt, data = start(model, readout), data_of(kind, readout)
    before = weights_digest(model.model)
    soft, forward = learning(model, prompt, data)
    parameters = soft.moved(ModelDescentConfig(epochs=1, rate=1.0))
    pieces = forward.pieces(data)
    for piece in pieces:
        (forward.losses(piece, soft.current()).sum() / len(data.gold)).backward()
    rng, step = np.random.default_rng(2), 1e-2
    for name, parameter in parameters.items():
        assert parameter.grad is not None, name
    for part in (".query.", ".value.", "output.LayerNorm", "intermediate", "word_embeddings", "embeddings.LayerNorm"):
        names = [name for name in parameters if part in name]
        directions = {name: rng.normal(size=tuple(parameters[name].shape)) for name in names}
        size = np.sqrt(sum(float((each**2).sum()) for each in directions.values()))
        slope = sum(float((parameters[n].grad.numpy() * directions[n]).sum()) for n in names) / size  # type: ignore[union-attr]
        losses = []
        for sign in (1, -1):
            changed = written_weights(soft.model)
            for name, direction in directions.items():
                changed[name] = (changed[name] + sign * step * direction / size).astype(np.float32)
            losses.append(loss(overlaid(model, changed), prompt, data))
        assert slope == pytest.approx((losses[0] - losses[1]) / (2 * step), rel=0.03, abs=3e-4), part
    assert weights_digest(model.model) == before


def test_only_the_rows_that_are_read_are_there_and_tables_are_shared(model: Backbone) -> None:
    data = data_of("pair", "span")
    soft, forward = learning(model, start(model), data)
    read = {token for ids in forward.tokens(data.batch) for token in ids}
    table = soft.model.embeddings.word_embeddings
    assert isinstance(table, Rows)
    assert table.index.tolist() == sorted(read)
    assert table.weight.data_ptr() == model.model.embeddings.word_embeddings.weight.data_ptr()
    types = soft.model.embeddings.token_type_embeddings
    assert types.index.tolist() == [model.token_type]
    names = set(weights_of(soft.model))
    stock = {name for name, _ in model.model.named_parameters() if not name.startswith("embeddings.")}
    assert stock <= names


def test_adam_leaves_unread_rows_of_a_whole_table_alone(tiny_bert_dir: Path) -> None:
    """What lets a run keep the read rows alone: with the stock table as one parameter the others stay, bit for bit."""
    stock, data = load_backbone(str(tiny_bert_dir)), data_of("pair", "span")
    soft, forward = learning(stock, start(stock), data)
    read = soft.model.embeddings.word_embeddings.index
    table = torch.nn.Parameter(stock.model.embeddings.word_embeddings.weight.detach().clone())
    ids = torch.tensor([token for each in forward.tokens(data.batch) for token in each])
    adam, before = torch.optim.Adam([table], lr=1e-2), table.detach().clone()
    for _ in range(3):
        adam.zero_grad()
        torch.nn.functional.embedding(ids, table).square().sum().backward()
        adam.step()
    moved = (table.detach() != before).any(-1).nonzero().squeeze(1)
    assert moved.tolist() == read.tolist()


def test_weights_of_another_shape_are_refused(tiny_bert_dir: Path) -> None:
    bert, data = load_backbone(str(tiny_bert_dir)), data_of("pair", "span")
    kept = written_weights(learning(bert, start(bert), data)[0].model)
    word = f"{PREFIX}embeddings.word_embeddings"
    query = f"{PREFIX}encoder.layer.0.attention.self.query.weight"
    broken: list[dict[str, Any]] = [
        {name: array for name, array in kept.items() if name != query},
        kept | {query: kept[query][:1]},
        kept | {query: kept[query] * np.float32("nan")},
        kept | {f"{word}.index": kept[f"{word}.index"][::-1].copy()},
        kept | {f"{word}.index": kept[f"{word}.index"] + 10_000_000},
        kept | {f"{PREFIX}strange": kept[query]},
        *({name: array for name, array in kept.items() if name != f"{word}.{part}"} for part in ("index", "rows")),
        kept | {f"{PREFIX}encoder.index": kept[f"{word}.index"]},
    ]
    for tensors in broken:
        with pytest.raises(ArtifactError, match=r"the tuned weights do not fit the backbone .* tune again"):
            overlaid(bert, tensors)
    assert overlaid(bert, {"prompt": kept[query]}) is bert
