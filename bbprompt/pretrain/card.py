"""The model card of a prompt artifact."""

from __future__ import annotations

from bbprompt.prompts import ModularPrompt

__all__ = ["model_card"]


def model_card(prompt: ModularPrompt) -> str:
    """Markdown: what it is, what it was trained on under which terms, how it validates, what it is for."""
    config = prompt.config
    recipe = config.training["recipe"]
    scores: dict[str, float] = config.training["validation"]
    where = "before each of the" if config.layers > 1 else "at the input of the"
    lines = [
        "---",
        "license: cc-by-nc-4.0",
        f"base_model: {config.backbone}",
        "library_name: bbprompt",
        "---",
        "",
        f"# {config.kind} prompts for {config.backbone}",
        "",
        f"{config.modules} modular soft prompts of {config.prompt_length} positions {where} backbone's",
        f"layers, with intrinsic dimension {config.intrinsic_dim}, a router for each of {len(config.tasks)}",
        "upstream tasks and a span head (MP2, arXiv:2210.07565). The backbone was frozen; only these were trained.",
        "",
        f"**Licence: {config.license}.** The weights were trained on research data of mixed terms, listed",
        "below.",
        "",
        f"Backbone weights (SHA-256): `{config.backbone_digest}`. Training: {recipe['steps']} steps of "
        f"{recipe['tasks_per_step']} tasks x {recipe['per_task']} examples, at most {recipe['max_tokens']} "
        f"tokens, seed {recipe['seed']}; the whole recipe stands in `config.json`. The few-shot pools of the "
        f"`seen` tasks (seeds {', '.join(map(str, recipe['spare_seeds']))}) were left out.",
        "",
        *([recipe["note"], ""] if recipe.get("note") else []),
        "## Upstream validation",
        "",
        f"Share of {recipe['valid_size']} validation examples answered right by the task's own router,",
        f"options thinned as in training (at most {recipe['option_limit']}); for extraction the share of right",
        "answer starts. This says how well the training fits, not how well a new task will go.",
        "",
        "| task | right |",
        "|---|---|",
        *(f"| {name} | {score:.3f} |" for name, score in sorted(scores.items())),
        f"| mean of {len(scores)} | {sum(scores.values()) / len(scores):.3f} |",
        "",
        "## Data sources and their terms, as stated there",
        "",
        *(f"- {source}" for source in config.sources),
        "",
    ]
    return "\n".join(lines)
