"""The model card of a prompt artifact."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bbprompt.prompts import ModularPrompt, PromptConfig

__all__ = ["model_card"]

#: Most lines of a loss curve.
_LINES = 12


def model_card(prompt: ModularPrompt) -> str:
    """Markdown: what it is, what it was trained on under which terms, how it validates, what it is for."""
    config = prompt.config
    recipe = config.training["recipe"]
    scores: dict[str, float] = config.training["validation"]
    routed = " by the task's own router" if config.tasks else ""
    which = f"the first {config.layers}" if isinstance(recipe.get("depth"), int) else "each"
    where = f"before {which} of the" if config.layers > 1 else "at the input of the"
    lines = [
        "---",
        "license: cc-by-nc-4.0",
        f"base_model: {config.backbone}",
        "library_name: bbprompt",
        "---",
        "",
        f"# {config.kind} prompts for {config.backbone}",
        "",
        *_what(config, where),
        "",
        f"**Licence: {config.license}.** The weights were trained on research data of mixed terms, listed",
        "below.",
        "",
        f"Backbone weights (SHA-256): `{config.backbone_digest}`. Training: {recipe['steps']} steps of "
        f"{recipe['tasks_per_step']} tasks x {recipe['per_task']} examples, at most {recipe['max_tokens']} "
        f"tokens, seed {recipe['seed']}; the whole recipe stands in `config.json`. {_left_out(recipe)}".rstrip(),
        "",
        *([f"Begun with the prompts {recipe['start']}.", ""] if recipe.get("start") else []),
        *([recipe["note"], ""] if recipe.get("note") else []),
        f"Made by `bbprompt pretrain {config.kind.partition('-')[0]} --config RECIPE.yaml` from that recipe.",
        "",
        *_curve(config.training.get("curve") or []),
        "## Upstream validation",
        "",
        f"Share of {recipe['valid_size']} validation examples answered right"
        f"{routed}, options as in training; for extraction the",
        "share of right answer starts. This says how well the training fits, not how well a new task will go.",
        "",
        *_table(scores, config.training.get("untrained") or {}),
        "",
        "## Data sources and their terms, as stated there",
        "",
        *(f"- {source}" for source in config.sources),
        "",
    ]
    return "\n".join(lines)


def _curve(points: Sequence[tuple[int, float, float]]) -> list[str]:
    """The training loss, in about ten lines; nothing where it is not known."""
    if not points:
        return []
    every = -(-len(points) // _LINES)
    rows = points[(len(points) - 1) % every :: every]  # the last one is among them
    return [
        "## Training",
        "",
        "Mean loss and share answered right since the last checkpoint.",
        "",
        "| step | loss | right |",
        "|---|---|---|",
        *(f"| {step} | {loss:.3f} | {right:.3f} |" for step, loss, right in rows),
        "",
    ]


def _table(scores: dict[str, float], untrained: dict[str, float]) -> list[str]:
    """The validation, beside that of the untrained prompts where it is known."""
    columns = [untrained, scores] if untrained else [scores]
    names = ["before training", "right"] if untrained else ["right"]
    rows = [(name, [column[name] for column in columns]) for name in sorted(scores)]
    rows.append((f"mean of {len(scores)}", [sum(column.values()) / len(column) for column in columns]))
    return [
        f"| task | {' | '.join(names)} |",
        "|---|" + "---|" * len(columns),
        *(f"| {name} | {' | '.join(f'{value:.3f}' for value in values)} |" for name, values in rows),
    ]


def _what(config: PromptConfig, where: str) -> list[str]:
    size = f"{config.prompt_length} positions {where} backbone's layers, with intrinsic dimension"
    frozen = "The backbone was frozen; only these were trained."
    head = {
        "span": ", and a span head",
        "prototype": ", and scale and threshold of the similarity of embeddings",
        "verbalizer": "; label words are read by the backbone's own language model head",
    }[config.readout]
    if config.tasks:
        return [
            f"{config.modules} modular soft prompts of {size}",
            f"{config.intrinsic_dim}, a router for each of {len(config.tasks)} upstream tasks{head}",
            f"(MP2, arXiv:2210.07565). {frozen}",
        ]
    paper = "PPT, arXiv:2109.04332" if config.kind == "ppt" else "SPoT, arXiv:2110.07904"
    return [f"One soft prompt of {size}", f"{config.intrinsic_dim}{head} ({paper}). {frozen}"]


def _left_out(recipe: dict[str, Any]) -> str:
    if recipe["kind"] == "ppt":
        return ""
    seeds = ", ".join(map(str, recipe["spare_seeds"]))
    return f"The few-shot pools of the `seen` tasks (seeds {seeds}) were left out."
