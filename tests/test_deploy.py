"""The RayJob says what the operator reads and what `bbprompt` takes, as docs/cluster.md claims."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

import bbprompt
from bbprompt import cli

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def spec() -> dict[str, Any]:
    job = yaml.safe_load((ROOT / "deploy" / "rayjob.yaml").read_text(encoding="utf-8"))
    assert set(job) == {"apiVersion", "kind", "metadata", "spec"}
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", job["metadata"]["name"])
    found: dict[str, Any] = job["spec"]
    return found


def test_the_keys_are_those_of_a_rayjob(spec: dict[str, Any]) -> None:
    """The names are KubeRay's (ray.io/v1, RayJobSpec and RayClusterSpec); an operator ignores or refuses others."""
    assert set(spec) == {"entrypoint", "shutdownAfterJobFinishes", "backoffLimit", "rayClusterSpec"}
    cluster = spec["rayClusterSpec"]
    assert set(cluster) == {"rayVersion", "headGroupSpec", "workerGroupSpecs"}
    assert set(cluster["headGroupSpec"]) == {"rayStartParams", "template"}
    (workers,) = cluster["workerGroupSpecs"]
    assert set(workers) == {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}
    assert workers["minReplicas"] <= workers["replicas"] <= workers["maxReplicas"]
    for group in (cluster["headGroupSpec"], workers):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values()), "KubeRay takes strings alone"
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert {"name", "image", "resources"} <= set(container)
        assert container["resources"]["requests"] == container["resources"]["limits"]
        volumes = {volume["name"] for volume in pod.get("volumes", [])}
        assert {mount["name"] for mount in container.get("volumeMounts", [])} == volumes


def test_nothing_is_started_twice_and_only_workers_work(spec: dict[str, Any]) -> None:
    assert spec["backoffLimit"] == 0
    assert spec["rayClusterSpec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


def test_the_entrypoint_fits_the_cluster(spec: dict[str, Any]) -> None:
    program, name, *words = shlex.split(spec["entrypoint"])
    assert program == "bbprompt"
    command: Any = typer.main.get_command(cli.app)
    flags = command.commands[name].make_context(name, words).params
    assert flags["ray"] == "auto"
    head, workers = spec["rayClusterSpec"]["headGroupSpec"], spec["rayClusterSpec"]["workerGroupSpecs"][0]
    cpus = int(workers["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"])
    assert flags["workers"] * flags["threads"] <= workers["replicas"] * cpus
    mounts = head["template"]["spec"]["containers"][0]["volumeMounts"]
    assert any(str(flags["run_dir"]).startswith(f"{mount['mountPath']}/") for mount in mounts)


def test_the_versions_are_ours(spec: dict[str, Any]) -> None:
    (ray,) = re.findall(r"^ray==(\S+)$", (ROOT / ".ci" / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    cluster = spec["rayClusterSpec"]
    assert cluster["rayVersion"] == ray
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        (container,) = group["template"]["spec"]["containers"]
        assert container["image"].endswith(f"/bbprompt:{bbprompt.__version__}")
