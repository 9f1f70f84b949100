"""What the doctor finds."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest
import tiny_prompt
from servers import serving

from bbprompt import doctor, prompts
from bbprompt.backends.precision import best_precision
from bbprompt.connect import open_oracle
from bbprompt.doctor import Finding, examine
from bbprompt.prompts import ModularPrompt
from bbprompt.testing import ToyOracle


def found(**env: str) -> dict[str, Finding]:
    return {finding.name: finding for finding in examine(env=env)}


def test_problems_come_with_what_to_do(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_bert_dir: Path
) -> None:
    def requires(name: str) -> list[str]:
        return ["numpy<1", "nowhere-to-be-found>=3", "pytest>=1", "ray>99; extra == 'ray'", "typer"]

    monkeypatch.setattr(importlib.metadata, "requires", requires)
    monkeypatch.setattr(doctor, "_LOW_DISK", 2**60)
    tiny_prompt.artifact(tiny_bert_dir, "0" * 64).save(tmp_path / "good")
    tiny_prompt.artifact(tiny_bert_dir, "0" * 64).save(tmp_path / "bad")
    (tmp_path / "bad" / "model.safetensors").write_bytes(b"junk")
    monkeypatch.setattr(prompts, "_BUNDLED", tmp_path)
    findings = found(BBPROMPT_DATA=str(tmp_path / "no"))
    problems = {name for name, finding in findings.items() if finding.state == "problem"}
    assert problems == {"packages", "disk here", "disk of the cache", "data", "prompts bad", "prompts"}
    assert all(findings[name].fix for name in problems)
    told = findings["packages"].value
    assert "numpy" in told
    assert "nowhere-to-be-found is missing (tested: >=3)" in told
    assert "ray" not in told
    assert "typer" not in told
    assert findings["prompts good"].state == "ok"


def test_data_are_counted(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "lcqmc").mkdir()
    (tmp_path / "of_another_task").mkdir()
    finding = found(BBPROMPT_DATA=str(tmp_path))["data"]
    assert finding.state == "ok"
    assert "data of 1 of " in finding.value


def test_the_cache_is_measured(cache: Path) -> None:
    (cache / "models").mkdir(parents=True)
    (cache / "models" / "x").write_bytes(bytes(3 * 2**20))
    assert found()["cache"].value == f"{cache}: 3.0 MB"


def test_a_backend_is_opened_only_on_request(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_bert_dir: Path
) -> None:
    assert "backend" not in found()
    monkeypatch.setattr(prompts, "_BUNDLED", tmp_path)
    assert [f.state for f in examine("local", {}) if f.name == "backend"] == ["problem"]
    tiny_prompt.artifact_dir(tmp_path / "e5-small-mp2-deep", tiny_bert_dir, "mp2-deep")
    (local,) = (f for f in examine("local", {}) if f.name == "backend")
    precision = best_precision("cpu")
    assert (local.state, local.value) == (
        "ok",
        f"local: {tiny_bert_dir}, {precision} on {local.value.split(' on ')[1]}",
    )
    for url in ("http://localhost:1", "kserve://localhost:1/oracle", "kserve+grpc://localhost:1/oracle"):
        (remote,) = (f for f in examine(url, {}) if f.name == "backend")
        assert remote.state == "problem"
        assert "refused" in remote.value or "connect" in remote.value
        assert "bbprompt resume" not in remote.value, "there is no run to go on with"
        server = "`bbprompt serve --port 1`" if url.startswith("http") else "the model server"
        assert remote.fix.startswith(f"start {server} there")
        assert "correct --backend" in remote.fix


def test_a_server_may_hold_other_prompts(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_bert_dir: Path
) -> None:
    monkeypatch.setattr(prompts, "_BUNDLED", tmp_path)
    monkeypatch.delenv("BBPROMPT_TOKEN", raising=False)
    ours = tiny_prompt.artifact_dir(tmp_path / "e5-small-mp2-deep", tiny_bert_dir, "mp2-deep")
    with serving(open_oracle("local", ModularPrompt.load(ours), threads=1)) as url:
        (same,) = (f for f in examine(url, {}) if f.name == "backend")
    with serving(ToyOracle()) as url:
        (other,) = (f for f in examine(url, {}) if f.name == "backend")
    assert (same.state, same.fix) == ("ok", "")
    assert other.state == "note"
    assert "other prompts" in other.value
    assert "--prompts" in other.fix
