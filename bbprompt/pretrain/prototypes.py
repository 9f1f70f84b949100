"""Pre-training under the prototype readout: texts and options as embeddings, the right one is to be the nearest.

The same tasks, prompts and routers as under a span head. Every text and every option is a sequence of its own; pairs
that are more or less alike are two texts. The scale is learned and shared by all tasks, and so is the threshold; where
the labels of a compared task lie around it each task learns for itself, for tuning fits that to a new task.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from bbprompt.backends.encoder import Encoder
from bbprompt.backends.layout import pack
from bbprompt.backends.prototype_head import PrototypeHead, pieces
from bbprompt.pretrain.mixture import Mixture
from bbprompt.pretrain.model import ModularPrompts, Phase
from bbprompt.tasks.example import Example, Form
from bbprompt.tasks.task import Task
from bbprompt.texts.forms import embed_form
from bbprompt.texts.mrc import Encoded

__all__ = ["PrototypeBatch", "PrototypeMixture", "collate_prototypes", "prototype_loss"]


@dataclass(frozen=True, slots=True)
class PrototypeBatch:
    """A training batch of one or several tasks, options padded to C.

    Attributes:
        sequences: S texts and options, each once a task.
        members: `(S,)` task index of each sequence.
        tasks: `(N,)` task index of each example.
        left: `(N, C)` sequence of the text, for each option.
        right: `(N, C)` sequence that it is compared with.
        grades: `(N, C)` how alike two compared texts are to be for this option, from 1 to -1; else 1.
        compared: `(N,)` whether the example is two texts that are compared.
        present: `(N, C)` True where an option exists.
        gold: `(N,)` index of the right option.
        uids: Which examples these are, for messages.
    """

    sequences: list[Encoded]
    members: Tensor
    tasks: Tensor
    left: Tensor
    right: Tensor
    grades: Tensor
    compared: Tensor
    present: Tensor
    gold: Tensor
    uids: tuple[str, ...]

    @property
    def ids(self) -> list[tuple[int, ...]]:
        """Token ids of the sequences."""
        return [item.ids for item in self.sequences]

    @property
    def rows_read(self) -> int:
        """Rows that the last layer computes: all of them."""
        return sum(len(item.ids) for item in self.sequences)


def prototype_loss(
    prompts: ModularPrompts,
    encoder: Encoder,
    head: PrototypeHead,
    batch: PrototypeBatch,
    phase: Phase,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy over the options of each example, and whether it was answered right, `(N,)` both."""
    layout = pack([len(item.ids) for item in batch.sequences], encoder.device)
    states = prompts.states(encoder, batch.ids, batch.members, layout, phase, generator)
    embeddings = head.apply(head.plan(batch.sequences, layout, "candidates"), states[None])[0]
    cosine = (embeddings[batch.left] * embeddings[batch.right]).sum(-1)
    compared = batch.compared.to(cosine.device)[:, None]
    logits = prompts.log_scale.exp() * batch.grades.to(cosine.device) * (cosine - prompts.threshold * compared)
    width = min(cosine.shape[1], prompts.offsets.shape[1])
    logits = logits + F.pad(prompts.offsets[batch.tasks, :width], (0, cosine.shape[1] - width)) * compared
    logits = logits.masked_fill(~batch.present.to(cosine.device), -torch.inf)
    gold = batch.gold.to(cosine.device)
    return F.cross_entropy(logits, gold, reduction="none"), (logits.argmax(1) == gold).float()


def collate_prototypes(rows: Sequence[tuple[Task, int, Example]], head: PrototypeHead) -> PrototypeBatch:
    """Collect examples, each with its task and the task's index; `head` writes their texts and options.

    An option that one example of a task needs is an option for all of them: it is embedded anyway.
    """
    rows = _shared(rows)
    at: dict[tuple[int, Form], int] = {}
    sequences: list[Encoded] = []
    drawn: list[tuple[Form, list[int]]] = []
    for task, index, example in rows:
        form = embed_form(task, example)
        places = []
        for piece in pieces(form):
            if (index, piece) not in at:
                at[index, piece] = len(sequences)
                sequences.append(head.write(piece))
            places.append(at[index, piece])
        drawn.append((form, places))
    width = max(len(form.options) for form, _ in drawn)
    left = torch.zeros(len(rows), width, dtype=torch.long)
    right, grades = left.clone(), torch.ones(len(rows), width)
    present = torch.zeros(len(rows), width, dtype=torch.bool)
    for number, (form, (first, *others)) in enumerate(drawn):
        count = len(form.options)
        left[number], present[number, :count] = first, True
        right[number, :count] = torch.as_tensor(others)
        if form.second >= 0:
            grades[number, :count] = torch.as_tensor(form.grades)
    return PrototypeBatch(
        sequences,
        torch.as_tensor([index for index, _ in at]),
        torch.as_tensor([index for _, index, _ in rows]),
        left,
        right,
        grades,
        torch.as_tensor([form.second >= 0 for form, _ in drawn]),
        present,
        torch.as_tensor([example.label for *_, example in rows]),
        tuple(example.uid for *_, example in rows),
    )


def _shared(rows: Sequence[tuple[Task, int, Example]]) -> list[tuple[Task, int, Example]]:
    """The same examples, each with all options that stand in those of its task, in the task's order."""
    present: dict[int, set[str]] = {}
    for _, index, example in rows:
        present.setdefault(index, set()).update(example.options)
    result = []
    for task, index, example in rows:
        if task.labelled:
            options = tuple(option for option in task.options if option in present[index])
            example = replace(example, options=options, label=options.index(example.options[example.label]))
        result.append((task, index, example))
    return result


class PrototypeMixture:
    """The batches of a mixture, for prototypes.

    Args:
        mixture: Draws examples; tasks without options are not allowed in it.
        head: Writes texts and options as tokens.
    """

    def __init__(self, mixture: Mixture, head: PrototypeHead) -> None:
        self._mixture, self.head = mixture, head
        self.names, self.sources, self.digests = mixture.names, mixture.sources, mixture.digests
        self._valid: dict[tuple[int, int, int], list[PrototypeBatch]] = {}

    def batch(self, step: int, part: int = 0) -> PrototypeBatch:
        """Slice `part` of the batch of `step` (both from 0)."""
        return collate_prototypes(
            [self._row(index, at, example) for index, at, example in self._mixture.drawn(step, part)], self.head
        )

    def valid(self, index: int, limit: int, size: int) -> list[PrototypeBatch]:
        """Validation batches of one task: its first `limit` validation examples, `size` a batch."""
        key = (index, limit, size)
        if key not in self._valid:
            start = len(self._mixture.tasks[index].train)
            checked = enumerate(self._mixture.checked(index, limit), start)
            rows = [self._row(index, at, example) for at, example in checked]
            self._valid[key] = [collate_prototypes(rows[i : i + size], self.head) for i in range(0, len(rows), size)]
        return self._valid[key]

    @property
    def grades(self) -> int:
        """Most labels of a task whose texts are compared."""
        return max((len(u.task.options) for u in self._mixture.tasks if u.task.same is not None), default=0)

    def _row(self, index: int, at: int, example: Example) -> tuple[Task, int, Example]:
        """An example with its task; where texts are compared no label costs a token, so all stay."""
        upstream = self._mixture.tasks[index]
        if upstream.task.same is not None:
            trained = len(upstream.train)
            example = upstream.train[at] if at < trained else upstream.valid[at - trained]
        return upstream.task, index, example
