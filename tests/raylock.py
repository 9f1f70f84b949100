"""One Ray at a time: two of them, started by two test processes, would only slow each other down."""

from __future__ import annotations

import fcntl
import getpass
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def only_ray() -> Iterator[None]:
    """Wait until no other test process uses Ray."""
    path = Path(tempfile.gettempdir()) / f"bbprompt-tests-ray-{getpass.getuser()}.lock"
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
