"""Masked texts: a corpus as pieces of tokens on disk, drawn and masked anew in every step.

Which tokens are masked follows from seed and step, so a resumed training sees the same.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bbprompt.backends.cache import file_digest
from bbprompt.errors import DataError
from bbprompt.pretrain.lm_recipe import CorpusFile, HeadConfig
from bbprompt.pretrain.ppt_corpus import documents
from bbprompt.pretrain.schedule import positions, visits
from bbprompt.pretrain.tokens import FORMAT, TokenStore, stored
from bbprompt.texts.mrc import Encoded, Frame, Offsets

__all__ = ["MaskedBatch", "MaskedTexts", "kept_tokens", "open_pieces"]

log = logging.getLogger("bbprompt")

_Ids = NDArray[np.int64]

#: Of so many documents one is measured on.
_HELD_OUT = 20
#: A piece of fewer tokens is left out.
_SHORTEST = 8
#: Of the tokens to guess: masked, replaced by another token; the rest is left as it is (BERT, section 3.1).
_MASKED, _REPLACED = 0.8, 0.1
_COUNTED_AT_ONCE = 1_000_000


@dataclass(frozen=True, slots=True)
class MaskedBatch:
    """N pieces with tokens to guess.

    Attributes:
        ids: Token ids, masked.
        places: `(N, R)` positions to guess in each piece, the last repeated where a piece has fewer than R.
        present: `(N, R)` True where a place is no repetition.
        gold: `(N, R)` number of the right token among those that the head can name, -1 where it is none of them.
        uids: Which pieces these are, for messages.
    """

    ids: list[tuple[int, ...]]
    places: Tensor
    present: Tensor
    gold: Tensor
    uids: tuple[str, ...]


def open_pieces(
    corpus: Sequence[CorpusFile],
    tokenize: Callable[[str], tuple[Sequence[int], Offsets]],
    frame: Frame,
    cache: Path,
    tokenizer_digest: str,
) -> tuple[list[TokenStore], dict[str, str]]:
    """The pieces of each file, made where the cache does not hold them, and a digest of each.

    Raises:
        DataError: A file cannot be read; names file and line.
        DiskError: The cache cannot be written.
    """
    stores, digests = [], {}
    for each in corpus:
        parts = [FORMAT, "pieces", file_digest(Path(each.file)), tokenizer_digest, repr(frame)]
        digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()

        def pieces(notes: dict[str, int], file: str = each.file) -> Iterator[tuple[int, Encoded, int]]:
            for number, (_, lines) in enumerate(documents([file])):
                # Line by line: no tokenizer has to hold a long document, and a line's end is a border of words.
                ids = [token for line in lines for token in tokenize(line)[0]]
                for begin in range(0, len(ids), frame.room):
                    piece = ids[begin : begin + frame.room]
                    if len(piece) >= _SHORTEST:
                        yield number, Encoded((*frame.first, *piece, *frame.last), (), (0, 0), (), 0), 0

        stores.append(stored(cache, digest, pieces))
        digests[each.name] = digest
    return stores, digests


def kept_tokens(stores: Sequence[TokenStore], rows: int, most: int, least: int) -> tuple[_Ids, _Ids]:
    """The most frequent tokens of what is trained on, in the order of their ids, and how often each occurs.

    What surrounds every piece counts too.

    Args:
        stores: Pieces.
        rows: Size of the whole vocabulary.
        most: How many to keep.
        least: Leave out what occurs less often.

    Returns:
        Token ids and counts, `(E,)` both.
    """
    counts = np.zeros(rows, np.int64)
    for store in stores:
        train = np.flatnonzero(~_held_out(store))
        at_once = _COUNTED_AT_ONCE // int(store.lengths.max(initial=1))
        for begin in range(0, len(train), at_once):
            some = train[begin : begin + at_once]
            counts += np.bincount(np.concatenate([store[int(at)][0].ids for at in some]), minlength=rows)
    order = np.argsort(-counts, kind="stable")[:most]
    kept = np.sort(order[counts[order] >= least])
    return kept, counts[kept]


def _held_out(store: TokenStore) -> NDArray[np.bool_]:
    held: NDArray[np.bool_] = store.keys % _HELD_OUT == 0
    return held


class MaskedTexts:
    """Batches over the files of a corpus.

    Args:
        config: The recipe.
        stores: Pieces of each file; a key is the number of the piece's document.
        digests: File -> digest of its pieces.
        kept: Ids `(E,)` of the tokens that the head can name, ascending.
        mask: Id of the mask token.
        frame: What surrounds every piece; never masked.

    Raises:
        DataError: A file has nothing to train or to measure on.
    """

    def __init__(
        self,
        config: HeadConfig,
        stores: Sequence[TokenStore],
        digests: dict[str, str],
        kept: _Ids,
        mask: int,
        frame: Frame,
    ) -> None:
        self._config, self._stores, self.digests = config, tuple(stores), digests
        self._kept, self._mask, self._frame = kept, mask, frame
        self.names = tuple(each.name for each in config.corpus)
        self._copies = [each.weight for each in config.corpus]
        held = [_held_out(store) for store in stores]
        self._train = [np.flatnonzero(~apart) for apart in held]
        self._valid = [np.flatnonzero(apart)[: config.valid_size] for apart in held]
        for name, store, train, valid in zip(self.names, stores, self._train, self._valid, strict=True):
            if not len(train) or not len(valid):
                raise DataError(f"corpus: {name}: too few documents to train and to measure on; give more text")
            log.info("%s: %d pieces, %d tokens to train", name, len(train), int(store.lengths[train].sum()))

    def frequent(self, counts: _Ids, most: int) -> _Ids:
        """Numbers of the tokens that occur most often within pieces, the most frequent first."""
        around = np.isin(self._kept, (*self._frame.first, *self._frame.last))
        return np.argsort(np.where(around, 0, -counts), kind="stable")[:most]

    def batch(self, step: int, part: int = 0) -> MaskedBatch:
        """The batch of `step` (from 0)."""
        config = self._config
        rows = []
        for index, visit in visits(config.seed, step, config.files_per_step, self._copies):
            train = self._train[index]
            lengths = self._stores[index].lengths[train]
            chosen = positions(config.seed, index, visit, lengths, config.per_file, config.bucket)
            rows += [(index, int(train[at])) for at in chosen]
        return self._masked(rows, np.random.default_rng((config.seed, 4, step)))

    def valid(self, index: int, size: int) -> Iterator[MaskedBatch]:
        """The held-out pieces of one file, `size` at a time, masked the same way each time."""
        rng = np.random.default_rng((self._config.seed, 5, index))
        rows = [(index, int(at)) for at in self._valid[index]]
        for begin in range(0, len(rows), size):
            yield self._masked(rows[begin : begin + size], rng)

    def _masked(self, rows: Sequence[tuple[int, int]], rng: np.random.Generator) -> MaskedBatch:
        first, last = len(self._frame.first), len(self._frame.last)
        ids, places, gold = [], [], []
        for index, at in rows:
            piece = np.asarray(self._stores[index][at][0].ids)
            inner = len(piece) - first - last
            count = max(round(self._config.masked * inner), 1)
            chosen = first + np.sort(rng.permutation(inner)[:count])
            gold.append(torch.as_tensor(self._numbers(piece[chosen])))
            fate = rng.random(count)
            other = self._kept[rng.integers(len(self._kept), size=count)]
            change = np.where(fate < _MASKED, self._mask, other)
            piece[chosen] = np.where(fate < _MASKED + _REPLACED, change, piece[chosen])
            ids.append(tuple(piece.tolist()))
            places.append(torch.as_tensor(chosen))
        width = max(map(len, places))
        grid = torch.stack([torch.cat([row, row[-1:].expand(width - len(row))]) for row in places])
        present = torch.arange(width)[None, :] < torch.as_tensor([len(row) for row in places])[:, None]
        golds = torch.full(grid.shape, -1)
        golds[present] = torch.cat(gold)
        keys = [self._stores[index].keys[at] + 1 for index, at in rows]
        uids = tuple(f"{self.names[index]}, document {key}" for (index, _), key in zip(rows, keys, strict=True))
        return MaskedBatch(ids, grid, present, golds, uids)

    def _numbers(self, tokens: _Ids) -> _Ids:
        """Number of each token among the kept ones, -1 for others."""
        at = np.searchsorted(self._kept, tokens)
        found = self._kept[np.minimum(at, len(self._kept) - 1)] == tokens
        return np.where(found, at, -1)
