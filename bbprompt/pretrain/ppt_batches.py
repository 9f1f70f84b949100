"""Batches of self-supervised examples: made once from the corpus, kept as tokens on disk, drawn like any task's."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bbprompt.backends.cache import file_digest
from bbprompt.backends.verbalizer_head import VerbalizerHead
from bbprompt.errors import DataError, UsageError
from bbprompt.pretrain.cloze import ClozeBatch, collate_cloze, write_cloze
from bbprompt.pretrain.model import SpanBatch, collate
from bbprompt.pretrain.ppt_corpus import Document, documents, sentences, usable, windows
from bbprompt.pretrain.ppt_examples import CHOICE, around_gap, choice, pair, pseudo_labelled, unified_caps
from bbprompt.pretrain.ppt_forms import span_task
from bbprompt.pretrain.recipe import PptSettings
from bbprompt.pretrain.schedule import positions, visits
from bbprompt.pretrain.tokens import FORMAT, TokenStore, stored
from bbprompt.tasks.example import Example
from bbprompt.tasks.task import Task
from bbprompt.texts.forms import cloze_form
from bbprompt.texts.mrc import Encoded, Frame, Offsets, encode
from bbprompt.texts.ppt import Format, in_pattern, label_words

__all__ = ["Annotator", "PptBatches", "open_ppt"]

log = logging.getLogger("bbprompt")

_Tokenize = Callable[[str], tuple[Sequence[int], Offsets]]
_Write = Callable[[Example], Encoded]
#: N texts -> probabilities (N, L).
Annotator = Callable[[Sequence[str]], NDArray[np.floating]]

#: Version of how examples are made; goes into their digest, so that none made otherwise is taken from the cache.
_RULES = 4
#: A format's place seeds its examples, whatever other formats a recipe has: the cache holds each for itself.
_ORDER: tuple[Format, ...] = ("choice", "pair", "single")
#: Of so many documents one is validated on (PPT kept 5 % apart).
_HELD_OUT = 20
#: Of so many sentences one is asked about.
_EVERY = 8
_AT_ONCE = 64


class PptBatches:
    """Batches over one or more formats, each of which counts as a task; see `bbprompt.pretrain.mixture.Batches`.

    Args:
        stores: Format -> its examples as tokens; a key is the number of the example's document.
        source: A line with where the texts come from and their terms.
        digest: Of corpus and settings.
        seed: Of the order.
        tasks_per_step: Visits in a step.
        per_task: Examples of a visit, in one slice.
        valid_size: Examples kept for validation of each format, from documents of their own.
        weights: Visits of a format in a round.
        slices: Slices of a step.
        bucket: See `bbprompt.pretrain.schedule.epoch_order`.
        cloze: The examples are texts with a gap.
        files: So many files were read in turn: of each round all documents are trained on, or all are validated on.

    Raises:
        DataError: A format has nothing to train or to validate on.
    """

    def __init__(
        self,
        stores: Mapping[str, TokenStore],
        source: str,
        digest: str,
        *,
        seed: int,
        tasks_per_step: int,
        per_task: int,
        valid_size: int,
        weights: Mapping[str, int] | None = None,
        slices: int = 1,
        bucket: int = 1,
        cloze: bool = False,
        files: int = 1,
    ) -> None:
        self._stores = tuple(stores.values())
        self._names = tuple(f"ppt-{name}" for name in stores)
        self._source, self._digest, self._cloze = source, digest, cloze
        self._seed, self._per_step, self._size = seed, tasks_per_step, per_task * slices
        self._slices, self._bucket = slices, bucket
        self._copies = [(weights or {}).get(name, 1) for name in stores]
        held = [store.keys // files % _HELD_OUT == 0 for store in self._stores]
        self._train = [np.flatnonzero(~apart) for apart in held]
        self._valid = [np.flatnonzero(apart)[:valid_size] for apart in held]
        for name, train, valid in zip(stores, self._train, self._valid, strict=True):
            if not len(train) or not len(valid):
                raise DataError(f"corpus: too few documents for the format {name}; give more text or raise max_tokens")
            log.info("ppt-%s: %d examples, %d to validate", name, len(train), len(valid))

    @property
    def names(self) -> tuple[str, ...]:
        """The formats."""
        return self._names

    @property
    def sources(self) -> tuple[str, ...]:
        """Where the texts come from."""
        return tuple(f"{name}: {self._source}" for name in self._names)

    @property
    def digests(self) -> dict[str, str]:
        """One digest for all formats."""
        return dict.fromkeys(self._names, self._digest)

    def batch(self, step: int, part: int = 0) -> SpanBatch | ClozeBatch:
        """Part `part` of the batch of `step` (both from 0)."""
        rows = []
        for index, visit in visits(self._seed, step, self._per_step, self._copies):
            train = self._train[index]
            lengths = self._stores[index].lengths[train]
            chosen = positions(self._seed, index, visit, lengths, self._size, self._bucket)
            rows += [(index, int(train[at])) for at in chosen[part :: self._slices]]
        return self._collate(rows)

    def valid(self, index: int, limit: int, size: int) -> list[SpanBatch | ClozeBatch]:
        """Validation batches of one format."""
        rows = [(index, int(at)) for at in self._valid[index][:limit]]
        return [self._collate(rows[i : i + size]) for i in range(0, len(rows), size)]

    def _collate(self, rows: Sequence[tuple[int, int]]) -> SpanBatch | ClozeBatch:
        items = [self._stores[index][at] for index, at in rows]
        uids = [f"{at} of document {self._stores[index].keys[at] + 1}" for index, at in rows]
        put = collate_cloze if self._cloze else collate
        return put([item for item, _ in items], [gold for _, gold in items], [index for index, _ in rows], uids)


def open_ppt(
    settings: PptSettings,
    tokenize: _Tokenize,
    frame: Frame,
    *,
    cache: Path,
    tokenizer_digest: str,
    seed: int,
    annotate: Annotator | None = None,
    annotator_words: Sequence[str] = (),
    annotator_digest: str = "",
    head: VerbalizerHead | None = None,
) -> tuple[dict[str, TokenStore], str]:
    """The examples of each format as tokens, made where the cache does not hold them, and a digest of them all.

    With the `head` of a language model they are texts with a gap for a label word, else options stand in the text.

    Raises:
        UsageError: The head cannot tell a format's label words apart, or cannot name one.
        DataError: A corpus file cannot be read; names file and line.
        DiskError: The cache cannot be written.
    """
    parts = [
        f"{FORMAT} {_RULES}",
        settings.model_dump_json(exclude={"corpus", "terms", "annotator", "formats", "hybrid"}),
        *map(file_digest, map(Path, settings.corpus)),
        tokenizer_digest,
        repr(frame),
        str(seed),
        annotator_digest,
        json.dumps(list(annotator_words)),
        *([] if head is None else [f"cloze {settings.hybrid} {head.kind}"]),
    ]
    digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()
    stores = {}
    for form in settings.formats:
        words = tuple(annotator_words) if form == "single" else ()
        if head is None:
            write = _span_writer(span_task(form, settings.language, words), tokenize, frame)
        else:
            write = _cloze_writer(form, settings, words, head)
        if form == "pair":
            write = _pair_writer(write, tokenize, frame, last=head is not None and head.kind == "causal")
        rng = np.random.default_rng((seed, 3, _ORDER.index(form)))

        def examples(
            notes: dict[str, int], form: Format = form, write: _Write = write, rng: np.random.Generator = rng
        ) -> Iterator[tuple[int, Encoded, int]]:
            made = _made(form, settings, tokenize, frame, rng, annotate)
            for key, example in made:
                try:
                    yield key, write(example), example.label
                except DataError:  # options that do not fit even when they are cut
                    continue

        name = hashlib.sha256(f"{form} {digest}".encode()).hexdigest()
        stores[form] = stored(cache, name, functools.partial(_first, examples, settings.examples))
    return {str(form): store for form, store in stores.items()}, digest


def _span_writer(task: Task, tokenize: _Tokenize, frame: Frame) -> _Write:
    """Writes examples with their options in the text."""

    def write(example: Example) -> Encoded:
        whole = replace(example, options=task.options) if task.labelled else example
        return encode(task.render(whole), tokenize, frame)

    return write


def _pair_writer(write: _Write, tokenize: _Tokenize, frame: Frame, last: bool) -> _Write:
    """Writes pairs, of which an over-long one loses what is farthest from the gap (PPT's code); `last`: behind both."""

    @functools.cache
    def room() -> int:
        return max(frame.limit - len(write(Example({"text_a": "", "text_b": ""}, (), 0, (), "")).ids), 2)

    return lambda example: write(around_gap(example, room(), tokenize, last))


def _cloze_writer(form: Format, settings: PptSettings, words: Sequence[str], head: VerbalizerHead) -> _Write:
    """Writes examples as texts with a gap.

    Raises:
        UsageError: The head cannot tell the label words apart, or cannot name one.
    """
    task = span_task(form, settings.language, words)
    task = in_pattern(task, "hybrid" if settings.hybrid else "plain", causal=head.kind == "causal")
    most = label_words(form, settings.language, settings.options[1]) if form == "choice" else ()
    fields = dict.fromkeys(task.field_names, "")
    try:
        head.words(cloze_form(task, Example(fields, most, 0, (), "")))
    except DataError as error:
        fewer = "; give ppt.options fewer" if form == "choice" else ""
        raise UsageError(
            f"ppt.formats: '{form}' has label words that this backbone cannot do with: {error}{fewer}"
        ) from error
    return lambda example: write_cloze(cloze_form(task, example), head)


def _first(
    examples: Callable[[dict[str, int]], Iterator[tuple[int, Encoded, int]]], most: int, notes: dict[str, int]
) -> Iterator[tuple[int, Encoded, int]]:
    for number, item in enumerate(examples(notes)):
        if number == most:
            return
        yield item


def _made(
    form: Format,
    settings: PptSettings,
    tokenize: _Tokenize,
    frame: Frame,
    rng: np.random.Generator,
    annotate: Annotator | None,
) -> Iterator[tuple[int, Example]]:
    """Yield the number of a document and an example of it, streaming over the corpus."""

    def size(text: str) -> int:
        return len(tokenize(text)[0])

    def cut(text: str, most: int) -> str:
        ids, offsets = tokenize(text)
        return text if len(ids) <= most else text[: offsets[most - 1][1]]

    def kept() -> Iterator[Document]:
        for _, lines in documents(settings.corpus):
            if (document := usable(sentences(lines, settings.language), size)) is not None:
                yield document

    share = frame.limit / settings.longest
    for number, document, others in windows(kept(), settings.window, rng):
        times = max(len(document) // _EVERY, 1)
        if form == "pair":
            found = [pair(document, others, size, rng) for _ in range(times)]
        elif form == "choice":
            fewest, most = settings.options
            options = int(rng.integers(fewest, most + 1))
            caps = (CHOICE if fewest == most == 6 else unified_caps(options)).scaled(share)
            found = [choice(document, others, options, caps, cut, rng) for _ in range(times)]
        else:
            texts = [document[i] for i in rng.permutation(len(document))[: min(times, _AT_ONCE)].tolist()]
            if annotate is None:
                raise UsageError("ppt.annotator: the format 'single' needs one")
            found = list(pseudo_labelled(texts, annotate(texts), settings.confidence))
        yield from ((number, example) for example in found if example is not None)
