"""Real servers for tests: in a thread of this process on a toy model, or as a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bbprompt.oracle import Oracle
from bbprompt.serve.server import build_server, listen
from bbprompt.serve.settings import ServeSettings

TOKEN = "a-token-of-the-tests"


@contextlib.contextmanager
def serving(oracle: Oracle, *, tls: tuple[Path, Path] | None = None, **settings: Any) -> Iterator[str]:
    """URL of a uvicorn server in a thread; `tls` is a certificate and its key."""
    certificate, key = tls or (None, None)
    allowed = ServeSettings(**({"drain": 1.0} | settings))
    started = threading.Event()
    with listen("127.0.0.1", 0, None) as listening:
        server = build_server(oracle, allowed, certificate=certificate, key=key, ready=started.set)
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


def free_port() -> int:
    """A port that nobody listens at just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
