"""What sharing work out costs and gains: the dispatcher alone, two workers against one, and 64 slow ones.

    python benchmarks/cluster.py [dispatch] [gain] [slow] [--workers 64] [--rounds 5]

"dispatch": time of a candidate that costs nothing, through 64 made-up workers and through two Ray actors. "gain": wall
time of a population of 20 on the bundled prompts' model, one Ray actor of one thread against two, interleaved; beside
it what two bare processes gain on the same cores, for cores may be shared with others. "slow": both stages of a search
whose model takes 50 ms a call, on `--workers` slots in four Ray actors that cost no CPU: the share of wall time that
the slots worked, for each stage, with and without the optimizer's own time.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from multiprocessing import get_context
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bbprompt.backends.cluster import join_cluster
from bbprompt.backends.dispatch import Dispatcher, Limits
from bbprompt.backends.rayoracle import RayOracle, open_ray
from bbprompt.config import PromptStageConfig, RouterStageConfig
from bbprompt.connect import open_oracle
from bbprompt.oracle import TextBatch
from bbprompt.prompts import ModularPrompt, bundled_prompts
from bbprompt.scoring import labelled
from bbprompt.search.stages import Incumbent, prompt_stage, router_stage
from bbprompt.tasks.data import open_data
from bbprompt.tasks.fewshot import sample
from bbprompt.tasks.task import load_task

SECONDS = 0.05


class Instant:
    """Made-up workers that answer at once."""

    def __init__(self) -> None:
        self.number = 0
        self.sizes: dict[int, int] = {}

    def start(self) -> tuple[int, int]:
        self.number += 1
        return self.number, self.number

    def greet(self, worker: int, greeting: Any) -> None: ...

    def send(self, worker: int, tasks: Sequence[Any]) -> int:
        self.number += 1
        self.sizes[self.number] = len(tasks)
        return self.number

    def wait(self, tickets: Sequence[int], seconds: float) -> Sequence[int]:
        return tickets

    def result(self, ticket: int) -> list[int]:
        return [ticket] * self.sizes.get(ticket, 1)

    def stop(self, worker: int) -> None: ...


class Sleeper:
    """A model that takes its time and no processor."""

    def hello(self) -> None: ...

    def call(self, candidates: list[int]) -> list[int]:
        time.sleep(SECONDS * sum(candidates))
        return candidates


class Slots:
    """Slots of a few actors that each take many calls at once, as a model behind a network would."""

    def __init__(self, ray: Any, slots: int, actors: int = 4) -> None:
        each = -(-slots // actors)
        make = ray.remote(Sleeper).options(num_cpus=0, max_concurrency=each, max_restarts=0, max_task_retries=0)
        self.ray, self.actors, self.count = ray, [make.remote() for _ in range(actors)], 0

    def start(self) -> tuple[int, Any]:
        self.count += 1
        return self.count - 1, self.actors[self.count % len(self.actors)].hello.remote()

    def greet(self, worker: int, greeting: Any) -> None: ...

    def send(self, worker: int, tasks: Sequence[int]) -> Any:
        return self.actors[worker % len(self.actors)].call.remote(list(tasks))

    def wait(self, tickets: Sequence[Any], seconds: float) -> Sequence[Any]:
        done, rest = self.ray.wait(list(tickets), num_returns=1, timeout=seconds)
        return list(done) + list(self.ray.wait(rest, num_returns=len(rest), timeout=0)[0] if rest else [])

    def result(self, ticket: Any) -> Any:
        return self.ray.get(ticket)

    def stop(self, worker: int) -> None: ...


def main() -> None:
    """Run what is asked for; everything if nothing is named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", default=[], choices=["dispatch", "gain", "slow", []])
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    parts = options.parts or ["dispatch", "gain", "slow"]
    prompt = ModularPrompt.load(bundled_prompts()["e5-small-mp2-deep"])
    cluster = join_cluster("local", cpus=4)
    try:
        if "dispatch" in parts:
            dispatch(cluster.ray, options.rounds)
        if "slow" in parts:
            slow(cluster.ray, prompt, options.workers)
        if "gain" in parts:
            gain(prompt, options.rounds)
    finally:
        cluster.leave()


def dispatch(ray: Any, rounds: int) -> None:
    """Cost of a task that does nothing."""
    bare = Dispatcher[int, int](Instant(), 64, Limits(message=0.0))
    bare.open()
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        bare.run(range(2000))
        times.append((time.perf_counter() - began) / 2000)
    print(f"dispatcher alone, 64 workers: {1e6 * statistics.median(times):.0f} us a task")
    actors = Dispatcher[int, int](Slots(ray, 2, actors=2), 2, Limits(message=0.0))
    actors.open()
    actors.run([0] * 50)
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        actors.run([0] * 500)
        times.append((time.perf_counter() - began) / 500)
    print(f"through two Ray actors: {1e3 * statistics.median(times):.2f} ms a message of any number of tasks")


