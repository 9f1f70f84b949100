"""A run on the Open Inference Protocol behind a gateway with a token, which is lost on the way and comes back."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import tiny_run
from oipdouble import Double, over_grpc, over_http
from servers import TOKEN

from bbprompt import cli
from bbprompt.backends.backbone import load_backbone
from bbprompt.backends.local import LocalOracle
from bbprompt.errors import OracleError
from bbprompt.prompts import ModularPrompt
from bbprompt.run import prepare
from bbprompt.store.rundir import RESULT

#: Requests that the model answers before it is taken away.
ANSWERED = 3


class Leaving(Double):
    """A model that answers some requests and then with numbers of which one is none."""

    def __init__(self, oracle: LocalOracle) -> None:
        super().__init__(oracle, token=TOKEN, change=self.spoil)
        self.gone = False

    def spoil(self, tensors: dict[str, Any]) -> dict[str, Any]:
        if self.gone and len(self.asked) > ANSWERED:
            tensors["logits"] = tensors["logits"] * float("nan")
        return tensors


@pytest.mark.parametrize("over", [over_http, over_grpc])
def test_a_run_that_loses_its_model_goes_on_and_shows_its_token_nowhere(
    over: Callable[[Double], AbstractContextManager[str]],
    tiny_pair_data: Path,
    tiny_prompts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    prompt = ModularPrompt.load(tiny_prompts)
    model = Leaving(LocalOracle(load_backbone(prompt.config.backbone), prompt))
    changes: dict[str, Any] = {"baselines": False, "dtype": "float32", "device": "auto"}
    local = tiny_run.begin(prepare(tiny_run.config(tiny_pair_data, tiny_prompts, **changes)), tmp_path / "local")
    with over(model) as url:
        changes["backend"] = url
        monkeypatch.setenv("BBPROMPT_TOKEN", TOKEN + "x")
        with pytest.raises(OracleError, match="wrong token; set BBPROMPT_TOKEN") as refused:
            prepare(tiny_run.config(tiny_pair_data, tiny_prompts, **changes))
        monkeypatch.setenv("BBPROMPT_TOKEN", TOKEN)
        run = prepare(tiny_run.config(tiny_pair_data, tiny_prompts, **changes))
        model.gone, model.asked = True, []
        with pytest.raises(OracleError, match=r"malformed: .* NaN") as lost:
            tiny_run.begin(run, tmp_path / "run")
        run.oracle.close()
        assert (refused.value.exit_code, lost.value.exit_code) == (69, 69)
        assert not (tmp_path / "run" / RESULT).exists()
        model.gone = False
        assert cli.run(["resume", str(tmp_path / "run"), "--json"]) == 0
        assert local.digest in (tmp_path / "run" / RESULT).read_text(encoding="utf-8")
        assert cli.run(["report", str(tmp_path / "run"), "--out", str(tmp_path / "page.html")]) == 0
    # The token stands nowhere: in no file, on no stream, in nothing that a traceback or a log shows.
    assert len([file for file in (tmp_path / "run").iterdir() if TOKEN.encode() not in file.read_bytes()]) > 3
    told = capfd.readouterr()
    files = [file.read_bytes().decode("latin-1") for file in tmp_path.rglob("*") if file.is_file()]
    shown = [f"{what!r} {what}" for what in (run, run.oracle, run.config, refused.value, lost.value)]
    assert not [text[:200] for text in [*files, *shown, told.out, told.err, caplog.text] if TOKEN in text]
