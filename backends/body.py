"""How a family of language models runs by its stock forward, with prompts or without.

A body gives for each text the state that tells the word in the gap. Prompts are added before the blocks that read the
placeholders, by hooks, so that everything else is transformers' own code. The rows of a prepended prompt are embeddings
of zeros: other than in an encoder of the BERT family they take the first positions, as the rows of PEFT's prompt tuning
and vLLM's `prompt_embeds` do, and a model that has embeddings of positions adds them.

Candidates that share the prompts of the first layers share these layers: a `StockTrunk` holds what they give, and each
runs from there on. No model code is needed for it: the blocks that are not run stay in their places and give what they
gave before, so that a model counts positions, masks and layers as ever. Whether that is exact for a model and a layer
is tried by `families.can_fork`.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from bbprompt.backends.precision import warn_of_slow
from bbprompt.backends.stocktrunk import Given, StockTrunk
from bbprompt.errors import ArtifactError
from bbprompt.texts.mrc import NO_TOKEN, Encoded, Frame

if TYPE_CHECKING:  # a backbone is checked with what is here
    from bbprompt.backends.backbone import Backbone

__all__ = [
    "Body",
    "CausalBody",
    "SentinelBody",
    "blocks_of",
    "body_of",
    "called",
    "check_embeds",
    "embedded",
    "inputs_of",
    "prompted",
]

#: Largest difference of two states, relative to the largest entry, of one computation in two forms.
_SAME = 1e-4
#: Where the blocks of a model are, by the names that transformers gives them: GPT-2, BLOOM and more; Llama and most
#: others; MPT; T5; OPT; decoders of BERT's and RoBERTa's families.
_BLOCKS = ("h", "layers", "blocks", "block", "decoder.layers", "encoder.layer")


class Body(Protocol):
    """A frozen model without its output layer."""

    def states(self, sequences: Sequence[Encoded], frame: Frame, prompts: Tensor | None = None) -> Tensor:
        """State `(n, N, 1, H)` that tells the word in the gap of each text, under each candidate.

        Args:
            sequences: N texts in their frame.
            frame: What surrounds them.
            prompts: `(n, L, P, H)` for its placeholders; None for no prompt, which is one candidate.
        """


#: Gives the states `(n, N, 1, H)` of the texts of a chunk, told by its number: numbers are those of a `StockTrunk`.
Run = Callable[[int, Sequence[Encoded]], Tensor]


def body_of(backbone: Backbone, device: torch.device, dtype: torch.dtype) -> CausalBody | SentinelBody:
    """The body of a causal model or an encoder-decoder."""
    warn_of_slow(dtype, device.type)
    model: Any = backbone.model.to(device=device, dtype=dtype)
    if backbone.head is not None and backbone.head.causal:
        return CausalBody(model)
    return SentinelBody(model, (int(model.config.decoder_start_token_id), backbone.gap_token))


class CausalBody:
    """A causal model; texts are padded on the right, where it does not look.

    What stands before a text is the same for all texts of a candidate, so it runs through the model once for all texts
    that `states` is given, or once for all chunks of `under`, and they attend to its keys and values. Without prompts
    these are kept for the next texts. In the layers of a `StockTrunk` it runs once for all candidates.

    Args:
        model: The stock model without its head.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._front: tuple[int, ...] = ()
        self._seen: Any = None

    def states(self, sequences: Sequence[Encoded], frame: Frame, prompts: Tensor | None = None) -> Tensor:
        """States of the last tokens; see `Body`."""
        front = sequences[0].ids[: frame.text_start]
        if prompts is None:
            if front != self._front:
                self._front, self._seen = front, self._keep(front, 1) if front else None
            return self._behind(sequences, len(front), copy.deepcopy(self._seen), 1)
        with prompted(blocks_of(self._model), frame.prompt_start, frame.prompt_end, prompts):
            seen = self._keep(front, len(prompts))
        return self._behind(sequences, len(front), seen, len(prompts))

    def under(self, frame: Frame, prompts: Tensor, trunk: StockTrunk | None = None) -> Run:
        """Run what stands before the texts, for `n` candidates.

        Args:
            frame: What surrounds the texts.
            prompts: `(n, L, P, H)` for its placeholders, in the layers behind those of the trunk.
            trunk: What the candidates share; what it lacks of a chunk is added when that runs. None for nothing.
        """
        blocks, trunk = list(blocks_of(self._model)), trunk or StockTrunk()
        fork = len(trunk.prompts)
        with (
            _only(blocks, fork, len(blocks), trunk.front, len(prompts)),
            prompted(blocks[fork:], frame.prompt_start, frame.prompt_end, prompts),
        ):
            seen = _joined(trunk.seen, fork, self._keep(frame.front, len(prompts)))

        def run(number: int, sequences: Sequence[Encoded]) -> Tensor:
            entering = self._entering(trunk, number, sequences, frame) if fork else None
            with _only(blocks, fork, len(blocks), entering, len(prompts)):
                return self._behind(sequences, frame.text_start, copy.deepcopy(seen), len(prompts))

        return run

    def grown(self, trunk: StockTrunk, frame: Frame, prompts: Tensor) -> StockTrunk:
        """A trunk with further layers, whose prompts are `(l, P, H)`, at least one; the old one is of no more use."""
        blocks, first = list(blocks_of(self._model)), len(trunk.prompts)
        last = first + len(prompts)
        with (
            _only(blocks, first, last, trunk.front) as gave,
            prompted(blocks[first:], frame.prompt_start, frame.prompt_end, prompts[None]),
        ):
            seen = self._keep(frame.front, 1)
        return StockTrunk([*trunk.prompts, *prompts], Given.of(gave[0]), _joined(trunk.seen, first, seen), trunk.texts)

    def run(self, ids: Sequence[int], times: int = 1) -> Any:
        """The stock output for one sequence of tokens, that many times, with keys and values."""
        repeated = torch.as_tensor([ids], device=self._model.device).repeat(times, 1)
        return self._model(**inputs_of(self._model, repeated), use_cache=True)

    def _entering(self, trunk: StockTrunk, number: int, sequences: Sequence[Encoded], frame: Frame) -> Given:
        """What the last layer of the trunk gives for a chunk."""
        first, given = trunk.texts.get(number, (0, None))
        if given is None or first < len(trunk.prompts):
            with _only(list(blocks_of(self._model)), first, len(trunk.prompts), given) as gave:
                self._behind(sequences, frame.text_start, copy.deepcopy(trunk.seen), 1)
            given = Given.of(gave[0])
            trunk.texts[number] = len(trunk.prompts), given
        return given

    def _keep(self, front: Sequence[int], times: int) -> Any:
        """The keys and values of what stands before the texts.

        Raises:
            ArtifactError: The model keeps none, as OpenAI's first GPT and Mamba.
        """
        seen = getattr(self.run(front, times), "past_key_values", None)
        if seen is None:
            raise ArtifactError(
                f"{called(self._model)}: it keeps no keys and values, which all texts here share those of the prompt "
                "by; use another --backbone, such as GPT-2, Llama or OPT"
            )
        return seen

    def _behind(self, sequences: Sequence[Encoded], front: int, seen: Any, candidates: int) -> Tensor:
        """Run what follows the first `front` tokens; `seen` has a row a candidate and is extended in place."""
        device = self._model.device
        lengths = torch.as_tensor([len(item.ids) - front for item in sequences], device=device)
        ids, mask = _padded([item.ids[front:] for item in sequences], device)
        mask = torch.cat([mask.new_ones(len(mask), front), mask], dim=1)
        if seen is not None:
            seen.batch_repeat_interleave(len(sequences))
        states: Tensor = self._model(
            input_ids=ids.repeat(candidates, 1),
            attention_mask=mask.repeat(candidates, 1),
            past_key_values=seen,
            use_cache=seen is not None,
        ).last_hidden_state
        last = (lengths - 1).repeat(candidates)
        return states[torch.arange(len(last), device=device), last].view(candidates, len(sequences), 1, -1)


