"""The worked examples of docs/pretraining.md do what the page says, and single prompts load in `tune`."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import tiny_prompt
import tinytrain
from test_pretrain_ppt import corpus

from bbprompt import cli
from bbprompt.prompts import ModularPrompt

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "pretraining.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"^```\w+ file=(\S+)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL))
COMMANDS = [
    line for body in re.findall(r"^```sh\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL) for line in body.splitlines()
]
pytestmark = pytest.mark.usefixtures("token_cache")


def test_the_page_has_its_examples() -> None:
    assert len(FILES) == 7
    assert [line.split()[1] for line in COMMANDS] == ["pretrain", "pretrain", "tune", "pretrain"]


def test_the_worked_examples(
    tiny_bert_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("BBPROMPT_DATA", raising=False)
    rng = np.random.default_rng(0)
    for name, content in FILES.items():
        text = content.replace("intfloat/multilingual-e5-small", str(tiny_bert_dir))
        if name.endswith(".jsonl"):
            records = [json.loads(line) for line in content.splitlines()]
            for record in records * 59:
                words = {key: tiny_prompt.words(rng, 4, 9) for key in record if key != "label"}
                text += json.dumps(record | words, ensure_ascii=False) + "\n"
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    corpus(tmp_path / "text.txt", 60)
    for line in COMMANDS:
        # The search for a router is a long story that other tests tell.
        short = ["--set", "router=null"] if "tune" in line else []
        assert cli.run([*shlex.split(line)[1:], *short, "--device", "cpu", "--quiet"]) == 0, capsys.readouterr().err
    shop = ModularPrompt.load(tmp_path / "prompts" / "shop" / "artifact")
    assert shop.config.tasks == ("shop_question", "shop_review")
    assert shop.config.sources[0] == "shop_question: our shop, 2024 (internal)"
    assert shop.config.training["best_step"] in (6, 12)
    result = json.loads((tmp_path / "runs" / "shop" / "result.json").read_text(encoding="utf-8"))
    assert result["task"] == "shop_review"
    assert ModularPrompt.load(tmp_path / "prompts" / "text" / "artifact").config.kind == "ppt"


def test_the_files_of_the_page_are_enough_to_run_a_training(
    tiny_bert_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("BBPROMPT_DATA", raising=False)
    for name, content in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content.replace("intfloat/multilingual-e5-small", str(tiny_bert_dir)), "utf-8")
    train = [*shlex.split(COMMANDS[0])[1:], "--device", "cpu", "--quiet"]
    question = tmp_path / "mytasks" / "shop_question" / "train.jsonl"
    good = question.read_text(encoding="utf-8")
    question.write_text(good.splitlines()[0] + "\n", encoding="utf-8")
    assert cli.run(train) == 65
    assert "task shop_question: no example is left to train on; add examples" in capsys.readouterr().err
    question.write_text(good, encoding="utf-8")
    assert cli.run(train) == 0, "a directory in which nothing was trained is free"
    log = tmp_path / "prompts" / "shop" / "train.jsonl"
    last = json.loads(log.read_text(encoding="utf-8").splitlines()[-1])
    assert last["speed"]["tokens_per_second"] > 0
    assert cli.run([*shlex.split(COMMANDS[1])[1:], "--device", "cpu", "--quiet"]) == 0
    assert json.loads(log.read_text(encoding="utf-8").splitlines()[-1]) == last


@pytest.mark.parametrize(("depth", "layers"), [("input", 1), ("all", 3), (2, 2)])
def test_one_prompt_for_all_tasks_loads_in_tune(
    depth: str | int, layers: int, tiny_bert_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tinytrain.data_root(tmp_path / "data")
    recipe = tinytrain.make_recipe(data, tiny_bert_dir, kind="spot", modules=1, depth=depth)
    file = tmp_path / "recipe.json"
    file.write_text(recipe.model_dump_json(), encoding="utf-8")
    out = tmp_path / "out"
    begin = ["pretrain", "spot", "--config", str(file), "--out", str(out), "--data", str(data), "--device", "cpu"]
    assert cli.run([*begin, "--quiet"]) == 0
    advice = capsys.readouterr().out.splitlines()[-1]
    prompt = ModularPrompt.load(out / "artifact")
    assert (prompt.config.kind, prompt.config.modules, prompt.config.tasks) == ("spot", 1, ())
    assert prompt.routers.shape == (0, layers, 1)
    where = {"input": "at the input", "all": "before each", 2: "before the first 2"}[depth]
    card = (out / "artifact" / "README.md").read_text(encoding="utf-8")
    assert f"One soft prompt of 2 positions {where} of the backbone's" in " ".join(card.split())
    method = "mp2-shallow" if depth == "input" else "mp2-deep"
    assert advice == f"Next: bbprompt tune --task lcqmc --method {method} --set router=null --prompts {out}/artifact"
    if depth == "all":
        return
    words = shlex.split(advice)[2:]
    words[2] = str(data / "tiny-pair" / "task.yaml")
    more = ["--data", str(data / "tiny-pair"), "--budget", "60", "--run-dir", str(tmp_path / "run"), "--device", "cpu"]
    more += ["--allow-overlap"]
    (data / "tiny-pair" / "test.jsonl").write_bytes((data / "tiny-pair" / "train.jsonl").read_bytes())
    assert cli.run([*words, *more, "--quiet"]) == 0, capsys.readouterr().err
    assert json.loads((tmp_path / "run" / "result.json").read_text(encoding="utf-8"))["prompts"] == str(
        out / "artifact"
    )
