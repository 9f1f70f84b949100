"""Encoded examples on disk: written one by one, read through a memory map, never held whole.

A store is a folder of two files: `ids.bin`, all token ids one after the other, and `index.safetensors`, which says
where each example begins, where its options stand and which one is right.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save

from bbprompt.backends.cache import check_sealed, publish
from bbprompt.errors import ArtifactError
from bbprompt.jsontext import parse_json
from bbprompt.texts.mrc import Encoded

__all__ = ["FORMAT", "TokenStore", "stored"]

FORMAT = "1"
"""Changes whenever examples are drawn or encoded in another way."""


class TokenStore:
    """N encoded examples. Offsets are not kept: training needs positions alone.

    Attributes:
        lengths: `(N,)` tokens of each.
        keys: `(N,)` a number that the writer gave each example.
        notes: What the writer wants to be remembered.
    """

    def __init__(self, folder: Path) -> None:
        try:
            tables = load_file(folder / "index.safetensors")
            with safe_open(folder / "index.safetensors", framework="numpy") as opened:
                self.notes: dict[str, int] = parse_json((opened.metadata() or {})["notes"])
            self._bounds, self._span_bounds = tables["bounds"], tables["span_bounds"]
            self._spans, self._context, self._gold = tables["spans"], tables["context"], tables["gold"]
            self.keys: NDArray[np.int64] = tables["keys"]
            total = int(self._bounds[-1])
            self._ids: NDArray[np.int32] = (
                np.memmap(folder / "ids.bin", dtype="<i4", mode="r", shape=(total,)) if total else np.zeros(0, "<i4")
            )
        except (SafetensorError, OSError, LookupError, ValueError, TypeError) as error:
            raise ArtifactError(f"{folder}: damaged token store ({error}); delete it to have it built again") from error
        self.lengths: NDArray[np.int64] = np.diff(self._bounds)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> tuple[Encoded, int]:
        """The example and which of its options is right."""
        begin, end = self._bounds[index : index + 2]
        first, last = self._span_bounds[index : index + 2]
        spans = tuple((int(a), int(b)) for a, b in self._spans[first:last])
        context = (int(self._context[index, 0]), int(self._context[index, 1]))
        return Encoded(tuple(self._ids[begin:end].tolist()), spans, context, (), 0), int(self._gold[index])


def stored(
    root: Path, name: str, examples: Callable[[dict[str, int]], Iterable[tuple[int, Encoded, int]]]
) -> TokenStore:
    """Open the store `root/name`, writing it first where it does not exist.

    Args:
        root: Parent folder.
        name: Must name the content: a digest of all that decides it.
        examples: Gives (key, example, right option) one after the other; may leave notes in the mapping it gets.

    Raises:
        DiskError: The folder cannot be written.
        ArtifactError: It was altered.
    """

    def build(folder: Path) -> None:
        bounds, span_bounds = [0], [0]
        spans: list[tuple[int, int]] = []
        context: list[tuple[int, int]] = []
        gold: list[int] = []
        keys: list[int] = []
        notes: dict[str, int] = {}
        with (folder / "ids.bin").open("wb") as file:
            for key, item, label in examples(notes):
                file.write(np.asarray(item.ids, "<i4").tobytes())
                bounds.append(bounds[-1] + len(item.ids))
                spans += item.spans
                span_bounds.append(len(spans))
                context.append(item.context)
                gold.append(label)
                keys.append(key)
        # Not save_file: what it says of a full disk is no OSError.
        index = save(
            {
                "bounds": np.asarray(bounds, np.int64),
                "span_bounds": np.asarray(span_bounds, np.int64),
                "spans": np.asarray(spans, np.int32).reshape(-1, 2),
                "context": np.asarray(context, np.int32).reshape(-1, 2),
                "gold": np.asarray(gold, np.int32),
                "keys": np.asarray(keys, np.int64),
            },
            metadata={"notes": json.dumps(notes)},
        )
        (folder / "index.safetensors").write_bytes(index)

    folder = publish(root, name, build)
    check_sealed(folder)
    return TokenStore(folder)
