"""The prototype head: an option scores by how similar its words are to the text, both pooled under the prompt.

For embedding models, which have no output layer: the mean of a text's last states is its embedding (E5, section 3),
the options are embedded the same way, and the logit of an option is scale * cos(text, option). Where the question
is how alike two texts are, no words are needed: each text is embedded alone, and the logit of an option of grade g,
from 1 for "same" down to -1, is scale * g * (cos - t); a task's own borders are the readout's, see `bbprompt.readout`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from bbprompt.backends.head import each, one_channel
from bbprompt.backends.layout import Layout
from bbprompt.errors import DataError
from bbprompt.oracle import Scores, Support, TextBatch
from bbprompt.tasks.example import Form, Part
from bbprompt.texts.mrc import Encoded, Frame, Offsets, encode

__all__ = ["PrototypeHead", "PrototypePlan", "pieces"]


@dataclass(frozen=True, slots=True)
class PrototypePlan:
    """How the rows of some sequences are averaged.

    Attributes:
        weights: `(N, T)` share of each packed row in the mean of each sequence.
        cut: Number of tokens that did not fit.
        read: None: all rows are needed.
    """

    weights: Tensor
    cut: int
    read: None = None


class PrototypeHead:
    """Similarity of pooled states; no weights of its own.

    Args:
        scale: Factor from cosine to logit (the inverse temperature).
        prefix: Stands before every text and option, as the backbone was trained ("query: " for E5).
        pool_prompt: Whether the mean takes the placeholder rows in.
        threshold: t, for texts that are compared with each other.
        tokenize: Text to token ids and character offsets.
        frame: What surrounds every text.
        device: Where the states are.
    """

    def __init__(
        self,
        scale: float,
        prefix: str,
        pool_prompt: bool,
        threshold: float,
        tokenize: Callable[[str], tuple[Sequence[int], Offsets]],
        frame: Frame,
        device: torch.device,
    ) -> None:
        self._scale, self._prefix, self._pool_prompt, self._threshold = scale, prefix, pool_prompt, threshold
        self._tokenize, self._frame, self._device = tokenize, frame, device

    def sequences(self, batch: TextBatch) -> list[Encoded]:
        """Every different text and option once, in order of first use."""
        if any(form.context >= 0 for form in batch.forms):
            raise DataError("a prototype readout finds no answers in a context; use prompts with a span head")
        written: dict[Form, Encoded] = {}

        def write(number: int) -> Encoded:
            for piece in pieces(batch.forms[number]):
                if piece not in written:
                    written[piece] = self.write(piece)
            return written[piece]

        each(batch, write)
        return list(written.values())

    def write(self, piece: Form) -> Encoded:
        """One text or option as tokens.

        Raises:
            DataError: It does not fit although it was cut.
        """
        return encode(Form((Part(self._prefix, cut=False), *piece.parts), (), -1), self._tokenize, self._frame)

    def plan(self, sequences: Sequence[Encoded], layout: Layout, support: Support) -> PrototypePlan:
        """Average over the rows of each sequence."""
        weights = torch.zeros(len(sequences), sum(len(item.ids) for item in sequences))
        first, last = self._frame.prompt_start, self._frame.prompt_end
        for number, (item, start) in enumerate(zip(sequences, layout.starts.tolist(), strict=True)):
            weights[number, start : start + len(item.ids)] = 1.0
            if not self._pool_prompt:
                weights[number, start + first : start + last] = 0.0
        weights /= weights.sum(1, keepdim=True)
        return PrototypePlan(weights.to(self._device), sum(item.cut for item in sequences))

    def apply(self, plan: PrototypePlan, states: Tensor) -> Tensor:
        """Embeddings of length 1: `(n, T, H)` to `(n, N, H)`."""
        return F.normalize(plan.weights @ states.float(), dim=-1)

    def values(
        self, batch: TextBatch, plans: Sequence[PrototypePlan], outputs: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """One logit an option, `(n, O, 1)`, normalised over the options of the text whatever the support."""
        embeddings = torch.cat(list(outputs), dim=1)
        at = {piece: i for i, piece in enumerate(dict.fromkeys(p for form in batch.forms for p in pieces(form)))}
        left: list[int] = []
        right: list[int] = []
        grades: list[float] = []
        compared: list[bool] = []
        bounds = [0]
        for form in batch.forms:
            first, *others = (at[piece] for piece in pieces(form))
            if form.second >= 0:
                others = others * len(form.options)
            grades += form.grades or [1.0] * len(others)
            compared += [form.second >= 0] * len(others)
            left += [first] * len(others)
            right += others
            bounds.append(len(left))
        # One candidate at a time: those of a large request together would take gigabytes where texts have many options.
        one, other = (torch.as_tensor(side, device=self._device) for side in (left, right))
        cosine = torch.stack([(own[one] * own[other]).sum(-1) for own in embeddings])
        cosine = cosine - self._threshold * torch.as_tensor(compared, device=self._device)
        logits = cosine * (self._scale * torch.as_tensor(grades, device=self._device))
        normalizer = [logits[:, a:b].logsumexp(-1) for a, b in itertools.pairwise(bounds)]
        return logits[..., None], torch.stack(normalizer, dim=1)[..., None]

    def scores(
        self, batch: TextBatch, plans: Sequence[PrototypePlan], outputs: Sequence[Tensor], longest_answer: int | None
    ) -> Scores:
        """The same as scores; there are no answers to find."""
        return one_channel(self.values(batch, plans, outputs), sum(plan.cut for plan in plans))


def pieces(form: Form) -> tuple[Form, ...]:
    """What is embedded for a form: its text and each of its options, or its two texts."""
    if form.second >= 0:
        return Form(form.parts[: form.second], (), -1), Form(form.parts[form.second :], (), -1)
    options = (Form((Part(option, cut=True),), (), -1) for option in form.options)
    return (Form(form.parts, (), -1), *options)
