"""`bbprompt pretrain`: the only commands with a backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bbprompt.commands.flags import Debug, Device, Json, Quiet
from bbprompt.commands.output import command, write, write_json
from bbprompt.commands.stop import Stop, stop_of
from bbprompt.errors import UsageError

if TYPE_CHECKING:
    from bbprompt.pretrain.lm_recipe import HeadConfig
    from bbprompt.pretrain.mp2 import Progress
    from bbprompt.pretrain.recipe import PptSettings, PretrainConfig

    Recipe = PretrainConfig | HeadConfig

__all__ = ["lm_head", "mp2", "ppt", "spot"]

_RECIPES = Path(__file__).parent.parent / "configs" / "pretrain"
#: A bundled task that PPT's patterns bring into a form, by form and language.
_TASKS = {
    ("pair", "zh"): "lcqmc",
    ("single", "zh"): "chnsenticorp",
    ("choice", "zh"): "c3",
    ("pair", "en"): "rte",
    ("single", "en"): "sst2",
}

_Config = Annotated[
    str | None,
    typer.Option(metavar="FILE", show_default=False, help="Recipe: a YAML file, or a bundled one such as mp2-deep."),
]
_Resume = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR", show_default=False, help="Go on from the checkpoint in DIR, by default with its recipe."
    ),
]
_Out = Annotated[
    Path | None,
    typer.Option(metavar="DIR", show_default=False, help="Checkpoints and artifact [default: runs/pretrain-<recipe>]."),
]
_Data = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        show_default=False,
        help="Directory of data directories [default: beside a task's YAML, BBPROMPT_DATA, then the hub].",
    ),
]


def mp2(
    context: typer.Context,
    config: _Config = None,
    resume: _Resume = None,
    out: _Out = None,
    data: _Data = None,
    device: Device = None,
    quiet: Quiet = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Train modular prompts on many tasks, the backbone frozen; writes a prompt artifact."""
    _pretrain(stop_of(context), ("mp2-deep", "mp2-shallow"), config, resume, out, data, device, quiet, json)


