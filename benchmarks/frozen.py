"""Our oracle over a stock model with random weights, and texts of words that are tokens each.

A text is as long as its setting says, prompt and options included, under either readout.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from bbprompt.backends.backbone import Backbone
from bbprompt.backends.lm_head import LanguageHead, head_of
from bbprompt.backends.local import LocalOracle
from bbprompt.backends.memory import batch_tokens_for
from bbprompt.backends.stock import StockOracle
from bbprompt.backends.tokens import frame_for, tokenize_with
from bbprompt.oracle import Scores, TextBatch
from bbprompt.prompts import ModularPrompt, PromptConfig
from bbprompt.scoring import Labelled
from bbprompt.tasks.example import Form, Part
from bbprompt.texts.cloze import encode_cloze
from bbprompt.texts.mrc import SEPARATOR, Encoded, encode
from benchmarks.setting import Setting

__all__ = ["OPTIONS", "Kind", "Sweep", "backbone_of", "open_frozen", "prompt_of", "sequences", "texts_of"]

#: BBTv2 reads label words at a mask, MP2 options by a span head.
Kind = Literal["verbalizer", "span"]

_SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_MASK = _SPECIALS.index("[MASK]")
#: Tokens of the options; those behind them make the texts.
OPTIONS = (6, 7)
_BACKBONE, _DIGEST = "random", "0" * 64


def open_frozen(
    setting: Setting, model: Any, kind: Kind, dtype: str = "float32", device: str = "cpu"
) -> tuple[LocalOracle, ModularPrompt]:
    """The oracle over a stock model, as `bbprompt.open_oracle` would open it, and what it is opened with."""
    prompt = prompt_of(setting, kind)
    backbone = backbone_of(setting, model.bert, head_of(model, "masked") if kind == "verbalizer" else None)
    tokens = batch_tokens_for(setting.hidden, setting.inner, device)
    return LocalOracle(backbone, prompt, device=device, dtype=dtype, batch_tokens=tokens), prompt


def backbone_of(setting: Setting, model: Any, head: LanguageHead | None) -> Backbone:
    """A stock model without its head, and its head, as they would be loaded."""
    return Backbone(_BACKBONE, model, _tokenizer(setting), _DIGEST, 0, "directory", head)


def prompt_of(setting: Setting, kind: Kind, modules: int = 8) -> ModularPrompt:
    """Modular prompts with random tensors; one projection serves all layers, to save memory."""
    rng = np.random.default_rng(3)

    def normal(scale: float, *shape: int) -> NDArray[np.float32]:
        return rng.normal(0.0, scale, shape).astype(np.float32)

    config = PromptConfig(
        kind="random",
        backbone=_BACKBONE,
        backbone_digest=_DIGEST,
        layers=setting.layers,
        hidden=setting.hidden,
        prompt_length=setting.prompt,
        modules=modules,
        intrinsic_dim=setting.dim,
        placeholders=(OPTIONS[-1] + 1,) * setting.prompt,
        readout=kind,
    )
    one = normal(0.05 / setting.dim**0.5, setting.dim, setting.prompt * setting.hidden)
    channels = 2 if kind == "span" else 0
    return ModularPrompt(
        config,
        torch.from_numpy(one).expand(setting.layers, -1, -1).numpy(),
        normal(1.0, setting.layers, modules, setting.dim),
        normal(1.0, 0, setting.layers, modules),
        normal(setting.spread, channels, setting.hidden),
        normal(setting.spread, channels),
    )


def texts_of(setting: Setting, kind: Kind, seed: int = 1) -> Labelled:
    """Texts with two options, which are right by turns."""
    rng = np.random.default_rng(seed)
    # Around the words: [CLS], the prompt, a mask or two options with what closes them, [SEP].
    around = 2 + setting.prompt + (1 if kind == "verbalizer" else 2 * len(OPTIONS))
    options = tuple(f"w{token}" for token in OPTIONS)
    forms = []
    for size in setting.lengths:
        words = rng.integers(OPTIONS[-1] + 1, setting.vocabulary, size - around)
        text = "".join(f"w{word} " for word in words)
        forms.append(Form((Part(text, True),), options, -1, gap=1 if kind == "verbalizer" else -1))
    gold = tuple(number % len(OPTIONS) for number in range(len(forms)))
    return Labelled(TextBatch(tuple(forms)), gold, ((),) * len(forms))


def sequences(setting: Setting, kind: Kind) -> list[Encoded]:
    """The texts as an oracle writes them, for whom reads them otherwise."""
    tokenizer = _tokenizer(setting)
    tokenize = tokenize_with(tokenizer)
    frame = frame_for(tokenizer, prompt_of(setting, kind).config.placeholders, max(setting.lengths))
    forms = texts_of(setting, kind).batch.forms
    if kind == "verbalizer":
        return [encode_cloze(form, tokenize, frame, [_MASK]) for form in forms]
    return [encode(form, tokenize, frame) for form in forms]


@dataclass
class Sweep:
    """Populations that visit the layers as stage II does: one of a layer's candidates stays while the next is visited.

    Attributes:
        oracle: Whom they ask.
        data: On which texts.
        population: Candidates of a visit.
        everywhere: They differ in every layer, as routers do, whatever the layer visited.
    """

    oracle: LocalOracle | StockOracle
    data: Labelled
    population: int
    everywhere: bool = False

    def __post_init__(self) -> None:
        self._rng = np.random.default_rng(2)
        info = self.oracle.info
        self._current = self._rng.normal(size=(info.layers, info.dim))

    def __call__(self, layer: int) -> Scores:
        """Score a population of layer `layer`."""
        points = np.repeat(self._current[None], self.population, axis=0)
        moved = slice(None) if self.everywhere else slice(layer, layer + 1)
        points[:, moved] = self._rng.normal(size=points[:, moved].shape)
        scores = self.oracle.score(self.data.batch, points)
        self._current = points[0]
        return scores


def _tokenizer(setting: Setting) -> PreTrainedTokenizerFast:
    """A vocabulary of words: `w9` is token 9."""
    words = [*_SPECIALS, SEPARATOR, *(f"w{token}" for token in range(len(_SPECIALS) + 1, setting.vocabulary))]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    ends = [(name, words.index(name)) for name in ("[CLS]", "[SEP]")]
    inner.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), _SPECIALS, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=inner, **names)
