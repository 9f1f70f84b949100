"""The runs of a sweep on a Ray cluster: each in a process of its own, on a machine that has room for it.

A run on a cluster is what it is here, `bbprompt.sweep.job.start_local`, held by an actor. The actor's end closes the
pipe to the run, which then stops at its next safe point; so a driver that is killed takes its runs along, for Ray ends
the actors of a driver that is gone. Ray starts nothing twice: a run whose machine was lost is named as failed, and
goes on where it was when the sweep is called again.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bbprompt import __version__
from bbprompt.backends.cluster import Cluster, join_cluster
from bbprompt.errors import BBPromptError, UsageError
from bbprompt.sweep.experiment import Cell
from bbprompt.sweep.job import LocalJob, finished, locked, start_local
from bbprompt.sweep.runner import SWEEP

__all__ = ["RayJob", "RayRuns", "open_ray_runs"]

_log = logging.getLogger("bbprompt")

_SHARED = ("BBPROMPT_DATA",)  # variables that say what a run reads; they hold on every machine
_SEEN = 90.0  # seconds until what happened on another machine must be seen here; NFS looks again after 60
_GRACE = 5.0  # seconds to wait for a run that was killed
_TICK = 0.1

_OVER = (75, "stopped before it began")


class RayRuns:
    """Starts runs on a cluster; to be closed.

    Args:
        cluster: Joined; it is left by `close`.
    """

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._environment = {name: os.environ[name] for name in _SHARED if name in os.environ}
        if "BBPROMPT_DATA" in self._environment:
            self._environment["BBPROMPT_DATA"] = str(Path(self._environment["BBPROMPT_DATA"]).resolve())

    def start(self, cell: Cell, out: Path) -> RayJob:
        """Begin a run, or go on with it, on whatever machine has its CPUs, and its GPU if it takes one."""
        ray, out = self._cluster.ray, out.resolve()
        actor = (
            ray.remote(_Runner)
            .options(
                num_cpus=cell.config.threads or 1,
                num_gpus=int(cell.config.device != "cpu" and self._cluster.gpus > 0),
                max_restarts=0,
                max_task_retries=0,
                max_concurrency=3,  # it is asked to stop while it waits for the run
            )
            .remote()
        )
        mark = hashlib.sha256((out / SWEEP).read_bytes()).hexdigest()
        return RayJob(ray, actor, cell, out, mark, self._environment)

    def close(self) -> None:
        """Leave the cluster; safe to call twice."""
        self._cluster.leave()


class RayJob:
    """A run on a cluster; see `bbprompt.sweep.job.Job` for the methods."""

    def __init__(self, ray: Any, actor: Any, cell: Cell, out: Path, mark: str, environment: Mapping[str, str]) -> None:
        self._ray, self._actor, self._run = ray, actor, out / cell.name
        self._there = actor.node.remote()
        self._end = actor.work.remote(cell, str(out), mark, __version__, dict(environment))
        self._over: tuple[int, str] | None = None
        self._lost = False
        self._since: float | None = None

    def poll(self) -> int | None:
        """Its exit code, or None while it runs."""
        if self._over is None and self._ray.wait([self._end], timeout=0)[0]:
            over = self._result()
            # A result may have to travel to this machine yet, and what is left of a lost run to come to its end.
            pending = (over[0] == 0 and not finished(self._run)) or (self._lost and locked(self._run))
            if pending and not self._too_long():
                return None
            self._finish(over)
        return None if self._over is None else self._over[0]

    def stop(self) -> None:
        """Ask it to stop at its next safe point; one that has not begun never will."""
        if self._over is not None:
            return
        if self._ray.wait([self._there], timeout=0)[0]:
            self._actor.stop.remote()
        else:
            self._finish(_OVER)

    def kill(self) -> None:
        """End it at once."""
        if self._over is None:
            self._actor.kill.remote()
            self._ray.wait([self._end], timeout=_GRACE)
            self._finish((-9, ""))

    def wait(self) -> int:
        """Wait for its end; the exit code."""
        while (code := self.poll()) is None:
            time.sleep(_TICK)
        return code

    def last_words(self) -> str:
        """The last line that it wrote to standard error, or why it has none."""
        return "" if self._over is None else self._over[1]

    def _result(self) -> tuple[int, str]:
        try:
            code, words = self._ray.get(self._end)
        except self._ray.exceptions.RayTaskError as error:
            return 69, f"a machine of the cluster failed: {' '.join(str(error.cause).split())[:300]}"
        except self._ray.exceptions.RayError as error:
            text = " ".join(str(error).split())
            if "ModuleNotFoundError" in text or "ImportError" in text:
                return 69, f"a machine of the cluster cannot import bbprompt {__version__}; install it there"
            self._lost = True
            return 69, f"its machine or worker was lost ({type(error).__name__}); sweep again to go on"
        return int(code), str(words)

    def _too_long(self) -> bool:
        now = time.monotonic()
        self._since = now if self._since is None else self._since
        return now - self._since > _SEEN

    def _finish(self, over: tuple[int, str]) -> None:
        self._over = over
        self._ray.kill(self._actor, no_restart=True)


class _Runner:
    """A run on the machine that it was sent to."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._job: LocalJob | None = None
        self._stopped = False

    def node(self) -> str:
        """The machine, once there is one."""
        return os.uname().nodename

    def work(self, cell: Cell, out: str, mark: str, version: str, environment: dict[str, str]) -> tuple[int, str]:
        """Run it to its end: exit code and last words."""
        node = os.uname().nodename
        if version != __version__:
            return 69, f"{node} has bbprompt {__version__}, not {version}; install the same version on all machines"
        try:
            same = hashlib.sha256((Path(out) / SWEEP).read_bytes()).hexdigest() == mark
        except OSError:
            same = False
        if not same:
            return (
                74,
                f"{node} does not see {out} as it is here; --out must lie on a file system that all machines share",
            )
        os.environ.update(environment)
        with self._lock:
            if self._stopped:
                return _OVER
            try:
                self._job = start_local(cell, Path(out))
            except BBPromptError as error:
                return error.exit_code, str(error)
        return self._job.wait(), self._job.last_words()

    def stop(self) -> None:
        """Ask it to stop."""
        with self._lock:
            self._stopped = True
            if self._job is not None:
                self._job.stop()

    def kill(self) -> None:
        """End it at once."""
        with self._lock:
            self._stopped = True
            if self._job is not None:
                self._job.kill()


