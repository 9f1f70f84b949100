"""Fuzz the parsers, with coverage as the guide where atheris is installed.

``python tests/fuzz.py --seconds 600`` shares the time among all targets and prints a line for each; the inputs that
led somewhere new stay in ``--corpus DIR`` if one is given. An input that ends in anything but a documented error is
printed and ends the whole with exit code 1. The last line is JSON: counts, the seed, and whether atheris was the guide.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import multiprocessing
import os
import random
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

import fuzztargets

#: Processor seconds that one input may take: all of them are small.
SLOWEST = 5.0


def judged(target: fuzztargets.Target, data: bytes) -> bool:
    """Read one input; whether it was accepted. Raises `AssertionError` for an answer that is not documented."""
    began = time.process_time()
    try:
        target.read(data)
    except target.allowed as error:
        lines = str(error).splitlines()
        assert len(lines) <= 1, f"{type(error).__name__} of several lines: {lines} for {data!r}"  # noqa: PT017
        accepted = False
    except (Exception, RecursionError) as error:
        story = "".join(traceback.format_exception(error, limit=-4))
        raise AssertionError(f"{type(error).__name__} for {data!r}\n{story}") from error
    else:
        accepted = True
    assert time.process_time() - began < SLOWEST, f"took {time.process_time() - began:.1f} s: {data[:200]!r}"
    return accepted


def mutations(name: str, count: int, seed: int) -> dict[str, int]:
    """Read so many mutants of sound files; how many were accepted and refused."""
    target = fuzztargets.targets()[name]
    accepted = total = 0
    for data in fuzztargets.mutants(target.seeds, count, f"{seed} {name}"):
        accepted += judged(target, data)
        total += 1
    return {"inputs": total, "accepted": accepted, "refused": total - accepted}


def instrumented() -> dict[str, fuzztargets.Target]:
    """The targets, with every branch of the package reporting to atheris."""
    import atheris

    with atheris.instrument_imports(include=["bbprompt"]):
        return fuzztargets.targets()


def guided(target: fuzztargets.Target, name: str, seconds: int, corpus: Path, seed: int) -> None:
    """Fuzz one target with atheris in this process, which it ends."""
    import atheris

    folder = corpus / name.replace(" ", "-")
    folder.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate(target.seeds):
        (folder / f"seed-{number}").write_bytes(data)
    random_ = random.Random(seed)

    def mutate(data: bytes, size: int, given: int) -> bytes:
        """Every other time a mutation of ours, which knows JSON and checks."""
        if random_.random() < 0.5 and data:
            return list(fuzztargets.mutants((data,), 1, f"{given}"))[-1][:size]
        return bytes(atheris.Mutate(data, size))

    options = [f"-max_total_time={seconds}", f"-seed={seed}", "-max_len=20000", "-timeout=30", "-rss_limit_mb=3000"]
    arguments = [sys.argv[0], *options, f"-artifact_prefix={corpus}/{folder.name}-", str(folder)]
    atheris.Setup(arguments, lambda data: _one(target, data), custom_mutator=mutate)
    atheris.Fuzz()


def forked(target: fuzztargets.Target, name: str, seconds: int, corpus: Path, seed: int) -> tuple[int, str]:
    """Fuzz one target in a copy of this process, for libFuzzer ends the one that it runs in.

    Returns:
        Inputs it read, 0 where it did not end well; and what it said.
    """
    with tempfile.TemporaryFile() as said:

        def work() -> None:
            for stream in (1, 2):
                os.dup2(said.fileno(), stream)
            guided(target, name, seconds, corpus, seed)

        child = multiprocessing.get_context("fork").Process(target=work)
        child.start()
        child.join()
        said.seek(0)
        text = said.read().decode(errors="replace")
    done = [line.split()[1] for line in text.splitlines() if line.startswith("Done ")]
    return (0 if child.exitcode or not done else int(done[-1])), text


def _one(target: fuzztargets.Target, data: bytes) -> None:
    judged(target, data)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=int, default=600, help="for all targets together")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--corpus", type=Path)
    parser.add_argument("--only", help="one target, in this process")
    given = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("error")
    corpus = given.corpus or Path(tempfile.mkdtemp())
    guide = importlib.util.find_spec("atheris") is not None
    targets = instrumented() if guide else fuzztargets.targets()
    if given.only:
        guided(targets[given.only], given.only, given.seconds, corpus, given.seed)
        return
    share = max(given.seconds // len(targets), 1)
    failed, inputs = False, dict[str, int]()
    for name, target in targets.items():
        if guide:
            inputs[name], said = forked(target, name, share, corpus, given.seed)
            print(f"{name}: {'ok' if inputs[name] else 'FAILED'}: {inputs[name]} inputs, guided", flush=True)
            if not inputs[name]:
                failed = True
                print(said[-9000:], flush=True)
        else:
            began, inputs[name] = time.monotonic(), 0
            while time.monotonic() - began < share:
                inputs[name] += mutations(name, 500, given.seed + inputs[name])["inputs"]
            print(f"{name}: ok: {inputs[name]} mutants (install atheris for coverage as a guide)", flush=True)
    counts = {"targets": len(inputs), "seconds of each": share, "inputs": sum(inputs.values())}
    said_of = {"fewest": min(inputs.values()), "seed": given.seed, "guided": guide}
    print(json.dumps(counts | said_of))
    sys.exit(failed)


if __name__ == "__main__":
    main()
