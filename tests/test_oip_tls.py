"""gRPC over TLS: a certificate of an authority that is known, and of one that is not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from oipdouble import Double, over_grpc

from bbprompt.testing import ToyOracle

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")

LOOK = """
import sys
from bbprompt.connect import ask_server
from bbprompt.errors import OracleError
try:
    print(ask_server(sys.argv[1], 1, resend=True).info.backbone)
except OracleError as error:
    sys.exit(f"{error.exit_code} {error}")
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """URL of a server with a certificate of its own, and that certificate."""
    made = tmp_path_factory.mktemp("tls")
    words = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost"]
    words += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(made / "key"), "-out", str(made / "certificate")]
    subprocess.run(words, check=True, capture_output=True)
    key = (made / "key").read_bytes(), (made / "certificate").read_bytes()
    with over_grpc(Double(ToyOracle()), key=key) as url:
        yield url, made / "certificate"


def look(url: str, roots: Path | None) -> subprocess.CompletedProcess[str]:
    """Ask a server what it is, in a process of its own: gRPC reads its authorities once."""
    environment = {**os.environ, "GRPC_VERBOSITY": "NONE"}
    if roots is not None:
        environment["GRPC_DEFAULT_SSL_ROOTS_FILE_PATH"] = str(roots)
    return subprocess.run(
        [sys.executable, "-c", LOOK, url], env=environment, capture_output=True, text=True, check=False
    )


def test_a_certificate_of_an_authority_that_is_named_is_taken(place: tuple[str, Path]) -> None:
    assert look(*place).stdout == "toy\n"


def test_another_is_refused_at_once_and_says_what_to_do(place: tuple[str, Path]) -> None:
    done = look(place[0], None)
    assert done.stderr.startswith("69 ")
    assert "no secure connection" in done.stderr
    assert "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH" in done.stderr
    assert "tries" not in done.stderr
