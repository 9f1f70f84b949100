"""Pre-training under the prototype readout: texts and options as embeddings, the right one is to be the nearest.

The same tasks, prompts and routers as under a span head. Every text and every option is a sequence of its own; pairs
that say the same or not are two texts and a threshold, which is learned with the scale and shared by all tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from bbprompt.backends.encoder import Encoder, pack
from bbprompt.backends.prototype_head import PrototypeHead, pieces
from bbprompt.pretrain.mixture import Mixture
from bbprompt.pretrain.model import Gates, ModularPrompts
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
        sign: `(N, C)` -1 for the option that means that two texts do not say the same, else 1.
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
    sign: Tensor
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
    gates: Gates,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy over the options of each example, and whether it was answered right, `(N,)` both."""
    layout = pack([len(item.ids) for item in batch.sequences], encoder.device)
    states = prompts.states(encoder, batch.ids, batch.members, layout, gates, generator)
    embeddings = head.apply(head.plan(batch.sequences, layout, "candidates"), states[None])[0]
    cosine = (embeddings[batch.left] * embeddings[batch.right]).sum(-1)
    shifted = cosine - prompts.threshold * batch.compared.to(cosine.device)[:, None]
    logits = prompts.log_scale.exp() * batch.sign.to(cosine.device) * shifted
    logits = logits.masked_fill(~batch.present.to(cosine.device), -torch.inf)
    gold = batch.gold.to(cosine.device)
    return F.cross_entropy(logits, gold, reduction="none"), (logits.argmax(1) == gold).float()


def collate_prototypes(rows: Sequence[tuple[Task, int, Example]], head: PrototypeHead) -> PrototypeBatch:
    """Collect examples, each with its task and the task's index; `head` writes their texts and options."""
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
    right, sign = left.clone(), torch.ones(len(rows), width)
    present = torch.zeros(len(rows), width, dtype=torch.bool)
    for number, (form, (first, *others)) in enumerate(drawn):
        count = len(form.options)
        left[number], present[number, :count] = first, True
        right[number, :count] = torch.as_tensor(others)
        if form.second >= 0:
            sign[number, :count] = -1.0
            sign[number, form.same] = 1.0
    return PrototypeBatch(
        sequences,
        torch.as_tensor([index for index, _ in at]),
        torch.as_tensor([index for _, index, _ in rows]),
        left,
        right,
        sign,
        torch.as_tensor([form.second >= 0 for form, _ in drawn]),
        present,
        torch.as_tensor([example.label for *_, example in rows]),
        tuple(example.uid for *_, example in rows),
    )


class PrototypeMixture:
    """The batches of a mixture, for prototypes.

    Args:
        mixture: Draws examples; tasks without options are not allowed in it.
        head: Writes texts and options as tokens.
    """

    def __init__(self, mixture: Mixture, head: PrototypeHead) -> None:
        self._mixture, self._head = mixture, head
        self.names, self.sources, self.digests = mixture.names, mixture.sources, mixture.digests
        self._valid: dict[tuple[int, int, int], list[PrototypeBatch]] = {}

    def batch(self, step: int, part: int = 0) -> PrototypeBatch:
        """Slice `part` of the batch of `step` (both from 0)."""
        tasks = self._mixture.tasks
        return collate_prototypes(
            [(tasks[index].task, index, example) for index, _, example in self._mixture.drawn(step, part)], self._head
        )

    def valid(self, index: int, limit: int, size: int) -> list[PrototypeBatch]:
        """Validation batches of one task: its first `limit` validation examples, `size` a batch."""
        key = (index, limit, size)
        if key not in self._valid:
            task = self._mixture.tasks[index].task
            rows = [(task, index, example) for example in self._mixture.checked(index, limit)]
            self._valid[key] = [collate_prototypes(rows[i : i + size], self._head) for i in range(0, len(rows), size)]
        return self._valid[key]