def spot(
    context: typer.Context,
    config: _Config = None,
    resume: _Resume = None,
    out: _Out = None,
    data: _Data = None,
    device: Device = None,
    quiet: Quiet = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Train one soft prompt on many tasks (SPoT) [default recipe: spot]."""
    _pretrain(stop_of(context), ("spot",), config, resume, out, data, device, quiet, json)


def ppt(
    context: typer.Context,
    config: _Config = None,
    resume: _Resume = None,
    out: _Out = None,
    device: Device = None,
    quiet: Quiet = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Train one soft prompt on raw text, self-supervised (PPT); the recipe names the corpus."""
    _pretrain(stop_of(context), ("ppt",), config, resume, out, None, device, quiet, json)


def lm_head(
    context: typer.Context,
    config: _Config = None,
    resume: _Resume = None,
    out: _Out = None,
    device: Device = None,
    quiet: Quiet = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Train a language model head on raw text for an encoder that has none; the recipe names the corpus."""
    recipe, folder = _begin(("lm-head",), config, resume, out)

    from bbprompt.pretrain.lm_recipe import HeadConfig
    from bbprompt.pretrain.lm_run import train_head

    if not isinstance(recipe, HeadConfig):
        raise TypeError(f"a recipe of kind {recipe.kind}")
    with _shown(stop_of(context), "lm-head", folder, recipe.steps, quiet) as report:
        found = train_head(recipe, folder, report, resume=resume is not None, device=_device(device or "auto"))
    artifact = folder / "artifact"
    if json:
        from dataclasses import asdict

        write_json({"artifact": str(artifact), "held_out": {name: asdict(each) for name, each in found.items()}})
        return
    lines = [f"{'masked tokens of held-out text':34} top-1  top-5  unigram top-1"]
    lines += [f"{name:34} {each.top1:.3f}  {each.top5:.3f}  {each.unigram1:.3f}" for name, each in found.items()]
    following = command("tune", "--task", "lcqmc", "--method", "zero-shot-lm", "--backbone", artifact)
    write("\n".join([*lines, "", f"Written: {artifact}", f"Next: {following}"]))


def _pretrain(
    stop: Stop,
    kinds: tuple[str, ...],
    config: str | None,
    resume: Path | None,
    out: Path | None,
    data: Path | None,
    device: str | None,
    quiet: bool,
    json: bool,
) -> None:
    """What the trainings of prompts share; `kinds` are the recipes that the command is for."""
    recipe, folder = _begin(kinds, config, resume, out)

    from bbprompt.pretrain.recipe import PretrainConfig
    from bbprompt.pretrain.run import pretrain
    from bbprompt.pretrain.team import leads

    if not isinstance(recipe, PretrainConfig):
        raise TypeError(f"a recipe of kind {recipe.kind}")
    with _shown(stop, _command(recipe), folder, recipe.steps, quiet) as report:
        scores = pretrain(recipe, folder, data, report, resume=resume is not None, device=_device(device or "auto"))
    if not leads():
        return
    artifact = folder / "artifact"
    mean = sum(scores.values()) / len(scores)
    if json:
        write_json({"artifact": str(artifact), "validation": scores, "mean": mean})
        return
    lines = [f"{name:24} {score:.3f}" for name, score in scores.items()]
    following = command("tune", *_following(recipe), "--prompts", artifact)
    write("\n".join([*lines, f"{'mean':24} {mean:.3f}", "", f"Written: {artifact}", f"Next: {following}"]))


def _begin(kinds: tuple[str, ...], config: str | None, resume: Path | None, out: Path | None) -> tuple[Recipe, Path]:
    """The recipe, of one of `kinds`, and the directory of the training."""
    if resume is not None and out is not None:
        raise UsageError("--out: --resume says the directory already; leave one of them out")
    if config is None and resume is None:
        if len(kinds) > 1:
            raise UsageError("--config is missing; give a recipe of yours or one of " + ", ".join(_names(kinds)))
        config = kinds[0]
    folder = resume or out or Path("runs") / f"pretrain-{Path(config or '').stem}"
    recipe = _recipe(config, folder)
    if recipe.kind not in kinds:
        raise UsageError(f"--config: this recipe is of kind {recipe.kind}; run `bbprompt pretrain {_command(recipe)}`")
    return recipe, folder


@contextmanager
def _shown(stop: Stop, name: str, folder: Path, steps: int, quiet: bool) -> Iterator[Callable[[Progress, int], None]]:
    """Show a training's progress while the context is open; stops it where the user does."""
    from bbprompt.terminal import Meter, duration, logging_to, open_console

    console = open_console(quiet)
    with logging_to(console):
        stop.advice = f"go on with: {command('pretrain', name, '--resume', folder)}"
        meter = Meter(console, steps)

        def report(progress: Progress, steps: int) -> None:
            share = f" ({100 * progress.gemm_share:.0f}% of GEMM)" if progress.gemm_share else ""
            meter.update(
                "pretrain",
                progress.step,
                f"steps, loss {progress.loss:.3f}, accuracy {progress.accuracy:.2f}, "
                f"{progress.examples_per_second:.1f} examples/s, {progress.tokens_per_second:.0f} tokens/s{share}, "
                f"{duration(progress.seconds_left)} left",
            )
            stop.check()

        try:
            yield report
        finally:
            meter.close()


def _command(recipe: Recipe) -> str:
    return recipe.kind if recipe.kind == "lm-head" else recipe.kind.partition("-")[0]


def _following(recipe: PretrainConfig) -> tuple[str, ...]:
    """Flags of a `tune` that fits the prompts."""
    if recipe.ppt is not None and recipe.readout == "verbalizer":
        return _filling_gaps(recipe.ppt)
    if recipe.readout == "prototype":
        return ("--task", "lcqmc", "--method", "mp2-proto", *(() if recipe.routed else ("--set", "router=null")))
    if recipe.routed:
        return ("--task", "lcqmc", *(() if recipe.deep else ("--method", "mp2-shallow")))
    return ("--task", "lcqmc", "--method", "mp2-deep" if recipe.deep else "mp2-shallow", "--set", "router=null")


def _filling_gaps(trained: PptSettings) -> tuple[str, ...]:
    """For prompts beside texts with a gap: a method that writes a task so, and a task that has such a form."""
    if "choice" in trained.formats and not trained.hybrid:
        return ("--task", _TASKS["pair", trained.language], "--method", "ppt-unified")
    task = _TASKS.get((trained.formats[0], trained.language), "YOUR_TASK.yaml")
    if trained.hybrid:
        return ("--task", task, "--method", "ppt-hybrid")
    return ("--task", task, "--method", "ppt", "--set", "gradient.form=plain")


def _recipe(config: str | None, folder: Path) -> Recipe:
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

    from bbprompt.pretrain.lm_recipe import HeadConfig
    from bbprompt.pretrain.recipe import PretrainConfig

    if values.get("kind") == "lm-head":
        return validate(HeadConfig, values, str(file))
    return validate(PretrainConfig, values, str(file))


def _names(kinds: tuple[str, ...] = ()) -> list[str]:
    """Bundled recipes, all or those of some kinds."""
    from bbprompt.yamlfile import read_yaml

    files = _RECIPES.glob("*.yaml")
    return sorted(file.stem for file in files if not kinds or read_yaml(file).get("kind") in kinds)


def _device(wanted: str) -> str:
    import torch

    there = torch.cuda.is_available()
    if wanted == "cuda" and not there:
        raise UsageError("--device cuda: torch sees no CUDA device; use --device cpu or install a CUDA build of torch")
    return wanted if wanted != "auto" else "cuda" if there else "cpu"
