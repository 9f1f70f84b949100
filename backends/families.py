"""Whether a language model that transformers can load is one that is run and read rightly here.

Transformers has some two hundred families of causal models, and new ones with every release. What they have in common
is relied on here: an output matrix behind the last state, blocks that pass one state a token on, keys and values that
are kept. Nothing of it is looked up by name where it can be tried: on a few tokens, once, when the model is loaded.
Whether candidates can share its first layers is tried for each number of them when it is first asked for.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bbprompt.backends.body import CausalBody, SentinelBody, blocks_of
from bbprompt.backends.lm_head import LanguageHead
from bbprompt.backends.memory import is_exhausted
from bbprompt.backends.stocktrunk import StockTrunk
from bbprompt.errors import ArtifactError
from bbprompt.texts.mrc import Encoded, Frame

if TYPE_CHECKING:  # a backbone is checked with what is here
    from bbprompt.backends.backbone import Backbone

__all__ = ["can_fork", "check_model", "longest_input"]

_log = logging.getLogger("bbprompt")

#: Where config.json has the longest input: most families, MPT, BLOOM.
_LENGTHS = ("max_position_embeddings", "max_seq_len", "seq_length")
#: Longest input where it is not bounded, as by ALiBi, and config.json does not say what the model was trained on.
_UNTOLD = 2048
_T5_TRAINED_ON = 512

#: Largest difference of one computation in two forms, relative to the largest entry.
_SAME = 1e-4
#: The same in half precision, where candidates run beside others.
_SAME_HALF = 0.1
#: Tokens of a text that the model is tried on, those of them that stand before the text, and words in its gap.
_TOKENS, _FRONT, _WORDS = 8, 3, 64
_INSTEAD = "use another --backbone, such as BERT, GPT-2, Llama, OPT or T5"


def longest_input(model: Any, sentinel: bool) -> int:
    """Longest input of a stock model in tokens, prompt included.

    RoBERTa and its kin count positions from padding_idx + 1; the rows before it are never used. T5 (`sentinel`) sees
    relative positions alone; the limit is what it was trained on.
    """
    if sentinel:
        return _T5_TRAINED_ON
    rows = _told_length(model.config) or _UNTOLD
    table = getattr(getattr(model, "embeddings", None), "position_embeddings", None)
    padding = getattr(table, "padding_idx", None)
    return rows if padding is None else rows - int(padding) - 1


def _told_length(config: Any) -> int | None:
    found = (getattr(config, name, None) for name in _LENGTHS)
    return next((value for value in found if isinstance(value, int) and value > 0), None)


@torch.no_grad()
def check_model(name: str, model: Any, head: LanguageHead) -> None:
    """Refuse a language model that is not run or read rightly here, and warn where its longest input is not known.

    Args:
        name: Of the backbone.
        model: The stock model with its head, in float32.
        head: What was made of it.

    Raises:
        ArtifactError: It cannot be run on a few tokens, or its logits are not what the head makes of its last state; or
            prompts cannot be added before its blocks, or its texts cannot share what stands before them.
    """
    where = f"backbone {name} of type '{model.config.model_type}'"
    missing = [key for key in ("hidden_size", "num_hidden_layers", "vocab_size") if not hasattr(model.config, key)]
    if missing:
        raise ArtifactError(
            f"{where}: its config.json has no {' and no '.join(missing)}, as where a language model is part of a "
            "larger one; save the language model alone and give its directory"
        )
    ids = _tokens(model.config)
    parts: list[tuple[str, Callable[[], None]]] = [("be run", lambda: _check_head(where, model, head, ids))]
    if head.kind != "masked":  # masked models run by code of our own, which has a list of its families
        body = model.get_encoder() if head.kind == "sentinel" else model.base_model
        parts.append(("be run block by block", lambda: _check_blocks(where, body, ids)))
    if head.causal:
        parts.append(("go on behind its own keys and values", lambda: _check_sharing(where, model.base_model, ids)))
    for what, check in parts:
        try:
            check()
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            reason = str(error).splitlines()[0] if str(error) else "no reason given"
            raise ArtifactError(
                f"{where}: it cannot {what}, tried on a few tokens ({type(error).__name__}: {reason}); {_INSTEAD}"
            ) from error
    if head.causal and _told_length(model.config) is None:
        _log.warning(
            "%s: its config.json does not say how long an input may be; up to %d tokens are read (for more, add "
            "max_position_embeddings to it)",
            where,
            _UNTOLD,
        )


@torch.no_grad()
def can_fork(backbone: Backbone, body: CausalBody | SentinelBody, layer: int) -> bool:
    """Whether candidates that share their prompts below a layer can share what enters it, tried on a few tokens.

    They cannot where a block takes more from those before it than the states, and what is the same for all texts: as
    the keys and values of another layer. Then they run through all layers, which is logged.

    Args:
        backbone: The model that runs.
        body: How it runs.
        layer: From 1 on.
    """
    model: Any = backbone.model
    tokens = tuple(_tokens(model.config)[0].tolist())
    frame = Frame(tokens[:1], tokens[1:_FRONT], (), _TOKENS)
    ahead, behind = tokens[:_FRONT], tokens[_FRONT:]
    texts, others = (
        [Encoded((*ahead, *text), ((0, 0),), (0, 0), (), 0) for text in (some, some[:-2])]
        for some in (behind, behind[::-1])
    )
    drawn = torch.randn(2, backbone.layers, _FRONT - 1, backbone.hidden, generator=torch.Generator().manual_seed(0))
    drawn[1, :layer] = drawn[0, :layer]
    prompts = drawn.to(model.device)
    half, reason = model.dtype != torch.float32, ""
    # One candidate alone does the same sums in either form, which are the same bits in half precision as well.
    for count, most in ((1, _SAME), (2, _SAME_HALF)) if half else ((2, _SAME),):
        try:
            expected = body.states(texts, frame, prompts[:count])
            trunk = body.grown(StockTrunk(), frame, prompts[0, :layer])
            run = body.under(frame, prompts[:count, layer:], trunk)
            run(0, texts)
            run(1, others)  # what a block handed on beside its states is of these now
            found = run(0, texts)
            apart = _apart(found, expected) / float(expected.abs().max())
            reason = "" if apart <= most else f"states would differ by {apart:.2g}"
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            if is_exhausted(error):
                raise
            reason = f"{type(error).__name__}: {next(iter(str(error).splitlines()), 'no reason given')}"
        if reason:
            _log.info(
                "backbone %s of type '%s': it cannot go on from the states that enter layer %d (%s), so that "
                "candidates which differ from there on run through all layers",
                backbone.id,
                model.config.model_type,
                layer,
                reason,
            )
            return False
    return True


def _tokens(config: Any) -> Tensor:
    """A few token ids `(1, S)` that stand in a text."""
    padding = getattr(config, "pad_token_id", None)
    tokens = [token for token in range(2 * _TOKENS) if token != padding][-_TOKENS:]
    ids: Tensor = torch.tensor([tokens]) % config.vocab_size
    return ids


def _check_head(where: str, model: Any, head: LanguageHead, ids: Tensor) -> None:
    """Compare the model's logits behind a few tokens with what the head makes of the last state."""
    if head.kind == "sentinel":
        states = list[Tensor]()
        handle = model.get_decoder().register_forward_hook(lambda _module, _, out: states.append(out.last_hidden_state))
        try:
            said = model(input_ids=ids, decoder_input_ids=ids).logits[0, -1]
        finally:
            handle.remove()
    else:
        said, states = model(input_ids=ids).logits[0, -1], [model.base_model(input_ids=ids).last_hidden_state]
    if bool(said.isnan().any()):
        raise ArtifactError(f"{where}: its logits are not numbers; check the checkpoint")
    features = head.transform(states[0][0, -1])
    words = torch.linspace(0, len(said) - 1, _WORDS).long()  # logits of some words, and the share of every one
    found = head.logits(features.expand(_WORDS, -1), words)
    apart, shares = _apart(found, said[words]), _apart(head.vocabulary(features).exp(), said.softmax(-1))
    if not (apart <= _SAME * float(found.abs().max()) and shares <= _SAME):
        raise ArtifactError(
            f"{where}: its logits are not what its output matrix gives of its last state (they differ by "
            f"{apart:.2g}), so that label words would be scored wrongly; {_INSTEAD}"
        )