class SentinelBody:
    """An encoder-decoder of the T5 family: the encoder reads the text with its prompts, the decoder the sentinel.

    The position bias that the encoder's first block computes and hands on is kept with the states of a `StockTrunk`.

    Args:
        model: The stock model.
        told: Token ids that the decoder begins with: its start, and the sentinel that stands in the gap.
    """

    def __init__(self, model: Any, told: tuple[int, int]) -> None:
        self._encoder, self._decoder, self._told = model.get_encoder(), model.get_decoder(), told

    def states(self, sequences: Sequence[Encoded], frame: Frame, prompts: Tensor | None = None) -> Tensor:
        """States of the decoder at the sentinel; see `Body`."""
        rows = torch.zeros(1, 0, 0, 0) if prompts is None else prompts
        return self._decoded(*self._read(sequences, frame, rows), len(rows))

    def under(self, frame: Frame, prompts: Tensor, trunk: StockTrunk | None = None) -> Run:
        """See `CausalBody.under`; nothing runs before the texts."""
        shared = trunk or StockTrunk()
        fork = len(shared.prompts)

        def run(number: int, sequences: Sequence[Encoded]) -> Tensor:
            entering = self._entering(shared, number, sequences, frame) if fork else None
            with _only(list(blocks_of(self._encoder)), fork, None, entering, len(prompts)):
                read = self._read(sequences, frame, prompts, fork)
            return self._decoded(*read, len(prompts))

        return run

    def grown(self, trunk: StockTrunk, frame: Frame, prompts: Tensor) -> StockTrunk:
        """See `CausalBody.grown`."""
        return StockTrunk([*trunk.prompts, *prompts], texts=trunk.texts)

    def _entering(self, trunk: StockTrunk, number: int, sequences: Sequence[Encoded], frame: Frame) -> Given:
        """What the last layer of the trunk gives for a chunk."""
        first, given = trunk.texts.get(number, (0, None))
        if given is None or first < len(trunk.prompts):
            with _only(list(blocks_of(self._encoder)), first, len(trunk.prompts), given) as gave:
                self._read(sequences, frame, torch.stack(trunk.prompts[first:])[None], first)
            given = Given.of(gave[0])
            trunk.texts[number] = len(trunk.prompts), given
        return given

    def _read(
        self, sequences: Sequence[Encoded], frame: Frame, prompts: Tensor, first: int = 0
    ) -> tuple[Tensor, Tensor]:
        """What the encoder makes of texts, and their mask; the prompts are of its layers from `first` on."""
        ids, mask = (
            each.repeat(len(prompts), 1) for each in _padded([item.ids for item in sequences], self._encoder.device)
        )
        rows = prompts.repeat_interleave(len(sequences), dim=0)
        with prompted(list(blocks_of(self._encoder))[first:], frame.prompt_start, frame.prompt_end, rows):
            return self._encoder(**inputs_of(self._encoder, ids), attention_mask=mask).last_hidden_state, mask

    def _decoded(self, read: Tensor, mask: Tensor, candidates: int) -> Tensor:
        states: Tensor = self._decoder(
            input_ids=torch.as_tensor([self._told], device=read.device).repeat(len(read), 1),
            encoder_hidden_states=read,
            encoder_attention_mask=mask,
            use_cache=False,
        ).last_hidden_state
        return states[:, -1].view(candidates, len(read) // candidates, 1, -1)


def inputs_of(model: Any, ids: Tensor) -> dict[str, Tensor]:
    """Token ids `(N, S)` as a stock model takes them: as they are, or their embeddings where some are no token."""
    return {"inputs_embeds": embedded(model, ids)} if bool((ids == NO_TOKEN).any()) else {"input_ids": ids}


def embedded(model: Any, ids: Tensor) -> Tensor:
    """The embeddings `(..., H)` of token ids `(...)` by a stock model's own matrix; zeros where there is no token."""
    none = ids == NO_TOKEN
    rows: Tensor = model.get_input_embeddings()(ids.masked_fill(none, 0))
    return rows.masked_fill(none[..., None], 0.0)


@torch.no_grad()
def check_embeds(backbone: Backbone) -> None:
    """Refuse a model that reads embeddings otherwise than the tokens that they are of.

    Raises:
        ArtifactError: It does, so that no rows can stand before the tokens of a text.
    """
    model: Any = backbone.model
    if backbone.head is None or not backbone.head.causal:
        model = model.get_encoder()
    same = "inputs_embeds" in inspect.signature(model.forward).parameters
    if same:
        padding = getattr(model.config, "pad_token_id", None)  # RoBERTa counts none of it, where it can see it
        ids = torch.tensor([[token for token in range(5) if token != padding]], device=model.device)
        expected = model(input_ids=ids, use_cache=False).last_hidden_state
        found = model(inputs_embeds=embedded(model, ids), use_cache=False).last_hidden_state
        same = bool((found - expected).abs().max() <= _SAME * expected.abs().max())
    if not same:
        raise ArtifactError(
            f"backbone {backbone.id}: it reads embeddings otherwise than the tokens that they are of, so that no rows "
            "can stand before a text; set projection.injection=add"
        )


def called(model: Any) -> str:
    """A stock model in an error message: where it was loaded from and its type."""
    config = model.config
    return f"backbone {config.name_or_path or 'without a name'} of type '{config.model_type}'"


def blocks_of(model: Any) -> Any:
    """The blocks of a stock model without its head, in order.

    Raises:
        ArtifactError: They are not where any model that is known here has them.
    """
    for path in _BLOCKS:
        found = model
        for name in path.split("."):
            found = getattr(found, name, None)
        if isinstance(found, nn.ModuleList):
            return found
    raise ArtifactError(
        f"{called(model)}: its blocks are none of {', '.join(_BLOCKS)}, so that no prompt can be added before them; "
        "use another --backbone, such as GPT-2, Llama or OPT"
    )


@contextmanager
def prompted(blocks: Any, begin: int, end: int, prompts: Tensor) -> Iterator[None]:
    """Add prompts before blocks while the context is open.

    Args:
        blocks: Of the model.
        begin: Position of the first row of a prompt.
        end: Position behind the last of them.
        prompts: `(rows, L, P, H)`, before the first L blocks; a row for each of the model's input, or one for all.
    """
    handles = []

    def adder(layer: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            states = (args[0] if args else kwargs["hidden_states"]).clone()
            states[:, begin:end] += prompts[:, layer].to(states.dtype)
            return ((states, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": states})

        return hook

    try:
        for layer in range(prompts.shape[1]):
            handles.append(blocks[layer].register_forward_pre_hook(adder(layer), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _only(
    blocks: Sequence[Any], first: int, last: int | None, entering: Given | None = None, candidates: int = 1
) -> Iterator[list[Any]]:
    """Run blocks `first` to `last` (exclusive) alone while the context is open.

    The others are called, and compute nothing: those before give `entering`, which block `first - 1` once gave, for
    each candidate, and those behind what block `last - 1` has just given.

    Yields:
        A list of what block `last - 1` gave, once it has run.
    """
    gave: list[Any] = []
    given = None if entering is None else entering.times(candidates)
    last = len(blocks) if last is None else last
    instead = {id(block): (block, vars(block).get("forward")) for block in (*blocks[:first], *blocks[last:])}

    def note(_module: nn.Module, _args: Any, out: Any) -> None:
        gave[:] = [out]

    handle = blocks[last - 1].register_forward_hook(note)
    try:
        for block in blocks[:first]:
            vars(block)["forward"] = lambda *_args, **_more: given
        for block in blocks[last:]:
            vars(block)["forward"] = lambda *_args, **_more: gave[0]
        yield gave
    finally:
        handle.remove()
        for block, own in instead.values():
            vars(block).pop("forward", None)
            if own is not None:
                vars(block)["forward"] = own


def _joined(below: Any, layers: int, seen: Any) -> Any:
    """Keys and values of the first layers, and those of the others that a run from there on gave."""
    if layers:
        seen.layers[:layers] = below.layers[:layers]
    return seen


def _padded(sequences: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids `(N, S)`, padded on the right, and 1 where there is a token."""
    lengths = torch.as_tensor([len(ids) for ids in sequences])
    ids = torch.zeros(len(sequences), int(lengths.max()), dtype=torch.long)
    for row, tokens in zip(ids, sequences, strict=True):
        row[: len(tokens)] = torch.as_tensor(tokens)
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    return ids.to(device), mask.to(device)
