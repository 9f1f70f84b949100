"""The oracle on a real Ray of this machine: two workers of one thread each."""

from __future__ import annotations

import json
import os
import pickle
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_prompt
from raykills import STAGES, Murderer, found
from raylock import only_ray
from tiny_prompt import batch_of

import bbprompt
from bbprompt.backends.backbone import load_backbone
from bbprompt.backends.cluster import Cluster, _reach, join_cluster, normal_address
from bbprompt.backends.local import LocalOracle
from bbprompt.backends.rayoracle import RayOracle
from bbprompt.backends.rayworker import Failure, Model, Request, Worker
from bbprompt.connect import open_oracle
from bbprompt.errors import DataError, OracleError, UsageError
from bbprompt.oracle import Oracle
from bbprompt.run import Prepared, prepare, tune
from bbprompt.store.rundir import RunDirectory
from bbprompt.testing import OracleContract
from bbprompt.units import Unit

# Not imported here: Ray decides on tokens when it is loaded.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),  # waits for the other tests of Ray, too
    pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed: pip install 'bbprompt[ray]'"),
]


class Shared:
    """An oracle that others go on using when one is done with it."""

    def __init__(self, inner: RayOracle) -> None:
        self.inner, self.info, self.score = inner, inner.info, inner.score

    def close(self) -> None:
        """Leave it open."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with only_ray():
        joined = join_cluster("local", cpus=4)
        yield joined
        joined.leave()
        joined.leave()
        assert joined.folder is not None
        assert not joined.folder.exists()
        assert "RAY_AUTH_TOKEN" not in os.environ


@pytest.fixture(scope="module")
def prompt(tiny_bert_dir: Path) -> bbprompt.ModularPrompt:
    return tiny_prompt.artifact(tiny_bert_dir, load_backbone(str(tiny_bert_dir)).digest)


@pytest.fixture(scope="module")
def oracle(cluster: Cluster, prompt: bbprompt.ModularPrompt) -> Iterator[RayOracle]:
    # Small batches of tokens: requests of several units, as large models have them.
    opened = open_oracle("local", prompt, ray="local", workers=2, batch_tokens=300)
    assert isinstance(opened, RayOracle)
    yield opened
    opened.close()
    opened.close()
    with pytest.raises(OracleError, match="closed"):
        opened.score(batch_of("pair"), np.zeros((1, 3, 4)))


@pytest.fixture(scope="module")
def local(prompt: bbprompt.ModularPrompt) -> Oracle:
    return open_oracle("local", prompt, threads=1, batch_tokens=300, dtype="float32")  # as Ray's workers


class TestContract(OracleContract):
    """What every oracle must do."""

    @pytest.fixture(autouse=True)
    def _opened(self, oracle: RayOracle) -> None:
        self.oracle = oracle

    def make(self) -> Oracle:
        return Shared(self.oracle)


@pytest.mark.parametrize("kind", ["pair", "single", "choice", "extract"])
@pytest.mark.parametrize("layer", [None, 0, 2])
def test_its_replies_are_those_of_the_local_oracle_bit_for_bit(
    oracle: RayOracle, local: LocalOracle, kind: str, layer: int | None
) -> None:
    batch, longest = batch_of(kind), 3 if kind == "extract" else None
    points = np.repeat(np.random.default_rng(0).normal(size=(1, 3, 4)), 9, axis=0)
    moved = slice(None) if layer is None else layer
    points[:, moved] += np.random.default_rng(1).normal(size=points[:, moved].shape)
    for support in ("candidates", "sequence"):
        ours = oracle.score(batch, points, support, longest)
        theirs = local.score(batch, points, support, longest)
        assert np.array_equal(ours.logits, theirs.logits)
        assert np.array_equal(ours.normalizer, theirs.normalizer)
        assert longest is None or np.array_equal(ours.best, theirs.best)
    assert oracle.info == local.info


def settings(data: Path, prompts: Path, **changes: Any) -> dict[str, Any]:
    plain = {"task": str(data / "task.yaml"), "data": str(data), "prompts": str(prompts), "budget": 70, "threads": 1}
    plain |= {"dtype": "float32"}  # "auto" is that on Ray and may be mixed on one machine
    return plain | {"batch_tokens": 600, "set": STAGES} | changes


@pytest.fixture(scope="module")
def serial(tiny_pair_data: Path, tiny_prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in this process alone."""
    folder = tmp_path_factory.mktemp("runs") / "serial"
    bbprompt.tune(run_dir=folder, **settings(tiny_pair_data, tiny_prompts))
    return folder


def decides(folder: Path) -> dict[str, Any]:
    """The manifest without what names this very run."""
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    return {key: manifest[key] for key in ("config", "method", "task", "data", "model", "threads", "versions")}


@pytest.fixture
def ray_run(cluster: Cluster, tiny_pair_data: Path, tiny_prompts: Path) -> Iterator[Prepared]:
    run = prepare(bbprompt.TuneConfig(**settings(tiny_pair_data, tiny_prompts, ray="local", workers=2)))
    yield run
    run.oracle.close()


