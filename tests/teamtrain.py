"""One process of a team that trains; started by test_pretrain_team.py with the variables that torchrun sets.

Called as `python teamtrain.py RECIPE.json DATA OUT`; the first process writes the losses to `OUT.json`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from bbprompt.pretrain.recipe import PretrainConfig
from bbprompt.pretrain.run import pretrain


def main() -> None:
    config = PretrainConfig.model_validate_json(Path(sys.argv[1]).read_text())
    out = Path(sys.argv[3])
    losses: list[float] = []
    resume = (out / "checkpoint.safetensors").exists()
    scores = pretrain(config, out, Path(sys.argv[2]), lambda progress, _: losses.append(progress.loss), resume=resume)
    if losses:
        Path(f"{out}.json").write_text(json.dumps({"losses": losses, "scores": scores}))


if __name__ == "__main__":
    main()
