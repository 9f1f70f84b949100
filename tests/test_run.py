"""Runs on the tiny model, from settings to result: files, fields, death and recovery."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_run import FAST, begin, config, go_on
from toyruns import Recorder

from bbprompt.backends import memory
from bbprompt.config import TuneConfig
from bbprompt.errors import Interrupted, ResumeMismatch
from bbprompt.oracle import Oracle, OracleInfo
from bbprompt.result import Result
from bbprompt.run import Prepared, Watcher, default_directory, prepare, reopen
from bbprompt.search.tuner import Status
from bbprompt.store import manifest
from bbprompt.store.rundir import RunDirectory


@pytest.fixture(scope="module")
def pair(tiny_pair_data: Path, tiny_prompts: Path) -> Prepared:
    """A run on the pair task with everything open."""
    return prepare(config(tiny_pair_data, tiny_prompts))


@pytest.fixture(scope="module")
def finished(pair: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of it."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    begin(pair, folder)
    return folder


# ---------------------------------------------------------------------------------- files and fields


def test_the_files_of_a_run(finished: Path, pair: Prepared) -> None:
    names = {path.name for path in finished.iterdir()}
    assert names - {"run.lock"} == {"manifest.json", "journal.log", "curve.csv", "prompt.safetensors", "result.json"}
    manifest = json.loads((finished / "manifest.json").read_text(encoding="utf-8"))
    assert TuneConfig.model_validate(manifest["config"]) == pair.config
    assert manifest["threads"] == 1
    assert manifest["data"]["few_shot"] == pair.few.digest
    assert manifest["model"]["backbone_digest"] == pair.oracle.info.backbone_digest
    assert manifest["model"]["prompts_digest"] == pair.prompt.digest
    assert manifest["model"]["device"].startswith("cpu")
    assert {"bbprompt", "python", "torch", "numpy", "cma"} <= set(manifest["versions"])
    tensors = load_file(finished / "prompt.safetensors")
    assert {name: array.shape for name, array in tensors.items()} == {"point": (3, 4), "offsets": (2,)}


def test_the_fields_of_a_result(finished: Path, pair: Prepared) -> None:
    data = json.loads((finished / "result.json").read_text(encoding="utf-8"))
    result = Result.model_validate(data)
    assert set(data) >= {
        *("task", "data", "method", "backbone", "prompts", "backend", "seed", "budget", "calls", "before"),
        *("stages", "dev", "test", "seconds", "digest"),
    }
    assert data["data"] == {"source": "path", "id": pair.config.data, "train": 32, "dev": 32, "test": 30}
    assert (result.task, result.method, result.backend, result.seed) == ("tiny-pair", "mp2-deep", "local", 42)
    assert result.calls.train + result.calls.dev <= result.budget == 60
    assert result.calls.test in (1, 2)
    assert data["before"].keys() >= {"metric", "dev", "test"}
    assert data["stages"][0].keys() >= {"name", "optimizer", "calls", "train_loss", "dev", "seconds"}
    assert [stage["name"] for stage in data["stages"]] == ["prompt", "calibration"]
    assert sum(stage["calls"] for stage in data["stages"]) == result.calls.train + result.calls.dev - 2
    assert data["test"].keys() == {"metric", "value", "stderr", "n"}
    assert data["test"]["metric"] == data["before"]["metric"] == "accuracy"
    assert data["test"]["n"] == 30
    for fraction in (result.dev, result.test.value, result.before.dev, result.before.test):
        assert 0 <= fraction <= 1
    assert data["seconds"].keys() == {"total", "oracle", "optimizer", "load", "test"}
    assert result.seconds.total >= result.seconds.oracle > 0
    assert len(result.digest) == 64


def test_the_curve(finished: Path) -> None:
    lines = (finished / "curve.csv").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "calls,stage,train_loss,best_dev,seconds,oracle_seconds"
    rows = [line.split(",") for line in lines[1:]]
    calls, seconds = [int(row[0]) for row in rows], [float(row[4]) for row in rows]
    result = Result.model_validate_json((finished / "result.json").read_bytes())
    assert calls == sorted(calls)
    assert calls[-1] == result.calls.train + result.calls.dev
    assert seconds == sorted(seconds)
    assert {row[1] for row in rows} == {"start", "prompt", "calibration"}


@pytest.mark.parametrize("kind", ["single", "choice", "extract"])
def test_every_kind_of_task(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    data, prompts = request.getfixturevalue(f"tiny_{kind}_data"), request.getfixturevalue("tiny_shallow_prompts")
    run = prepare(config(data, prompts, method="mp2-shallow", budget=30))
    result = begin(run, tmp_path / "run")
    assert result.test.n == 30
    assert result.test.metric == ("f1" if kind == "extract" else "accuracy")
    assert result.data.train == (56 if kind == "single" else 32)
    assert result.before.majority == (5 / 30 if kind == "single" else 0.0)
    assert begin(run, tmp_path / "again").digest == result.digest


def test_the_precision_that_auto_meant_is_written_down(pair: Prepared) -> None:
    assert pair.config.dtype == pair.oracle.info.precision != "auto"
    assert pair.manifest()["config"]["dtype"] == pair.oracle.info.precision


def test_bfloat16(tiny_pair_data: Path, tiny_prompts: Path, tmp_path: Path) -> None:
    run = prepare(config(tiny_pair_data, tiny_prompts, dtype="bfloat16", budget=20))
    assert run.manifest()["model"]["precision"] == "bfloat16"
    assert 0 <= begin(run, tmp_path / "run").test.value <= 1


def test_a_result_says_in_which_precision_populations_were_scored(
    tiny_pair_data: Path, tiny_prompts: Path, tmp_path: Path
) -> None:
    changes = {"router.calls": 8, "router.random": 4, "prompt.popsize": 8}
    run = prepare(config(tiny_pair_data, tiny_prompts, dtype="mixed", set=changes, budget=50))
    result = begin(run, tmp_path / "run")
    assert sum(result.precisions.values()) > 0
    assert result.precisions.keys() <= {"bfloat16", "deviations", "float32"}


def test_the_test_split_is_scored_once_and_last(pair: Prepared, tmp_path: Path) -> None:
    class Order:
        info = pair.oracle.info

        def __init__(self) -> None:
            self.kinds: list[str] = []

        def score(self, batch: Any, *request: Any) -> Any:
            tests = {pair.task.render(example) for example in pair.test}
            self.kinds.append("test" if batch.forms[0] in tests else "few-shot")
            return pair.oracle.score(batch, *request)

        def close(self) -> None:
            pass

    order = Order()
    begin(replace(pair, oracle=order), tmp_path / "run")
    assert order.kinds.count("test") == 1
    assert order.kinds[-1] == "test"


def test_fewer_test_examples(tiny_pair_data: Path, tiny_prompts: Path) -> None:
    whole = prepare(config(tiny_pair_data, tiny_prompts))
    some = prepare(config(tiny_pair_data, tiny_prompts, test_limit=7))
    again = prepare(config(tiny_pair_data, tiny_prompts, test_limit=7))
    assert some.test == again.test
    assert len(some.test) == 7
    at = [whole.test.index(example) for example in some.test]
    assert at == sorted(at)
    assert at != list(range(7))


def test_equal_settings_find_the_same_and_another_seed_does_not(
    pair: Prepared, finished: Path, tiny_pair_data: Path, tiny_prompts: Path, tmp_path: Path
) -> None:
    result = Result.model_validate_json((finished / "result.json").read_bytes())
    again = begin(prepare(pair.config), tmp_path / "again")
    assert again.digest == result.digest
    assert (tmp_path / "again" / "prompt.safetensors").read_bytes() == (finished / "prompt.safetensors").read_bytes()
    other = begin(prepare(config(tiny_pair_data, tiny_prompts, seed=7)), tmp_path / "other")
    assert other.digest != result.digest


def test_the_default_directory(pair: Prepared, tiny_pair_data: Path, tiny_prompts: Path) -> None:
    name = default_directory(pair).name
    assert default_directory(pair).parent == Path("runs")
    assert name.startswith("tiny-pair-mp2-deep-42-")
    other = prepare(config(tiny_pair_data, tiny_prompts, budget=61))
    assert default_directory(other).name != name


# --------------------------------------------------------------------------------- death and recovery


def test_killed_at_any_instant_it_ends_the_same(tiny_pair_data: Path, tiny_prompts: Path, tmp_path: Path) -> None:
    settings = config(tiny_pair_data, tiny_prompts, budget=44, max_tokens=30)
    (tmp_path / "config.json").write_text(settings.model_dump_json(), encoding="utf-8")
    script = Path(__file__).parent / "killed.py"
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "config.json"), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    whole = summary.pop("never")
    assert whole["cut"] > 0
    assert len(summary) == 5
    for name, found in summary.items():
        assert found["killed"] == found["planned"] > 0, name
        for key in ("digest", "calls", "cut", "prompt", "journal", "curve"):
            assert found[key] == whole[key], (name, key)


def test_killed_from_outside(pair: Prepared, finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    code = (
        "import sys; from bbprompt.tuning import tune; from bbprompt.config import TuneConfig;"
        "tune(TuneConfig.model_validate_json(sys.argv[1]), run_dir=sys.argv[2])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, pair.config.model_dump_json(), str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.DEVNULL,
    )
    journal = folder / "journal.log"
    try:
        while process.poll() is None and not (journal.exists() and journal.stat().st_size > 1500):
            time.sleep(0.001)  # until it is in the middle of its search
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    assert journal.stat().st_size < (finished / "journal.log").stat().st_size
    result = go_on(pair, folder)
    assert result.digest == Result.model_validate_json((finished / "result.json").read_bytes()).digest
    assert (folder / "prompt.safetensors").read_bytes() == (finished / "prompt.safetensors").read_bytes()


def test_a_journal_cut_anywhere(pair: Prepared, finished: Path, tmp_path: Path) -> None:
    content = (finished / "journal.log").read_bytes()
    expected = Result.model_validate_json((finished / "result.json").read_bytes())
    for end in np.random.default_rng(0).integers(0, len(content), 6).tolist():
        folder = tmp_path / str(end)
        folder.mkdir()
        (folder / "manifest.json").write_bytes((finished / "manifest.json").read_bytes())
        (folder / "journal.log").write_bytes(content[:end])
        result = go_on(pair, folder)
        assert (result.digest, result.calls) == (expected.digest, expected.calls)
        assert (folder / "journal.log").read_bytes() == content


def test_a_finished_run_gives_its_result_and_asks_for_nothing(pair: Prepared, finished: Path) -> None:
    names = ("journal.log", "prompt.safetensors", "curve.csv", "result.json")
    before = {name: (finished / name).read_bytes() for name in names}
    recorder = Recorder(pair.oracle)
    result = go_on(replace(pair, oracle=recorder), finished)
    assert result == Result.model_validate_json(before["result.json"])
    assert recorder.batches == []
    for name, content in before.items():
        assert (finished / name).read_bytes() == content, name


class Stopper(Watcher):
    """Stops after some calls, and notes the seconds of the curve."""

    def __init__(self, calls: int) -> None:
        self.calls = calls

    def status(self, status: Status) -> None:
        if status.calls >= self.calls:
            raise Interrupted("stopped")


def test_stopped_and_gone_on_with(pair: Prepared, finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(Interrupted):
        begin(pair, folder, Stopper(20))
    first = (folder / "curve.csv").read_text(encoding="utf-8").splitlines()
    assert not (folder / "result.json").exists()
    with pytest.raises(Interrupted):
        go_on(pair, folder, Stopper(40))
    result = go_on(pair, folder)
    assert result.digest == Result.model_validate_json((finished / "result.json").read_bytes()).digest
    rows = (folder / "curve.csv").read_text(encoding="utf-8").splitlines()
    assert rows[: len(first) - 1] == first[:-1], "replayed rows keep their seconds"
    seconds, oracle = ([float(row.split(",")[at]) for row in rows[1:]] for at in (4, 5))
    assert seconds == sorted(seconds)
    assert result.seconds.total >= seconds[-1]
    assert oracle == sorted(oracle)
    assert result.seconds.oracle == oracle[-1] > float(first[-2].rsplit(",", 1)[1]) > 0
    assert result.seconds.total >= result.seconds.oracle
    assert all(one >= other for one, other in zip(seconds, oracle, strict=True))


def test_what_differs_is_named(pair: Prepared, finished: Path, tiny_pair_data: Path, tiny_prompts: Path) -> None:
    changes: list[tuple[str, Any, str]] = [
        ("seed", 7, "config.seed"),
        ("budget", 61, "config.budget"),
        ("threads", 2, "config.threads"),
        ("method", "mp2-deep-code", "config.method"),
        ("set", {**FAST, "prompt.popsize": 9}, r"config\.set\.prompt\.popsize"),
    ]
    for key, value, name in changes:
        other = prepare(config(tiny_pair_data, tiny_prompts, **{key: value}))
        with pytest.raises(ResumeMismatch, match=f"{name} was .* when the run began and is .* now"):
            go_on(other, finished)
    with pytest.raises(ResumeMismatch, match="threads was 1 when the run began and is 3 now"):
        go_on(replace(pair, threads=3), finished)


def test_a_run_goes_on_with_as_many_tokens_at_once_whatever_memory_is_left(
    pair: Prepared, finished: Path, tiny_pair_data: Path, tiny_prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1 << 20)
    assert prepare(config(tiny_pair_data, tiny_prompts)).config.batch_tokens == 64
    directory, begun = reopen(finished, writable=False)
    directory.close()
    again = prepare(begun)
    assert again.config.batch_tokens == pair.config.batch_tokens == 4096
    assert again.manifest() == pair.manifest()


class Other(Recorder):
    """An oracle that says something else of itself than the one it asks."""

    def __init__(self, inner: Oracle, **keys: str) -> None:
        super().__init__(inner)
        self.said = replace(inner.info, **keys)

    @property
    def info(self) -> OracleInfo:
        return self.said


@pytest.mark.parametrize("begun", ["just begun", "finished"])
@pytest.mark.parametrize(
    ("name", "now"),
    [
        ("task.template", "{text_a} or {text_b}?"),
        ("model.backbone_digest", "0" * 64),
        ("model.prompts_digest", "0" * 64),
        ("versions.bbprompt", "0.0.0"),
        ("versions.numpy", "0.0.0"),
    ],
)
def test_another_model_task_or_library_is_noticed_before_anything_is_sent(
    name: str, now: str, begun: str, pair: Prepared, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = finished
    if begun == "just begun":
        folder = tmp_path / "run"
        RunDirectory.create(folder, pair.manifest()).close()
    part, key = name.split(".")
    oracle = Other(pair.oracle, **{key: now} if part == "model" else {})
    task = pair.task.model_copy(update={key: now}) if part == "task" else pair.task
    if name == "versions.bbprompt":
        monkeypatch.setattr(manifest, "__version__", now)
    elif part == "versions":
        version = importlib.metadata.version
        monkeypatch.setattr(importlib.metadata, "version", lambda name: now if name == key else version(name))
    with pytest.raises(
        ResumeMismatch, match=f'{name} was .* when the run began and is "{re.escape(now)}" now'
    ) as raised:
        go_on(replace(pair, oracle=oracle, task=task), folder)
    assert raised.value.exit_code == 78
    assert oracle.batches == []


@pytest.mark.parametrize(("split", "name"), [("train", "data.few_shot"), ("test", "data.test")])
def test_a_changed_byte_of_data_is_noticed(
    split: str, name: str, pair: Prepared, finished: Path, tiny_pair_data: Path
) -> None:
    file = tiny_pair_data / f"{split}.jsonl"
    content = file.read_text(encoding="utf-8")
    used = pair.few.train[0].fields["text_a"] if split == "train" else pair.test[0].fields["text_a"]
    assert content.count(used) == 1
    try:
        file.write_text(content.replace(used, used[:-1] + "X"), encoding="utf-8")
        changed = prepare(pair.config)
    finally:
        file.write_text(content, encoding="utf-8")
    with pytest.raises(ResumeMismatch, match=name):
        go_on(changed, finished)
