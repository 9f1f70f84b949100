"""Properties that hold for any input: readout, few-shot sampling, templates, layout, and extreme numbers."""

from __future__ import annotations

import numpy as np
import pytest
import references
import tiny_prompt
import toyruns
from depth import deep
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from bbprompt.errors import DataError
from bbprompt.optimizers.cmaes import CMAES
from bbprompt.oracle import Scores, TextBatch
from bbprompt.readout import Readout
from bbprompt.tasks.example import Form, Part
from bbprompt.tasks.fewshot import sample
from bbprompt.tasks.task import Task
from bbprompt.texts.mrc import Frame, encode

SIZES = (2, 3, 4)
BATCH = TextBatch(tuple(Form((Part("t", True),), tuple("abcd"[:n]), -1) for n in SIZES))
FINITE = st.floats(-(2.0**126), 2.0**126, width=32)
LOGITS = arrays(np.float32, (2, sum(SIZES), 2), elements=FINITE)


def normalised(logits: np.ndarray) -> Scores:
    pieces = np.split(logits.astype(np.float64), np.cumsum(SIZES)[:-1], axis=1)
    normalizer = np.stack([np.logaddexp.reduce(piece, axis=1) for piece in pieces], axis=1)
    return Scores(logits, normalizer.astype(np.float32), None, 0)


@settings(max_examples=deep(300), deadline=None)
@given(LOGITS)
def test_probabilities_and_losses_are_finite_up_to_the_ends_of_float32(logits: np.ndarray) -> None:
    scores, readout = normalised(logits), Readout()
    losses = readout.losses(scores, BATCH, (0, 1, 2))
    assert np.isfinite(losses).all()
    assert (losses >= -1e-6 * np.maximum(np.abs(logits).max(), 1.0)).all()
    for row, chosen in zip(readout.probabilities(scores, BATCH), readout.choices(scores, BATCH), strict=True):
        for shares, choice in zip(row, chosen, strict=True):
            assert shares.sum() == pytest.approx(1.0)
            assert shares[choice] == shares.max()


@settings(max_examples=deep(200), deadline=None)
@given(arrays(np.float32, (1, sum(SIZES), 2), elements=st.floats(-50, 50, width=32)), st.integers(-50, 50))
def test_a_shift_of_all_logits_changes_no_decision(logits: np.ndarray, shift: int) -> None:
    readout = Readout()
    moved = normalised((np.round(logits, 2) + np.float32(shift)).astype(np.float32))
    here = normalised(np.round(logits, 2))
    np.testing.assert_allclose(
        readout.losses(moved, BATCH, (0, 1, 2)), readout.losses(here, BATCH, (0, 1, 2)), atol=1e-4
    )


@settings(max_examples=deep(100), deadline=None)
@given(st.randoms(use_true_random=False), st.integers(0, 2**32), st.integers(1, 8))
def test_a_few_shot_draw_is_disjoint_balanced_and_blind_to_order(random: object, seed: int, shots: int) -> None:
    examples = [toyruns.TASK.example(record) for record in tiny_prompt.pair_records(40, 5)]
    few = sample(toyruns.TASK, examples, seed, shots)
    shuffled = list(examples)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert sample(toyruns.TASK, [*shuffled, *shuffled[:9]], seed, shots) == few
    assert not {e.uid for e in few.train} & {e.uid for e in few.dev}
    for side in (few.train, few.dev):
        assert sorted(e.label for e in side) == [0] * shots + [1] * shots


TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30).filter(str.strip)


@settings(max_examples=deep(300), deadline=None)
@given(TEXT, TEXT, TEXT.map(lambda text: text.replace("{", "{{").replace("}", "}}")))
def test_templates_carry_any_text_unchanged(first: str, second: str, literal: str) -> None:
    task = Task.model_validate(tiny_prompt.PAIR | {"template": literal + "{text_a}" + literal + "{text_b}"})
    form = task.render(task.example({"text_a": first, "text_b": second, "label": "0"}))
    plain = literal.replace("{{", "{").replace("}}", "}")
    assert "".join(part.text for part in form.parts) == plain + first + plain + second
    assert [part.text for part in form.parts if part.cut] == [first, second]


def characters(text: str) -> tuple[list[int], list[tuple[int, int]]]:
    kept = [i for i, char in enumerate(text) if not char.isspace()]
    return [ord(text[i]) for i in kept], [(i, i + 1) for i in kept]


@settings(max_examples=deep(300), deadline=None)
@given(TEXT, TEXT, st.lists(TEXT, min_size=2, max_size=4), st.integers(4, 80))
def test_a_layout_never_exceeds_its_limit_and_keeps_question_and_options(
    question: str, context: str, options: list[str], limit: int
) -> None:
    form = Form((Part(question, False), Part(context, True)), tuple(options), -1)
    frame = Frame((1,), (2, 2), (3,), limit)
    try:
        found = encode(form, characters, frame)
    except DataError as error:
        assert "\n" not in str(error)  # noqa: PT017 - a refusal is the other right answer
        fixed = len(characters(question)[0]) + sum(len(characters(option)[0]) + 1 for option in options)
        assert fixed + 1 > frame.room or not characters(context)[0]
        return
    assert len(found.ids) <= limit
    whole = len(characters(question + context)[0]) + sum(len(characters(o)[0]) + 1 for o in options)
    assert found.cut == whole - (len(found.ids) - 4)
    for (start, end), option in zip(found.spans, options, strict=True):
        assert list(found.ids[start : end + 1]) == characters(option.strip())[0]


# ---------------------------------------------------------------------------------------------- optimizers


@pytest.mark.parametrize(("dim", "popsize"), [(1, 500), (500, 20), (2_000, 3)])
def test_cmaes_stays_finite_at_odd_sizes(dim: int, popsize: int) -> None:
    optimizer = CMAES(np.zeros(dim), 0.5, seed=1, popsize=popsize)
    for _ in range(2 if dim == 2_000 else 5):
        rows = optimizer.ask()
        losses = np.sum(rows**2, axis=1)
        losses[0] = np.inf
        optimizer.tell(rows, losses)
    assert np.isfinite(optimizer.mean).all()
    assert 1e-20 < optimizer.sigma < 1e20
    matrix = optimizer._es.C
    if dim <= 500:
        np.testing.assert_allclose(matrix, matrix.T, rtol=0, atol=1e-15)
        assert np.linalg.eigvalsh(matrix).min() > 0


def test_cmaes_takes_as_long_as_the_reference() -> None:
    references.evolution(3, ("sphere", "rotated ellipsoid"), within=0.35)


def test_ucb_beats_random_search() -> None:
    references.bayesian(1, ("three wells",), calls=25)
