"""The span head: start and end logits at the borders of each option, or the best answer in a context."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bbprompt.backends.head import each
from bbprompt.backends.layout import Layout
from bbprompt.oracle import Scores, Support, TextBatch
from bbprompt.texts.mrc import Encoded, Frame, Offsets, encode

__all__ = ["SpanHead", "SpanPlan"]


@dataclass(frozen=True, slots=True)
class SpanPlan:
    """Where the span head reads some texts.

    Attributes:
        read: `(N, R)` packed rows that are read.
        support: `(2, N, C)` where in the read rows each candidate start and end stands.
        present: `(N, C)` which candidates exist.
        spans: `(O, 3)` text, start and end (indices into C) of each scored span.
        encoded: The sequences.
    """

    read: Tensor
    support: Tensor
    present: Tensor
    spans: Tensor
    encoded: tuple[Encoded, ...]


class SpanHead:
    """A linear map of the last states to a start and an end logit (MP2, section 3.2).

    Args:
        weight: `(2, H)`: row 0 start, row 1 end.
        bias: `(2,)`.
        tokenize: Text to token ids and character offsets.
        frame: What surrounds every text.
        device: Where the states are.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor,
        tokenize: Callable[[str], tuple[Sequence[int], Offsets]],
        frame: Frame,
        device: torch.device,
    ) -> None:
        self._weight, self._bias = weight.to(device), bias.to(device)
        self._tokenize, self._frame, self._device = tokenize, frame, device

    def sequences(self, batch: TextBatch) -> list[Encoded]:
        """One sequence a text, its options behind it; see `bbprompt.texts.mrc`."""
        answers = batch.answers or (None,) * len(batch.forms)

        def write(number: int) -> Encoded:
            answer = answers[number]
            return encode(batch.forms[number], self._tokenize, self._frame, () if answer is None else (answer,))

        return each(batch, write)

    def plan(self, sequences: Sequence[Encoded], layout: Layout, support: Support) -> SpanPlan:
        """Find the rows of all candidate starts and ends."""
        starts, ends, spans = [], [], []
        for number, item in enumerate(sequences):
            extractive = bool(item.offsets)
            if support == "sequence" or extractive:
                first, last = (0, len(item.ids)) if support == "sequence" else item.context
                positions = list(range(first, last))
                starts.append(positions)
                ends.append(positions)
                spans += [(number, a - first, b - first) for a, b in item.spans]
            else:
                starts.append([a for a, _ in item.spans])
                ends.append([b for _, b in item.spans])
                spans += [(number, option, option) for option in range(len(item.spans))]
        width = max(len(positions) for positions in starts)
        padded = torch.zeros(2, len(sequences), width, dtype=torch.long)
        present = torch.zeros(len(sequences), width, dtype=torch.bool)
        for number, (first_rows, last_rows) in enumerate(zip(starts, ends, strict=True)):
            padded[0, number, : len(first_rows)] = torch.as_tensor(first_rows)
            padded[1, number, : len(last_rows)] = torch.as_tensor(last_rows)
            present[number, : len(first_rows)] = True
        shared = bool((padded[0] == padded[1]).all())
        read = layout.rows(padded[0] if shared else torch.cat((padded[0], padded[1]), dim=1))
        where = torch.arange(width).expand(2, len(sequences), width).clone()
        if not shared:
            where[1] += width
        return SpanPlan(
            read,
            where.to(self._device),
            present.to(self._device),
            torch.as_tensor(spans, dtype=torch.long).view(-1, 3),
            tuple(sequences),
        )

    def apply(self, plan: SpanPlan, states: Tensor) -> Tensor:
        """Start and end logits of the read rows: `(n, N, R, H)` to `(n, N, R, 2)`."""
        return states.float() @ self._weight.T + self._bias

    def values(self, batch: TextBatch, plans: Sequence[SpanPlan], outputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Start and end logit of every span, and their normalizers over the support."""
        return _values(plans, [_candidates(plan, logits) for plan, logits in zip(plans, outputs, strict=True)])

    def scores(
        self, batch: TextBatch, plans: Sequence[SpanPlan], outputs: Sequence[Tensor], longest_answer: int | None
    ) -> Scores:
        """Logits of every span, normalised over the support, and best answers where asked for."""
        parts = [_candidates(plan, logits) for plan, logits in zip(plans, outputs, strict=True)]
        logits, normalizer = _values(plans, parts)
        best = None
        if longest_answer is not None and plans[0].encoded[0].offsets:
            found = [_answers(plan, both, longest_answer) for plan, both in zip(plans, parts, strict=True)]
            best = np.concatenate(found, axis=1)
        cut = sum(item.cut for plan in plans for item in plan.encoded)
        return Scores(logits.cpu().numpy(), normalizer.cpu().numpy(), best, cut)


def _candidates(plan: SpanPlan, logits: Tensor) -> Tensor:
    """Logits `(2, n, N, C)` of the candidate starts and ends, minus infinity where there is none."""
    start = logits[..., 0].gather(2, plan.support[0].expand(len(logits), -1, -1))
    end = logits[..., 1].gather(2, plan.support[1].expand(len(logits), -1, -1))
    return torch.stack((start, end)).masked_fill(~plan.present, -torch.inf)


def _values(plans: Sequence[SpanPlan], parts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Logits of the spans and normalizers, of what `_candidates` found for each plan."""
    logits = []
    for plan, both in zip(plans, parts, strict=True):
        text, first, last = plan.spans.to(both.device).unbind(1)
        logits.append(torch.stack((both[0][:, text, first], both[1][:, text, last]), dim=-1))
    normalizer = [both.logsumexp(-1).permute(1, 2, 0) for both in parts]
    return torch.cat(logits, dim=1), torch.cat(normalizer, dim=1)


def _answers(plan: SpanPlan, both: Tensor, longest: int) -> NDArray[np.int64]:
    """Character spans `(n, N, 2)` of the best start <= end within `longest` tokens of the context."""
    shown, found = plan.present.sum(1).tolist(), []
    for number, item in enumerate(plan.encoded):
        size = len(item.offsets)
        # With the whole sequence as support the context starts inside it, else it is the support.
        first = item.context[0] if shown[number] > size else 0
        start = both[0, :, number, first : first + size]
        end = both[1, :, number, first : first + size]
        reach = min(longest, size)
        padded = torch.nn.functional.pad(end, (0, reach - 1), value=-torch.inf)
        window = padded.unfold(1, reach, 1)  # (n, size, reach): ends that each start may take
        score, length = window.max(-1)
        at = (start + score).argmax(-1, keepdim=True)
        found.append(torch.cat((at, length.gather(-1, at)), dim=-1))
    result = np.zeros((both.shape[1], both.shape[2], 2), dtype=np.int64)
    # Those of all candidates come from the device at once.
    for number, (item, answers) in enumerate(zip(plan.encoded, torch.stack(found).tolist(), strict=True)):
        for candidate, (a, steps) in enumerate(answers):
            result[candidate, number] = item.offsets[a][0], item.offsets[a + steps][1]
    return result
