"""The local oracle for causal language models: the stock forward, prompts added before its layers.

As in BBT and BBTv2 for GPT-2, placeholder tokens stand at the front and the prompt of layer l is added to their
states before block l; a shallow prompt is the one before the first. Texts are padded on the right, where a causal
model does not look. Only the state of the last token is read, and only the output rows of the option words.
"""

from __future__ import annotations

from collections.abc import Iterator
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

__all__ = ["CausalOracle"]


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
        frame = frame_for(backbone.tokenizer, config.placeholders, limit)
        # What a tokenizer puts behind a text ends it, and nothing is to come then.
        self._frame = Frame(frame.first, frame.placeholders, (), limit)
        tokenize = tokenize_with(backbone.tokenizer)
        self._head = VerbalizerHead(backbone.head, -1, tokenize, self._frame, self._device)
        self._projection = torch.from_numpy(prompt.projection).to(self._device)
        self._batch_tokens = batch_tokens
        self._kept: dict[str, list[list[Encoded]]] = {}  # the groups of the last texts: a request has many units
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
        """Forget the kept texts."""
        self._kept = {}

    def score(
        self,
        batch: TextBatch,
        points: NDArray[np.floating],
        support: Support = "candidates",
        longest_answer: int | None = None,
    ) -> Scores:
        """Score every candidate on every text; see `bbprompt.oracle.Oracle`."""
        checked = check_points(points, self._info)
        units = plan_units(len(checked), self.at_once(batch, support))
        return join([self.score_unit(batch, checked, support, longest_answer, unit) for unit in units])

    def at_once(self, batch: TextBatch, support: Support = "candidates") -> int:
        """Candidates that run through the model together on these texts: the size of a unit.

        Raises:
            DataError: A text does not fit the model.
        """
        return min(max(self._batch_tokens // _padded(some), 1) for some in self._groups(batch))

    @torch.inference_mode()
    def score_unit(
        self,
        batch: TextBatch,
        points: NDArray[np.floating],
        support: Support,
        longest_answer: int | None,
        unit: Unit,
    ) -> Scores:
        """Score the candidates of one unit of a request; the same bits wherever it is computed."""
        checked = torch.from_numpy(check_points(points, self._info)[unit.first : unit.last]).to(self._device)
        prompts = torch.einsum("nld,ldx->nlx", checked, self._projection)
        prompts = prompts.view(*prompts.shape[:2], len(self._frame.placeholders), -1)
        plans, outputs = [], []
        for some in self._groups(batch):
            plan = self._head.plan(some, pack([len(item.ids) for item in some]), support)
            plans.append(plan)
            outputs.append(self._head.apply(plan, self._last(some, prompts)))
        return self._head.scores(batch, plans, outputs, longest_answer)

    def _groups(self, batch: TextBatch) -> list[list[Encoded]]:
        """The texts in groups that fit into the model at once under one candidate, padding included."""
        key = batch.digest()
        if key in self._kept:
            return self._kept[key]
        groups: list[list[Encoded]] = []
        for item in self._head.sequences(batch):
            if groups and _padded([*groups[-1], item]) <= self._batch_tokens:
                groups[-1].append(item)
            else:
                groups.append([item])
        self._kept = {key: groups}
        return groups

    def _last(self, sequences: list[Encoded], prompts: Tensor) -> Tensor:
        """State `(n, N, 1, H)` of the last token of each text under the prompts `(n, L, P, H)`."""
        lengths = torch.as_tensor([len(item.ids) for item in sequences], device=self._device)
        width = int(lengths.max())
        ids = torch.zeros(len(sequences), width, dtype=torch.long)
        for row, item in zip(ids, sequences, strict=True):
            row[: len(item.ids)] = torch.as_tensor(item.ids)
        mask = (torch.arange(width, device=self._device) < lengths[:, None]).long()
        n, texts = len(prompts), len(sequences)
        with self._prompted(prompts.repeat_interleave(texts, dim=0)):
            states: Tensor = self._model(
                input_ids=ids.to(self._device).repeat(n, 1), attention_mask=mask.repeat(n, 1), use_cache=False
            ).last_hidden_state
        last = (lengths - 1).repeat(n)
        return states[torch.arange(len(last), device=self._device), last].view(n, texts, 1, -1)

    @contextmanager
    def _prompted(self, prompts: Tensor) -> Iterator[None]:
        """Add prompts `(rows, L, P, H)` before the layers while the context is open."""
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


def _padded(sequences: list[Encoded]) -> int:
    """Tokens of sequences that are padded to the longest of them."""
    return len(sequences) * max(len(item.ids) for item in sequences)