def open_ray_runs(
    address: str, cells: Mapping[str, Cell], workers: int | None = None, cores: int = 1
) -> tuple[RayRuns, int]:
    """Join a cluster for the runs of a sweep.

    Args:
        address: "local", "auto" or HOST:PORT.
        cells: The runs.
        workers: Runs at a time; None for as many as the cluster holds now.
        cores: CPUs of this machine, which a local Ray offers.

    Returns:
        What starts runs, and how many at a time.

    Raises:
        UsageError: The address is none, Ray is not installed, there is no GPU, or the runs use Ray themselves.
        OracleError: The cluster cannot be reached.
    """
    configs = [cell.config for cell in cells.values()]
    if any(config.ray is not None for config in configs):
        raise UsageError(
            "--ray: runs of this experiment use Ray themselves (their key `ray`); leave out one of the two"
        )
    threads = max((config.threads or 1 for config in configs), default=1)
    cluster = join_cluster(address, cpus=max(cores, (workers or 1) * threads))
    try:
        if not cluster.gpus and any(config.device == "cuda" for config in configs):
            raise UsageError(f"--device cuda: the Ray cluster at {address} has no GPU; use --device cpu")
        on_gpus = cluster.gpus if any(config.device != "cpu" for config in configs) else 0
        most = on_gpus or max(cluster.cpus // threads, 1)
        if workers is not None and workers > most:
            _log.warning("--workers %d: the cluster holds %d runs now; the rest waits for more machines", workers, most)
        largest = max(
            (int(node["Resources"].get("CPU", 0)) for node in cluster.ray.nodes() if node["Alive"]), default=0
        )
        if threads > largest:
            _log.warning(
                "a run takes %d CPUs and the largest machine has %d; it waits for a larger one", threads, largest
            )
        return RayRuns(cluster), workers or most
    except BaseException:
        cluster.leave()
        raise
