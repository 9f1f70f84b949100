"""The health check of a container: it finds the server by what that wrote down, with TLS and without."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import servers
from test_serve_tls import openssl

from bbprompt.errors import DiskError
from bbprompt.serve.health import check, write_ready
from bbprompt.testing import ToyOracle


def made(folder: Path, url: str, certificate: Path | None = None) -> Path:
    write_ready(folder / "ready.json", url, certificate)
    assert [path.name for path in folder.iterdir() if "ready" in path.name] == ["ready.json"]
    return folder / "ready.json"


def test_a_real_server_on_a_port_of_its_own(tiny_prompts: Path, tmp_path: Path) -> None:
    file = tmp_path / "ready.json"
    environment = {"BBPROMPT_TOKEN": servers.TOKEN}
    flags = ("--host", "0.0.0.0", "--ready-file", str(file))
    process, url = servers.start(tiny_prompts, *flags, env=environment)
    command = [sys.executable, "-m", "bbprompt.serve.health", str(file)]
    try:
        assert json.loads(file.read_text())["url"] == url
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        done = subprocess.run(command, env={}, capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert "401" in done.stderr
    finally:
        servers.stop(process)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
def test_over_tls_its_certificate_and_no_other(tmp_path: Path) -> None:
    for name in ("own", "other"):
        words = ["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", f"/CN={name}.example"]
        openssl(*words, "-keyout", tmp_path / f"{name}.key", "-out", tmp_path / f"{name}.pem")
    with servers.serving(ToyOracle(), tls=(tmp_path / "own.pem", tmp_path / "own.key")) as url:
        assert check(made(tmp_path, url, tmp_path / "own.pem")) is None
        assert "CERTIFICATE_VERIFY_FAILED" in str(check(made(tmp_path, url, tmp_path / "other.pem")))


def test_a_proxy_is_not_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    with servers.serving(ToyOracle()) as url:
        port = url.rpartition(":")[2]
        assert check(made(tmp_path, url)) is None
        assert check(made(tmp_path, f"http://0.0.0.0:{port}")) is None


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", '{"url": 3, "certificate": null}', '{"url": "x", "certificate": null}']
)
def test_what_is_no_such_file_is_not_well(text: str, tmp_path: Path) -> None:
    (tmp_path / "ready.json").write_text(text)
    assert check(tmp_path / "ready.json")
    assert check(tmp_path / "nowhere")


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DiskError, match="nowhere"):
        write_ready(tmp_path / "nowhere" / "ready.json", "http://127.0.0.1:1", None)
