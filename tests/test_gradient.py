"""What a descent differentiates: the oracle's own loss, whose gradient is checked by calling the oracle forward."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import tiny_prompt
import torch
from test_verbalizer import causal_dir, load_tiny

from bbprompt.backends.backbone import Backbone, load_backbone, weights_digest
from bbprompt.backends.local import LocalOracle
from bbprompt.backends.stock import StockOracle
from bbprompt.descent_settings import PromptDescentConfig, RouterDescentConfig
from bbprompt.frozen import written_out
from bbprompt.gradient.forward import Forward
from bbprompt.gradient.soft import SoftPrompt
from bbprompt.oracle import ReadoutKind, Support
from bbprompt.prompts import ModularPrompt, Pooling
from bbprompt.readout import Readout
from bbprompt.router import CODE, PAPER, GateRule
from bbprompt.scoring import Labelled, labelled
from bbprompt.tasks.task import Task

TASKS: dict[str, tuple[dict[str, Any], Any]] = {
    "pair": (tiny_prompt.PAIR, tiny_prompt.pair_records),
    "choice": (tiny_prompt.CHOICE, tiny_prompt.choice_records),
    "extract": (tiny_prompt.EXTRACT, tiny_prompt.extract_records),
}
STEP = 1e-2


@dataclass(frozen=True)
class Case:
    """A model with a prompt `(L, P, H)` of the size of its states."""

    backbone: Backbone
    prompt: np.ndarray
    readout: ReadoutKind
    weights: tuple[np.ndarray, np.ndarray]

    def artifact(self, prompt: np.ndarray) -> tuple[ModularPrompt, np.ndarray]:
        names = (self.backbone.id, self.backbone.digest)
        return written_out(prompt, (300, 301), self.weights, names, self.readout, Pooling(scale=7.0, prefix="问："))

    def forward(self, support: Support = "candidates", batch_tokens: int = 100) -> Forward:
        """The model; so few tokens at once that the texts are cut into pieces."""
        return Forward(
            self.backbone,
            self.artifact(self.prompt)[0].config,
            (torch.from_numpy(self.weights[0]), torch.from_numpy(self.weights[1])),
            device="cpu",
            dtype="float32",
            limit=self.backbone.limit(None),
            support=support,
            batch_tokens=batch_tokens,
        )

    def loss(self, prompt: np.ndarray, data: Labelled, support: Support = "candidates") -> float:
        """The mean loss that the oracle answers."""
        artifact, point = self.artifact(prompt)
        oracle = (LocalOracle if self.backbone.packed else StockOracle)(self.backbone, artifact)
        scores = oracle.score(data.batch, point[None], support)
        return float(Readout(support).losses(scores, data.batch, data.gold).mean())


def case_of(folder: Path, readout: ReadoutKind, layers: int = tiny.LAYERS) -> Case:
    rng = np.random.default_rng(1)
    backbone = load_tiny(folder) if readout == "verbalizer" else load_backbone(str(folder))
    rows = 2 if readout == "span" else 0
    weights = rng.normal(0, 0.3, (rows, tiny.HIDDEN)), rng.normal(0, 0.1, rows)
    prompt = rng.normal(0, 0.5, (layers, 2, tiny.HIDDEN)).astype(np.float32)
    return Case(backbone, prompt, readout, (weights[0].astype(np.float32), weights[1].astype(np.float32)))


def data_of(kind: str, readout: ReadoutKind) -> Labelled:
    keys, make = TASKS[kind]
    task = Task.model_validate(keys)
    return labelled(task, [task.example(record) for record in make(6, 5)], for_loss=True, readout=readout)


@pytest.fixture(scope="module")
def folders(tiny_bert_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    made = {family: causal_dir(root / family, family) for family in ("llama", "gpt2")}
    return made | {"bert": tiny_bert_dir, "t5": tiny.t5_dir(root / "t5")}


CASES: list[tuple[str, ReadoutKind, str, int]] = [
    ("bert", "span", "pair", tiny.LAYERS),
    ("bert", "span", "pair", 1),
    ("bert", "span", "choice", tiny.LAYERS),
    ("bert", "span", "extract", tiny.LAYERS),
    ("bert", "prototype", "choice", tiny.LAYERS),
    ("bert", "verbalizer", "pair", tiny.LAYERS),
    ("llama", "verbalizer", "pair", tiny.LAYERS),
    ("gpt2", "verbalizer", "pair", 1),
    ("t5", "verbalizer", "pair", tiny.LAYERS),
]


@pytest.mark.parametrize(("family", "readout", "kind", "layers"), CASES)
def test_the_gradient_is_that_of_the_oracles_loss(
    family: str, readout: ReadoutKind, kind: str, layers: int, folders: dict[str, Path]
) -> None:
    case, data = case_of(folders[family], readout, layers), data_of(kind, readout)
    before = weights_digest(case.backbone.model)
    forward = case.forward()
    pieces = forward.pieces(data)
    assert len(pieces) > 1
    prompt = torch.from_numpy(case.prompt.copy()).requires_grad_()
    losses = torch.cat([forward.losses(piece, prompt) for piece in pieces])
    assert float(losses.detach().mean()) == pytest.approx(case.loss(case.prompt, data), abs=1e-5)
    losses.mean().backward()
    assert prompt.grad is not None
    gradient = prompt.grad.numpy()
    rng = np.random.default_rng(2)
    for layer in range(layers):  # along a random direction in each layer, and so in all its entries at once
        direction = np.zeros_like(case.prompt)
        direction[layer] = rng.normal(size=direction[layer].shape)
        direction /= np.linalg.norm(direction)
        above, below = (case.loss(case.prompt + sign * STEP * direction, data) for sign in (1, -1))
        assert float((gradient * direction).sum()) == pytest.approx((above - below) / (2 * STEP), rel=0.02, abs=2e-4)
    assert weights_digest(case.backbone.model) == before


@pytest.mark.parametrize("support", ["candidates", "sequence"])
@pytest.mark.parametrize("kind", ["pair", "extract"])
def test_looks_are_what_the_oracle_says(kind: str, support: Support, tiny_bert_dir: Path) -> None:
    case, data = case_of(tiny_bert_dir, "span"), data_of(kind, "span")
    longest = 3 if kind == "extract" else None
    forward = case.forward(support)
    found = forward.scores(forward.pieces(data), torch.from_numpy(case.prompt), longest)
    artifact, point = case.artifact(case.prompt)
    expected = LocalOracle(case.backbone, artifact).score(data.batch, point[None], support, longest)
    np.testing.assert_allclose(found.logits, expected.logits, atol=1e-4)
    np.testing.assert_allclose(found.normalizer, expected.normalizer, atol=1e-4)
    assert (found.best is None) == (longest is None)
    if found.best is not None and expected.best is not None:
        np.testing.assert_array_equal(found.best, expected.best)


def test_pieces_hold_every_text_once(tiny_bert_dir: Path) -> None:
    case, data = case_of(tiny_bert_dir, "span"), data_of("pair", "span")
    whole, cut = case.forward(batch_tokens=10_000).pieces(data), case.forward(batch_tokens=1).pieces(data)
    assert (len(whole), len(cut)) == (1, 6)
    assert tuple(form for piece in cut for form in piece.data.batch.forms) == data.batch.forms
    assert tuple(gold for piece in cut for gold in piece.data.gold) == data.gold


@pytest.fixture
def modular(tiny_bert_dir: Path) -> ModularPrompt:
    return tiny_prompt.artifact(tiny_bert_dir, load_backbone(str(tiny_bert_dir)).digest)


@pytest.mark.parametrize("rule", [PAPER, CODE])
def test_what_a_descent_returns_is_the_artifacts_mixture(rule: GateRule, modular: ModularPrompt) -> None:
    soft, space = SoftPrompt(modular, rule, seed=3), modular.space
    np.testing.assert_allclose(soft.current().numpy(), modular.prompts(space.even()), rtol=1e-5, atol=1e-6)
    soft.moved(RouterDescentConfig(epochs=1, rate=1.0))
    soft.routed = True
    with torch.no_grad():
        soft.router.copy_(torch.tensor([[-1.0, 0.5, 2.0], [0.1, -0.2, -3.0], [-1.0, -1.0, -1.0]]))
    mixed = space.mix(soft.router.detach().numpy(), rule)
    np.testing.assert_allclose(soft.current().detach().numpy(), modular.prompts(mixed), rtol=1e-5, atol=1e-6)
    assert soft.written()["router"].tolist() == soft.router.tolist()
    if rule is PAPER:
        assert not soft.current()[2].any(), "no gate of the last layer is open"


@pytest.mark.parametrize(("rule", "noise"), [(PAPER, True), (PAPER, False), (CODE, True), (CODE, False)])
def test_the_relaxed_gates_of_a_step(rule: GateRule, noise: bool, modular: ModularPrompt) -> None:
    soft = SoftPrompt(modular, rule, seed=3)
    stage = RouterDescentConfig(epochs=1, rate=1.0, noise=noise, temperature=0.7)
    soft.moved(stage)
    prompt = soft.for_step(stage, torch.Generator().manual_seed(5))
    u = torch.rand(soft.router.shape, generator=torch.Generator().manual_seed(5)) if noise else torch.tensor(0.5)
    gates = torch.sigmoid((soft.router + torch.log(u / (1 - u))) / 0.7)
    total = gates.sum(1, keepdim=True) if rule.mixing == "normalized" else 3.0
    points = torch.einsum("lk,lkd->ld", gates / total, torch.from_numpy(modular.modules))
    points = points * torch.from_numpy(modular.space.gain(rule)).float()
    flat = torch.einsum("ld,ldx->lx", points, torch.from_numpy(modular.projection))
    torch.testing.assert_close(prompt.flatten(1), flat, rtol=1e-4, atol=1e-5)
    prompt.square().sum().backward()
    assert soft.router.grad is not None
    assert soft.router.grad.abs().min() > 0
    assert soft.bank.grad is None


def test_only_selected_modules_move(modular: ModularPrompt) -> None:
    soft = SoftPrompt(modular, PAPER, seed=3)
    soft.routed = True
    with torch.no_grad():
        soft.router.copy_(torch.tensor([[-1.0, 0.5, 2.0], [0.1, -0.2, -3.0], [1.0, 1.0, 1.0]]))
    stage = PromptDescentConfig(epochs=1, rate=0.1)
    parameters = soft.moved(stage)
    assert list(parameters) == ["bank"]
    before = soft.bank.detach().clone()
    adam = torch.optim.Adam(parameters.values(), lr=stage.rate)
    soft.for_step(stage, torch.Generator()).square().sum().backward()
    adam.step()
    moved = (soft.bank.detach() != before).flatten(2).any(-1)
    assert moved.tolist() == [[False, True, True], [True, False, False], [True, True, True]]
    assert list(soft.moved(PromptDescentConfig(epochs=1, rate=0.1, head=True))) == ["bank", "head_weight"]


def test_noise_of_a_first_prompt_has_the_size_that_is_asked_for(modular: ModularPrompt) -> None:
    one, other = SoftPrompt(modular, PAPER, seed=3), SoftPrompt(modular, PAPER, seed=3)
    before = one.bank.detach().clone()
    one.shake(0.1, seed=4)
    other.shake(0.1, seed=4)
    noise = one.bank.detach() - before
    assert float(noise.std()) == pytest.approx(0.1, rel=0.1)
    assert torch.equal(one.bank, other.bank)
