"""What sharing work out costs and gains: the dispatcher alone, two workers against one, and many slow ones.

"dispatcher": time of a candidate that costs nothing, through 64 made-up workers and through two Ray actors. "workers":
wall time of a population of 20 on the bundled prompts' model, one Ray actor of one thread against two, interleaved;
beside it what two bare processes gain on the same cores, for cores may be shared with others. "slow": a whole search by
`mp2-deep` whose model takes 50 ms a call, on many slots in four Ray actors that cost no CPU: the share of wall time
that the slots worked, in each stage, with everything that is not the model counted as idle.
"""

from __future__ import annotations

import gc
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bbprompt.backends.cluster import join_cluster
from bbprompt.backends.dispatch import Dispatcher, Limits
from bbprompt.backends.rayoracle import RayOracle, open_ray
from bbprompt.config import load_method, method_with
from bbprompt.connect import open_oracle
from bbprompt.oracle import OracleInfo, Scores, Support, TextBatch
from bbprompt.prompts import ModularPrompt, resolve_prompts
from bbprompt.readout import Readout
from bbprompt.scoring import Labelled, labelled
from bbprompt.search.evaluate import Evaluator
from bbprompt.search.tuner import search
from bbprompt.store.journal import Journal
from bbprompt.store.ledger import Ledger
from bbprompt.tasks.data import open_data
from bbprompt.tasks.fewshot import sample
from bbprompt.tasks.task import Task, load_task
from benchmarks.goal import goal

__all__ = ["dispatcher", "slow", "workers"]

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


def sleeper() -> type:
    """A model that takes its time and no processor; made here so that Ray sends it along."""

    class Sleeper:
        def hello(self) -> None: ...

        def call(self, candidates: list[int]) -> list[int]:
            time.sleep(SECONDS * sum(candidates))
            return candidates

    return Sleeper


