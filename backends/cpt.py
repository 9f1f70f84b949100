"""CPT checkpoints (Shao et al. 2021) read as the plain BERT encoder that they contain.

CPT's shared encoder and its understanding decoder are stored as one post-LN BERT stack under
``model.encoder.*``; the generation decoder and its heads are left unread. The published config calls itself
"bart", so a checkpoint is recognised by that name together with BERT's tensor names inside. Two releases
exist under one hub name: 21,128 tokens with 512 positions, and 51,271 with 1,024. The config of the first
names 1,024 positions as well, so both sizes are taken from the tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertModel, BertTokenizer, PreTrainedTokenizerFast

from bbprompt.backends.checkpoint import read_tensors, tensor_names
from bbprompt.errors import ArtifactError

__all__ = ["TOKEN_TYPE", "is_cpt", "load_cpt"]

TOKEN_TYPE = 1  # CPT feeds token type 1 at every position of every text
_PREFIX = "model.encoder."
_WORDS = "embeddings.word_embeddings.weight"
# Copies of the word embeddings. Tied tensors are stored once, so a file may hold one of these instead.
_TIED = ("model.shared.weight", "lm_head.weight")
_BUFFERS = ("embeddings.position_ids", "embeddings.token_type_ids")


def is_cpt(config: Mapping[str, Any], names: Iterable[str]) -> bool:
    """Tell a CPT checkpoint from BART's: the same model type, but BERT's tensor names in the encoder."""
    return config.get("model_type") == "bart" and any(
        name.startswith(_PREFIX + "encoder.layer.") and ".attention.self." in name for name in names
    )


def load_cpt(folder: Path, config: Mapping[str, Any]) -> tuple[BertModel, PreTrainedTokenizerFast]:
    """Load the encoder and the BERT tokenizer of a CPT directory.

    Args:
        folder: Holds ``config.json``, ``vocab.txt`` and safetensors weights.
        config: The parsed ``config.json``.

    Returns:
        A BertModel of ``encoder_layers`` layers, no pooler, float32; and its tokenizer. Feed token type 1.

    Raises:
        ArtifactError: A size, a tensor or the vocabulary is missing or does not fit the others.
    """
    names = tensor_names(folder)
    words = next((name for name in (_PREFIX + _WORDS, *_TIED) if name in names), None)
    tensors = read_tensors(folder, lambda name: name.startswith(_PREFIX) or name == words)
    if words is not None:
        tensors[_PREFIX + _WORDS] = tensors[words]
    state = {
        name.removeprefix(_PREFIX): tensor.to(torch.float32)
        for name, tensor in tensors.items()
        if name.startswith(_PREFIX) and name.removeprefix(_PREFIX) not in _BUFFERS
    }
    bert = _bert_config(folder, config, state)
    with torch.device("meta"):  # shapes only
        expected = {n: tuple(t.shape) for n, t in BertModel(bert, add_pooling_layer=False).state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise ArtifactError(
                f"{folder}: tensor {_PREFIX}{name} has shape {found.get(name)}, the config asks for "
                f"{expected.get(name)}; check that config.json and the weights belong together"
            )
    model = BertModel.from_pretrained(None, config=bert, state_dict=state, add_pooling_layer=False)
    return model, _tokenizer(folder, rows=bert.vocab_size)


def _bert_config(folder: Path, config: Mapping[str, Any], state: Mapping[str, torch.Tensor]) -> BertConfig:
    """Return the BertConfig of CPT's encoder: depths from its config, embedding sizes from its tensors."""
    sizes: dict[str, int] = {}
    for key in ("d_model", "encoder_layers", "encoder_attention_heads", "encoder_ffn_dim"):
        value = config.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ArtifactError(f"{folder / 'config.json'}: {key} = {value!r} is no positive whole number")
        sizes[key] = value
    if sizes["d_model"] % sizes["encoder_attention_heads"]:
        raise ArtifactError(f"{folder / 'config.json'}: d_model is no multiple of encoder_attention_heads")
    rows: dict[str, int] = {}
    for name in ("word", "position", "token_type"):
        tensor = state.get(f"embeddings.{name}_embeddings.weight")
        if tensor is None or tensor.ndim != 2:
            raise ArtifactError(f"{folder}: no tensor {_PREFIX}embeddings.{name}_embeddings.weight; not CPT weights")
        rows[name] = int(tensor.shape[0])
    if rows["token_type"] <= TOKEN_TYPE:
        raise ArtifactError(f"{folder}: {rows['token_type']} token types, CPT needs type {TOKEN_TYPE}; not CPT weights")
    return BertConfig(
        vocab_size=rows["word"],
        max_position_embeddings=rows["position"],
        type_vocab_size=rows["token_type"],
        hidden_size=sizes["d_model"],
        num_hidden_layers=sizes["encoder_layers"],
        num_attention_heads=sizes["encoder_attention_heads"],
        intermediate_size=sizes["encoder_ffn_dim"],
        hidden_act=config.get("activation_function", "gelu"),
        # CPT passes its activation dropout where BERT has the hidden dropout.
        hidden_dropout_prob=config.get("activation_dropout", 0.1),
        attention_probs_dropout_prob=config.get("attention_dropout", 0.1),
        layer_norm_eps=1e-12,
        pad_token_id=config.get("pad_token_id", 0),
    )


def _tokenizer(folder: Path, rows: int) -> PreTrainedTokenizerFast:
    """Return BERT's tokenizer over ``vocab.txt``, not BART's, which the config's model type stands for."""
    if not (folder / "vocab.txt").is_file():
        raise ArtifactError(f"{folder}: no vocab.txt; CPT needs its BERT vocabulary beside the weights")
    tokenizer = BertTokenizer.from_pretrained(str(folder), local_files_only=True)
    if len(tokenizer) != rows:
        raise ArtifactError(
            f"{folder / 'vocab.txt'}: {len(tokenizer)} tokens for {rows} embedding rows; "
            "take the vocab.txt of the same release as the weights"
        )
    return tokenizer
