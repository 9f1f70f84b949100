"""A thin forward over the stock layers of a BERT-type encoder, on packed tokens.

The weights stay where transformers put them; only the order of the work is ours. N texts are *packed*: their
T real tokens stand in one matrix (T, H), so no GEMM, LayerNorm or activation touches padding. Attention alone
unfolds them to (N, S, H) under a mask. Several candidate prompts for the same texts are a leading dimension n.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bbprompt.backends.layout import Group, Layout
from bbprompt.backends.linear import FrozenLinear, packable
from bbprompt.backends.precision import warn_of_slow
from bbprompt.errors import ArtifactError
from bbprompt.texts.mrc import NO_TOKEN

__all__ = ["Encoder", "check_family"]

#: Model types whose layers carry BERT's names and post-LayerNorm order.
FAMILY = ("bert", "roberta", "xlm-roberta", "electra", "camembert", "ernie")

#: Bytes to whose multiples a weight is to be aligned.
_ALIGNED = 16


def check_family(model: Any) -> None:
    """Refuse a stock model that `Encoder` cannot run.

    Raises:
        ArtifactError: The model is of another family.
    """
    config = model.config
    activation = getattr(config, "hidden_act", None)
    if config.model_type not in FAMILY or activation != "gelu":
        raise ArtifactError(
            f"backbone of type '{config.model_type}' with activation '{activation}': "
            f"only gelu encoders of the BERT family are supported ({', '.join(FAMILY)})"
        )


@dataclass(frozen=True)
class _Layer:
    """The weights of a layer. Which of the three projections below it needs shows when they are first read.

    Attributes:
        projections: Weight `(3H, H)` and bias `(3H,)` of queries, keys and values.
        linear: Makes a map of weight and bias.
    """

    projections: tuple[Tensor, Tensor]
    linear: Callable[[Tensor, Tensor], FrozenLinear]
    attention_out: FrozenLinear
    attention_norm: tuple[Tensor, Tensor]
    up: FrozenLinear
    down: FrozenLinear
    norm: tuple[Tensor, Tensor]

    @cached_property
    def query_key_value(self) -> FrozenLinear:
        """All three projections in one: of a layer that computes all its rows."""
        return self.linear(*self.projections)

    @cached_property
    def query(self) -> FrozenLinear:
        """Of the rows that are read, where those are not all."""
        return self.linear(*self._parts[0])

    @cached_property
    def key_value(self) -> FrozenLinear:
        """Of all rows, where queries are asked for at a few."""
        return self.linear(*self._parts[1])

    @cached_property
    def _parts(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Views: weight and bias of the queries, and of keys and values."""
        third = self.attention_out.weight.shape[1]
        # Split once for both and not sliced: the way back then joins their gradients, and adds no zeros to them.
        weights, biases = (torch.split(each, [third, 2 * third]) for each in self.projections)
        return (weights[0], biases[0]), (weights[1], biases[1])

    @property
    def tail(self) -> tuple[Tensor, ...]:
        """The weights of `_tail`, in its order."""
        out, up, down = self.attention_out, self.up, self.down
        maps = (out.weight, out.bias, up.weight, up.bias, down.weight, down.bias)
        return (*maps, *self.attention_norm, *self.norm)


