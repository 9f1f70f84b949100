"""Calls a second of a served model on loopback against the same model in this process, and bytes a call.

The default prompts on their backbone, float32. Local and remote take turns, round by round, with the same candidates,
so that the ratio stands although the machine's speed drifts; what is quoted is the ratio of the medians. "router" is a
population that differs in every layer, "layer i" one that differs in layer i only. Bytes are those of bodies; the
texts, which travel once, are given apart. No reply comes from the server's memory: candidates never repeat.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from typing import IO, cast

import numpy as np

from bbprompt import wire
from bbprompt.backends.http import HttpOracle
from bbprompt.config import load_method
from bbprompt.connect import TOKEN_VARIABLE, open_oracle
from bbprompt.oracle import Oracle, TextBatch
from bbprompt.prompts import ModularPrompt, resolve_prompts
from bbprompt.scoring import labelled
from bbprompt.tasks.task import load_task
from benchmarks.goal import goal

__all__ = ["remote"]


def remote(rounds: int, threads: int, texts: int, population: int = 20) -> list[str]:
    """Local and remote by turns."""
    prompt = ModularPrompt.load(resolve_prompts(load_method("mp2-deep").prompts))
    batch = pairs(texts)
    lines = [
        f"{texts} texts, which travel once, as {len(wire.encode_batch(batch))} bytes; a population of {population}.",
        "",
        "| population differs in | local calls/s | remote calls/s | remote / local | rounds | bytes a call up | down |",
        "|---|---|---|---|---|---|---|",
    ]
    ratios: list[float] = []
    words = [sys.executable, "-m", "bbprompt", "serve", "--port", "0", "--json", "--threads", str(threads)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    said = cast(IO[str], process.stdout)
    try:
        there = HttpOracle(json.loads(said.readline())["url"], os.environ.get(TOKEN_VARIABLE))
        here = open_oracle("local", prompt, threads=threads, dtype=there.info.precision)
        for name, layer in (("every layer", None), ("layer 0", 0), ("layer 11", 11)):
            line, ratio = row(name, layer, here, there, batch, population, rounds)
            lines.append(line)
            ratios.append(ratio)
        there.close()
    finally:
        process.terminate()
        ended = process.wait(60)
        said.close()
    return [*lines, "", goal("remote / local in each row", 0.9, ratios), "", f"The server ended with {ended}."]


def pairs(count: int) -> TextBatch:
    """Sentence pairs of about 40 tokens."""
    rng = np.random.default_rng(0)
    common = (
        "的一是不了在有人我他这中大来上个国到说们为子和你地出道也时年得就那要下以生会自着去之过家学对可里后小么心多"
    )
    task = load_task("lcqmc")
    drawn = [["".join(rng.choice(list(common), 10)) for _ in range(2)] for _ in range(count)]
    records = [{"text_a": a, "text_b": b, "label": str(i % 2)} for i, (a, b) in enumerate(drawn)]
    return labelled(task, [task.example(record) for record in records], for_loss=True).batch


def row(
    name: str, layer: int | None, local: Oracle, there: HttpOracle, batch: TextBatch, population: int, rounds: int
) -> tuple[str, float]:
    """One kind of population, both ways by turns: its line, and remote / local."""
    rng = np.random.default_rng(1)
    info = local.info
    base = rng.normal(size=(1, info.layers, info.dim)).astype(np.float32)
    taken: dict[str, list[float]] = {"local": [], "remote": []}
    for number in range(rounds + 1):
        points = base.repeat(population, axis=0)
        which = slice(None) if layer is None else slice(layer, layer + 1)
        points[:, which] = rng.normal(size=points[:, which].shape)
        order = [("local", local), ("remote", there)]
        scores = {}
        for way, oracle in order if number % 2 else order[::-1]:
            began = time.perf_counter()
            scores[way] = oracle.score(batch, points)
            taken[way].append(time.perf_counter() - began)
        if not np.array_equal(scores["local"].logits, scores["remote"].logits):
            raise SystemExit("local and remote scores differ")
    request = wire.request_for(info, batch.digest(), points, "candidates", None)
    up, down = len(wire.encode_request(request)), len(wire.encode_reply(request.call_id, scores["local"]))
    rate = {way: population / statistics.median(seconds[1:]) for way, seconds in taken.items()}
    each = ", ".join(f"{a / b:.2f}" for a, b in zip(taken["local"][1:], taken["remote"][1:], strict=True))
    line = (
        f"| {name} | {rate['local']:.2f} | {rate['remote']:.2f} | {rate['remote'] / rate['local']:.3f} | {each} "
        f"| {up / population:.0f} | {down / population:.0f} |"
    )
    return line, rate["remote"] / rate["local"]
