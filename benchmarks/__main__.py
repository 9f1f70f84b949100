"""All speed benchmarks in one process, interleaved, as Markdown.

python -m benchmarks [--threads 1] [--rounds 2] [--only published,ablation,...] [--small] [--out FILE.md]

Run from the root of a clone. The ratios are what to quote: absolute times move with the machine and its load.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

#: What runs unless it is said otherwise; and what takes minutes, or starts servers or a Ray of its own.
_QUICK = ("published", "ablation", "scaling", "precision", "alternatives", "optimizers", "start-up")
_ELSEWHERE = ("base", "causal", "gpu", "training", "batches", "remote", "dispatcher", "workers", "slow")
_FORWARD = ("published", "base", "causal", "ablation", "scaling", "alternatives")


def main(words: Sequence[str] | None = None) -> None:
    """Run them and print the tables; a part that is not there or has no device is a usage error (exit code 2)."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", default=",".join(_QUICK), help=f"also: {', '.join(_ELSEWHERE)}; or all")
    parser.add_argument("--small", action="store_true", help="tiny sizes, to see that it runs; no figures to quote")
    parser.add_argument("--call-ms", type=float, default=250.0, help="cost of a call for the optimizers' share")
    parser.add_argument("--slots", type=int, default=64, help="slow: calls that the model takes at once")
    parser.add_argument("--waves", type=int, default=20, help="slow: calls of each slot in one ask of the optimizer")
    parser.add_argument("--asks", type=int, default=10, help="slow: asks between two looks at dev")
    parser.add_argument("--seeds", type=int, default=10, help="batches: searches of each kind")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(words)

    import torch

    from bbprompt.backends.memory import keep_freed_memory
    from benchmarks import (
        ablation,
        alternatives,
        batches,
        causal,
        cluster,
        forward,
        gpu,
        overhead,
        precision,
        remote,
        scaling,
        training,
    )

    torch.set_num_threads(options.threads)
    keep_freed_memory()
    texts = 8 if options.small else 32
    device = gpu.device_for(options.small)
    sizes = (options.rounds, options.threads, options.small)
    tables: dict[str, tuple[str, Callable[[], list[str]]]] = {
        "published": (
            "Against the published protocols",
            lambda: forward.against_published(forward.PAPER, *sizes),
        ),
        "base": (
            "Against the published protocols, BERT-base's shape",
            lambda: forward.against_published(forward.BASE, *sizes),
        ),
        "causal": ("A causal model from the first layer in which candidates differ", lambda: causal.causal(*sizes)),
        "ablation": ("Each saving switched off", lambda: ablation.ablation(*sizes)),
        "scaling": ("Cost as one size changes", lambda: scaling.scaling(*sizes)),
        "precision": ("Rankings in mixed precision", lambda: precision.rankings(options.rounds, options.threads)),
        "alternatives": ("What is not used", lambda: alternatives.alternatives(*sizes)),
        "optimizers": ("Optimizers", lambda: overhead.optimizers(options.call_ms)),
        "gpu": (
            "A whole search on CPT-large's shape",
            lambda: gpu.deep_run(options.small, device or "cpu"),
        ),
        "training": ("A step of pre-training", lambda: training.training(*sizes)),
        "batches": ("Large batches of routers", lambda: batches.batches(options.seeds)),
        "start-up": ("Start-up", overhead.start_up),
        "remote": (
            "`bbprompt serve` on loopback against the same model here",
            lambda: remote.remote(options.rounds, options.threads, texts),
        ),
        "dispatcher": ("Sharing out: the dispatcher", lambda: cluster.dispatcher(options.rounds)),
        "workers": ("Sharing out: two Ray actors of one thread", lambda: cluster.workers(options.rounds, texts)),
        "slow": (
            "Sharing out: a model that takes 50 ms a call",
            lambda: cluster.slow(options.slots, options.waves, options.asks),
        ),
    }
    if device is None and options.only == "all":
        del tables["gpu"]
    names = list(tables) if options.only == "all" else options.only.split(",")
    if unknown := [name for name in names if name not in tables]:
        parser.error(f"--only {unknown[0]}: there are {', '.join(tables)}")
    if device is None and "gpu" in names:
        parser.error("--only gpu: there is no GPU here; leave it out, or see with --small that it runs")
    clock = "CPU time" if options.threads == 1 else "wall time"
    lines = [f"torch {torch.__version__}, {options.threads} threads, {clock}, the least of {options.rounds} rounds."]
    print(lines[0], flush=True)
    for name in names:
        title, work = tables[name]
        # The optimizers of stage I fit by gradients.
        with torch.inference_mode(name in _FORWARD):
            section = ["", f"### {title}", "", *work()]
        lines += section
        print("\n".join(section), flush=True)
    if options.out:
        options.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
