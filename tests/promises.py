"""The three tiers of the promises' tests, each one command and one report in plain text.

``python tests/promises.py commit|nightly|release [--seed N] [--jobs N] [--report FILE]``. Every line of the report
has a check's name, its counts and seed, and its seconds; then come the totals beside what is demanded of them, and the
last line says whether all held. A check that fails prints the seed and the place, and the others still run. What was
not tried has not held: a total below its demand, a check that counted less than it was to count, and a check whose
package is not installed.

With n trials and no failure the rate of failure is below 3/n (95 %): a thousand clean kills mean "less than 0.3 % a
kill", and no more. The exhaustive sweeps prove their statement for the one scenario they sweep.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import multiprocessing
import os
import platform
import subprocess
import sys
import time
import tomllib
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import crashes
import doubts
import faults
import fuzz
import fuzztargets
import httpfaults
import ledgerwalk
import rawserver
import references
import telling
from packaging.requirements import Requirement

TIERS = ("commit", "nightly", "release")
HERE = Path(__file__).parent

CRASHES, KILLS, FAULTS, OPERATIONS = (
    "simulated crash points",
    "real SIGKILLs",
    "HTTP faults injected",
    "ledger operations",
)
FILES, RAY, REQUESTS, PLANTED = "corrupted files opened", "Ray kills", "hostile requests", "planted bugs caught"

#: Least total of each figure, tier by tier. Of the crash points, what the tier sweeps exhaustively: every operation,
#: every record and every byte of its scenarios; the power cuts at random come on top.
DEMANDED: dict[str, tuple[int, int, int]] = {
    CRASHES: (4_300, 29_000, 66_000),
    KILLS: (40, 1_000, 3_000),
    FAULTS: (10_000, 100_000, 300_000),
    OPERATIONS: (100_000, 2_500_000, 10_000_000),
    FILES: (12_000, 100_000, 100_000),
    RAY: (0, 40, 100),
    REQUESTS: (400, 5_000, 50_000),
    PLANTED: (0, 12, 12),
}
#: Methods of `toyruns` and budgets of the runs that are swept, tier by tier. "both" has a Gaussian process in its first
#: stage, "upstream" in its only one.
SCENARIOS = (
    (("joint", 40), ("all-time", 40)),
    (("joint", 40), ("all-time", 60), ("both", 24)),
    (("joint", 40), ("all-time", 60), ("both", 24), ("layerwise", 120), ("joint", 120), ("upstream", 16)),
)
#: Kills of each kind on Ray, tier by tier.
RAY_KILLS: dict[str, tuple[int, int, int]] = {
    "workers": (0, 30, 80),
    "drivers": (0, 5, 10),
    "nodes": (0, 5, 10),
    "heads": (0, 1, 3),
}


@dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
        name: Of its line.
        work: Returns what it counted; an error means that a promise is broken.
        figure: The total that it adds to; empty for none.
        key: Of the number to add, in what `work` returns; empty for all of it.
        least: What `work` is to count at least, by its keys.
        needs: Package without which there is no such check; empty for none.
    """

    name: str
    work: Callable[[], Any]
    figure: str = ""
    key: str = ""
    least: Mapping[str, int] = field(default_factory=dict)
    needs: str = ""

    def counted(self, result: Any) -> int:
        """What it adds to its figure."""
        return int(result[self.key] if self.key else result) if self.figure else 0

    def short(self, result: Any) -> str:
        """What it counted less of than it was to; empty for nothing."""
        found = {key: (result.get(key, 0), least) for key, least in self.least.items()}
        return ", ".join(f"{key}: {count} of {least}" for key, (count, least) in found.items() if count < least)

    def missing(self) -> str:
        """Why it cannot be done on this machine; empty where it can."""
        absent = self.needs and importlib.util.find_spec(self.needs) is None
        return f"{self.needs} is not installed, which the extra `dev` brings" if absent else ""


