"""A server that sends without end: the client stops reading, and its memory does not grow with what is sent."""

from __future__ import annotations

import contextlib
import json
import re
import resource
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from bbprompt.backends.calls import Policy
from bbprompt.backends.http import HttpOracle
from bbprompt.errors import OracleError
from bbprompt.oracle import TextBatch
from bbprompt.tasks.example import Form, Part
from bbprompt.testing import ToyOracle

MOST_GROWTH = 50 * 2**20  # bytes
MEANT = 10 * 2**30  # what the server would like to send
BLOCK = b"x" * 2**20
OK = b"HTTP/1.1 200 OK\r\n"
#: How an answer begins that does not end, and what it goes on with.
ENDLESS: dict[str, tuple[bytes, bytes]] = {
    "long body": (OK + b"Content-Length: %d\r\n\r\n" % MEANT, BLOCK),
    "chunks": (OK + b"Transfer-Encoding: chunked\r\n\r\n", b"100000\r\n" + BLOCK + b"\r\n"),
    "until it closes": (OK + b"Connection: close\r\n\r\n", BLOCK),
    "header line": (OK + b"X: ", BLOCK),
    "headers": (OK, b"X: y\r\n" * 2**17),
    "status line": (b"HTTP/1.1 200 ", BLOCK),
    "interim answers": (b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 2**15),
}
BODIES = ("long body", "chunks", "until it closes")
BATCH = TextBatch((Form((Part("t", cut=True),), ("a", "b"), -1),))


def request(peer: socket.socket) -> bytes:
    """The first line of the next request, read to its end; empty when there is none."""
    got = b""
    while not (ended := re.search(rb"\r\n\r\n", got)) or len(got) < ended.end() + length(got):
        if not (more := peer.recv(65536)):
            return b""
        got += more
    return got.split(b"\r\n")[0]


def length(head: bytes) -> int:
    found = re.search(rb"content-length: (\d+)", head.lower())
    return int(found[1]) if found else 0


@contextlib.contextmanager
def pouring(kind: str, path: str, sent: list[int]) -> Iterator[str]:
    """URL of a server that answers well but for a path."""
    begin, block = ENDLESS[kind]
    limits = {"points": 8, "texts": 8, "body": 10**6}
    info = json.dumps({"protocol": 1, "version": "0", "model": asdict(ToyOracle().info), "limits": limits}).encode()

    def serve(peer: socket.socket) -> None:
        with peer, contextlib.suppress(OSError):
            while asked := request(peer):
                if path.encode() not in asked:
                    status = OK.replace(b"200", b"201") if asked.startswith(b"PUT") else OK
                    peer.sendall(status + b"Content-Length: %d\r\n\r\n" % len(info) + info)
                    continue
                peer.sendall(begin)
                while sum(sent) < MEANT:
                    peer.sendall(block)
                    sent.append(len(block))

    with socket.create_server(("127.0.0.1", 0)) as server:

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    threading.Thread(target=serve, args=(server.accept()[0],), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.getsockname()[1]}"
        finally:
            server.shutdown(socket.SHUT_RDWR)


def asked(url: str) -> str:
    """How the client puts an end to it."""
    with pytest.raises(OracleError) as raised:
        HttpOracle(url, policy=Policy(attempts=1, deadline=2.0)).score(BATCH, np.zeros((1, 3, 4)))
    return str(raised.value)


def main() -> None:
    """Be the client of some servers, and say how each ended and how many bytes of memory they took at most."""
    asked("http://127.0.0.1:1")  # what is loaded at the first use is loaded
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    said = [asked(url) for url in sys.argv[1:]]
    print(json.dumps({"said": said, "grown": 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)}))


@pytest.mark.slow
@pytest.mark.parametrize("path", ["/v1/info", "/v1/score"])
def test_endless_answers_end(path: str) -> None:
    sent: dict[str, list[int]] = {kind: [] for kind in ENDLESS}
    with contextlib.ExitStack() as stack:
        urls = [stack.enter_context(pouring(kind, path, sent[kind])) for kind in ENDLESS]
        words = [sys.executable, str(Path(__file__)), *urls]
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["grown"] < MOST_GROWTH, found
    for kind, said in zip(ENDLESS, found["said"], strict=True):
        assert 0 < sum(sent[kind]) < MEANT
        assert ("is longer than" in said) == (kind in BODIES), f"{kind}: {said}"


if __name__ == "__main__":
    main()
