"""What `bbprompt export-server` writes, and what it refuses to."""

from __future__ import annotations

import ast
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from tiny_prompt import batch_of

from bbprompt.cli import run
from bbprompt.errors import ArtifactError, DiskError, UsageError
from bbprompt.exportserver import SETTINGS, Format, ServedModel, read_settings, write_repository
from bbprompt.oip import INPUTS, OUTPUTS, ask_description, ask_scores, read_reply
from bbprompt.prompts import ModularPrompt
from bbprompt.serve.exported import open_exported
from bbprompt.wire import request_for


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_triton(tmp_path: Path, tiny_prompts: Path) -> None:
    model = write_repository(tmp_path / "out", "triton", "mine", tiny_prompts, ServedModel(threads=2))
    assert model == tmp_path / "out" / "mine"
    assert {"config.pbtxt", "1/model.py", "1/bbprompt.json", "1/prompts/config.json"} <= files(model)
    config = (model / "config.pbtxt").read_text()
    assert 'name: "mine"' in config
    for name, kind in (INPUTS | OUTPUTS).items():
        assert f'name: "{name}" data_type: TYPE_{kind}' in config
    assert config.count("optional: true") == 2
    assert read_settings(model / "1") == ServedModel(threads=2)


def test_mlserver(tmp_path: Path, tiny_prompts: Path) -> None:
    model = write_repository(tmp_path / "out", "mlserver", "oracle", tiny_prompts, ServedModel())
    assert {"model.py", "model-settings.json", "bbprompt.json", "prompts/model.safetensors"} <= files(model)
    assert json.loads((tmp_path / "out" / "settings.json").read_text())["host"] == "127.0.0.1"
    settings = json.loads((model / "model-settings.json").read_text())
    assert settings["name"] == "oracle"
    assert {entry["name"]: entry["datatype"] for entry in settings["outputs"]} == OUTPUTS


@pytest.mark.parametrize("kind", ["triton", "mlserver"])
def test_the_model_file_takes_its_class_from_the_package(kind: Format, tmp_path: Path, tiny_prompts: Path) -> None:
    model = write_repository(tmp_path / "out", kind, "oracle", tiny_prompts, ServedModel())
    tree = ast.parse(next(model.rglob("model.py")).read_text())
    (wanted,) = (node for node in tree.body if isinstance(node, ast.ImportFrom))
    source = Path(__file__).parent.parent / f"{str(wanted.module).replace('.', '/')}.py"
    classes = {node.name for node in ast.parse(source.read_text()).body if isinstance(node, ast.ClassDef)}
    assert {alias.name for alias in wanted.names} <= classes


def test_the_exported_model_answers(tmp_path: Path, tiny_prompts: Path) -> None:
    model = write_repository(tmp_path / "out", "mlserver", "oracle", tiny_prompts, ServedModel(threads=1))
    assert ModularPrompt.load(model / "prompts").digest == ModularPrompt.load(tiny_prompts).digest
    responder = open_exported(model)
    said, _ = read_reply(responder.answer(ask_description()))
    assert said["limits"]["points"] == 1024
    info = responder._oracle.info
    points = np.zeros((2, info.layers, info.dim), dtype=np.float32)
    batch = batch_of("pair", 2)
    request = request_for(info, batch.digest(), points, "candidates", None)
    assert read_reply(responder.answer(ask_scores(request, None)))[0]["error"] == "texts"
    assert read_reply(responder.answer(ask_scores(request, batch_of("pair", 1))))[0]["error"] == "message"
    _, scores = read_reply(responder.answer(ask_scores(request, batch)))
    assert scores is not None
    assert scores.logits.shape == (2, sum(batch.sizes), info.channels)
    assert read_reply(responder.answer({}))[0]["error"] == "message"
    assert read_reply(responder.answer({"request": np.zeros(2, np.float32)}))[0]["error"] == "message"
    responder.close()


def test_what_is_refused(tmp_path: Path, tiny_prompts: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(UsageError, match="something already"):
        write_repository(tmp_path / "full", "triton", "oracle", tiny_prompts, ServedModel())
    for name in ("", "../up", "a/b", "bbprompt", "a" * 200):
        with pytest.raises(UsageError, match="--model"):
            write_repository(tmp_path / "new", "triton", name, tiny_prompts, ServedModel())
    with pytest.raises(ArtifactError):
        write_repository(tmp_path / "new", "triton", "oracle", tmp_path, ServedModel())
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("text", ["{", "[]", '{"threads": 0}', '{"thread": 1}', '{"device": "tpu"}'])
def test_settings_are_read_strictly(tmp_path: Path, text: str) -> None:
    (tmp_path / SETTINGS).write_text(text)
    with pytest.raises(UsageError, match=SETTINGS):
        read_settings(tmp_path)
    with pytest.raises(UsageError, match="export-server"):
        read_settings(tmp_path / "nowhere")


def test_the_command(tmp_path: Path, tiny_prompts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["export-server", "--format", "triton", "--out", str(tmp_path / "out"), "--prompts", str(tiny_prompts)]
    assert run([*words, "--json"]) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said["model"] == str(tmp_path / "out" / "oracle")
    assert run(words) == 2
    assert "something already" in capsys.readouterr().err
    assert run(["export-server", "--format", "seldon", "--out", "x"]) == 2


@pytest.mark.parametrize("empty", [False, True])
@pytest.mark.parametrize("kind", [KeyboardInterrupt, OSError])
def test_what_is_stopped_or_fails_half_way_leaves_nothing(
    kind: type[BaseException], empty: bool, tiny_prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(source: Path, target: Path) -> None:
        raise kind

    out = tmp_path / "out"
    if empty:
        out.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", fail)
        with pytest.raises((kind, DiskError)):
            write_repository(out, "mlserver", "oracle", tiny_prompts, ServedModel())
    assert out.exists() == empty
    assert not empty or not list(out.iterdir())
    assert write_repository(out, "mlserver", "oracle", tiny_prompts, ServedModel()).is_dir()
