"""Training of a language model head: the encoder is only run forward, what learns is the head on its last states.

Checkpoints hold parameters and optimizer state as safetensors; a resumed training sees the same masked texts and
reaches the same weights.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from bbprompt.backends.encoder import Encoder
from bbprompt.backends.layout import pack
from bbprompt.backends.trained_head import Transform
from bbprompt.errors import ArtifactError, ResumeMismatch, UsageError
from bbprompt.pretrain.ahead import Ahead
from bbprompt.pretrain.checkpoint import check_finite, load_checkpoint, restore_state, save_checkpoint, training_state
from bbprompt.pretrain.directory import append_log
from bbprompt.pretrain.lm_recipe import HeadConfig
from bbprompt.pretrain.lm_texts import MaskedBatch, MaskedTexts
from bbprompt.pretrain.mp2 import Progress
from bbprompt.pretrain.schedule import rate_factor
from bbprompt.store.disk import Disk, RealDisk

__all__ = ["Guesses", "HeadTrainer"]

_FILE = "checkpoint.safetensors"
#: Size of the last layer's weights at the beginning: almost nothing, so that the biases alone speak.
_SMALL = 0.02


@dataclass(frozen=True, slots=True)
class Guesses:
    """How well masked tokens of held-out text were guessed; a token that the head cannot name counts as wrong.

    Attributes:
        tokens: How many there were.
        known: Share that the head can name.
        loss: Mean cross-entropy of these, in nats.
        top1: Share guessed right.
        top5: Share among the five likeliest.
        unigram1: Share that the most frequent token of the training part would have guessed right.
        unigram5: Share among the five most frequent.
    """

    tokens: int
    known: float
    loss: float
    top1: float
    top5: float
    unigram1: float
    unigram5: float


class _Head(nn.Module):
    """What is trained: a transform layer and a bias for each token."""

    def __init__(self, hidden: int, width: int, counts: NDArray[np.int64], seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.transform = Transform(hidden, width)
        with torch.no_grad():
            self.transform.dense.weight.normal_(0, hidden**-0.5, generator=generator)
            self.transform.out.weight.normal_(0, _SMALL * width**-0.5, generator=generator)
            self.transform.dense.bias.zero_()
            self.transform.out.bias.zero_()
        share = torch.from_numpy(counts).double() / counts.sum()
        # Before any training the guess is a token's share of the corpus.
        self.bias = nn.Parameter(share.log().float())


class HeadTrainer:
    """Holds the head and the optimizer; `run` trains to the end of the recipe.

    Args:
        config: The recipe.
        encoder: The frozen encoder in `config.dtype`.
        texts: Masked texts.
        embedding: Rows of the input embedding `(E, H)` for the tokens that the head can name.
        counts: How often each of them occurs in what is trained on, `(E,)`.
        directory: Where checkpoints and the log go.
        identity: What a checkpoint must have been made with to be gone on with, in words, beside the texts.
        disk: Writes them.
    """

    def __init__(
        self,
        config: HeadConfig,
        encoder: Encoder,
        texts: MaskedTexts,
        embedding: Tensor,
        counts: NDArray[np.int64],
        directory: Path,
        *,
        identity: dict[str, str] | None = None,
        disk: Disk | None = None,
    ) -> None:
        self.config, self.encoder, self.texts, self.directory = config, encoder, texts, directory
        self.disk, self._identity = disk or RealDisk(), identity or {}
        self.head = _Head(encoder.hidden, config.width, counts, config.seed).to(encoder.device)
        self._embedding = embedding.to(encoder.device, encoder.dtype)
        self._frequent = torch.from_numpy(texts.frequent(counts, 5)).to(encoder.device)
        self.optimizer = torch.optim.Adam(self.head.parameters(), config.rate, fused=encoder.device.type == "cuda")
        self.step = 0
        self._window: list[tuple[float, float]] = []

    def run(self, report: Callable[[Progress], None]) -> None:
        """Train from the current step to the last, saving and measuring on the way.

        Raises:
            UsageError: A loss or gradient is not finite; the last good checkpoint stays.
            DiskError: A checkpoint cannot be written; the one before stays.
        """
        config, began, first = self.config, time.monotonic(), self.step
        tokens = pieces = 0
        with Ahead(self.texts, range(1), config.steps) as ahead:
            while self.step < config.steps:
                batch = ahead.get(self.step, 0)
                loss, accuracy = self._train(batch)
                self.step += 1
                self._window.append((loss, accuracy))
                tokens += sum(map(len, batch.ids))
                pieces += len(batch.ids)
                elapsed = max(time.monotonic() - began, 1e-9)
                left = elapsed / (self.step - first) * (config.steps - self.step)
                report(Progress(self.step, loss, accuracy, tokens / elapsed, left, pieces / elapsed))
                if self.step % config.valid_every == 0 and self.step < config.steps:
                    append_log(self.directory, {"step": self.step, "valid": self.words_of(self.measure())})
                if self.step % config.save_every == 0 or self.step == config.steps:
                    self._log_window()
                    self.save()

    def _train(self, batch: MaskedBatch) -> tuple[float, float]:
        features, gold = self._features(batch)
        known = gold >= 0
        logits = self._logits(features[known])
        each = F.cross_entropy(logits, gold[known], reduction="none")
        loss = each.mean()
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        norm = torch.nn.utils.clip_grad_norm_(self.head.parameters(), self.config.clip)
        if not (torch.isfinite(loss) and torch.isfinite(norm)):
            what = "the loss" if not torch.isfinite(loss) else "a gradient"
            raise UsageError(
                f"step {self.step}: {what} is not finite, with texts of {', '.join(dict.fromkeys(batch.uids))}; begin "
                "again with a lower rate and another --out (the last good checkpoint of this one is kept)"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.rate * rate_factor(self.step, self.config.steps, self.config.warmup)
        self.optimizer.step()
        right = (logits.detach().argmax(1) == gold[known]).sum().item() / len(gold)
        return loss.item(), right

    @torch.no_grad()
    def _states(self, batch: MaskedBatch) -> Tensor:
        """Last states `(M, H)` at the places to guess."""
        layout = pack([len(text) for text in batch.ids], self.encoder.device)
        read = layout.rows(batch.places)
        states = self.encoder.embed(batch.ids, layout)[None]
        last = len(self.encoder.layers) - 1
        for index in range(last + 1):
            states = self.encoder.layer(index, states, layout, read if index == last else None)
        return states[0][batch.present.to(self.encoder.device)].float()

    def _features(self, batch: MaskedBatch) -> tuple[Tensor, Tensor]:
        """What is compared with the embeddings `(M, H)`, and the right tokens' numbers `(M,)`."""
        return self.head.transform(self._states(batch)), batch.gold[batch.present].to(self.encoder.device)

    def _logits(self, features: Tensor) -> Tensor:
        """`(M, H)` to `(M, E)` in float32; the product itself in the encoder's precision."""
        return F.linear(features.to(self._embedding.dtype), self._embedding).float() + self.head.bias

    @torch.no_grad()
    def measure(self) -> dict[str, Guesses]:
        """Guess the masked tokens of each file's held-out pieces."""
        found = {}
        for index, name in enumerate(self.texts.names):
            sums = np.zeros(6)
            total = 0
            for batch in self.texts.valid(index, 32):
                features, gold = self._features(batch)
                logits = self._logits(features)
                known = gold >= 0
                ranked = logits.topk(5).indices == gold[:, None]
                frequent = self._frequent[None] == gold[:, None]
                total += len(gold)
                loss = F.cross_entropy(logits[known], gold[known], reduction="sum")
                counted = (known, loss, ranked[:, 0], ranked, frequent[:, 0], frequent)
                sums += [value.sum().item() for value in counted]
            sums[1] *= total / max(sums[0], 1)
            known_share, mean, top1, top5, one, five = (round(value, 4) for value in (sums / total).tolist())
            found[name] = Guesses(total, known_share, mean, top1, top5, one, five)
        return found

    @staticmethod
    def words_of(found: dict[str, Guesses]) -> dict[str, dict[str, float]]:
        """The same as plain numbers."""
        return {name: asdict(guesses) for name, guesses in found.items()}

    def _log_window(self) -> None:
        losses, rights = zip(*self._window, strict=True) if self._window else ((math.nan,), (math.nan,))
        size = len(losses)
        append_log(
            self.directory,
            {"step": self.step, "loss": round(sum(losses) / size, 6), "right": round(sum(rights) / size, 4)},
        )
        self._window.clear()

    def save(self) -> None:
        """Write `checkpoint.safetensors`, in one step or not at all.

        Raises:
            UsageError: A weight is not finite; the checkpoint before stays.
            DiskError: It cannot be written; the checkpoint before stays.
        """
        check_finite(self.step, self.head)
        words = {"step": str(self.step), "texts": json.dumps(self.texts.digests)}
        tensors = training_state(self.head, self.optimizer)
        save_checkpoint(self.disk, self.directory / _FILE, tensors, words | self._identity)

    def load(self) -> None:
        """Go on from `checkpoint.safetensors`; from step 0 where there is none yet.

        Raises:
            ArtifactError: The file is damaged.
            ResumeMismatch: It was made with other texts or another model.
        """
        file = self.directory / _FILE
        if not file.is_file():
            return
        tensors, words = load_checkpoint(file, self.encoder.device)
        for what, now in {**self._identity, "texts": json.dumps(self.texts.digests)}.items():
            if words.get(what) != now:
                raise ResumeMismatch(f"{file}: was made with other {what} than these; restore what it was begun with")
        try:
            step = int(words["step"])
            restore_state(tensors, self.head, self.optimizer)
        except (LookupError, TypeError, ValueError, RuntimeError) as error:
            raise ArtifactError(f"{file}: damaged ({error}); start the training again") from error
        self.step = step
