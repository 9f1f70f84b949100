"""Prompt artifacts: what is saved is what is loaded, and every corruption is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import huggingface_hub
import numpy as np
import pytest
import tiny_prompt
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError
from safetensors.numpy import load_file, save_file

from bbprompt import prompts as module
from bbprompt.errors import ArtifactError, OracleError
from bbprompt.prompts import ModularPrompt, PromptSpace, bundled_prompts, resolve_prompts
from bbprompt.router import CODE, PAPER, GateRule, compose, mass


@pytest.fixture
def prompt() -> ModularPrompt:
    return tiny_prompt.artifact(Path("here"), "d" * 64)


@pytest.fixture
def folder(prompt: ModularPrompt, tmp_path: Path) -> Path:
    prompt.save(tmp_path / "prompts")
    return tmp_path / "prompts"


def same(one: ModularPrompt, other: ModularPrompt) -> bool:
    return one.config == other.config and all(
        np.array_equal(array, other._tensors()[name]) for name, array in one._tensors().items()
    )


@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("kind", ["mp2-deep", "mp2-shallow"])
def test_round_trip(kind: str, half: bool, tmp_path: Path) -> None:
    made = tiny_prompt.artifact(Path("here"), "d" * 64, kind=kind, sources=["某处 (terms)"], training={"steps": 3})
    made.save(tmp_path, half=half)
    found = ModularPrompt.load(tmp_path)
    assert same(found, made)
    assert found.digest == made.digest
    assert found.projection.dtype == np.float32
    stored = load_file(tmp_path / "model.safetensors")
    assert {array.dtype for array in stored.values()} == {np.dtype("float16" if half else "float32")}
    assert set(stored) == {"projection", "modules", "routers", "head.weight", "head.bias"}


def test_half_precision_rounds_what_does_not_fit_it(tmp_path: Path) -> None:
    made = tiny_prompt.artifact(Path("here"), "d" * 64)
    fine = ModularPrompt(
        made.config, made.projection * np.float32(1 / 3), made.modules, made.routers, made.head_weight, made.head_bias
    )
    fine.save(tmp_path / "half")
    fine.save(tmp_path / "full", half=False)
    assert same(ModularPrompt.load(tmp_path / "full"), fine)
    half = ModularPrompt.load(tmp_path / "half")
    assert half.digest != fine.digest
    np.testing.assert_allclose(half.projection, fine.projection, rtol=1e-3, atol=1e-6)


def test_the_digest_covers_every_part(prompt: ModularPrompt) -> None:
    digests = {prompt.digest}
    for name in ("projection", "modules", "routers", "head_weight", "head_bias"):
        changed = {field: getattr(prompt, field) for field in ModularPrompt.__dataclass_fields__}
        changed[name] = changed[name].copy()
        changed[name].flat[0] += np.float32(1)
        digests.add(ModularPrompt(**changed).digest)
    other = prompt.config.model_copy(update={"mixing": "mean"})
    digests.add(
        ModularPrompt(
            other, prompt.projection, prompt.modules, prompt.routers, prompt.head_weight, prompt.head_bias
        ).digest
    )
    assert len(digests) == 7


def test_materialised_prompts(prompt: ModularPrompt) -> None:
    rng = np.random.default_rng(0)
    points = rng.normal(size=(2, 3, 4))
    made = prompt.prompts(points)
    assert made.shape == (2, 3, tiny_prompt.LENGTH, prompt.config.hidden)
    for n in range(2):
        for layer in range(3):
            flat = points[n, layer].astype(np.float32) @ prompt.projection[layer]
            # Token-major: the first H numbers are the first placeholder's.
            np.testing.assert_allclose(made[n, layer, 0], flat[: prompt.config.hidden], rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(made[n, layer, 1], flat[prompt.config.hidden :], rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------ corruption


def with_config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "config.json"
        data = json.loads(file.read_text(encoding="utf-8"))
        for key, value in changes.items():
            if value is ...:
                del data[key]
            else:
                data[key] = value
        file.write_text(json.dumps(data), encoding="utf-8")

    return change


def with_tensors(edit: Callable[[dict[str, np.ndarray]], Any]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "model.safetensors"
        tensors = dict(load_file(file))
        edit(tensors)
        save_file(tensors, file)

    return change


def spoil(name: str, value: float) -> Callable[[dict[str, np.ndarray]], None]:
    def edit(tensors: dict[str, np.ndarray]) -> None:
        tensors[name] = tensors[name].copy()
        tensors[name].flat[-1] = value

    return edit


def cut(name: str, keep: int) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / name
        file.write_bytes(file.read_bytes()[:keep])

    return change


CORRUPTIONS: dict[str, tuple[Callable[[Path], None], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), r"config\.json: missing"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), r"model\.safetensors: missing"),
    "empty config": (cut("config.json", 0), r"config\.json: Invalid JSON"),
    "torn config": (cut("config.json", 100), r"config\.json: Invalid JSON"),
    "binary config": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"), r"config\.json: "),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), r"config\.json: "),
    "missing key": (with_config(backbone_digest=...), r"config\.json: backbone_digest: Field required"),
    "unknown key": (with_config(colour="red"), r"config\.json: colour: Extra inputs"),
    "unknown key of two lines": (with_config(**{"co\x0clour\u2028": "red"}), r"config\.json: co lour : Extra inputs"),
    "unknown kind": (with_config(kind="mp3"), r"config\.json: kind: "),
    "unknown injection": (with_config(injection="replace"), r"config\.json: injection: "),
    "other format": (with_config(format=2), r"format 2 is not 1"),
    "no layers": (with_config(layers=0), r"config\.json: layers: "),
    "placeholders": (with_config(placeholders=[1, 2, 3]), r"config\.json: 3 placeholders for prompt_length 2"),
    "negative id": (with_config(placeholders=[1, -2]), r"a token id is negative"),
    "no token": (with_config(placeholders=[-1, -1]), r"a token id is negative"),
    "prepended tokens": (with_config(injection="prepend"), r"'prepend' has no tokens, so that each is -1"),
    "prepended token": (with_config(injection="prepend", placeholders=[-1, 7]), r"each is -1"),
    "no rows": (with_config(kind="random", injection="prepend", prompt_length=0, placeholders=[]), r"each is -1"),
    "deep rows": (
        with_config(injection="prepend", placeholders=[-1, -1]),
        r"layers: 3 for injection 'prepend', which is of the input layer alone",
    ),
    "deep shallow": (with_config(kind="mp2-shallow"), r"layers: 3 for kind mp2-shallow"),
    "other layers": (with_config(layers=2), r"projection has shape \(3, 4, 64\), config\.json says \(2, 4, 64\)"),
    "other hidden": (with_config(hidden=16), r"projection has shape"),
    "other modules": (with_config(modules=4), r"modules has shape"),
    "other tasks": (with_config(tasks=["one"]), r"routers has shape"),
    "empty weights": (cut("model.safetensors", 0), r"model\.safetensors: not a readable safetensors"),
    "torn header": (cut("model.safetensors", 30), r"not a readable safetensors"),
    "torn data": (cut("model.safetensors", 2000), r"not a readable safetensors"),
    "a pickle": (
        lambda f: (f / "model.safetensors").write_bytes(b"\x80\x04\x95" + bytes(50)),
        r"not a readable safetensors",
    ),
    "missing tensor": (with_tensors(lambda t: t.pop("head.bias")), r"holds \[.*expected"),
    "extra tensor": (with_tensors(lambda t: t.update(more=np.zeros(2, np.float32))), r"holds \[.*'more'"),
    "another number": (with_tensors(spoil("modules", 0.25)), r"damaged, its digest is not that in config\.json"),
    "nan": (with_tensors(spoil("projection", np.nan)), r"projection holds NaN or infinity"),
    "infinity": (with_tensors(spoil("routers", np.inf)), r"routers holds NaN or infinity"),
    "integers": (
        with_tensors(lambda t: t.update(modules=t["modules"].astype(np.int32))),
        r"modules is int32, not float16 or float32",
    ),
    "doubles": (
        with_tensors(lambda t: t.update(modules=t["modules"].astype(np.float64))),
        r"modules is float64, not float16 or float32",
    ),
}


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_every_corruption_is_one_line_that_names_the_file(name: str, folder: Path) -> None:
    change, message = CORRUPTIONS[name]
    change(folder)
    with pytest.raises(ArtifactError, match=message) as caught:
        ModularPrompt.load(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


# ------------------------------------------------------------------------------------------- the space


def test_the_space_is_what_a_search_needs(prompt: ModularPrompt) -> None:
    space = prompt.space
    assert (space.shape, space.router_shape, space.tasks) == ((3, 4), (3, 3), ("first", "second"))
    assert space.rule == CODE
    assert space.modules.dtype == space.routers.dtype == np.float64


def test_gain_is_one_under_the_training_rule(prompt: ModularPrompt) -> None:
    np.testing.assert_array_equal(prompt.space.gain(CODE), np.ones((3, 1)))


def test_gain_makes_the_mean_total_of_upstream_routers_equal(prompt: ModularPrompt) -> None:
    space = prompt.space
    mixed = mass(PAPER.weights(space.routers)).mean(0) * space.gain(PAPER)[:, 0]
    trained = mass(CODE.weights(space.routers)).mean(0)
    opened = mass(PAPER.weights(space.routers)).mean(0) > 0
    np.testing.assert_allclose(mixed[opened], trained[opened], rtol=1e-12)
    assert opened.any()


def test_gain_where_no_upstream_gate_is_open() -> None:
    space = PromptSpace(np.ones((2, 3, 4)), -np.ones((1, 2, 3)), ("only",))
    np.testing.assert_array_equal(space.gain(PAPER), np.ones((2, 1)))


def test_mix_is_the_rule_times_the_gain(prompt: ModularPrompt) -> None:
    space = prompt.space
    routers = np.random.default_rng(0).normal(size=(5, 3, 3))
    expected = compose(PAPER.weights(routers), space.modules) * space.gain(PAPER)
    np.testing.assert_array_equal(space.mix(routers, PAPER), expected)
    np.testing.assert_array_equal(space.mix(routers[0], CODE), compose(CODE.weights(routers[0]), space.modules))


def test_even_is_the_mixture_of_equal_gates(prompt: ModularPrompt) -> None:
    space = prompt.space
    np.testing.assert_allclose(space.even(), space.mix(np.zeros(space.router_shape), CODE), rtol=1e-12)
    half = PromptSpace(space.modules, space.routers, space.tasks, GateRule("sigmoid", "mean"))
    total = mass(half.rule.weights(space.routers)).mean(0)[:, None]
    np.testing.assert_allclose(half.even(), space.modules.mean(1) * total, rtol=1e-12)


def test_without_upstream_routers_even_is_the_plain_mean(prompt: ModularPrompt) -> None:
    space = PromptSpace(prompt.space.modules, np.zeros((0, 3, 3)), (), PAPER)
    np.testing.assert_array_equal(space.even(), space.modules.mean(1))
    np.testing.assert_array_equal(space.gain(CODE), np.ones((3, 1)))


# --------------------------------------------------------------------------------------------- by name


def test_resolve_a_directory(folder: Path) -> None:
    assert resolve_prompts(str(folder)) == folder


def test_resolve_a_bundled_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BUNDLED", folder.parent)
    assert bundled_prompts() == {"prompts": folder}
    assert resolve_prompts("prompts") == folder
    with pytest.raises(ArtifactError, match="'nothing': no such directory or bundled artifact; known are prompts"):
        resolve_prompts("nothing")
    with pytest.raises(ArtifactError, match=r"did you mean 'prompts'\?"):
        resolve_prompts("promts")


def test_nothing_bundled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BUNDLED", tmp_path / "missing")
    with pytest.raises(ArtifactError, match="none is bundled"):
        resolve_prompts("nothing")


def test_a_hub_id_without_a_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ArtifactError, match=r"'some one/prompts': .*, and no hub id either; check the name"):
        resolve_prompts("some one/prompts")
    with pytest.raises(OracleError, match=r"not in the hub cache, and the hub is out of reach .*; check the network"):
        resolve_prompts("owner/does-not-exist-here")


@pytest.mark.parametrize(
    ("status", "error", "words"),
    [(404, ArtifactError, r"unknown or closed on the hub \(404\)"), (503, OracleError, "the hub answers 503")],
)
def test_what_the_hub_may_answer(
    status: int, error: type[Exception], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = httpx2.Request("GET", "https://hub.invalid/api")

    def answer(*args: Any, **more: Any) -> None:
        raise HfHubHTTPError("answer", response=httpx2.Response(status, request=request))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", answer)
    with pytest.raises(error, match=words):
        resolve_prompts("owner/prompts")


@pytest.mark.parametrize("revision", ["main", None])
def test_prompts_by_hub_id_from_a_warm_cache(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, revision: str | None
) -> None:
    commit = "b" * 40
    base = tmp_path / "hub" / "models--owner--prompts"
    blobs, snapshot = base / "blobs", base / "snapshots" / commit
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file in folder.iterdir():  # as the hub's client keeps them: the content once, links to it by commit
        shutil.copy(file, blobs / file.name)
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    if revision is not None:
        (base / "refs").mkdir()
        (base / "refs" / revision).write_text(commit, encoding="utf-8")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    if revision is None:  # a snapshot that no name leads to may be any version
        with pytest.raises(OracleError, match="not in the hub cache"):
            resolve_prompts("owner/prompts")
        return
    found = resolve_prompts("owner/prompts")
    assert found == snapshot
    assert ModularPrompt.load(found).digest == ModularPrompt.load(folder).digest


def test_an_artifact_without_a_digest_is_taken_as_it_is(folder: Path) -> None:
    whole = ModularPrompt.load(folder)
    with_config(weights_digest=...)(folder)
    assert ModularPrompt.load(folder).digest == whole.digest
    with_tensors(spoil("modules", 0.25))(folder)
    assert ModularPrompt.load(folder).digest != whole.digest


def test_what_is_bundled_has_its_digest() -> None:
    for name, path in bundled_prompts().items():
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        assert len(config["weights_digest"]) == 64, name
        assert ModularPrompt.load(path).config.kind == config["kind"]
