"""Pages: whole, self-contained, and never what a text in them says."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from contextlib import AbstractContextManager
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_prompt
import typer
from fakeruns import fake_run
from servers import serving
from tiny_run import finished

from bbprompt import cli
from bbprompt.config import TuneConfig, parse_set
from bbprompt.connect import open_oracle
from bbprompt.prompts import ModularPrompt, bundled_prompts
from bbprompt.report.again import SWEEP_FLAGS, reproduce, reproduce_sweep
from bbprompt.report.artifact import task_groups
from bbprompt.report.examples import Judged, confusion, worst
from bbprompt.report.page import Html, escaped, heat, table
from bbprompt.report.run import leaves
from bbprompt.sweep.experiment import experiment_from
from bbprompt.sweep.runner import read_sweep, write_sweep

EVIL = '<script>alert("1")</script><img src=http://x.y onerror=alert(2)>&amp;\' {$z$} \x00\x1b'
VOID = {"meta", "img", "br", "link", "input"}


class Checker(HTMLParser):
    """Every tag is closed; collects tags, attributes and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.rows: list[list[str]] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data

    @property
    def text(self) -> str:
        return "".join(self.texts)


def checked(file: Path) -> Checker:
    """A page that is well formed, loads nothing and runs nothing."""
    found = Checker(file.read_text(encoding="utf-8"))
    assert not found.tags & {"script", "link", "iframe", "object", "embed"}
    for name, value in found.attributes:
        assert not name.startswith("on")
        if name in ("src", "href", "xlink:href"):
            assert value.startswith(("#", "data:image/png;base64,"))
    assert "url(http" not in file.read_text(encoding="utf-8")
    return found


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory, tiny_pair_data: Path, tiny_prompts: Path) -> Path:
    return finished(tmp_path_factory.mktemp("run") / "pair", tiny_pair_data, tiny_prompts)


