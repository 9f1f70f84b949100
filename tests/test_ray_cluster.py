"""A real cluster of two machines, one of which is switched off in the middle of a run."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from netns import ray_on, two_machines, wait_for, why_not
from raylock import only_ray
from tiny_run import finished

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),  # waits for the other tests of Ray, too
    pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed: pip install 'bbprompt[ray]'"),
]


def test_a_run_outlives_one_of_its_two_machines(tiny_pair_data: Path, tiny_prompts: Path, tmp_path: Path) -> None:
    if reason := why_not():
        print(f"skipped: {reason}")
        pytest.skip(reason)
    budget = 1200
    serial = finished(tmp_path / "serial", tiny_pair_data, tiny_prompts, budget=budget, batch_tokens=3000)
    run = tmp_path / "run"
    words = ["-m", "bbprompt", "tune", "--task", str(tiny_pair_data / "task.yaml"), "--data", str(tiny_pair_data)]
    words += ["--prompts", str(tiny_prompts), "--seed", "7", "--budget", str(budget), "--batch-tokens", "3000"]
    words += [
        "--set",
        "router=null",
        "--set",
        "prompt.patience=null",
        "--run-dir",
        str(run),
        "--workers",
        "2",
        "--json",
    ]
    with only_ray(), two_machines() as (head, other), ray_on(head, other, tmp_path) as address:
        wrong = head.environment | {"RAY_AUTH_TOKEN": "0" * 64}
        refused = subprocess.run(
            head.command(sys.executable, *words, "--ray", address),
            env=wrong,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert refused.returncode == 69, refused.stderr
        assert "token" in refused.stderr.splitlines()[-1]
        assert "0" * 64 not in refused.stderr + refused.stdout
        tune = head.start(sys.executable, *words, "--ray", address, log=tmp_path / "tune.log")
        wait_for(run / "curve.csv", "\n", 20, seconds=300, still=tune)
        # Both machines must be at work before one is switched off.
        wait_for(tmp_path / "tune.log", other.address, still=tune)
        rows = (run / "curve.csv").read_text(encoding="utf-8").count("\n")
        other.kill()
        assert not (run / "result.json").exists(), "finished before anything happened"
        assert tune.wait(180) == 0, (tmp_path / "tune.log").read_text(encoding="utf-8")
    log = (tmp_path / "tune.log").read_text(encoding="utf-8")
    assert "a worker was lost" in log
    ours, theirs = (json.loads((folder / "result.json").read_text(encoding="utf-8")) for folder in (run, serial))
    assert (ours["digest"], ours["calls"]) == (theirs["digest"], theirs["calls"])
    assert (run / "prompt.safetensors").read_bytes() == (serial / "prompt.safetensors").read_bytes()
    assert (run / "curve.csv").read_text(encoding="utf-8").count("\n") > rows
