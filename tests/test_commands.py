"""The commands at work, on tiny models: what they print, write and end with."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_prompt
import yaml
from tiny_run import finished

from bbprompt import cli
from bbprompt.commands.flags import tokens_of
from bbprompt.commands.tune import _merged
from bbprompt.errors import UsageError

RESULT_KEYS = {
    "task",
    "data",
    "method",
    "backbone",
    "prompts",
    "backend",
    "seed",
    "budget",
    "calls",
    "before",
    "stages",
}
RESULT_KEYS |= {"dev", "test", "seconds", "digest"}


def last_json(capsys: pytest.CaptureFixture[str]) -> Any:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.fixture
def flags(tiny_pair_data: Path, tiny_prompts: Path) -> list[str]:
    words = ["tune", "--task", "lcqmc", "--data", str(tiny_pair_data), "--prompts", str(tiny_prompts)]
    return [*words, "--budget", "44", "--threads", "1", "--set", "router=null"]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory, tiny_pair_data: Path, tiny_prompts: Path) -> Path:
    return finished(tmp_path_factory.mktemp("run") / "pair", tiny_pair_data, tiny_prompts)


def test_tune_shows_a_table_and_the_next_command(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.run([*flags, "--run-dir", "my run"]) == 0
    out, err = capsys.readouterr()
    assert "after prompts" in out
    assert "±" in out
    assert out.endswith("Next: bbprompt predict 'my run' --input texts.jsonl --output labels.jsonl\n")
    assert "budget: 44 calls, seed 42" in err
    assert "prompt: 22/44 calls, best train loss" in err
    assert "\x1b" not in out + err


def test_tune_prints_json_last_and_goes_on_with_what_was_begun(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.run([*flags, "--json", "--quiet"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    first = json.loads(out.splitlines()[-1])
    assert set(first) >= RESULT_KEYS | {"run_dir"}
    folder = Path(first["run_dir"])
    assert json.loads((folder / "result.json").read_text(encoding="utf-8")) == {
        key: value for key, value in first.items() if key != "run_dir"
    }
    # The default directory is named by what decides the result: the same command finds the same run.
    assert cli.run([*flags, "--json"]) == 0
    assert last_json(capsys) == first
    # As if it had been killed before it wrote its result: it goes on and finds the same.
    (folder / "result.json").unlink()
    assert cli.run([*flags, "--json"]) == 0
    assert last_json(capsys)["digest"] == first["digest"]
    (folder / "result.json").unlink()
    assert cli.run(["resume", str(folder), "--json"]) == 0
    assert last_json(capsys)["digest"] == first["digest"]
    # A directory that was named is only ever taken new.
    assert cli.run([*flags, "--run-dir", str(folder)]) == 2
    assert "bbprompt resume" in capsys.readouterr().err


def test_a_finished_run_is_only_shown(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is opened that anything could be sent to."""

    def opened(*_: Any) -> None:
        pytest.fail("the model was opened")

    monkeypatch.setattr("bbprompt.run.prepare", opened)
    before = {path.name: path.read_bytes() for path in run_dir.iterdir() if path.name != "run.lock"}
    assert cli.run(["resume", str(run_dir), "--json"]) == 0
    assert last_json(capsys) == {**json.loads(before["result.json"]), "run_dir": str(run_dir)}
    assert cli.run(["resume", str(run_dir)]) == 0
    out, err = capsys.readouterr()
    assert "after prompts" in out
    assert err.endswith("finished already; this is its result\n")
    assert {path.name: path.read_bytes() for path in run_dir.iterdir() if path.name != "run.lock"} == before


