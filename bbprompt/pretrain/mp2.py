"""Multi-task pre-training of modular prompts (MP2, section 3): the frozen backbone, many tasks, one loop.

Writes a prompt artifact that `tune` loads. Fast and slow learning (MP2, section 3.3): the router's learning
rate is a multiple of the prompts'. Checkpoints hold parameters and optimizer state as safetensors; a resumed
training sees the same batches and gates.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from bbprompt.backends.encoder import Encoder
from bbprompt.errors import ArtifactError, UsageError
from bbprompt.mrc import Frame
from bbprompt.pretrain.mixture import Mixture
from bbprompt.pretrain.model import Gates, ModularPrompts, SpanBatch, span_loss
from bbprompt.prompts import ModularPrompt, PromptConfig

__all__ = ["PretrainConfig", "Progress", "Trainer"]

log = logging.getLogger("bbprompt")

_Count = Annotated[int, Field(ge=1, strict=True)]
_Rate = Annotated[float, Field(gt=0)]


class PretrainConfig(BaseModel):
    """A recipe, as `configs/pretrain/*.yaml` spells it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["mp2-deep", "mp2-shallow"]
    backbone: str = "intfloat/multilingual-e5-small"
    tasks: list[str] | Literal["upstream"] = "upstream"
    weights: dict[str, _Count] = Field(default_factory=dict, description="visits a round; 1 where not named")
    modules: _Count = 8
    intrinsic_dim: _Count = 64
    prompt_length: _Count = 8
    first_placeholder: Annotated[int, Field(ge=0)] = 1000
    steps: _Count = 4000
    tasks_per_step: _Count = 4
    per_task: _Count = 8
    max_tokens: _Count = 80
    option_limit: Annotated[int, Field(ge=2)] = 6
    option_characters: _Count = 40
    shuffle_options: bool = True
    prompt_scale: _Rate = 0.05
    module_rate: _Rate = 1e-2
    projection_rate: _Rate = 1e-3
    router_rate: _Rate = 3e-2
    head_rate: _Rate = 3e-3
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.03
    noise_from: Annotated[float, Field(ge=0, le=1)] = 0.5
    temperature: _Rate = 1.0
    normalized: bool = True
    clip: _Rate = 1.0
    seed: int = 42
    spare_seeds: list[int] = [8, 10, 13, 20, 21, 30, 40, 42, 50, 100]
    train_cap: _Count = 4000
    valid_size: _Count = 128
    valid_every: _Count = 1000
    save_every: _Count = 250
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    threads: _Count | None = None
    note: str = Field(default="", description="what a reader of the model card should know")
    license: str = "CC BY-NC 4.0 (research use; the data sets keep their own terms)"


@dataclass(frozen=True, slots=True)
class Progress:
    """What a step did: for the terminal and `train.jsonl`."""

    step: int
    loss: float
    accuracy: float
    tokens_per_second: float
    seconds_left: float


