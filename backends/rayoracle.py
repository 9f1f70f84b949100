"""The local oracle on many workers of a Ray cluster: each population is shared out, the scores are the same bits."""

from __future__ import annotations

import logging
import math
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bbprompt import __version__, errors
from bbprompt.backends.cluster import Cluster, join_cluster
from bbprompt.backends.dispatch import Dispatcher, Limits, WorkerLost
from bbprompt.backends.rayworker import Failure, Greeting, Model, Request, Worker
from bbprompt.errors import OracleError, UsageError
from bbprompt.oracle import OracleInfo, Scores, Support, TextBatch, check_points
from bbprompt.prompts import ModularPrompt
from bbprompt.units import Unit, best_batch_tokens, join, plan_units

__all__ = ["RayOracle", "open_ray", "share_of_gpu"]

_log = logging.getLogger("bbprompt")

_KEPT_BATCHES = 8

#: A request, the references of its texts and points, and the unit; None asks for the size of a unit.
_Task = tuple[Request, Any, Any, Unit | None]


class RayOracle:
    """Oracles in the actors of a Ray cluster, used as one.

    A request is cut into units by its own size alone (`bbprompt.units`), and any worker computes a unit to the same
    bits; so a reply does not depend on how many workers there are, which of them die, or who is first. Ray is told
    never to start or send anything twice: `Dispatcher` alone does.

    Args:
        cluster: Joined; it is left by `close`.
        prompt: The artifact, put into the object store once.
        model: How each worker opens its model, from the files of its machine.
        workers: How many.
        gpus: Share of a GPU for each worker; 0 for none.
        limits: When to give up on a worker.

    Raises:
        OracleError: No worker starts.
        ArtifactError: A worker cannot load backbone or prompts.
    """

    def __init__(
        self,
        cluster: Cluster,
        prompt: ModularPrompt,
        model: Model,
        workers: int,
        gpus: float = 0.0,
        limits: Limits | None = None,
    ) -> None:
        self._cluster = cluster
        self._carrier = _RayCarrier(cluster.ray, model, prompt, gpus)
        self._dispatcher: Dispatcher[_Task, Any] = Dispatcher(self._carrier, workers, limits)
        self._texts: OrderedDict[str, Any] = OrderedDict()
        self._at_once: dict[tuple[str, Support], int] = {}
        self._requests = 0
        self._closed = False
        try:
            self._dispatcher.open()
        except BaseException:
            self.close()
            raise

    @property
    def info(self) -> OracleInfo:
        """What each worker's oracle is; they are all the same."""
        return self._carrier.first.info

    @property
    def workers(self) -> tuple[Greeting, ...]:
        """The workers that have ever started, in order."""
        return tuple(self._carrier.greetings)

    @property
    def lost(self) -> int:
        """How many workers were lost so far."""
        return self._dispatcher.lost

    def score(
        self,
        batch: TextBatch,
        points: NDArray[np.floating],
        support: Support = "candidates",
        longest_answer: int | None = None,
    ) -> Scores:
        """Score every candidate on every text; see `bbprompt.oracle.Oracle`."""
        if self._closed:
            raise OracleError("the Ray oracle is closed")
        checked = check_points(points, self.info)
        digest = batch.digest()
        texts = self._put_texts(digest, batch)
        self._requests += 1
        number = self._requests
        if (digest, support) not in self._at_once:
            question = Request(number, digest, support, longest_answer)
            [self._at_once[digest, support]] = self._dispatcher.run([(question, texts, None, None)])
        units = plan_units(len(checked), self._at_once[digest, support])
        reference = self._cluster.ray.put(checked)
        request = Request(number, digest, support, longest_answer)
        return join(self._dispatcher.run([(request, texts, reference, unit) for unit in units]))

    def close(self) -> None:
        """End the workers and leave the cluster; safe to call twice."""
        if self._closed:
            return
        self._closed = True
        if self._cluster.ray.is_initialized():
            self._dispatcher.close()
        self._texts.clear()
        self._carrier.forget()
        self._cluster.leave()

    def _put_texts(self, digest: str, batch: TextBatch) -> Any:
        if digest not in self._texts:
            self._texts[digest] = self._cluster.ray.put(batch)
            if len(self._texts) > _KEPT_BATCHES:
                old, _ = self._texts.popitem(last=False)
                self._at_once = {key: value for key, value in self._at_once.items() if key[0] != old}
        self._texts.move_to_end(digest)
        return self._texts[digest]


