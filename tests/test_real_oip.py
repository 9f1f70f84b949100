"""The oracle of the Open Inference Protocol against real servers: NVIDIA Triton and MLServer on exported repositories.

`tests/servers/triton.sh` and `tests/servers/mlserver.sh` bring the servers; without them these tests are skipped.
"""

from __future__ import annotations

import contextlib
import json
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from servers import ROOT, free_port, place, process
from test_remote_run import config, finish, numbers
from tiny_prompt import batch_of

from bbprompt.backends.backbone import load_backbone
from bbprompt.backends.local import LocalOracle
from bbprompt.backends.oip import OipOracle
from bbprompt.errors import OracleError
from bbprompt.exportserver import Format, ServedModel, write_repository
from bbprompt.oracle import Oracle
from bbprompt.prompts import ModularPrompt
from bbprompt.run import prepare
from bbprompt.testing import OracleContract

pytestmark = pytest.mark.slow


@contextlib.contextmanager
def running(kind: Format, prompts: Path, folder: Path) -> Iterator[tuple[int, int]]:
    """Ports for HTTP and gRPC of a real server on a freshly exported repository."""
    where, repository = place(kind), folder / "repository"
    write_repository(repository, kind, "oracle", prompts, ServedModel(threads=1, max_points=16))
    ports = free_port(), free_port(), free_port()
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    if kind == "triton":
        env["PYTHONPATH"] = os.pathsep.join((str(ROOT), sysconfig.get_paths()["purelib"]))
        env["LD_LIBRARY_PATH"] = str(where / "nvidia_pytriton.libs")
        words = [str(where / "tritonserver"), "--model-repository", str(repository)]
        words += ["--backend-directory", str(where / "backends"), "--allow-metrics", "false"]
        words += ["--http-address", "127.0.0.1", "--http-port", str(ports[0])]
        words += ["--grpc-address", "127.0.0.1", "--grpc-port", str(ports[1])]
    else:
        env["PYTHONPATH"] = str(ROOT)
        settings = json.loads((repository / "settings.json").read_text())
        settings |= dict(zip(("http_port", "grpc_port", "metrics_port"), ports, strict=True))
        (repository / "settings.json").write_text(json.dumps(settings))
        start = "import sys; from mlserver.cli import main; sys.exit(main())"
        words = [str(where / "bin" / "python"), "-c", start, "start", str(repository)]
    with process(words, env, folder, f"http://127.0.0.1:{ports[0]}/v2/models/oracle/ready"):
        yield ports[0], ports[1]


@pytest.fixture(scope="module")
def triton(tiny_prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, int]]:
    with running("triton", tiny_prompts, tmp_path_factory.mktemp("triton")) as ports:
        yield ports


@pytest.fixture(scope="module")
def mlserver(tiny_prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, int]]:
    with running("mlserver", tiny_prompts, tmp_path_factory.mktemp("mlserver")) as ports:
        yield ports


class RealServer(OracleContract):
    """What every real server must do, over HTTP and gRPC."""

    kind: ClassVar[Format]
    scheme: ClassVar[str]
    url: str
    prompts: Path

    @pytest.fixture(autouse=True)
    def _server(self, request: pytest.FixtureRequest, tiny_prompts: Path) -> None:
        http, grpc = request.getfixturevalue(self.kind)
        self.url = f"{self.scheme}://127.0.0.1:{http if self.scheme == 'kserve' else grpc}/oracle"
        self.prompts = tiny_prompts

    @pytest.fixture(autouse=True)
    def _close(self) -> Iterator[None]:
        self.opened: list[OipOracle] = []
        yield
        for oracle in self.opened:
            oracle.close()

    def make(self) -> Oracle:
        self.opened.append(OipOracle(self.url))
        return self.opened[-1]

    @pytest.mark.parametrize("kind", ["pair", "choice", "extract"])
    def test_it_equals_the_local_oracle_bit_for_bit(self, kind: str) -> None:
        import torch

        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            prompt = ModularPrompt.load(self.prompts)
            local = LocalOracle(load_backbone(prompt.config.backbone), prompt)
            batch, points = batch_of(kind, 9), np.random.default_rng(3).normal(size=(16, *prompt.space.shape))
            longest = 4 if kind == "extract" else None
            there, here = (oracle.score(batch, points, longest_answer=longest) for oracle in (self.make(), local))
            assert np.array_equal(there.logits, here.logits)
            assert np.array_equal(there.normalizer, here.normalizer)
            assert there.best is None or np.array_equal(there.best, np.asarray(here.best))
        finally:
            torch.set_num_threads(threads)

    def test_a_run_has_the_numbers_of_a_local_one(
        self, tiny_pair_data: Path, tiny_prompts: Path, tmp_path: Path
    ) -> None:
        results = []
        for backend in ("local", self.url):
            run = prepare(config(tiny_pair_data, tiny_prompts, backend=backend, budget=24, baselines=False))
            results.append(finish(run, tmp_path / str(len(results))))
            run.oracle.close()
        assert numbers(results[0]) == numbers(results[1])
        assert results[0].digest == results[1].digest

    def test_another_model_name(self) -> None:
        with pytest.raises(OracleError, match="no model 'other' there"):
            OipOracle(self.url.replace("/oracle", "/other"))


class TestTritonHttp(RealServer):
    kind, scheme = "triton", "kserve"


class TestTritonGrpc(RealServer):
    kind, scheme = "triton", "kserve+grpc"


class TestMLServerHttp(RealServer):
    kind, scheme = "mlserver", "kserve"


class TestMLServerGrpc(RealServer):
    kind, scheme = "mlserver", "kserve+grpc"


def test_the_reason_for_a_skip_names_what_brings_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BBPROMPT_TRITON", "/nowhere")
    with pytest.raises(pytest.skip.Exception, match=r"tests/servers/triton\.sh"):
        place("triton")
