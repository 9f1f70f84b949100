"""The client of an exported prompt, run as its README says against a server that speaks as vLLM does."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import servers
import tiny_prompt
import torch
import yaml
from test_verbalizer import causal_dir
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from vllmdouble import Double

import bbprompt
from bbprompt.export import export_prompt
from bbprompt.predict import load_prompt

SPOKEN = {
    "name": "spoken",
    "type": "single",
    "template": "{text}?",
    "cloze": "{text} {gap}",
    "labels": {"-": "bad", "+": "good"},
    "metric": "accuracy",
    "sources": ["made up"],
}
METHOD = {
    **{"name": "cloze", "summary": "s", "source": "s", "prompts": "none", "gates": "sigmoid"},
    **{"mixing": "normalized", "select": "both-losses"},
    "projection": {
        **{"readout": "verbalizer", "prompt_length": 2, "dim": 4, "scale": 2.0, "placeholder": 200, "layers": "input"},
    },
    "prompt": {
        **{"popsize": 4, "sigma_first": 1.0, "sigma": 1.0, "keep": "improving", "dev_every": 8, "layout": "joint"},
    },
}


def spoken_records(count: int, begin: int) -> list[dict[str, Any]]:
    """Lines of English whose last character is white space as often as not."""
    ends = ("", " ", "  ", ".")
    return [
        {"text": f"line {i} is {'fine' if i % 2 else 'poor'}{ends[i % 4]}", "label": "+" if i % 2 else "-"}
        for i in range(begin, begin + count)
    ]


def bytes_dir(folder: Path) -> Path:
    """Write a tiny GPT-2 on bytes, in whose vocabulary white space is a part of the word behind it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merged = [("Ġ", "g"), ("Ġ", "b")]
    vocabulary = {piece: i for i, piece in enumerate([*alphabet, *("".join(pair) for pair in merged), "<|end|>"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merged))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 128, "initializer_range": 0.3}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        GPT2LMHeadModel(GPT2Config(vocab_size=len(vocabulary), **sizes)).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", unk_token="<|end|>").save_pretrained(
        folder
    )
    return folder


@pytest.fixture(scope="module")
def exports(
    tiny_pair_data: Path, tiny_single_data: Path, tiny_choice_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, Path, Path]]:
    """Run, export and model of each case."""
    root = tmp_path_factory.mktemp("exports")
    spoken = {"train": spoken_records(80, 0), "dev": spoken_records(40, 100), "test": spoken_records(20, 200)}
    llama, gpt2 = causal_dir(root / "llama", "llama"), bytes_dir(root / "gpt2")
    tasks = {
        "pair": (tiny_pair_data, llama, False),
        "pair with offsets": (tiny_pair_data, llama, True),
        "seven topics with offsets": (tiny_single_data, llama, True),
        "white space": (tiny_prompt.data_dir(root / "spoken", SPOKEN, spoken), gpt2, False),
        "white space with offsets": (root / "spoken", gpt2, True),
        "choice": (tiny_choice_data, llama, False),
    }
    found = {}
    for name, (data, model, calibrate) in tasks.items():
        file = root / ("cloze-offsets.yaml" if calibrate else "cloze.yaml")
        file.write_text(yaml.safe_dump(METHOD | {"name": file.stem, "calibrate": calibrate}), encoding="utf-8")
        found[name] = root / f"run {name}", root / f"export {name}", model
        bbprompt.tune(
            task=str(data / "task.yaml"),
            data=str(data),
            method=str(file),
            backbone=str(model),
            budget=24,
            seed=3,
            threads=1,
            max_tokens=64,
            test_limit=4,
            run_dir=found[name][0],
        )
        export_prompt(found[name][0], "prompt-embeds", found[name][1])
    return found


@pytest.fixture
def serving(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Opens a server for a model, and closes it in the end."""
    running: list[Any] = []

    def open_(model: Path, **settings: Any) -> tuple[str, Double]:
        stock = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        double = Double(stock, names=(str(model),), **settings)
        context = servers.answering(double.http)
        running.append(context)
        return f"http://{context.__enter__()}", double

    yield open_
    for context in running:
        context.__exit__(None, None, None)


def asked(out: Path, url: str, fields: Mapping[str, Any], **more: str) -> subprocess.CompletedProcess[str]:
    """What the client says in a process of its own, which knows nothing of bbprompt."""
    words = [sys.executable, "client.py", url, *(f"{name}={text}" for name, text in fields.items())]
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "BBPROMPT_TOKEN")}
    return subprocess.run(words, cwd=out, env=environment | more, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("name", "records"),
    [
        ("pair", tiny_prompt.pair_records(1, 9)),
        ("pair with offsets", tiny_prompt.pair_records(1, 9)),
        ("seven topics with offsets", tiny_prompt.single_records(1, 9)),
        ("white space", [{"text": "line 7 = fine  "}]),
        ("white space with offsets", [{"text": "<|end|> \n"}]),
    ],
)
def test_it_says_what_predict_says(
    name: str, records: list[dict[str, Any]], exports: dict[str, tuple[Path, Path, Path]], serving: Any
) -> None:
    run, out, model = exports[name]
    facts = json.loads((out / "bbprompt.json").read_text(encoding="utf-8"))
    assert bool(facts["readout"]["offsets"]) is ("offsets" in name)
    url, double = serving(model)
    with load_prompt(run, device="cpu", threads=1) as prompt:
        expected = prompt.predict(records)
    for record, wanted in zip(records, expected, strict=True):
        fields = {name: text for name, text in record.items() if name != "label"}
        done = asked(out, url, fields)
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        assert found["label"] == wanted.label
        assert found["probabilities"] == pytest.approx(dict(wanted.probabilities), abs=2e-5)
    assert double.computed == [1] * len(records)
    assert double.garbage == 0


def test_it_ends_in_a_line_where_there_is_no_answer(
    exports: dict[str, tuple[Path, Path, Path]], serving: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, out, model = exports["pair"]
    fields = {"text_a": "的", "text_b": "一"}
    url, double = serving(model, token="secret-of-the-server")
    for where, given, words in (
        (url, fields, "401"),
        (url, fields | {"text_a": "的" * 80}, "tokens too many"),
        (url, {"text_a": "的"}, "text_a, text_b"),
        ("http://127.0.0.1:1", fields, "no answer from"),
    ):
        monkeypatch.setattr(sys, "argv", ["client.py", where, *(f"{name}={text}" for name, text in given.items())])
        # A message is what the process would write before it ends with 1.
        with pytest.raises(SystemExit, match=words):
            runpy.run_path(str(out / "client.py"), run_name="__main__")
    assert double.computed == []
    assert asked(out, url, fields, BBPROMPT_TOKEN="secret-of-the-server").returncode == 0


def test_options_of_the_example_have_no_client(exports: dict[str, tuple[Path, Path, Path]]) -> None:
    _, out, _ = exports["choice"]
    assert not (out / "client.py").exists()
    assert "There is no client here" in (out / "README.md").read_text(encoding="utf-8")
