"""A tuned prompt at work: labelling new texts and scoring a finished run again, from its directory alone."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError

from bbprompt.baselines.choice import open_model
from bbprompt.baselines.use import FittedBaseline, load_baseline
from bbprompt.config import MethodConfig, TuneConfig
from bbprompt.connect import open_oracle
from bbprompt.errors import ArtifactError, DataError, DiskError, TextError, UsageError
from bbprompt.frozen import frozen_prompt
from bbprompt.metrics import majority, standard_error
from bbprompt.oracle import Oracle, check_scores
from bbprompt.prompts import ModularPrompt, resolve_prompts
from bbprompt.readable import NamingOracle
from bbprompt.readout import Readout
from bbprompt.result import read_result
from bbprompt.run import limited, reopen, server_of
from bbprompt.scoring import labelled, score_split
from bbprompt.store.rundir import MANIFEST, PROMPT, RESULT, RunDirectory
from bbprompt.synonyms import with_synonyms
from bbprompt.tasks.data import SplitName, data_digest, open_data
from bbprompt.tasks.example import Example
from bbprompt.tasks.task import Task
from bbprompt.tensorfile import unpack
from bbprompt.yamlfile import validate

__all__ = ["Evaluation", "Prediction", "TunedPrompt", "load_prompt", "read_offsets", "read_tuned"]

_log = logging.getLogger(__name__)

_AT_ONCE = 64


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a tuned prompt says of one text.

    Attributes:
        label: The raw label of the task; the text of the chosen option; or the extracted answer.
        probabilities: Label (or option text) -> probability, summing to 1; empty for extraction.
    """

    label: str
    probabilities: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A score on a split.

    Attributes:
        split: Its name.
        source: Kind of place the data came from: "path", "hub" or "sample".
        id: The place.
        metric: "accuracy" or "f1".
        value: Mean over the examples, a fraction.
        stderr: Its standard error.
        n: Number of examples.
        majority: Accuracy of the most frequent label; 0 where examples have options of their own.
        cut_tokens: Tokens that did not fit the model.
    """

    split: str
    source: str
    id: str
    metric: str
    value: float
    stderr: float
    n: int
    majority: float
    cut_tokens: int


class TunedPrompt:
    """What a run tuned, ready for use; made by `load_prompt`. Close it, or use it in a ``with`` block.

    Attributes:
        path: The run directory.
        result: What the run said at its end; None where that is missing, which no prediction needs.
        task: Its task.
        config: The settings it was started with.
        point: The tuned intrinsic point, `(L, d)` float32; of size 0 for a baseline, which has no prompt.
        cut_tokens: Tokens of the inputs so far that did not fit the model.
    """

    def __init__(
        self,
        directory: RunDirectory,
        config: TuneConfig,
        oracle: Oracle | FittedBaseline,
        point: NDArray[np.float32],
        offsets: tuple[float, ...] = (),
    ) -> None:
        """For `load_prompt` only."""
        where = str(directory.path / MANIFEST)
        self.path = directory.path
        self.result = read_result(directory) if directory.finished else None
        self.task = validate(Task, directory.manifest["task"], where)
        self.config = config
        self.point = point
        method = validate(MethodConfig, directory.manifest["method"], where)
        self._readout = Readout(method.support, method.legacy_decision, offsets=offsets)
        self.cut_tokens = 0
        self._tested = directory.manifest["data"]["test"]
        self._oracle = oracle

    def predict(self, inputs: Iterable[str | Mapping[str, Any]]) -> list[Prediction]:
        """Label new inputs.

        Args:
            inputs: Texts, where the task reads a single field, or records with the fields of the template (and
                `choices` where each example has options of its own). A label in a record is not looked at.

        Raises:
            UsageError: One text or record instead of several, or texts for a task of several fields.
            DataError: An input lacks a field or does not fit; it is named by its number, counted from 1.
            OracleError: The model cannot be reached.
        """
        if isinstance(inputs, (str, Mapping)):
            raise UsageError("predict takes a list: put the one text or record into brackets")
        examples = []
        for number, item in enumerate(inputs, start=1):
            try:
                examples.append(self.example(item))
            except DataError as error:
                raise DataError(f"input {number}: {error}") from None
        try:
            return self.predict_examples(examples)
        except TextError as error:
            raise DataError(f"input {error.number}: {error.reason}") from error

    def example(self, item: str | Mapping[str, Any]) -> Example:
        """Turn one input into an unlabelled example.

        Raises:
            UsageError: A bare text, and the task reads several fields.
            DataError: A field is missing or wrong; the message does not say where.
        """
        if isinstance(item, str):
            fields = self.task.field_names
            if self.task.type != "single" or len(fields) != 1:
                needed = [*fields, "choices"] if self.task.type == "choice" else fields
                raise UsageError(
                    f"the task {self.task.name} needs records with {', '.join(needed)}, not bare texts; "
                    "give JSON Lines or TSV"
                )
            item = {fields[0]: item}
        return self.task.example(item, labelled=False)

    def predict_examples(self, examples: Sequence[Example]) -> list[Prediction]:
        """Label examples, in order, whatever their labels say.

        Raises:
            TextError: One does not fit the model.
            OracleError: The model cannot be reached.
        """
        predictions: list[Prediction] = []
        extractive = self.task.type == "extractive"
        longest = self._readout.longest_answer if extractive else None
        for begin in range(0, len(examples), _AT_ONCE):
            some = examples[begin : begin + _AT_ONCE]
            if isinstance(self._oracle, FittedBaseline):
                with _counted_from(begin):
                    found, cut = self._oracle.probabilities(some)
                predictions += map(self._choice, some, found)
                self.cut_tokens += cut
                continue
            batch = labelled(self.task, some, for_loss=False, readout=self._oracle.info.readout).batch
            with _counted_from(begin):
                reply = self._oracle.score(batch, self.point[None], self._readout.support, longest)
            scores = check_scores(reply, batch, 1, channels=self._oracle.info.channels)
            self.cut_tokens += scores.cut
            if extractive:
                predictions += [Prediction(answer, {}) for answer in self._readout.extracts(scores, batch)[0]]
                continue
            for example, shares in zip(some, self._readout.probabilities(scores, batch)[0], strict=True):
                predictions.append(self._choice(example, shares))
        return predictions

    def _choice(self, example: Example, shares: NDArray[np.float64]) -> Prediction:
        return _prediction(list(self.task.labels) if self.task.labelled else example.options, shares)

    def evaluate(
        self,
        split: SplitName = "test",
        data: str | None = None,
        limit: int | None = None,
        report: Callable[[int, int], None] = lambda done, total: None,
    ) -> Evaluation:
        """Score the prompt on a split.

        Args:
            split: A split of the data, whole: "dev" is not the few-shot dev set.
            data: As `--data`; None for the data of the run.
            limit: Most examples to score; None: the run's limit for its own test split, else all.
            report: Told how many of how many examples are done.

        Raises:
            UsageError: There are no such data, or the run is not finished.
            DataError: The split is missing, or a record is wrong.
        """
        if self.result is None:
            raise UsageError(f"{self.path / RESULT}: {_unfinished(self.path)}")
        source = open_data(self.task, data or self.config.data)
        own = data is None and split == "test"
        most = self.config.test_limit if limit is None and own else limit
        examples = limited(source.split(split), most, self.config.seed)
        if own and limit is None and data_digest(examples) != self._tested:
            _log.warning("%s: the test data are not those that the run was scored on", source.id)
        if isinstance(self._oracle, FittedBaseline):
            values, cut = self._oracle.hits(examples, lambda done: report(done, len(examples)))
        else:
            score = score_split(
                NamingOracle(self._oracle, self.task, source, examples),
                [(0, self._readout)],
                self.task,
                examples,
                self.point[None],
                lambda done: report(done, len(examples)),
            )
            values, cut = score.values[0], score.cut
        return Evaluation(
            split=split,
            source=source.source,
            id=str(source.id),
            metric=self.task.metric,
            value=float(values.mean()),
            stderr=standard_error(values),
            n=len(values),
            majority=majority([each.label for each in examples], len(self.task.options)) if self.task.labelled else 0.0,
            cut_tokens=cut,
        )

    def close(self) -> None:
        """Let go of the model; closing twice is harmless."""
        self._oracle.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def load_prompt(
    run_dir: Path | str,
    *,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    dtype: Literal["auto", "float32", "mixed", "bfloat16"] | None = None,
    batch_tokens: int | None = None,
    threads: int | None = None,
    backend: str | None = None,
) -> TunedPrompt:
    """Open a run for use: its manifest and what it tuned, which it writes when its search has ended.

    Args:
        run_dir: Its directory.
        device: Where the model runs; need not be where it was tuned.
        dtype: Precision; None for that of the run.
        batch_tokens: Tokens at once; None for the device's default.
        threads: CPU threads; None for all cores.
        backend: The server, where it is no longer where the run began.

    Raises:
        UsageError: There is no run, `backend` is of another kind than the run's, or it has not come to what it tuned.
        ArtifactError: Backbone or prompts are missing, or are not those the run was tuned with.
        DiskError: A file of the run is damaged.
    """
    directory, config = reopen(Path(run_dir), writable=False)
    with directory:
        if not directory.holds(PROMPT):
            if directory.finished:
                raise DiskError(f"{directory.path / PROMPT}: missing from a finished run; restore it or tune again")
            raise UsageError(f"{Path(run_dir) / PROMPT}: {_unfinished(run_dir)}")
        use: dict[str, Any] = {"device": device, "dtype": dtype or config.dtype, "threads": threads}
        use["batch_tokens"] = batch_tokens
        method = validate(MethodConfig, directory.manifest["method"], str(directory.path / MANIFEST))
        task = validate(Task, directory.manifest["task"], str(directory.path / MANIFEST))
        if method.baseline is not None and backend is not None:
            raise UsageError(f"--backend {backend}: {method.name} asks no server; leave it out")
        server = server_of(config.backend, backend)
        if method.baseline is not None:
            model = open_model(config, method, **use)
            _check_backbone(directory, model.info.backbone_digest if model is not None else "")
            nothing = np.zeros((0, 0), dtype=np.float32)
            return TunedPrompt(directory, config, load_baseline(directory, method.baseline, task, model), nothing)
        prompt, point = read_tuned(directory, config)
        oracle = open_oracle(
            server,
            prompt,
            backbone=config.backbone,
            max_tokens=config.max_tokens,
            weights=_read_tensors(directory) if method.tunes_model else None,
            **use,
        )
        return TunedPrompt(directory, config, with_synonyms(oracle, method, task), point, read_offsets(directory))


def _unfinished(run_dir: Path | str) -> str:
    return f"not there, for this run is not finished; go on with `{shlex.join(['bbprompt', 'resume', str(run_dir)])}`"


def _check_backbone(directory: RunDirectory, digest: str) -> None:
    then = directory.manifest["model"]["backbone_digest"]
    if digest != then:
        raise ArtifactError(
            f"{directory.path}: the backbone is not that of the run (digest {digest[:12]}, then {then[:12]}); "
            "install the bbprompt version of the run or tune again"
        )


def read_tuned(directory: RunDirectory, config: TuneConfig) -> tuple[ModularPrompt, NDArray[np.float32]]:
    """The artifact of a run, or the prompts that it keeps itself, and its tuned point.

    Raises:
        ArtifactError: The artifact is missing, or not that of the run.
        DiskError: The file of the run is damaged.
    """
    model = directory.manifest["model"]
    method = validate(MethodConfig, directory.manifest["method"], str(directory.path / MANIFEST))
    name, backbone = config.prompts or method.prompts, (model["backbone"], model["backbone_digest"])
    if method.own_prompt is not None:
        own = method.own_prompt
        return frozen_prompt(_read_tensors(directory), backbone, own.readout, own.pooling)
    prompt = ModularPrompt.load(resolve_prompts(name))
    if prompt.digest != model["prompts_digest"]:
        raise ArtifactError(
            f"prompts '{name}': not those that {directory.path} was tuned with (digest {prompt.digest[:12]}, "
            f"then {model['prompts_digest'][:12]}); install the bbprompt version of the run or tune again"
        )
    if method.gradient is not None:
        return frozen_prompt(_read_tensors(directory), backbone, prompt.config.readout, prompt.config.pooling)
    return prompt, _read_point(directory, (prompt.config.layers, prompt.config.intrinsic_dim))


def _read_point(directory: RunDirectory, shape: tuple[int, int]) -> NDArray[np.float32]:
    file, tensors = directory.path / PROMPT, _read_tensors(directory)
    if "point" not in tensors:
        raise DiskError(f"{file}: damaged ('point'); tune again")
    point = tensors["point"]
    if point.shape != shape or not np.isfinite(point).all():
        raise DiskError(f"{file}: the point has shape {point.shape}, not {shape}, or is not finite; tune again")
    return np.asarray(point, dtype=np.float32)


def read_offsets(directory: RunDirectory) -> tuple[float, ...]:
    """What the run found to add to the logits of the options, where it found such.

    Raises:
        DiskError: The file of the run is damaged.
    """
    offsets = _read_tensors(directory).get("offsets", np.zeros(0))
    if offsets.ndim != 1 or not np.isfinite(offsets).all():
        raise DiskError(f"{directory.path / PROMPT}: the offsets are no finite numbers in a row; tune again")
    return tuple(offsets.tolist())


def _read_tensors(directory: RunDirectory) -> dict[str, NDArray[Any]]:
    try:
        return unpack(directory.read_bytes(PROMPT))
    except (SafetensorError, ValueError) as error:
        raise DiskError(
            f"{directory.path / PROMPT}: damaged ({' '.join(str(error).split())[:200]}); tune again"
        ) from None


@contextmanager
def _counted_from(begin: int) -> Iterator[None]:
    """Number a text among all examples instead of among those behind the first `begin`."""
    try:
        yield
    except TextError as error:
        if not error.number:
            raise
        raise TextError(f"text {begin + error.number}: {error.reason}") from error


def _prediction(names: Sequence[str], shares: NDArray[np.float64]) -> Prediction:
    """The best option; options that read the same share their probability."""
    probabilities: dict[str, float] = {}
    for name, share in zip(names, shares, strict=True):
        probabilities[name] = probabilities.get(name, 0.0) + float(share)
    return Prediction(names[int(shares.argmax())], probabilities)
