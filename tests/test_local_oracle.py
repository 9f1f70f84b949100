"""The local oracle against a plain forward of the stock model with hooks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny
import tiny_prompt
from reference import PlainOracle, compare, counted_texts, points_of
from tiny_prompt import batch_of

from bbprompt.backends.backbone import Backbone, load_backbone
from bbprompt.backends.local import LocalOracle
from bbprompt.errors import ArtifactError, DataError, OracleError
from bbprompt.oracle import Oracle, Support, TextBatch, check_scores
from bbprompt.prompts import ModularPrompt
from bbprompt.readout import Readout
from bbprompt.tasks.example import Answer, Form, Part
from bbprompt.testing import OracleContract

SUPPORTS: tuple[Support, ...] = ("candidates", "sequence")


@pytest.fixture(scope="module", params=[("mp2-deep", None), ("mp2-deep", 2), ("mp2-shallow", None)])
def prompt(request: pytest.FixtureRequest, backbone: Backbone) -> ModularPrompt:
    kind, layers = request.param
    return tiny_prompt.artifact(Path(backbone.id), backbone.digest, kind=kind, layers=layers)


@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("kind", ["pair", "single", "choice", "extract"])
def test_equals_the_plain_forward(kind: str, support: Support, prompt: ModularPrompt, backbone: Backbone) -> None:
    oracle = LocalOracle(backbone, prompt)
    batch, points = batch_of(kind), points_of(prompt, 3)
    longest = 3 if kind == "extract" else None
    scores = check_scores(
        oracle.score(batch, points, support, longest), batch, 3, channels=2, answers=kind == "extract"
    )
    assert scores.logits.dtype == scores.normalizer.dtype == np.float32
    compare(scores, PlainOracle(backbone, prompt), batch, points, support)


@pytest.mark.parametrize("kind", ["pair", "choice", "extract"])
def test_tokens_are_those_that_enter_the_model(kind: str, deep: ModularPrompt, backbone: Backbone) -> None:
    entered: list[int] = []
    hook = backbone.model.embeddings.register_forward_pre_hook(
        lambda _module, _args, given: entered.append(given["input_ids"].numel()), with_kwargs=True
    )
    oracle, batch = LocalOracle(backbone, deep, batch_tokens=100), batch_of(kind, 5)
    oracle.score(batch, points_of(deep, 2))
    assert len(entered) > 1, "in pieces"
    assert oracle.count_tokens(batch) == sum(entered)
    pieces = len(entered)
    oracle.score(batch, points_of(deep, 3, seed=1))
    hook.remove()
    assert len(entered) == pieces, "embedded once"


def test_a_batch_is_tokenized_once(deep: ModularPrompt, backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    written = counted_texts("bbprompt.backends.local", monkeypatch)
    oracle, batch = LocalOracle(backbone, deep), batch_of("pair")
    oracle.score(batch, points_of(deep, 2))
    assert len(once := written.copy()) >= len(batch.forms)
    oracle.score(batch, points_of(deep, 3, seed=1))
    assert written == once
    oracle.score(batch_of("single"), points_of(deep, 1))
    assert len(written) > len(once)


def test_the_prompts_matter(deep: ModularPrompt, backbone: Backbone) -> None:
    scores = LocalOracle(backbone, deep).score(batch_of("pair"), points_of(deep, 2))
    assert np.abs(scores.logits[0] - scores.logits[1]).mean() > 0.1


def test_roberta(tiny_roberta_dir: Path) -> None:
    backbone = load_backbone(str(tiny_roberta_dir))
    prompt = tiny_prompt.artifact(Path(backbone.id), backbone.digest)
    batch, points = batch_of("choice", 5), points_of(prompt, 2)
    compare(
        LocalOracle(backbone, prompt).score(batch, points), PlainOracle(backbone, prompt), batch, points, "candidates"
    )


def test_cpt(tmp_path: Path) -> None:
    backbone = load_backbone(str(tiny.cpt_dir(tmp_path, words=400, positions=96)))
    assert backbone.token_type == 1
    prompt = tiny_prompt.artifact(Path(backbone.id), backbone.digest)
    batch, points = batch_of("pair", 5), points_of(prompt, 2)
    compare(
        LocalOracle(backbone, prompt).score(batch, points), PlainOracle(backbone, prompt), batch, points, "candidates"
    )


def test_answers_need_not_be_known(deep: ModularPrompt, backbone: Backbone) -> None:
    known = batch_of("extract")
    unknown = TextBatch(known.forms, (None,) * len(known.forms))
    oracle, points = LocalOracle(backbone, deep), points_of(deep, 2)
    blind = check_scores(oracle.score(unknown, points, longest_answer=3), unknown, 2, channels=2, answers=True)
    assert blind.logits.shape == (2, 0, 2)
    np.testing.assert_array_equal(blind.best, oracle.score(known, points, longest_answer=3).best)


def test_the_longest_answer_is_a_cap_in_tokens(deep: ModularPrompt, backbone: Backbone) -> None:
    oracle, batch, points = LocalOracle(backbone, deep), batch_of("extract"), points_of(deep, 4)
    for longest in (1, 2, 5, 1000):
        best = oracle.score(batch, points, longest_answer=longest).best
        assert best is not None
        sizes = best[..., 1] - best[..., 0]
        assert (sizes >= 1).all()
        assert sizes.max() <= longest
        if longest == 1:
            assert (sizes == 1).all()


# -------------------------------------------------------------------------- savings that change nothing


@pytest.mark.parametrize("kind", ["single", "extract"])
def test_candidates_together_equal_candidates_alone(kind: str, deep: ModularPrompt, backbone: Backbone) -> None:
    oracle, batch, points = LocalOracle(backbone, deep), batch_of(kind), points_of(deep, 6)
    points[3:] = points[0]
    points[3:, 1] += np.arange(1, 4)[:, None]
    together = oracle.score(batch, points, longest_answer=4)
    for n in range(6):
        alone = oracle.score(batch, points[n : n + 1], longest_answer=4)
        np.testing.assert_allclose(together.logits[n], alone.logits[0], atol=1e-5)
        np.testing.assert_allclose(together.normalizer[n], alone.normalizer[0], atol=1e-5)


@pytest.mark.parametrize("layer", range(tiny.LAYERS))
def test_what_was_scored_before_does_not_matter(layer: int, deep: ModularPrompt, backbone: Backbone) -> None:
    batch, other = batch_of("pair"), batch_of("single")
    base = points_of(deep, 1)[0]
    points = np.repeat(base[None], 4, axis=0)
    points[:, layer] += np.random.default_rng(3).normal(size=(4, 4))
    fresh = LocalOracle(backbone, deep).score(batch, points)
    oracle = LocalOracle(backbone, deep)
    rng = np.random.default_rng(4)
    for turn in range(12):
        before = np.repeat(base[None], 3, axis=0)
        touched = int(rng.integers(0, tiny.LAYERS))
        before[:, touched] += rng.normal(size=(3, 4))
        if turn % 3 == 1:
            before[:, 0] += 1.0  # another trunk
        if turn % 4 == 2:
            before = before[:1]  # a look at one candidate
        oracle.score(batch if turn % 2 else other, before)
    again = oracle.score(batch, points)
    np.testing.assert_array_equal(again.logits, fresh.logits)
    np.testing.assert_array_equal(again.normalizer, fresh.normalizer)


def test_kept_batches_are_bounded_and_forgotten_without_trace(deep: ModularPrompt, backbone: Backbone) -> None:
    oracle, points = LocalOracle(backbone, deep), points_of(deep, 2)
    batches = [batch_of("pair", count) for count in range(2, 14)]
    first = [oracle.score(batch, points).logits for batch in batches]
    assert len(oracle._kept) == 8
    for batch, logits in zip(batches, first, strict=True):
        np.testing.assert_array_equal(oracle.score(batch, points).logits, logits)
    oracle.close()
    oracle.close()
    assert not oracle._kept


@pytest.mark.parametrize("tokens", [1, 60, 150, 10_000])
@pytest.mark.parametrize("kind", ["choice", "extract"])
def test_chunks_change_nothing(kind: str, tokens: int, deep: ModularPrompt, backbone: Backbone) -> None:
    batch, points = batch_of(kind), points_of(deep, 5)
    whole = LocalOracle(backbone, deep).score(batch, points, "sequence", 4)
    parts = LocalOracle(backbone, deep, batch_tokens=tokens).score(batch, points, "sequence", 4)
    np.testing.assert_allclose(parts.logits, whole.logits, atol=1e-5)
    np.testing.assert_allclose(parts.normalizer, whole.normalizer, atol=1e-5)
    if kind == "extract":
        np.testing.assert_array_equal(parts.best, whole.best)


# ------------------------------------------------------------------------------------------ refusals


def test_prompts_of_another_backbone(backbone: Backbone, deep: ModularPrompt) -> None:
    other = tiny_prompt.artifact(Path("elsewhere"), "0" * 64)
    with pytest.raises(ArtifactError, match=r"trained for elsewhere \(weights 000000000000\), not for"):
        LocalOracle(backbone, other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"placeholders": (300, 99_999)}, "placeholder 99999, the backbone has"),
        ({"layers": 4}, "4 layers, the backbone has 3"),
        ({"hidden": 16}, "hidden size 16, the backbone has 32"),
    ],
)
def test_a_config_that_contradicts_the_backbone(
    change: dict[str, object], message: str, backbone: Backbone, deep: ModularPrompt
) -> None:
    config = deep.config.model_copy(update=change)
    wrong = ModularPrompt(config, deep.projection, deep.modules, deep.routers, deep.head_weight, deep.head_bias)
    with pytest.raises(ArtifactError, match=message):
        LocalOracle(backbone, wrong)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_points_that_are_not_finite(value: float, deep: ModularPrompt, backbone: Backbone) -> None:
    points = points_of(deep, 2)
    points[1, 2, 3] = value
    with pytest.raises(OracleError, match="NaN or infinity"):
        LocalOracle(backbone, deep).score(batch_of("pair"), points)


@pytest.mark.parametrize("shape", [(3, 4), (0, 3, 4), (1, 3, 5), (1, 2, 4), (1, 1, 3, 4)])
def test_points_of_the_wrong_shape(shape: tuple[int, ...], deep: ModularPrompt, backbone: Backbone) -> None:
    with pytest.raises(OracleError, match="points have shape"):
        LocalOracle(backbone, deep).score(batch_of("pair"), np.zeros(shape))


def test_a_question_longer_than_the_model(deep: ModularPrompt, backbone: Backbone) -> None:
    fine = batch_of("pair", 2).forms
    batch = TextBatch((*fine, Form((Part("问" * 200, cut=False),), ("是", "否"), -1)))
    with pytest.raises(DataError, match="text 3: question and options alone take 204 of 124 tokens"):
        LocalOracle(backbone, deep).score(batch, points_of(deep, 1))


def test_a_long_text_is_cut_and_counted(deep: ModularPrompt, backbone: Backbone) -> None:
    batch = TextBatch((Form((Part("天" * 200, cut=True), Part("问", cut=False)), ("是", "否"), -1),))
    points = points_of(deep, 2)
    scores = LocalOracle(backbone, deep).score(batch, points)
    assert scores.cut == 200 + 1 + 4 - 124
    compare(scores, PlainOracle(backbone, deep), batch, points, "candidates")
    short = LocalOracle(backbone, deep, max_tokens=40)
    assert short.info.max_tokens == 40
    assert short.score(batch, points).cut == 200 + 1 + 4 - 36
    assert LocalOracle(backbone, deep, max_tokens=4000).info.max_tokens == 128


def test_an_answer_that_is_cut_away_is_searched_for(deep: ModularPrompt, backbone: Backbone) -> None:
    context = "天" * 150 + "北京" + "地" * 150
    form = Form((Part(context, cut=True), Part("何处", cut=False)), (), 0)
    oracle = LocalOracle(backbone, deep)
    points = points_of(deep, 2)
    batch = TextBatch((form,), (Answer("北京", 150),))
    compare(oracle.score(batch, points, longest_answer=3), PlainOracle(backbone, deep), batch, points, "candidates")


# -------------------------------------------------------------------------------------- bfloat16


def test_bfloat16_runs_and_is_near(deep: ModularPrompt, backbone: Backbone) -> None:
    batch, points = batch_of("single"), points_of(deep, 4)
    exact = LocalOracle(backbone, deep).score(batch, points)
    oracle = LocalOracle(backbone, deep, dtype="bfloat16")
    assert oracle.info.precision == "bfloat16"
    rough = oracle.score(batch, points)
    assert rough.logits.dtype == np.float32
    assert np.abs(rough.logits - exact.logits).mean() < 0.1 * np.abs(exact.logits).std()
    readout = Readout()
    assert (readout.choices(rough, batch) == readout.choices(exact, batch)).mean() > 0.8


def test_info(deep: ModularPrompt, backbone: Backbone) -> None:
    info = LocalOracle(backbone, deep).info
    assert (info.backbone, info.backbone_digest, info.prompts_digest) == (backbone.id, backbone.digest, deep.digest)
    assert (info.layers, info.dim, info.precision, info.max_tokens) == (3, 4, "float32", 128)
    assert info.device.startswith("cpu, ")


class TestContract(OracleContract):
    """The conformance suite that any oracle must pass."""

    @pytest.fixture(autouse=True)
    def _files(self, tiny_bert_dir: Path, tiny_prompts: Path) -> None:
        self.files = str(tiny_bert_dir), str(tiny_prompts)

    def make(self) -> Oracle:
        backbone, prompts = self.files
        return LocalOracle(load_backbone(backbone), ModularPrompt.load(Path(prompts)))