def test_a_run(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "report.html"
    assert cli.run(["report", str(run_dir), "--out", str(out), "--examples", "3", "--threads", "1", "--json"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told == {"out": str(out), "kind": "run", "bytes": out.stat().st_size}
    page = checked(out)
    result = json.loads((run_dir / "result.json").read_text(encoding="utf-8"))
    for said in ("Before and after", "Against calls", "Confusions", "The worst examples", "Do it again", "Settings"):
        assert said in page.text
    # What was scored again is what the run found.
    assert f"accuracy {100 * result['test']['value']:.1f} % on 30 test examples" in page.text
    assert "are not the same" not in page.text
    assert "--seed 7" in page.text
    assert "--set router=null" in page.text
    assert "svg" in page.tags
    rows = {row[0]: row[1:] for row in page.rows if row}
    stages = {f"after {stage['name']} ({stage['optimizer']})": stage for stage in result["stages"]}
    assert list(stages) == ["after prompt (cmaes)", "after calibration (newton)"]
    for name, found in ({"before (nothing tuned)": result["before"]} | stages).items():
        assert rows[name][:2] == [f"{100 * found['dev']:.1f}", f"{100 * found['test']:.1f}"]
    assert [rows[name][3] for name in stages] == [str(stage["calls"]) for stage in stages.values()]
    assert rows["returned"][:2] == [f"{100 * result['dev']:.1f}", f"{100 * result['test']['value']:.1f}"]
    manifest = json.loads((run_dir / "manifest.json").read_text(encoding="utf-8"))
    assert ["few_shot", manifest["data"]["few_shot"]] in page.rows
    assert ["prompt.popsize", str(manifest["method"]["prompt"]["popsize"])] in page.rows
    # The same page again, byte by byte.
    again = tmp_path / "again.html"
    assert cli.run(["report", str(run_dir), "--out", str(again), "--examples", "3", "--threads", "1", "--quiet"]) == 0
    assert again.read_bytes() == out.read_bytes()


def test_the_command_of_the_page_finds_the_same(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli.run(["report", str(run_dir), "--out", str(tmp_path / "r.html"), "--no-test"]) == 0
    (line,) = re.findall(r"^bbprompt tune .*$", checked(tmp_path / "r.html").text, re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    assert cli.run([*shlex.split(line)[1:], "--quiet"]) == 0
    (again,) = tmp_path.glob("runs/*/result.json")
    first, second = (json.loads(file.read_text("utf-8")) for file in (run_dir / "result.json", again))
    assert first["digest"] == second["digest"]


def test_the_cheap_methods_stand_beside_a_run(tmp_path: Path) -> None:
    run = fake_run(tmp_path, "lcqmc", "mp2-deep", 1, 0.7, baselines={"zero-shot": 0.61, "threshold": 0.78})
    assert cli.run(["report", str(run), "--out", str(tmp_path / "r.html"), "--no-test"]) == 0
    rows = [row for row in checked(tmp_path / "r.html").rows if row and row[0].startswith("no prompt")]
    assert rows == [
        ["no prompt, zero-shot", "60.0", "61.0", "4.0", "0", "1"],
        ["no prompt, threshold", "60.0", "78.0", "4.0", "0", "1"],
    ]


def test_a_server_that_is_elsewhere_now_labels_the_test_examples(
    tiny_pair_data: Path, tiny_prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def served() -> AbstractContextManager[str]:
        return serving(open_oracle("local", ModularPrompt.load(tiny_prompts), dtype="float32", threads=1))

    with served() as url:
        run = finished(tmp_path / "run", tiny_pair_data, tiny_prompts, backend=url, baselines=False)
    words = ["report", str(run), "--out", str(tmp_path / "r.html"), "--threads", "1"]
    with served() as moved:
        assert cli.run([*words, "--backend", moved]) == 0
    for more, said in (["--no-test"], "--no-test labels nothing again"), (["--test"], f"{tiny_prompts} is no run"):
        words[1] = str(tiny_prompts) if "is no run" in said else str(run)
        assert cli.run([*words, *more, "--backend", "http://localhost:1"]) == 2
        assert f"--backend http://localhost:1: {said}" in capsys.readouterr().err
    assert "on 30 test examples" in checked(tmp_path / "r.html").text


def test_a_run_without_its_test_data(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "report.html"
    monkeypatch.setattr("bbprompt.predict.load_prompt", None)
    assert cli.run(["report", str(run_dir), "--out", str(out), "--no-test"]) == 0
    page = checked(out)
    assert "Before and after" in page.text
    assert "Confusions" not in page.text


@pytest.mark.parametrize("kind", ["choice", "extract"])
def test_other_kinds_of_tasks(kind: str, tmp_path: Path, request: pytest.FixtureRequest, tiny_prompts: Path) -> None:
    run = finished(tmp_path / "run", request.getfixturevalue(f"tiny_{kind}_data"), tiny_prompts)
    assert cli.run(["report", str(run), "--out", str(tmp_path / "r.html"), "--test-limit", "12"]) == 0
    text = checked(tmp_path / "r.html").text
    assert "on 12 test examples" in text
    assert "Confusions" not in text
    assert ("F1" in text) == (kind == "extract")


def test_texts_of_examples_are_escaped(tmp_path: Path, tiny_prompts: Path) -> None:
    rows = tiny_prompt.pair_records(90, 1)
    evil = EVIL.replace("\x00", "").replace("\x1b", "")
    hurt = [{**row, "text_a": f"{row['text_a']}{evil}"} for row in tiny_prompt.pair_records(20, 3)]
    task = {**tiny_prompt.PAIR, "labels": {"0": "<b>矛盾", "1": "相似&lt;"}, "sources": [EVIL[:-2]]}
    data = tiny_prompt.data_dir(tmp_path / "data", task, {"train": rows, "dev": rows[:20], "test": hurt})
    run = finished(tmp_path / "run", data, tiny_prompts)
    out = tmp_path / "r.html"
    assert cli.run(["report", str(run), "--out", str(out)]) == 0
    page = checked(out)
    assert "b" not in page.tags
    assert evil in page.text
    assert "<b>矛盾" in page.text


def test_a_sweep(tmp_path: Path) -> None:
    for seed in (1, 2):
        for method in ("mp2-deep", "mp2-shallow"):
            fake_run(tmp_path, "lcqmc", method, seed, 0.6 + seed / 10, upstream=0.6)
            fake_run(tmp_path, "thucnews", method, seed, 0.7)
    fake_run(tmp_path, "tnews", "mp2-deep", 1, None)
    out = tmp_path / "r.html"
    assert cli.run(["report", str(tmp_path), "--out", str(out), "--baseline", "mp2-shallow"]) == 0
    page = checked(out)
    for said in ("Paired differences", "mp2-deep, after upstream", "tnews-mp2-deep-1", "stopped", "75.0 (7.1)"):
        assert said in page.text
    assert "mathdefault" not in page.text


PROMPT_STAGE = {"layout": "joint", "popsize": 10, "sigma_first": 0.5, "sigma": 0.1}
GRID = {"tasks": ["lcqmc", "tnews"], "methods": ["mp2-deep"], "seeds": [1, 2]}


@pytest.mark.parametrize(
    ("grid", "settings"),
    [
        ({}, {"budget": 60, "test_limit": 5, "threads": 1, "set": {"router": None, "prompt.sigma": 0.5}}),
        ({}, {"threads": 1, "set": {"prompt": PROMPT_STAGE, "select": "dev-loss"}}),
        ({}, {"threads": 1, "on_doubt": "charge", "allow_overlap": False, "baselines": False}),
        ({}, {"threads": 1, "allow_overlap": True, "baselines": True}),
        ({"variants": {"full": {}, "few": {"shots": 4, "set": {"select": "dev-loss"}}}}, {"threads": 1, "budget": 70}),
    ],
)
def test_the_commands_that_make_a_sweep_again(
    grid: dict[str, Any], settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    experiment = experiment_from(None, {**GRID, **grid}, settings)
    write_sweep(out, experiment, None)
    fake_run(out, "lcqmc", "mp2-deep", 1, 0.6, named=experiment.cells()[0].name)
    assert cli.run(["report", str(out), "--out", str(tmp_path / "r.html")]) == 0
    text = reproduce_sweep(experiment, out)
    assert text in checked(tmp_path / "r.html").text
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("bbprompt.sweep.runner.run_sweep", lambda *_: None)
    *file, command = text.splitlines()
    if file:
        Path("experiment.yaml").write_text("\n".join(file[1:-1]), encoding="utf-8")
    assert bool(file) == bool(grid)
    words = shlex.split(command.replace(str(out), str(tmp_path / "again")))
    assert cli.run([*words[1:], "--quiet"]) == 75  # nothing is done yet
    assert read_sweep(tmp_path / "again") == experiment


def test_the_flags_of_a_sweep_are_known() -> None:
    commands = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
    names = {parameter.name for parameter in commands["sweep"].params}
    assert set(SWEEP_FLAGS) == names & TuneConfig.model_fields.keys() - {"ray", "workers"}  # those say where


def test_router_of_a_run(tmp_path: Path) -> None:
    run = fake_run(tmp_path, "lcqmc", "mp2-deep", 1, 0.6, router=[[1.0, -1.0, 1.0, 1.0], [1.0, 1.0, 1.0, -1.0]])
    assert cli.run(["report", str(run), "--out", str(tmp_path / "r.html"), "--no-test"]) == 0
    text = checked(tmp_path / "r.html").text
    assert "layer 2" in text
    assert text.count("0.25") == 6  # binary gates, the mean over K = 4


def test_a_router_stage_that_found_nothing_is_said(tmp_path: Path) -> None:
    for name, keys in (("routed", {"routed": 0.5}), ("plain", {})):
        run = fake_run(tmp_path, "lcqmc", "mp2-deep", 1, 0.6, named=name, **keys)
        assert cli.run(["report", str(run), "--out", str(tmp_path / "r.html"), "--no-test"]) == 0
        assert ("came from no router" in checked(tmp_path / "r.html").text) is bool(keys)


def test_weights_that_a_run_mixed_by_are_shown_as_they_are(tmp_path: Path) -> None:
    run = fake_run(tmp_path, "lcqmc", "mp2-deep", 1, 0.6, router=[[1.0, -1.0]], weights=[[0.37, 0.63]])
    assert cli.run(["report", str(run), "--out", str(tmp_path / "r.html"), "--no-test"]) == 0
    text = checked(tmp_path / "r.html").text
    assert "0.37" in text
    assert "0.63" in text, "not what the method's rule would make of the router"


def test_prompts(tmp_path: Path) -> None:
    name, path = next(iter(bundled_prompts().items()))
    for given in (name, str(path)):
        assert cli.run(["report", given, "--out", str(tmp_path / f"{Path(given).is_dir()}.html")]) == 0
    page = checked(tmp_path / "True.html")
    assert (tmp_path / "False.html").read_bytes() == (tmp_path / "True.html").read_bytes()
    assert name in page.text
    for task in ModularPrompt.load(path).config.tasks:
        assert page.text.count(task) >= 3  # figure, groups, routers


def test_prompts_of_few_tasks(tmp_path: Path, tiny_prompts: Path, tiny_shallow_prompts: Path) -> None:
    for folder in (tiny_prompts, tiny_shallow_prompts):
        assert cli.run(["report", str(folder), "--out", str(tmp_path / "r.html")]) == 0
        checked(tmp_path / "r.html")


def test_alike_tasks_are_one_group() -> None:
    rng = np.random.default_rng(0)
    centres = np.repeat(rng.normal(size=(3, 10)), 4, axis=0)
    weights = centres + rng.normal(scale=0.01, size=centres.shape)
    names = tuple(f"t{place}" for place in range(12))
    found = task_groups(weights[::-1], names[::-1], 3)
    assert {frozenset(group) for group in found.groups} == {frozenset(names[begin : begin + 4]) for begin in (0, 4, 8)}
    heights = found.links[:, 2]
    assert (heights < found.cut).sum() == 9  # nine merges inside the groups
    same = task_groups(np.ones((4, 3)), names[:4], 3)
    assert sorted(name for group in same.groups for name in group) == list(names[:4])


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["nowhere"], 2, "no such directory"),
        (["."], 2, "no run directories"),
        (["run", "--baseline", "x"], 2, "is no sweep"),
        (["open"], 2, "not finished; go on with `bbprompt resume open`"),
    ],
)
def test_wrong_use(
    words: list[str],
    code: int,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    if words[0] != ".":
        fake_run(tmp_path, "lcqmc", "mp2-deep", 1, 0.6, named="run")
        fake_run(tmp_path, "lcqmc", "mp2-deep", 2, None, named="open")
    assert cli.run(["report", *words, "--out", "r.html", "--no-test"]) == code
    assert said in capsys.readouterr().err
    assert not Path("r.html").exists()


def test_wrong_targets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = fake_run(tmp_path, "lcqmc", "mp2-deep", 1, 0.6)
    assert cli.run(["report", str(run), "--out", str(tmp_path / "no" / "r.html")]) == 2
    assert cli.run(["report", str(run), "--out", str(tmp_path)]) == 2
    assert cli.run(["report", str(run), "--out", "/dev/full", "--no-test"]) == 74
    assert "/dev/full: cannot be written" in capsys.readouterr().err


def test_matplotlib_is_said_to_be_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    run = fake_run(tmp_path, "lcqmc", "mp2-deep", 1, 0.6)
    assert cli.run(["report", str(run), "--out", str(tmp_path / "r.html"), "--no-test"]) == 2
    assert "pip install 'bbprompt[report]'" in capsys.readouterr().err


def test_everything_but_markup_is_escaped() -> None:
    text = escaped(EVIL)
    assert "<" not in text
    assert "\\x00" in text
    assert escaped(text) == text
    assert escaped("\ud800") == "\\ud800"
    assert "<b>" in table([""], [[Html("<b>x</b>")]])
    assert "<script" not in table([EVIL], [[EVIL]]) + heat([EVIL], [EVIL], [[1.0]], ".1f", EVIL)


def test_shades() -> None:
    text = heat(["a", "b"], ["c"], [[0.0, 2.0]], ".0f")
    assert re.findall(r"rgb\([\d,]+\)", text) == ["rgb(255,255,255)", "rgb(23,78,138)"]
    assert "rgb(255,255,255)" in heat(["a"], ["c"], [[0.0]], ".0f")


def test_a_short_column_beside_long_texts_stays_in_one_line() -> None:
    found = table(["text", "right", "n"], [["a long text of many words " * 3, "负面", 1], ["short", "正面", 2]])
    assert '<th>text</th><th class="short">right</th><th class="number">n</th>' in found
    assert '<td class="short">负面</td>' in found


def test_confusions_and_the_worst() -> None:
    def one(right: str, given: str, probability: float) -> Judged:
        return Judged({}, right, given, float(right == given), probability, 0.9)

    judged = [one("a", "a", 0.9), one("a", "b", 0.3), one("b", "a", 0.1), one("b", "a", 0.2)]
    assert confusion(["a", "b"], judged).tolist() == [[1, 1], [2, 0]]
    assert [each.probability for each in worst(judged, 2)] == [0.1, 0.2]


def test_leaves() -> None:
    value: Mapping[str, Any] = {"a": {"b": 1, "c": []}, "d": ["x", "y"], "e": [{"f": None}], "g": {}}
    assert dict(leaves(value)) == {"a.b": "1", "a.c": "[]", "d": '["x", "y"]', "e.0.f": "null", "g": "{}"}


def test_the_command_that_makes_a_run_again() -> None:
    config = TuneConfig(task="lcqmc", baselines=False, on_doubt="charge", set={"prompt.sigma": 0.1})
    command = reproduce(config, {"threads": 2}).splitlines()[0]
    assert command == (
        "bbprompt tune --task lcqmc --method mp2-deep --budget 8000 --seed 42 --on-doubt charge --threads 2 "
        "--no-baselines --set prompt.sigma=0.1"
    )


@pytest.mark.parametrize("value", [1e-05, None, "ce", "1", "null", "[", "a: b", "", "@a", {"popsize": 10}, ["a", "1"]])
def test_changes_come_back_as_they_were(value: object) -> None:
    config = TuneConfig(task="lcqmc", set={"prompt": value})
    words = shlex.split(reproduce(config, {}).splitlines()[0])
    assert parse_set([words[words.index("--set") + 1]]) == {"prompt": value}
