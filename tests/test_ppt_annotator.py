"""A finished run labels raw sentences for PPT."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny_prompt
from tiny_run import finished

from bbprompt.errors import UsageError
from bbprompt.predict import load_prompt
from bbprompt.pretrain.ppt_annotator import open_annotator


def test_a_run_on_single_texts_annotates(tmp_path: Path, tiny_single_data: Path, tiny_prompts: Path) -> None:
    run = finished(tmp_path / "run", tiny_single_data, tiny_prompts)
    annotate, words, digest = open_annotator(str(run))
    texts = [record["text"] for record in tiny_prompt.single_records(5, 9)]
    found = annotate(texts)
    assert found.shape == (5, 7)
    assert found.sum(axis=1) == pytest.approx(np.ones(5))
    prompt = load_prompt(run, device="cpu", threads=1)
    labels = list(prompt.task.labels)
    assert [labels[int(row.argmax())] for row in found] == [each.label for each in prompt.predict(texts)]
    assert words == prompt.task.options
    assert annotate([]).shape == (0, 7)
    assert open_annotator(str(run))[2] == digest
    other = finished(tmp_path / "other", tiny_single_data, tiny_prompts, seed=8)
    assert open_annotator(str(other))[2] != digest


def test_a_run_on_pairs_does_not(tmp_path: Path, tiny_pair_data: Path, tiny_prompts: Path) -> None:
    run = finished(tmp_path / "run", tiny_pair_data, tiny_prompts)
    with pytest.raises(UsageError, match=r"ppt\.annotator: the run .* does not label single texts"):
        open_annotator(str(run))
