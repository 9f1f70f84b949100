"""The pool of prompts of PromptBoosting: which there are for a task, and which are refused."""

from __future__ import annotations

import pytest
import tiny_prompt

from bbprompt.baselines.ensemble import pool
from bbprompt.baselines.settings import BoostingConfig
from bbprompt.config import load_method
from bbprompt.errors import UsageError
from bbprompt.tasks.task import Task, load_task, task_names
from bbprompt.texts.forms import cloze_form


def bundled() -> BoostingConfig:
    settings = load_method("promptboosting").baseline
    assert isinstance(settings, BoostingConfig)
    return settings


def written(task: Task, record: dict[str, str], pattern: str | None) -> str:
    form = cloze_form(task, task.example(record), pattern)
    assert form.gap == len(form.parts) - 1, "a causal model can be asked too"
    return "".join(part.text for part in form.parts[: form.gap]) + "_" + form.parts[form.gap].text


def test_ten_prompts_for_every_bundled_task_with_labels() -> None:
    for name in task_names():
        task = load_task(name)
        if task.labelled:
            prompts = pool(bundled(), task)
            assert prompts[0] is None
            assert len(set(prompts)) == 10


def test_prompts_are_written_out() -> None:
    task = load_task("sst2")
    assert written(task, {"text": "A film.", "label": "positive"}, pool(bundled(), task)[1]) == "A film. It is _."
    several = Task.model_validate(tiny_prompt.SINGLE | {"template": "{subject}和{object}，{sentence}，关系？选项："})
    record = {"subject": "甲", "object": "乙", "sentence": "丙", "label": "l0"}
    assert written(several, record, "{text}这是{gap}。") == "甲，乙，丙这是_。"
    assert written(several, record, "{object}这是{gap}。") == "乙这是_。"
    pair = load_task("rte")
    record = {"text_a": "A.", "text_b": "B.", "label": "entailment"}
    assert written(pair, record, pool(bundled(), pair)[2]) == "A. In other words, B. _."


def test_another_language_has_its_own_prompt_alone() -> None:
    assert pool(bundled(), Task.model_validate(tiny_prompt.SINGLE | {"language": "de"})) == (None,)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("{text} It", "it needs {gap} once"),
        ("{gap} {gap} {text}", "it needs {gap} once"),
        ("It is {gap}.", "at least one of them"),
        ("{title} is {gap}.", "it reads {text} or {text}"),
        ("{text {gap}", "opens no {field}"),
    ],
)
def test_patterns_that_do_not_fit(pattern: str, message: str) -> None:
    settings = bundled().model_copy(update={"patterns": {"single": {"zh": [pattern]}}})
    with pytest.raises(UsageError) as refused:
        pool(settings, Task.model_validate(tiny_prompt.SINGLE))
    assert message in str(refused.value)
    assert "tiny-single" in str(refused.value)