def checks(tier: str, seed: int) -> Iterator[Check]:
    """The checks of a tier, those that take long first."""
    level = TIERS.index(tier)
    if level:
        yield _ray(level, seed)
        yield _fuzz(level, seed)
        yield Check("mutants of journal and ledger", _script("mutation.py"))
        times = (0, 5, 50)[level]
        deep = _script("deepproperties.py", f"--times={times}", f"--seed={seed}")
        yield Check(f"property tests, {times} times their examples", deep, least={"tests": 14})
        servers = (0, 100, 500)[level]
        work = _script("serverkills.py", f"--kills={servers}", f"--seed={seed}")
        yield Check("SIGKILL of servers and clients", work, KILLS, "killed", {"servers": servers})
    yield Check("lines and branches reached", _script("covered.py"), least={"modules": 8})
    if tier == "release":  # half an hour by itself
        rest = _script("covered.py", "--rest", "--jobs", "1")
        yield Check("lines and branches reached of all other modules", rest, least={"modules": 220})
    kills = DEMANDED[KILLS][level]
    work = _script("kills.py", f"--kills={kills}", f"--seed={seed}")
    yield Check("SIGKILL at random", work, KILLS, "kills", {"kills": kills})
    if level:  # not beside the kills on Ray, which its tests of Ray would wait for until their time is up
        yield Check("planted bugs", _script("planted/__main__.py"), PLANTED, "caught")
    yield from _http(level, seed)
    attacks = ("--mutants", str((150, 5_000, 50_000)[level]), "--seed", str(seed))
    yield Check("hostile requests", _script("hostile.py", *attacks), REQUESTS, "requests")
    examples = ("--examples", str((10, 500, 2_000)[level]), "--seed", str(seed))
    yield Check("OpenAPI document, by schemathesis", _script("openapi.py", *examples), REQUESTS, "requests")
    if level:
        yield Check("trickling and crowding clients", _script("hostile.py", "--crowd"), REQUESTS, "requests")
    walk = DEMANDED[OPERATIONS][level]
    yield Check("ledger walk", partial(ledgerwalk.walks, walk, seed), OPERATIONS, "operations")
    yield Check("what is in doubt: charged, resent", partial(doubts.trials, (10, 200, 1_000)[level], seed))
    yield from _disk(level, seed)
    told = ((12, 2), (1_000, 60), (5_000, 300))[level]
    yield Check("optimizers asked and told at random", partial(telling.walks, *told, seed))
    seeds = (3, 15, 50)[level]
    functions = ("sphere", "rotated ellipsoid") if not level else tuple(references.FUNCTIONS)
    yield Check("CMA-ES beside cma", partial(references.evolution, seeds, functions, 0.2 if level else 0.35))
    boxes = ("three wells",) if not level else tuple(references.BOX_FUNCTIONS)
    yield Check("UCB beside random search", partial(references.bayesian, (1, 5, 15)[level], boxes))


def _fuzz(level: int, seed: int) -> Check:
    """Every target, guided by coverage where there is an atheris for the machine; the name says which it is."""
    work = _script("fuzz.py", "--seconds", str((0, 600, 3_600)[level]), f"--seed={seed}")
    least = {"targets": len(fuzztargets.NAMES)}
    if not _brought("atheris", "fuzz"):
        return Check("fuzz without coverage, which needs atheris", work, least=least)
    return Check("fuzz with coverage", work, least=least | {"guided": 1}, needs="atheris")


def _ray(level: int, seed: int) -> Check:
    """Deaths on Ray; other kills in place of a node's, where no machine can be made for it, are not what is wanted."""
    wanted = {kind: counts[level] for kind, counts in RAY_KILLS.items()}
    work = _script("raykills.py", *(f"--{kind}={count}" for kind, count in wanted.items()), f"--seed={seed}")
    least = {"kills": sum(wanted.values()), **{kind: wanted[kind] for kind in ("drivers", "nodes", "heads")}}
    return Check("SIGKILL on Ray", work, RAY, "kills", least, needs="ray")


