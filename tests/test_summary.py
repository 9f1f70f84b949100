"""The table at the end of a run, and what is said about it."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from bbprompt.result import Result
from bbprompt.summary import notes, result_table

RESULT: dict[str, Any] = {
    "task": "lcqmc",
    "data": {"source": "path", "id": "data/lcqmc", "train": 32, "dev": 32, "test": 1000},
    "method": "mp2-deep",
    "backbone": "b",
    "prompts": "p",
    "backend": "local",
    "seed": 42,
    "budget": 8000,
    "calls": {"train": 7900, "dev": 90, "test": 3},
    "before": {"metric": "accuracy", "dev": 0.6, "test": 0.59, "majority": 0.5},
    "stages": [
        {"name": "router", "optimizer": "o", "calls": 110, "train_loss": 0.6, "dev": 0.7, "test": 0.69, "seconds": 40},
        {
            "name": "prompt",
            "optimizer": "o",
            "calls": 7880,
            "train_loss": 0.4,
            "dev": 0.8,
            "test": 0.74,
            "seconds": 900,
        },
    ],
    "dev": 0.8,
    "test": {"metric": "accuracy", "value": 0.74, "stderr": 0.0139, "n": 1000},
    "cut_tokens": 0,
    "seconds": {"total": 1000, "oracle": 900, "optimizer": 40, "load": 10, "test": 30},
    "digest": "0" * 64,
}


def result(**changes: Any) -> Result:
    values = {**RESULT, **{key: value for key, value in changes.items() if not isinstance(value, dict)}}
    for key, value in changes.items():
        if isinstance(value, dict):
            values[key] = {**RESULT[key], **value}
    return Result.model_validate(values)


def shown(value: Result) -> list[list[str]]:
    file = io.StringIO()
    Console(file=file, width=80).print(result_table(value))
    return [line.split() for line in file.getvalue().splitlines() if line.strip()]


def test_the_table() -> None:
    rows = shown(result())
    assert rows[0] == ["lcqmc,", "mp2-deep,", "seed", "42"]
    assert rows[3] == ["before", "0.600", "0.590", "±", "0.016"]
    assert rows[4] == ["after", "router", "0.700", "0.690", "±", "0.015", "110", "40"]
    assert rows[5] == ["after", "prompts", "0.800", "0.740", "±", "0.014", "7880", "900"]
    assert rows[6] == ["in", "all", "7990", "of", "8000", "1000"]


def test_a_mean_of_f1_scores_has_a_known_error_only_at_the_end() -> None:
    rows = shown(result(test={"metric": "f1"}))
    assert rows[3] == ["before", "0.600", "0.590"]
    assert rows[5][3:6] == ["0.740", "±", "0.014"]


def test_a_good_run_is_only_compared_with_the_most_frequent_label() -> None:
    assert notes(result()) == ["Always answering the most frequent label gives 0.500 on test."]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dev": 0.6}, "On dev tuning gained nothing (accuracy 0.600, before 0.600)."),
        ({"test": {"value": 0.58}}, "On test tuning gained nothing"),
        ({"test": {"value": 0.6}}, "smaller than two standard errors"),
        ({"before": {"majority": 0.74}}, "does not beat the most frequent label"),
        ({"data": {"source": "sample"}}, "bundled sample"),
        ({"cut_tokens": 12}, "12 tokens of texts too long for the model were cut."),
    ],
)
def test_what_must_be_said_is_said(changes: dict[str, Any], said: str) -> None:
    lines = notes(result(**changes))
    assert len([line for line in lines if said in line]) == 1
    assert len(lines) == 2


def test_a_dev_score_that_was_fitted_to_is_called_one() -> None:
    stages = [*RESULT["stages"], {**RESULT["stages"][1], "name": "calibration", "calls": 2}]
    (said,) = [line for line in notes(result(stages=stages)) if "fitted to" in line]
    assert said.startswith("The last dev score")


def test_calls_that_were_left_for_want_of_gain_are_spoken_of() -> None:
    stages = [RESULT["stages"][0], {**RESULT["stages"][1], "ended": "patience"}]
    lines = notes(result(stages=stages, calls={"train": 500, "dev": 10}))
    (said,) = [line for line in lines if line.startswith("7490 calls were left unspent")]
    assert "`--set prompt.patience=null`" in said
    assert len(lines) == 2
    assert len(notes(result(stages=stages, calls={"train": 7990, "dev": 10}))) == 1, "nothing was left"


def test_a_stage_that_the_budget_does_not_reach_is_named() -> None:
    stages = [{**RESULT["stages"][0], "ended": "budget"}, {**RESULT["stages"][1], "calls": 0, "ended": "budget"}]
    *_, said = notes(result(stages=stages, budget=30))
    assert said == "A budget of 30 left no calls for this: prompt. Raise `--budget`."


def test_precisions_are_told_where_they_were_chosen() -> None:
    *_, said = notes(Result.model_validate({**RESULT, "precisions": {"bfloat16": 43, "float32": 2}}))
    assert said.endswith("43 in bfloat16, 2 in float32, for they lay too close together.")


def test_examples_with_options_of_their_own_have_no_most_frequent_label() -> None:
    assert notes(result(before={"majority": 0.0})) == []
