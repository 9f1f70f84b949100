"""Cost of a call: our oracle against a plain loop over stock transformers and against the arithmetic floor.

    python benchmarks/forward.py [--texts 32] [--length 44] [--population 20] [--threads 2] [--rounds 5]

All figures come from one process, interleaved round by round, as medians; the ratios are what to quote. The model
is a stock BERT of the embedded backbone's shape with random weights, float32. "plain" scores one candidate per padded
forward through all layers with hooks that add the prompts; "router" is a population that differs in every layer,
"layer i" one that differs in layer i only (stage II), whose lower layers are shared. The floor is the multiply-adds of
a call's linear maps at the GEMM rate measured here at the same shapes.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from bbprompt.backends.encoder import Encoder, pack

LAYERS, HIDDEN, FFN, PROMPT, DIM = 12, 384, 1536, 8, 64


def main() -> None:
    """Run the benchmark and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("texts", 32), ("length", 44), ("population", 20), ("threads", 2), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    with torch.inference_mode():
        rows = measure(options)
    print(f"\n{options.texts} texts of about {options.length} tokens, {options.threads} threads, float32\n")
    print("| what | ms a call | plain / this | floor / this |")
    print("|---|---|---|---|")
    plain = rows["plain loop"][0]
    for name, (seconds, floor) in rows.items():
        print(f"| {name} | {1e3 * seconds:.1f} | {plain / seconds:.2f} | {floor / seconds:.2f} |")


def measure(options: argparse.Namespace) -> dict[str, tuple[float, float]]:
    """Median seconds a call and floor seconds a call of each way."""
    config = BertConfig(
        vocab_size=1000,
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=12,
        intermediate_size=FFN,
    )
    model = BertModel(config, add_pooling_layer=False).eval()
    rng = np.random.default_rng(0)
    lengths = rng.integers(int(0.8 * options.length), int(1.2 * options.length) + 1, options.texts).tolist()
    ids = [rng.integers(0, 1000, size).tolist() for size in lengths]
    projection = torch.randn(LAYERS, DIM, PROMPT * HIDDEN) * 0.05 / 8
    points = torch.randn(options.population, LAYERS, DIM)
    encoder = Encoder(model)
    layout = pack(lengths)
    slots = (layout.starts[:, None] + torch.arange(PROMPT) + 1).flatten()
    read = layout.starts[:, None] + torch.tensor([[30, 31, 33, 34]])
    embedded = encoder.embed(ids, layout)[None]

    def add(states: Tensor, layer: int, some: Tensor) -> Tensor:
        prompts = (some[:, layer] @ projection[layer]).view(len(some), 1, PROMPT, HIDDEN)
        return states.index_add(1, slots, prompts.expand(-1, options.texts, -1, -1).flatten(1, 2))

    def ours(fork: int, some: Tensor, trunk: Tensor) -> Tensor:
        outputs = []
        size = max(4096 // sum(lengths), 1)
        for begin in range(0, len(some), size):
            part = some[begin : begin + size]
            states = trunk.expand(len(part), -1, -1)
            for layer in range(fork, LAYERS):
                states = encoder.layer(layer, add(states, layer, part), layout, read if layer == LAYERS - 1 else None)
            outputs.append(states)
        return torch.cat(outputs)

    plain = plain_loop(model, ids, projection, points[:2])
    trunks = {0: embedded}
    for layer in range(LAYERS - 1):
        trunks[layer + 1] = encoder.layer(layer, add(trunks[layer], layer, points[:1]), layout)
    ways: dict[str, tuple[Callable[[], Any], int, float]] = {
        "plain loop": (plain, 2, floor_flops(lengths, 0, LAYERS)),
        "router": (lambda: ours(0, points, trunks[0]), len(points), floor_flops(lengths, 0, LAYERS)),
    }
    for layer in (0, 4, 8, 11):
        same = points[:1].repeat(len(points), 1, 1)
        same[:, layer] = points[:, layer]
        ways[f"layer {layer}"] = (
            lambda layer=layer, same=same: ours(layer, same, trunks[layer]),
            len(points),
            floor_flops(lengths, layer, LAYERS),
        )
    taken: dict[str, list[float]] = {name: [] for name in ways}
    rates = []
    for _ in range(options.rounds + 1):
        rates.append(gemm_rate(sum(lengths)))
        for name, (work, calls, _) in ways.items():
            began = time.perf_counter()
            work()
            taken[name].append((time.perf_counter() - began) / calls)
    rate = statistics.median(rates[1:])
    print(f"GEMM rate {rate / 1e12:.3f} TFLOP/s")
    return {name: (statistics.median(taken[name][1:]), flops / rate) for name, (_, _, flops) in ways.items()}


def plain_loop(model: BertModel, ids: list[list[int]], projection: Tensor, points: Tensor) -> Callable[[], None]:
    """One candidate per padded forward through a stock model, prompts added by hooks."""
    width = max(map(len, ids))
    padded = torch.zeros(len(ids), width, dtype=torch.long)
    mask = torch.zeros_like(padded)
    for row, text in enumerate(ids):
        padded[row, : len(text)] = torch.as_tensor(text)
        mask[row, : len(text)] = 1

    def run() -> None:
        for point in points:
            handles = []
            for index, layer in enumerate(model.encoder.layer):
                prompt = (point[index] @ projection[index]).view(PROMPT, HIDDEN)

                def hook(module: nn.Module, args: tuple[Tensor, ...], prompt: Tensor = prompt) -> tuple[Tensor, ...]:
                    states = args[0].clone()
                    states[:, 1 : 1 + PROMPT] += prompt
                    return (states, *args[1:])

                handles.append(layer.register_forward_pre_hook(hook))
            model(input_ids=padded, attention_mask=mask)
            for handle in handles:
                handle.remove()

    return run


def floor_flops(lengths: list[int], fork: int, layers: int) -> float:
    """Multiply-adds (times two) of the linear maps above `fork`: the last layer's keys and values only."""
    tokens = sum(lengths)
    whole = 2 * (4 * HIDDEN**2 + 2 * HIDDEN * FFN)
    last = 2 * 2 * HIDDEN**2
    return tokens * (whole * (layers - 1 - fork) + last)


def gemm_rate(rows: int) -> float:
    """Floating-point operations a second of the feed-forward pair at these shapes, pre-packed weights."""
    up, down = torch.randn(FFN, HIDDEN), torch.randn(HIDDEN, FFN)
    states = torch.randn(rows, HIDDEN)
    packed = [torch.ops.mkldnn._reorder_linear_weight(weight) for weight in (up, down)]

    def once() -> None:
        inner = torch.ops.mkldnn._linear_pointwise(states, packed[0], None, "none", [], "")
        torch.ops.mkldnn._linear_pointwise(inner, packed[1], None, "none", [], "")

    once()
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < 0.5:
        once()
        count += 1
    return 4 * rows * HIDDEN * FFN * count / (time.perf_counter() - began)


if __name__ == "__main__":
    main()
