"""The conformance suite for oracles."""

from __future__ import annotations

import warnings
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from bbprompt.errors import DataError, OracleError
from bbprompt.oracle import Oracle, Scores, Support, TextBatch, check_scores
from bbprompt.tasks.example import Answer, Form, Part
from bbprompt.testing.checks import equal, refused, require

__all__ = ["OracleContract"]


def _form(text: str, options: tuple[str, ...] = (), context: int = -1) -> Form:
    return Form((Part("判断：", cut=False), Part(text, cut=True), Part("？选项：", cut=False)), options, context)


_FEW = ("好评", "差评")
_OPTIONS = TextBatch(
    (
        _form("这家店的菜又咸又凉", _FEW),
        _form("房间干净", _FEW),
        _form("明天有雨，出门要带伞", ("天气", "体育", "金融", "教育")),
        _form("他在学校教书，一教就是三十年，学生遍布各地", ("医生", "教师", "司机")),
    )
)
_ANSWERS = TextBatch(
    (_form("李白生于碎叶城，后来到了长安", context=1), _form("长江全长六千三百公里", context=1)),
    (Answer("碎叶城", 4), Answer("六千三百公里", 4)),
)


class OracleContract:
    """What every oracle must do; see `bbprompt.oracle.Oracle`.

    What concerns answers in a context is asked only of oracles with a span readout; others must refuse such texts.
    The texts are short and Chinese: the model must have room for about 60 tokens.

    Attributes:
        tolerance: Largest difference of two scores that should be equal but may be computed in another order.
    """

    tolerance: ClassVar[float] = 1e-4

    def make(self) -> Oracle:
        """Build a fresh oracle; equal ones every time."""
        raise NotImplementedError

    def points(self, oracle: Oracle, count: int, seed: int = 0) -> NDArray[np.float64]:
        """Return `count` candidates."""
        return np.random.default_rng(seed).normal(size=(count, oracle.info.layers, oracle.info.dim))

    def test_it_says_what_it_is(self) -> None:
        """Its description is complete, and the same from an equal oracle."""
        info = self.make().info
        require(min(info.layers, info.dim, info.max_tokens) >= 1, f"a size in {info} is below 1")
        require(info.precision in ("float32", "mixed", "bfloat16", "unknown"), f"no such precision {info.precision!r}")
        require(
            all((info.backbone, info.backbone_digest, info.prompts_digest, info.device)),
            f"something in {info} is empty",
        )
        require(self.make().info == info, "two equal oracles describe themselves differently")

    def test_replies_have_the_promised_shapes(self) -> None:
        """Options may be ragged; best answers come exactly when asked for."""
        oracle = self.make()
        unknown = TextBatch(_ANSWERS.forms, (None, None))
        for support in ("candidates", "sequence"):
            for count in (1, 3):
                points = self.points(oracle, count)
                scores = self._score(oracle, _OPTIONS, points, support)
                require(scores.best is None, "best answers for texts with options")
                if oracle.info.readout != "span":
                    refused(DataError, lambda points=points: oracle.score(_ANSWERS, points))  # type: ignore[misc]
                    continue
                require(self._score(oracle, _ANSWERS, points, support).best is None, "best answers unasked")
                self._score(oracle, _ANSWERS, points, support, 4)
                self._score(oracle, unknown, points, support, 4)

    def test_the_same_request_gives_the_same_reply(self) -> None:
        """Bit for bit, whatever was asked in between, and from an equal oracle too."""
        oracle = self.make()
        points = self.points(oracle, 3)
        first = self._score(oracle, _OPTIONS, points)
        other = self.points(oracle, 2, seed=1)
        other[:, 1:] = points[0, 1:]  # shares all layers but the first with the points
        self._score(oracle, _OPTIONS, other)
        self._score(oracle, _OPTIONS, points[:1])
        if oracle.info.readout == "span":
            self._score(oracle, _ANSWERS, other, "sequence", 3)
        require(_same(self._score(oracle, _OPTIONS, points), first), "an earlier request changed a reply")
        require(_same(self._score(self.make(), _OPTIONS, points), first), "an equal oracle answers otherwise")

    def test_points_count(self) -> None:
        """Every layer of a candidate changes its scores."""
        oracle = self.make()
        base = self.points(oracle, 1)
        points = np.repeat(base, 1 + oracle.info.layers, axis=0)
        for layer in range(oracle.info.layers):
            points[1 + layer, layer] += 1.0
        logits = self._score(oracle, _OPTIONS, points).logits
        for layer in range(oracle.info.layers):
            require(
                bool(np.abs(logits[1 + layer] - logits[0]).max() > self.tolerance), f"layer {layer} counts for nothing"
            )

    def test_candidates_do_not_see_each_other(self) -> None:
        """Scores are the same alone, together and in another order."""
        oracle = self.make()
        points = self.points(oracle, 5)
        points[2:, 0] = points[0, 0]
        for batch, longest in ((_OPTIONS, None), (_ANSWERS, 4))[: oracle.info.channels]:
            together = self._score(oracle, batch, points, longest=longest)
            backwards = self._score(oracle, batch, points[::-1], longest=longest)
            for number in range(len(points)):
                alone = self._score(oracle, batch, points[number : number + 1], longest=longest)
                for reply, at in ((together, number), (backwards, len(points) - 1 - number)):
                    self._near(reply.logits[at], alone.logits[0], "a candidate's logits depend on the others")
                    self._near(reply.normalizer[at], alone.normalizer[0], "normalizers depend on other candidates")

    def test_texts_do_not_see_each_other(self) -> None:
        """Scores of a text are the same alone and in a batch."""
        oracle = self.make()
        points = self.points(oracle, 2)
        whole = self._score(oracle, _OPTIONS, points, "sequence")
        first = 0
        for number, form in enumerate(_OPTIONS.forms):
            alone = self._score(oracle, TextBatch((form,)), points, "sequence")
            self._near(whole.logits[:, first : first + len(form.options)], alone.logits, "logits depend on other texts")
            self._near(whole.normalizer[:, number], alone.normalizer[:, 0], "normalizers depend on other texts")
            first += len(form.options)

    def test_normalizers_make_probabilities(self) -> None:
        """Over the options they sum to 1; over more positions to less."""
        oracle = self.make()
        points = self.points(oracle, 3)
        scores = self._score(oracle, _OPTIONS, points)
        wide = self._score(oracle, _OPTIONS, points, "sequence")
        self._near(scores.logits, wide.logits, "raw logits depend on the support")
        bounds = np.cumsum(_OPTIONS.sizes)[:-1]
        for number, piece in enumerate(np.split(scores.logits.astype(np.float64), bounds, axis=1)):
            total = np.exp(piece - scores.normalizer[:, None, number]).sum(axis=1)
            require(bool(np.abs(total - 1).max() < 1e-3), "probabilities over the options do not sum to 1")
            total = np.exp(piece - wide.normalizer[:, None, number]).sum(axis=1)
            require(bool((total < 1 + 1e-3).all()), "probabilities over the sequence sum to more than 1")
        if oracle.info.readout != "span":
            return
        answers = self._score(oracle, _ANSWERS, points)
        require(bool((answers.logits <= answers.normalizer + self.tolerance).all()), "a probability is above 1")

    def test_answers_are_found_in_their_context(self) -> None:
        """Best answers are spans of at least one character, and need no known answer."""
        oracle = self.make()
        if oracle.info.readout != "span":
            return
        points = self.points(oracle, 4)
        blind = TextBatch(_ANSWERS.forms, (None, None))
        for longest in (1, 3, 1000):
            best = self._score(oracle, _ANSWERS, points, longest=longest).best
            unknown = self._score(oracle, blind, points, longest=longest).best
            require(best is not None and unknown is not None, "best answers are missing")
            if best is not None and unknown is not None:
                require(bool((best[..., 1] > best[..., 0]).all()), "an answer is empty")
                require(equal(best, unknown), "knowing an answer changes which is found best")

    def test_bad_points_are_refused(self) -> None:
        """NaN, infinity, no candidates and wrong shapes raise OracleError."""
        oracle = self.make()
        good = self.points(oracle, 2)
        bad: list[NDArray[Any]] = [good[0], good[:0], good[:, :, :-1], np.concatenate((good, good), axis=1)]
        for value in (np.nan, np.inf):
            spoiled = good.copy()
            spoiled[1, -1, -1] = value
            bad.append(spoiled)
        for points in bad:
            refused(OracleError, lambda points=points: oracle.score(_OPTIONS, points))  # type: ignore[misc]
        self._score(oracle, _OPTIONS, good)

    def test_texts_that_do_not_fit_are_refused(self) -> None:
        """A question longer than the model raises DataError; a long context is cut and counted."""
        oracle = self.make()
        points = self.points(oracle, 1)
        long = "很长" * oracle.info.max_tokens
        refused(DataError, lambda: oracle.score(TextBatch((Form((Part(long, cut=False),), _FEW, -1),)), points))
        require(self._score(oracle, TextBatch((_form(long, _FEW),)), points).cut > 0, "a cut was not counted")
        require(self._score(oracle, _OPTIONS, points).cut == 0, "a cut was counted where nothing was cut")

    def test_arrays_are_not_shared_with_the_caller(self) -> None:
        """Changing points afterwards, or a reply, changes nothing inside; nor do precision and read-only points."""
        oracle = self.make()
        points = self.points(oracle, 2).astype(np.float32)
        kept = points.copy()
        scores = self._score(oracle, _OPTIONS, points)
        first = Scores(scores.logits.copy(), scores.normalizer.copy(), None, scores.cut)
        require(equal(points, kept), "the caller's points were changed")
        points[:] = 7.0
        scores.logits[:] = 7.0
        scores.normalizer[:] = 7.0
        again = self._score(oracle, _OPTIONS, kept.astype(np.float64))
        require(_same(again, first), "a changed array, or double precision, changed a reply")
        kept.flags.writeable = False
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            require(_same(self._score(self.make(), _OPTIONS, kept), first), "read-only points changed a reply")

    def test_closing_twice(self) -> None:
        """Closing is harmless."""
        oracle = self.make()
        self._score(oracle, _OPTIONS, self.points(oracle, 1))
        oracle.close()
        oracle.close()

    def _score(
        self,
        oracle: Oracle,
        batch: TextBatch,
        points: NDArray[Any],
        support: Support = "candidates",
        longest: int | None = None,
    ) -> Scores:
        scores = oracle.score(batch, points, support, longest)
        return check_scores(scores, batch, len(points), answers=longest is not None, channels=oracle.info.channels)

    def _near(self, one: NDArray[Any], other: NDArray[Any], message: str) -> None:
        require(one.shape == other.shape and bool(np.abs(one - other).max() <= self.tolerance), message)


def _same(one: Scores, other: Scores) -> bool:
    return equal(one.logits, other.logits) and equal(one.normalizer, other.normalizer) and one.cut == other.cut
