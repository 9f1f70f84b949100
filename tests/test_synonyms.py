"""Several words for a label: their mean, against numbers by hand and against the same model word by word."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_prompt
from servers import serving
from test_verbalizer import GapOracle, batch_for, causal_dir, open_tiny, points_for

from bbprompt.backends.http import HttpOracle
from bbprompt.config import load_method, method_with
from bbprompt.errors import OracleError, TextError
from bbprompt.oracle import Oracle, OracleInfo, Scores, TextBatch, can_count, check_scores
from bbprompt.readable import can_check
from bbprompt.synonyms import SynonymOracle, with_synonyms
from bbprompt.tasks.task import Task
from bbprompt.testing import OracleContract

WORDS = {"矛盾": ("矛盾", "不同", "无关"), "相似": ("相似", "一样")}
TASK = tiny_prompt.PAIR | {"words": {"0": list(WORDS["矛盾"]), "1": list(WORDS["相似"])}}


class Table:
    """A model that knows a logit for each word and position of a text in the batch, and cuts seven tokens."""

    info = OracleInfo("table", "", "", 1, 1, "float32", "here", 128, readout="verbalizer")

    def __init__(self, short: bool = False) -> None:
        self.asked: list[TextBatch] = []
        self._short = short

    @staticmethod
    def logit(point: float, text: int, word: str) -> np.float32:
        return np.float32(math.sin(sum(map(ord, word)) + 3 * text) * 5 + point)

    def score(self, batch: TextBatch, points: Any, support: Any = "candidates", longest_answer: Any = None) -> Scores:
        self.asked.append(batch)
        logits = np.array(
            [
                [self.logit(point[0, 0], at, word) for at, form in enumerate(batch.forms) for word in form.options]
                for point in points
            ],
            dtype=np.float32,
        )[..., None]
        normalizer = np.zeros((len(points), len(batch.forms), 1), dtype=np.float32)
        return Scores(logits[:, 1:] if self._short else logits, normalizer, None, 7)

    def close(self) -> None:
        """Nothing to let go of."""


class Telling(Table):
    """One that is here: it checks and counts."""

    def check_texts(self, batch: TextBatch) -> None:
        raise TextError(f"text 1: asked of {' '.join(batch.forms[0].options)}")

    def count_tokens(self, batch: TextBatch, support: str = "candidates") -> int:
        return sum(batch.sizes) + 100 * (support == "sequence")


def test_the_mean_over_the_words_by_hand() -> None:
    batch, table = batch_for("pair"), Table()
    points = np.array([[[0.0]], [[0.5]]])
    scores = SynonymOracle(table, WORDS).score(batch, points)
    assert {form.options for form in table.asked[0].forms} == {("矛盾", "不同", "无关", "相似", "一样")}
    assert [replace(form, options=()) for form in table.asked[0].forms] == [
        replace(form, options=()) for form in batch.forms
    ], "nothing else of a text differs"
    for number, point in enumerate((0.0, 0.5)):
        option = 0
        for text in range(len(batch.forms)):
            labels = []
            for own in WORDS.values():
                labels.append(np.mean([np.float64(Table.logit(point, text, word)) for word in own]))
                assert scores.logits[number, option, 0] == np.float32(labels[-1])
                option += 1
            assert scores.normalizer[number, text, 0] == pytest.approx(np.log(np.exp(labels).sum()), abs=1e-6)
    assert (scores.logits.dtype, scores.normalizer.dtype, scores.cut, scores.best) == (np.float32, np.float32, 7, None)
    check_scores(scores, batch, 2, channels=1)


def test_a_candidate_scores_the_same_whatever_is_beside_it() -> None:
    batch, points = batch_for("single"), np.linspace(-1, 1, 33)[:, None, None]
    words = {
        option: (option, *(f"{option}{n}" for n in range(at % 4))) for at, option in enumerate(batch.forms[0].options)
    }
    oracle = SynonymOracle(Table(), words)
    together = oracle.score(batch, points)
    for number in range(33):
        alone = oracle.score(batch, points[number : number + 1])
        np.testing.assert_array_equal(alone.logits[0], together.logits[number])
        np.testing.assert_array_equal(alone.normalizer[0], together.normalizer[number])


def test_a_reply_that_lacks_a_word_is_refused() -> None:
    with pytest.raises(OracleError, match=r"logits of shape \(1, 34, 1\), expected \(1, 35, 1\)"):
        SynonymOracle(Table(short=True), WORDS).score(batch_for("pair"), np.zeros((1, 1, 1)))


def test_it_tells_what_the_model_tells() -> None:
    far, here, batch = SynonymOracle(Table(), WORDS), SynonymOracle(Telling(), WORDS), batch_for("pair")
    assert not can_check(far)
    assert not can_count(far)
    assert can_check(here)
    assert can_count(here)
    with pytest.raises(TextError, match="text 1: asked of 矛盾 不同 无关 相似 一样"):
        here.check_texts(batch)
    assert (here.count_tokens(batch), here.count_tokens(batch, "sequence")) == (35, 135)


@pytest.fixture(scope="module")
def folders(tiny_bert_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {"bert": tiny_bert_dir, "llama": causal_dir(tmp_path_factory.mktemp("causal") / "llama", "llama")}


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_the_mean_over_the_words_of_a_model_that_is_asked_for_each(family: str, folders: dict[str, Path]) -> None:
    oracle, prompt = open_tiny(folders[family])
    batch, points = batch_for("pair"), points_for(prompt)

    def logits(word: str) -> np.ndarray:
        alone = TextBatch(tuple(replace(form, options=(word,)) for form in batch.forms))
        return oracle.score(alone, points).logits[..., 0]

    expected = np.stack([np.mean([logits(word) for word in own], axis=0) for own in WORDS.values()], axis=2)
    scores = SynonymOracle(oracle, WORDS).score(batch, points)
    assert np.abs(expected[..., 0] - logits("矛盾")).max() > 0.1, "the other words count"
    np.testing.assert_allclose(scores.logits[..., 0], expected.reshape(3, -1), atol=2e-5)
    np.testing.assert_allclose(scores.normalizer[..., 0], np.log(np.exp(expected).sum(axis=2)), atol=2e-5)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_one_word_each_changes_no_bit(family: str, folders: dict[str, Path]) -> None:
    oracle, prompt = open_tiny(folders[family])
    batch, points = batch_for("pair"), points_for(prompt)
    plain = oracle.score(batch, points)
    wrapped = SynonymOracle(oracle, {word: (word,) for word in WORDS}).score(batch, points)
    np.testing.assert_array_equal(wrapped.logits, plain.logits)
    np.testing.assert_array_equal(wrapped.normalizer, plain.normalizer)
    several, task = method_with(load_method("bbt-rgb"), {}), Task.model_validate(tiny_prompt.PAIR)
    assert with_synonyms(oracle, several, task) is oracle
    assert with_synonyms(oracle, several, Task.model_validate(TASK)) is not oracle
    one = method_with(several, {"synonyms": False})
    assert with_synonyms(oracle, one, Task.model_validate(TASK)) is oracle


def test_words_are_checked_and_counted_before_a_call(folders: dict[str, Path]) -> None:
    oracle, _ = open_tiny(folders["bert"])
    batch = batch_for("pair")
    longer, odd = (SynonymOracle(oracle, {"相似": ("相似", word)}) for word in ("一模一样", "相☃"))
    assert can_count(oracle)
    assert can_count(longer)
    assert longer.count_tokens(batch) == oracle.count_tokens(batch) + 2 * len(batch.forms), "two masks more"
    assert can_check(odd)
    with pytest.raises(TextError, match="text 1: the option word '相☃' is not in the vocabulary"):
        odd.check_texts(batch)
    alike = SynonymOracle(open_tiny(folders["llama"])[0], {"相似": ("相似", "相同")})
    assert can_check(alike)
    with pytest.raises(TextError, match="text 1: the option words '相似' and '相同' begin with the same token"):
        alike.check_texts(batch)


def test_a_server_gives_the_same(folders: dict[str, Path]) -> None:
    oracle, prompt = open_tiny(folders["bert"])
    batch, points = batch_for("pair"), points_for(prompt)
    here = SynonymOracle(oracle, WORDS).score(batch, points)
    with serving(oracle) as url:
        remote = SynonymOracle(HttpOracle(url), WORDS)
        assert not can_check(remote)
        there = remote.score(batch, points)
        remote.close()
    np.testing.assert_array_equal(there.logits, here.logits)
    np.testing.assert_array_equal(there.normalizer, here.normalizer)


class TestContract(OracleContract):
    @pytest.fixture(autouse=True)
    def _folder(self, folders: dict[str, Path]) -> None:
        self.folder = folders["bert"]

    def make(self) -> Oracle:
        words = {"好评": ("好评", "满意"), "教师": ("教师", "先生", "老师"), "体育": ("体育", "球")}
        return GapOracle(SynonymOracle(open_tiny(self.folder)[0], words))