def slow(ray: Any, prompt: ModularPrompt, workers: int) -> None:
    """Both stages on a model that takes 50 ms a call."""
    dispatcher = Dispatcher[int, int](Slots(ray, workers), workers)
    dispatcher.open()
    while dispatcher.ready < workers:
        dispatcher.run([0] * workers)
    space = prompt.space
    start = Incumbent(space.even(), 1.0)

    def stage_one(batch: int) -> Any:
        config = RouterStageConfig(calls=2 * batch, batch=batch, random=batch)
        return router_stage(config, space, space.rule, start, 0)

    print(f"{workers} slots, {1e3 * SECONDS:.0f} ms a call; busy = work / (slots x wall time)")
    print("| stage | candidates an ask | busy while scoring | busy in all | optimizer, ms a candidate |")
    print("|---|---|---|---|---|")
    stages: dict[str, tuple[Any, int]] = {
        "router, listed and random rows": (stage_one(10 * workers), 1),
        "router, by the model": (stage_one(workers), 3),
        "prompt, one wave": (prompt_stage(stage_two(workers), start, 0), 6),
        "prompt, ten waves": (prompt_stage(stage_two(10 * workers), start, 0), 4),
    }
    for name, (stage, asks) in stages.items():
        scoring = optimizing = 0.0
        candidates = 0
        for ask in range(asks):
            began = time.perf_counter()
            points = stage.ask()
            asked = time.perf_counter()
            dispatcher.run([1] * len(points))
            scored = time.perf_counter()
            stage.tell(((points - space.even()) ** 2).sum(axis=(1, 2)))
            told = time.perf_counter()
            if name == "router, by the model" and ask < 2:
                continue  # the rows before the model
            scoring += scored - asked
            optimizing += asked - began + told - scored
            candidates += len(points)
        work = candidates * SECONDS / workers
        print(
            f"| {name} | {candidates // max(asks - 2 * (name == 'router, by the model'), 1)} | {work / scoring:.1%} | "
            f"{work / (scoring + optimizing):.1%} | {1e3 * optimizing / candidates:.2f} |",
            flush=True,
        )


def stage_two(popsize: int) -> PromptStageConfig:
    """The deep method's second stage with another population."""
    return PromptStageConfig(layout="layerwise", popsize=popsize, sigma_first=0.05, sigma=0.01)


def gain(prompt: ModularPrompt, rounds: int) -> None:
    """One actor against two, and one bare process against two."""
    task = load_task("lcqmc")
    batch = labelled(task, sample(task, open_data(task, "sample").split("train"), 42, None).train, for_loss=True).batch
    rng = np.random.default_rng(0)
    everywhere = np.repeat(prompt.space.even()[None], 20, axis=0)
    everywhere += rng.normal(0, 0.05, everywhere.shape)
    layer = np.repeat(prompt.space.even()[None], 20, axis=0)
    layer[:, 6] += rng.normal(0, 0.05, layer[:, 6].shape)
    oracles = [open_ray("local", prompt, workers=count, threads=1) for count in (1, 2)]
    for oracle in oracles:
        while len(oracle.workers) < oracle._dispatcher._size:
            oracle.score(batch, everywhere)
    for name, points in (("all layers", everywhere), ("layer 6", layer)):
        times: list[list[float]] = [[], []]
        for _ in range(rounds + 1):
            for number, oracle in enumerate(oracles):
                times[number].append(timed(oracle, batch, points))
        ratios = [one / two for one, two in zip(times[0][1:], times[1][1:], strict=True)]
        one, two = (statistics.median(values[1:]) for values in times)
        print(
            f"population of 20, {name}: one actor {one:.2f} s, two {two:.2f} s: {one / two:.2f} times "
            f"(rounds {', '.join(f'{ratio:.2f}' for ratio in ratios)})",
            flush=True,
        )
    for oracle in oracles:
        oracle.close()
    print(f"bare processes without Ray, same work: {bare(prompt, batch, everywhere, rounds):.2f} times", flush=True)


def timed(oracle: RayOracle, batch: TextBatch, points: NDArray[np.floating]) -> float:
    """Seconds of one request."""
    began = time.perf_counter()
    oracle.score(batch, points)
    return time.perf_counter() - began


def bare(prompt: ModularPrompt, batch: TextBatch, points: NDArray[np.floating], rounds: int) -> float:
    """Speed of two processes that each score half, over one that scores all: what these cores allow."""
    context = get_context("spawn")
    pipes = [context.Pipe() for _ in range(2)]
    children = [context.Process(target=child, args=(end, prompt, batch, points), daemon=True) for _, end in pipes]
    for process in children:
        process.start()
    for pipe, _ in pipes:
        pipe.recv()
    ratios = []
    for _ in range(rounds):
        spent = []
        for shares in ([(0, 20)], [(0, 10), (10, 20)]):
            began = time.perf_counter()
            for (pipe, _), share in zip(pipes, shares, strict=False):
                pipe.send(share)
            for (pipe, _), _ in zip(pipes, shares, strict=False):
                pipe.recv()
            spent.append(time.perf_counter() - began)
        ratios.append(spent[0] / spent[1])
    for process in children:
        process.terminate()
    return statistics.median(ratios)


def child(pipe: Any, prompt: ModularPrompt, batch: TextBatch, points: NDArray[np.floating]) -> None:
    """Score the asked share of the points, again and again."""
    oracle = open_oracle("local", prompt, threads=1)
    oracle.score(batch, points[:2])
    pipe.send(None)
    while True:
        first, last = pipe.recv()
        oracle.score(batch, points[first:last])
        pipe.send(None)


if __name__ == "__main__":
    main()
