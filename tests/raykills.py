"""Kill what a run on Ray consists of (SIGKILL), at random, and compare its end with a run in one process.

Called as ``python raykills.py --workers 30 --drivers 5 --nodes 5 --seed 1``; the last line of standard output is a
JSON object with the counts. Workers die before they are sent a task, while they have it, or with their answer under
way; a driver dies with all its threads, and the run is resumed; a node dies as if its power had failed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import tiny
import tiny_prompt
from netns import ray_on, two_machines, wait_for, why_not
from raylock import only_ray

import bbprompt
from bbprompt.backends.cluster import join_cluster
from bbprompt.backends.rayoracle import RayOracle
from bbprompt.run import prepare, tune
from bbprompt.store.rundir import RunDirectory

MOST_KILLS = 3  # workers in one run; the dispatcher holds a task that four die of to be the murderer
ORPHANS = 30.0  # seconds after a driver's death until the workers that it started must be gone
AGENTS = 120.0  # and until Ray's own agents must be, which look for their parent now and then
MARK = "BBPROMPT_RAYKILLS"

#: Both stages, small.
STAGES = {"router.calls": 8, "router.random": 4, "prompt.popsize": 8, "prompt.dev_every": 16}


class Murderer:
    """An oracle whose workers are killed at chosen requests, before, while or after they are asked."""

    def __init__(self, inner: RayOracle, plan: dict[int, str]) -> None:
        self.inner, self.info, self.plan = inner, inner.info, dict(plan)
        self.seen, self.kills = 0, Counter[str]()
        carrier = inner._carrier
        send, result = carrier.send, carrier.result

        def sending(worker: Any, tasks: Any) -> Any:
            self.strike("before")
            ticket = send(worker, tasks)
            self.strike("during")
            return ticket

        def receiving(ticket: Any) -> Any:
            value = result(ticket)
            self.strike("after")
            return value

        carrier.send, carrier.result = sending, receiving  # type: ignore[method-assign]

    def strike(self, when: str) -> None:
        """Kill the youngest worker that lives, if now is the time."""
        if self.plan.get(self.seen) != when:
            return
        for greeting in reversed(self.inner.workers):
            if Path(f"/proc/{greeting.process}/stat").exists():
                del self.plan[self.seen]
                os.kill(greeting.process, signal.SIGKILL)
                self.kills[when] += 1
                return

    def score(self, *request: Any) -> Any:
        self.seen += 1
        return self.inner.score(*request)

    def close(self) -> None:
        self.inner.close()


class Stage:
    """Tiny model, prompts and data in a folder, and what a run in one process finds on them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.prompts = tiny_prompt.artifact_dir(root / "prompts", tiny.bert_dir(root / "bert"), "mp2-deep")
        splits = {name: tiny_prompt.pair_records(n, n) for name, n in (("train", 90), ("dev", 40), ("test", 30))}
        self.data = tiny_prompt.data_dir(root / "data", tiny_prompt.PAIR, splits)

    def settings(self, budget: int) -> dict[str, Any]:
        plain: dict[str, Any] = {"task": str(self.data / "task.yaml"), "data": str(self.data)}
        plain["prompts"] = str(self.prompts)
        # "auto" is float32 on Ray and may be mixed here.
        plain |= {"budget": budget, "threads": 1, "batch_tokens": 600, "baselines": False, "dtype": "float32"}
        return plain | {"set": STAGES}

    def words(self, folder: Path, budget: int, ray: str) -> list[str]:
        """The same on the command line."""
        words = [sys.executable, "-m", "bbprompt", "tune", "--run-dir", str(folder), "--ray", ray, "--workers", "2"]
        words += ["--task", str(self.data / "task.yaml"), "--data", str(self.data), "--prompts", str(self.prompts)]
        words += ["--budget", str(budget), "--batch-tokens", "600", "--no-baselines", "--dtype", "float32"]
        return words + [word for key, value in STAGES.items() for word in ("--set", f"{key}={value}")]

    def serial(self, budget: int) -> tuple[Any, ...]:
        """What a run in this process finds."""
        if not (self.root / f"serial-{budget}").exists():
            bbprompt.tune(run_dir=self.root / f"serial-{budget}", **self.settings(budget))
        return found(self.root / f"serial-{budget}")


def found(folder: Path) -> tuple[Any, ...]:
    """What a run found: digest, calls and prompt."""
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    return result["digest"], result["calls"], (folder / "prompt.safetensors").read_bytes()


def workers(stage: Stage, kills: int, seed: int) -> Counter[str]:
    """Runs on a Ray of this machine whose workers are killed, until so many are; the counts."""
    expected, counts, number = stage.serial(70), Counter[str](), 0
    cluster = join_cluster("local", cpus=2)
    while sum(counts[when] for when in ("before", "during", "after")) < kills:
        number += 1
        random_ = random.Random(f"{seed} {number}")
        plan = {at: random_.choice(["before", "during", "after"]) for at in random_.sample(range(2, 16), MOST_KILLS)}
        run = prepare(bbprompt.TuneConfig(**stage.settings(70), ray="local", workers=2))
        assert isinstance(run.oracle, RayOracle)
        try:
            murderer = Murderer(run.oracle, plan)
            folder = stage.root / f"workers-{number}"
            with RunDirectory.create(folder, run.manifest()) as directory:
                tune(replace(run, oracle=murderer), directory)
            lost = run.oracle.lost
        finally:
            run.oracle.close()
        where = f"seed {seed}, run {number}, {plan}"
        assert found(folder) == expected, f"{where}: differs from the run in one process"
        assert lost <= murderer.kills.total(), f"{where}: {lost} workers were lost, {murderer.kills.total()} killed"
        counts.update({"runs": 1, **murderer.kills})
    cluster.leave()
    return counts


