"""RayJob and container say what operators read and what `bbprompt` takes, as docs/cluster.md and serving.md claim."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
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
    assert set(cluster) == {"rayVersion", "enableInTreeAutoscaling", "authOptions", "headGroupSpec", "workerGroupSpecs"}
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


def test_the_token_is_read_from_a_secret_that_the_file_says_how_to_make(spec: dict[str, Any]) -> None:
    """The keys are KubeRay's since 1.6 (AuthOptions); it wants the token under `auth_token`."""
    options = spec["rayClusterSpec"]["authOptions"]
    assert set(options) == {"mode", "secretName"}
    assert options["mode"] == "token"
    text = (ROOT / "deploy" / "rayjob.yaml").read_text(encoding="utf-8")
    made = f'kubectl create secret generic {options["secretName"]} --from-literal=auth_token="$(openssl rand -hex 32)"'
    assert made in text
    assert made in (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
    assert "1.6 or newer" in text
    assert "env" not in str(spec), "no variable of ours overrides what the operator sets"


def test_the_entrypoint_fits_the_cluster(spec: dict[str, Any]) -> None:
    program, name, *words = shlex.split(spec["entrypoint"])
    assert program == "bbprompt"
    command: Any = typer.main.get_command(cli.app)
    flags = command.commands[name].make_context(name, words).params
    assert flags["ray"] == "auto"
    head, workers = spec["rayClusterSpec"]["headGroupSpec"], spec["rayClusterSpec"]["workerGroupSpecs"][0]
    cpus = int(workers["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"])
    assert flags["workers"] * flags["threads"] <= workers["replicas"] * cpus
    assert f"router.batch={flags['workers']}" in flags["changes"], "else half of them wait in the first stage"
    mounts = head["template"]["spec"]["containers"][0]["volumeMounts"]
    assert any(str(flags["run_dir"]).startswith(f"{mount['mountPath']}/") for mount in mounts)


def test_the_versions_are_ours(spec: dict[str, Any]) -> None:
    (ray,) = re.findall(r"^ray==(\S+)", (ROOT / ".ci" / "dev.lock").read_text(encoding="utf-8"), re.MULTILINE)
    cluster = spec["rayClusterSpec"]
    assert cluster["rayVersion"] == ray
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        (container,) = group["template"]["spec"]["containers"]
        assert container["image"].endswith(f"/bbprompt:{bbprompt.__version__}")


def test_the_container_starts_a_server_that_anyone_may_reach_only_with_a_token() -> None:
    """Its words are those of `bbprompt serve`, which refuses that address without the token that compose asks for."""
    lines = (ROOT / "deploy" / "Dockerfile").read_text(encoding="utf-8").splitlines()
    (entry,) = [json.loads(line.partition(" ")[2]) for line in lines if line.startswith("ENTRYPOINT")]
    compose = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text(encoding="utf-8"))
    (service,) = compose["services"].values()
    program, *words = [*entry, *service["command"]]
    assert program == "bbprompt"
    environment = {name: value for name, value in os.environ.items() if name != "BBPROMPT_TOKEN"}
    command = [sys.executable, "-m", "bbprompt", *words]
    refused = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "BBPROMPT_TOKEN" in refused.stderr
    assert service["environment"]["BBPROMPT_TOKEN"].startswith("${BBPROMPT_TOKEN:?")
    (port,) = service["ports"]
    assert port == "127.0.0.1:8765:8765"
    assert (ROOT / "deploy" / service["build"]["context"] / service["build"]["dockerfile"]).samefile(
        ROOT / "deploy" / "Dockerfile"
    )


def test_the_health_check_asks_where_the_server_says_that_it_is() -> None:
    text = (ROOT / "deploy" / "Dockerfile").read_text(encoding="utf-8")
    (entry,) = [json.loads(line.partition(" ")[2]) for line in text.splitlines() if line.startswith("ENTRYPOINT")]
    (words,) = re.findall(r"^HEALTHCHECK (?:.*\\\n)?\s*CMD (\[.*\])$", text, re.MULTILINE)
    program, flag, module, file = json.loads(words)
    assert (program, flag, module) == ("python", "-m", "bbprompt.serve.health")
    assert entry[entry.index("--ready-file") + 1] == file
    compose = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text(encoding="utf-8"))
    (service,) = compose["services"].values()
    assert service["read_only"]
    assert str(Path(file).parent) in service["tmpfs"], "else it could not be written"


def test_what_the_container_copies_is_there_and_sent_along() -> None:
    text = (ROOT / "deploy" / "Dockerfile").read_text(encoding="utf-8")
    copied = [word for line in re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE) for word in line.split()]
    assert {"pyproject.toml", "bbprompt", "optimizers", "backends", "configs"} <= set(copied)
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    for name in copied:
        assert (ROOT / name).exists()
        assert name not in ignored
    made = (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()
    for name in made:
        assert {name.rstrip("/"), f"**/{name.rstrip('/')}"} & set(ignored), f"{name} would be sent to the builder"
    (torch,) = re.findall(r"torch==(\S+)$", text, re.MULTILINE)
    assert f"TORCH ?= torch=={torch}\n" in (ROOT / "Makefile").read_text(encoding="utf-8")
