"""`bbprompt eval` and `bbprompt predict`: a finished run at work."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json as jsonlib
import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any, Literal

import typer

from bbprompt.commands.flags import Debug, Device, Dtype, Json, Moved, Quiet, RunDir, Threads
from bbprompt.commands.output import abandon, whole_file, write, write_json
from bbprompt.errors import DataError, DiskError, TextError, UsageError

if TYPE_CHECKING:
    from bbprompt.predict import Evaluation, TunedPrompt

__all__ = ["evaluate", "predict"]

_AT_ONCE = 256
_log = logging.getLogger("bbprompt")


def evaluate(
    run_dir: RunDir,
    split: Annotated[Literal["train", "dev", "test"], typer.Option(help="Split of the data, whole.")] = "test",
    data: Annotated[
        str | None,
        typer.Option(metavar="PATH|hub|sample|auto", show_default=False, help="[default: the data of the run]."),
    ] = None,
    test_limit: Annotated[
        int | None, typer.Option(min=1, show_default=False, help="Score at most so many examples.")
    ] = None,
    backend: Moved = None,
    device: Device = None,
    dtype: Dtype = None,
    threads: Threads = None,
    quiet: Quiet = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Score a finished run again, or on other data."""
    from bbprompt.predict import load_prompt
    from bbprompt.terminal import Meter, logging_to, open_console

    console = open_console(quiet)
    with (
        logging_to(console),
        load_prompt(run_dir, device=device or "auto", dtype=dtype, threads=threads, backend=backend) as prompt,
    ):
        meters: list[Meter] = []

        def report(done: int, total: int) -> None:
            if not meters:
                meters.append(Meter(console, total))
            meters[0].update(split, min(done, total), "examples")

        try:
            found = prompt.evaluate(split, data, test_limit, report)
        finally:
            for meter in meters:
                meter.close()
        if json:
            write_json({"run_dir": str(prompt.path), "task": prompt.task.name, **dataclasses.asdict(found)})
        else:
            write(_sentence(prompt, found))


def predict(
    run_dir: RunDir,
    input_file: Annotated[
        Path,
        typer.Option(
            "--input",
            metavar="FILE",
            show_default=False,
            help="Records (.jsonl, .jsonl.gz, .tsv, .csv, .parquet) or one text a line (.txt).",
        ),
    ],
    output: Annotated[Path, typer.Option(metavar="FILE", show_default=False, help="JSON Lines; - is standard output.")],
    backend: Moved = None,
    device: Device = None,
    dtype: Dtype = None,
    threads: Threads = None,
    quiet: Quiet = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Label new texts, with a probability for each label.

    Each line of the output is an input record with its `label` and the `probabilities` of all labels; a `label` that
    the record had is not looked at, and is replaced.
    """
    from bbprompt.predict import load_prompt
    from bbprompt.terminal import Meter, logging_to, open_console

    if json and str(output) == "-":
        raise UsageError("--json: standard output already takes the labels; give --output a file")
    records = _inputs(input_file)  # before the model is loaded, which takes a while
    if str(output) != "-" and not output.absolute().parent.is_dir():
        raise UsageError(f"--output {output}: there is no such directory")
    console = open_console(quiet)
    counts: dict[str, int] = {}
    with (
        logging_to(console),
        load_prompt(run_dir, device=device or "auto", dtype=dtype, threads=threads, backend=backend) as prompt,
        _target(output) as stream,
    ):
        meter = Meter(console, None)
        try:
            while some := list(itertools.islice(records, _AT_ONCE)):
                for line, label in _labelled(prompt, input_file, some):
                    stream.write(line)
                    counts[label] = counts.get(label, 0) + 1
                meter.update("predict", sum(counts.values()), "texts")
        finally:
            meter.close()
        if not counts:
            raise DataError(f"{input_file}: no records")
        if cut := prompt.cut_tokens:
            _log.warning("%d tokens did not fit the model and were cut", cut)
    if json:
        labels = {"labels": counts} if prompt.task.labelled else {}
        told = {"run_dir": str(prompt.path), "output": str(output), "n": sum(counts.values()), "cut_tokens": cut}
        write_json({**told, **labels})
        return
    if str(output) != "-":
        write(f"{sum(counts.values())} texts labelled: {output}")


def _labelled(
    prompt: TunedPrompt, file: Path, records: list[tuple[int, str | Mapping[str, Any]]]
) -> Iterator[tuple[str, str]]:
    """Output line and label of each record."""
    examples = []
    for number, record in records:
        try:
            examples.append(prompt.example(record))
        except (DataError, UsageError) as error:
            raise type(error)(f"{file}:{number}: {error}") from None
    try:
        predictions = prompt.predict_examples(examples)
    except TextError as error:
        if not error.number:
            raise
        raise DataError(f"{file}:{records[error.number - 1][0]}: {error.reason}") from error
    for (_, record), example, found in zip(records, examples, predictions, strict=True):
        probabilities = {name: round(share, 6) for name, share in found.probabilities.items()}
        fields = example.fields if isinstance(record, str) else record
        line = {**fields, "label": found.label, "probabilities": probabilities}
        yield _json(line), found.label


def _json(line: Mapping[str, Any]) -> str:
    """A line of JSON, whatever passes through it: dates of Parquet as text, halves of characters escaped."""
    try:
        text = jsonlib.dumps(line, ensure_ascii=False, default=str, allow_nan=False)
    except ValueError:  # a number that JSON has no word for: nothing, as in tables
        finite = jsonlib.loads(jsonlib.dumps(line, default=str), parse_constant=lambda _: None)
        text = jsonlib.dumps(finite, ensure_ascii=False)
    return text.encode("utf-8", "backslashreplace").decode("utf-8") + "\n"


def _inputs(file: Path) -> Iterator[tuple[int, str | Mapping[str, Any]]]:
    from bbprompt.tasks.recordfile import read_records, read_texts

    return read_texts(file) if file.name.lower().endswith(".txt") else read_records(file)


@contextmanager
def _target(output: Path) -> Iterator[IO[str]]:
    """Standard output for "-", else a file that appears whole or not at all.

    Raises:
        DiskError: It cannot be written.
    """
    if str(output) != "-":
        with whole_file(output) as stream:
            yield stream
        return
    try:
        stream = io.TextIOWrapper(sys.stdout.buffer, encoding="utf-8", write_through=True)
        try:
            yield stream
        finally:
            stream.detach()  # else it would close standard output
    except OSError as error:
        abandon()
        raise DiskError(f"standard output: cannot be written: {error.strerror or error}") from None


def _sentence(prompt: TunedPrompt, found: Evaluation) -> str:
    where = "the bundled sample" if found.source == "sample" else found.id
    most = f"; always the most frequent label {found.majority:.3f}" if found.majority else ""
    cut = f"; {found.cut_tokens} tokens cut" if found.cut_tokens else ""
    return (
        f"{prompt.task.name}, {found.split} of {where}: {found.metric} {found.value:.4f} ± {found.stderr:.4f} "
        f"({found.n} examples{most}{cut})"
    )
