"""What a causal model saves by running the layers below the first in which candidates differ once for all of them."""

from __future__ import annotations

from functools import partial
from unittest.mock import patch

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bbprompt.backends.lm_head import head_of
from bbprompt.backends.stock import StockOracle
from benchmarks.frozen import Sweep, backbone_of, prompt_of, texts_of
from benchmarks.setting import Setting
from benchmarks.timing import interleaved

__all__ = ["causal"]

#: SmolLM2-135M's shape but for its vocabulary, and BBTv2's positions.
SMOLLM2 = Setting(
    layers=30, hidden=576, inner=1536, heads=9, prompt=50, dim=50, texts=8, shortest=70, longest=90, population=4
)


def causal(rounds: int, threads: int, small: bool) -> list[str]:
    """Populations that differ from a layer on: ms a candidate when all layers run for each, and as they are run."""
    setting = SMOLLM2.shrunk(small)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=setting.vocabulary,
        hidden_size=setting.hidden,
        intermediate_size=setting.inner,
        num_hidden_layers=setting.layers,
        num_attention_heads=setting.heads,
        num_key_value_heads=setting.heads if setting.heads % 3 else setting.heads // 3,
    )
    model = LlamaForCausalLM(config).eval()
    backbone, prompt = backbone_of(setting, model.model, head_of(model, "causal")), prompt_of(setting, "verbalizer")
    data = texts_of(setting, "verbalizer")
    shared, alone = (Sweep(StockOracle(backbone, prompt), data, setting.population) for _ in range(2))
    patch.object(alone.oracle, "_fork", lambda _points: 0).start()
    lines = [
        f"{setting.layers} layers of {setting.hidden}, {setting.texts} texts of {setting.shortest} to "
        f"{setting.longest} tokens, {setting.prompt} of them prompt, populations of {setting.population}, float32; "
        "what is shared is kept from the request before.",
        "",
        "| differs from layer | all layers, ms a candidate | from there on, ms a candidate | times as fast |",
        "|---|---|---|---|",
    ]
    for fork in sorted({0, setting.layers // 3, 2 * setting.layers // 3, setting.layers - 1}):
        ways = {"all": partial(alone, fork), "own": partial(shared, fork)}
        taken = interleaved(ways, rounds, threads)
        each = {name: 1e3 * seconds / setting.population for name, seconds in taken.items()}
        lines.append(f"| {fork} | {each['all']:.1f} | {each['own']:.1f} | {each['all'] / each['own']:.2f} |")
    return lines
