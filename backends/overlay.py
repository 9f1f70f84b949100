"""Weights laid over those of an encoder: all inner ones, and of its embedding tables the rows that were read.

A row that no text reads has no gradient, so under Adam without weight decay it stays what it was, bit for bit. The
tables are most of a multilingual model; without the rows that stay, what a run keeps of one is small.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from bbprompt.backends.backbone import Backbone
from bbprompt.backends.encoder import Encoder
from bbprompt.backends.layout import pack
from bbprompt.errors import ArtifactError

__all__ = ["PREFIX", "Rows", "overlaid", "rows_read", "weights_of", "with_rows", "written_weights"]

#: Before the name of every tensor of a model that a run keeps.
PREFIX = "model."
_INDEX = ".index"


class Rows(nn.Module):
    """An embedding table of which some rows are replaced by a parameter.

    Attributes:
        weight: The whole table as it was, `(V, H)`; shared with the model that it is of.
        index: `(U,)` which rows are replaced, ascending.
        rows: `(U, H)` what stands in their place; at first the same.
        padding_idx: That of the table.

    Raises:
        ValueError: The index is no ascending list of rows of the table.
    """

    weight: Tensor
    index: Tensor
    place: Tensor

    def __init__(self, table: nn.Embedding, index: Tensor) -> None:
        super().__init__()
        weight = table.weight.detach()
        rising = index.ndim == 1 and len(index) > 0 and bool((index[1:] > index[:-1]).all())
        if not rising or not 0 <= int(index[0]) <= int(index[-1]) < len(weight):
            raise ValueError("the rows of an embedding table are not those of this model")
        place = torch.full((len(weight),), -1, dtype=torch.long)
        place[index] = torch.arange(len(index))
        self.register_buffer("weight", weight)
        self.register_buffer("index", index)
        self.register_buffer("place", place)
        self.rows = nn.Parameter(weight[index].clone(), requires_grad=False)
        self.padding_idx = table.padding_idx

    def forward(self, ids: Tensor) -> Tensor:
        """Look token ids of any shape up: `(..., H)`."""
        at = self.place[ids]
        own = F.embedding(at.clamp_min(0), self.rows)
        return torch.where((at >= 0)[..., None], own, F.embedding(ids, self.weight))


def rows_read(backbone: Backbone, ids: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """Which rows of each embedding table some token sequences read: its name -> `(U,)`, ascending.

    Raises:
        ArtifactError: The backbone is no encoder that runs layer by layer.
    """
    read: dict[str, Tensor] = {}

    def watch(name: str, table: nn.Embedding) -> Any:
        return table.register_forward_pre_hook(lambda _, args: read.update({name: args[0].unique()}))

    encoder = Encoder(backbone.model, token_type=backbone.token_type, prepack=False)
    handles = [watch(name, table) for name, table in _tables(backbone.model).items()]
    try:
        encoder.embed(ids, pack([len(each) for each in ids]))
    finally:
        for handle in handles:
            handle.remove()
    return read


def with_rows(model: Any, read: Mapping[str, Tensor]) -> Any:
    """A copy of an encoder with `Rows` in place of some embedding tables; the tables themselves are not copied.

    Args:
        model: The encoder.
        read: As `rows_read` gives it.

    Raises:
        ValueError: It has no such tables, or fewer rows.
    """
    tables = _tables(model)
    if not read.keys() <= tables.keys():
        raise ValueError(f"no embedding table {min(read.keys() - tables.keys())}")
    made = copy.deepcopy(model, {id(table.weight): table.weight for table in tables.values()})
    for name, index in read.items():
        made.set_submodule(name, Rows(tables[name], index))
    return made


def weights_of(model: Any) -> dict[str, nn.Parameter]:
    """The parameters of a model of `with_rows` that its last states follow from, but for whole tables."""
    whole = {f"{name}.weight" for name in _tables(model)}
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if name not in whole and not name.startswith("pooler.")
    }


def written_weights(model: Any) -> dict[str, NDArray[Any]]:
    """What is kept of a model of `with_rows`: its weights, and which rows of the tables are among them."""
    tensors: dict[str, Tensor] = {PREFIX + name: weight for name, weight in weights_of(model).items()}
    for name, module in model.named_modules():
        if isinstance(module, Rows):
            tensors[PREFIX + name + _INDEX] = module.index
    return {name: tensor.detach().cpu().numpy().copy() for name, tensor in tensors.items()}


def overlaid(backbone: Backbone, tensors: Mapping[str, NDArray[Any]]) -> Backbone:
    """A backbone with other weights; name and digest stay those of the one underneath.

    Args:
        backbone: What the weights were tuned from; it is not changed.
        tensors: Those of `written_weights`, and others, which are not looked at. Without any it is as it was.

    Raises:
        ArtifactError: They are not all there, not finite, or of a model of another shape.
    """
    own = {name.removeprefix(PREFIX): array for name, array in tensors.items() if name.startswith(PREFIX)}
    if not own:
        return backbone
    read = {name.removesuffix(_INDEX): own.pop(name) for name in [*own] if name.endswith(_INDEX)}
    try:
        model = with_rows(backbone.model, {name: torch.from_numpy(index).long() for name, index in read.items()})
        weights = weights_of(model)
        if strange := weights.keys() ^ own.keys():
            raise ValueError(f"{min(strange)} is on one side alone")
        for name, weight in weights.items():
            if own[name].shape != tuple(weight.shape) or not np.isfinite(own[name]).all():
                raise ValueError(f"{name} has the shape {own[name].shape}, not {tuple(weight.shape)}, or is not finite")
            weight.detach().copy_(torch.from_numpy(own[name]))
    except (ValueError, TypeError) as error:
        raise ArtifactError(
            f"the tuned weights do not fit the backbone {backbone.id} ({error}); give the one that they were tuned "
            "from, or tune again"
        ) from None
    return replace(backbone, model=model)


def _tables(model: Any) -> dict[str, nn.Embedding]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
