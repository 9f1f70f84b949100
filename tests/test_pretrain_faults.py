"""Pre-training against kills, full disks, NaN and broken data: the last good checkpoint is never lost."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_prompt
import tinytrain
import torch
from faultdisk import IMAGES, ROOT, Crash, FaultDisk

from bbprompt.errors import ArtifactError, DataError, DiskError, ResumeMismatch, RunLocked, UsageError
from bbprompt.pretrain.checkpoint import load_checkpoint, save_checkpoint, write_atomic
from bbprompt.pretrain.model import ModularPrompts
from bbprompt.pretrain.mp2 import Trainer
from bbprompt.pretrain.recipe import PretrainConfig
from bbprompt.pretrain.run import pretrain
from bbprompt.store.disk import RealDisk

HERE = Path(__file__).parent
pytestmark = pytest.mark.usefixtures("token_cache")


def silent(*_: Any) -> None:
    """Nothing is shown."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tinytrain.data_root(tmp_path_factory.mktemp("upstream"))


@pytest.fixture
def recipe(data: Path, tiny_bert_dir: Path) -> PretrainConfig:
    return tinytrain.make_recipe(data, tiny_bert_dir)


def test_killed_at_any_instant_it_ends_the_same(data: Path, tiny_bert_dir: Path, tmp_path: Path) -> None:
    recipe = tinytrain.make_recipe(
        data, tiny_bert_dir, keep="best", valid_every=2, module_rate=0.1, projection_rate=0.1, head_rate=0.1
    )
    (tmp_path / "recipe.json").write_text(recipe.model_dump_json(), encoding="utf-8")
    words = [sys.executable, str(HERE / "killedtrain.py"), str(tmp_path / "recipe.json"), str(data), str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    undisturbed = summary.pop("never")
    assert sum(found["killed"] for found in summary.values()) == 11
    for name, found in summary.items():
        assert found["files"] == undisturbed["files"], name
        assert found["log"] == undisturbed["log"], name


# ------------------------------------------------------------------------------------------------ the disk


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_fails_keeps_what_was_there(code: int) -> None:
    file = ROOT / "checkpoint.safetensors"
    healthy = FaultDisk()
    write_atomic(healthy, file, b"new" * 100)
    assert [operation.split()[0] for operation in healthy.operations] == [
        "open",
        "write",
        "sync",
        "replace",
        "sync_folder",
    ]
    for number in range(1, 6):
        disk = FaultDisk(number, code, persistent=True)
        disk.put(file, b"old", durable=True)
        with pytest.raises(DiskError, match="before is kept") as caught:
            write_atomic(disk, file, b"new" * 100)
        assert "bbprompt resume" not in str(caught.value)
        assert disk.files()[str(file)] == (b"old" if number < 5 else b"new" * 100)
        assert disk.durable(file) in (b"old", b"new" * 100)


@pytest.mark.parametrize("image", IMAGES)
def test_a_power_cut_leaves_the_old_or_the_new(image: Any) -> None:
    file = ROOT / "checkpoint.safetensors"
    for number in range(1, 6):
        disk = FaultDisk(number)
        disk.put(file, b"old", durable=True)
        with pytest.raises(Crash):
            write_atomic(disk, file, b"new" * 100)
        assert disk.rebooted(image).files()[str(file)] in (b"old", b"new" * 100), number


def test_a_full_disk_stops_a_training_that_then_goes_on(
    recipe: PretrainConfig, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretrain(recipe, tmp_path / "whole", data, silent)
    write, count = RealDisk.write, [0]

    def full(self: RealDisk, file: Any, content: bytes) -> None:
        count[0] += file.path.name.startswith("checkpoint")
        if count[0] == 2 and file.path.name.startswith("checkpoint"):
            write(self, file, content[:100])
            raise DiskError(f"{file.path}: cannot write to it: No space left on device")
        write(self, file, content)

    monkeypatch.setattr(RealDisk, "write", full)
    with pytest.raises(DiskError, match=r"No space left.*what checkpoint\.safetensors held before is kept"):
        pretrain(recipe, tmp_path / "out", data, silent)
    monkeypatch.undo()
    assert not list((tmp_path / "out").glob("*.tmp"))
    _, words = load_checkpoint(tmp_path / "out" / "checkpoint.safetensors", torch.device("cpu"))
    assert words["step"] == "2"
    pretrain(recipe, tmp_path / "out", data, silent, resume=True)
    for name in ("checkpoint.safetensors", "artifact/model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_file_size_limit_of_the_system(tmp_path: Path) -> None:
    """As the kernel reports it, not as a test does."""
    code = f"""
import resource, signal, sys, torch
from pathlib import Path
from bbprompt.store.disk import RealDisk
from bbprompt.errors import DiskError
from bbprompt.pretrain.checkpoint import save_checkpoint
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
file = Path({str(tmp_path)!r}) / "checkpoint.safetensors"
save_checkpoint(RealDisk(), file, {{"a": torch.ones(4)}}, {{"step": "1"}})
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    save_checkpoint(RealDisk(), file, {{"a": torch.ones(40000)}}, {{"step": "2"}})
except DiskError as error:
    sys.exit(74 if "is kept" in str(error) else 1)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 74
    tensors, words = load_checkpoint(tmp_path / "checkpoint.safetensors", torch.device("cpu"))
    assert tensors["a"].tolist() == [1, 1, 1, 1]
    assert words == {"step": "1"}
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.safetensors"]


def test_checkpoints_of_version_0_1_are_read(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.ones(1)}, tmp_path / "old", metadata={"step": "250"})
    assert load_checkpoint(tmp_path / "old", torch.device("cpu"))[1] == {"step": "250"}
    save_checkpoint(RealDisk(), tmp_path / "one", {"a": torch.ones(1)}, {"step": "1", "best": "null", "data": "{}"})
    save_checkpoint(RealDisk(), tmp_path / "two", {"a": torch.ones(1)}, {"data": "{}", "best": "null", "step": "1"})
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


# -------------------------------------------------------------------------------------------- not finite


@pytest.mark.parametrize("how", ["loss", "gradient", "weight"])
def test_nan_names_step_task_and_batch(
    how: str, recipe: PretrainConfig, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, train = ModularPrompts.forward, Trainer._train
    at = 4

    def broken(self: ModularPrompts, encoder: Any, batch: Any, gates: Any, generator: Any) -> torch.Tensor:
        logits = forward(self, encoder, batch, gates, generator)
        if torch.is_grad_enabled() and calls[0] == at + 1:
            if how == "loss":
                spoilt = torch.zeros_like(logits)
                spoilt[3] = torch.nan  # the first text of the second task
                return logits + spoilt
            if how == "gradient":
                logits.register_hook(lambda gradient: gradient * torch.inf)
        return logits

    def counted(self: Trainer, slices: Any) -> tuple[float, float]:
        calls[0] += 1
        result = train(self, slices)
        if how == "weight" and calls[0] == at + 2:
            with torch.no_grad():
                self.prompts.bank[0, 0, 0] = torch.nan
        last.append(slices[0])
        return result

    calls, last = [0], []
    monkeypatch.setattr(ModularPrompts, "forward", broken)
    monkeypatch.setattr(Trainer, "_train", counted)
    with pytest.raises(UsageError) as caught:
        pretrain(recipe, tmp_path, data, silent)
    said = str(caught.value)
    assert said.startswith(f"step {6 if how == 'weight' else at}: ")
    assert "begin again with lower learning rates" in said
    assert "is kept" in said
    if how == "loss":
        assert "the loss is nan; first for task tiny-" in said
        assert "row 3 of 6, example " in said
    elif how == "gradient":
        assert "a gradient is not finite; in a batch of tiny-" in said
    else:
        assert "bank is not finite" in said
    tensors, words = load_checkpoint(tmp_path / "checkpoint.safetensors", torch.device("cpu"))
    assert words["step"] == "4", "the last good one"
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())


# ------------------------------------------------------------------------------------------------ the data


def test_other_data_cannot_be_gone_on_with(tiny_bert_dir: Path, tmp_path: Path) -> None:
    data = tinytrain.data_root(tmp_path / "data")
    recipe = tinytrain.make_recipe(data, tiny_bert_dir, steps=2)
    pretrain(recipe, tmp_path / "out", data, silent)
    records = tiny_prompt.choice_records(100, 99)
    tiny_prompt.data_dir(data / "tiny-choice", tinytrain.CHOICE, {"train": records})
    with pytest.raises(ResumeMismatch, match="other data of tiny-choice; give the same --data"):
        pretrain(recipe, tmp_path / "out", data, silent, resume=True)


def test_a_recipe_of_an_older_version_goes_on(recipe: PretrainConfig, data: Path, tmp_path: Path) -> None:
    pretrain(recipe, tmp_path, data, silent)
    values = json.loads((tmp_path / "recipe.json").read_text(encoding="utf-8"))
    for key in ("fade", "fsl", "keep", "accumulate", "bucket", "depth", "temperature_to", "ppt"):
        del values[key]
    (tmp_path / "recipe.json").write_text(json.dumps(values), encoding="utf-8")
    pretrain(recipe, tmp_path, data, silent, resume=True)
    with pytest.raises(ResumeMismatch, match="another recipe"):
        pretrain(recipe.model_copy(update={"fsl": False}), tmp_path, data, silent, resume=True)


@pytest.mark.parametrize(
    ("line", "said"),
    [('{"text_a": "甲", "text_b": "乙", "label": "7"}', "unknown label '7'"), ('{"text_a": "甲"', "not JSON")],
)
def test_a_broken_example_names_file_and_line(line: str, said: str, tiny_bert_dir: Path, tmp_path: Path) -> None:
    data = tinytrain.data_root(tmp_path / "data")
    file = data / "tiny-pair" / "train.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines()
    lines[41] = line
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    with pytest.raises(DataError, match=said) as caught:
        pretrain(tinytrain.make_recipe(data, tiny_bert_dir), tmp_path / "out", data, silent)
    assert str(caught.value).startswith(f"{file}:42: ")


def test_an_example_that_breaks_when_it_is_drawn_names_its_line(
    recipe: PretrainConfig, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bbprompt.pretrain import mixture

    def refuse(*_: Any) -> Any:
        raise DataError("no token")

    monkeypatch.setattr(mixture, "encode", refuse)
    with pytest.raises(DataError, match=r"(tiny-\w+).train\.jsonl:\d+: task \1: no token"):
        pretrain(recipe, tmp_path, data, silent)


def test_one_process_a_directory(recipe: PretrainConfig, data: Path, tmp_path: Path) -> None:
    pretrain(recipe.model_copy(update={"steps": 1}), tmp_path, data, silent)
    disk = RealDisk()
    lock = disk.lock(tmp_path / "train.lock")
    with pytest.raises(RunLocked, match="another process"):
        pretrain(recipe.model_copy(update={"steps": 1}), tmp_path, data, silent, resume=True)
    disk.close(lock)


def test_a_best_checkpoint_that_is_gone(recipe: PretrainConfig, data: Path, tmp_path: Path) -> None:
    best = recipe.model_copy(update={"keep": "best", "steps": 2})
    pretrain(best, tmp_path, data, silent)
    (tmp_path / "best.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"best\.safetensors: damaged"):
        pretrain(best, tmp_path, data, silent, resume=True)


@pytest.mark.parametrize("what", ["log", "artifact"])
def test_a_full_disk_at_other_files_is_said_in_a_line(
    what: str, recipe: PretrainConfig, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bbprompt.prompts import ModularPrompt

    opened = Path.open

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def full_for_appending(self: Path, mode: str = "r", *more: Any, **named: Any) -> Any:
        return full() if mode == "a" else opened(self, mode, *more, **named)

    with monkeypatch.context() as patch:
        if what == "log":
            patch.setattr(Path, "open", full_for_appending)
        else:
            patch.setattr(ModularPrompt, "save", full)
        with pytest.raises(DiskError, match="the disk is full: free some space, then go on with --resume") as caught:
            pretrain(recipe.model_copy(update={"steps": 2}), tmp_path, data, silent)
    assert str(caught.value).startswith(str(tmp_path / ("train.jsonl" if what == "log" else "artifact")))
    pretrain(recipe.model_copy(update={"steps": 2}), tmp_path, data, silent, resume=True)
