"""What is trained upstream: routers, modules, projections and head, around a frozen encoder."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bbprompt.backends.encoder import Encoder
from bbprompt.backends.layout import Layout, pack
from bbprompt.texts.mrc import Encoded, Frame

__all__ = ["Batch", "ModularPrompts", "Phase", "SpanBatch", "collate", "relaxed_bernoulli", "span_loss"]

#: Where the threshold of compared texts begins: cosines of E5 embeddings lie between .7 and 1.
_THRESHOLD = 0.88


@dataclass(frozen=True, slots=True)
class Phase:
    """What changes in the course of a training: how routers are turned into weights, and how much of `fading` is left.

    Attributes:
        noise: Sample the relaxed Bernoulli gates (MP2, eqs. 2-5); otherwise use their mean field, sigmoid(w).
        temperature: tau of the relaxation.
        normalized: Divide by the sum of the layer's gates (released code) instead of by K (MP2, eq. 1).
        left: Factor on the prompts of deeper layers that fade out; 0 where they are gone.
    """

    noise: bool
    temperature: float = 1.0
    normalized: bool = True
    left: float = 0.0


def relaxed_bernoulli(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """One sample of the binary concrete distribution per entry (MP2, eqs. 2-5).

    sigma((w + log u - log(1 - u)) / tau), u ~ U(0, 1); w is the logit of the gate's probability.
    """
    tiny = torch.finfo(logits.dtype).eps
    u = torch.rand(logits.shape, generator=generator).clamp(tiny, 1 - tiny).to(logits.device)
    return torch.sigmoid((logits + u.log() - (1 - u).log()) / temperature)


class Batch(Protocol):
    """What a training sees of a batch, whatever the readout."""

    @property
    def ids(self) -> Sequence[Sequence[int]]:
        """Token ids of each sequence."""

    @property
    def tasks(self) -> Tensor:
        """`(N,)` task index of each example."""

    @property
    def uids(self) -> tuple[str, ...]:
        """Which examples these are; may be empty."""

    @property
    def rows_read(self) -> int:
        """Rows that the last layer computes."""


@dataclass(frozen=True, slots=True)
class SpanBatch:
    """A training batch of one or several tasks, candidates padded to C.

    Attributes:
        ids: Token ids, one tuple a text.
        tasks: `(N,)` task index of each text.
        support: `(N, 2, C)` position in its text of each candidate start (0) and end (1): option borders, or
            for extraction every position of the context.
        present: `(N, C)` True where a candidate exists.
        gold: `(N, 2)` index of the right start and end among the candidates.
        extractive: `(N,)` True where start and end are found apart, False where a candidate is an option.
        uids: Which examples these are, for messages.
    """

    ids: list[tuple[int, ...]]
    tasks: Tensor
    support: Tensor
    present: Tensor
    gold: Tensor
    extractive: Tensor
    uids: tuple[str, ...] = ()

    @property
    def rows_read(self) -> int:
        """Rows that the last layer computes."""
        return 2 * self.present.numel()


def collate(
    encoded: Sequence[Encoded], gold: Sequence[int], tasks: Sequence[int], uids: Sequence[str] = ()
) -> SpanBatch:
    """Collect sequences with the index of each right option (ignored for extraction) and of each task."""
    starts, ends, golds = [], [], []
    extractive = torch.as_tensor([item.context != (0, 0) for item in encoded])
    for item, label in zip(encoded, gold, strict=True):
        if item.context != (0, 0):
            rows = list(range(*item.context))
            starts.append(rows)
            ends.append(rows)
            begin, end = item.spans[0]
            golds.append((begin - item.context[0], end - item.context[0]))
        else:
            starts.append([a for a, _ in item.spans])
            ends.append([b for _, b in item.spans])
            golds.append((label, label))
    width = max(len(rows) for rows in starts)
    support = torch.zeros(len(encoded), 2, width, dtype=torch.long)
    present = torch.zeros(len(encoded), width, dtype=torch.bool)
    for n, (s, e) in enumerate(zip(starts, ends, strict=True)):
        support[n, 0, : len(s)] = torch.as_tensor(s)
        support[n, 1, : len(e)] = torch.as_tensor(e)
        present[n, : len(s)] = True
    return SpanBatch(
        [item.ids for item in encoded],
        torch.as_tensor(tasks),
        support,
        present,
        torch.as_tensor(golds),
        extractive,
        tuple(uids),
    )


def span_loss(logits: Tensor, batch: SpanBatch) -> tuple[Tensor, Tensor]:
    """Loss (CE(start) + CE(end)) / 2 over the candidates, and the share answered right.

    Args:
        logits: `(N, 2, C)` start and end logits of the candidates.
        batch: Which candidates exist and which are right.

    Returns:
        Loss and 0/1 correctness of each text, `(N,)` both. An extracted answer counts as right when its start
        is.
    """
    present, gold = batch.present.to(logits.device), batch.gold.to(logits.device)
    masked = logits.masked_fill(~present[:, None], -torch.inf)
    each = F.cross_entropy(masked.flatten(0, 1), gold.flatten(), reduction="none").view(-1, 2).mean(1)
    choice = torch.where(batch.extractive.to(logits.device)[:, None], masked[:, 0], masked.sum(1))
    right = choice.argmax(1) == gold[:, 0]
    return each, right.float()


class ModularPrompts(nn.Module):
    """Routers w (T, L, K), modules z (L, K, d), projections A (L, d, P * H), span head (2, H).

    Initialisation: w ~ U(-1e-3, 1e-3), head ~ N(0, 0.02), z ~ N(0, 1) and A ~ N(0, scale^2 / d), so that the
    prompt of one module has entries of size `scale`. (Released: z and A so small that their product starts near
    a saddle and, at learning rates that leave it soon, grows past any useful size within a few dozen steps.)
    Without `spans` there is no head, for label words need none. Under prototypes there is none either, but a scale, a
    threshold, and offsets (T, G) of the labels of compared texts.
    Without `routed` there are no routers and all tasks share the mean of the modules: with K = 1 one soft prompt.
    Where a prompt at the input takes over from deeper ones, `fading` (T, L', P, H) are those of the layers after its
    own, which do not learn.
    """

    def __init__(
        self,
        tasks: int,
        layers: int,
        modules: int,
        dim: int,
        frame: Frame,
        hidden: int,
        scale: float,
        generator: torch.Generator,
        routed: bool = True,
        prototype_scale: float | None = None,
        grades: int = 0,
        spans: bool = True,
    ) -> None:
        super().__init__()
        length = len(frame.placeholders)
        self.frame = frame
        self.shape, self.routed = (layers, length, hidden), routed
        self.fading: Tensor | None = None

        def normal(size: float, *shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, generator=generator) * size)

        routers = (torch.rand(tasks if routed else 0, layers, modules, generator=generator) * 2 - 1) * 1e-3
        self.router = nn.Parameter(routers, requires_grad=routed)
        self.bank = normal(1.0, layers, modules, dim)
        self.projection = normal(scale / math.sqrt(dim), layers, dim, length * hidden)
        spans = spans and prototype_scale is None
        self.head_weight = normal(0.02, 2 if spans else 0, hidden)
        self.head_bias = nn.Parameter(torch.zeros(2 if spans else 0))
        for empty in () if spans else (self.head_weight, self.head_bias):
            empty.requires_grad_(False)
        if prototype_scale is not None:
            self.log_scale = nn.Parameter(torch.tensor(math.log(prototype_scale)))
            self.threshold = nn.Parameter(torch.tensor(_THRESHOLD))
            self.offsets = nn.Parameter(torch.zeros(tasks, grades), requires_grad=grades > 0)

    def points(self, phase: Phase, generator: torch.Generator, tasks: Tensor) -> Tensor:
        """Intrinsic points `(G, L, d)` of the given tasks."""
        if not self.routed:
            return self.bank.mean(1).expand(len(tasks), -1, -1)
        logits = self.router[tasks]
        noise = phase.noise
        weights = relaxed_bernoulli(logits, phase.temperature, generator) if noise else torch.sigmoid(logits)
        total = weights.sum(-1, keepdim=True) + 1e-12 if phase.normalized else weights.shape[-1]
        return torch.einsum("glk,lkd->gld", weights / total, self.bank)

    def vectors(self, phase: Phase, generator: torch.Generator, tasks: Tensor) -> Tensor:
        """Prompts `(G, L, P, H)` of the given tasks."""
        points = self.points(phase, generator, tasks)
        return torch.einsum("gld,ldx->glx", points, self.projection).view(len(tasks), *self.shape)

    def forward(self, encoder: Encoder, batch: SpanBatch, phase: Phase, generator: torch.Generator) -> Tensor:
        """Start and end logits of the batch's candidates, `(N, 2, C)`."""
        layout = pack([len(text) for text in batch.ids], encoder.device)
        read = layout.rows(batch.support.flatten(1))
        states = self.states(encoder, batch.ids, batch.tasks, layout, phase, generator, read)
        logits = F.linear(states, self.head_weight, self.head_bias)  # (N, 2 * C, start and end)
        start, end = logits.view(len(logits), 2, -1, 2).unbind(1)
        return torch.stack((start[..., 0], end[..., 1]), dim=1)

    def states(
        self,
        encoder: Encoder,
        ids: Sequence[Sequence[int]],
        tasks: Tensor,
        layout: Layout,
        phase: Phase,
        generator: torch.Generator,
        read: Tensor | None = None,
    ) -> Tensor:
        """Last states of texts `(N,)` under their tasks' prompts, float32: `(N, R, H)` of `read`, or `(T, H)`."""
        _, length, hidden = self.shape
        groups, member = torch.unique(tasks, return_inverse=True)
        prompts = self.vectors(phase, generator, groups)
        if phase.left and self.fading is not None:
            prompts = torch.cat([prompts, phase.left * self.fading[groups]], dim=1)
        at = layout.rows(torch.arange(length) + self.frame.prompt_start).flatten()
        states = encoder.embed(ids, layout)
        member = member.to(prompts.device)
        last = len(encoder.layers) - 1
        for index in range(last + 1):
            if index < prompts.shape[1]:
                added = prompts[:, index][member].to(encoder.dtype).reshape(-1, hidden)
                states = states.index_add(0, at, added)
            states = encoder.layer(index, states[None], layout, read if index == last else None)[0]
        return states.float()