def drivers(stage: Stage, kills: int, seed: int) -> Counter[str]:
    """Runs whose driver is killed, twice each, with a look for what is left of it; the counts."""
    expected, counts, random_ = stage.serial(400), Counter[str](), random.Random(seed)
    while counts["drivers"] < kills:
        counts["driver runs"] += 1
        folder = stage.root / f"driver-{counts['driver runs']}"
        words = stage.words(folder, 400, "local")
        for _ in range(2):
            mark = f"{os.getpid()}-{counts['drivers']}"
            log = stage.root / "driver.log"
            with log.open("wb") as out:
                environment = {**os.environ, MARK: mark}
                driver = subprocess.Popen(words, env=environment, stdout=out, stderr=subprocess.STDOUT)
            before = (folder / "curve.csv").read_text().count("\n") if (folder / "curve.csv").exists() else 0
            rows = 1 + random_.randint(0, 5) + before
            try:
                wait_for(folder / "curve.csv", "\n", rows, seconds=600, still=driver)
            except AssertionError:
                print(log.read_text(encoding="utf-8"), file=sys.stderr)
                raise
            driver.kill()
            driver.wait()
            assert not (folder / "result.json").exists(), "finished before anything happened"
            counts["drivers"] += 1
            died = time.monotonic()
            while left := marked(mark):
                workers = [line for line in left if "Agent" not in line.split()[0]]
                waited = time.monotonic() - died
                assert waited < (ORPHANS if workers else AGENTS), f"{waited:.0f} s after the driver's death: {left}"
                time.sleep(0.2)
            words = [sys.executable, "-m", "bbprompt", "resume", str(folder)]
        subprocess.run(words, check=True, capture_output=True)
        assert found(folder) == expected, f"seed {seed}: a run whose driver died differs"
    return counts


def marked(mark: str) -> list[str]:
    """Command lines of the processes that have inherited a mark."""
    wanted, lines = f"{MARK}={mark}".encode(), []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if wanted in (process / "environ").read_bytes().split(b"\0"):
                lines.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")[:80])
        except OSError:
            continue  # ended, or somebody else's
    return [line for line in lines if line]  # what ends between the two has no command line any more


def nodes(stage: Stage, kills: int) -> Counter[str]:
    """Runs on two machines, of which one loses its power; the counts. Needs network namespaces."""
    expected, counts = stage.serial(1200), Counter[str]()
    for number in range(kills):
        folder, log = stage.root / f"node-{number}", stage.root / f"node-{number}.log"
        with two_machines() as (head, other), ray_on(head, other, stage.root) as address:
            driver = head.start(*stage.words(folder, 1200, address), log=log)
            wait_for(log, other.address, seconds=600, still=driver)
            wait_for(folder / "curve.csv", "\n", 3 + number, seconds=600, still=driver)
            other.kill()
            assert not (folder / "result.json").exists(), "finished before anything happened"
            assert driver.wait(300) == 0, log.read_text(encoding="utf-8")
        assert found(folder) == expected, f"node {number}: differs from the run in one process"
        counts["nodes"] += 1
    return counts


def heads(stage: Stage, kills: int) -> Counter[str]:
    """Runs whose cluster loses its head, resumed without one; the counts. Needs network namespaces."""
    expected, counts = stage.serial(1200), Counter[str]()
    for number in range(kills):
        folder, log = stage.root / f"head-{number}", stage.root / f"head-{number}.log"
        with two_machines() as (head, other), ray_on(head, other, stage.root) as address:
            driver = other.start(*stage.words(folder, 1200, address), log=log)
            wait_for(folder / "curve.csv", "\n", 5 + number, seconds=600, still=driver)
            head.kill()
            assert not (folder / "result.json").exists(), "finished before anything happened"
            assert driver.wait(300) != 0, "Ray ends whoever has lost its head"
        subprocess.run([sys.executable, "-m", "bbprompt", "resume", str(folder)], check=True, capture_output=True)
        assert found(folder) == expected, f"head {number}: differs from the run in one process"
        counts["heads"] += 1
    return counts


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--workers", type=int, default=30)
    parser.add_argument("--drivers", type=int, default=5)
    parser.add_argument("--nodes", type=int, default=5)
    parser.add_argument("--heads", type=int, default=0)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    # Ray starts its workers at a low priority, which on a busy machine keeps them from ever starting.
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 - as Ray spells it
    with only_ray(), tempfile.TemporaryDirectory(prefix="bbk-") as name:
        stage = Stage(Path(name))
        counts = Counter[str]()
        counts += drivers(stage, given.drivers, given.seed) if given.drivers else Counter()
        reason = why_not() if given.nodes else "none wanted"
        if reason is None:
            counts += nodes(stage, given.nodes) + heads(stage, given.heads)
        missing = 0 if reason is None else given.nodes
        if given.workers + missing:
            counts += workers(stage, given.workers + missing, given.seed)
    kinds = ("before", "during", "after", "drivers", "nodes", "heads")
    note = {"no nodes": reason} if missing else {}
    print(json.dumps({"seed": given.seed, **counts, "kills": sum(counts[kind] for kind in kinds), **note}))


if __name__ == "__main__":
    main()
