"""Joining a Ray cluster, or starting one of our own on this machine, and leaving it as it was found."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bbprompt.errors import OracleError, UsageError

__all__ = ["Cluster", "join_cluster", "normal_address"]

_log = logging.getLogger("bbprompt")

_STORE = 100 * 2**20  # smallest sensible object store
_SOCKET_ROOM = 40  # longest folder under which Ray's socket paths still fit
_REACH = 10.0  # seconds to wait for a cluster's port

#: No reports to Ray's makers; nothing printed of dead workers, which is for us to say (Ray prints it to standard
#: output, where results go); no warning about GPUs that are left alone.
_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}

#: The token of this process's own clusters, once there was one: Ray keeps to the first.
_OWN_TOKEN: list[str] = []


@dataclass(frozen=True, slots=True)
class Cluster:
    """A cluster this process is joined to.

    Attributes:
        ray: The module.
        address: "local", "auto" or HOST:PORT.
        cpus: CPUs that it has now.
        gpus: GPUs that it has now.
        joined: Whether it was joined here, and is to be left by `leave`.
        folder: Where a Ray of our own keeps its files; None for others.
        variables: Environment variables that were set for it.
    """

    ray: Any
    address: str
    cpus: int
    gpus: int
    joined: bool
    folder: Path | None
    variables: tuple[str, ...] = ()

    def leave(self) -> None:
        """Leave the cluster; one of our own ends. Safe to call twice."""
        if self.joined and self.ray.is_initialized():
            self.ray.shutdown()
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
        for name in self.variables:
            os.environ.pop(name, None)


def normal_address(address: str) -> str:
    """The address as Ray takes it.

    Raises:
        UsageError: It is none.
    """
    if address in ("local", "auto"):
        return address
    if address.startswith("ray://"):
        raise UsageError(
            f"--ray {address}: Ray Client addresses are not supported; run bbprompt on a machine of the cluster with "
            "--ray auto, or send it there with `ray job submit`"
        )
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UsageError(f"--ray {address}: expected local, auto or HOST:PORT (the port of the head, usually 6379)")
    return address


def join_cluster(address: str, *, cpus: int, store: int = 0) -> Cluster:
    """Join the Ray cluster at `address`, or start one for this process.

    A process that is joined already stays where it is.

    Args:
        address: "local" starts one on this machine; "auto" takes the one this machine belongs to; or HOST:PORT.
        cpus: CPUs that a local one is to offer.
        store: Bytes that will be put into its object store.

    Raises:
        UsageError: The address is none, or Ray is not installed.
        OracleError: The cluster cannot be reached or is of another version, or the token is wrong.
    """
    address = normal_address(address)
    variables = _quiet(local=address == "local")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Ray about itself
            return _join(address, cpus, store, variables)
    except BaseException:
        for name in variables:
            os.environ.pop(name, None)
        raise


def _join(address: str, cpus: int, store: int, variables: tuple[str, ...]) -> Cluster:
    try:
        import ray
    except ImportError as error:
        raise UsageError(f"--ray needs Ray: pip install 'bbprompt[ray]' ({error})") from error
    joined, folder = not ray.is_initialized(), None
    if joined:
        settings: dict[str, Any] = {"address": address}
        if address == "local":
            folder = _short_folder()
            settings |= {"num_cpus": cpus, "include_dashboard": False, "_temp_dir": str(folder)}
            settings |= {"object_store_memory": _STORE + 2 * store}
        elif address != "auto":
            _reach(address)
        try:
            with _signals_kept():
                ray.init(**settings, log_to_driver=False, logging_level=logging.ERROR, namespace="bbprompt")
        except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            ray.shutdown()
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)
            raise OracleError(f"--ray {address}: {_reason(error)}") from error
    resources = ray.cluster_resources()
    found = int(resources.get("CPU", 0)), int(resources.get("GPU", 0))
    return Cluster(ray, address, *found, joined, folder, variables)


def _reach(address: str) -> None:
    """Look whether anything listens there: Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_REACH).close()
    except OSError as error:
        raise OracleError(
            f"--ray {address}: nothing answers there ({error.strerror or error}); is the head running, and is this its "
            "port (`ray status` on the head)?"
        ) from error


def _reason(error: Exception) -> str:
    """The first line of what Ray says, with what to do where we know it."""
    text = " ".join(str(error).split())
    lower = text.lower()
    if "version mismatch" in lower:
        return f"{text[:300]}; install the cluster's versions of Ray and Python here"
    if "auth" in lower or "token" in lower:
        return f"the cluster refuses the token ({text[:200]}); set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN to the head's"
    if "failed to connect to ray cluster" in lower:
        return (
            "the head answers but does not let this process in; RAY_AUTH_MODE and the token in RAY_AUTH_TOKEN must be "
            "the head's, and so must the version of Ray"
        )
    if "could not find any running" in lower:
        return "no cluster runs on this machine; use --ray local, or start one with `ray start --head`"
    return text[:300] or type(error).__name__


def _short_folder() -> Path:
    """A fresh folder whose path leaves room for the names of Ray's sockets (107 bytes on Linux)."""
    base = tempfile.gettempdir()
    return Path(tempfile.mkdtemp(prefix="bbray-", dir=base if len(base) <= _SOCKET_ROOM - 16 else "/tmp"))  # noqa: S108


def _quiet(local: bool) -> tuple[str, ...]:
    """Set the variables that Ray reads when it is loaded, started and called; the names of those that were not set.

    What a local one starts inherits them. It gets a token of its own, so that no other user of the machine can
    reach it and no token is written to the home directory. Ray decides on tokens when it is loaded: where others
    have loaded it before, their choice stands.
    """
    wanted = dict(_QUIET)
    if local and ("ray" not in sys.modules or _OWN_TOKEN):
        if not _OWN_TOKEN:
            _OWN_TOKEN.append(secrets.token_hex(32))
        wanted |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": _OWN_TOKEN[0]}
    new = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(new)
    return tuple(new)


@contextlib.contextmanager
def _signals_kept() -> Iterator[None]:
    """Ray takes SIGTERM for itself; ours stops a run in good order."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    kept = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, kept)
