"""Wrong input at the command line: one line, with what was given and what to do, and the right exit code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_prompt

from bbprompt import cli
from bbprompt.backends.backbone import load_backbone
from bbprompt.backends.fit import check_fit
from bbprompt.errors import ArtifactError
from bbprompt.prompts import ModularPrompt


def failing(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code and message of a command that fails; the message is the only line but for what is logged before."""
    code = cli.run(words)
    err = capsys.readouterr().err.strip().splitlines()
    assert sum(line.startswith("error: ") for line in err) == 1
    assert err[-1].startswith("error: "), err
    return code, err[-1].removeprefix("error: ")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("tasks lcqcm", "NAME: there is no bundled task 'lcqcm'; did you mean 'lcqmc' or 'ccpm'?"),
        ("tasks zzz", "NAME: there is no bundled task 'zzz'; `bbprompt tasks` lists them"),
        ("methods mp2-dep", "NAME: there is no method 'mp2-dep'; did you mean 'mp2-deep' or"),
        ("methods zzz", "NAME: there is no method 'zzz'; `bbprompt methods` lists them"),
        ("tune --task lcqcm", "--task: there is no bundled task 'lcqcm'; did you mean 'lcqmc' or 'ccpm'?"),
        ("tune --task lcqmc --method bbtv", "--method: there is no method 'bbtv'; did you mean"),
        ("sweep --out x --tasks lcqcm --methods untuned --seeds 1", "--tasks: there is no bundled task 'lcqcm'; did"),
        ("sweep --out x --tasks lcqmc --methods mp2-dep --seeds 1", "--methods: there is no method 'mp2-dep'; did"),
        ("sweep --out x --config main-tabel", "--config main-tabel: no such file or bundled experiment; did you mean"),
        ("pretrain mp2 --config mp2-prot", "--config mp2-prot: no such file or bundled recipe; did you mean"),
        (
            "pretrain mp2",
            "give a recipe of yours or one of mp2-deep, mp2-deep-no-fsl, mp2-deep-pairs, mp2-proto, mp2-proto-more, "
            "mp2-shallow",
        ),
        ("tune --task lcqmc --set prompt.sigm=1", "--set prompt.sigm: the method mp2-deep has no such setting; did"),
        ("methods mp2-deep --set rooter.calls=1", "no such setting; did you mean 'router.calls'"),
        ("methods mp2-deep --set zzz=1", "no such setting; `bbprompt methods mp2-deep` shows them"),
        ("tune --task lcqmc --prompts=", "prompts: the value is empty; leave it out for the default"),
        ("tune --task lcqmc --data=", "data: the value is empty; leave it out"),
        ("tune --task lcqmc --backbone=", "backbone: the value is empty; leave it out"),
        ("tune --task=", "task: the value is empty; leave it out"),
        ("tune --task lcqmc --data sample --budget 24", "--budget 24: method mp2-deep needs at least 25 calls"),
    ],
)
def test_names_and_values(
    words: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code, said = failing(words.split(), capsys)
    assert code == 2
    assert message in said
    assert not list(tmp_path.iterdir()), "nothing was begun"


def test_no_prompts_for_a_method_that_needs_some(
    tmp_path: Path, tiny_pair_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["tune", "--task", "lcqmc", "--data", str(tiny_pair_data), "--run-dir", str(tmp_path / "run")]
    code, said = failing([*words, "--prompts", "none"], capsys)
    assert code == 2
    assert said.endswith("the method mp2-deep needs a prompt artifact; name one, or leave it out for e5-small-mp2-deep")
    code, said = failing([*words, "--method", "bbt-mrc", "--prompts", "e5-small-mp2-deep"], capsys)
    assert code == 2
    assert said.endswith(
        "--prompts e5-small-mp2-deep: the method bbt-mrc takes no artifact; leave it out or say --prompts none"
    )
    assert not (tmp_path / "run").exists()


def test_splits_that_are_missing_or_too_small(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = tiny_prompt.pair_records(20, 1)
    folder = tiny_prompt.data_dir(tmp_path / "data", tiny_prompt.PAIR, {"dev": records})
    words = ["tune", "--task", str(folder / "task.yaml"), "--data", str(folder)]
    code, said = failing(words, capsys)
    assert code == 65
    assert said.startswith(f"{folder}: the split 'train' of task tiny-pair is missing; there is dev; add train.jsonl")
    (folder / "train.jsonl").write_text((folder / "dev.jsonl").read_text(encoding="utf-8"), encoding="utf-8")
    code, said = failing(words, capsys)
    assert code == 65
    assert said.startswith(f"{folder}, train: task tiny-pair: the label '矛盾' has 10 different training examples, but")
    assert said.endswith("add data or lower --shots")
    (folder / "dev.jsonl").unlink()
    code, said = failing([*words, "--shots", "2"], capsys)
    assert code == 65
    assert said.startswith(f"{folder}: the split 'test' of task tiny-pair is missing; there is train; add test.jsonl")


def test_prompts_of_another_shape(tiny_bert_dir: Path) -> None:
    backbone = load_backbone(str(tiny_bert_dir))
    prompt = tiny_prompt.artifact(tiny_bert_dir, backbone.digest, layers=4)
    with pytest.raises(ArtifactError, match=r"config\.json says 4 layers, the backbone has 3; fetch them again, or"):
        check_fit(prompt, backbone)


def test_a_corrupt_artifact_and_one_for_another_backbone(
    tmp_path: Path, tiny_pair_data: Path, tiny_prompts: Path, tiny_roberta_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["tune", "--task", "lcqmc", "--data", str(tiny_pair_data), "--run-dir", str(tmp_path / "run")]
    code, said = failing([*words, "--prompts", str(tiny_prompts), "--backbone", str(tiny_roberta_dir)], capsys)
    assert code == 65
    assert said.endswith("choose other --prompts or another --backbone, or train some: bbprompt pretrain")
    ModularPrompt.load(tiny_prompts).save(tmp_path / "broken")
    file = tmp_path / "broken" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    code, said = failing([*words, "--prompts", str(tmp_path / "broken")], capsys)
    assert code == 65
    assert said.startswith(f"{file}: not a readable safetensors file")
    assert said.endswith("fetch it again")
    assert not (tmp_path / "run").exists()


def test_yaml_keys_labels_and_bytes(
    tmp_path: Path, tiny_pair_data: Path, tiny_prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = tmp_path / "run.yaml"
    settings.write_text("task: lcqmc\nbugdet: 100\n", encoding="utf-8")
    code, said = failing(["tune", "--config", str(settings)], capsys)
    assert (code, said) == (2, f"{settings}: unknown key 'bugdet'; did you mean 'budget'?")
    good = json.dumps({"text_a": "甲", "text_b": "乙", "label": "2"}, ensure_ascii=False)
    for name in ("train", "dev"):
        (tmp_path / f"{name}.jsonl").write_text(f"{good}\n", encoding="utf-8")
    code, said = failing(["tune", "--task", "lcqmc", "--data", str(tmp_path)], capsys)
    assert code == 65
    assert said.startswith(f"{tmp_path / 'train.jsonl'}:1: unknown label '2'; the task lcqmc knows '0', '1'")
    good = good.replace('"2"', '"1"')
    (tmp_path / "train.jsonl").write_bytes(good.encode() + b"\n\xff\n")
    code, said = failing(["tune", "--task", "lcqmc", "--data", str(tmp_path)], capsys)
    assert code == 65
    assert f"train.jsonl:2: not UTF-8 at byte {len(good.encode()) + 1} of the file" in said
    assert said.endswith("convert the file to UTF-8")
