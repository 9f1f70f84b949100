"""From examples to features: what the cheap methods read of a text, each text encoded once."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from bbprompt.embedding import Embedder
from bbprompt.tasks.example import Example
from bbprompt.tasks.task import Task, parse_template

__all__ = ["VIEWS", "Matrix", "Reader", "View", "features", "wordings"]

#: How an example becomes numbers. "none": not at all. "text": the vector of the text, for a pair of both in the task's
#: template. "pair": product and absolute difference of the vectors of the two texts. "cosine": of the two texts.
#: "stem" and "query": similarity of each of the example's own options to everything before them, or to the query alone.
View = Literal["none", "text", "pair", "cosine", "stem", "query"]

VIEWS: tuple[View, ...] = get_args(View)

_AT_ONCE = 256

#: Sentences that a label word may stand in, beside the task's own template.
_SENTENCES = {"zh": ("{}", "这是一条{}新闻", "这是关于{}的"), "en": ("{}", "This is {} news.", "It is about {}.")}

Matrix = NDArray[np.float64]


class Reader:
    """Vectors of texts, kept by text.

    Args:
        embedder: The frozen model; None where no text is read.
        check: Called between pieces of work; what it raises stops the run.

    Attributes:
        seconds: Wall time in the model.
        cut: Tokens that did not fit the model, over distinct texts.
    """

    def __init__(self, embedder: Embedder | None, check: Callable[[], None] = lambda: None) -> None:
        self._embedder, self._check = embedder, check
        self._known: dict[str, Matrix] = {}
        self.seconds = 0.0
        self.cut = 0

    @property
    def count(self) -> int:
        """Distinct texts read so far."""
        return len(self._known)

    def __call__(self, texts: Sequence[str]) -> Matrix:
        """Vectors `(N, H)` of N texts."""
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        if new and self._embedder is None:
            raise RuntimeError("this method reads no texts")
        for begin in range(0, len(new), _AT_ONCE):
            some = new[begin : begin + _AT_ONCE]
            began = time.monotonic()
            found = self._embedder.embed(some) if self._embedder is not None else None
            self.seconds += time.monotonic() - began
            if found is not None:
                self._known.update(zip(some, found.vectors.astype(np.float64), strict=True))
                self.cut += found.cut
            self._check()
        return np.stack([self._known[text] for text in texts])


def features(view: View, task: Task, examples: Sequence[Example], read: Reader) -> Matrix:
    """What a view makes of N examples: `(N, D)`; for "stem" and "query" `(N, options)`, -inf where there is none."""
    match view:
        case "none":
            return np.zeros((len(examples), 0))
        case "text":
            return read([_text(task, example) for example in examples])
        case "pair" | "cosine":
            one = read([example.fields["text_a"] for example in examples])
            other = read([example.fields["text_b"] for example in examples])
            if view == "cosine":
                cosines: Matrix = (one * other).sum(axis=1, keepdims=True)
                return cosines
            # Entries of a product of unit vectors are smaller than those of a difference by the root of the width.
            return np.concatenate([one * other * one.shape[1] ** 0.5, np.abs(one - other)], axis=1)
        case "stem" | "query":
            stems = read([_stem(view, task, example) for example in examples])
            widest = max(len(example.options) for example in examples)
            similar = np.full((len(examples), widest), -np.inf)
            for row, (stem, example) in enumerate(zip(stems, examples, strict=True)):
                similar[row, : len(example.options)] = read(example.options) @ stem
            return similar


def wordings(task: Task) -> dict[str, tuple[str, ...]]:
    """Texts that stand for the labels, by the sentence the option words are put into: the task's own template first."""
    bare = "".join(literal for literal, _ in parse_template(task.template)).replace("选项：", "")
    bare = re.sub("\"\"|“”|''", "", bare)  # quotation marks that stood around a field
    asks = re.search("[？?][^？?]*$", bare)
    first, last = (bare[: asks.start()], bare[asks.start() + 1 :]) if asks else (bare, "")
    sentences = _SENTENCES.get(task.language[:2], ("{}",))
    return {
        "template": tuple(first + word + last for word in task.options),
        **{sentence: tuple(sentence.replace("{}", word) for word in task.options) for sentence in sentences},
    }


def _text(task: Task, example: Example) -> str:
    """The text of a single example; a pair as the template writes it."""
    if task.type == "pair":
        return "".join(part.text for part in task.render(example).parts)
    return " ".join(example.fields.values())


def _stem(view: View, task: Task, example: Example) -> str:
    if view == "query":
        return example.fields["query"]
    return " ".join(example.fields[name] for name in task.field_names)
