"""`bbprompt pretrain`: the only commands with a backward pass."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bbprompt.commands.flags import Debug, Device, Json, Quiet
from bbprompt.commands.output import command, write, write_json
from bbprompt.commands.stop import Stop
from bbprompt.errors import UsageError

if TYPE_CHECKING:
    from bbprompt.pretrain.mp2 import PretrainConfig, Progress

__all__ = ["mp2"]

_RECIPES = Path(__file__).parent.parent / "configs" / "pretrain"


def mp2(
    config: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", show_default=False, help="Recipe: a YAML file, or a bundled one such as mp2-deep."
        ),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            show_default=False,
            help="Go on from the checkpoint in DIR, by default with its recipe.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            show_default=False,
            help="Checkpoints and artifact [default: runs/pretrain-<recipe>].",
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            show_default=False,
            help="Directory of data directories [default: BBPROMPT_DATA, then the hub].",
        ),
    ] = None,
    device: Device = None,
    quiet: Quiet = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Train modular prompts on many tasks, the backbone frozen; writes a prompt artifact."""
    if resume is not None and out is not None:
        raise UsageError("--out: --resume says the directory already; leave one of them out")
    if config is None and resume is None:
        raise UsageError("--config is missing; give a recipe or one of " + ", ".join(_names()))
    folder = resume or out or Path("runs") / f"pretrain-{Path(config or '').stem}"
    recipe = _recipe(config, folder)

    from bbprompt.pretrain.run import pretrain
    from bbprompt.terminal import Meter, duration, logging_to, open_console

    console = open_console(quiet)
    with Stop() as stop, logging_to(console):
        stop.advice = f"go on with: {command('pretrain', 'mp2', '--resume', folder)}"
        meter = Meter(console, recipe.steps)

        def report(progress: Progress, steps: int) -> None:
            meter.update(
                "pretrain",
                progress.step,
                f"steps, loss {progress.loss:.3f}, accuracy {progress.accuracy:.2f}, "
                f"{progress.tokens_per_second:.0f} tokens/s, {duration(progress.seconds_left)} left",
            )
            stop.check()

        try:
            scores = pretrain(recipe, folder, data, report, resume=resume is not None, device=_device(device or "auto"))
        finally:
            meter.close()
    artifact = folder / "artifact"
    mean = sum(scores.values()) / len(scores)
    if json:
        write_json({"artifact": str(artifact), "validation": scores, "mean": mean})
        return
    lines = [f"{name:24} {score:.3f}" for name, score in scores.items()]
    following = command("tune", "--task", "lcqmc", "--prompts", artifact)
    write("\n".join([*lines, f"{'mean':24} {mean:.3f}", "", f"Written: {artifact}", f"Next: {following}"]))


def _recipe(config: str | None, folder: Path) -> PretrainConfig:
    """The recipe by name or file, or the one that the directory was begun with."""
    from bbprompt.yamlfile import closest, read_yaml, validate

    if config is None:
        file = folder / "recipe.json"
        if not file.is_file():
            raise UsageError(f"--resume {folder}: there is no recipe.json in it; give --config too")
    elif config in _names():
        file = _RECIPES / f"{config}.yaml"
    else:
        file = Path(config)
        if not file.exists():
            raise UsageError(f"--config {config}: no such file or bundled recipe{closest(config, _names())}")
    values = read_yaml(file)  # JSON is YAML

    from bbprompt.pretrain.mp2 import PretrainConfig

    return validate(PretrainConfig, values, str(file))


def _names() -> list[str]:
    return sorted(file.stem for file in _RECIPES.glob("*.yaml"))


def _device(wanted: str) -> str:
    import torch

    there = torch.cuda.is_available()
    if wanted == "cuda" and not there:
        raise UsageError("--device cuda: torch sees no CUDA device; use --device cpu or install a CUDA build of torch")
    return wanted if wanted != "auto" else "cuda" if there else "cpu"
