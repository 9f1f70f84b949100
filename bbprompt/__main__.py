"""The process `bbprompt`, which `python -m bbprompt` is too."""

from __future__ import annotations

import atexit
import os
import sys

from bbprompt.commands.stop import Stop

__all__ = ["main"]


def main() -> None:
    """Run the command that the process was called with; a signal stops it in order from here on."""
    stop = Stop()
    # Never left: a second signal, while the interpreter winds up, must not change the exit code of the first. Where
    # Python gives up its handlers, behind the last of its exit functions, a signal would kill; so it is ignored there.
    stop.__enter__()
    atexit.register(stop.ignore)
    try:
        from bbprompt import cli  # after the handlers are there, for the import takes a while

        cli.main(stop)
    except KeyboardInterrupt:  # outside of any command
        error = stop.interrupted()
        os.write(2, f"{error}\n".encode())
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
