"""What schemathesis must know of our messages; `openapi.py` writes them into the folder that it runs in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import schemathesis
from hypothesis import strategies as st
from schemathesis.core import NOT_SET

MESSAGES: dict[str, Any] = json.loads(Path("messages.json").read_text(encoding="ascii"))
TYPE, DIGEST = MESSAGES["type"], MESSAGES["digest"]
_SOUND, _MUTANTS = ([bytes.fromhex(text) for text in MESSAGES[name]] for name in ("sound", "mutants"))

schemathesis.openapi.media_type(TYPE, st.sampled_from(_SOUND) | st.sampled_from(_MUTANTS) | st.binary(max_size=200))


@schemathesis.serializer(TYPE)
def written(context: Any, value: Any) -> bytes:
    """A message is bytes already; where a test wants another type instead, what it looks like."""
    return value if isinstance(value, bytes) else str(value).encode()


@schemathesis.hook
def map_path_parameters(context: Any, path_parameters: dict[str, Any] | None) -> dict[str, Any] | None:
    """Every other sound digest becomes that of texts that are there: a random one never would be."""
    digest = str((path_parameters or {}).get("digest", ""))
    if len(digest) == len(DIGEST) and digest[-1] in "02468ace":
        return {**(path_parameters or {}), "digest": DIGEST}
    return path_parameters


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: dict[str, Any]) -> None:
    """A GET that brings a body is refused for it before its route is looked at, and so says nothing of methods."""
    if case.method in ("GET", "HEAD"):
        case.body = NOT_SET
