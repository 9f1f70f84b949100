"""`bbprompt pretrain`: from a recipe and data to a prompt artifact."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from bbprompt.backends.backbone import Backbone, load_backbone
from bbprompt.backends.body import body_of
from bbprompt.backends.cache import cache_root
from bbprompt.backends.encoder import Encoder
from bbprompt.backends.lm_head import LanguageHead
from bbprompt.backends.precision import training_precision
from bbprompt.backends.prototype_head import PrototypeHead
from bbprompt.backends.tokens import frame_for, tokenize_with
from bbprompt.backends.verbalizer_head import VerbalizerHead
from bbprompt.errors import UsageError
from bbprompt.pretrain.artifact import artifact, begin_from
from bbprompt.pretrain.card import model_card
from bbprompt.pretrain.checkpoint import pretrain_disk_error
from bbprompt.pretrain.cloze import StockModel
from bbprompt.pretrain.directory import claimed, last_speed, loss_curve
from bbprompt.pretrain.linear import DifferentiableLinear
from bbprompt.pretrain.mixture import Batches, Mixture
from bbprompt.pretrain.mp2 import Progress, Trainer
from bbprompt.pretrain.ppt_annotator import open_annotator
from bbprompt.pretrain.ppt_batches import PptBatches, open_ppt
from bbprompt.pretrain.prototypes import PrototypeMixture
from bbprompt.pretrain.recipe import PretrainConfig
from bbprompt.pretrain.team import Team, join, leave
from bbprompt.pretrain.upstream import data_beside, load_upstream, upstream_tasks
from bbprompt.prompts import ModularPrompt, resolve_prompts
from bbprompt.store.disk import RealDisk
from bbprompt.tasks.task import Task
from bbprompt.texts.mrc import Frame

__all__ = ["pretrain"]

log = logging.getLogger("bbprompt")

_NO_LIMIT = 1_000_000


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

    Started by `torchrun` it trains in step with the other processes; the first of them writes and reports.

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
        UsageError: `out` holds another training and `resume` was not asked for, the recipe names tasks that may
            not be trained on or are not there, or a loss is not finite.
        ResumeMismatch: The checkpoint was made with another recipe, other data or another model.
        RunLocked: Another process works on `out`.
        DataError: An example is wrong; names file and line.
        DiskError: A file cannot be written; the checkpoint before is whole.
    """
    chosen = [] if config.kind == "ppt" else _with_options(config, upstream_tasks(config.tasks))
    known = set(config.ppt.formats) if config.ppt else {task.name for task in chosen}
    if unknown := sorted(set(config.weights) - known):
        raise UsageError(f"weights: '{unknown[0]}' is not among the tasks of the recipe; correct or remove it")
    for name in config.ppt.corpus if config.ppt else ():
        if not Path(name).is_file():
            raise UsageError(f"ppt.corpus: {name}: no such file; name yours in a copy of the recipe")
    team, device = join(device)
    if config.dtype == "auto":
        config = config.model_copy(update={"dtype": training_precision(device)})
    if config.compile == "auto":
        # Into the directory, as the precision: what is fused rounds otherwise.
        config = config.model_copy(update={"compile": device.startswith("cuda") and find_spec("triton") is not None})
    try:
        with claimed(RealDisk(), out, config, resume) if team.leads else nullcontext():
            team.wait()
            return _pretrain(config, chosen, out, data, report, resume, device, team)
    finally:
        leave(team)


def _with_options(config: PretrainConfig, tasks: list[Task]) -> list[Task]:
    """The tasks that the recipe's readout serves: prototypes find no answers in a context."""
    if config.readout != "prototype":
        return tasks
    without = [task.name for task in tasks if task.type == "extractive"]
    if without and config.tasks != "upstream":
        raise UsageError(f"tasks: '{without[0]}' has no options for prototypes to stand for; remove it")
    if without:
        log.info("left out, for they have no options: %s", ", ".join(without))
    return [task for task in tasks if task.type != "extractive"]