class Slots:
    """Slots of a few actors that each take many calls at once, as a model behind a network would."""

    def __init__(self, ray: Any, slots: int, actors: int = 4) -> None:
        each = -(-slots // actors)
        make = ray.remote(sleeper()).options(num_cpus=0, max_concurrency=each, max_restarts=0, max_task_retries=0)
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


class Slow:
    """A model elsewhere whose scores are made up here: the nearer to the untuned prompt, the better."""

    def __init__(self, prompt: ModularPrompt, dispatcher: Dispatcher[int, int]) -> None:
        config = prompt.config
        self.info = OracleInfo(
            "slow", "0" * 64, "0" * 64, config.layers, config.intrinsic_dim, "float32", "nowhere", max_tokens=512
        )
        self._even, self._dispatcher = prompt.space.even(), dispatcher
        self.calls: list[tuple[int, float]] = []  # candidates and seconds of each request

    def score(
        self,
        batch: TextBatch,
        points: NDArray[np.floating],
        support: Support = "candidates",
        longest_answer: int | None = None,
    ) -> Scores:
        began = time.perf_counter()
        self._dispatcher.run([1] * len(points))
        self.calls.append((len(points), time.perf_counter() - began))
        far = ((points - self._even) ** 2).sum(axis=(1, 2), dtype=np.float32)
        logits = np.repeat(far[:, None, None], sum(batch.sizes), axis=1) * np.array([0.1, 0.2], dtype=np.float32)
        normalizer = np.repeat(far[:, None, None], len(batch.forms), axis=1) + np.ones(2, dtype=np.float32)
        return Scores(logits, normalizer, None, 0)

    def take(self, calls: int) -> list[tuple[int, float]]:
        """The next requests that make up so many calls."""
        taken = []
        while calls > 0:
            taken.append(self.calls.pop(0))
            calls -= taken[-1][0]
        return taken

    def close(self) -> None: ...


@contextmanager
def cluster() -> Iterator[Any]:
    """Ray on a cluster of its own."""
    joined = join_cluster("local", cpus=4)
    try:
        yield joined.ray
    finally:
        joined.leave()


def dispatcher(rounds: int) -> list[str]:
    """Cost of a task that does nothing."""
    bare = Dispatcher[int, int](Instant(), 64, Limits(message=0.0))
    bare.open()
    alone = []
    for _ in range(rounds):
        began = time.perf_counter()
        bare.run(range(2000))
        alone.append((time.perf_counter() - began) / 2000)
    through = []
    with cluster() as ray:
        actors = Dispatcher[int, int](Slots(ray, 2, actors=2), 2, Limits(message=0.0))
        actors.open()
        actors.run([0] * 50)
        for _ in range(rounds):
            began = time.perf_counter()
            actors.run([0] * 500)
            through.append((time.perf_counter() - began) / 500)
    return [
        "| what | ms |",
        "|---|---|",
        f"| a candidate, by the dispatcher alone, 64 workers | {1e3 * statistics.median(alone):.3f} |",
        f"| a message of any number of candidates, through two Ray actors | {1e3 * statistics.median(through):.2f} |",
    ]


def slow(slots: int, waves: int, asks: int) -> list[str]:
    """A whole search on a model that takes 50 ms a call, ledger and journal on disk included."""
    ask = waves * slots
    settings = {
        "router.batch": ask,
        "router.ahead": True,
        "router.random": 64,
        "router.calls": (1 + asks) * ask,
        "router.share": 1.0,
        "router.dev_every": asks * ask,
        "prompt.popsize": ask,
        "prompt.dev_every": asks * ask,
        "prompt.patience": None,
    }
    method = method_with(load_method("mp2-deep"), settings)
    prompt = ModularPrompt.load(resolve_prompts(method.prompts))
    task, few = few_shot_sets()
    budget = 2 + 2 * len(prompt.space.routers) + (1 + asks) * ask + 2 * asks * ask + 8
    with cluster() as ray, tempfile.TemporaryDirectory() as folder:
        shared = Dispatcher[int, int](Slots(ray, slots), slots)
        shared.open()
        while shared.ready < slots:
            shared.run([0] * slots)
        oracle = Slow(prompt, shared)
        journal = Journal(Path(folder) / "journal.log", "benchmark")
        try:
            evaluator = Evaluator(oracle, Ledger(journal, budget), Readout(), task, *few)
            gc.freeze()  # as the command does
            began = time.perf_counter()
            found = search(method, prompt.space, evaluator, 42, lambda status: None)
            whole = time.perf_counter() - began
        finally:
            gc.unfreeze()
            journal.close()
    lines = [
        f"{slots} slots, {1e3 * SECONDS:.0f} ms a call, {ask} candidates an ask (routers ahead), a look at dev (one "
        f"call, for which the other slots wait) every {asks} asks. Busy: calls x {1e3 * SECONDS:.0f} ms / "
        "(slots x seconds).",
        "",
        "| stage | calls | seconds | busy while scoring candidates | busy in the whole stage | besides, ms a call |",
        "|---|---|---|---|---|---|",
    ]
    busy = {}
    oracle.take(2)  # the untuned prompt, before the first stage
    for trace in found.stages:
        requests = oracle.take(trace.calls)
        candidates, seconds = (sum(column) for column in zip(*(r for r in requests if r[0] > 1), strict=True))
        beside = trace.seconds - sum(each for _, each in requests)
        share = SECONDS / slots
        busy[trace.name] = share * trace.calls / trace.seconds
        lines.append(
            f"| {trace.name}, {trace.optimizer} | {trace.calls} | {trace.seconds:.2f} "
            f"| {share * candidates / seconds:.1%} | {busy[trace.name]:.1%} "
            f"| {1e3 * beside / trace.calls:.3f} |"
        )
    lines += [
        "",
        f"The whole search, with what it loads between stages: {evaluator.spent} calls in {whole:.2f} s, busy "
        f"{SECONDS / slots * evaluator.spent / whole:.1%}.",
    ]
    return [*lines, "", goal("busy in stages I and II", 0.9, [busy["router"], busy["prompt"]])]


def few_shot_sets() -> tuple[Task, tuple[Labelled, Labelled]]:
    """A task of pairs, and 32 examples each for train and dev from the bundled sample."""
    task = load_task("lcqmc")
    few = sample(task, open_data(task, "sample").split("train"), 42, None)
    return task, (labelled(task, few.train, for_loss=True), labelled(task, few.dev, for_loss=True))


def workers(rounds: int, texts: int) -> list[str]:
    """One actor against two, and one bare process against two."""
    prompt = ModularPrompt.load(resolve_prompts(load_method("mp2-deep").prompts))
    batch = TextBatch(few_shot_sets()[1][0].batch.forms[:texts])
    rng = np.random.default_rng(0)
    everywhere = np.repeat(prompt.space.even()[None], 20, axis=0)
    everywhere += rng.normal(0, 0.05, everywhere.shape)
    layer, middle = np.repeat(prompt.space.even()[None], 20, axis=0), prompt.config.layers // 2
    layer[:, middle] += rng.normal(0, 0.05, layer[:, middle].shape)
    lines = [
        "| a population of 20 | one actor, s | two actors, s | times as fast, median | rounds |",
        "|---|---|---|---|---|",
    ]
    with cluster():
        oracles = [open_ray("local", prompt, workers=count, threads=1) for count in (1, 2)]
        for oracle, count in zip(oracles, (1, 2), strict=True):
            while len(oracle.workers) < count:
                oracle.score(batch, everywhere)
        medians: list[float] = []
        for name, points in (("that differs in all layers", everywhere), (f"that differs in layer {middle}", layer)):
            times = [[timed(oracle, batch, points) for oracle in oracles] for _ in range(rounds + 1)][1:]
            ratios = [one / two for one, two in times]
            medians.append(statistics.median(ratios))
            one, two = (statistics.median(column) for column in zip(*times, strict=True))
            each = ", ".join(f"{ratio:.2f}" for ratio in ratios)
            lines.append(f"| {name} | {one:.2f} | {two:.2f} | {medians[-1]:.2f} | {each} |")
        for oracle in oracles:
            oracle.close()
    allowed = bare(prompt, batch, everywhere, rounds)
    return [
        *lines,
        "",
        goal("two actors / one, whole populations", 1.8, medians[:1]),
        "",
        f"Two bare processes without Ray are {allowed:.2f} times as fast as one on these cores.",
    ]


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
