"""What the machine-reading form needs of a stock tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from bbprompt.errors import ArtifactError, UsageError
from bbprompt.texts.mrc import Frame, Offsets

__all__ = ["frame_for", "tokenize_with"]


def tokenize_with(tokenizer: Any) -> Callable[[str], tuple[Sequence[int], Offsets]]:
    """A plain function from text to token ids (no special tokens) and character offsets.

    Whatever a user writes is text: "[SEP]" or "</s>" in it never becomes the special token of that name.
    """
    if not tokenizer.is_fast:
        raise ArtifactError(f"tokenizer {type(tokenizer).__name__} gives no character offsets; a fast one is needed")
    rust = tokenizer.backend_tokenizer
    # What a checkpoint's tokenizer.json or an earlier call has switched on would cut the options off unseen.
    rust.no_truncation()
    rust.no_padding()
    rust.encode_special_tokens = True
    unknown = tokenizer.unk_token_id
    # A unigram vocabulary still matches them as pieces.
    special = frozenset(tokenizer.all_special_ids) - {unknown}

    def tokenize(text: str) -> tuple[Sequence[int], Offsets]:
        encoding = rust.encode(text, add_special_tokens=False)
        ids: list[int] = encoding.ids
        if unknown is not None and not special.isdisjoint(ids):
            ids = [unknown if token in special else token for token in ids]
        return ids, encoding.offsets

    return tokenize


def frame_for(tokenizer: Any, placeholders: Sequence[int], limit: int, *, open_end: bool = False) -> Frame:
    """The frame that this tokenizer puts around a text: what stands before and after it.

    Args:
        tokenizer: A stock tokenizer.
        placeholders: Token ids at the prompt positions.
        limit: Longest sequence in tokens.
        open_end: The text is to be continued, so that nothing stands behind it.

    Raises:
        ArtifactError: The tokenizer puts no fixed frame around a text.
        UsageError: The limit leaves no room for a text.
    """
    probe = "a"
    bare = list(tokenizer(probe, add_special_tokens=False)["input_ids"])
    full = list(tokenizer(probe)["input_ids"])
    at = next((i for i in range(len(full) - len(bare) + 1) if full[i : i + len(bare)] == bare), None)
    if at is None:
        raise ArtifactError(f"tokenizer {type(tokenizer).__name__}: special tokens change how a text is cut")
    last = () if open_end else tuple(full[at + len(bare) :])
    frame = Frame(tuple(full[:at]), tuple(placeholders), last, limit)
    if frame.room < 1:
        raise UsageError(
            f"--max-tokens: prompt and special tokens alone take {limit - frame.room} of {limit} tokens: no "
            "room for a text; raise it, or take a --backbone with a longer input"
        )
    return frame
