"""Fuzz the parsers, with coverage as the guide where atheris is installed.

``python tests/fuzz.py --seconds 600`` shares the time among all targets and prints a line for each; the inputs that
led somewhere new stay in ``--corpus DIR`` if one is given. An input that ends in anything but a documented error is
printed and ends the whole with exit code 1.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import random
import subprocess
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


def guided(name: str, seconds: int, corpus: Path, seed: int) -> None:
    """Fuzz one target with atheris in this process, which it ends."""
    import atheris

    with atheris.instrument_imports(include=["bbprompt"]):
        target = fuzztargets.targets()[name]
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
    if given.only:
        guided(given.only, given.seconds, given.corpus or Path(tempfile.mkdtemp()), given.seed)
        return
    names = list(fuzztargets.NAMES)
    share = max(given.seconds // len(names), 1)
    failed, inputs = False, dict[str, int]()
    for name in names:
        if importlib.util.find_spec("atheris"):
            command = [sys.executable, __file__, f"--only={name}", "--seconds", str(share), "--seed", str(given.seed)]
            command += ["--corpus", str(given.corpus)] if given.corpus else []
            done = subprocess.run(command, capture_output=True, text=True, errors="replace")
            said = done.stderr.splitlines()
            found = [int(runs) for line in said if (runs := line.removeprefix("Done ").partition(" ")[0]).isdigit()]
            held = not done.returncode and any(found)
            inputs[name] = found[-1] if found else 0
            print(f"{name}: {'ok' if held else 'FAILED'}: {inputs[name]} inputs, guided", flush=True)
            if not held:
                failed = True
                print(done.stdout[-3000:], done.stderr[-6000:])
        else:
            began, inputs[name] = time.monotonic(), 0
            while time.monotonic() - began < share:
                inputs[name] += mutations(name, 500, given.seed + inputs[name])["inputs"]
            print(f"{name}: ok: {inputs[name]} mutants (install atheris for coverage as a guide)", flush=True)
    counts = {"targets": len(inputs), "seconds of each": share, "inputs": sum(inputs.values())}
    print(json.dumps({**counts, "fewest": min(inputs.values())}))
    sys.exit(failed)


if __name__ == "__main__":
    main()
