"""The Open Inference Protocol over gRPC: statuses, what a server says, and certificates, known and unknown."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from clients import BATCH, EAGER, POINTS, close_all, kept, same
from oipdouble import MODEL, Double, over_grpc

from bbprompt.backends.oip import OipOracle
from bbprompt.backends.oip_grpc import MESSAGES, read_outputs
from bbprompt.errors import OracleError
from bbprompt.testing import ToyOracle
from bbprompt.wire import WireError

LOOK = """
import sys
from bbprompt.connect import ask_server
from bbprompt.errors import OracleError
try:
    print(ask_server(sys.argv[1], 1, resend=True).info.backbone)
except OracleError as error:
    sys.exit(f"{error.exit_code} {error}")
"""


@pytest.fixture(autouse=True)
def _close() -> Iterator[None]:
    yield
    close_all()


def connect(url: str) -> OipOracle:
    """An oracle that is closed when the test ends."""
    return kept(OipOracle(url, policy=EAGER))


@pytest.mark.parametrize("status", ["UNAVAILABLE", "DEADLINE_EXCEEDED", "INTERNAL", "ABORTED"])
def test_what_passes_over_grpc_is_tried_again(status: str) -> None:
    turns = itertools.count()
    with over_grpc(
        Double(ToyOracle()), script=lambda: grpc.StatusCode[status] if next(turns) % 2 == 0 else None
    ) as url:
        assert same(connect(url).score(BATCH, POINTS), ToyOracle().score(BATCH, POINTS))
    assert next(turns) == 4


@pytest.mark.parametrize(("status", "said"), [("UNAUTHENTICATED", "BBPROMPT_TOKEN"), ("INVALID_ARGUMENT", "INVALID")])
def test_what_does_not_pass_over_grpc(status: str, said: str) -> None:
    turns = itertools.count()

    def script() -> Any:
        return grpc.StatusCode[status] if next(turns) == 1 else None

    with over_grpc(Double(ToyOracle()), script=script) as url:
        with pytest.raises(OracleError, match=said):
            connect(url).score(BATCH, POINTS)
        with pytest.raises(OracleError, match="no model 'other' there"):
            connect(url.replace(f"/{MODEL}", "/other"))
    assert next(turns) == 2


@pytest.mark.parametrize("raw", [True, False])
def test_names_in_a_reply_over_grpc_are_shown_in_one_line(raw: bool) -> None:
    """Found by the fuzzer."""
    said = MESSAGES["ModelInferResponse"](model_name=MODEL, id="1")
    said.outputs.add(name="a\x0cb\u2028c", datatype="UINT8", shape=[5])
    if raw:
        said.raw_output_contents.append(b"1234")
    with pytest.raises(WireError, match=r"^'a\\x0cb\\u2028c' has (an)?other number") as raised:
        read_outputs(said, "1", MODEL)
    assert len(str(raised.value).splitlines()) == 1


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """URL of a server with a certificate of its own, and that certificate."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
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
