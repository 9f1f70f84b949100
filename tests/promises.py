"""The three tiers of the promises' tests, each one command and one report in plain text.

``python tests/promises.py commit|nightly|release [--seed N] [--report FILE]``. Every line of the report has a check's
name, its counts and seed, and its seconds; the last line says whether all held. A check that fails prints the seed
and the place, and the others still run.

With n trials and no failure the rate of failure is below 3/n (95 %): a thousand clean kills mean "less than 0.3 % a
kill", and no more. The exhaustive sweeps prove their statement for the one scenario they sweep.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import crashes
import fuzz
import fuzztargets
import ledgerwalk
import references

TIERS = ("commit", "nightly", "release")
HERE = Path(__file__).parent

Check = Callable[[], Any]


def checks(tier: str, seed: int) -> Iterator[tuple[str, Check]]:
    """Name and function of every check of a tier, the quick ones first."""
    level = TIERS.index(tier)
    yield "ledger walk", lambda: ledgerwalk.walks((100_000, 2_500_000, 10_000_000)[level], seed)
    budgets = ([40], [40, 60], [40, 60, 120])[level]
    names = (["joint"], ["joint", "all-time"], ["joint", "all-time", "layerwise"])[level]
    for name, budget in zip(names, budgets, strict=True):
        run = crashes.small(name, budget)
        scenario = f"{name} {budget}"
        yield f"power cut at every operation, 4 images: {scenario}", lambda run=run: crashes.crash_points(run)
        codes = crashes.CODES[: (1, 4, 4)[level]]
        yield (
            f"failing disk at every operation, {len(codes)} codes: {scenario}",
            lambda run=run, codes=codes: crashes.failing_disk(run, codes),
        )
        yield f"journal cut after every record: {scenario}", lambda run=run: crashes.prefixes(run)
        yield f"journal cut after every byte, repaired: {scenario}", lambda run=run: crashes.repairs(run)
        chains = (15, 500, 3_000)[level]
        yield (
            f"power cuts in a row: {scenario}",
            lambda run=run, chains=chains: {"seed": seed, "cuts": crashes.crash_chains(run, chains, seed)},
        )
    if level:
        run = crashes.small("joint", 40)
        yield "journal cut after every byte, resumed: joint 40", lambda: crashes.byte_cuts(run)
    mutants = (200, 5_000, 5_000)[level]
    for name in fuzztargets.NAMES:
        yield f"mutants: {name}", lambda name=name: {"seed": seed, **fuzz.mutations(name, mutants, seed)}
    kills = (40, 1_000, 3_000)[level]
    yield "SIGKILL at random", lambda: _script("kills.py", "--kills", str(kills), "--seed", str(seed))
    seeds = (3, 15, 50)[level]
    functions = ("sphere", "rotated ellipsoid") if not level else tuple(references.FUNCTIONS)
    yield "CMA-ES beside cma", lambda: references.evolution(seeds, functions, 0.2 if level else 0.35)
    boxes = ("three wells",) if not level else tuple(references.BOX_FUNCTIONS)
    yield "UCB beside random search", lambda: references.bayesian((1, 5, 15)[level], boxes)
    if level:
        yield "fuzz with coverage", lambda: _script("fuzz.py", "--seconds", str((0, 600, 3_600)[level]))
        yield "planted bugs", lambda: _script("planted/__main__.py")


def _script(name: str, *arguments: str) -> Any:
    """Run a script of this folder in a process of its own; its last line, or all of them where they are no JSON."""
    done = subprocess.run(
        [sys.executable, str(HERE / name), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    if done.returncode:
        raise AssertionError(f"{name} ended with {done.returncode}: {done.stdout[-4000:]}{done.stderr[-4000:]}")
    lines = done.stdout.splitlines()
    try:
        return json.loads(lines[-1])
    except ValueError:
        return "\n    " + "\n    ".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tier", choices=TIERS)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--report", type=Path, help="write the report here too")
    given = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("error")
    lines: list[str] = []

    def say(line: str) -> None:
        lines.append(line)
        print(line, flush=True)
        if given.report:
            given.report.parent.mkdir(parents=True, exist_ok=True)
            given.report.write_text("\n".join(lines) + "\n", encoding="utf-8")

    from bbprompt import __version__

    say(f"bbprompt {__version__}, tier {given.tier}, seed {given.seed}")
    say(f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    began, failed = time.monotonic(), 0
    for name, check in checks(given.tier, given.seed):
        start = time.monotonic()
        try:
            said = f"ok: {check()}"
        except Exception as error:
            failed += 1
            said = f"FAILED: {type(error).__name__}: {error}"
        say(f"{name}: {said} ({time.monotonic() - start:.1f} s)")
    say(f"{'all held' if not failed else f'{failed} FAILED'} ({time.monotonic() - began:.0f} s)")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
