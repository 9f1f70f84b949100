"""Certificates and keys that a server cannot use are refused at once, by the flag that names them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from bbprompt import cli
from bbprompt.serve.tls import tls_context

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")


def openssl(*words: str | Path) -> None:
    subprocess.run(["openssl", *map(str, words)], check=True, capture_output=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two certificates and their keys, one key encrypted, and files that are neither."""
    made = tmp_path_factory.mktemp("tls")
    for name, bits in (("one", 2048), ("other", 2048), ("w", 512)):
        words = ["req", "-x509", "-newkey", f"rsa:{bits}", "-nodes", "-days", "1", "-subj", f"/CN={name}"]
        openssl(*words, "-keyout", made / f"{name}.key", "-out", made / f"{name}.pem")
    openssl("rsa", "-in", made / "one.key", "-aes256", "-passout", "pass:secret", "-out", made / "locked.key")
    (made / "empty").touch()
    (made / "junk").write_bytes(bytes(range(256)))
    cut = (made / "one.pem").read_text().splitlines()
    (made / "cut.pem").write_text("\n".join([*cut[:5], cut[-1]]) + "\n")
    return made


BAD = [
    ("one.pem", "nowhere", "--tls-key {nowhere}: No such file or directory"),
    ("nowhere", "one.key", "--tls-cert {nowhere}: No such file or directory"),
    (".", "one.key", "--tls-cert {.}: Is a directory"),
    ("empty", "one.key", "--tls-cert {empty}: no certificate in PEM form"),
    ("junk", "one.key", "--tls-cert {junk}: no certificate in PEM form"),
    ("cut.pem", "one.key", "--tls-cert {cut.pem}: no certificate in PEM form"),
    ("one.key", "one.pem", "--tls-cert {one.key}: no certificate in PEM form"),
    ("one.pem", "empty", "--tls-key {empty}: no private key in PEM form"),
    ("one.pem", "one.pem", "--tls-key {one.pem}: no private key in PEM form"),
    ("one.pem", "other.key", "--tls-key {other.key}: not the key of --tls-cert"),
    ("one.pem", "locked.key", "--tls-key {locked.key}: it is encrypted"),
    ("w.pem", "w.key", "--tls-cert {w.pem}: too weak"),
]


@pytest.mark.parametrize(("certificate", "key", "said"), BAD)
def test_bad_files_are_refused_before_the_model_is_loaded(
    certificate: str, key: str, said: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named = {name: folder / name for pair in BAD for name in pair[:2]}
    # Prompts that are not there: were they looked for first, the error would be theirs.
    words = ["serve", "--port", "0", "--prompts", str(folder / "no-prompts")]
    assert cli.run([*words, "--tls-cert", str(named[certificate]), "--tls-key", str(named[key])]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    flag, name, rest = said.replace("{", "\0").replace("}", "\0").split("\0")
    assert line.startswith(f"error: {flag}{named[name]}{rest}")


def test_good_files_are_taken(folder: Path) -> None:
    assert tls_context(folder / "one.pem", folder / "one.key") is not None
    assert tls_context(None, None) is None
