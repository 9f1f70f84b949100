"""What the README tells people to type exists: commands, flags, make targets, files, settings."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

import bbprompt
from bbprompt import cli
from bbprompt.config import load_method, method_with, parse_set
from bbprompt.tasks.task import Task, load_task, task_names

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = [match.group(1, 2) for match in re.finditer(r"^```(\w*)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)]
COMMANDS = [line for _, body in BLOCKS for line in body.splitlines() if line.startswith("bbprompt ")]


def parse(line: str) -> dict[str, Any]:
    """Parameters of a command line, parsed as the command line does it, without running anything."""
    command: Any = typer.main.get_command(cli.app)
    context, words = None, shlex.split(line)
    while True:
        name = words.pop(0)
        is_group = hasattr(command, "commands")
        context = command.make_context(name, [] if is_group else words, parent=context, resilient_parsing=is_group)
        if not is_group:
            return dict(context.params)
        command = command.commands[words[0]]


def test_there_are_commands() -> None:
    assert {line.split()[1] for line in COMMANDS} == {
        "tune",
        "resume",
        "eval",
        "predict",
        "pretrain",
        "sweep",
        "compare",
        "report",
        "export",
        "tasks",
        "methods",
        "doctor",
        "serve",
        "export-server",
    }


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_and_flags_exist(line: str) -> None:
    found = parse(line)
    if found.get("changes"):
        method_with(load_method(found.get("method") or "mp2-deep"), parse_set(found["changes"]))


def test_a_wrong_flag_would_be_noticed() -> None:
    with pytest.raises(typer.TyperException):
        parse("bbprompt tune --tusk lcqmc")
    with pytest.raises(KeyError):
        parse("bbprompt tunes")


def test_the_table_names_every_command() -> None:
    table = set(re.findall(r"^\| `bbprompt ([\w-]+)", TEXT, re.MULTILINE))
    assert table == set(typer.main.get_command(cli.app).commands)  # type: ignore[attr-defined]


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(re.findall(r"\bmake (\w+)", TEXT)) <= targets


def test_the_tree_names_what_is_there() -> None:
    (tree,) = (body for _, body in BLOCKS if body.startswith("bbprompt/ "))
    for line in tree.splitlines():
        names, folder = line[:23], ROOT / "bbprompt" if line.startswith("  ") else ROOT
        for name in re.findall(r"[\w./]+", names):
            assert (folder / name).exists(), name


def test_the_task_is_valid() -> None:
    text, hub = (body for language, body in BLOCKS if language == "yaml")
    assert Task.model_validate(yaml.safe_load(text)).labels == {"0": "负面", "1": "正面"}
    pair = yaml.safe_load((ROOT / "configs" / "tasks" / "lcqmc.yaml").read_text(encoding="utf-8"))
    assert Task.model_validate(pair | yaml.safe_load(hub)).hub is not None


def test_the_tasks_of_the_hub_are_those_that_know_one() -> None:
    (said,) = re.findall(r"--data hub`, with `.\[data\]`\): ([\w, \n]+);", TEXT)
    assert set(said.replace("\n", " ").split(", ")) == {
        name for name in task_names() if load_task(name).hub is not None
    }


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", TEXT):
        assert (ROOT / target).exists(), target


def test_python_names_are_public() -> None:
    (code,) = (body for language, body in BLOCKS if language == "python")
    compile(code, "README.md", "exec")
    assert set(re.findall(r"bbprompt\.(\w+)", code)) <= set(bbprompt.__all__)


def test_the_changelog_has_this_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## [{bbprompt.__version__}]" in text
