"""The thin forward against stock transformers models."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from reference import plain_states, prepended_states

from bbprompt.backends.backbone import Backbone, load_backbone
from bbprompt.backends.encoder import FAMILY, Encoder
from bbprompt.backends.layout import pack
from bbprompt.backends.linear import FrozenLinear, packable
from bbprompt.errors import ArtifactError
from bbprompt.texts.mrc import NO_TOKEN

KINDS = (*tiny.MASKED, "cpt")
PRECISIONS = (None, torch.float32, torch.bfloat16)
LENGTHS = (5, 40, 9, 23, 24, 5, 1, 38)


@pytest.fixture(scope="module")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Backbone]:
    root = tmp_path_factory.mktemp("models")
    folders = {kind: tiny.masked_dir(root / kind, kind, positions=64) for kind in tiny.MASKED}
    folders["cpt"] = tiny.cpt_dir(root / "cpt", words=400, positions=64)
    return {kind: load_backbone(str(folder)) for kind, folder in folders.items()}


@pytest.fixture(scope="module")
def models(backbones: dict[str, Backbone]) -> dict[str, Any]:
    return {kind: backbone.model for kind, backbone in backbones.items()}


def encoder_of(backbone: Backbone, prepack: bool = True) -> Encoder:
    return Encoder(backbone.model, token_type=backbone.token_type, prepack=prepack)


def texts(seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(5, 300, size).tolist() for size in LENGTHS]


def run(
    encoder: Encoder, ids: list[list[int]], prompts: torch.Tensor | None = None, first: int = 1, fast: Any = None
) -> list[Any]:
    """Last states of each text from our forward, prompts `(L, P, H)` added before each layer."""
    layout = pack([len(text) for text in ids], fast=fast)
    states = encoder.embed(ids, layout)[None]
    for index in range(len(encoder.layers)):
        if prompts is not None and index < len(prompts):
            slots = (layout.starts[:, None] + torch.arange(first, first + prompts.shape[1])).flatten()
            states = states.index_add(1, slots, prompts[index].repeat(len(ids), 1)[None])
        states = encoder.layer(index, states, layout)
    return [states[0, at : at + len(text)] for at, text in zip(layout.starts.tolist(), ids, strict=True)]


def largest_difference(ours: list[Any], theirs: list[np.ndarray]) -> float:
    assert [tuple(one.shape) for one in ours] == [other.shape for other in theirs]
    return max(float(np.abs(one.float().numpy() - other).max()) for one, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(
    ("prepack", "fast"), [(True, None), (True, torch.float32), (True, torch.bfloat16), (False, None)]
)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_stock_forward(backbones: dict[str, Backbone], kind: str, prepack: bool, fast: Any) -> None:
    ids, backbone = texts(), backbones[kind]
    with torch.inference_mode():
        ours = run(encoder_of(backbone, prepack), ids, fast=fast)
    assert largest_difference(ours, plain_states(backbone.model, ids, token_type=backbone.token_type)) < 1e-5


def test_every_family_is_tested(models: dict[str, Any]) -> None:
    assert {models[kind].config.model_type for kind in KINDS} == set(FAMILY)


@pytest.mark.parametrize("kind", KINDS)
def test_injection_equals_a_hook_before_each_layer(backbones: dict[str, Backbone], kind: str) -> None:
    ids, backbone = [text for text in texts() if len(text) > 4], backbones[kind]
    prompts = np.random.default_rng(1).normal(size=(tiny.LAYERS, 3, tiny.HIDDEN)).astype(np.float32)
    with torch.inference_mode():
        ours = run(encoder_of(backbone), ids, torch.from_numpy(prompts))
        bare = run(encoder_of(backbone), ids)
    stock = plain_states(backbone.model, ids, prompts, token_type=backbone.token_type)
    assert largest_difference(ours, stock) < 1e-5
    assert largest_difference(ours, [one.numpy() for one in bare]) > 0.1, "the prompts must be visible"


@pytest.mark.parametrize("fast", PRECISIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_rows_before_the_first_token(backbones: dict[str, Backbone], kind: str, fast: Any) -> None:
    backbone = backbones[kind]
    ids, prompt = texts(), np.random.default_rng(1).normal(size=(3, tiny.HIDDEN)).astype(np.float32)
    longer = [[NO_TOKEN] * 3 + text for text in ids]
    with torch.inference_mode():
        encoder = encoder_of(backbone)
        ours = run(encoder, longer, torch.from_numpy(prompt)[None], first=0, fast=fast)
        zero, bare = run(encoder, longer, fast=fast), run(encoder, ids, fast=fast)
        layout, own = pack([len(text) for text in longer]), pack([len(text) for text in ids])
        rows, known = encoder.embed(longer, layout), encoder.embed(ids, own)
    for found, added in ((ours, prompt), (zero, 0 * prompt)):
        stock = prepended_states(backbone.model, ids, added, backbone.token_type)
        assert largest_difference(found, stock) < 1e-5
    # Rows of zeros are attended to, although they change no token's own embedding.
    assert largest_difference([one[3:] for one in zero], [one.numpy() for one in bare]) > 0.01
    for at, first, text in zip(layout.starts.tolist(), own.starts.tolist(), ids, strict=True):
        assert not rows[at : at + 3].any()
        assert torch.equal(rows[at + 3 : at + 3 + len(text)], known[first : first + len(text)])


def test_a_zero_prompt_is_no_prompt(models: dict[str, Any]) -> None:
    ids = [text for text in texts() if len(text) > 4]
    with torch.inference_mode():
        encoder = Encoder(models["bert"])
        zero = run(encoder, ids, torch.zeros(tiny.LAYERS, 3, tiny.HIDDEN))
        none = run(encoder, ids)
    assert all(torch.equal(one, other) for one, other in zip(zero, none, strict=True))


def test_a_shallow_prompt_is_added_once(models: dict[str, Any]) -> None:
    ids = [text for text in texts() if len(text) > 4]
    prompts = np.random.default_rng(1).normal(size=(1, 3, tiny.HIDDEN)).astype(np.float32)
    with torch.inference_mode():
        ours = run(Encoder(models["bert"]), ids, torch.from_numpy(prompts))
    assert largest_difference(ours, plain_states(models["bert"], ids, prompts)) < 1e-5


def test_token_type_is_fed_at_every_position(models: dict[str, Any]) -> None:
    ids = texts()
    with torch.inference_mode():
        ours = run(Encoder(models["bert"], token_type=1), ids)
    assert largest_difference(ours, plain_states(models["bert"], ids, token_type=1)) < 1e-5


@pytest.mark.parametrize("fast", PRECISIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_read_rows_equal_those_of_the_whole_layer(models: dict[str, Any], kind: str, fast: Any) -> None:
    ids = texts()
    layout = pack([len(text) for text in ids], fast=fast)
    encoder = Encoder(models[kind])
    rng = np.random.default_rng(2)
    read = layout.starts[:, None] + torch.tensor([rng.integers(0, len(text), 6).tolist() for text in ids])
    with torch.inference_mode():
        states = encoder.embed(ids, layout)[None].repeat(3, 1, 1)
        states = states + torch.from_numpy(rng.normal(0, 0.1, states.shape).astype(np.float32))
        whole = encoder.layer(1, states, layout)
        rows = encoder.layer(1, states, layout, read)
    assert rows.shape == (3, len(ids), 6, tiny.HIDDEN)
    assert (rows - whole[:, read]).abs().max() < 1e-5


@pytest.mark.parametrize("fast", PRECISIONS)
@pytest.mark.parametrize("count", [1, 3])
def test_few_rows_equal_those_of_the_whole_layer(models: dict[str, Any], count: int, fast: Any) -> None:
    ids = texts()
    layout = pack([len(text) for text in ids], slack=4, fast=fast)
    encoder = Encoder(models["bert"])
    read = layout.starts[:, None] + torch.tensor([[len(text) - 1] for text in ids])
    assert 2 * read.shape[1] * encoder.heads <= encoder.hidden, "keys and values must be absorbed"
    with torch.inference_mode():
        states = torch.randn(count, sum(LENGTHS), tiny.HIDDEN, generator=torch.Generator().manual_seed(0))
        whole = encoder.layer(1, states, layout)
        rows = encoder.layer(1, states, layout, read)
        known = encoder.layer(1, states, layout, read, encoder.project(1, states, keys_only=True))
    assert (rows - whole[:, read]).abs().max() < 1e-5
    assert (known - whole[:, read]).abs().max() < 1e-5


def test_candidates_run_side_by_side(models: dict[str, Any]) -> None:
    ids = texts()
    layout = pack([len(text) for text in ids])
    encoder = Encoder(models["bert"])
    with torch.inference_mode():
        states = torch.randn(4, sum(LENGTHS), tiny.HIDDEN, generator=torch.Generator().manual_seed(0))
        together = encoder.layer(0, states, layout)
        apart = torch.cat([encoder.layer(0, one[None], layout) for one in states])
    assert (together - apart).abs().max() < 1e-5


def test_with_and_without_gradients(models: dict[str, Any]) -> None:
    ids = texts()
    encoder = Encoder(models["bert"])
    with torch.inference_mode():
        forward = run(encoder, ids)
    prompts = torch.zeros(tiny.LAYERS, 1, tiny.HIDDEN, requires_grad=True)
    training = run(encoder, ids, prompts, first=0)
    assert largest_difference(forward, [one.detach().numpy() for one in training]) < 1e-5
    sum(one.square().sum() for one in training).backward()  # type: ignore[union-attr]
    assert prompts.grad is not None
    assert (prompts.grad.abs().amax((1, 2)) > 0).all()
    assert all(parameter.grad is None for parameter in models["bert"].parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_processor_that_cannot_pack_computes_the_same(
    dtype: torch.dtype, models: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    able = packable(dtype)
    monkeypatch.setattr("bbprompt.backends.encoder.packable", lambda _: False)
    plain = Encoder(models["bert"], dtype)
    monkeypatch.setattr("bbprompt.backends.encoder.packable", lambda _: able)
    usual = Encoder(models["bert"], dtype)
    assert plain.layers[0].query.packed is None
    assert (usual.layers[0].query.packed is not None) == able
    with torch.inference_mode():
        ours, theirs = run(plain, texts()), run(usual, texts())
    size = 1e-5 if dtype is torch.float32 else 0.15
    assert largest_difference(ours, [one.float().numpy() for one in theirs]) < size


def test_bfloat16_is_near(models: dict[str, Any]) -> None:
    ids = texts()
    with torch.inference_mode():
        ours = run(Encoder(models["bert"], torch.bfloat16), ids)
    assert ours[0].dtype == torch.bfloat16
    theirs = np.concatenate(plain_states(models["bert"], ids))
    mine = torch.cat(ours).float().numpy()
    assert np.abs(mine - theirs).mean() < 0.05


def test_other_models_are_refused() -> None:
    from transformers import BertConfig, BertModel, DistilBertConfig, DistilBertModel

    small = {"vocab_size": 50, "dim": 8, "n_layers": 1, "n_heads": 2, "hidden_dim": 8}
    with pytest.raises(ArtifactError, match="type 'distilbert' with activation"):
        Encoder(DistilBertModel(DistilBertConfig(**small)))
    sizes = {"vocab_size": 50, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    with pytest.raises(ArtifactError, match="activation 'relu'"):
        Encoder(BertModel(BertConfig(**sizes, intermediate_size=8, hidden_act="relu")))


# ------------------------------------------------------------------------------------- copies of weights


def storages(encoder: Encoder) -> set[int]:
    """Where the plain weights of its products lie."""
    layers = encoder.layers
    maps = [layer.projections[0] for layer in layers]
    maps += [each.weight for layer in layers for each in (layer.attention_out, layer.up, layer.down)]
    return {weight.untyped_storage().data_ptr() for weight in maps}


def packed_bytes(encoder: Encoder) -> int:
    """Memory of all packed weights that there are."""
    made = [part for layer in encoder.layers for part in vars(layer).values() if isinstance(part, FrozenLinear)]
    return sum(part.packed.numel() * part.packed.element_size() for part in made if part.packed is not None)


def test_one_module_is_not_copied(models: dict[str, Any]) -> None:
    model = models["bert"]
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    encoder = Encoder(model)
    assert len(storages(encoder) - own) == len(encoder.layers), "only what is joined, in each layer"
    for layer, stock in zip(encoder.layers, model.encoder.layer, strict=True):
        assert layer.up.weight.data_ptr() == stock.intermediate.dense.weight.data_ptr()
    with torch.inference_mode():
        encoder.layer(1, torch.zeros(1, 3, encoder.hidden), pack([3]), torch.tensor([[0]]))
    read = encoder.layers[1]
    joined = read.projections[0].untyped_storage().data_ptr()
    assert {part.weight.untyped_storage().data_ptr() for part in (read.query, read.key_value)} == {joined}


@pytest.mark.skipif(not packable(torch.float32), reason="nothing is packed here")
def test_only_what_a_forward_reads_is_packed(models: dict[str, Any]) -> None:
    encoder, size = Encoder(models["bert"]), 4 * tiny.HIDDEN**2
    others = 4 * sum(each.weight.numel() for at in encoder.layers for each in (at.attention_out, at.up, at.down))
    layout, last = pack([9, 9]), len(encoder.layers) - 1
    assert packed_bytes(encoder) == others + 3 * size * last
    with torch.inference_mode():
        for rows, more in ((1, 1), (8, 3)):  # queries, then keys and values too
            states = encoder.embed([[5] * 9] * 2, layout)[None]
            for index in range(last + 1):
                read = layout.rows(torch.arange(rows)) if index == last else None
                states = encoder.layer(index, states, layout, read)
            assert packed_bytes(encoder) == others + 3 * size * last + more * size


@pytest.mark.parametrize("way", ["transposed", "shifted"])
def test_a_weight_that_products_cannot_read_is_copied(way: str, models: dict[str, Any]) -> None:
    model = copy.deepcopy(models["bert"])
    for layer in model.encoder.layer:
        weight = layer.intermediate.dense.weight
        apart = torch.empty(weight.numel() + 1)[1:].view_as(weight) if way == "shifted" else weight.t().contiguous().t()
        layer.intermediate.dense.weight = torch.nn.Parameter(apart.copy_(weight.detach()), requires_grad=False)
    encoder, usual = (Encoder(each, prepack=False) for each in (model, models["bert"]))
    assert encoder.layers[0].up.weight.data_ptr() != model.encoder.layer[0].intermediate.dense.weight.data_ptr()
    with torch.inference_mode():
        for one, other in zip(run(encoder, texts()), run(usual, texts()), strict=True):
            assert torch.equal(one, other)


def test_projections_first_read_without_gradients_serve_those_with(models: dict[str, Any]) -> None:
    layout, encoder = pack([9, 9]), Encoder(models["bert"], prepack=False)
    read = layout.rows(torch.arange(8))
    with torch.inference_mode():
        plain = encoder.layer(1, encoder.embed([[5] * 9] * 2, layout)[None], layout, read)
    states = encoder.embed([[5] * 9] * 2, layout)[None].requires_grad_()
    found = encoder.layer(1, states, layout, read)
    found.square().sum().backward()
    assert (found - plain).abs().max() < 1e-5
    assert states.grad is not None
    assert states.grad.abs().max() > 0
