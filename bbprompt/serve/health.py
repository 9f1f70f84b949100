"""Whether a server here is well, asked at the address that it wrote down: `python -m bbprompt.serve.health FILE`.

For the health check of a container, which knows no flags of the server. Ends with 0 or, with a line that says why, 1.
"""

from __future__ import annotations

import json
import os
import ssl
import sys
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

from bbprompt.connect import read_token
from bbprompt.errors import BBPromptError
from bbprompt.store.disk import RealDisk

__all__ = ["check", "write_ready"]

_SECONDS = 9.0  # of the ten that a container's check has
_ANYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104  where it listens, and where it is asked


def write_ready(file: Path, url: str, certificate: Path | None) -> None:
    """Write down where a server answers; the file is there whole or not at all.

    Args:
        file: What to write, over what is there.
        url: Address of the server.
        certificate: Its certificate, where it answers over TLS.

    Raises:
        DiskError: It cannot be written.
    """
    value = {"url": url, "certificate": None if certificate is None else str(certificate.absolute())}
    disk, scratch = RealDisk(), file.with_name(f".{file.name}.{os.getpid()}")
    opened = disk.open(scratch, fresh=True)
    try:
        disk.write(opened, json.dumps(value).encode())
    finally:
        disk.close(opened)
    disk.replace(scratch, file)


def check(file: Path) -> str | None:
    """Why the server that wrote `file` is not well; None if it is. The token is that of the environment."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
        url, context = urlsplit(value["url"]), None
        host = _ANYWHERE.get(url.hostname or "", url.hostname or "")
        shown = f"[{host}]" if ":" in host else host
        if value["certificate"] is not None:
            # This certificate and no other, whatever names it is for: it is asked at an address of this machine.
            context = ssl.create_default_context(cafile=value["certificate"])
            context.check_hostname = False
            context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        request = urllib.request.Request(f"{url.scheme}://{shown}:{url.port}/healthz")  # noqa: S310  our own server
        if token := read_token(os.environ):
            request.add_unredirected_header("Authorization", f"Bearer {token}")
        handlers = [urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)]
        with urllib.request.build_opener(*handlers).open(request, timeout=_SECONDS):
            return None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, BBPromptError) as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


if __name__ == "__main__":
    if reason := check(Path(sys.argv[1])):
        sys.exit(reason)
