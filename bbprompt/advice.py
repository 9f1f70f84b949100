"""What a user should know of the settings before a run spends anything. Nothing here changes the run."""

from __future__ import annotations

import logging

from bbprompt.config import MethodConfig, TuneConfig
from bbprompt.oracle import OracleInfo
from bbprompt.prompts import ModularPrompt
from bbprompt.tasks.task import Task

__all__ = ["warn_of_idle_workers", "warn_of_seen_examples", "warn_of_shorter_input", "warn_of_single_words"]

_log = logging.getLogger("bbprompt")


def warn_of_seen_examples(config: TuneConfig, task: Task, prompt: ModularPrompt) -> None:
    """Say so when the few-shot split may hold examples that the prompts were trained on."""
    recipe = prompt.config.training.get("recipe", {})
    if task.name in prompt.config.tasks and (config.shots or config.seed not in recipe.get("spare_seeds", [])):
        _log.warning(
            "the prompts were trained on %s and left out the few-shot pools of seeds %s only: with --seed %d%s some "
            "few-shot examples may have been trained on",
            task.name,
            ", ".join(map(str, recipe.get("spare_seeds", []))) or "(none)",
            config.seed,
            f" --shots {config.shots}" if config.shots else "",
        )


def warn_of_idle_workers(workers: int | None, method: MethodConfig, oracle: object = None) -> None:
    """Say so when a server takes every batch in one request, or a stage asks for fewer candidates than workers.

    The size of a batch decides the result, so it never follows the number of workers by itself.

    Args:
        workers: As the user gave them.
        method: What is run.
        oracle: The model; one whose requests hold many candidates has `most_points`, the most that one holds.
    """
    sizes = {
        "router.batch": method.router.batch if method.router is not None else None,
        "prompt.popsize": method.prompt.popsize if method.prompt is not None else None,
    }
    largest, most = max((size or 1 for size in sizes.values()), default=1), getattr(oracle, "most_points", 0)
    if (workers or 1) > 1 and most >= largest:
        _log.warning(
            "--workers %d has no effect: a request takes all candidates of a batch (%d; --max-points of the server is "
            "%d), and batches come one after the other",
            workers,
            largest,
            most,
        )
        return
    small = {name: size for name, size in sizes.items() if size is not None and size < (workers or 1)}
    if small:
        _log.warning(
            "--workers %d: %s candidates at once leave workers idle; %s (another search) would not",
            workers,
            " and ".join(f"{name}={size}" for name, size in small.items()),
            " ".join(f"--set {name}={workers}" for name in small),
        )


def warn_of_shorter_input(max_tokens: int | None, model: OracleInfo) -> None:
    """Say so when the model holds less than `--max-tokens` asks for; it is used at its own limit, as tokenizers do."""
    if max_tokens is not None and 0 < model.max_tokens < max_tokens:
        _log.warning(
            "--max-tokens %d: %s reads at most %d tokens, so this is the limit; what is longer is cut",
            max_tokens,
            model.backbone,
            model.max_tokens,
        )


def warn_of_single_words(method: MethodConfig, task: Task) -> None:
    """Say so when a method reads several words a label and the task gives each of them one."""
    if method.synonyms and all(len(words) == 1 for words in task.synonyms.values()):
        _log.warning(
            "the method %s reads several words a label (synonyms=true), and the task %s gives each label one: lists in "
            "its `words` would be read, such as words: {1: [good, great]}",
            method.name,
            task.name,
        )
