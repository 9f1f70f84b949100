"""What each worker of a Ray cluster is given of its GPUs, and how it is greeted; no Ray is needed to work that out."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_prompt

from bbprompt.backends import rayoracle
from bbprompt.backends.cluster import Cluster
from bbprompt.backends.rayoracle import open_ray, share_of_gpu
from bbprompt.backends.rayworker import Greeting, Model
from bbprompt.errors import OracleError, UsageError
from bbprompt.testing import ToyOracle

UNITS = 10000  # Ray counts resources in ten-thousandths, cut off


@pytest.mark.parametrize("gpus", range(1, 9))
def test_all_workers_find_a_place_and_no_gpu_is_left_idle(gpus: int) -> None:
    for workers in range(1, 101):
        share = share_of_gpu(workers, gpus)
        on_one = UNITS // int(share * UNITS)
        assert workers <= on_one * gpus
        assert share == 1 or workers > (on_one - 1) * gpus, "a larger share would do"
    assert share_of_gpu(gpus, gpus) == 1
    assert share_of_gpu(gpus + 1, gpus) == 0.5


class Joined(Cluster):
    """A cluster that notes that it was left."""

    left = 0

    def leave(self) -> None:
        Joined.left += 1


@pytest.mark.parametrize(
    ("gpus", "device", "workers", "given"),
    [
        (2, "auto", None, ("cuda", 2, 1.0)),
        (2, "cuda", 2, ("cuda", 2, 1.0)),
        (2, "auto", 1, ("cuda", 1, 1.0)),
        (2, "auto", 3, ("cuda", 3, 0.5)),
        (2, "auto", 5, ("cuda", 5, 1 / 3)),
        (2, "cpu", 3, ("cpu", 3, 0.0)),
        (0, "auto", 3, ("cpu", 3, 0.0)),
        (0, "auto", None, ("cpu", 8, 0.0)),
        (0, "cuda", 2, None),
    ],
)
def test_what_workers_are_given(
    gpus: int,
    device: str,
    workers: int | None,
    given: tuple[str, int, float] | None,
    tiny_bert_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[str, int, float]] = []

    def opened(cluster: Cluster, prompt: Any, model: Any, count: int, share: float, limits: Any) -> None:
        asked.append((model.device, count, share))

    joined = Joined(ray=None, address="auto", cpus=8, gpus=gpus, joined=True, folder=None, variables=())
    monkeypatch.setattr(rayoracle, "join_cluster", lambda address, **_: joined)
    monkeypatch.setattr(rayoracle, "RayOracle", opened)
    prompt = tiny_prompt.artifact(tiny_bert_dir, "0" * 64)
    before = Joined.left
    if given is None:
        with pytest.raises(UsageError, match="--device cuda: the Ray cluster at auto has no GPU"):
            open_ray("auto", prompt, workers=workers, device=device)
        assert Joined.left == before + 1
        return
    open_ray("auto", prompt, workers=workers, device=device)
    assert asked == [given]
    assert Joined.left == before


HELLO = Greeting(replace(ToyOracle().info, versions="torch 2.13.0"), "AVX512", "10.0.0.1", 11)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (
            replace(HELLO, info=replace(HELLO.info, versions="torch 2.12.0"), node="10.0.0.2"),
            "the workers on 10.0.0.1 and 10.0.0.2 differ: versions is torch 2.13.0 and torch 2.12.0",
        ),
        (
            replace(HELLO, info=replace(HELLO.info, prompts_digest="1" * 64), node="10.0.0.3"),
            "the workers on 10.0.0.1 and 10.0.0.3 differ: "
            f"prompts_digest is {HELLO.info.prompts_digest} and {'1' * 64}",
        ),
    ],
)
def test_a_worker_with_other_versions_or_weights_is_refused_by_what_differs(other: Greeting, said: str) -> None:
    carrier = carrying()
    carrier.greet("one", HELLO)
    carrier.greet("two", replace(HELLO, process=12))
    with pytest.raises(OracleError, match=f"^{re.escape(said)}; install the same versions"):
        carrier.greet("three", other)


def test_another_processor_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    carrier = carrying()
    carrier.greet("one", HELLO)
    assert not caplog.records
    carrier.greet("two", replace(HELLO, processor="AVX2", node="10.0.0.2"))
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        (
            "WARNING",
            "workers run on different processors (10.0.0.1: AVX512; 10.0.0.2: AVX2): scores may differ in their last "
            "digits, and a run need not repeat exactly",
        )
    ]


def carrying() -> rayoracle._RayCarrier:
    """What carries tasks to actors, of a Ray that starts none."""
    idle = SimpleNamespace(put=lambda value: value, remote=lambda kind: SimpleNamespace(options=lambda **_: None))
    return rayoracle._RayCarrier(idle, Model(None, "cpu", "float32", 4096, None, 1), None, 0.0)  # type: ignore[arg-type]
