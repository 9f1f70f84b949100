"""`bbprompt pretrain mp2`: from a recipe and data to a prompt artifact."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path

import torch

from bbprompt.backends.backbone import load_backbone
from bbprompt.backends.encoder import Encoder
from bbprompt.backends.tokens import frame_for, tokenize_with
from bbprompt.errors import ResumeMismatch, UsageError
from bbprompt.pretrain.card import model_card
from bbprompt.pretrain.mixture import Mixture
from bbprompt.pretrain.mp2 import PretrainConfig, Progress, Trainer
from bbprompt.pretrain.upstream import load_upstream, upstream_tasks

__all__ = ["pretrain"]

log = logging.getLogger("bbprompt")


def pretrain(
    config: PretrainConfig,
    out: Path,
    data: Path | None,
    report: Callable[[Progress, int], None],
    *,
    resume: bool = False,
    device: str = "cpu",
) -> dict[str, float]:
    """Train prompts and write the artifact into `out`.

    Args:
        config: The recipe.
        out: Directory of checkpoints, log and, at the end, the artifact.
        data: Directory of data directories; None for `BBPROMPT_DATA` and the hub.
        report: Called after each step with its progress and the number of steps.
        resume: Go on from the checkpoint in `out`.
        device: "cpu" or "cuda".

    Returns:
        Final validation score of each upstream task.

    Raises:
        UsageError: `out` holds another training and `resume` was not asked for, or the recipe names tasks that
            may not be trained on or are not there.
        ResumeMismatch: The checkpoint was made with another recipe.
    """
    recipe = config.model_dump(mode="json")
    chosen = upstream_tasks(config.tasks)
    if unknown := sorted(set(config.weights) - {task.name for task in chosen}):
        raise UsageError(f"weights: '{unknown[0]}' is not among the tasks of the recipe; correct or remove it")
    _claim(out, recipe, resume)
    torch.set_num_threads(config.threads or torch.get_num_threads())
    backbone = load_backbone(config.backbone)
    encoder = Encoder(backbone.model, getattr(torch, config.dtype), device, backbone.token_type, prepack=False)
    placeholders = range(config.first_placeholder, config.first_placeholder + config.prompt_length)
    frame = frame_for(backbone.tokenizer, tuple(placeholders), config.max_tokens)
    tokenize = tokenize_with(backbone.tokenizer)
    tasks = load_upstream(
        chosen,
        data,
        tokenize=tokenize,
        frame=frame,
        option_limit=config.option_limit,
        option_characters=config.option_characters,
        spare_seeds=config.spare_seeds,
        cap=config.train_cap,
        valid=config.valid_size,
        seed=config.seed,
    )
    mixture = Mixture(
        tasks,
        tokenize,
        frame,
        seed=config.seed,
        tasks_per_step=config.tasks_per_step,
        per_task=config.per_task,
        option_limit=config.option_limit,
        option_characters=config.option_characters,
        shuffle_options=config.shuffle_options,
        weights=config.weights,
    )
    trainer = Trainer(config, encoder, mixture, frame, out)
    if resume and (out / "checkpoint.safetensors").is_file():
        trainer.load()
        log.info("resumed at step %d", trainer.step)
    trainer.run(lambda progress: report(progress, config.steps))
    scores = trainer.validate(config.valid_size)
    trainer.log({"step": trainer.step, "valid": scores})
    prompt = trainer.artifact(backbone.id, backbone.digest, {"recipe": recipe, "validation": scores})
    prompt.save(out / "artifact")
    (out / "artifact" / "README.md").write_text(model_card(prompt), encoding="utf-8")
    return scores


def _claim(out: Path, recipe: dict[str, object], resume: bool) -> None:
    """Bind the directory to the recipe."""
    text = json.dumps(recipe, ensure_ascii=False, sort_keys=True, indent=2) + "\n"
    file = out / "recipe.json"
    if resume:
        # Killed before its first checkpoint, a training goes on from step 0.
        if not file.is_file():
            raise UsageError(f"--resume {out}: there is no training to go on with")
        if file.read_text(encoding="utf-8") != text:
            digest = hashlib.sha256(text.encode()).hexdigest()[:12]
            raise ResumeMismatch(f"{file}: the checkpoint was made with another recipe than this one ({digest})")
        return
    if file.is_file():
        raise UsageError(f"{out}: holds a training already; go on with --resume {out}, or choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