def test_settings_from_a_file_lose_against_flags(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    values = {
        "budget": 9000,
        "run-dir": str(tmp_path / "run"),
        "test_limit": 11,
        "quiet": True,
        "set": {"select": "dev-metric"},
    }
    file.write_text(yaml.safe_dump(values), encoding="utf-8")
    assert cli.run([*flags, "--config", str(file), "--json"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert err == ""
    assert (found["budget"], found["test"]["n"], found["run_dir"]) == (44, 11, str(tmp_path / "run"))
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["config"]["set"] == {"router": None, "select": "dev-metric"}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("budgett: 3", "unknown key 'budgett'; did you mean 'budget'"),
        ("batch-tokens: 3\nbatch_tokens: 3", "twice"),
        ("run_dir: 3", "run_dir: expected a path"),
        ("quiet: 3", "quiet: expected true or false"),
        ("set: [3]", "set: expected a mapping"),
        ("batch_tokens: many", "batch_tokens: expected a number of tokens from 1 on, or auto, got 'many'"),
        ("batch_tokens: true", "batch_tokens: expected a number of tokens from 1 on, or auto, got True"),
        ("budget: many", "budget: input should be a valid integer"),
    ],
)
def test_wrong_settings_in_a_file(content: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(f"task: lcqmc\n{content}\n", encoding="utf-8")
    assert cli.run(["tune", "--config", str(file)]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {file}: ")
    assert said in err


def test_tokens_at_once_are_a_number_or_auto(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("task: lcqmc\nbatch_tokens: 512\n", encoding="utf-8")
    for flag, tokens in ((None, 512), ("auto", None), ("64", 64)):
        settings, _, _ = _merged(file, {"batch_tokens": flag}, [])
        assert settings.batch_tokens == tokens
    assert (tokens_of("auto"), tokens_of("64"), tokens_of(None)) == (None, 64, None)
    with pytest.raises(UsageError, match="--batch-tokens: expected a number of tokens from 1 on, or auto, got '0'"):
        tokens_of("0")


def test_an_unknown_backend_is_refused(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([*flags, "--backend", "ftp://localhost:1"]) == 2
    assert "expected local, http://HOST:PORT" in capsys.readouterr().err


def test_without_ray_a_run_on_it_is_refused_and_one_here_goes(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)  # as where it is not installed
    words = [*flags, "--quiet", "--run-dir", str(tmp_path / "run")]
    assert cli.run([*words, "--ray", "local"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: --ray needs Ray: pip install 'bbprompt[ray]' (")
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()
    assert cli.run(words) == 0


def test_a_signal_stops_a_run_that_can_be_resumed(flags: list[str], tmp_path: Path) -> None:
    flags[flags.index("44")] = "3000"
    run = tmp_path / "run"
    # The signal comes from inside, at a known place: the 20th batch of calls.
    code = (
        "import os, sys; from bbprompt import cli, terminal\n"
        "old, seen = terminal.Terminal.status, []\n"
        "def status(self, status):\n"
        "    seen.append(status)\n"
        f"    if len(seen) == 20: os.kill(os.getpid(), {int(signal.SIGTERM)})\n"
        "    old(self, status)\n"
        "terminal.Terminal.status = status\n"
        "sys.exit(cli.run(sys.argv[1:]))"
    )
    done = subprocess.run(
        # Without patience, so that its end is far off.
        [sys.executable, "-c", code, *flags, "--set", "prompt.patience=null", "--run-dir", str(run)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 75, done.stderr
    assert done.stdout == ""
    assert done.stderr.splitlines()[-1] == f"stopped by SIGTERM; go on with: bbprompt resume {run}"
    assert not (run / "result.json").exists()
    assert len((run / "curve.csv").read_text(encoding="utf-8").splitlines()) > 15


def test_eval(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = json.loads((run_dir / "result.json").read_text(encoding="utf-8"))
    assert cli.run(["eval", str(run_dir), "--json", "--threads", "1"]) == 0
    found = last_json(capsys)
    assert found["value"] == pytest.approx(result["test"]["value"])
    assert (found["split"], found["n"], found["task"]) == ("test", 30, "tiny-pair")
    assert cli.run(["eval", str(run_dir), "--split", "dev", "--test-limit", "7", "--quiet"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("tiny-pair, dev of ")
    assert "(7 examples" in out
    assert err == ""


def test_predict_from_and_to_files(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"id": i, **row} for i, row in enumerate(tiny_prompt.pair_records(5, 6))]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    table = "text_a\ttext_b\n" + "".join(f"{row['text_a']}\t{row['text_b']}\n" for row in rows)
    (tmp_path / "in.jsonl").write_text(lines, encoding="utf-8")
    (tmp_path / "in.tsv").write_text(table, encoding="utf-8")
    found = {}
    for name in ("in.jsonl", "in.tsv"):
        output = tmp_path / f"{name}.out"
        words = ["predict", str(run_dir), "--input", str(tmp_path / name), "--output", str(output), "--json"]
        assert cli.run(words) == 0
        told = last_json(capsys)
        assert told["n"] == 5
        assert sum(told["labels"].values()) == 5
        found[name] = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    for row, first, second in zip(rows, found["in.jsonl"], found["in.tsv"], strict=True):
        assert first["id"] == row["id"]
        assert first["text_a"] == row["text_a"]
        assert first["label"] == second["label"]
        assert sum(first["probabilities"].values()) == pytest.approx(1.0, abs=1e-5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "in.jsonl.out", "in.tsv", "in.tsv.out"]


def test_predict_to_standard_output(run_dir: Path, tmp_path: Path, capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    (tmp_path / "in.jsonl").write_text('{"text_a": "天", "text_b": "气"}\n', encoding="utf-8")
    words = ["predict", str(run_dir), "--input", str(tmp_path / "in.jsonl"), "--output", "-"]
    assert cli.run(words) == 0
    assert json.loads(capsysbinary.readouterr().out)["text_b"] == "气"
    assert cli.run([*words, "--json"]) == 2


def test_predict_a_text_a_line(
    tmp_path: Path, tiny_single_data: Path, tiny_prompts: Path, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = finished(tmp_path / "run", tiny_single_data, tiny_prompts)
    (tmp_path / "in.txt").write_text("天气好\n\n球赛\n", encoding="utf-8")
    words = ["--input", str(tmp_path / "in.txt"), "--output", str(tmp_path / "out.jsonl")]
    assert cli.run(["predict", str(run), *words]) == 0
    assert capsys.readouterr().out == f"2 texts labelled: {tmp_path / 'out.jsonl'}\n"
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["text"] for row in rows] == ["天气好", "球赛"]
    assert all(set(row["probabilities"]) == {f"l{i}" for i in range(7)} for row in rows)
    (tmp_path / "in.txt").write_text("天" * 500 + "\n", encoding="utf-8")
    assert cli.run(["predict", str(run), *words]) == 0
    assert "tokens did not fit the model and were cut" in capsys.readouterr().err
    assert cli.run(["predict", str(run), *words, "--json"]) == 0
    assert last_json(capsys)["cut_tokens"] > 300
    (tmp_path / "in.txt").write_text("天气好\n\n球赛\n", encoding="utf-8")
    assert cli.run(["predict", str(run_dir), *words]) == 2
    assert "in.txt:1: the task tiny-pair needs records with text_a, text_b" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "code", "said"),
    [
        (b'{"text_a": "a", "text_b": "b"}\n{"text_a": "a"}\n', 65, "in.jsonl:2: the field 'text_b' is missing"),
        (b'{"text_a": "a", "text_b": "\xff"}\n', 65, "in.jsonl:1: not UTF-8 at byte 27"),
        (b"", 65, "the file is empty"),
        (b"\n\n", 65, "no records"),
    ],
)
def test_bad_inputs_leave_no_output(
    content: bytes, code: int, said: str, run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in.jsonl").write_bytes(content)
    output = tmp_path / "out" / "labels.jsonl"
    output.parent.mkdir()
    output.write_text("old\n", encoding="utf-8")
    words = ["predict", str(run_dir), "--input", str(tmp_path / "in.jsonl"), "--output", str(output)]
    assert cli.run(words) == code
    assert said in capsys.readouterr().err
    assert [(path.name, path.read_text(encoding="utf-8")) for path in output.parent.iterdir()] == [
        ("labels.jsonl", "old\n")
    ]


def test_bad_outputs(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in.jsonl").write_text('{"text_a": "a", "text_b": "b"}\n', encoding="utf-8")
    words = ["predict", str(run_dir), "--input", str(tmp_path / "in.jsonl"), "--output"]
    assert cli.run([*words, str(tmp_path / "no" / "out.jsonl")]) == 2
    assert cli.run([*words, str(tmp_path)]) == 74
    assert cli.run([*words, "/dev/full"]) == 74
    assert "/dev/full: cannot be written: No space left on device" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["eval"], ["predict", "--input", "in.jsonl", "--output", "-"]])
def test_an_unfinished_run_is_no_use(
    words: list[str], run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(run_dir, "run")
    for name in ("result.json", "prompt.safetensors"):  # what a run that was stopped lacks
        Path("run", name).unlink()
    Path("in.jsonl").write_text('{"text_a": "a", "text_b": "b"}\n', encoding="utf-8")
    assert cli.run([words[0], "run", *words[1:]]) == 2
    said = "run/prompt.safetensors: not there, for this run is not finished; go on with `bbprompt resume run`"
    assert capsys.readouterr().err.splitlines()[-1] == f"error: {said}"


def test_tasks(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["tasks", "--json"]) == 0
    names = [task["name"] for task in last_json(capsys)["tasks"]]
    assert cli.run(["tasks"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["task", *names]
    assert cli.run(["tasks", "lcqmc"]) == 0
    told = yaml.safe_load(capsys.readouterr().out)
    assert told["labels"] == {"0": "矛盾", "1": "相似"}
    assert told["sources"]


def test_methods(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["methods", "--json"]) == 0
    assert {method["name"] for method in last_json(capsys)["methods"]} >= {"mp2-deep", "mp2-shallow"}
    assert cli.run(["methods"]) == 0
    assert "mp2-deep-code" in capsys.readouterr().out
    assert cli.run(["methods", "mp2-deep", "--set", "prompt.sigma=0.5"]) == 0
    told = yaml.safe_load(capsys.readouterr().out)
    assert (told["prompt"]["sigma"], told["router"]["kappa"]) == (0.5, 2.0)


def test_doctor(cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("BBPROMPT_DATA", raising=False)
    code = cli.run(["doctor", "--json"])
    told = last_json(capsys)
    assert code == (2 if told["problems"] else 0)
    states = {finding["name"]: finding["state"] for finding in told["findings"]}
    assert states["packages"] == states["torch"] == states["cache"] == "ok"
    assert states["data"] == "note"
    monkeypatch.setenv("BBPROMPT_DATA", "/nowhere/at/all")
    assert cli.run(["doctor"]) == 2
    out = capsys.readouterr().out
    assert "problem  data: BBPROMPT_DATA: /nowhere/at/all is no directory\n         -> correct or unset it" in out
    assert out.splitlines()[-1].endswith(" to fix")
