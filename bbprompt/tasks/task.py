"""Tasks: what a YAML file says about a set of records and how an example is put to a model.

A task is data, not code: its template, its labels with their option words in order, and where it comes from.
Bundled tasks lie in `configs/tasks`; any other YAML file of the same form works alike.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from bbprompt.errors import DataError, UsageError
from bbprompt.tasks.example import Answer, Example, Form, Part, input_uid
from bbprompt.tasks.record import answers, choices, index, listed, short, text
from bbprompt.yamlfile import closest, read_yaml, validate

__all__ = ["Hub", "Task", "Track", "load_task", "parse_template", "task_names"]

Track = Literal["upstream", "seen", "unseen", "unseen-relative"]

_TASKS = Path(__file__).parent.parent / "configs" / "tasks"
_NAME = r"^[a-z0-9][a-z0-9._-]{0,63}$"
_RESERVED = ("label", "choices", "answers")

_Text = Annotated[str, Field(min_length=1, strict=True)]


class Hub(BaseModel):
    """Where a data set lies on the Hugging Face hub, and how its columns are called there.

    Attributes:
        path: Repository id, `owner/name`.
        config: Configuration (subset) name.
        revision: Commit or tag; pin it, for a data set may change under its name.
        splits: Our split name -> theirs, where they differ.
        fields: Our field name -> theirs, where they differ.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: _Text
    config: str | None = None
    revision: str | None = None
    splits: dict[Literal["train", "dev", "test"], _Text] = Field(default_factory=dict)
    fields: dict[_Text, _Text] = Field(default_factory=dict)


