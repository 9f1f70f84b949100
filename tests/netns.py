"""Two machines out of one: network namespaces joined by a cable, with a Ray node in each.

Everything is ended by recorded process ids: `ray stop` would end other people's clusters too.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

PORT = 6379
RAY = (sys.executable, "-m", "ray.scripts.scripts")


@dataclass(frozen=True)
class Machine:
    """A namespace with its address and the environment for what runs in it."""

    name: str
    address: str
    environment: dict[str, str]

    def command(self, *words: str) -> list[str]:
        return ["ip", "netns", "exec", self.name, *words]

    def start(self, *words: str, log: Path) -> subprocess.Popen[bytes]:
        with log.open("wb") as out:
            return subprocess.Popen(self.command(*words), env=self.environment, stdout=out, stderr=subprocess.STDOUT)

    def processes(self) -> list[int]:
        done = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True, check=False)
        return [int(word) for word in done.stdout.split()]

    def kill(self) -> None:
        """As if the power had failed: every process in it, at once."""
        for process in self.processes():
            try:
                os.kill(process, signal.SIGKILL)
            except ProcessLookupError:
                continue


def why_not() -> str | None:
    """Why namespaces cannot be made here."""
    if shutil.which("ip") is None:
        return "the command `ip` is not installed"
    name = f"bbtry{os.getpid()}"
    done = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)
    return None if done.returncode == 0 else f"network namespaces are not permitted: {done.stderr.strip()}"


@contextmanager
def two_machines() -> Iterator[tuple[Machine, Machine]]:
    """Two namespaces that reach each other and nothing else."""
    token, number = secrets.token_hex(32), os.getpid()
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token, "RAY_USAGE_STATS_ENABLED": "0"}
    machines = tuple(Machine(f"bb{number}{end}", f"10.213.7.{i}", environment) for i, end in ((1, "a"), (2, "b")))
    cables = [f"bv{number}{end}" for end in "ab"]

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)

    try:
        for machine in machines:
            ip("netns", "add", machine.name)
        ip("link", "add", cables[0], "type", "veth", "peer", "name", cables[1])
        for machine, cable in zip(machines, cables, strict=True):
            ip("link", "set", cable, "netns", machine.name)
            ip("-n", machine.name, "address", "add", f"{machine.address}/24", "dev", cable)
            ip("-n", machine.name, "link", "set", cable, "up")
            ip("-n", machine.name, "link", "set", "lo", "up")
        yield machines[0], machines[1]
    finally:
        for machine in machines:
            machine.kill()
            subprocess.run(["ip", "netns", "delete", machine.name], check=False, capture_output=True)


@contextmanager
def ray_on(head: Machine, other: Machine, logs: Path) -> Iterator[str]:
    """A Ray cluster of both machines, one CPU each; its address."""
    folder = Path(tempfile.mkdtemp(prefix="bbns-", dir="/tmp"))  # short, for the sake of socket names
    address = f"{head.address}:{PORT}"
    common = ["--num-cpus=1", f"--object-store-memory={100 * 2**20}", "--block"]
    started = []
    try:
        node = [*RAY, "start", "--head", f"--node-ip-address={head.address}", f"--port={PORT}", f"--temp-dir={folder}"]
        started.append(head.start(*node, "--include-dashboard=false", *common, log=logs / "head.log"))
        wait_for(logs / "head.log", "Ray runtime started")
        node = [*RAY, "start", f"--address={address}", f"--node-ip-address={other.address}"]
        started.append(other.start(*node, *common, log=logs / "other.log"))
        wait_for(logs / "other.log", "Ray runtime started")
        yield address
    finally:
        head.kill()
        other.kill()
        for process in started:
            process.wait(30)
        shutil.rmtree(folder, ignore_errors=True)


def wait_for(
    file: Path, text: str, count: int = 1, seconds: float = 150.0, still: subprocess.Popen[bytes] | None = None
) -> None:
    """Wait until a file holds a text so many times."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and (still is None or still.poll() is None):
        if file.exists() and file.read_text(encoding="utf-8", errors="replace").count(text) >= count:
            return
        time.sleep(0.05)
    held = file.read_text(encoding="utf-8", errors="replace")[-2000:] if file.exists() else "(no file)"
    raise AssertionError(f"{file} does not hold {text!r} {count} times: {held}")
