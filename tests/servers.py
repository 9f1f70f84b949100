"""Real servers for tests: in a thread of this process on a toy model, or as a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx2
import pytest

from bbprompt.oracle import Oracle
from bbprompt.serve.server import build_server, listen
from bbprompt.serve.settings import ServeSettings
from bbprompt.serve.tls import tls_context

ROOT = Path(__file__).parent.parent
TOKEN = "a-token-of-the-tests"


@contextlib.contextmanager
def serving(oracle: Oracle, *, tls: tuple[Path, Path] | None = None, **settings: Any) -> Iterator[str]:
    """URL of a uvicorn server in a thread; `tls` is a certificate and its key."""
    allowed = ServeSettings(**({"drain": 1.0} | settings))
    started = threading.Event()
    with listen("127.0.0.1", 0, None) as listening:
        server = build_server(oracle, allowed, tls=tls_context(*tls or (None, None)), ready=started.set)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            assert started.wait(30)
            yield f"{'https' if tls else 'http'}://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive()


def start(prompts: Path, *flags: str, port: int = 0, env: Mapping[str, str] | None = None) -> tuple[Any, str]:
    """A `bbprompt serve` process that is ready, and its URL."""
    # Bits are compared; with "auto" they would depend on the processor, and on what is scored together.
    words = ["serve", "--prompts", str(prompts), "--port", str(port), "--threads", "1", "--dtype", "float32"]
    words += ["--json", *flags]
    process = subprocess.Popen(
        [sys.executable, "-m", "bbprompt", *words],
        stdout=subprocess.PIPE,
        env={**os.environ, **(env or {})},
        text=True,
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        process.wait()
        raise AssertionError(f"the server ended with {process.returncode}")
    return process, json.loads(line)["url"]


def stop(process: Any) -> int:
    """End a server of `start`, whatever its state, and return its exit code."""
    process.terminate()
    try:
        return int(process.wait(30))
    finally:
        process.kill()
        process.stdout.close()


#: From method, path, headers (names in lower case) and body to status, headers and body.
Answering = Callable[[str, str, Mapping[str, str], bytes], tuple[int, dict[str, str], bytes]]


@contextlib.contextmanager
def answering(respond: Answering, port: int = 0) -> Iterator[str]:
    """`host:port` of an HTTP server in a thread; with the context its connections end, too."""
    over = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            if over.is_set():
                self.close_connection = True
                return
            body = self.rfile.read(int(self.headers.get("content-length", "0")))
            headers = {name.lower(): value for name, value in self.headers.items()}
            status, more, reply = respond(self.command, self.path, headers, body)
            self.send_response(status)
            for name, value in {**more, "content-length": str(len(reply))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(reply)

        do_GET = do_POST = do_PUT = answer  # noqa: N815

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_address[1]}"
    finally:
        over.set()
        server.shutdown()
        thread.join(30)
        server.server_close()


def place(kind: str) -> Path:
    """Where a foreign server is that a script in `tests/servers` brings; skips the test where it is not."""
    found = Path(os.environ.get(f"BBPROMPT_{kind.upper()}", ROOT / ".servers" / kind))
    if not found.is_dir():
        pytest.skip(f"{kind} is not there; make it with tests/servers/{kind}.sh")
    return found


@contextlib.contextmanager
def process(words: list[str], env: Mapping[str, str], folder: Path, ready: str) -> Iterator[None]:
    """A server as a process in `folder`, once the URL `ready` answers with 200."""
    with (folder / "log").open("wb") as log:
        running = subprocess.Popen(words, env=env, stdout=log, stderr=subprocess.STDOUT, cwd=folder)
        try:
            ends = time.monotonic() + 240
            while not answers(ready):
                ended = running.poll() is not None or time.monotonic() > ends
                assert not ended, (folder / "log").read_text(errors="replace")[-3000:]
                threading.Event().wait(0.1)
            yield
        finally:
            running.terminate()
            try:
                running.wait(30)
            finally:
                running.kill()


def answers(url: str) -> bool:
    """Whether a URL answers with 200."""
    try:
        return httpx2.get(url, trust_env=False).status_code == 200
    except httpx2.TransportError:
        return False


def free_port() -> int:
    """A port that nobody listens at just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
