"""YAML files read strictly, and turned into settings with one-line errors.

Differences from a plain `safe_load`: scalars follow the YAML 1.2 core schema (so `1e-3` is a float, `no` is a
string and `1:30` is not sixty-based), a key may stand once, anchors and aliases are refused (no expansion
bombs, nothing said in two places), the file is UTF-8 and at most `MAX_BYTES` long, and every error names
file and line.
"""

from __future__ import annotations

import difflib
import re
import stat
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from bbprompt.errors import UsageError

__all__ = ["MAX_BYTES", "closest", "read_yaml", "validate"]

MAX_BYTES = 1 << 20
"""Longest file that is read, in bytes."""

_MAX_DEPTH = 50

_Model = TypeVar("_Model", bound=BaseModel)


class _StrictLoader(yaml.SafeLoader):
    """A safe loader with the YAML 1.2 core scalars, without aliases and without repeated keys."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012
    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            _refuse("anchors and aliases are not allowed; write the value out", event.start_mark)
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            _refuse(f"nested deeper than {_MAX_DEPTH} levels", event.start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        result: dict[Hashable, Any] = {}
        for key_node, value_node in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                _refuse(f"the key {_short(key)} is not a string; put it in quotes", key_node.start_mark)
            if key in result:
                _refuse(f"the key {_short(key)} stands twice", key_node.start_mark)
            result[key] = self.construct_object(value_node, deep=deep)
        return result


def _number(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> float:
    """Read a float with Python's own rules, which cover every form the resolver lets through."""
    return float(loader.construct_scalar(node))


# Only these five shapes are anything but a string. The order matters: the first match wins.
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]
)
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"^[-+]?(?:0|[1-9][0-9]*)$"), list("-+0123456789")
)
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?$"),
    list("-+0123456789."),
)
_StrictLoader.add_constructor("tag:yaml.org,2002:float", _number)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read one YAML file whose top level is a mapping.

    Args:
        path: A regular file, UTF-8 (a byte order mark is accepted), at most `MAX_BYTES` bytes.

    Returns:
        The mapping; keys are strings on every level.

    Raises:
        UsageError: The file cannot be read, is not UTF-8 or too long, or its content is refused; the message
            starts with `file:line`.
    """
    file = Path(path)
    text = _read_text(file)
    try:
        loader = _StrictLoader(text)
        try:
            data = loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark is not None else ""
        raise UsageError(f"{file}{line}: {_one_line(error.problem or error.context or 'not YAML')}") from None
    except yaml.reader.ReaderError as error:
        number = text.count("\n", 0, error.position) + 1
        raise UsageError(f"{file}:{number}: the character U+{error.character:04X} is not allowed") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{file}: {_one_line(str(error))}") from None
    if not isinstance(data, dict):
        what = "is empty" if data is None else f"holds a {type(data).__name__}"
        raise UsageError(f"{file}:1: {what}; expected a mapping, that is lines of the form `key: value`")
    return data


def validate(model: type[_Model], data: Any, where: str) -> _Model:
    """Turn plain data into a settings model, with one line for the first thing that is wrong.

    Args:
        model: A pydantic model class.
        data: Usually what `read_yaml` returned.
        where: What the message starts with, such as the file's name or `--set`.

    Raises:
        UsageError: The data do not fit; the message names the key, for an unknown one the closest known.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_context=True)
        # A misspelled key is also a missing one: what stands there says more than what does not.
        first = next((each for each in problems if each["type"] == "extra_forbidden"), problems[0])
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        location = first["loc"]
        key = ".".join(str(part) for part in location)
        if first["type"] == "extra_forbidden":
            message = f"unknown key {_short(key)}{closest(str(location[-1]), _keys(model, location[:-1]))}"
        elif first["type"] == "missing":
            message = f"the key {_short(key)} is missing"
        else:
            text = first["msg"].removeprefix("Value error, ")
            text = text[:1].lower() + text[1:] if text.startswith("Input ") else text
            got = "" if first["type"] == "value_error" else f", got {_short(first['input'])}"
            message = f"{key}: {text}{got}" if key else f"{text}{got}"
        raise UsageError(f"{where}: {_one_line(message)}{more}") from None


def closest(word: str, known: Sequence[str]) -> str:
    """Return a hint for an unknown name: close matches, else the known names if they are few."""
    matches = difflib.get_close_matches(word, known, n=3, cutoff=0.6)
    if matches:
        return f"; did you mean {' or '.join(repr(match) for match in matches)}?"
    if known and len(known) <= 20:
        return f"; known are {', '.join(known)}"
    return ""


def _read_text(file: Path) -> str:
    try:
        status = file.stat()
        if not stat.S_ISREG(status.st_mode):
            raise UsageError(f"{file}: not a regular file")
        with file.open("rb") as stream:
            raw = stream.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise UsageError(f"{file}: no such file") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{file}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if len(raw) > MAX_BYTES:
        raise UsageError(f"{file}: longer than {MAX_BYTES} bytes, too long for a settings file")
    try:
        return raw.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UsageError(f"{file}:{line}: not UTF-8 at byte {error.start}; save the file as UTF-8") from None


def _refuse(problem: str, mark: Any) -> NoReturn:
    raise yaml.MarkedYAMLError(problem=problem, problem_mark=mark)


def _keys(model: type[BaseModel], location: Sequence[int | str]) -> list[str]:
    """Return the known keys at a location inside a model, as far as it leads through nested models."""
    current: Any = model
    for part in location:
        fields = getattr(current, "model_fields", {})
        if part not in fields:
            return []
        annotation = fields[part].annotation
        options = (annotation, *get_args(annotation))
        current = next((option for option in options if hasattr(option, "model_fields")), None)
    return list(getattr(current, "model_fields", {}))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _one_line(text: str) -> str:
    return " ".join(text.split())