def _brought(package: str, extra: str, machine: dict[str, str] | None = None) -> bool:
    """Whether an extra brings a package to a machine with these marker variables, this one unless told otherwise."""
    project = tomllib.loads((HERE.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = map(Requirement, project["optional-dependencies"][extra])
    return any(one.name == package and (one.marker is None or one.marker.evaluate(machine)) for one in wanted)


def _http(level: int, seed: int) -> Iterator[Check]:
    """Faults of servers, as the client sees them."""
    count, share = (2_000, 20_000, 60_000)[level], (500, 2_500, 5_000)[level]
    for first in range(0, count, share):
        name = f"HTTP faults at random: {first} to {first + share - 1}"
        yield Check(
            name, lambda first=first: httpfaults.schedules(share, seed, httpfaults.Stage(), first), FAULTS, "faults"
        )
    if level:
        yield Check("KServe faults at random", partial(_schedules, 2_000, seed, "kserve"), FAULTS, "faults")
        both = partial(_schedules, (0, 1_000, 5_000)[level], seed, "http", "both", 24)
        yield Check("HTTP faults at random, both stages", both, FAULTS, "faults")
    names = tuple(faults.FAULTS) if level else faults.ONE_OF_EACH
    for protocol in httpfaults.PROTOCOLS:
        name = f"{len(names)} faults, 3 places, 3 times: {protocol}"
        yield Check(name, partial(httpfaults.matrix, protocol, names), FAULTS, "faults")
    if level:
        name = f"{len(names)} faults, 3 places, 3 times: both stages"
        yield Check(name, partial(httpfaults.matrix, "http", names, "both"), FAULTS, "faults")
    yield Check("what only sockets do", rawserver.exchanges, FAULTS, "tricks")


def _schedules(count: int, seed: int, *stage: Any) -> Any:
    return httpfaults.schedules(count, seed, httpfaults.Stage(*stage))


def _disk(level: int, seed: int) -> Iterator[Check]:
    """Power cuts, failing disks, damaged files."""
    for number, (method, budget) in enumerate(SCENARIOS[level]):
        scenario, run = f"{method} {budget}", partial(crashes.small, method, budget)
        yield Check(f"power cut at every operation, 4 images: {scenario}", _on(run, crashes.crash_points), CRASHES)
        codes = crashes.CODES if level or not number else crashes.CODES[:1]  # all of them go one way
        name = f"failing disk at every operation, errno {', '.join(map(str, codes))}: {scenario}"
        yield Check(name, _on(run, crashes.failing_disk, codes), CRASHES)
        yield Check(f"journal cut after every record: {scenario}", _on(run, crashes.prefixes), CRASHES)
        if number and not level:
            continue
        yield Check(f"journal cut after every byte, repaired: {scenario}", _on(run, crashes.repairs), CRASHES)
        chains = (40, 100, 3_000)[level]
        yield Check(f"power cuts in a row: {scenario}", _on(run, crashes.crash_chains, chains, seed), CRASHES)
    joint = partial(crashes.small, "joint", 40)
    if level:
        yield Check("journal cut after every byte, resumed: joint 40", _on(joint, crashes.byte_cuts), CRASHES)
    flips = (5_000, 1_000) if not level else (100_000, 20_000)
    yield Check("flipped bits", _on(joint, crashes.flips, *flips, seed), FILES, "files")
    yield Check("lines moved", _on(joint, crashes.shuffles, (500, 5_000, 20_000)[level], seed), FILES, "files")
    mutants = (350, 5_000, 5_000)[level]
    for name in fuzztargets.NAMES:
        work = partial(fuzz.mutations, name, mutants, seed)
        yield Check(f"mutants: {name}", work, FILES if name in fuzztargets.FILES else "", "inputs")


def _on(run: Callable[[], Any], work: Callable[..., Any], *more: Any) -> Callable[[], Any]:
    return lambda: work(run(), *more)


def _script(name: str, *arguments: str) -> Callable[[], Any]:
    """Run a script of this folder in a process of its own; its last line, or all of them where they are no JSON."""

    def work() -> Any:
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

    return work


def judged(tier: str, seed: int, number: int) -> tuple[str, bool, int]:
    """Do the check of that number: its line, whether it held, and what it adds to its figure."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("error")
    check, start = list(checks(tier, seed))[number], time.monotonic()
    if missing := check.missing():
        return f"{check.name}: NOT HELD: {missing}", False, 0
    try:
        result = check.work()
        short = check.short(result)
        said, held, counted = (
            f"SHORT, {short}: {result}" if short else f"ok: {result}",
            not short,
            check.counted(result),
        )
    except Exception as error:
        said, held, counted = f"FAILED: {type(error).__name__}: {error}", False, 0
    return f"{check.name}: {said} ({time.monotonic() - start:.1f} s)", held, counted


def totalled(tier: str, totals: Mapping[str, int]) -> tuple[list[str], int]:
    """The lines of all figures beside what a tier demands of them, and how many of them are below that."""
    lines, below = [], 0
    for figure, demands in DEMANDED.items():
        found, demanded = totals.get(figure, 0), demands[TIERS.index(tier)]
        below += found < demanded
        lines.append(f"{figure}: {found} of {demanded}{': NOT HELD' if found < demanded else ''}")
    return lines, below


def _commit() -> str:
    """The state of the repository, for the report."""
    words = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    done = subprocess.run(words, cwd=HERE, capture_output=True, text=True, check=False)
    return f"commit {done.stdout.strip()}" if not done.returncode else "outside a repository"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tier", choices=TIERS)
    parser.add_argument("--seed", type=int, default=1)
    # One more than there are cores: several checks wait for sockets or for processes to die.
    parser.add_argument("--jobs", type=int, default=(os.cpu_count() or 1) + 1, help="checks at once")
    parser.add_argument("--report", type=Path, help="write the report here too")
    given = parser.parse_args()
    lines: list[str] = []

    def say(line: str) -> None:
        lines.append(line)
        print(line, flush=True)
        if given.report:
            given.report.parent.mkdir(parents=True, exist_ok=True)
            given.report.write_text("\n".join(lines) + "\n", encoding="utf-8")

    from bbprompt import __version__

    say(f"bbprompt {__version__}, {_commit()}, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC")
    say(f"python tests/promises.py {given.tier} --seed {given.seed} --jobs {given.jobs}")
    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    say(f"{machine}, load {os.getloadavg()[0]:.1f}, Python {platform.python_version()}")
    began, unheld, totals = time.monotonic(), 0, Counter[str]()
    figures = [check.figure for check in checks(given.tier, given.seed)]
    with ProcessPoolExecutor(given.jobs, multiprocessing.get_context("fork")) as pool:
        running = [pool.submit(judged, given.tier, given.seed, number) for number in range(len(figures))]
        for figure, future in zip(figures, running, strict=True):
            line, held, counted = future.result()
            say(line)
            unheld += not held
            totals[figure] += counted
    figures_said, below = totalled(given.tier, totals)
    for line in figures_said:
        say(line)
    unheld += below
    say(f"{'all held' if not unheld else f'{unheld} NOT HELD'} ({time.monotonic() - began:.0f} s)")
    sys.exit(bool(unheld))


if __name__ == "__main__":
    main()