def _check_blocks(where: str, body: Any, ids: Tensor) -> None:
    """See that every block is run once, in order, on one state a token: so a prompt is added where it says."""
    entered: list[tuple[int, tuple[int, ...]]] = []

    def noting(number: int) -> Callable[..., None]:
        def hook(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            states = args[0] if args else kwargs.get("hidden_states")
            entered.append((number, tuple(states.shape) if isinstance(states, Tensor) else ()))

        return hook

    blocks = blocks_of(body)
    handles = [block.register_forward_pre_hook(noting(i), with_kwargs=True) for i, block in enumerate(blocks)]
    try:
        body(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    shape = (*ids.shape, body.config.hidden_size)
    if entered != [(number, shape) for number in range(body.config.num_hidden_layers)]:
        raise ArtifactError(
            f"{where}: its {body.config.num_hidden_layers} blocks are not run one after the other on a state a token, "
            f"so that no prompt can be added before them; {_INSTEAD}"
        )


def _check_sharing(where: str, body: Any, ids: Tensor) -> None:
    """Compare the last states of two texts that share what stands before them with those of each text alone."""
    tokens = tuple(ids[0].tolist())
    texts = [tokens, tokens[:-2]]
    frame = Frame(tokens[:_FRONT], (), (), _TOKENS)
    found = CausalBody(body).states([Encoded(text, ((0, 0),), (0, 0), (), 0) for text in texts], frame)[0, :, 0]
    alone = [body(input_ids=torch.tensor([text]), use_cache=False).last_hidden_state[0, -1] for text in texts]
    expected = torch.stack(alone)
    apart = _apart(found, expected)
    if not apart <= _SAME * float(expected.abs().max()):
        raise ArtifactError(
            f"{where}: a text behind what all texts share has other states than the same text in one piece (they "
            f"differ by {apart:.2g}), so that it would be read wrongly; {_INSTEAD}"
        )


def _apart(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max())
