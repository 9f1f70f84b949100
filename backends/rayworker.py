"""What runs on the other side: a local oracle inside a Ray actor. It knows nothing of Ray but how to fetch a value."""

from __future__ import annotations

import platform
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bbprompt.errors import BBPromptError
from bbprompt.oracle import OracleInfo, Scores, Support, TextBatch
from bbprompt.prompts import ModularPrompt
from bbprompt.units import Unit

__all__ = ["Failure", "Greeting", "Model", "Request", "Worker"]

_KEPT_TEXTS = 8


@dataclass(frozen=True, slots=True)
class Model:
    """How a worker opens its model; see `bbprompt.connect.open_oracle`."""

    backbone: str | None
    device: str
    dtype: str
    batch_tokens: int
    max_tokens: int | None
    threads: int


@dataclass(frozen=True, slots=True)
class Greeting:
    """What a worker says of itself when its model is open.

    Attributes:
        info: Of its oracle.
        processor: Instruction set that torch uses, or the GPU's name.
        node: Address of its machine.
        process: Its process id there.
    """

    info: OracleInfo
    processor: str
    node: str
    process: int


@dataclass(frozen=True, slots=True)
class Failure:
    """An error as a value: it reaches the driver as what it was, not wrapped by the cluster.

    Attributes:
        kind: Name of the class in `bbprompt.errors`.
        message: Its line.
    """

    kind: str
    message: str


@dataclass(frozen=True, slots=True)
class Request:
    """One request without its heavy parts, which are fetched once a worker.

    Attributes:
        number: Counted by the driver; names the points.
        digest: Names the texts.
        support: See `Oracle.score`.
        longest_answer: See `Oracle.score`.
    """

    number: int
    digest: str
    support: Support
    longest_answer: int | None


class Worker:
    """A local oracle and the texts and points it was last asked about.

    Args:
        fetch: Turns a reference into its value.
    """

    def __init__(self, fetch: Callable[[Any], Any]) -> None:
        self._fetch = fetch
        self._oracle: Any = None
        self._texts: dict[str, TextBatch] = {}
        self._points: tuple[int, NDArray[np.float32]] | None = None

    def open(self, model: Model, prompt: Any, node: str) -> Greeting | Failure:
        """Open the model, with the artifact behind the reference `prompt`."""
        greeting: Greeting | Failure = _reported(lambda: self._open(model, prompt, node))
        return greeting

    def answer(self, request: Request, texts: Any, points: Any, units: Sequence[Unit | None]) -> list[Any] | Failure:
        """Compute units, or for None say how many candidates one holds; `texts` and `points` are references."""
        values: list[Any] | Failure = _reported(lambda: [self._answer(request, texts, points, unit) for unit in units])
        return values

    def _open(self, model: Model, prompt: Any, node: str) -> Greeting:
        import os

        import torch

        from bbprompt.connect import open_oracle

        artifact: ModularPrompt = self._fetch(prompt)
        with warnings.catch_warnings():
            # The arrays are shared by all workers of a machine and read only; so is what torch does with them.
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable", category=UserWarning)
            self._oracle = open_oracle("local", artifact, **asdict(model))
        gpu = torch.cuda.get_device_name() if model.device == "cuda" else ""
        return Greeting(
            self._oracle.info,
            gpu or f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
            node,
            os.getpid(),
        )

    def _answer(self, request: Request, texts: Any, points: Any, unit: Unit | None) -> Scores | int:
        batch = self._texts.get(request.digest)
        if batch is None:
            batch = self._texts[request.digest] = self._fetch(texts)
            if len(self._texts) > _KEPT_TEXTS:
                del self._texts[next(iter(self._texts))]
        if unit is None:
            at_once: int = self._oracle.at_once(batch, request.support)
            return at_once
        if self._points is None or self._points[0] != request.number:
            self._points = (request.number, self._fetch(points))
        scores: Scores = self._oracle.score_unit(batch, self._points[1], request.support, request.longest_answer, unit)
        return scores


def _reported(work: Callable[[], Any]) -> Any:
    """The value of some work, or how it failed."""
    try:
        return work()
    except BBPromptError as error:
        return Failure(type(error).__name__, str(error))
    except Exception as error:
        # Whatever it is, it may not survive the journey; the other side raises it as an OracleError.
        return Failure("OracleError", f"a worker failed with {type(error).__name__}: {' '.join(str(error).split())}")
