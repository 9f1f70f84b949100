"""`bbprompt pretrain lm-head`: from a recipe and texts to a language model head for an encoder that has none."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from pathlib import Path

import torch

from bbprompt.backends.backbone import load_backbone
from bbprompt.backends.cache import cache_root
from bbprompt.backends.encoder import Encoder
from bbprompt.backends.precision import training_precision
from bbprompt.backends.tokens import frame_for, tokenize_with
from bbprompt.backends.trained_head import HeadCard, TrainedHead
from bbprompt.errors import UsageError
from bbprompt.pretrain.checkpoint import pretrain_disk_error, write_atomic
from bbprompt.pretrain.directory import append_log, claimed, cut_log
from bbprompt.pretrain.lm_card import head_card
from bbprompt.pretrain.lm_recipe import HeadConfig
from bbprompt.pretrain.lm_texts import MaskedTexts, kept_tokens, open_pieces
from bbprompt.pretrain.lm_trainer import Guesses, HeadTrainer
from bbprompt.pretrain.mp2 import Progress
from bbprompt.store.disk import RealDisk

__all__ = ["train_head"]

log = logging.getLogger("bbprompt")


def train_head(
    config: HeadConfig,
    out: Path,
    report: Callable[[Progress, int], None],
    *,
    resume: bool = False,
    device: str = "cpu",
) -> dict[str, Guesses]:
    """Train a head and write the artifact into `out`.

    Args:
        config: The recipe.
        out: Directory of checkpoints, log and, at the end, the artifact.
        report: Called after each step with its progress and the number of steps.
        resume: Go on from the checkpoint in `out`.
        device: "cpu" or "cuda".

    Returns:
        How well masked tokens of each file's held-out pieces are guessed.

    Raises:
        UsageError: `out` holds another training and `resume` was not asked for, a file of the corpus is not there,
            or a loss is not finite.
        ResumeMismatch: The checkpoint was made with another recipe, other texts or another model.
        RunLocked: Another process works on `out`.
        DataError: A text cannot be read; names file and line.
        DiskError: A file cannot be written; the checkpoint before is whole.
    """
    for each in config.corpus:
        if not Path(each.file).is_file():
            raise UsageError(f"corpus: {each.file}: no such file; name yours in a copy of the recipe")
    if config.dtype == "auto":
        config = config.model_copy(update={"dtype": training_precision(device)})
    disk = RealDisk()
    with claimed(disk, out, config, resume):
        return _train_head(config, out, report, resume, device)


def _train_head(
    config: HeadConfig, out: Path, report: Callable[[Progress, int], None], resume: bool, device: str
) -> dict[str, Guesses]:
    torch.set_num_threads(config.threads or torch.get_num_threads())
    backbone = load_backbone(config.backbone)
    frame = frame_for(backbone.tokenizer, (), min(config.max_tokens, backbone.max_positions))
    digest = hashlib.sha256(backbone.tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
    stores, digests = open_pieces(
        config.corpus, tokenize_with(backbone.tokenizer), frame, cache_root() / "pretrain", digest
    )
    embedding = backbone.model.get_input_embeddings().weight.detach()
    kept, counts = kept_tokens(stores, len(embedding), config.vocabulary, config.least)
    log.info("the head can name %d tokens of %d", len(kept), len(embedding))
    trainer = HeadTrainer(
        config,
        Encoder(backbone.model, getattr(torch, config.dtype), device, backbone.token_type),
        MaskedTexts(config, stores, digests, kept, backbone.gap_token, frame),
        embedding[torch.from_numpy(kept)],
        counts,
        out,
        identity={"backbone": backbone.digest},
    )
    if resume:
        trainer.load()
        cut_log(trainer.disk, out, trainer.step)
        log.info("resumed at step %d", trainer.step)
    trainer.run(lambda progress: report(progress, config.steps))
    found = trainer.measure()
    append_log(out, {"step": trainer.step, "valid": trainer.words_of(found), "speed": {}})
    recipe = config.model_dump(mode="json")
    for each, entry in zip(config.corpus, recipe["corpus"], strict=True):
        entry["file"] = each.name  # where it lay on this machine is nobody's business
    card = HeadCard(
        backbone=backbone.id,
        backbone_digest=backbone.digest,
        hidden=backbone.hidden,
        width=config.width,
        tokens=len(kept),
        training={"recipe": recipe, "held_out": trainer.words_of(found)},
        sources=tuple(f"{each.name} ({each.terms or 'terms not stated'})" for each in config.corpus),
        license=config.license,
    )
    values = {name: value.cpu().numpy() for name, value in trainer.head.transform.state_dict().items()}
    head = TrainedHead(card, {**values, "bias": trainer.head.bias.detach().cpu().numpy(), "tokens": kept})
    folder = out / "artifact"
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise pretrain_disk_error(error, "make it", folder) from error
    for name, content in {**head.files(), "README.md": head_card(card).encode()}.items():
        write_atomic(trainer.disk, folder / name, content)
    return found
