"""Prototypes: the local oracle against means of the stock model's states, and a whole run in a random subspace."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import tiny_prompt
import yaml
from numpy.typing import NDArray
from reference import plain_states
from safetensors.numpy import load_file
from scipy.optimize import minimize

import bbprompt
from bbprompt.backends.backbone import Backbone, load_backbone
from bbprompt.backends.local import LocalOracle
from bbprompt.backends.scale import facts_of
from bbprompt.backends.tokens import frame_for, tokenize_with
from bbprompt.calibration import compared_offsets
from bbprompt.errors import ArtifactError, DataError, UsageError
from bbprompt.oracle import Oracle, OracleInfo, Scores, TextBatch, check_scores
from bbprompt.prompts import ModularPrompt, Pooling
from bbprompt.random_projection import random_prompt
from bbprompt.readout import Readout
from bbprompt.scoring import Labelled, labelled
from bbprompt.search.evaluate import Evaluator
from bbprompt.stage_settings import ProjectionConfig
from bbprompt.store.journal import Journal
from bbprompt.store.ledger import Ledger
from bbprompt.tasks.task import Task
from bbprompt.testing import OracleContract
from bbprompt.texts.forms import write

SAME = tiny_prompt.PAIR | {"same": "1"}


@pytest.fixture(scope="module")
def backbone(tiny_bert_dir: Path) -> Backbone:
    return load_backbone(str(tiny_bert_dir))


def prompt_for(backbone: Backbone, depth: str = "deep", pool_prompt: bool = False) -> ModularPrompt:
    settings = ProjectionConfig(
        readout="prototype",
        layers="all" if depth == "deep" else "input",
        prompt_length=2,
        dim=4,
        scale=1.0,
        placeholder=300,
        pooling=Pooling(scale=7.0, prefix="问：", pool_prompt=pool_prompt),
    )
    return random_prompt(settings, facts_of(backbone), 3)


def data_for(kind: str) -> Labelled:
    make = {
        "same": (SAME, tiny_prompt.pair_records),
        "pair": (tiny_prompt.PAIR, tiny_prompt.pair_records),
        "single": (tiny_prompt.SINGLE, tiny_prompt.single_records),
        "choice": (tiny_prompt.CHOICE, tiny_prompt.choice_records),
    }[kind]
    task = Task.model_validate(make[0])
    return labelled(task, [task.example(r) for r in make[1](7, 5)], for_loss=True, readout="prototype")


def embedding(backbone: Backbone, prompt: ModularPrompt, point: np.ndarray, text: str, pool_prompt: bool) -> np.ndarray:
    frame = frame_for(backbone.tokenizer, prompt.config.placeholders, 512)
    ids = [*frame.first, *frame.placeholders, *tokenize_with(backbone.tokenizer)("问：" + text)[0], *frame.last]
    states = plain_states(backbone.model, [ids], prompt.prompts(point))[0]
    rows = states if pool_prompt else np.delete(states, range(1, 1 + len(frame.placeholders)), axis=0)
    mean = rows.astype(np.float64).mean(0)
    return mean / np.linalg.norm(mean)


@pytest.mark.parametrize("pool_prompt", [False, True])
@pytest.mark.parametrize("depth", ["deep", "shallow"])
@pytest.mark.parametrize("kind", ["single", "choice", "pair", "same"])
def test_equals_the_mean_of_the_stock_states(kind: str, depth: str, pool_prompt: bool, backbone: Backbone) -> None:
    prompt = prompt_for(backbone, depth, pool_prompt)
    batch = data_for(kind).batch
    points = np.random.default_rng(0).normal(size=(2, *prompt.space.shape)).astype(np.float32)
    points[0] = 0.0
    scores = LocalOracle(backbone, prompt, batch_tokens=64).score(batch, points)
    check_scores(scores, batch, 2, channels=1)
    for n, point in enumerate(points):
        option = 0
        for form in batch.forms:
            logits = []
            texts = [part.text for part in form.parts]
            for number, word in enumerate(form.options):
                if kind == "same":
                    left, right, sign = texts[0], texts[1], 1 if number == 1 else -1
                else:
                    left, right, sign = "".join(texts), word, 1
                one, other = (embedding(backbone, prompt, point, text, pool_prompt) for text in (left, right))
                logits.append(7.0 * sign * float(one @ other))
                assert scores.logits[n, option, 0] == pytest.approx(logits[-1], abs=1e-5)
                option += 1


class TestContract(OracleContract):
    @pytest.fixture(autouse=True)
    def _backbone(self, backbone: Backbone) -> None:
        self.backbone = backbone

    def make(self) -> Oracle:
        return LocalOracle(self.backbone, prompt_for(self.backbone))


def test_forms() -> None:
    pair = Task.model_validate(SAME)
    form = write(pair, pair.example({"text_a": "甲", "text_b": "乙", "label": "1"}), "prototype")
    assert [part.text for part in form.parts] == ["甲", "乙"]
    assert (form.second, form.same, form.options) == (1, 1, ("矛盾", "相似"))
    choice = Task.model_validate(tiny_prompt.CHOICE)
    record = {"context": "文", "query": "问", "choices": ["一", "二"], "label": 0}
    assert [part.text for part in write(choice, choice.example(record), "prototype").parts] == ["文", "，", "问"]
    extract = Task.model_validate(tiny_prompt.EXTRACT)
    example = extract.example({"context": "文", "question": "问", "answers": [{"text": "文", "start": 0}]})
    with pytest.raises(UsageError, match="task tiny-extract: a prototype readout cannot find answers"):
        write(extract, example, "prototype")
    assert write(extract, example, "span") == extract.render(example)


def test_same_is_an_end_of_the_labels_of_a_pair() -> None:
    graded = tiny_prompt.PAIR | {"labels": {"0": "无关", "1": "相近", "2": "相同"}}
    for task in (tiny_prompt.SINGLE | {"same": "l0"}, tiny_prompt.PAIR | {"same": "2"}, graded | {"same": "1"}):
        with pytest.raises(ValueError, match="same: names the first or the last label of a pair task"):
            Task.model_validate(task)
    for same, grades in (("2", (-1.0, 0.0, 1.0)), ("0", (1.0, 0.0, -1.0))):
        pair = Task.model_validate(graded | {"same": same})
        form = write(pair, pair.example({"text_a": "甲", "text_b": "乙", "label": "1"}), "prototype")
        assert form.grades == grades
    assert write(pair, pair.example({"text_a": "甲", "text_b": "乙", "label": "1"}), "span").grades == ()


def test_a_text_that_does_not_fit_is_named(backbone: Backbone) -> None:
    oracle = LocalOracle(backbone, prompt_for(backbone), max_tokens=12)
    forms = data_for("same").batch.forms[:2]
    fixed = replace(forms[1], parts=tuple(replace(p, text=p.text * 9, cut=False) for p in forms[1].parts))
    with pytest.raises(DataError, match="text 2: "):
        oracle.score(TextBatch((forms[0], fixed)), np.zeros((1, tiny.LAYERS, 4)))


@pytest.mark.parametrize("same", [0, 1])
def test_a_threshold_has_the_least_cross_entropy(same: int) -> None:
    rng = np.random.default_rng(1)
    forms = tuple(replace(form, same=same) for form in data_for("same").batch.forms)
    batch = TextBatch(forms)
    gold = [n % 2 for n in range(len(forms))]
    similarity = rng.normal(40.0, 1.0, len(forms)) + np.where(np.array(gold) == same, 0.7, -0.7)
    sign = np.array([1.0 if option == same else -1.0 for option in range(2)])
    logits = (similarity[:, None] * sign).reshape(1, -1, 1).astype(np.float32)
    normalizer = np.logaddexp(logits[:, ::2], logits[:, 1::2])
    scores = Scores(logits, normalizer, None, 0)
    offsets = compared_offsets(scores, batch, gold)
    assert offsets is not None
    assert offsets.shape == (1, 2)
    assert offsets.sum() == pytest.approx(0.0, abs=1e-9)
    fitted = -float(offsets[0] @ sign) / 2
    assert similarity.min() < fitted < similarity.max()

    def readout(at: float) -> Readout:
        return Readout(offsets=tuple((-sign * at).tolist()))

    def loss(at: float) -> float:
        return float(readout(at).losses(scores, batch, gold).mean())

    assert loss(fitted) < min(
        loss(fitted - 0.05), loss(fitted + 0.05), float(Readout().losses(scores, batch, gold).mean())
    )
    margin = np.where(np.array(gold) == same, 1, -1) * (similarity - fitted)
    assert loss(fitted) == pytest.approx(np.logaddexp(0, -2 * margin).mean(), abs=1e-4)
    assert (readout(fitted).choices(scores, batch)[0] == gold).tolist() == (margin > 0).tolist()
    assert compared_offsets(scores, data_for("single").batch, gold) is None


def test_offsets_of_graded_labels_are_each_candidates_own() -> None:
    """Against a general minimiser: a free threshold, and a ridge on what the offsets have beside it."""
    rng = np.random.default_rng(3)
    graded = replace(data_for("same").batch.forms[0], options=("无关", "相近", "相同"), same=2)
    batch = TextBatch((graded,) * 40)
    gold = np.arange(40) % 3
    grades = np.array(graded.grades)
    similarity = np.array([[15.0], [-300.0]]) + rng.normal(0.0, 1.0, (2, 40)) + gold - 1.0
    logits = similarity[..., None] * grades
    normalizer = np.log(np.exp(logits - logits.max(2, keepdims=True)).sum(2)) + logits.max(2)
    scores = Scores(logits.reshape(2, -1, 1).astype(np.float32), normalizer[..., None].astype(np.float32), None, 0)
    offsets = compared_offsets(scores, batch, gold.tolist())
    assert offsets is not None
    for own, row, threshold in zip(logits, offsets, (15.0, -300.0), strict=True):

        def loss(free: NDArray[np.float64], own: NDArray[np.float64] = own, at: float = threshold) -> float:
            whole = np.append(free, -free.sum()) - grades * at
            shifted = own + whole
            rest = whole - grades * (whole @ grades) / 2
            entropy = np.logaddexp.reduce(shifted, axis=1) - shifted[range(40), gold]
            return float(entropy.mean() + 0.15 * rest @ rest)

        best = minimize(loss, np.zeros(2), method="BFGS")
        assert loss((row + grades * threshold)[:2]) == pytest.approx(best.fun, abs=1e-6)
        assert -row @ grades / 2 == pytest.approx(threshold, abs=1.0)


def test_every_candidate_is_read_with_offsets_of_its_own(backbone: Backbone, tmp_path: Path) -> None:
    prompt, train = prompt_for(backbone), data_for("same")
    points = np.random.default_rng(0).normal(size=(3, *prompt.space.shape))
    oracle = LocalOracle(backbone, prompt)
    fitted = compared_offsets(oracle.score(train.batch, points.astype(np.float32)), train.batch, train.gold)
    assert fitted is not None
    for again in (False, True):
        asked: Oracle = Untouchable(oracle.info) if again else oracle
        journal = Journal(tmp_path / "journal.log", "run")
        evaluator = Evaluator(asked, Ledger(journal, 5), Readout(), Task.model_validate(SAME), train, train)
        losses = evaluator.train(points)
        for number, (point, offsets, loss) in enumerate(zip(points, fitted, losses, strict=True)):
            assert evaluator.readout(point).offsets == pytest.approx(tuple(offsets), abs=1e-6)
            if number:
                assert evaluator.dev(point[None])[0].loss == pytest.approx(loss, abs=1e-6)
        assert evaluator.readout(points[0] + 1.0) == evaluator.readout(points[0]), "never scored: as the first"
        journal.close()


class Untouchable:
    """An oracle that must not be asked."""

    def __init__(self, info: OracleInfo) -> None:
        self.info = info

    def score(self, *request: object) -> Scores:
        raise AssertionError("asked again for what the journal holds")

    def close(self) -> None:
        """Nothing is held."""


def test_the_same_seed_gives_the_same_subspace(backbone: Backbone, tmp_path: Path) -> None:
    deep, again, shallow = prompt_for(backbone), prompt_for(backbone), prompt_for(backbone, "shallow")
    assert deep.digest == again.digest != shallow.digest
    np.testing.assert_array_equal(deep.projection[:1], shallow.projection)
    assert deep.projection.std() == pytest.approx(0.5, rel=0.1)  # scale / sqrt(dim)
    assert not deep.space.even().any()
    deep.save(tmp_path, half=False)
    assert ModularPrompt.load(tmp_path).digest == deep.digest


def test_pooling_belongs_to_prototypes(backbone: Backbone, tmp_path: Path) -> None:
    prompt_for(backbone).save(tmp_path)
    config = (tmp_path / "config.json").read_text().replace('"prototype"', '"span"')
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ArtifactError, match="pooling: belongs to the readout 'prototype'"):
        ModularPrompt.load(tmp_path)


def test_a_run_keeps_its_threshold(tiny_bert_dir: Path, tmp_path: Path) -> None:
    data = tiny_prompt.data_dir(
        tmp_path / "data",
        SAME,
        {split: tiny_prompt.pair_records(count, i) for i, (split, count) in enumerate((("train", 90), ("test", 12)))},
    )
    method = tmp_path / "method.yaml"
    space = {"readout": "prototype", "layers": "all", "prompt_length": 2, "dim": 4, "scale": 0.5, "placeholder": 300}
    stage = {"layout": "layerwise", "popsize": 4, "sigma_first": 1.0, "sigma": 1.0, "dev_every": 8}
    keys = {"gates": "sigmoid", "mixing": "normalized", "prompts": "none", "projection": space, "prompt": stage}
    method.write_text(yaml.safe_dump({"name": "proto", "summary": "s", "source": "s", **keys}))
    found = bbprompt.tune(
        task=str(data / "task.yaml"),
        data=str(data),
        method=str(method),
        backbone=str(tiny_bert_dir),
        budget=20,
        seed=7,
        threads=1,
        run_dir=tmp_path / "run",
    )
    assert load_file(tmp_path / "run" / "prompt.safetensors")["offsets"].sum() == pytest.approx(0.0, abs=1e-12)
    with bbprompt.load_prompt(tmp_path / "run", threads=1) as prompt:
        assert prompt.evaluate().value == found.test.value
        bare = prompt.predict([{"text_a": "甲乙", "text_b": "甲乙"}])[0]
        assert bare.label == "1"  # equal texts have the similarity 1, above any fitted threshold
