"""The oracle of a vLLM server against a real one, on a tiny Llama with random weights.

`tests/servers/vllm.sh` brings the server; without it these tests are skipped.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from servers import TOKEN, free_port, place, process
from test_remote_run import finish
from test_verbalizer import KINDS, GapOracle, batch_for, causal_dir
from test_vllm import shares
from test_vllm_run import run_config

from bbprompt.backends.backbone import load_backbone
from bbprompt.backends.completions import Completions, Way, pack
from bbprompt.backends.scale import facts_of
from bbprompt.backends.stock import StockOracle
from bbprompt.backends.vllm import VllmOracle
from bbprompt.config import TuneConfig
from bbprompt.errors import OracleError
from bbprompt.oracle import Oracle
from bbprompt.prompts import ModularPrompt
from bbprompt.random_projection import random_prompt
from bbprompt.run import prepare
from bbprompt.stage_settings import ProjectionConfig
from bbprompt.testing import OracleContract

pytestmark = pytest.mark.slow

SUBSPACE = ProjectionConfig(readout="verbalizer", layers="input", prompt_length=8, dim=6, placeholder=300)
POINTS = np.random.default_rng(0).normal(size=(20, 1, 6)).astype(np.float32)
#: Heads that its attention for CPUs takes.
SIZES = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return causal_dir(tmp_path_factory.mktemp("models") / "llama", "llama", **SIZES, initializer_range=0.1)


@pytest.fixture(scope="module")
def url(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real server behind a token."""
    where, port = place("vllm"), free_port()
    words = [str(where / "bin" / "python"), "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    words += ["--served-model-name", "tiny", "--enable-prompt-embeds", "--dtype", "float32", "--enforce-eager"]
    words += ["--max-model-len", "128", "--host", "127.0.0.1", "--port", str(port), "--api-key", TOKEN]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env |= {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with process(words, env, tmp_path_factory.mktemp("vllm"), f"http://127.0.0.1:{port}/health"):
        yield f"vllm+http://127.0.0.1:{port}"


@pytest.fixture
def connect(url: str, folder: Path) -> Iterator[Callable[..., VllmOracle]]:
    """Opens oracles, and closes them in the end."""
    opened: list[VllmOracle] = []

    def open_(workers: int = 1) -> VllmOracle:
        backbone = load_backbone(str(folder), head=True, layers=1)
        server = Completions(url, TOKEN, workers=workers)
        opened.append(VllmOracle(server, backbone, prompt_of(folder), workers=workers))
        return opened[-1]

    yield open_
    for oracle in opened:
        oracle.close()


def prompt_of(folder: Path) -> ModularPrompt:
    return random_prompt(SUBSPACE.model_copy(update={"scale": 1.0}), facts_of(load_backbone(str(folder), head=True)), 3)


class TestContract(OracleContract):
    tolerance = 1e-3

    @pytest.fixture(autouse=True)
    def _connect(self, connect: Callable[..., VllmOracle]) -> None:
        self.connect = connect

    def make(self) -> Oracle:
        return GapOracle(self.connect())


@pytest.mark.parametrize("kind", list(KINDS))
def test_it_equals_the_local_oracle(kind: str, connect: Callable[..., VllmOracle], folder: Path) -> None:
    there, here = connect(workers=4), StockOracle(load_backbone(str(folder), head=True), prompt_of(folder))
    assert there._server.way == Way(given=True)
    batch = batch_for(kind)
    difference = np.abs(shares(there.score(batch, POINTS), batch) - shares(here.score(batch, POINTS), batch)).max()
    print(f"{kind}: largest difference of two log-probabilities {difference:.1e}")
    assert difference < 1e-3


def test_the_most_probable_tokens_alone(connect: Callable[..., VllmOracle]) -> None:
    """As an older server is asked, which tells its 20 most probable tokens."""
    oracle = connect()
    oracle._server.way = Way(given=False, most=20)
    rows = oracle._before
    (table,) = oracle._server._ask({"prompt_embeds": [pack(rows)]}, [len(rows)], [], list)
    told = [int(name.partition(":")[2]) for name in table]
    assert len(told) == 20
    exact = oracle._server.score([rows], told)
    oracle._server.way = Way(given=True)
    assert np.abs(oracle._server.score([rows], told) - exact).max() < 1e-3
    oracle._server.way = Way(given=False, most=20)
    with pytest.raises(OracleError, match="not among the 20"):
        oracle.score(batch_for("single"), POINTS[:1])


def test_it_is_refused(url: str) -> None:
    with pytest.raises(OracleError, match="BBPROMPT_TOKEN"):
        Completions(url, TOKEN + "x")
    with pytest.raises(OracleError, match=r"no model 'other' there \(tiny\)"):
        Completions(f"{url}/other", TOKEN)


def test_a_run_finds_what_a_local_one_finds(
    url: str, folder: Path, tiny_pair_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BBPROMPT_TOKEN", TOKEN)
    results: list[Any] = []
    for number, where in enumerate(({}, {"backend": url, "workers": 4})):
        settings: TuneConfig = run_config(tmp_path, folder, tiny_pair_data, **where)
        run = prepare(settings)
        results.append(finish(run, tmp_path / str(number)))
        run.close()
    here, there = results
    assert there.calls == here.calls
    assert there.before == here.before
    assert there.stages[-1].train_loss == pytest.approx(here.stages[-1].train_loss, abs=1e-2)
