"""Runs on a vLLM server's double: tune, use, export, and whatever may happen to the server on the way."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_prompt
import torch
import yaml
from servers import TOKEN, answering, free_port
from test_remote_run import finish
from test_verbalizer import causal_dir
from transformers import AutoModelForCausalLM
from vllmdouble import Double, Reply, refused

from bbprompt import cli
from bbprompt.backends.backbone import load_backbone
from bbprompt.backends.stock import StockOracle
from bbprompt.config import TuneConfig
from bbprompt.errors import OracleError, ResumeMismatch
from bbprompt.export import export_prompt
from bbprompt.predict import load_prompt, read_tuned
from bbprompt.result import Result
from bbprompt.run import Watcher, prepare, reopen
from bbprompt.scoring import labelled
from bbprompt.store.rundir import RESULT
from bbprompt.tasks.task import load_task

pytestmark = pytest.mark.slow

BUDGET, TESTED = 36, 4
RECORDS = tiny_prompt.pair_records(5, 9)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return causal_dir(tmp_path_factory.mktemp("models") / "llama", "llama")


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def run_config(root: Path, backbone: Path, data: Path, **changes: Any) -> TuneConfig:
    """Settings of a short run of an input prompt; its method is written into `root`."""
    file = root / "cloze.yaml"
    stage = {"layout": "joint", "popsize": 6, "sigma_first": 1.0, "sigma": 1.0, "dev_every": 12}
    projection = {"readout": "verbalizer", "layers": "input", "prompt_length": 2, "dim": 4, "placeholder": 300}
    method = {"name": "cloze", "summary": "s", "source": "s", "projection": projection, "prompt": stage}
    file.write_text(yaml.safe_dump(method), encoding="utf-8")
    settings = {
        "task": str(data / "task.yaml"),
        "data": str(data),
        "method": str(file),
        "backbone": str(backbone),
        "budget": BUDGET,
        "threads": 1,
        "test_limit": TESTED,
        "baselines": False,
    }
    return TuneConfig.model_validate(settings | changes)


@pytest.fixture(scope="module")
def config(folder: Path, tiny_pair_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., TuneConfig]:
    return functools.partial(run_config, tmp_path_factory.mktemp("method"), folder, tiny_pair_data)


@pytest.fixture(scope="module")
def calm(
    model: Any, config: Callable[..., TuneConfig], tmp_path_factory: pytest.TempPathFactory
) -> tuple[int, Path, Result]:
    """Port, directory and result of a run that nothing happened to."""
    port = free_port()
    with answering(Double(model).http, port):
        run = prepare(config(backend=f"vllm+http://127.0.0.1:{port}", workers=2))
        path = tmp_path_factory.mktemp("calm") / "run"
        result = finish(run, path)
        run.close()
    return port, path, result


def test_a_run_finds_what_a_local_one_finds(
    calm: tuple[int, Path, Result], config: Callable[..., TuneConfig], tmp_path: Path
) -> None:
    _, path, there = calm
    run = prepare(config())
    here = finish(run, tmp_path / "local")
    run.close()
    assert (there.calls, there.cut_tokens) == (here.calls, here.cut_tokens)
    assert there.before == here.before
    assert there.stages[-1].train_loss == pytest.approx(here.stages[-1].train_loss, abs=1e-3)
    assert there.calls.train + there.calls.dev <= BUDGET
    manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    local = json.loads((tmp_path / "local" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["model"]["device"] == "vLLM 0.32.0, tiny, logprob_token_ids"
    for key in ("backbone_digest", "prompts_digest"):
        assert manifest["model"][key] == local["model"][key]


def test_a_finished_run_at_work(
    calm: tuple[int, Path, Result], model: Any, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    port, path, result = calm
    texts, labels = tmp_path / "texts.jsonl", tmp_path / "labels.jsonl"
    texts.write_text("\n".join(json.dumps(record) for record in RECORDS) + "\n", encoding="utf-8")
    with answering(Double(model).http, port):
        assert cli.run(["predict", str(path), "--input", str(texts), "--output", str(labels), "--quiet"]) == 0
        assert cli.run(["eval", str(path), "--json", "--quiet"]) == 0
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["value"] == result.test.value
        with load_prompt(path, threads=1) as prompt:
            found = [dict(each.probabilities) for each in prompt.predict(RECORDS)]
    told = [json.loads(line) for line in labels.read_text(encoding="utf-8").splitlines()]
    assert [max(each, key=lambda label: each[label]) for each in found] == [line["label"] for line in told]
    directory, settings = reopen(path, writable=False)
    with directory:
        tuned, point = read_tuned(directory, settings)
    local = StockOracle(load_backbone(str(folder), head=True), tuned)

    task = load_task(settings.task)
    batch = labelled(task, [task.example(r) for r in RECORDS], for_loss=False, readout="verbalizer").batch
    scores = local.score(batch, point[None])
    logits = scores.logits[0, :, 0].reshape(len(RECORDS), -1)
    expected = np.exp(logits - scores.normalizer[0])
    assert np.abs(expected - [list(each.values()) for each in found]).max() < 1e-4
    export_prompt(path, "prompt-embeds", tmp_path / "rows")
    export_prompt(path, "peft", tmp_path / "peft")


class Ender(Watcher):
    """Ends a server after some calls."""

    def __init__(self, server: contextlib.ExitStack, calls: int) -> None:
        self.server, self.calls = server, calls

    def status(self, status: Any) -> None:
        if status.calls >= self.calls:
            self.server.close()


def resumed(path: Path) -> Result:
    directory, settings = reopen(path, writable=False)
    directory.close()
    run = prepare(settings)
    try:
        return finish(run, path)
    finally:
        run.close()


class Spoiled(Double):
    """Spoils its answers to whole batches."""

    def __init__(self, model: Any, token: str, how: str) -> None:
        super().__init__(model, token=token)
        self.how = how

    def complete(self, asked: dict[str, Any]) -> Reply:
        status, headers, body = super().complete(asked)
        value = json.loads(body)
        if status == 200 and len(value["choices"]) > 1:
            if self.how == "shape":
                value["choices"].pop()
            else:
                table = value["choices"][0]["logprobs"]["top_logprobs"][0]
                table.update(dict.fromkeys(table, float("nan")))
        return status, headers, json.dumps(value).encode()


def test_a_server_that_goes_ends_the_run_and_its_return_ends_it_as_if_nothing_had_been(
    calm: tuple[int, Path, Result],
    model: Any,
    config: Callable[..., TuneConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    port, undisturbed, result = calm
    path, server = tmp_path / "run", contextlib.ExitStack()
    monkeypatch.setenv("BBPROMPT_TOKEN", TOKEN)
    with server:
        server.enter_context(answering(Double(model, token=TOKEN).http, port))
        run = prepare(config(backend=f"vllm+http://127.0.0.1:{port}", on_doubt="resend"))
        with pytest.raises(OracleError, match=r"cannot be reached.*bbprompt resume") as raised:
            finish(run, path, Ender(server, 14))
        run.close()
    assert raised.value.exit_code == 69
    assert not (path / RESULT).exists()
    servers: list[tuple[Double, str, int]] = [
        (Double(model, token=TOKEN + "x"), "BBPROMPT_TOKEN", 69),
        (Double(model, token=TOKEN, names=("another", "one more")), "several models", 69),
        (Double(model, token=TOKEN, version="0.33.0"), "0.33.0", 78),
        (Spoiled(model, TOKEN, "shape"), "malformed: it is of", 69),
        (Spoiled(model, TOKEN, "nan"), "malformed: the log-probability .* is nan", 69),
    ]
    for double, error, code in servers:
        with answering(double.http, port):
            with pytest.raises((OracleError, ResumeMismatch), match=error) as refusal:
                resumed(path)
            assert refusal.value.exit_code == code
    with answering(Double(model, token=TOKEN).http, port):
        assert resumed(path).digest == result.digest
    assert (path / "prompt.safetensors").read_bytes() == (undisturbed / "prompt.safetensors").read_bytes()
    assert TOKEN.encode() not in (path / "journal.log").read_bytes() + (path / "manifest.json").read_bytes()


class Counted(Double):
    """Computes what it is asked, and loses some of the answers; it knows no repeated request."""

    def __init__(self, model: Any, lost: set[int], status: int) -> None:
        super().__init__(model)
        self.lost, self.status = lost, status

    def complete(self, asked: dict[str, Any]) -> Reply:
        before, answer = self.candidates, super().complete(asked)
        lost = self.candidates > before and self.candidates in self.lost
        return refused(self.status, "the engine died") if lost else answer

    @property
    def candidates(self) -> int:
        """Candidates computed on the train or dev set, which have more texts than anything else that is asked."""
        return sum(texts > TESTED for texts in self.computed)


@pytest.mark.parametrize("on_doubt", ["charge", "resend"])
def test_answers_that_were_lost(
    on_doubt: str, calm: tuple[int, Path, Result], model: Any, config: Callable[..., TuneConfig], tmp_path: Path
) -> None:
    # A 500 may have been computed: it ends a run that would be charged again for it, and is tried again in the other.
    double = Counted(model, {5, 6, 20}, 500 if on_doubt == "charge" else 400)
    with answering(double.http) as place:
        settings, path = config(backend=f"vllm+http://{place}", on_doubt=on_doubt), tmp_path / "run"
        for _ in range(3):
            run = prepare(settings)
            with pytest.raises(OracleError, match="the engine died"):
                finish(run, path)
            run.close()
        result = resumed(path)
    if on_doubt == "charge":
        assert double.candidates <= BUDGET
    else:
        assert result.digest == calm[2].digest
        assert double.candidates > result.calls.train + result.calls.dev


@pytest.mark.parametrize(
    "flags", [["--method", "bbtv2"], ["--method", "mp2-deep"], ["--method", "bbt", "--ray", "local"]]
)
def test_what_it_cannot_do_is_wrong_usage(
    flags: list[str], folder: Path, tiny_pair_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["tune", "--task", str(tiny_pair_data / "task.yaml"), "--data", str(tiny_pair_data)]
    words += ["--backbone", str(folder), "--backend", "vllm+http://127.0.0.1:1", "--run-dir", str(tmp_path / "run")]
    assert cli.run([*words, *flags]) == 2
    assert "vllm" in (said := capsys.readouterr().err.splitlines()[-1]) or "--ray" in said
    assert not (tmp_path / "run").exists()
