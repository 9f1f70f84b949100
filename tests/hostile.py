"""Hostile requests to a real server in a process of its own, over bare sockets.

``python tests/hostile.py --mutants 150 --seed 1`` sends everything in `attacks` and so many mutants of sound requests.
After each of them a sound request is answered, no answer is a 5xx, nothing appears in the server's folder, and its
memory has not grown by more than `MOST_GROWTH`. The last line is a JSON object with the counts.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fuzztargets
from attacks import CANARY, DIGEST, MOST_GROWTH, REFUSED, SCORE, SETTINGS, TEXTS, Attack, attacks, http
from servers import TOKEN

from bbprompt.serve.server import build_server, listen
from bbprompt.testing import ToyOracle

#: What attacks would make, if a name were followed or a message run; nothing else does.


@dataclass
class Target:
    """The server in its process."""

    process: subprocess.Popen[str]
    port: int

    def send(self, raw: bytes, seconds: float = 15.0) -> int:
        """Status of the first answer to some bytes; 0 if the connection closes without one."""
        got = b""
        with socket.create_connection(("127.0.0.1", self.port), timeout=seconds) as peer:
            with contextlib.suppress(ConnectionError):
                peer.sendall(raw)
            with contextlib.suppress(ConnectionError):
                while more := peer.recv(65536):
                    got += more
        found = re.match(rb"HTTP/1\.[01] (\d{3}) ", got)
        assert found or not got, f"no answer of HTTP: {got[:80]!r}"
        assert got.count(b"HTTP/1.1 ") <= 1, "two answers to one request: it was taken for two"
        return int(found[1]) if found else 0

    def sound(self) -> None:
        """A sound request is answered."""
        status = self.send(http("POST", "/v1/score", SCORE))
        assert status == 200, f"the next sound request got {status}"

    def memory(self) -> int:
        """Most bytes that the process ever held."""
        found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{self.process.pid}/status").read_text())
        assert found
        return int(found[1]) * 1024


@contextlib.contextmanager
def target() -> Iterator[Target]:
    """A server that knows `BATCH`, in an empty folder, which is empty at the end."""
    CANARY.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with log.open("w") as errors:
            words = [sys.executable, str(Path(__file__)), "--serve"]
            process = subprocess.Popen(words, cwd=folder, stdout=subprocess.PIPE, stderr=errors, text=True)
        try:
            assert process.stdout is not None
            found = Target(process, int(process.stdout.readline()))
            assert found.send(http("PUT", f"/v1/batches/{DIGEST}", TEXTS)) == 201
            found.sound()
            yield found
            assert process.poll() is None, "the server has died"
            said = log.read_text(encoding="utf-8")
            assert TOKEN not in said, "the token stands in the log"
            assert "Traceback" not in said, said[-3000:]
            assert list(Path(folder).iterdir()) == [log], "the server has written files"
            assert not CANARY.exists(), "an attack was followed or run"
        finally:
            process.kill()
            process.wait()
            process.stdout.close()  # type: ignore[union-attr]


def campaign(mutants: int, seed: int) -> dict[str, Any]:
    """Send everything; the counts."""
    counts: Counter[str] = Counter()
    with target() as server:
        for _ in range(20):
            server.sound()
        before = server.memory()
        everything = list(attacks())
        for half, path in ((SCORE, "/v1/score"), (TEXTS, f"/v1/batches/{DIGEST[::-1]}")):
            method = "POST" if half is SCORE else "PUT"
            for number, body in enumerate(fuzztargets.mutants((half,), mutants // 2, f"{seed} {path}")):
                allowed = REFUSED | {200, 201, 204}
                everything.append(Attack(f"mutant {number} of {path}", http(method, path, body), allowed))
        for attack in everything:
            status = server.send(attack.raw)
            assert status in attack.allowed, f"{attack.name}: {status}"
            counts[f"{status}" if status else "closed"] += 1
            server.sound()
        grown = server.memory() - before
        assert grown < MOST_GROWTH, f"memory has grown by {grown} bytes"
    return {
        "seed": seed,
        "requests": counts.total(),
        "grown MB": round(grown / 2**20, 1),
        **dict(sorted(counts.items())),
    }


def crowd(connections: int = 60) -> dict[str, Any]:
    """So many of the largest bodies at once, all of them under way; the counts."""
    start = http("POST", "/v1/score", length=SETTINGS.body, more="")
    with target() as server, contextlib.ExitStack() as stack:
        before, told = server.memory(), Counter[int]()
        peers = [
            stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=15))
            for _ in range(connections)
        ]
        for peer in peers:
            with contextlib.suppress(OSError):
                peer.sendall(start + b"x" * (SETTINGS.body - 1))
        for peer in peers:
            with contextlib.suppress(OSError):
                told[int(peer.recv(65536)[9:12] or b"0")] += 1
        server.sound()
        grown = server.memory() - before
    assert grown < MOST_GROWTH, f"memory has grown by {grown} bytes"
    assert told[503], "all were let in"
    return {"connections": connections, "grown MB": round(grown / 2**20, 1)}


def slow_loris(connections: int = 50) -> dict[str, Any]:
    """So many clients that trickle, and one that is served all the while; the counts."""
    start = http("POST", "/v1/score", b"", length=1000)
    ended: list[float] = []

    def trickle(port: int, raw: bytes) -> None:
        began = time.monotonic()
        with socket.create_connection(("127.0.0.1", port), timeout=15) as peer, contextlib.suppress(OSError):
            for byte in raw * 100:
                peer.sendall(bytes([byte]))
                time.sleep(0.05)
        ended.append(time.monotonic() - began)

    with target() as server:
        kinds = (start, start[:-2] + b"X: " + b"y" * 1000)
        threads = [
            threading.Thread(target=trickle, args=(server.port, kinds[number % 2])) for number in range(connections)
        ]
        for thread in threads:
            thread.start()
        served, slowest = 0, 0.0
        while any(thread.is_alive() for thread in threads):
            began = time.monotonic()
            server.sound()
            slowest, served = max(slowest, time.monotonic() - began), served + 1
        for thread in threads:
            thread.join()
    assert max(ended) < 5 * SETTINGS.receive, f"a client trickled for {max(ended):.1f} s"
    assert slowest < 2.0, f"an honest client waited {slowest:.1f} s"
    return {"connections": len(ended), "longest s": round(max(ended), 1), "served": served}


def serve() -> None:
    with listen("127.0.0.1", 0, TOKEN) as listening:
        print(listening.getsockname()[1], flush=True)
        build_server(ToyOracle(), SETTINGS).run(sockets=[listening])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--serve", action="store_true", help="be the server")
    parser.add_argument("--crowd", action="store_true", help="many clients at once, that trickle or bring much")
    parser.add_argument("--mutants", type=int, default=150)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    if given.serve:
        serve()
        return
    if given.crowd:
        counts = {"trickling": slow_loris(), "crowding": crowd()}
        print(json.dumps({"requests": sum(part["connections"] for part in counts.values()), **counts}))
        return
    print(json.dumps(campaign(given.mutants, given.seed)))


if __name__ == "__main__":
    main()
