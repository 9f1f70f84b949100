"""What each worker of a Ray cluster is given of its GPUs; no Ray is needed to work that out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_prompt

from bbprompt.backends import rayoracle
from bbprompt.backends.cluster import Cluster
from bbprompt.backends.rayoracle import open_ray, share_of_gpu
from bbprompt.errors import UsageError

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
