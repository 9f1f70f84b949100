"""The oracle of a vLLM server against a strict double on real models, and against servers that misbehave."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
import tiny_prompt
import torch
from clients import EAGER, close_all, kept, opened
from servers import TOKEN, answering, free_port
from test_verbalizer import CAUSAL, KINDS, GapOracle, batch_for, causal_dir, load_tiny
from transformers import AutoModelForCausalLM
from vllmdouble import MODEL, Double
from vllmfaults import FINAL, MALFORMED, TRANSIENT, embeds, plain

from bbprompt.backends import vllm
from bbprompt.backends.backbone import Backbone, load_backbone
from bbprompt.backends.completions import Completions
from bbprompt.backends.scale import facts_of
from bbprompt.backends.stock import StockOracle
from bbprompt.backends.vllm import VllmOracle
from bbprompt.connect import measure_backbone, open_oracle
from bbprompt.doctor import examine
from bbprompt.errors import ArtifactError, DataError, OracleError, UsageError
from bbprompt.oracle import Oracle, Scores, TextBatch
from bbprompt.prompts import ModularPrompt
from bbprompt.random_projection import random_prompt
from bbprompt.scoring import labelled
from bbprompt.stage_settings import ProjectionConfig
from bbprompt.tasks.task import Task
from bbprompt.testing import OracleContract

SUBSPACE = ProjectionConfig(readout="verbalizer", layers="input", prompt_length=2, dim=4, scale=1.0, placeholder=300)
POINTS = np.random.default_rng(0).normal(size=(3, 1, 4)).astype(np.float32)


@pytest.fixture(autouse=True)
def _close() -> Iterator[None]:
    yield
    close_all()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {family: causal_dir(root / family, family) for family in CAUSAL}


@pytest.fixture(scope="module")
def models(folders: dict[str, Path]) -> dict[str, Any]:
    """The whole models, as a server has them."""
    return {
        family: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        for family, folder in folders.items()
    }


@pytest.fixture(scope="module")
def backbone(folders: dict[str, Path]) -> Backbone:
    """What the client holds of the Llama."""
    return load_backbone(str(folders["llama"]), head=True, layers=1)


@pytest.fixture
def llama(models: dict[str, Any]) -> Any:
    return models["llama"]


def prompt_for(backbone: Backbone) -> ModularPrompt:
    return random_prompt(SUBSPACE, facts_of(backbone), 3)


def offline(
    double: Double, backbone: Backbone, handle: Callable[[httpx2.Request], Any] = lambda request: None, **more: Any
) -> VllmOracle:
    """An oracle without a network, closed when the test ends; `handle` may answer instead of the double."""
    good = double.transport()

    def answer(request: httpx2.Request) -> httpx2.Response:
        instead = handle(request)
        return instead if instead is not None else good.handle_request(request)

    server = Completions(
        f"vllm+http://test:80/{MODEL}", double.token, EAGER, more.get("workers", 1), httpx2.MockTransport(answer)
    )
    return kept(VllmOracle(server, backbone, prompt_for(backbone), policy=EAGER, **more))


def shares(scores: Scores, batch: TextBatch) -> np.ndarray:
    """Log-probabilities over the options of each text."""
    owner = np.repeat(np.arange(len(batch.forms)), batch.sizes)
    values: np.ndarray = scores.logits.astype(np.float64) - scores.normalizer[:, owner]
    return values


def same(one: Scores, other: Scores) -> bool:
    return np.array_equal(one.logits, other.logits) and np.array_equal(one.normalizer, other.normalizer)


class TestContract(OracleContract):
    """Over a socket, three candidates at once, exact tokens."""

    given = True
    url: str

    @pytest.fixture(autouse=True)
    def _server(self, models: dict[str, Any], backbone: Backbone) -> Iterator[None]:
        self.backbone = backbone
        with answering(Double(models["llama"], given=self.given, most=20 if self.given else -1).http) as place:
            self.url = f"vllm+http://{place}"
            yield

    def make(self) -> Oracle:
        server = Completions(self.url, None, EAGER, workers=3)
        return GapOracle(kept(VllmOracle(server, self.backbone, prompt_for(self.backbone), workers=3)))


class TestContractOfAnOlderServer(TestContract):
    """The whole vocabulary comes back."""

    given = False


@pytest.mark.parametrize("ways", [{}, {"given": False, "most": -1}], ids=["given", "all"])
@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("family", CAUSAL)
def test_it_equals_the_local_oracle(
    family: str, kind: str, ways: dict[str, Any], folders: dict[str, Path], models: dict[str, Any]
) -> None:
    whole, part = (load_tiny(folders[family], layers) for layers in (None, 1))
    assert part.digest == whole.digest
    there = offline(Double(models[family], **ways), part)
    assert str(there._server.way) == ("logprobs=-1" if ways else "logprob_token_ids")
    here, batch = StockOracle(whole, prompt_for(whole)), batch_for(kind)
    assert there.info.prompts_digest == here.info.prompts_digest
    remote, local = there.score(batch, POINTS), here.score(batch, POINTS)
    assert np.abs(shares(remote, batch) - shares(local, batch)).max() < 1e-4
    assert remote.cut == local.cut == 0


def test_of_the_layers_one_is_loaded(backbone: Backbone, folders: dict[str, Path]) -> None:
    assert (backbone.layers, load_backbone(str(folders["llama"]), head=True).layers) == (1, 3)
    assert len(backbone.model.layers) == 1


def test_the_digest_is_that_of_all_tensors(
    folders: dict[str, Path], tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for family, folder in folders.items():
        part = load_backbone(str(folder), head=True, layers=1).digest
        monkeypatch.setenv("BBPROMPT_CACHE", str(tmp_path / family))
        assert load_backbone(str(folder), head=True).digest == part


def test_tensors_of_other_names_are_refused(folders: dict[str, Path], tmp_path: Path, cache: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(folders["llama"], tmp_path / "other")
    tensors = load_file(tmp_path / "other" / "model.safetensors")
    renamed = {name.replace("layers.2.mlp", "layers.2.own"): tensor for name, tensor in tensors.items()}
    save_file(renamed, tmp_path / "other" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ArtifactError, match=r"no tensor model\.layers\.2\.mlp"):
        load_backbone(str(tmp_path / "other"), head=True, layers=1)


def test_neither_workers_nor_the_size_of_a_request_change_anything(
    llama: Any, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, double = batch_for("choice"), Double(llama)
    replies = [offline(double, backbone, workers=workers).score(batch, POINTS) for workers in (1, 3)]
    double.computed.clear()
    monkeypatch.setattr(vllm, "_BYTES", 2 * 4 * 32 * 40)
    replies.append(offline(double, backbone).score(batch, POINTS))
    assert max(double.computed) < len(batch.forms)
    assert sum(double.computed) == 1 + len(POINTS) * len(batch.forms)
    assert all(same(reply, replies[0]) for reply in replies)


def test_long_texts_are_cut_to_the_room_of_the_server(llama: Any, backbone: Backbone) -> None:
    oracle, batch = offline(Double(llama, room=20), backbone), batch_for("pair")
    assert oracle.info.max_tokens == 19
    assert oracle.score(batch, POINTS).cut > 0
    assert offline(Double(llama, room=20), backbone, max_tokens=15).info.max_tokens == 15


def test_numbers_that_are_not_finite_never_leave(llama: Any, backbone: Backbone) -> None:
    double = Double(llama)
    oracle = offline(double, backbone)
    sent = list(double.computed)
    for value, said in ((np.nan, "points hold NaN"), (3e38, "embeddings of a prompt hold NaN or infinity")):
        with pytest.raises(OracleError, match=said):
            oracle.score(batch_for("pair"), np.full((1, 1, 4), value))
    assert (double.computed, double.garbage) == (sent, 0)


def test_a_word_that_the_server_does_not_tell(llama: Any, backbone: Backbone) -> None:
    oracle = offline(Double(llama, given=False), backbone)
    assert oracle.info.device.endswith("logprobs=20")
    with pytest.raises(OracleError, match=r"not among the 20 most probable.*--max-logprobs") as raised:
        oracle.score(batch_for("pair"), POINTS)
    assert raised.value.exit_code == 69


def test_words_that_begin_alike_and_texts_without_a_gap(llama: Any, backbone: Backbone) -> None:
    oracle = offline(Double(llama), backbone)
    task = Task.model_validate(tiny_prompt.PAIR | {"labels": {"0": "相同", "1": "相似"}})
    example = task.example({"text_a": "甲", "text_b": "乙", "label": "1"})
    batch = labelled(task, [example], for_loss=True, readout="verbalizer").batch
    with pytest.raises(DataError, match="'相同' and '相似' begin with the same token"):
        oracle.score(batch, POINTS)
    with pytest.raises(DataError, match="no gap"):
        oracle.score(labelled(task, [example], for_loss=True).batch, POINTS)


@pytest.mark.parametrize("at", [0, 2])
@pytest.mark.parametrize("fault", [*TRANSIENT, *MALFORMED])
def test_what_passes_is_tried_again(fault: str, at: int, llama: Any, backbone: Backbone) -> None:
    double, batch = Double(llama), batch_for("pair")
    said = TRANSIENT[fault] if fault in TRANSIENT else MALFORMED[fault](Double(llama))
    oracle = offline(double, backbone, embeds(at, said))
    before = len(double.computed)
    assert same(oracle.score(batch, POINTS), offline(Double(llama), backbone).score(batch, POINTS))
    assert len(double.computed) == before + len(POINTS), "a candidate is computed once"


@pytest.mark.parametrize("fault", TRANSIENT)
def test_what_does_not_pass_ends_after_four_tries(fault: str, llama: Any, backbone: Backbone) -> None:
    sent: list[int] = []

    def handle(request: httpx2.Request) -> Any:
        if sent:
            sent.append(1)
            return TRANSIENT[fault](request)
        return None

    oracle = offline(Double(llama), backbone, handle)
    sent.append(0)
    with pytest.raises(OracleError, match=r"tries: 4.*bbprompt resume") as raised:
        oracle.score(batch_for("pair"), POINTS[:1])
    assert (raised.value.exit_code, len(sent)) == (69, 5)


@pytest.mark.parametrize("fault", MALFORMED)
def test_a_malformed_answer_is_asked_for_twice(fault: str, llama: Any, backbone: Backbone) -> None:
    double = Double(llama)
    said, asked = MALFORMED[fault](double), []

    def handle(request: httpx2.Request) -> Any:
        if not opened():
            return None
        asked.append(1)
        return said(request)

    oracle = offline(double, backbone, handle)
    with pytest.raises(OracleError, match="malformed"):
        oracle.score(batch_for("pair"), POINTS[:1])
    assert len(asked) == 2


@pytest.mark.parametrize("fault", FINAL)
def test_what_is_final_is_not_tried_again(fault: str, llama: Any, backbone: Backbone) -> None:
    answer, said = FINAL[fault]
    oracle = offline(Double(llama), backbone, embeds(0, answer))
    with pytest.raises(OracleError, match=said) as raised:
        oracle.score(batch_for("pair"), POINTS[:1])
    assert "\x1b" not in str(raised.value)
    oracle.score(batch_for("pair"), POINTS[:1])


SERVERS: dict[str, tuple[dict[str, Any], str, str | None, str]] = {
    "wrong token": ({"token": TOKEN}, "", TOKEN + "x", "BBPROMPT_TOKEN"),
    "no token": ({"token": TOKEN}, "", None, "BBPROMPT_TOKEN"),
    "other model": ({}, "/other", None, r"no model 'other' there \(tiny\)"),
    "several models": ({"names": ("a", "b")}, "", None, r"several models \(a, b\)"),
    "no embeddings": ({"embeds": False}, "", None, "--enable-prompt-embeds"),
    "no log-probabilities": ({"given": False, "most": 0}, "", None, "--max-logprobs"),
    "odd version": ({"version": "0.32\n"}, "", None, "malformed: it does not tell a version"),
}


@pytest.mark.parametrize("case", SERVERS)
def test_servers_that_cannot_serve(case: str, llama: Any) -> None:
    settings, model, token, said = SERVERS[case]
    with pytest.raises(OracleError, match=said) as raised:
        Completions(f"vllm+http://test:80{model}", token, EAGER, transport=Double(llama, **settings).transport())
    assert raised.value.exit_code == 69
    assert TOKEN not in str(raised.value)


@pytest.mark.parametrize(
    ("path", "answer", "said"),
    [
        ("/version", plain(404), "no vLLM server there"),
        ("/v1/models", plain(200, json={"data": []}), "does not list models"),
        ("/v1/models", plain(200, json={"data": [{"id": "a", "max_model_len": "9"}]}), "does not list models"),
        ("/v1/completions", plain(404, text="Not Found"), "status 404"),
        ("/v1/completions", plain(200, json={"choices": []}), "malformed"),
    ],
)
def test_servers_that_are_something_else(path: str, answer: Any, said: str, llama: Any) -> None:
    good = Double(llama).transport()
    transport = httpx2.MockTransport(lambda r: answer(r) if r.url.path == path else good.handle_request(r))
    with pytest.raises(OracleError, match=said):
        Completions("vllm+http://test:80", None, EAGER, transport=transport)


def test_nobody_there() -> None:
    with pytest.raises(OracleError, match="cannot be reached"):
        Completions(f"vllm+http://127.0.0.1:{free_port()}", None, EAGER)


def test_a_model_whose_name_is_a_path(llama: Any) -> None:
    for name in ("org/model", "/models/tiny"):
        server = Completions(f"vllm+http://test:80/{name}", transport=Double(llama, names=("x", name)).transport())
        assert server.model == name
        server.close()


@pytest.mark.parametrize(
    "url", ["vllm+http://", "vllm+http://a", "vllm+http://u:secret@a:1", "vllm+http://a:1/m?secret", "vllm+http://a:0"]
)
def test_what_is_no_url(url: str) -> None:
    with pytest.raises(UsageError, match=r"vllm\+http://HOST:PORT") as raised:
        Completions(url)
    assert "secret" not in str(raised.value)


def test_another_model_behind_the_server(models: dict[str, Any], backbone: Backbone) -> None:
    with pytest.raises(OracleError, match=r"embeddings of .* are not those of tiny there.*--backbone"):
        offline(Double(models["qwen2"]), backbone)
    with pytest.raises(OracleError, match="are not those of"):
        offline(Double(models["qwen2"], given=False), backbone)

    class Wide:
        config = type("C", (), {"hidden_size": 64, "vocab_size": models["llama"].config.vocab_size})

    wide: Any = Double(models["llama"])
    wide.width = Wide.config.hidden_size
    with pytest.raises(OracleError, match="hidden_size 32 does not match"):
        offline(wide, backbone)


def test_what_embeddings_cannot_say_is_refused_before_anything_is_asked(
    folders: dict[str, Path], tiny_prompts: Path, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    nowhere = "vllm+http://127.0.0.1:1"
    with pytest.raises(UsageError, match=r"what a 'span' readout needs.*bbprompt serve"):
        open_oracle(nowhere, ModularPrompt.load(tiny_prompts))
    whole = load_backbone(str(folders["llama"]), head=True)
    deep = random_prompt(SUBSPACE.model_copy(update={"layers": "all"}), facts_of(whole), 3)
    with pytest.raises(UsageError, match="act before 3 layers"):
        open_oracle(nowhere, deep)
    for changes, said in (({"layers": "all"}, "act before all layers"), ({"readout": "span"}, "'span' readout")):
        with pytest.raises(UsageError, match=said):
            measure_backbone(nowhere, [], SUBSPACE.model_copy(update=changes), backbone=str(folders["llama"]))
    for flags in ({"device": "cpu"}, {"batch_tokens": 9}, {"dtype": "float32"}, {"ray": "local"}):
        with pytest.raises(UsageError, match=r"--ray|where the server is started"):
            open_oracle(nowhere, prompt_for(backbone), **flags)  # type: ignore[arg-type]


def test_a_model_that_changes_embeddings_is_refused(llama: Any, folders: dict[str, Path]) -> None:
    own = load_backbone(str(folders["llama"]), head=True, layers=1)
    forward = own.model.forward

    def scaled(**inputs: Any) -> Any:
        if "inputs_embeds" in inputs:
            inputs["inputs_embeds"] = inputs["inputs_embeds"] * 1.01
        return forward(**inputs)

    own.model.forward = scaled  # type: ignore[assignment]
    with pytest.raises(UsageError, match=r"--backend vllm\+http://.*: this backbone changes embeddings"):
        offline(Double(llama), own)


def test_the_doctor_says_how_a_server_is_asked(llama: Any, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.delenv("BBPROMPT_TOKEN", raising=False)
    found = {}
    for name, settings in {"new": {}, "all": {"given": False, "most": -1}, "old": {"given": False}}.items():
        with answering(Double(llama, **settings).http) as place:
            (found[name],) = (f for f in examine(f"vllm+http://{place}", {}) if f.name == "backend")
    assert [found[name].state for name in found] == ["ok", "ok", "note"]
    assert "label words by logprob_token_ids" in found["new"].value
    assert "at most 127 tokens, takes embeddings, label words by logprobs=20" in found["old"].value
    assert "--max-logprobs" in found["old"].fix
    (gone,) = (f for f in examine("vllm+http://127.0.0.1:1", {}) if f.name == "backend")
    assert gone.state == "problem"