class Task(BaseModel):
    """One task.

    Attributes:
        name: What `--task` takes.
        type: `single` (fields and a label), `pair` (`text_a`, `text_b`, label), `choice` (`query`, options of
            its own, index) or `extractive` (`context`, `question`, answers in the context).
        template: What stands before the options, with `{field}` placeholders; `{{` and `}}` are braces.
        labels: Raw label -> option word, in option order; empty for `choice` and `extractive`.
        metric: `accuracy`, for `extractive` character-level `f1`.
        sources: Where the records come from.
        terms: Their terms of use, as stated there.
        cut: Fields that may be shortened when an example is too long for a model; None: `text` of a single,
            both texts of a pair, `context` else `query` of a choice, `context` of an extraction.
        shots: Examples per label (choice, extractive: in all) on each side of a few-shot split; None: the
            papers' rule, see `bbprompt.tasks.fewshot`.
        few_shot: "given" takes the train and dev splits as they are for the few-shot sets, which needs a test split;
            "drawn" draws both from train.
        track: Role in multi-task pre-training: trained on (`upstream`), trained on and evaluated (`seen`),
            only evaluated (`unseen`), or evaluated and never trained on for sharing texts with other
            evaluation sets (`unseen-relative`).
        language: BCP 47 tag of the texts.
        note: What a user should know.
        data: Name of the data folder where it differs from `name`.
        only_listed_labels: Skip and count records whose label is not in `labels`; else an error.
        same: Of a pair: the raw label that means that both texts say the same, the first or the last; from there
            on each label means less alike. Embedding models compare the two texts with each other.
        prototype: How an option word reads as a text of its own, with `{option}` in it: what an embedding model
            compares texts with. None: the word and a full stop.
        cloze: What a language model reads: the text with `{gap}` where an option word goes; None: the template, up
            to its last question mark, then the gap. In a `choice`, `{options}` is where the options are listed, the
            end by default. See `bbprompt.texts.forms`.
        words: Raw label -> word for the gap, or a list of words: the first is the one for the gap, all of them are
            what a method with `synonyms` reads; empty: the option words. No word stands twice. Of a `choice` number of
            the option, from "0" -> letter that it stands behind; empty: A to P.
        listing: How a `choice` lists an option in its cloze, with `{letter}` and `{option}` in it; None:
            "{letter}、{option}；".
        skip_empty: Skip and count records with a blank field of the template; else an error.
        hub: Where the data lie on the Hugging Face hub.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, Field(pattern=_NAME, strict=True)]
    type: Literal["single", "pair", "choice", "extractive"]
    template: _Text
    labels: dict[_Text, _Text] = Field(default_factory=dict)
    metric: Literal["accuracy", "f1"]
    sources: list[_Text] = Field(min_length=1)
    terms: str | None = None
    cut: list[_Text] | None = None
    shots: Annotated[int, Field(ge=1, strict=True)] | None = None
    few_shot: Literal["drawn", "given"] = "drawn"
    track: Track | None = None
    language: _Text = "zh"
    note: str | None = None
    data: Annotated[str, Field(pattern=_NAME, strict=True)] | None = None
    only_listed_labels: Annotated[bool, Field(strict=True)] = False
    skip_empty: Annotated[bool, Field(strict=True)] = False
    same: Annotated[str, Field(min_length=1, strict=True)] | None = None
    prototype: _Text | None = None
    cloze: _Text | None = None
    words: dict[_Text, _Text | list[_Text]] = Field(default_factory=dict)
    listing: _Text | None = None
    hub: Hub | None = None

    @field_validator("words", mode="before")
    @classmethod
    def _word_or_list(cls, value: Any) -> Any:
        """One message where a label has neither; the two forms would tell of one each."""
        for label, given in value.items() if isinstance(value, dict) else ():
            own = given if isinstance(given, list) and given else [given]
            if not all(isinstance(word, str) and word for word in own):
                raise ValueError(f"{short(label)} needs a word or a list of words, not {short(given)}")
        return value

    @model_validator(mode="after")
    def _check(self) -> Self:
        fields = self.field_names
        needed = {
            "single": (),
            "pair": ("text_a", "text_b"),
            "choice": ("query",),
            "extractive": ("context",),
        }
        if not fields:
            raise ValueError("template: no {field} placeholder, so that every example would read the same")
        for name in needed[self.type]:
            if name not in fields:
                raise ValueError(f"template: a task of type {self.type} needs the placeholder {{{name}}}")
        for name in fields:
            if name in _RESERVED:
                raise ValueError(f"template: {{{name}}} would show the model what it is to find")
        if self.type == "extractive" and _pieces_of(self.template).count("context") != 1:
            raise ValueError("template: {context} must stand once, for answers are offsets into it")
        if self.labelled:
            if len(self.labels) < 2:
                raise ValueError(f"labels: a task of type {self.type} needs at least 2, as `raw: word`")
            words = list(self.labels.values())
            for word in words:
                if word != word.strip():
                    raise ValueError(f"labels: the option word {word!r} begins or ends with white space")
                if words.count(word) > 1:
                    raise ValueError(f"labels: the option word {word!r} stands for two labels")
        elif self.labels:
            raise ValueError(f"labels: a task of type {self.type} has none; remove the key")
        elif self.only_listed_labels:
            raise ValueError(f"only_listed_labels: a task of type {self.type} has no labels; remove the key")
        if self.same is not None:
            ends = [label for label in self.labels if label in (next(iter(self.labels)), next(reversed(self.labels)))]
            if self.type != "pair" or self.same not in ends:
                raise ValueError("same: names the first or the last label of a pair task; remove the key elsewhere")
        if self.prototype is not None and _pieces_of(self.prototype) != ["option"]:
            raise ValueError("prototype: holds the placeholder {option} once and no other")
        if self.cloze is not None:
            pieces = _pieces_of(self.cloze)
            if self.type == "choice" and "options" in pieces:
                pieces.remove("options")
            if pieces.count("gap") != 1 or set(pieces) != {*fields, "gap"}:
                raise ValueError("cloze: holds {gap} once and the fields of the template")
        numbers = [str(i) for i in range(len(self.words))]
        if self.words and list(self.words) != (numbers if self.type == "choice" else list(self.labels)):
            raise ValueError(
                'words: a word or a list of words for each label, in the same order; of a choice for "0", "1" and so on'
            )
        seen: set[str] = set()
        for word in (word for own in self._listed_words for word in own):
            if word in seen:
                raise ValueError(f"words: {short(word)} stands twice; each word belongs to one label")
            seen.add(word)
        if self.type == "choice" and len(seen) > len(self.words):
            raise ValueError("words: in a choice each option has one letter, not a list")
        if self.listing is not None and (
            self.type != "choice" or sorted(_pieces_of(self.listing)) != ["letter", "option"]
        ):
            raise ValueError("listing: holds {letter} and {option} once, in a task of type choice")
        wanted = "f1" if self.type == "extractive" else "accuracy"
        if self.metric != wanted:
            raise ValueError(f"metric: a task of type {self.type} is scored by {wanted!r}")
        for name in self.cut or ():
            if name not in fields:
                raise ValueError(f"cut: {name!r} is not a field of the template{closest(name, fields)}")
        return self

    @property
    def field_names(self) -> tuple[str, ...]:
        """Names of the record fields that the template reads, in order of first use."""
        return tuple(dict.fromkeys(_pieces_of(self.template)))

    @property
    def labelled(self) -> bool:
        """Whether the option words belong to the task (`single`, `pair`) and not to the example."""
        return self.type in ("single", "pair")

    @property
    def folder(self) -> str:
        """Name of the folder that holds the data: `data`, else `name`."""
        return self.data or self.name

    @property
    def options(self) -> tuple[str, ...]:
        """The option words in order; empty for `choice` and `extractive`."""
        return tuple(self.labels.values())

    @property
    def gap_words(self) -> tuple[str, ...]:
        """The word of each label for the gap: the first of `words`, else the option word; of a choice its letters."""
        return tuple(own[0] for own in self._listed_words) or self.options

    @property
    def synonyms(self) -> Mapping[str, tuple[str, ...]]:
        """The word of each label for the gap -> all words of the label, that one first."""
        return {own[0]: own for own in self._listed_words or tuple((word,) for word in self.options)}

    @property
    def _listed_words(self) -> tuple[tuple[str, ...], ...]:
        """`words` as a list for each label."""
        return tuple((own,) if isinstance(own, str) else tuple(own) for own in self.words.values())

    @property
    def cut_fields(self) -> frozenset[str]:
        """The fields that may be shortened; `cut`, else the default for the type."""
        if self.cut is not None:
            return frozenset(self.cut)
        fields = self.field_names
        if self.type == "choice":
            return frozenset({"context" if "context" in fields else "query"})
        names = {"single": {"text"}, "pair": {"text_a", "text_b"}, "extractive": {"context"}}[self.type]
        return frozenset(names & set(fields))

    def skips(self, record: Mapping[str, Any]) -> bool:
        """Whether a rule of the task leaves a record out: `only_listed_labels` or `skip_empty`."""
        label = record.get("label")
        if self.only_listed_labels and isinstance(label, str) and label not in self.labels:
            return True
        contents = (record.get(name) for name in self.field_names)
        return self.skip_empty and any(isinstance(text, str) and not text.strip() for text in contents)

    def example(self, record: Mapping[str, Any], labelled: bool = True) -> Example:
        """Turn one record into an example, without coercing anything.

        Args:
            record: Field contents by name; fields that the task does not read are ignored.
            labelled: Whether label or answers must be there; if not, they are not looked at.

        Raises:
            DataError: Something is missing, empty, of the wrong type or inconsistent. The message says what;
                the caller, who knows it, adds where.
        """
        fields = {name: text(record, name) for name in self.field_names}
        own = choices(record) if self.type == "choice" else ()
        label = -1
        spans: tuple[Answer, ...] = ()
        if labelled and self.type == "extractive":
            spans = answers(record, fields["context"])
        elif labelled:
            label = index(record, len(own)) if self.type == "choice" else self._label(record)
        return Example(fields, own or self.options, label, spans, input_uid(fields, own))

    def render(self, example: Example) -> Form:
        """Write an example out for a model; the content of a field stays as it is, braces included."""
        cut = self.cut_fields
        parts: list[Part] = []
        context = -1
        for literal, name in parse_template(self.template):
            if literal:
                parts.append(Part(literal, cut=False))
            if name is not None:
                if self.type == "extractive" and name == "context":
                    context = len(parts)
                parts.append(Part(example.fields[name], cut=name in cut))
        return Form(tuple(parts), example.options, context)

    def _label(self, record: Mapping[str, Any]) -> int:
        if "label" not in record:
            raise DataError(f"the field 'label' is missing; the record has {listed(list(record))}")
        raw = record["label"]
        if not isinstance(raw, str):
            hint = f'; write it as the string "{raw}"' if str(raw) in self.labels else ""
            raise DataError(f"the label {short(raw)} is not a string{hint}")
        if raw not in self.labels:
            raise DataError(f"unknown label {short(raw)}; the task {self.name} knows {listed(list(self.labels))}")
        return list(self.labels).index(raw)


@functools.lru_cache(maxsize=256)
def parse_template(template: str) -> tuple[tuple[str, str | None], ...]:
    """Split a template into pairs of literal text and the field that follows it (None at the end).

    Only `{name}` is a placeholder; there are no conversions, formats, attributes or indices, and field
    contents are never parsed.

    Raises:
        ValueError: A brace without its partner, or a placeholder that is no plain name; says at which
            character.
    """
    pairs: list[tuple[str, str | None]] = []
    literal: list[str] = []
    at = 0
    while at < len(template):
        two, one = template[at : at + 2], template[at]
        if two in ("{{", "}}"):
            literal.append(one)
            at += 2
        elif one == "{":
            end = template.find("}", at)
            name = template[at + 1 : end] if end > 0 else ""
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                raise ValueError(f"template: character {at + 1} opens no {{field}}; write {{{{ for a literal brace")
            pairs.append(("".join(literal), name))
            literal = []
            at = end + 1
        elif one == "}":
            raise ValueError(f"template: character {at + 1} closes nothing; write }}}} for a literal brace")
        else:
            literal.append(one)
            at += 1
    if literal:
        pairs.append(("".join(literal), None))
    return tuple(pairs)


def task_names() -> list[str]:
    """Return the names of the bundled tasks, sorted."""
    return sorted(path.stem for path in _TASKS.glob("*.yaml"))


def load_task(name_or_path: str | Path, asked: str = "--task") -> Task:
    """Load a bundled task by its name, or a task from a YAML file.

    Args:
        name_or_path: A name as `task_names` lists it, or a path (anything with a folder in it, or ending in
            `.yaml` or `.yml`).
        asked: What a message begins with: the flag or argument that named it.

    Raises:
        UsageError: No such task (with the closest names), or the file is not a valid task.
    """
    given = str(name_or_path)
    if isinstance(name_or_path, Path) or "/" in given or given.endswith((".yaml", ".yml")):
        return validate(Task, read_yaml(given), given)
    if not re.fullmatch(_NAME, given) or not (_TASKS / f"{given}.yaml").is_file():
        hint = closest(given, task_names()) or "; `bbprompt tasks` lists them"
        raise UsageError(f"{asked}: there is no bundled task {short(given)}{hint}")
    file = _TASKS / f"{given}.yaml"
    task = validate(Task, read_yaml(file), str(file))
    if task.name != given:
        raise UsageError(f"{file}: name: {task.name!r} differs from the file's name")
    return task


def _pieces_of(template: str) -> list[str]:
    return [name for _, name in parse_template(template) if name is not None]
