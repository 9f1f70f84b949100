"""CPT checkpoints: the encoder inside them, both published shapes scaled down, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel

from bbprompt.backends.backbone import load_backbone
from bbprompt.backends.cpt import is_cpt
from bbprompt.errors import ArtifactError

# (words, position rows, positions that config.json claims): the older release claims twice what it holds.
SHAPES = [(300, 64, 128), (700, 128, None)]
TEXTS = ["今天天气怎么样？", "啊"]


@pytest.fixture
def cpt(tmp_path: Path, cache: Path) -> Path:
    """The smaller of the two shapes."""
    return tiny.cpt_dir(tmp_path / "cpt", words=300, positions=64)


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def _reference(folder: Path, rows: int, positions: int) -> BertModel:
    """A BertModel filled by hand, tensor by tensor."""
    config = BertConfig(
        vocab_size=rows,
        hidden_size=tiny.HIDDEN,
        num_hidden_layers=tiny.LAYERS,
        num_attention_heads=tiny.HEADS,
        intermediate_size=tiny.FFN,
        max_position_embeddings=positions,
        layer_norm_eps=1e-12,
    )
    model = BertModel(config, add_pooling_layer=False).eval()
    stored = _weights(folder)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(stored[f"model.encoder.{name}"])
    return model


@pytest.mark.parametrize(("words", "positions", "told"), SHAPES)
def test_forward_equals_bert_with_token_type_one(
    tmp_path: Path, cache: Path, words: int, positions: int, told: int | None
) -> None:
    folder = tiny.cpt_dir(tmp_path / "cpt", words=words, positions=positions, told=told)
    backbone = load_backbone(str(folder))
    assert (backbone.layers, backbone.hidden, backbone.max_positions) == (tiny.LAYERS, tiny.HIDDEN, positions)
    assert backbone.token_type == 1
    assert len(backbone.tokenizer) == words + 5
    assert backbone.model.pooler is None
    assert not backbone.model.training
    assert not any(p.requires_grad for p in backbone.model.parameters())
    inputs = backbone.tokenizer(TEXTS, padding=True, return_tensors="pt")
    ones = torch.ones_like(inputs["input_ids"])
    inputs["token_type_ids"] = ones * backbone.token_type
    with torch.no_grad():
        got = backbone.model(**inputs).last_hidden_state
        reference = _reference(folder, words + 5, positions)
        want = reference(inputs["input_ids"], inputs["attention_mask"], ones).last_hidden_state
        other = reference(inputs["input_ids"], inputs["attention_mask"], 0 * ones).last_hidden_state
    assert (got - want).abs().max() <= 1e-6
    assert (got - other).abs().max() > 1e-2  # the token type matters, so the test above can fail


def test_tokenizer_is_berts(cpt: Path) -> None:
    tokenizer = load_backbone(str(cpt)).tokenizer
    words = (cpt / "vocab.txt").read_text(encoding="utf-8").split()
    assert tokenizer.convert_ids_to_tokens(tokenizer("啊 a?")["input_ids"]) == [
        "[CLS]",
        "啊",
        "a",
        "?",
        "[SEP]",
    ]
    assert [tokenizer.convert_ids_to_tokens(i) for i in range(len(words))] == words


def test_half_precision_becomes_float32(cpt: Path) -> None:
    full = load_backbone(str(cpt))
    weights = {n: t.half() if t.is_floating_point() else t for n, t in _weights(cpt).items()}
    save_file(weights, cpt / "model.safetensors")
    half = load_backbone(str(cpt))
    assert {t.dtype for t in half.model.state_dict().values()} == {torch.float32}
    assert half.digest != full.digest


@pytest.mark.parametrize("kept", ["model.shared.weight", "lm_head.weight"])
def test_tied_word_embeddings_stored_once(cpt: Path, kept: str) -> None:
    before = load_backbone(str(cpt)).digest
    weights = _weights(cpt)
    copies = {"model.shared.weight", "lm_head.weight", "model.encoder.embeddings.word_embeddings.weight"}
    save_file({n: t for n, t in weights.items() if n not in copies - {kept}}, cpt / "model.safetensors")
    assert load_backbone(str(cpt)).digest == before


def test_sharded_weights(cpt: Path) -> None:
    before = load_backbone(str(cpt)).digest
    weights = _weights(cpt)
    names = sorted(weights)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: weights[name] for name in part}, cpt / file)
    (cpt / "model.safetensors").unlink()
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (cpt / "model.safetensors.index.json").write_text(json.dumps(index))
    assert load_backbone(str(cpt)).digest == before
    (cpt / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ArtifactError, match="shard 'model-00002-of-00002"):
        load_backbone(str(cpt))


def test_pickled_weights_are_refused_with_the_way_out(cpt: Path) -> None:
    (cpt / "model.safetensors").unlink()
    (cpt / "pytorch_model.bin").write_bytes(b"never read")
    with pytest.raises(ArtifactError, match=r"pytorch_model\.bin: pickled.*safetensors") as caught:
        load_backbone(str(cpt))
    assert "\n" not in str(caught.value)


def test_missing_and_misshapen_tensors_are_named(cpt: Path) -> None:
    whole = _weights(cpt)
    name = "model.encoder.encoder.layer.1.attention.self.key.bias"
    save_file({n: t for n, t in whole.items() if n != name}, cpt / "model.safetensors")
    with pytest.raises(ArtifactError, match=name.replace(".", r"\.") + " has shape None"):
        load_backbone(str(cpt))
    save_file(whole | {name: torch.zeros(5)}, cpt / "model.safetensors")
    with pytest.raises(ArtifactError, match=r"has shape \(5,\), the config asks for \(32,\)"):
        load_backbone(str(cpt))
    name = "model.encoder.embeddings.position_embeddings.weight"
    save_file({n: t for n, t in whole.items() if n != name}, cpt / "model.safetensors")
    with pytest.raises(ArtifactError, match=r"no tensor model\.encoder\.embeddings\.position"):
        load_backbone(str(cpt))
    name = "model.encoder.embeddings.token_type_embeddings.weight"
    save_file(whole | {name: torch.zeros(1, 32)}, cpt / "model.safetensors")
    with pytest.raises(ArtifactError, match="1 token types"):
        load_backbone(str(cpt))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("encoder_layers", 4, "layer.3"),
        ("encoder_layers", 2, "layer.2"),
        ("encoder_layers", "3", "encoder_layers = '3'"),
        ("d_model", None, "d_model = None"),
        ("encoder_attention_heads", 5, "no multiple"),
        ("encoder_ffn_dim", 65, "intermediate.dense"),
    ],
)
def test_a_config_of_other_weights_is_refused(cpt: Path, key: str, value: object, message: str) -> None:
    config = json.loads((cpt / "config.json").read_text()) | {key: value}
    (cpt / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError) as caught:
        load_backbone(str(cpt))
    assert message in str(caught.value)


def test_the_vocabulary_must_match_the_rows(cpt: Path) -> None:
    tiny.write_bert_vocabulary(cpt / "vocab.txt", words=299)
    with pytest.raises(ArtifactError, match=r"304 tokens for 305 embedding rows"):
        load_backbone(str(cpt))
    (cpt / "vocab.txt").unlink()
    with pytest.raises(ArtifactError, match=r"no vocab\.txt"):
        load_backbone(str(cpt))


def test_bart_itself_is_not_taken_for_cpt(tmp_path: Path, cache: Path) -> None:
    from transformers import BartConfig, BartModel

    config = BartConfig(
        vocab_size=50, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=16,
    )  # fmt: skip
    BartModel(config).save_pretrained(tmp_path / "bart")
    with pytest.raises(ArtifactError, match="model_type 'bart' is no encoder"):
        load_backbone(str(tmp_path / "bart"))
    inside = "model.encoder.encoder.layer.0.attention.self.query.weight"
    assert is_cpt({"model_type": "bart"}, [inside])
    assert not is_cpt({"model_type": "bert"}, [inside])
    assert not is_cpt({"model_type": "bart"}, ["model.encoder.layers.0.self_attn.q_proj.weight"])
