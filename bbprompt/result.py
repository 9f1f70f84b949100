"""What a finished run says: the content of `result.json`."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict, ValidationError

from bbprompt.errors import DiskError
from bbprompt.store.rundir import RESULT, RunDirectory

__all__ = [
    "BaselineScore",
    "Before",
    "Calls",
    "DataUsed",
    "Result",
    "Seconds",
    "StageResult",
    "TestScore",
    "read_result",
]


class _Values(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class DataUsed(_Values):
    """Which data: `source` is "path", "hub" or "sample"; numbers of examples."""

    source: str
    id: str
    train: int
    dev: int
    test: int


class Calls(_Values):
    """Calls by kind; train and dev are budgeted, test is one per prompt scored on the test split."""

    train: int
    dev: int
    test: int


class Before(_Values):
    """The same model and prompts with nothing tuned.

    `majority` is the accuracy of the most frequent label; 0 where the options belong to the example.
    """

    metric: str
    dev: float
    test: float
    majority: float


class StageResult(_Values):
    """One stage: its calls, best train loss and seconds; dev and test of the prompt chosen at its end.

    `ended` says why it ended: "calls" (all of its own are made), "budget", "patience", or the optimizer's reason; it is
    empty in results of earlier versions.
    """

    name: str
    optimizer: str
    calls: int
    train_loss: float
    dev: float
    test: float
    seconds: float
    ended: str = ""


class TestScore(_Values):
    """The returned prompt on the test split; a fraction with its standard error over n examples."""

    metric: str
    value: float
    stderr: float
    n: int


class Seconds(_Values):
    """Wall seconds, and where they went.

    `total` and `oracle`, which is the search's time in the model, are of all sessions of the run, as far as the rows of
    `curve.csv` reach: what a session did between its last row and a kill is in neither. `optimizer`, `load`, `test` and
    the seconds of the stages are of the last session, in which the search is replayed: the optimizer works anew, the
    calls of the sessions before take no time.
    """

    total: float
    oracle: float
    optimizer: float
    load: float
    test: float


class BaselineScore(_Values):
    """A cheap method without a prompt on the same few-shot and test data: reported, never used for a choice.

    `name` is that of the method, `reads` what it reads of an example; `seconds` its wall time on this machine.
    """

    name: str
    reads: str
    dev: float
    test: float
    stderr: float
    seconds: float


class Result(_Values):
    """A finished run. Fractions, not percent.

    `digest` is a SHA-256 of what was found (prompt, calls, scores): equal for equal runs, whatever the clock
    said. `precisions` says how many populations a local model with mixed precision scored in "bfloat16", as
    "deviations" from a float32 reference and in "float32", in the last session. `baselines` is what would have been
    had for a few forwards without tuning; it is empty where that was not asked for or the model cannot say it.
    """

    task: str
    data: DataUsed
    method: str
    backbone: str
    prompts: str
    backend: str
    seed: int
    budget: int
    calls: Calls
    before: Before
    stages: tuple[StageResult, ...]
    dev: float
    test: TestScore
    cut_tokens: int
    seconds: Seconds
    digest: str
    precisions: Mapping[str, int] = {}
    baselines: tuple[BaselineScore, ...] = ()


def read_result(directory: RunDirectory) -> Result:
    """Read the result of a finished run.

    Raises:
        DiskError: It is missing or damaged.
    """
    try:
        return Result.model_validate_json(directory.read_bytes(RESULT))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "file"
        reason = " ".join(f"{where}: {first['msg']}".split())
        raise DiskError(f"{directory.path / RESULT}: damaged: {reason}; tune again") from None