class _RayCarrier:
    """Carries tasks to actors. Tickets are object references."""

    def __init__(self, ray: Any, model: Model, prompt: ModularPrompt, gpus: float) -> None:
        self._ray, self._model = ray, model
        self._prompt: Any = ray.put(prompt)
        self._actor = ray.remote(_Actor).options(
            num_cpus=model.threads, num_gpus=gpus, max_restarts=0, max_task_retries=0
        )
        self.greetings: list[Greeting] = []

    @property
    def first(self) -> Greeting:
        """The greeting that all others must agree with."""
        return self.greetings[0]

    def start(self) -> tuple[Any, Any]:
        actor = self._actor.remote()
        # In a list a reference stays a reference; as an argument of its own it would be fetched by Ray each time.
        return actor, actor.open.remote(self._model, [self._prompt])

    def greet(self, worker: Any, greeting: Greeting) -> None:
        self.greetings.append(greeting)
        first = self.first
        if greeting.info != first.info:
            differs = _difference(first.info, greeting.info)
            raise OracleError(
                f"the workers on {first.node} and {greeting.node} differ: {differs}; install the same versions and the "
                "same weights on all machines"
            )
        _log.info("worker %d: process %d on %s", len(self.greetings), greeting.process, greeting.node)
        if greeting.processor != first.processor:
            _log.warning(
                "workers run on different processors (%s: %s; %s: %s): scores may differ in their last digits, and "
                "a run need not repeat exactly",
                first.node,
                first.processor,
                greeting.node,
                greeting.processor,
            )

    def send(self, worker: Any, tasks: Sequence[_Task]) -> Any:
        request, texts, points, _ = tasks[0]  # the tasks of a run are of one request
        return worker.answer.remote(request, [texts, points], [unit for *_, unit in tasks])

    def wait(self, tickets: Sequence[Any], seconds: float) -> Sequence[Any]:
        done, rest = self._ray.wait(list(tickets), num_returns=1, timeout=seconds)
        if done and rest:
            done += self._ray.wait(rest, num_returns=len(rest), timeout=0)[0]
        return list(done)

    def result(self, ticket: Any) -> Any:
        exceptions = self._ray.exceptions
        try:
            value = self._ray.get(ticket)
        except exceptions.RayTaskError as error:
            raise OracleError(f"a worker failed: {' '.join(str(error.cause).split())[:300]}") from error
        except exceptions.RayError as error:
            text = " ".join(str(error).split())
            if "ModuleNotFoundError" in text or "ImportError" in text:
                raise OracleError(
                    f"a machine of the cluster cannot import what is needed; install bbprompt {__version__} there, "
                    f"with the same libraries ({text[-200:]})"
                ) from error
            raise WorkerLost(f"{type(error).__name__}: {text[:200]}") from error
        if isinstance(value, Failure):
            kind = getattr(errors, value.kind)
            raise kind(value.message)
        return value

    def stop(self, worker: Any) -> None:
        self._ray.kill(worker, no_restart=True)

    def forget(self) -> None:
        """Let go of what lies in the object store."""
        self._prompt = None


class _Actor:
    """A `Worker` as Ray runs it."""

    def __init__(self) -> None:
        ray = _ray()
        self._worker = Worker(ray.get)
        self._node = ray.util.get_node_ip_address()

    def open(self, model: Model, references: list[Any]) -> Any:
        return self._worker.open(model, references[0], self._node)

    def answer(self, request: Request, references: list[Any], units: list[Unit | None]) -> Any:
        return self._worker.answer(request, references[0], references[1], units)


def _ray() -> Any:
    import ray

    return ray


def _difference(ours: OracleInfo, theirs: OracleInfo) -> str:
    """The first thing in which two workers differ, in words."""
    return next(
        f"{name} is {getattr(ours, name)} and {getattr(theirs, name)}"
        for name in OracleInfo.__slots__
        if getattr(ours, name) != getattr(theirs, name)
    )


def share_of_gpu(workers: int, gpus: int) -> float:
    """How much of a GPU each of some workers takes so that all of them find a place: 1, or 1/2, or 1/3 and so on.

    A worker never has parts of two GPUs, so what counts is how many must share one.
    """
    return 1.0 / math.ceil(workers / gpus)


def open_ray(
    address: str,
    prompt: ModularPrompt,
    *,
    workers: int | None = None,
    backbone: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    batch_tokens: int | None = None,
    max_tokens: int | None = None,
    threads: int | None = None,
    cores: int = 1,
    limits: Limits | None = None,
) -> RayOracle:
    """Open an oracle on a Ray cluster.

    Args:
        address: "local", "auto" or HOST:PORT.
        prompt: The artifact.
        workers: How many; None for one for each GPU, or as many as the cluster's CPUs hold.
        backbone: See `bbprompt.connect.open_oracle`, as are the following; a path must exist on every machine.
        device: "auto" takes GPUs if the cluster has any.
        dtype: Precision.
        batch_tokens: Tokens at once; None for the best of the device. How much memory is free may differ between
            workers, and what they compute together must not.
        max_tokens: Longest sequence.
        threads: CPU threads, and CPUs, of each worker; None for 1. It does not follow from the number of workers,
            for the number of threads changes the last bits of a score.
        cores: CPUs of this machine, which a local Ray offers.
        limits: When to give up on a worker.

    Raises:
        UsageError: The address is none, there is no GPU, or Ray is not installed.
        OracleError: The cluster cannot be reached or no worker starts.
        ArtifactError: A worker cannot load backbone or prompts.
    """
    if dtype == "mixed":
        raise UsageError(
            "--dtype mixed: a population is scored whole, and --ray shares it out; begin the run with float32"
        )
    each = threads or 1
    size = sum(array.nbytes for array in (prompt.projection, prompt.modules, prompt.routers, prompt.head_weight))
    cluster = join_cluster(address, cpus=max(cores, (workers or 1) * each), store=size)
    try:
        if device == "cuda" and not cluster.gpus:
            raise UsageError(f"--device cuda: the Ray cluster at {address} has no GPU; use --device cpu")
        chosen = "cuda" if device != "cpu" and cluster.gpus else "cpu"
        count = workers or (cluster.gpus if chosen == "cuda" else max(cluster.cpus // each, 1))
        gpus = 0.0
        if chosen == "cuda":
            gpus = share_of_gpu(count, cluster.gpus)
        elif count * each > cluster.cpus:
            _log.warning(
                "--workers %d of %d threads: the cluster has %d CPUs now; the rest starts when there are more",
                count,
                each,
                cluster.cpus,
            )
        named = backbone or prompt.config.backbone
        if Path(named).is_dir():
            named = str(Path(named).absolute())  # a worker stands in another folder
        tokens = batch_tokens or best_batch_tokens(chosen)
        model = Model(named, chosen, "float32" if dtype == "auto" else dtype, tokens, max_tokens, each)
        return RayOracle(cluster, prompt, model, count, gpus, limits)
    except BaseException:
        cluster.leave()
        raise
