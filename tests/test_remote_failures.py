"""What goes wrong at a real server ends the command with the code and the words for it, and resuming mends it all.

Between client and server is a road whose end can be changed while a run is on it, and whose answers can be spoilt.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

import httpx2
import numpy as np
import pytest
import torch
from servers import TOKEN, answering, serving, start, stop

from bbprompt import cli, wire
from bbprompt.backends.backbone import load_backbone
from bbprompt.backends.local import LocalOracle
from bbprompt.connect import server_kind
from bbprompt.oracle import Scores
from bbprompt.prompts import ModularPrompt
from bbprompt.store.rundir import RESULT

pytestmark = pytest.mark.slow

GOOD_SCORES = 4  # requests for scores before something goes wrong: the start and some generations
Reply = tuple[int, dict[str, str], bytes]


@dataclass
class Road:
    """Carries requests to a server.

    Attributes:
        good: Where the good server is.
        bad: Where requests go once something is wrong.
        spoil: What becomes of good answers then.
        left: Requests for scores until then; None for never.
    """

    good: str
    bad: str | None = None
    spoil: Callable[[str, bytes], bytes] = lambda path, body: body
    left: int | None = None
    client: httpx2.Client = field(default_factory=lambda: httpx2.Client(trust_env=False, timeout=60))

    def __call__(self, method: str, path: str, headers: Mapping[str, str], body: bytes) -> Reply:
        wrong = self.left is not None and self.left <= 0
        if self.left is not None and path == "/v1/score":
            self.left -= 1
        kept = {name: headers[name] for name in ("authorization", "content-type") if name in headers}
        url = self.bad if wrong and self.bad else self.good
        said = self.client.request(method, url + path, content=body, headers=kept)
        content = self.spoil(path, said.content) if wrong and said.status_code == 200 else said.content
        return said.status_code, {"content-type": said.headers.get("content-type", "")}, content


@dataclass(frozen=True)
class Place:
    """A road with its address, and the servers that it may lead to."""

    road: Road
    url: str
    others: Mapping[str, str]
    flags: list[str]
    digest: str = ""

    def tune(self, folder: Path) -> int:
        return cli.run(["tune", *self.flags, "--run-dir", str(folder), "--json"])

    def resume(self, folder: Path, *flags: str) -> int:
        return cli.run(["resume", str(folder), "--json", *flags])


@pytest.fixture(scope="module")
def place(tiny_prompts: Path, tiny_pair_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    root = tmp_path_factory.mktemp("place")
    prompt = ModularPrompt.load(tiny_prompts)
    backbone = load_backbone(prompt.config.backbone)
    process, good = start(tiny_prompts, env={"BBPROMPT_TOKEN": TOKEN})
    road, threads = Road(good), torch.get_num_threads()
    torch.set_num_threads(1)  # as that one says of itself
    try:
        with ExitStack() as open_, pytest.MonkeyPatch.context() as patch:
            patch.setenv("BBPROMPT_TOKEN", TOKEN)
            other = replace(prompt, modules=prompt.modules + np.float32(1))
            others = {
                "token": serving(LocalOracle(backbone, prompt), token="another-token-than-ours"),
                "prompts": serving(LocalOracle(backbone, other), token=TOKEN),
                "tokens": serving(LocalOracle(backbone, prompt, max_tokens=60), token=TOKEN),
                "batches": serving(LocalOracle(backbone, prompt, batch_tokens=300), token=TOKEN),
            }
            urls = {name: open_.enter_context(context) for name, context in others.items()}
            url = f"http://{open_.enter_context(answering(road))}"
            flags = ["--task", str(tiny_pair_data / "task.yaml"), "--data", str(tiny_pair_data), "--backend", url]
            flags += ["--prompts", str(tiny_prompts), "--budget", "60", "--threads", "1", "--no-baselines"]
            for change in ("router=null", "prompt.popsize=8", "prompt.dev_every=16"):
                flags += ["--set", change]
            found = Place(road, url, urls, flags)
            assert found.tune(root / "whole") == 0
            yield replace(found, digest=json.loads((root / "whole" / RESULT).read_text())["digest"])
    finally:
        road.client.close()
        torch.set_num_threads(threads)
        assert stop(process) == 0


@pytest.fixture(autouse=True)
def _mended(place: Place) -> Iterator[None]:
    yield
    mend(place.road)


def mend(road: Road) -> None:
    road.bad, road.left, road.spoil = None, None, lambda path, body: body


def doctored(change: Callable[[Scores], Scores]) -> Callable[[str, bytes], bytes]:
    """Spoils scores, and nothing else."""

    def spoil(path: str, body: bytes) -> bytes:
        if path != "/v1/score":
            return body
        call_id, scores = wire.decode_reply(body)
        return wire.encode_reply(call_id, change(scores))

    return spoil


def with_nan(scores: Scores) -> Scores:
    logits = scores.logits.copy()
    logits.flat[-1] = np.nan
    return replace(scores, logits=logits)


def newer(path: str, body: bytes) -> bytes:
    """Of a server that speaks another version of the protocol."""
    return json.dumps(json.loads(body) | {"protocol": 2}).encode() if path == "/v1/info" else body


def smaller(path: str, body: bytes) -> bytes:
    """Of a server that takes fewer candidates at once."""
    if path != "/v1/info":
        return body
    said = json.loads(body)
    return json.dumps(said | {"limits": said["limits"] | {"points": 3}}).encode()


def upgraded(path: str, body: bytes) -> bytes:
    """Of a server with another torch."""
    if path != "/v1/info":
        return body
    said = json.loads(body)
    return json.dumps(said | {"model": said["model"] | {"versions": "torch 99.0"}}).encode()


#: Where requests go, what becomes of the answers, and what is said: while the run is on, and when it is to begin.
FAULTS: dict[str, tuple[str | None, Callable[[str, bytes], bytes] | None, str, str]] = {
    "wrong token": ("token", None, "BBPROMPT_TOKEN", "BBPROMPT_TOKEN"),
    "other prompts": ("prompts", None, "another model or other prompts", "holds other prompts"),
    "nan": (None, doctored(with_nan), "NaN or infinity", "NaN or infinity"),
    "wrong shape": (None, doctored(lambda scores: replace(scores, logits=scores.logits[:, :-1])), "shape", "shape"),
    "one short": (None, doctored(lambda scores: scores.of(0)), "shape", ""),
    "cut off": (None, lambda path, body: body[:-3] if path == "/v1/score" else body, "malformed", "malformed"),
}


def failed(code: int, expected: int, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    out, err = capsys.readouterr()
    last = err.splitlines()[-1]
    assert (code, out) == (expected, ""), last
    assert last.startswith("error: ")
    assert said in last
    assert "Traceback" not in err
    assert TOKEN not in err


@pytest.mark.parametrize("fault", FAULTS)
def test_a_run_that_a_server_spoils_is_mended_by_resume(
    fault: str, place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where, spoil, said, at_first = FAULTS[fault]
    road = place.road
    road.bad, road.left = place.others[where] if where else None, GOOD_SCORES
    road.spoil = spoil or road.spoil
    failed(place.tune(tmp_path / "run"), 69, said, capsys)
    journal = (tmp_path / "run" / "journal.log").read_bytes()
    assert journal
    assert not (tmp_path / "run" / RESULT).exists()
    road.left = 0
    failed(place.resume(tmp_path / "run"), 69, at_first, capsys)
    assert (tmp_path / "run" / "journal.log").read_bytes().startswith(journal), "nothing is lost"
    mend(road)
    assert place.resume(tmp_path / "run") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["digest"] == place.digest


@pytest.mark.parametrize("fault", [*FAULTS, "newer protocol"])
def test_a_server_that_is_wrong_from_the_start(
    fault: str, place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where, spoil, _, said = FAULTS.get(fault, (None, newer, "", "speaks protocol 2"))
    place.road.bad, place.road.left = place.others[where] if where else None, 0
    place.road.spoil = spoil or place.road.spoil
    failed(place.tune(tmp_path / "run"), 69, said, capsys)
    assert (tmp_path / "run").exists() == (where is None and fault in FAULTS), "nothing is begun without a model"


def test_a_newer_server_is_refused_by_resume_too(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place.road.bad, place.road.left = place.others["token"], GOOD_SCORES
    assert place.tune(tmp_path / "run") == 69
    capsys.readouterr()
    place.road.bad, place.road.spoil, place.road.left = None, newer, 0
    failed(place.resume(tmp_path / "run"), 69, "speaks protocol 2", capsys)
    mend(place.road)
    assert place.resume(tmp_path / "run") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["digest"] == place.digest


@pytest.mark.parametrize(("other", "named"), [("tokens", "max_tokens"), ("batches", "batch_tokens")])
def test_a_server_that_came_back_with_other_settings_is_not_gone_on_with(
    other: str, named: str, place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place.road.bad, place.road.left = place.others[other], GOOD_SCORES
    failed(place.tune(tmp_path / "run"), 69, "the same with other settings or versions", capsys)
    place.road.left = 0
    failed(place.resume(tmp_path / "run"), 78, named, capsys)
    mend(place.road)
    place.road.spoil, place.road.left = smaller, 0
    failed(place.resume(tmp_path / "run"), 78, "model.piece was 1024 when the run began and is 3 now", capsys)
    mend(place.road)
    place.road.spoil, place.road.left = upgraded, 0
    failed(place.resume(tmp_path / "run"), 78, "torch 99.0", capsys)
    mend(place.road)
    assert place.resume(tmp_path / "run") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["digest"] == place.digest


def test_a_server_that_has_moved_is_gone_on_with(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place.road.bad, place.road.left = place.others["token"], GOOD_SCORES
    assert place.tune(tmp_path / "run") == 69
    capsys.readouterr()
    moved = place.road.good
    assert moved != place.url
    failed(place.resume(tmp_path / "run", "--backend", "local"), 2, "a server of the same kind only", capsys)
    failed(place.resume(tmp_path / "run", "--backend", moved.replace("http", "vllm+http")), 2, "same kind", capsys)
    failed(place.resume(tmp_path / "run", "--backend", place.others["prompts"]), 69, "holds other prompts", capsys)
    assert place.resume(tmp_path / "run", "--backend", moved) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["digest"] == place.digest
    assert cli.run(["eval", str(tmp_path / "run"), "--backend", moved, "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["value"] == found["test"]["value"]


def test_kinds_of_servers_are_the_same_with_and_without_tls() -> None:
    for plain, secret in (("http", "https"), ("kserve", "kserve+https"), ("kserve+grpc", "kserve+grpcs")):
        assert server_kind(f"{plain}://a:1/m") == server_kind(f"{secret}://b:2/m")
    assert server_kind("vllm+http://a:1") == server_kind("vllm+https://b:2")
    assert len({server_kind(f"{kind}://a:1") for kind in ("http", "kserve", "kserve+grpc", "vllm+http")}) == 4