class Encoder:
    """The frozen encoder, one layer at a time.

    Args:
        model: A stock transformers encoder of the BERT family (BERT, RoBERTa, XLM-R, ELECTRA …).
        dtype: Precision of weights and states.
        device: Where to run.
        token_type: Token type id fed at every position (0; 1 for CPT).
        prepack: Keep a second copy of the weights in the layout that forward calls on a CPU run fastest on.
        linear: What becomes of the weights.
        learns: Gradients reach the model's own parameters, as they are now: the weights are read where they stand.
        compiled: Where gradients are asked for, what follows attention in a layer is compiled, once for all layers
            and lengths.

    Raises:
        ArtifactError: The model is of another family.
    """

    def __init__(
        self,
        model: Any,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        token_type: int = 0,
        prepack: bool = True,
        linear: type[FrozenLinear] = FrozenLinear,
        learns: bool = False,
        compiled: bool = False,
    ) -> None:
        check_family(model)
        config = model.config
        self.dtype, self.device = dtype, torch.device(device)
        if not learns:  # such a one is made anew for every forward
            warn_of_slow(dtype, self.device.type)
        self.hidden: int = config.hidden_size
        self.heads: int = config.num_attention_heads
        self.epsilon: float = config.layer_norm_eps
        self._token_type, self._learns = token_type, learns
        # RoBERTa counts positions from padding_idx + 1, BERT from 0.
        padding = getattr(model.embeddings, "padding_idx", None)
        self._first_position = 0 if config.model_type in ("bert", "electra", "ernie") else int(padding or 0) + 1
        self._embeddings = model.embeddings
        self._projection = getattr(model, "embeddings_project", None)  # ELECTRA with narrow embeddings
        self._tail = torch.compile(_tail, dynamic=True) if compiled else None
        prepack = prepack and self.device.type == "cpu" and packable(dtype)
        make = partial(linear, prepack=prepack)
        self.layers = tuple(self._read_layer(layer, make) for layer in model.encoder.layer)
        for layer in self.layers[:-1]:
            # Every forward reads it: it takes its memory before anyone measures what is left.
            _ = layer.query_key_value

    def _read_layer(self, layer: Any, linear: Callable[[Tensor, Tensor], FrozenLinear]) -> _Layer:
        def own(parameter: Tensor) -> Tensor:
            return (parameter if self._learns else parameter.detach()).to(self.device, self.dtype)

        def one(module: nn.Linear) -> FrozenLinear:
            return linear(_standing(own(module.weight)), own(module.bias))

        def norm(module: nn.LayerNorm) -> tuple[Tensor, Tensor]:
            return own(module.weight), own(module.bias)

        attention = layer.attention
        parts = attention.self.query, attention.self.key, attention.self.value
        return _Layer(
            projections=(
                torch.cat([own(part.weight) for part in parts]),
                torch.cat([own(part.bias) for part in parts]),
            ),
            linear=linear,
            attention_out=one(attention.output.dense),
            attention_norm=norm(attention.output.LayerNorm),
            up=one(layer.intermediate.dense),
            down=one(layer.output.dense),
            norm=norm(layer.output.LayerNorm),
        )

    def embed(self, ids: Sequence[Sequence[int]], layout: Layout) -> Tensor:
        """Embed token ids: the packed states `(T, H)` entering layer 0, before any prompt is added.

        A row of `NO_TOKEN` is zero and takes no position from the tokens, which keep those that they have without it.
        """
        rows = torch.as_tensor([token != NO_TOKEN for i in layout.order for token in ids[i]])
        texts = [[token for token in ids[i] if token != NO_TOKEN] for i in layout.order]
        flat = torch.as_tensor([token for text in texts for token in text], dtype=torch.long)
        positions = torch.cat([torch.arange(len(text)) for text in texts]) + self._first_position
        types = torch.full_like(flat, self._token_type)
        flat, positions, types = (
            row[None].to(self._embeddings.LayerNorm.weight.device) for row in (flat, positions, types)
        )
        with torch.set_grad_enabled(self._learns and torch.is_grad_enabled()):
            states: Tensor = self._embeddings(input_ids=flat, position_ids=positions, token_type_ids=types)
            if self._projection is not None:
                states = self._projection(states)
            states = states[0].to(self.device, self.dtype)
            if len(states) == len(rows):
                return states
            return states.new_zeros(len(rows), self.hidden).index_put((rows.to(self.device),), states)

    def last_states(self, ids: Sequence[Sequence[int]], layout: Layout) -> Tensor:
        """Run token ids through all layers without any prompt: packed states `(1, T, H)`."""
        states = self.embed(ids, layout)[None]
        for index in range(len(self.layers)):
            states = self.layer(index, states, layout)
        return states

    def project(self, index: int, states: Tensor, keys_only: bool = False) -> Tensor:
        """Queries, keys and values `(n, T, 3H)` of layer `index`, or keys and values `(n, T, 2H)`."""
        weights = self.layers[index]
        return weights.key_value(states) if keys_only else weights.query_key_value(states)

    def shift(self, index: int, added: Tensor, keys_only: bool = False) -> Tensor:
        """What `project` gains where its states gain `added` `(..., H)`: the affine map without its bias."""
        weights = self.layers[index]
        return (weights.key_value if keys_only else weights.query_key_value).linear(added)

    def layer(
        self,
        index: int,
        states: Tensor,
        layout: Layout,
        read: Tensor | None = None,
        projected: Tensor | None = None,
    ) -> Tensor:
        """Run layer `index`.

        Args:
            index: Layer, from 0.
            states: `(n, T, H)`.
            layout: Where the texts lie in T.
            read: `(N, R)` packed rows, each row of its own text; with it only these rows are computed, while
                keys and values still come from all.
            projected: What `project` gives for these states (keys only with `read`), where it is known.

        Returns:
            `(n, T, H)`, or `(n, N, R, H)` with `read`.
        """
        weights, h = self.layers[index], self.hidden
        if read is None:
            mixed = self.attend(self.project(index, states) if projected is None else projected, layout)
            residual = states
        else:
            residual = states[:, read]
            # Queries, and what they see, at a few rows only: cheaper to carry them to the states than to make
            # keys and values of every token.
            few = 2 * read.shape[1] * self.heads <= h and not torch.is_grad_enabled()
            if few and projected is None:
                mixed = self._absorbed(weights, weights.query(residual), states, layout)
            else:
                if projected is None:
                    projected = self.project(index, states, keys_only=True)
                mixed = self._looked_up(weights.query(residual), projected, layout)
        if self._tail is not None and torch.is_grad_enabled():
            return self._tail(mixed, residual, weights.tail, self.epsilon)
        summed = weights.attention_out.onto(mixed, residual)
        inner = F.layer_norm(summed, (h,), *weights.attention_norm, self.epsilon)
        summed = weights.down.onto(weights.up(inner, "gelu"), inner)
        return F.layer_norm(summed, (h,), *weights.norm, self.epsilon)

    def attend(self, projected: Tensor, layout: Layout) -> Tensor:
        """Self-attention within each text: queries, keys and values `(n, T, 3H)` to `(n, T, H)`."""
        n = len(projected)
        pieces = []
        for group, grid in _grids(projected, layout):
            query, key, value = (self._heads(part) for part in grid.flatten(0, 1).chunk(3, -1))
            mixed = (
                self._attend(query[:, :, : group.width], key, value, group, n)
                .transpose(-2, -3)
                .reshape(n, -1, self.hidden)
            )
            pieces.append(mixed if mixed.shape[1] == len(group.cells) else _take(mixed, group.cells))
        return torch.cat(pieces, dim=1) if len(pieces) > 1 else pieces[0]

    def _looked_up(self, query: Tensor, projected: Tensor, layout: Layout) -> Tensor:
        """Attention of some rows `(n, N, R, H)` to the keys and values `(n, T, 2H)` of their texts."""
        n, mixed = len(query), torch.empty_like(query)
        for group, grid in _grids(projected, layout):
            key, value = (self._heads(part) for part in grid.flatten(0, 1).chunk(2, -1))
            out = self._attend(self._heads(query[:, group.texts].flatten(0, 1)), key, value, group, n)
            mixed[:, group.texts] = out.transpose(-2, -3).reshape(n, len(group.texts), -1, self.hidden)
        return mixed

    def _absorbed(self, weights: _Layer, query: Tensor, states: Tensor, layout: Layout) -> Tensor:
        """The same from the states `(n, T, H)` themselves.

        For each head q . (W x + b) = (q W) . x + q . b, whose last term is equal for all x and drops out of the
        softmax; and the mean of the values V x + c is V (mean of x) + c.
        """
        n, texts, rows, h = query.shape
        weight, bias = weights.projections  # the keys' and values' own map is not read here, and so not made
        _, key, value = weight.view(3, self.heads, -1, h).unbind()
        scale = 1 / math.sqrt(h // self.heads)
        by_head = query.reshape(-1, self.heads, h // self.heads).transpose(0, 1) * scale
        carried = (by_head @ key).view(self.heads, n, texts, rows, h)
        seen = torch.empty_like(carried)
        for group, grid in _grids(states, layout):
            asked = carried[:, :, group.texts].permute(1, 2, 0, 3, 4).flatten(2, 3)
            scores = asked @ grid.transpose(-1, -2)
            if not group.even:
                scores = scores.masked_fill(~group.mask[:, 0], -torch.inf)
            found = (scores.softmax(-1) @ grid).view(n, len(group.texts), self.heads, rows, h)
            seen[:, :, group.texts] = found.permute(2, 0, 1, 3, 4)
        mixed = seen.view(self.heads, -1, h) @ value.transpose(-1, -2)
        return mixed.transpose(0, 1).reshape(n, texts, rows, h) + bias[2 * h :]

    def _heads(self, rows: Tensor) -> Tensor:
        """(..., S, H) to (..., heads, S, H / heads)."""
        return rows.reshape(*rows.shape[:-1], self.heads, -1).transpose(-2, -3)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, group: Group, n: int) -> Tensor:
        mask = None if group.even else group.mask.repeat(n, 1, 1, 1)
        if self.device.type == "cpu" and torch.is_grad_enabled():
            # The backward of the fused kernel is about three times slower than the plain products on a CPU.
            scores: Tensor = (query / math.sqrt(query.shape[-1])) @ key.transpose(-1, -2)
            if mask is not None:
                scores = scores + mask.logical_not().to(scores.dtype) * torch.finfo(scores.dtype).min
            return scores.softmax(-1) @ value
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def _standing(weight: Tensor) -> Tensor:
    """A weight as products read it: itself, or a copy where it does not lie in whole vectors.

    Tensors of a file lie as the file has them, and other alignment changes the last bits of a single row's product.
    """
    stands = weight.is_contiguous() and weight.data_ptr() % _ALIGNED == 0
    return weight if stands else weight.clone(memory_format=torch.contiguous_format)


def _tail(mixed: Tensor, residual: Tensor, weights: tuple[Tensor, ...], epsilon: float) -> Tensor:
    """What follows attention in a layer, in plain operations that a compiler can fuse; see `Encoder.layer`."""
    out, out_bias, up, up_bias, down, down_bias, scale, shift, last_scale, last_shift = weights
    shape = residual.shape[-1:]
    inner = F.layer_norm(residual + F.linear(mixed, out, out_bias), shape, scale, shift, epsilon)
    summed = inner + F.linear(F.gelu(F.linear(inner, up, up_bias)), down, down_bias)
    return F.layer_norm(summed, shape, last_scale, last_shift, epsilon)


def _grids(rows: Tensor, layout: Layout) -> Iterator[tuple[Group, Tensor]]:
    """Each group with its rows of `(n, T, C)` as a padded grid `(n, G, S, C)`."""
    # Split and not sliced: going backward, each slice would fill a whole (n, T, C) of zeros and add it to the others.
    parts = torch.split(rows, [len(group.cells) for group in layout.groups], dim=1)
    for group, own in zip(layout.groups, parts, strict=True):
        filled = own if group.even else _take(own, group.rows.flatten())
        yield group, filled.reshape(len(rows), *group.rows.shape, rows.shape[-1])


def _take(rows: Tensor, index: Tensor) -> Tensor:
    """`rows[:, index]`; six times faster on a CPU as lists of whole rows."""
    if rows.device.type != "cpu":
        return rows[:, index]
    if torch.is_grad_enabled():
        return rows.index_select(1, index)  # advanced indexing has a slow backward
    taken = rows.new_empty(len(rows), len(index), rows.shape[-1])
    for each, place in zip(rows, taken, strict=True):
        torch.index_select(each, 0, index, out=place)
    return taken
