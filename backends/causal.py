"""The local oracle for causal language models: the stock forward, prompts added before its layers.

As in BBT and BBTv2 for GPT-2, placeholder tokens stand at the front and the prompt of layer l is added to their
states before block l; a shallow prompt is the one before the first. Texts are padded on the right, where a causal
model does not look. Only the state of the last token is read, and only the output rows of the option words.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bbprompt.backends.backbone import Backbone
from bbprompt.backends.encoder import pack
from bbprompt.backends.fit import check_fit, describe
from bbprompt.backends.tokens import frame_for, tokenize_with
from bbprompt.backends.verbalizer_head import VerbalizerHead
from bbprompt.errors import ArtifactError
from bbprompt.oracle import OracleInfo, Scores, Support, TextBatch, check_points
from bbprompt.prompts import ModularPrompt
from bbprompt.texts.mrc import Encoded, Frame
from bbprompt.units import Unit, join, plan_units

__all__ = ["CausalOracle", "causal_frame", "last_states"]


class CausalOracle:
    """A frozen causal language model on this machine's CPU or GPU, with a verbalizer readout.

    Args:
        backbone: The stock model with tokenizer and head.
        prompt: The artifact behind the oracle; its readout is a verbalizer.
        device: "cpu" or "cuda".
        dtype: "float32" or "bfloat16".
        batch_tokens: Tokens that run through the model at once (candidates times texts, padding included).
        max_tokens: Longest sequence; None for the backbone's limit.

    Raises:
        ArtifactError: The prompts are for another backbone or readout.
    """

    def __init__(
        self,
        backbone: Backbone,
        prompt: ModularPrompt,
        *,
        device: str = "cpu",
        dtype: str = "float32",
        batch_tokens: int = 4096,
        max_tokens: int | None = None,
    ) -> None:
        check_fit(prompt, backbone)
        config = prompt.config
        if config.readout != "verbalizer" or backbone.head is None:
            raise ArtifactError(
                f"backbone {backbone.id}: a causal language model is read by a verbalizer, not by '{config.readout}'; "
                "choose other --prompts"
            )
        self._device = torch.device(device)
        self._model: Any = backbone.model.to(device=self._device, dtype=getattr(torch, dtype))
        limit = backbone.max_positions if max_tokens is None else min(max_tokens, backbone.max_positions)
        self._frame = causal_frame(backbone.tokenizer, config.placeholders, limit)
        tokenize = tokenize_with(backbone.tokenizer)
        self._head = VerbalizerHead(backbone.head, -1, tokenize, self._frame, self._device)
        self._projection = torch.from_numpy(prompt.projection).to(self._device)
        self._batch_tokens = batch_tokens
        self._info = OracleInfo(
            backbone=backbone.id,
            backbone_digest=backbone.digest,
            prompts_digest=prompt.digest,
            layers=config.layers,
            dim=config.intrinsic_dim,
            precision=dtype,
            device=describe(device),
            max_tokens=limit,
            readout="verbalizer",
        )

    @property
    def info(self) -> OracleInfo:
        """What this oracle is."""
        return self._info

    def close(self) -> None:
        """Nothing is kept between calls."""

    @torch.inference_mode()
    def score(
        self,
        batch: TextBatch,
        points: NDArray[np.floating],
        support: Support = "candidates",
        longest_answer: int | None = None,
    ) -> Scores:
        """Score every candidate on every text; see `bbprompt.oracle.Oracle`."""
        checked = check_points(points, self._info)
        chunks = self._chunks(batch)
        units = plan_units(len(checked), self._fits(chunks))
        return join([self._unit(batch, chunks, checked, support, longest_answer, unit) for unit in units])

    def at_once(self, batch: TextBatch, support: Support = "candidates") -> int:
        """Candidates that run through the model together on these texts: the size of a unit.

        Raises:
            DataError: A text does not fit the model.
        """
        return self._fits(self._chunks(batch))

    @torch.inference_mode()
    def score_unit(
        self,
        batch: TextBatch,
        points: NDArray[np.floating],
        support: Support,
        longest_answer: int | None,
        unit: Unit,
    ) -> Scores:
        """Score the candidates of one unit of a request; they are the same bits wherever that is done."""
        checked = check_points(points, self._info)
        return self._unit(batch, self._chunks(batch), checked, support, longest_answer, unit)

    def _chunks(self, batch: TextBatch) -> list[list[Encoded]]:
        """The texts as sequences, as many together as run through the model at once under one candidate."""
        chunks: list[list[Encoded]] = []
        width = 0
        for item in self._head.sequences(batch):
            width = max(width, len(item.ids))
            if not chunks or (len(chunks[-1]) + 1) * width > self._batch_tokens:
                chunks.append([])
                width = len(item.ids)
            chunks[-1].append(item)
        return chunks

    def _fits(self, chunks: Sequence[Sequence[Encoded]]) -> int:
        most = max(len(some) * max(len(item.ids) for item in some) for some in chunks)
        return max(self._batch_tokens // most, 1)

    def _unit(
        self,
        batch: TextBatch,
        chunks: Sequence[Sequence[Encoded]],
        points: NDArray[np.float32],
        support: Support,
        longest_answer: int | None,
        unit: Unit,
    ) -> Scores:
        candidates = torch.from_numpy(points[unit.first : unit.last]).to(self._device)
        prompts = torch.einsum("nld,ldx->nlx", candidates, self._projection)
        prompts = prompts.view(*prompts.shape[:2], len(self._frame.placeholders), -1)
        plans = [self._head.plan(some, pack([len(item.ids) for item in some]), support) for some in chunks]
        outputs = [self._head.apply(plan, self._last(some, prompts)) for plan, some in zip(plans, chunks, strict=True)]
        return self._head.scores(batch, plans, outputs, longest_answer)

    def _last(self, sequences: Sequence[Encoded], prompts: Tensor) -> Tensor:
        """State `(n, N, 1, H)` of the last token of each text under the prompts `(n, L, P, H)`.

        What stands before a text is the same for all texts of a candidate, so it runs through the model once and they
        attend to its keys and values.
        """
        front = self._frame.text_start
        before = torch.as_tensor([sequences[0].ids[:front]], device=self._device)
        with self._prompted(prompts):
            seen = self._model(input_ids=before.repeat(len(prompts), 1), use_cache=True).past_key_values
        return last_states(self._model, sequences, front, seen, len(prompts))

    @contextmanager
    def _prompted(self, prompts: Tensor) -> Iterator[None]:
        """Add prompts `(n, L, P, H)` before the layers while the context is open; a row a candidate."""
        first, last = self._frame.prompt_start, self._frame.text_start
        handles = []

        def adder(layer: int) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                states = (args[0] if args else kwargs["hidden_states"]).clone()
                states[:, first:last] += prompts[:, layer].to(states.dtype)
                return ((states, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": states})

            return hook

        blocks = self._model.h if hasattr(self._model, "h") else self._model.layers
        try:
            for layer in range(prompts.shape[1]):
                handles.append(blocks[layer].register_forward_pre_hook(adder(layer), with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()


def last_states(model: Any, sequences: Sequence[Encoded], front: int, seen: Any, candidates: int = 1) -> Tensor:
    """State `(n, N, 1, H)` of the last token of each text behind what stands before all of them.

    Args:
        model: The stock model.
        sequences: The texts, with what stands before them.
        front: How many tokens that is.
        seen: Keys and values of these tokens, a row for each of n candidates, which are extended in place; None where
            there are no such tokens.
        candidates: n.
    """
    device = model.device
    lengths = torch.as_tensor([len(item.ids) - front for item in sequences], device=device)
    width = int(lengths.max())
    ids = torch.zeros(len(sequences), width, dtype=torch.long)
    for row, item in zip(ids, sequences, strict=True):
        row[: len(item.ids) - front] = torch.as_tensor(item.ids[front:])
    mask = (torch.arange(front + width, device=device) < front + lengths[:, None]).long()
    if seen is not None:
        seen.batch_repeat_interleave(len(sequences))
    states: Tensor = model(
        input_ids=ids.to(device).repeat(candidates, 1),
        attention_mask=mask.repeat(candidates, 1),
        past_key_values=seen,
        use_cache=seen is not None,
    ).last_hidden_state
    last = (lengths - 1).repeat(candidates)
    rows = torch.arange(len(last), device=device)
    return states[rows, last].view(candidates, len(sequences), 1, -1)


def causal_frame(tokenizer: Any, placeholders: Sequence[int], limit: int) -> Frame:
    """The frame around a text that is to be continued: what a tokenizer puts behind a text would end it."""
    frame = frame_for(tokenizer, placeholders, limit)
    return Frame(frame.first, frame.placeholders, (), limit)