def _pretrain(
    config: PretrainConfig,
    chosen: list[Task],
    out: Path,
    data: Path | None,
    report: Callable[[Progress, int], None],
    resume: bool,
    device: str,
    team: Team,
) -> dict[str, float]:
    torch.set_num_threads(config.threads or torch.get_num_threads())
    start = None if config.start is None else ModularPrompt.load(resolve_prompts(config.start))
    backbone = load_backbone(config.backbone, head=config.readout == "verbalizer")
    encoder = _frozen(backbone, getattr(torch, config.dtype), device, config.compile is True)
    causal = backbone.head is not None and backbone.head.causal
    frame = frame_for(backbone.tokenizer, config.placeholders, config.max_tokens, open_end=causal)
    head: PrototypeHead | LanguageHead | None = None if backbone.head is None else backbone.head.to(encoder.device)
    if config.readout == "prototype":
        # Scale and threshold are trained; the head writes and pools.
        head = PrototypeHead(1.0, config.prefix, False, 0.0, tokenize_with(backbone.tokenizer), frame, encoder.device)
    batches = _batches(config, chosen, backbone, frame, data, team, head)
    trainer = Trainer(
        config,
        encoder,
        batches,
        frame,
        out,
        team=team,
        # Not the name in the recipe: what fades out is read again when a training is gone on with.
        identity={"backbone": backbone.digest, **({} if start is None else {"start": start.digest})},
        head=head,
        grades=batches.grades if isinstance(batches, PrototypeMixture) else 0,
        ffn=int(getattr(backbone.model.config, "intermediate_size", 0)) if isinstance(encoder, Encoder) else 0,
    )
    if start is not None:
        begin_from(trainer, start, backbone.digest)
    speed: dict[str, float] = {}
    if resume:
        if (out / "checkpoint.safetensors").is_file():
            trainer.load()
        speed = last_speed(out)
        trainer.cut_log()
        log.info("resumed at step %d", trainer.step)
    team.wait()
    last: list[Progress] = []

    def show(progress: Progress) -> None:
        last[:] = [progress]
        if team.leads:
            report(progress, config.steps)

    trainer.run(show)
    trainer.restore_best()
    scores = trainer.validate(config.valid_size)
    if team.leads:
        if last:
            speed = {name: round(value, 4) for name, value in _speed(last[0]).items()}
            log.info(
                "%.0f examples/s, %.0f tokens/s, %.0f%% of the rate of bare matrix products",
                *(speed["examples_per_second"], speed["tokens_per_second"], 100 * speed["gemm_share"]),
            )
        trainer.log({"step": trainer.step, "valid": scores, "speed": speed})
        recipe = config.model_dump(mode="json")
        if config.ppt is not None:  # where a corpus lay on this machine is nobody's business
            recipe["ppt"]["corpus"] = [Path(name).name for name in config.ppt.corpus]
        training = {
            "recipe": recipe,
            "untrained": trainer.untrained,
            "validation": scores,
            "curve": loss_curve(out),
            **_chosen_step(trainer),
        }
        if start is not None:  # likewise; the digest says which artifact it was
            recipe["start"] = f"{Path(str(config.start)).name} ({start.digest[:12]})"
        sources = () if start is None else start.config.sources
        prompt = artifact(trainer, backbone.id, backbone.digest, training, sources)
        try:
            prompt.save(out / "artifact")
            (out / "artifact" / "README.md").write_text(model_card(prompt), encoding="utf-8")
        except OSError as error:
            raise pretrain_disk_error(error, "write it", out / "artifact") from error
    team.wait()
    return scores


def _frozen(backbone: Backbone, dtype: torch.dtype, device: str, compiled: bool = False) -> Encoder | StockModel:
    """The backbone as a training runs it."""
    if backbone.head is None or backbone.head.kind == "masked":
        token_type, linear = backbone.token_type, DifferentiableLinear
        return Encoder(backbone.model, dtype, device, token_type, linear=linear, compiled=compiled)
    place = torch.device(device)
    return StockModel(body_of(backbone, place, dtype), dtype, place, backbone.hidden, range(backbone.layers))


def _batches(
    config: PretrainConfig,
    chosen: list[Task],
    backbone: Backbone,
    frame: Frame,
    data: Path | None,
    team: Team,
    head: PrototypeHead | LanguageHead | None,
) -> Batches:
    """The tasks of the recipe, as tokens."""
    tokenize = tokenize_with(backbone.tokenizer)
    digest = hashlib.sha256(backbone.tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
    slices, cache = config.accumulate * team.size, cache_root() / "pretrain"
    if config.ppt is not None:
        annotator = None if config.ppt.annotator is None else open_annotator(config.ppt.annotator)
        stores, ppt_digest = open_ppt(
            config.ppt,
            tokenize,
            frame,
            cache=cache,
            tokenizer_digest=digest,
            seed=config.seed,
            annotate=annotator[0] if annotator else None,
            annotator_words=annotator[1] if annotator else (),
            annotator_digest=annotator[2] if annotator else "",
            head=VerbalizerHead(
                head, backbone.gap_token, tokenize, frame, head.weight.device, backbone.tokenizer.unk_token_id
            )
            if isinstance(head, LanguageHead)
            else None,
        )
        names = ", ".join(Path(name).name for name in config.ppt.corpus)
        return PptBatches(
            stores,
            f"{names} ({config.ppt.terms or 'terms not stated'})",
            ppt_digest,
            seed=config.seed,
            tasks_per_step=config.tasks_per_step,
            per_task=config.per_task,
            valid_size=config.valid_size,
            weights=config.weights,
            slices=slices,
            bucket=config.bucket,
            cloze=config.readout == "verbalizer",
            files=len(config.ppt.corpus),
        )
    tasks = load_upstream(
        chosen,
        data,
        tokenize=tokenize,
        # Prototypes read texts and options apart and cut both: no example is too long for them.
        frame=frame if head is None else replace(frame, limit=_NO_LIMIT),
        option_limit=config.option_limit,
        option_characters=config.option_characters,
        spare_seeds=config.spare_seeds,
        cap=config.train_cap,
        valid=config.valid_size,
        seed=config.seed,
        places=data_beside(config.tasks),
        cache=cache,
        tokenizer_digest=digest,
        shuffle=config.shuffle_options,
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
        slices=slices,
        bucket=config.bucket,
    )
    return PrototypeMixture(mixture, head) if isinstance(head, PrototypeHead) else mixture


def _speed(progress: Progress) -> dict[str, float]:
    return {
        "examples_per_second": progress.examples_per_second,
        "tokens_per_second": progress.tokens_per_second,
        "gemm_share": progress.gemm_share,
    }


def _chosen_step(trainer: Trainer) -> dict[str, Any]:
    """Which step the artifact is of, where it need not be the last."""
    return {} if trainer.best is None else {"best_step": trainer.best[1], "best_validation": trainer.best[0]}
