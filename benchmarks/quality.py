"""Quality on real tasks: tasks x methods x seeds, each one `bbprompt tune`, and a Markdown table of all of them.

    BBPROMPT_DATA=DIR python benchmarks/quality.py --out runs/quality --tasks lcqmc,ocnli
        --methods mp2-deep --seeds 10,20,30 --budget 8000 --workers 2 -- --test-limit 1000 --threads 1

What stands behind `--` goes to `bbprompt tune` as it is. A run that is finished is not repeated and one that was
stopped is resumed, so the command can be given again. `--table` only writes the table of what is there.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from bbprompt.result import Result
from bbprompt.task import load_task


@dataclass(frozen=True)
class Run:
    """One cell of the grid and where it lies."""

    task: str
    method: str
    seed: int
    path: Path

    def command(self, budget: int, extra: list[str]) -> list[str]:
        """Start it, or go on with it."""
        program = [sys.executable, "-m", "bbprompt"]
        if (self.path / "manifest.json").is_file():
            return [*program, "resume", str(self.path)]
        flags = [
            "--task",
            self.task,
            "--method",
            self.method,
            "--seed",
            str(self.seed),
            "--budget",
            str(budget),
        ]
        return [*program, "tune", *flags, "--run-dir", str(self.path), *extra]

    def result(self) -> Result | None:
        """What it found, if it is finished."""
        file = self.path / "result.json"
        return Result.model_validate_json(file.read_bytes()) if file.is_file() else None


def main() -> None:
    """Run the grid and print the table."""
    own, _, extra = " ".join(sys.argv[1:]).partition(" -- ")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tasks", required=True)
    parser.add_argument("--methods", default="mp2-deep,mp2-shallow")
    parser.add_argument("--seeds", default="10,20,30")
    parser.add_argument("--budget", type=int, default=8000)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args(own.split())
    runs = [
        Run(task, method, int(seed), options.out / f"{task}-{method}-{seed}")
        for seed in options.seeds.split(",")
        for task in options.tasks.split(",")
        for method in options.methods.split(",")
    ]
    if not options.table:
        options.out.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(options.workers) as pool:
            list(pool.map(lambda run: execute(run, options.budget, extra.split()), runs))
    print(table(runs))


def execute(run: Run, budget: int, extra: list[str]) -> None:
    """Run one cell to its end, its output into a log file beside it."""
    if run.result() is not None:
        return
    with (run.path.parent / f"{run.path.name}.log").open("a", encoding="utf-8") as log:
        done = subprocess.run(run.command(budget, extra), stdout=log, stderr=log, check=False)
    print(f"{run.path.name}: exit {done.returncode}", file=sys.stderr, flush=True)


def table(runs: list[Run]) -> str:
    """Mean and sd over seeds for each task and method, and paired differences over all runs of a track."""
    lines = [
        "| task | track | method | seeds | n test | majority | before | after upstream | after router | final "
        "| calls | seconds |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    gains: dict[tuple[str, str], list[tuple[float, float]]] = {}
    cells: dict[tuple[str, str], list[Result]] = {}
    for run in runs:
        if (result := run.result()) is not None:
            cells.setdefault((run.task, run.method), []).append(result)
    for (task, method), results in cells.items():
        track = load_task(task).track or "-"
        gains.setdefault((track, method), []).extend(
            (r.test.value - r.before.test, r.test.value - r.before.majority) for r in results
        )
        lines.append(
            f"| {task} | {track} | {method} | {len(results)} | {results[0].test.n} "
            f"| {spread(r.before.majority for r in results)} | {spread(r.before.test for r in results)} "
            f"| {after(results, 'upstream')} | {after(results, 'router')} | {spread(r.test.value for r in results)} "
            f"| {statistics.mean(r.calls.train + r.calls.dev for r in results):.0f} "
            f"| {statistics.mean(r.seconds.total for r in results):.0f} |"
        )
    lines += ["", "Paired over tasks and seeds: mean (standard error)", ""]
    for (track, method), pairs in gains.items():
        over = [f"{what} {paired([pair[i] for pair in pairs])}" for i, what in enumerate(("before", "majority"))]
        lines.append(f"- {track}, {method}, {len(pairs)} runs: final over {' and over '.join(over)}")
    return "\n".join(lines)


def after(results: list[Result], name: str) -> str:
    """Test score of the prompt chosen at the end of a stage, if the method has it."""
    values = [stage.test for result in results for stage in result.stages if stage.name == name]
    return spread(values) if values else "-"


def spread(values: Iterable[float]) -> str:
    """Mean and sample standard deviation, in percent."""
    numbers = [100 * value for value in values]
    deviation = f" ± {statistics.stdev(numbers):.1f}" if len(numbers) > 1 else ""
    return f"{statistics.mean(numbers):.1f}{deviation}"


def paired(differences: list[float]) -> str:
    """Mean difference in points with its standard error."""
    points = [100 * value for value in differences]
    error = statistics.stdev(points) / len(points) ** 0.5 if len(points) > 1 else float("nan")
    return f"{statistics.mean(points):+.1f} ({error:.1f})"


if __name__ == "__main__":
    main()
