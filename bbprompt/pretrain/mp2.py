"""Multi-task pre-training of prompts (MP2, section 3): the frozen backbone, many tasks, one loop.

Fast and slow learning (MP2, section 3.3): the router's learning rate is a multiple of the prompts'. Checkpoints
hold parameters and optimizer state as safetensors; a resumed training sees the same batches and gates, and reaches
the same weights.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bbprompt.backends.encoder import Encoder
from bbprompt.backends.lm_head import LanguageHead
from bbprompt.backends.prototype_head import PrototypeHead
from bbprompt.errors import ArtifactError, ResumeMismatch, UsageError
from bbprompt.jsontext import parse_json
from bbprompt.oneline import one_line
from bbprompt.pretrain.ahead import Ahead
from bbprompt.pretrain.checkpoint import (
    check_finite,
    load_checkpoint,
    restore_state,
    save_checkpoint,
    shaped,
    training_state,
)
from bbprompt.pretrain.cloze import ClozeBatch, StockModel, cloze_loss
from bbprompt.pretrain.directory import append_log, cut_log
from bbprompt.pretrain.mixture import Batches
from bbprompt.pretrain.model import Batch, ModularPrompts, Phase, SpanBatch, span_loss
from bbprompt.pretrain.prototypes import PrototypeBatch, prototype_loss
from bbprompt.pretrain.recipe import PretrainConfig
from bbprompt.pretrain.schedule import rate_factor
from bbprompt.pretrain.speed import gemm_rate, step_flops
from bbprompt.pretrain.team import ALONE, Team
from bbprompt.store.disk import Disk, RealDisk
from bbprompt.texts.mrc import Frame

__all__ = ["PretrainConfig", "Progress", "Trainer"]

log = logging.getLogger("bbprompt")


@dataclass(frozen=True, slots=True)
class Progress:
    """What a step did: for the terminal and `train.jsonl`.

    Attributes:
        step: Steps done.
        loss: Mean loss of the step's examples.
        accuracy: Share of them answered right.
        tokens_per_second: Since the training was begun or gone on with, all processes together.
        seconds_left: At that rate.
        examples_per_second: Likewise.
        gemm_share: Rate of the frozen layers' arithmetic over that of a bare matrix product on this device.
    """

    step: int
    loss: float
    accuracy: float
    tokens_per_second: float
    seconds_left: float
    examples_per_second: float = 0.0
    gemm_share: float = 0.0


class Trainer:
    """Holds the trainable prompts and the optimizer; `run` trains to the end of the recipe.

    Args:
        config: The recipe.
        encoder: The frozen model in `config.dtype`.
        batches: Upstream tasks.
        frame: Placeholders and special tokens.
        directory: Where checkpoints and the log go.
        disk: Writes them.
        team: The processes that train together.
        identity: What a checkpoint must have been made with to be gone on with, in words, beside the data.
        head: Reads embeddings where the recipe's readout is prototypes, words where it is a verbalizer.
        grades: Then the most labels of a task whose texts are compared.
        ffn: Width of the encoder's feed-forward part, for the arithmetic of the speed; 0 leaves that out.
    """

    def __init__(
        self,
        config: PretrainConfig,
        encoder: Encoder | StockModel,
        batches: Batches,
        frame: Frame,
        directory: Path,
        *,
        disk: Disk | None = None,
        team: Team = ALONE,
        identity: dict[str, str] | None = None,
        ffn: int = 0,
        head: PrototypeHead | LanguageHead | None = None,
        grades: int = 0,
    ) -> None:
        self.config, self.encoder, self.batches, self.frame = config, encoder, batches, frame
        self.directory, self.disk, self.team, self._ffn, self._head = directory, disk or RealDisk(), team, ffn, head
        self._identity = {"processes": str(team.size), **(identity or {})}
        generator = torch.Generator().manual_seed(config.seed)
        self.prompts = ModularPrompts(
            len(batches.names),
            config.prompted(len(encoder.layers)),
            config.modules,
            config.intrinsic_dim,
            frame,
            encoder.hidden,
            config.prompt_scale,
            generator,
            config.routed,
            config.scale if config.readout == "prototype" else None,
            grades,
            spans=config.readout == "span",
        ).to(encoder.device)
        p = self.prompts
        readers = {"span": ("head_weight", "head_bias"), "prototype": ("log_scale", "threshold"), "verbalizer": ()}
        groups: list[tuple[list[torch.nn.Parameter], float]] = [
            ([p.bank], config.module_rate),
            ([p.projection], config.projection_rate),
            # Without fast and slow learning routers learn as fast as prompts (MP2, Table 5).
            ([p.router] if config.routed else [], config.router_rate if config.fsl else config.module_rate),
            ([getattr(p, name) for name in readers[config.readout]], config.head_rate),
            ([p.offsets] if grades else [], config.router_rate),
        ]
        self.optimizer = torch.optim.Adam(
            [{"params": parameters, "lr": rate} for parameters, rate in groups if parameters],
            fused=encoder.device.type == "cuda",
        )
        self.step = 0
        self.best: tuple[float, int] | None = None
        self.untrained: dict[str, float] = {}
        self._rates = [group["lr"] for group in self.optimizer.param_groups]
        self._window: list[tuple[float, float]] = []

    def run(self, report: Callable[[Progress], None]) -> None:
        """Train from the current step to the last, saving and validating on the way.

        Raises:
            UsageError: A loss or gradient is not finite; the last good checkpoint stays.
            DiskError: A checkpoint cannot be written; the one before stays.
        """
        config, meter = self.config, _Meter(self)
        first = self.team.rank * config.accumulate
        if not self.step:
            self.untrained = self.validate(config.valid_size)
            self.log({"step": 0, "valid": self.untrained})
        with Ahead(self.batches, range(first, first + config.accumulate), config.steps) as ahead:
            while self.step < config.steps:
                slices = [ahead.get(self.step, part) for part in range(first, first + config.accumulate)]
                loss, accuracy = self._train(slices)
                self.step += 1
                self._window.append((loss, accuracy))
                report(meter.progress(slices, loss, accuracy))
                last = self.step == config.steps
                # The last step is validated at the end anyway, but before that it may be the best.
                if config.keep == "best" if last else self.step % config.valid_every == 0:
                    self._look()
                if self.step % config.save_every == 0 or last:
                    self._log_window()
                    self.save()

    def _train(self, slices: Sequence[Batch]) -> tuple[float, float]:
        """One update from the slices of this process and those of the others."""
        config = self.config
        noisy = self.step >= config.noise_from * config.steps
        phase = Phase(noisy, config.temperature_at(self.step), config.normalized, config.left_at(self.step))
        self.optimizer.zero_grad(set_to_none=True)
        totals = torch.zeros(2)
        spoilt = ""
        for batch in slices:
            # The same gates for each slice: together they are one batch.
            generator = torch.Generator().manual_seed(config.seed * 1_000_003 + self.step)
            each, right = self._judge(batch, phase, generator)
            loss = each.mean() / len(slices)
            torch.autograd.backward(loss)
            totals += torch.stack([loss.detach(), right.mean() / len(slices)]).cpu()
            if not spoilt and not torch.isfinite(each).all():
                spoilt = self._broken(batch, torch.isfinite(each))
        gradients = [p.grad for p in self.prompts.parameters() if p.grad is not None]
        self.team.average([*gradients, totals])
        norm = torch.nn.utils.clip_grad_norm_(self.prompts.parameters(), config.clip)
        if not (torch.isfinite(totals[0]) and torch.isfinite(norm)):
            what = f"the loss is {totals[0].item()}" if not torch.isfinite(totals[0]) else "a gradient is not finite"
            tasks = sorted({self.batches.names[i] for batch in slices for i in batch.tasks.tolist()})
            raise UsageError(
                f"step {self.step}: {what}; {spoilt or 'in a batch of ' + ', '.join(tasks)}; begin again with lower "
                f"learning rates and another --out (the last good checkpoint of this one is kept)"
            )
        factor = rate_factor(self.step, config.steps, config.warmup)
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor
        self.optimizer.step()
        return float(totals[0]), float(totals[1])

    def _judge(self, batch: Batch, phase: Phase, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Loss of each example and whether it was answered right, `(N,)` both."""
        model, head = self.encoder, self._head
        if isinstance(batch, ClozeBatch) and isinstance(head, LanguageHead):
            return cloze_loss(self.prompts, model, head, batch, phase, generator)
        if isinstance(model, Encoder):
            if isinstance(batch, SpanBatch):
                return span_loss(self.prompts(model, batch, phase, generator), batch)
            if isinstance(batch, PrototypeBatch) and isinstance(head, PrototypeHead):
                return prototype_loss(self.prompts, model, head, batch, phase, generator)
        raise TypeError(f"no readout for a {type(batch).__name__}")

    def _broken(self, batch: Batch, finite: Tensor) -> str:
        """Names the first text whose loss is not finite."""
        row = int((~finite).nonzero()[0])
        uid = f", example {batch.uids[row]}" if batch.uids else ""
        return f"first for task {self.batches.names[int(batch.tasks[row])]}, row {row} of {len(finite)}{uid}"

    def _look(self) -> None:
        """Validate; keep the prompts where they are to be chosen by it and are better than any before."""
        best = self.config.keep == "best"
        scores = self.validate(self.config.valid_size if best else -(-self.config.valid_size // 4))
        self.log({"step": self.step, "valid": scores})
        mean = sum(scores.values()) / len(scores)
        if best and (self.best is None or mean > self.best[0]):
            self.best = (mean, self.step)
            if self.team.leads:
                tensors = dict(self.prompts.named_parameters())
                save_checkpoint(self.disk, self.directory / "best.safetensors", tensors, {"step": str(self.step)})

    @torch.no_grad()
    def validate(self, limit: int) -> dict[str, float]:
        """Share answered right by each upstream task's own router on `limit` validation examples.

        Extraction counts an answer as right when its start is. The processes of a team share the tasks.
        """
        phase = Phase(noise=False, normalized=self.config.normalized)
        names = self.batches.names
        scores = torch.zeros(len(names), dtype=torch.float64)
        for index in range(self.team.rank, len(names), self.team.size):
            rights = [self._judge(batch, phase, torch.Generator())[1] for batch in self.batches.valid(index, limit, 32)]
            scores[index] = torch.cat(rights).mean().item()
        self.team.sum([scores])
        return {name: round(score, 4) for name, score in zip(names, scores.tolist(), strict=True)}

    def log(self, record: dict[str, object]) -> None:
        """Append one line to `train.jsonl`."""
        if self.team.leads:
            append_log(self.directory, record)

    def _log_window(self) -> None:
        """The mean loss since the last checkpoint."""
        losses, rights = zip(*self._window, strict=True) if self._window else ((0.0,), (0.0,))
        size = len(losses)
        self.log({"step": self.step, "loss": round(sum(losses) / size, 6), "right": round(sum(rights) / size, 4)})
        self._window.clear()

    def save(self) -> None:
        """Write `checkpoint.safetensors`, in one step or not at all.

        Raises:
            UsageError: A weight is not finite; the checkpoint before stays.
            DiskError: It cannot be written; the checkpoint before stays.
        """
        check_finite(self.step, self.prompts)
        if not self.team.leads:
            return
        tensors = training_state(self.prompts, self.optimizer)
        words = {
            "step": str(self.step),
            "best": json.dumps(self.best),
            "untrained": json.dumps(self.untrained),
            "data": json.dumps(self.batches.digests),
        }
        save_checkpoint(self.disk, self.directory / "checkpoint.safetensors", tensors, words | self._identity)

    def load(self) -> None:
        """Go on from `checkpoint.safetensors`.

        Raises:
            ArtifactError: The file is damaged.
            ResumeMismatch: It was made with other data, another model or another number of processes.
        """
        file = self.directory / "checkpoint.safetensors"
        tensors, words = load_checkpoint(file, self.encoder.device)
        for what, now in self._identity.items():
            # A checkpoint of an older version says nothing of them.
            if words.get(what, now) != now:
                raise ResumeMismatch(f"{file}: was made with {what} {one_line(words[what])[:200]}, this is {now}")
        try:
            step = int(words["step"])
            data, best = parse_json(words.get("data", "null")), parse_json(words.get("best", "null"))
            untrained = parse_json(words.get("untrained", "{}"))
            best = None if best is None else (float(best[0]), int(best[1]))
            if step < 0 or not isinstance(untrained, dict) or not isinstance(data, dict | None):
                raise ValueError("its words are not those of a training")
            restore_state(tensors, self.prompts, self.optimizer)
        except (LookupError, TypeError, ValueError, RuntimeError) as error:
            raise ArtifactError(f"{file}: damaged ({error}); start the training again") from error
        present = self.batches.digests
        if data is not None and data != present:
            other = sorted(name for name in {*data, *present} if data.get(name) != present.get(name))
            raise ResumeMismatch(f"{file}: was made with other data of {', '.join(other)}; give the same --data")
        self.step, self.best = step, best
        self.untrained = untrained

    def restore_best(self) -> None:
        """Take the prompts of the best validation back, where the recipe says so.

        Raises:
            ArtifactError: `best.safetensors` is damaged or gone.
        """
        if self.config.keep != "best" or self.best is None:
            return
        self.team.wait()
        file = self.directory / "best.safetensors"
        tensors, _ = load_checkpoint(file, self.encoder.device)
        try:
            with torch.no_grad():
                for name, parameter in self.prompts.named_parameters():
                    parameter.copy_(shaped(tensors, name, parameter.shape))
        except (LookupError, RuntimeError) as error:
            raise ArtifactError(f"{file}: damaged ({error}); start the training again") from error
        log.info("took the prompts of step %d (validation %.4f)", self.best[1], self.best[0])

    def cut_log(self) -> None:
        """Take the lines out of `train.jsonl` that the resumed training will write again."""
        if self.team.leads:
            cut_log(self.disk, self.directory, self.step)


class _Meter:
    """Speed since the training was begun or gone on with."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer, self._first = trainer, trainer.step
        encoder = trainer.encoder
        self._rate = 0.0
        if trainer._ffn and trainer.step < trainer.config.steps:
            self._rate = gemm_rate(encoder.dtype, encoder.device, 1024, encoder.hidden, trainer._ffn)
            log.info("matrix products here: %.1f GFLOP/s in %s", self._rate / 1e9, trainer.config.dtype)
        self._began = time.monotonic()
        self._tokens, self._examples, self._flops = 0, 0, 0.0

    def progress(self, slices: Sequence[Batch], loss: float, accuracy: float) -> Progress:
        """Count a step."""
        trainer = self._trainer
        for batch in slices:
            lengths = [len(ids) for ids in batch.ids]
            self._tokens += sum(lengths)
            self._examples += len(lengths)
            read = batch.rows_read
            self._flops += step_flops(lengths, len(trainer.encoder.layers), trainer.encoder.hidden, trainer._ffn, read)
        elapsed = max(time.monotonic() - self._began, 1e-9)
        left = elapsed / (trainer.step - self._first) * (trainer.config.steps - trainer.step)
        size = trainer.team.size
        return Progress(
            trainer.step,
            loss,
            accuracy,
            size * self._tokens / elapsed,
            left,
            size * self._examples / elapsed,
            self._flops / elapsed / self._rate if self._rate else 0.0,
        )
