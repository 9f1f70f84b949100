"""The cheap methods beside a tuned prompt, where the model reads label words or says nothing without prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_baselines import begin, config
from test_verbalizer import causal_dir

from bbprompt.baselines.report import compare
from bbprompt.run import prepare, tune
from bbprompt.store.rundir import RunDirectory
from bbprompt.tasks.task import load_task
from bbprompt.testing.toy import ToyOracle

TUNED: dict[str, dict[str, Any]] = {
    "bbt": {"projection.dim": 6, "projection.prompt_length": 3, "prompt.popsize": 4, "prompt.dev_every": 8},
    "prompt-tuning": {
        "gradient.soft.readout": "verbalizer",
        "gradient.soft.head": None,
        "gradient.soft.prompt_length": 3,
        "gradient.prompt.epochs": 2,
        "gradient.prompt.dev_every": 2,
    },
}


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("method", TUNED)
def test_a_language_model_is_compared_by_its_label_words(
    method: str, family: str, tiny_pair_data: Path, tiny_bert_dir: Path, tmp_path: Path
) -> None:
    model = tiny_bert_dir if family == "bert" else causal_dir(tmp_path / "llama", "llama")
    words = begin(config(tiny_pair_data, model, "zero-shot-lm"), tmp_path / "words")
    run = prepare(config(tiny_pair_data, model, method, budget=40, set=TUNED[method]))
    with RunDirectory.create(tmp_path / "run", run.manifest()) as directory:
        tuned = tune(run, directory)
    pooled = ["threshold", "nearest-mean", "logistic"] if family == "bert" else []
    assert [rival.name for rival in tuned.baselines] == [*pooled, "zero-shot-lm"]
    last = tuned.baselines[-1]
    assert (last.dev, last.test, last.stderr) == (words.dev, words.test.value, words.test.stderr)


def test_where_a_model_says_nothing_without_prompts_that_is_said(
    tiny_pair_data: Path, tiny_extract_data: Path, tiny_bert_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "bbprompt")
    run = prepare(config(tiny_pair_data, tiny_bert_dir, "majority"))
    assert compare(run.task, run.few, run.test, ToyOracle()) == ()
    assert "no method without tuning is compared" in caplog.text
    caplog.clear()
    extractive = load_task(str(tiny_extract_data / "task.yaml"))
    assert compare(extractive, run.few, run.test, ToyOracle()) == ()
    assert "compared" not in caplog.text, "there is none that fits"
