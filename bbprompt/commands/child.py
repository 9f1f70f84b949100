"""A run of a sweep: `python -m bbprompt.commands.child tune ...`, a `bbprompt` that ends with its parent.

Its standard input is a pipe that the sweep holds open and never writes to. When that ends, because the sweep stops
or was killed in whatever way, the run stops at its next safe point, as after SIGTERM, and can be resumed.
"""

from __future__ import annotations

import os
import signal
import threading

from bbprompt.__main__ import main

__all__: list[str] = []


def _watch() -> None:
    """Wait for the end of standard input, then ask this process to stop."""
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    threading.Thread(target=_watch, daemon=True).start()
    main()