def test_a_run_whose_workers_are_killed_finds_what_the_serial_run_finds(
    ray_run: Prepared, serial: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert isinstance(ray_run.oracle, RayOracle)
    murderer = Murderer(ray_run.oracle, {4: "during", 9: "during"})
    with RunDirectory.create(tmp_path / "run", ray_run.manifest()) as directory:
        tune(replace(ray_run, oracle=murderer), directory)
    assert murderer.kills.total() == 2
    assert ray_run.oracle.lost == 2
    assert found(tmp_path / "run") == found(serial)
    # Neither the cluster nor the number of workers is part of what a run is.
    assert decides(tmp_path / "run") == decides(serial)
    out, _ = capfd.readouterr()
    assert out == "", "standard output is for results"


def test_from_the_command_line_with_one_worker(
    tiny_pair_data: Path, tiny_prompts: Path, serial: Path, tmp_path: Path
) -> None:
    """A process of its own, without a Ray around it: it starts one, says nothing of it, and clears it away."""
    words = [sys.executable, "-m", "bbprompt", "tune", "--task", str(tiny_pair_data / "task.yaml")]
    words += [
        "--data",
        str(tiny_pair_data),
        "--prompts",
        str(tiny_prompts),
        "--dtype",
        "float32",
        "--budget",
        "70",
        "--batch-tokens",
        "600",
    ]
    words += ["--run-dir", str(tmp_path / "run"), "--ray", "local", "--workers", "1", "--json", "--quiet"]
    words += [word for key, value in STAGES.items() for word in ("--set", f"{key}={value}")]
    (tmp_path / "t").mkdir()
    with only_ray_unless_ours():
        done = subprocess.run(
            words,
            capture_output=True,
            text=True,
            check=False,
            timeout=200,
            env={**os.environ, "HOME": str(tmp_path), "TMPDIR": str(tmp_path / "t")},
        )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert len(done.stdout.splitlines()) == 1
    assert found(tmp_path / "run") == found(serial)
    assert decides(tmp_path / "run") == decides(serial)
    assert not list((tmp_path / "t").glob("bbray-*"))
    assert not (tmp_path / ".ray").exists()


def only_ray_unless_ours() -> Any:
    """The lock, unless this process holds it through the module's cluster."""
    import contextlib

    import ray

    return contextlib.nullcontext() if ray.is_initialized() else only_ray()


def test_errors_of_workers_arrive_as_what_they_are(
    cluster: Cluster, oracle: RayOracle, prompt: bbprompt.ModularPrompt
) -> None:
    batch = batch_of("pair")
    parts = tuple(replace(part, cut=False, text="长" * 200) for part in batch.forms[0].parts)
    long = replace(batch, forms=(replace(batch.forms[0], parts=parts),))
    with pytest.raises(DataError, match=r"text 1: "):
        oracle.score(long, np.zeros((2, 3, 4)))
    assert oracle.lost == 0
    with pytest.raises(UsageError, match="--device cuda: the Ray cluster at local has no GPU"):
        open_oracle("local", prompt, ray="local", workers=1, device="cuda")
    assert np.isfinite(oracle.score(batch, np.zeros((2, 3, 4))).logits).all()


def test_an_answer_that_the_cluster_loses_is_asked_for_again_by_us(
    oracle: RayOracle, local: LocalOracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    points = np.random.default_rng(7).normal(size=(9, 3, 4))
    wanted, before = local.score(batch_of("pair"), points), oracle.lost
    real, lost = ray.get, []

    def losing(reference: Any, **more: Any) -> Any:
        if not lost and isinstance(real(reference, **more), list):  # an answer, computed and then gone
            lost.append(reference)
            raise ray.exceptions.ObjectLostError(reference.hex(), None, "")
        return real(reference, **more)

    monkeypatch.setattr(ray, "get", losing)
    found = oracle.score(batch_of("pair"), points)
    assert len(lost) == 1
    assert oracle.lost == before + 1
    assert np.array_equal(found.logits, wanted.logits)


@pytest.mark.parametrize("address", ["", "nowhere", "host:", ":6379", "host:99999999", "ray://head:10001"])
def test_an_address_that_is_none(address: str) -> None:
    with pytest.raises(UsageError, match="--ray"):
        normal_address(address)


def test_a_cluster_out_of_reach() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        with pytest.raises(OracleError, match="nothing answers there"):
            _reach(f"127.0.0.1:{free.getsockname()[1]}")


def test_a_worker_says_what_is_wrong_with_its_model(prompt: bbprompt.ModularPrompt, tmp_path: Path) -> None:
    good = Model(None, "cpu", "float32", 4096, None, 1)
    other = replace(prompt, config=prompt.config.model_copy(update={"backbone_digest": "0" * 64}))
    for artifact, model, kind, words in (
        (prompt, replace(good, backbone=str(tmp_path / "nothing")), "ArtifactError", "no such directory"),
        (other, good, "ArtifactError", "were trained for"),
        (prompt, replace(good, dtype="float31"), "OracleError", "a worker failed with AttributeError"),
    ):
        failure = Worker(lambda value: value).open(model, artifact, "here")
        assert isinstance(failure, Failure)
        assert failure.kind == kind
        assert words in failure.message


class Unpicklable(Exception):
    """It holds what no message can carry."""

    def __init__(self) -> None:
        super().__init__("out of\nmemory on device 3")
        self.lock = threading.Lock()


def test_an_error_that_cannot_be_pickled_arrives_as_its_words() -> None:
    class Broken:
        def score_unit(self, *_: Any) -> Any:
            raise Unpicklable

    with pytest.raises(TypeError):
        pickle.dumps(Unpicklable())
    worker = Worker(lambda value: value)
    worker._oracle = Broken()
    points = np.zeros((1, 3, 4), np.float32)
    said = worker.answer(Request(1, "digest", "candidates", None), batch_of("pair"), points, [Unit(0, 1)])
    assert pickle.loads(pickle.dumps(said)) == Failure(
        "OracleError", "a worker failed with Unpicklable: out of memory on device 3"
    )


def test_workers_need_something_to_work_on(prompt: bbprompt.ModularPrompt) -> None:
    with pytest.raises(UsageError, match="--workers"):
        open_oracle("local", prompt, workers=2)