class Trainer:
    """Holds the trainable prompts and the optimizer; `run` trains to the end of the recipe.

    Args:
        config: The recipe.
        encoder: The frozen encoder in `config.dtype`.
        mixture: Upstream tasks.
        frame: Placeholders and special tokens.
        directory: Where checkpoints and the log go.
    """

    def __init__(
        self, config: PretrainConfig, encoder: Encoder, mixture: Mixture, frame: Frame, directory: Path
    ) -> None:
        self.config, self.encoder, self.mixture, self.frame = config, encoder, mixture, frame
        self.directory = directory
        layers = len(encoder.layers) if config.kind == "mp2-deep" else 1
        generator = torch.Generator().manual_seed(config.seed)
        self.prompts = ModularPrompts(
            len(mixture.tasks),
            layers,
            config.modules,
            config.intrinsic_dim,
            frame,
            encoder.hidden,
            config.prompt_scale,
            generator,
        ).to(encoder.device)
        p = self.prompts
        self.optimizer = torch.optim.Adam(
            [
                {"params": [p.bank], "lr": config.module_rate},
                {"params": [p.projection], "lr": config.projection_rate},
                {"params": [p.router], "lr": config.router_rate},
                {"params": [p.head_weight, p.head_bias], "lr": config.head_rate},
            ],
            fused=encoder.device.type == "cuda",
        )
        self.step = 0
        self._rates = [group["lr"] for group in self.optimizer.param_groups]

    def run(self, report: Callable[[Progress], None]) -> None:
        """Train from the current step to the last, saving and validating on the way."""
        config = self.config
        began, seen = time.monotonic(), 0
        while self.step < config.steps:
            batch = self.mixture.batch(self.step)
            loss, accuracy = self._train(batch)
            self.step += 1
            seen += sum(len(ids) for ids in batch.ids)
            elapsed = time.monotonic() - began
            done = self.step - self._resumed_at
            report(Progress(self.step, loss, accuracy, seen / elapsed, elapsed / done * (config.steps - self.step)))
            if self.step % config.save_every == 0 or self.step == config.steps:
                self.save()
            if self.step % config.valid_every == 0 and self.step < config.steps:
                self.log({"step": self.step, "valid": self.validate(config.valid_size // 4)})

    _resumed_at = 0

    def _train(self, batch: SpanBatch) -> tuple[float, float]:
        config = self.config
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + self.step)
        noisy = self.step >= config.noise_from * config.steps
        logits = self.prompts(self.encoder, batch, Gates(noisy, config.temperature, config.normalized), generator)
        each, right = span_loss(logits, batch)
        loss = each.mean()
        if not torch.isfinite(loss):
            raise UsageError(f"step {self.step}: the loss is {loss.item()}; lower the recipe's learning rates")
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(self.prompts.parameters(), config.clip)
        factor = self._schedule()
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor
        self.optimizer.step()
        return loss.item(), right.mean().item()

    def _schedule(self) -> float:
        """Linear warm-up, then half a cosine down to a twentieth."""
        progress = (self.step + 1) / self.config.steps
        if progress < self.config.warmup:
            return progress / self.config.warmup
        rest = (progress - self.config.warmup) / (1 - self.config.warmup)
        return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * rest))

    @torch.no_grad()
    def validate(self, limit: int) -> dict[str, float]:
        """Share answered right by each upstream task's own router on `limit` validation examples.

        Extraction counts an answer as right when its start is.
        """
        gates = Gates(noise=False, normalized=self.config.normalized)
        scores = {}
        for index, upstream in enumerate(self.mixture.tasks):
            rights: list[Tensor] = []
            for batch in self.mixture.valid(index, limit, 32):
                logits = self.prompts(self.encoder, batch, gates, torch.Generator())
                rights.append(span_loss(logits, batch)[1])
            scores[upstream.task.name] = round(torch.cat(rights).mean().item(), 4)
        return scores

    def artifact(self, backbone_id: str, backbone_digest: str, training: dict[str, object]) -> ModularPrompt:
        """The prompts as they stand, as an artifact in memory (float16 precision, as it will be stored)."""
        p, config = self.prompts, self.config
        # Modules of unit size make the tuner's step sizes mean the same for every artifact; A takes the
        # factor up.
        size = p.bank.detach().pow(2).mean((1, 2), keepdim=True).sqrt()

        def array(tensor: Tensor) -> np.ndarray:
            return tensor.detach().float().cpu().half().float().numpy()

        return ModularPrompt(
            PromptConfig(
                kind=config.kind,
                backbone=backbone_id,
                backbone_digest=backbone_digest,
                layers=p.bank.shape[0],
                hidden=self.encoder.hidden,
                prompt_length=config.prompt_length,
                modules=config.modules,
                intrinsic_dim=config.intrinsic_dim,
                mixing="normalized" if config.normalized else "mean",
                placeholders=self.frame.placeholders,
                tasks=tuple(u.task.name for u in self.mixture.tasks),
                training=training,
                sources=tuple(
                    f"{u.task.name}: {', '.join(u.task.sources)} ({u.task.terms})" for u in self.mixture.tasks
                ),
                license=config.license,
            ),
            array(p.projection * size),
            array(p.bank / size),
            array(p.router),
            array(p.head_weight),
            array(p.head_bias),
        )

    def log(self, record: dict[str, object]) -> None:
        """Append one line to `train.jsonl`."""
        with (self.directory / "train.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")

    def _state(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.prompts.named_parameters():
            yield name, parameter.detach()
            for key, value in self.optimizer.state.get(parameter, {}).items():
                yield f"adam.{key}.{name}", value

    def save(self) -> None:
        """Write `checkpoint.safetensors` atomically."""
        tensors = {name: value.cpu().clone().contiguous() for name, value in self._state()}
        temporary = self.directory / "checkpoint.tmp"
        save_file(tensors, temporary, metadata={"step": str(self.step)})
        temporary.replace(self.directory / "checkpoint.safetensors")

    def load(self) -> None:
        """Go on from `checkpoint.safetensors`.

        Raises:
            ArtifactError: The file is damaged.
        """
        file = self.directory / "checkpoint.safetensors"
        try:
            with safe_open(file, framework="pt") as opened:
                step = int(opened.metadata()["step"])
            tensors = load_file(file, device=str(self.encoder.device))
            with torch.no_grad():
                for name, parameter in self.prompts.named_parameters():
                    parameter.copy_(tensors[name])
                    self.optimizer.state[parameter] = {
                        key: tensors[f"adam.{key}.{name}"] for key in ("step", "exp_avg", "exp_avg_sq")
                    }
        except (SafetensorError, OSError, LookupError, TypeError, ValueError, RuntimeError) as error:
            raise ArtifactError(f"{file}: damaged ({error}); start the training again") from error
        self.step = self._resumed_at = step
