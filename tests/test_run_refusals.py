"""What a run on the tiny model refuses before anything is spent."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_run import begin, config

from bbprompt.errors import ArtifactError, DataError, UsageError
from bbprompt.run import prepare

# ------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("budget", [-5, 0, 1, 12])
def test_a_budget_below_one_population(budget: int, tiny_pair_data: Path, tiny_prompts: Path) -> None:
    with pytest.raises(UsageError, match=f"--budget {budget}: method mp2-deep needs at least 13 calls"):
        prepare(config(tiny_pair_data, tiny_prompts, budget=budget))


def test_the_smallest_budget_runs(tiny_pair_data: Path, tiny_prompts: Path, tmp_path: Path) -> None:
    result = begin(prepare(config(tiny_pair_data, tiny_prompts, budget=13)), tmp_path / "run")
    assert result.calls.train + result.calls.dev <= 13
    assert result.calls.train == 10


def test_what_is_missing_or_does_not_fit(
    tiny_pair_data: Path, tiny_prompts: Path, tiny_roberta_dir: Path, tmp_path: Path
) -> None:
    with pytest.raises(ArtifactError, match="no such directory"):
        prepare(config(tiny_pair_data, Path("nothing")))
    with pytest.raises(ArtifactError, match="trained for"):
        prepare(config(tiny_pair_data, tiny_prompts, backbone=str(tiny_roberta_dir)))
    with pytest.raises(UsageError, match="are set where the server is started"):
        prepare(config(tiny_pair_data, tiny_prompts, backend="http://nowhere"))
    with pytest.raises(UsageError, match="expected local, http://HOST:PORT, https://HOST:PORT, kserve://"):
        prepare(config(tiny_pair_data, tiny_prompts, backend="nowhere"))
    for name in ("dev.jsonl", "test.jsonl"):
        (tmp_path / name).write_bytes((tiny_pair_data / name).read_bytes())
    with pytest.raises(DataError, match="the split 'train' of task tiny-pair is missing; there is dev, test"):
        prepare(config(tiny_pair_data, tiny_prompts).model_copy(update={"data": str(tmp_path)}))
    with pytest.raises(DataError, match="question and options alone take"):
        begin(prepare(config(tiny_pair_data, tiny_prompts, max_tokens=12)), tmp_path / "run")


def test_few_shot_inputs_in_the_test_split(tiny_pair_data: Path, tiny_prompts: Path, tmp_path: Path) -> None:
    for name in ("train.jsonl", "dev.jsonl", "test.jsonl"):
        (tmp_path / name).write_bytes((tiny_pair_data / ("train.jsonl" if name == "test.jsonl" else name)).read_bytes())
    settings = config(tiny_pair_data, tiny_prompts).model_copy(update={"data": str(tmp_path)})
    with pytest.raises(DataError, match="64 of 64 few-shot inputs stand in the test split too"):
        prepare(settings)
    prepare(settings.model_copy(update={"allow_overlap": True})).close()


def test_no_cuda(tiny_pair_data: Path, tiny_prompts: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(UsageError, match="--device cuda: torch sees no CUDA device"):
        prepare(config(tiny_pair_data, tiny_prompts, device="cuda"))
