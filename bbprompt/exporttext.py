"""What stands beside an exported prompt: how to apply it, and a client that sends it to vLLM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["CLIENT", "peft_card", "rows_card", "tensors_card"]

#: Labels one text through a vLLM server; it stands on its own beside `prompt_embeds.safetensors` and `bbprompt.json`.
CLIENT = '''\
"""Label a text with the tuned prompt, by a vLLM server: python client.py URL [--model NAME_OR_DIR] field=text ...

Start the server with: vllm serve MODEL --enable-prompt-embeds --dtype float32. Where it has an --api-key, set
BBPROMPT_TOKEN to it here. Never offer it to people that you do not trust: it unpacks what it is sent with torch.load.
"""

import argparse
import base64
import io
import json
import math
import os
import urllib.error
import urllib.request
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).parent


def main() -> None:
    facts = json.loads((HERE / "bbprompt.json").read_text(encoding="utf-8"))
    parser = argparse.ArgumentParser(description="Label a text with the tuned prompt, by a vLLM server.")
    parser.add_argument("url", help="such as http://127.0.0.1:8000")
    parser.add_argument("fields", nargs="+", metavar="field=text")
    parser.add_argument("--model", default=facts["backbone"]["id"], help="as the server calls it, and as it loads here")
    given = parser.parse_args()
    fields = dict(field.partition("=")[::2] for field in given.fields)
    if set(fields) != (needed := {piece["field"] for piece in facts["text"] if "field" in piece}):
        raise SystemExit(f"give these fields, each as field=text: {', '.join(sorted(needed))}")
    text = "".join(piece["literal"] if "literal" in piece else fields[piece["field"]] for piece in facts["text"])

    tokenizer = AutoTokenizer.from_pretrained(given.model)
    plain = tokenizer.backend_tokenizer
    plain.no_truncation()
    plain.encode_special_tokens = True  # "</s>" in a text is text; a call of the tokenizer itself would reset it
    ids = plain.encode(text, add_special_tokens=False).ids
    if (unknown := tokenizer.unk_token_id) is not None:  # some vocabularies match special tokens even so
        ids = [unknown if token in tokenizer.all_special_ids else token for token in ids]
    tokens = [option.get("tokens") or [option["token"]] for option in facts["options"]]
    embed = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32).get_input_embeddings()
    front = load_file(HERE / "prompt_embeds.safetensors")["prompt_embeds"]
    with torch.no_grad():
        rows = torch.cat([front, embed(torch.tensor(ids, dtype=torch.long))])
    if (over := len(rows) - facts["backbone"]["max_tokens"]) > 0:
        raise SystemExit(f"the text is {over} tokens too many for what the prompt was tuned with; shorten it")
    if not rows.isfinite().all():
        raise SystemExit("the embeddings are not finite; the server would answer with garbage")
    packed = io.BytesIO()
    torch.save(rows, packed)

    body = {
        "model": given.model,
        "prompt_embeds": base64.b64encode(packed.getvalue()).decode("ascii"),
        "max_tokens": 1,
        "temperature": 0,
        "logprobs": 0,
        "logprob_token_ids": [token for own in tokens for token in own],
        "return_tokens_as_token_ids": True,
    }
    request = urllib.request.Request(
        given.url.rstrip("/") + "/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    if token := os.environ.get("BBPROMPT_TOKEN"):
        request.add_unredirected_header("Authorization", f"Bearer {token}")  # to this server and no other
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            found = json.load(reply)["choices"][0]["logprobs"]["top_logprobs"][0]
    except urllib.error.HTTPError as error:
        raise SystemExit(f"the server refused: {error}: {error.read(400).decode('utf-8', 'replace')}") from None
    except urllib.error.URLError as error:
        raise SystemExit(f"no answer from {given.url}: {error.reason}") from None
    try:
        scores = [sum(found[f"token_id:{token}"] for token in own) / len(own) for own in tokens]
    except KeyError as missing:
        raise SystemExit(f"the server left out {missing}; it needs a vLLM that knows logprob_token_ids") from None
    offsets = facts["readout"]["offsets"] or [0.0] * len(scores)
    scores = [score + offset for score, offset in zip(scores, offsets)]
    weights = [math.exp(score - max(scores)) for score in scores]
    shares = [weight / sum(weights) for weight in weights]
    labels = [option["label"] for option in facts["options"]]
    print(json.dumps({"label": labels[shares.index(max(shares))], "probabilities": dict(zip(labels, shares))}))


if __name__ == "__main__":
    main()
'''

_HOOKS = """\
```python
import json
from pathlib import Path

import torch
from safetensors.torch import load_file

here = Path(".")  # this directory
facts = json.loads((here / "bbprompt.json").read_text(encoding="utf-8"))
tensors = load_file(here / "prompt.safetensors")


def add_prompt(blocks, special=1):
    \"\"\"Add the prompt before each of the blocks that has one; `special` tokens stand before the placeholders.\"\"\"

    def hook_for(prompt):
        def hook(module, args, kwargs):
            states = (args[0] if args else kwargs["hidden_states"]).clone()
            states[:, special : special + len(prompt)] += prompt
            return ((states, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": states})

        return hook

    return [
        block.register_forward_pre_hook(hook_for(prompt), with_kwargs=True)
        for block, prompt in zip(blocks, tensors["prompt"])
    ]
```
"""

_PREPEND = """\
```python
import json
from pathlib import Path

import torch
from safetensors.torch import load_file

here = Path(".")  # this directory
facts = json.loads((here / "bbprompt.json").read_text(encoding="utf-8"))
tensors = load_file(here / "prompt.safetensors")


def encoder_states(model, ids):
    \"\"\"Last states [1, P + S, H] of BERT and its kin for one text `ids` [1, S]; the first P are the prompt's.\"\"\"
    rows = model.embeddings(input_ids=ids)  # with token_type_ids of ones for CPT
    return model.encoder(torch.cat([tensors["prompt"], rows], dim=1)).last_hidden_state


def embeddings(model, ids):
    \"\"\"What a causal model or T5's encoder takes as `inputs_embeds` [1, P + S, H] for one text `ids` [1, S].\"\"\"
    return torch.cat([tensors["prompt"], model.get_input_embeddings()(ids)], dim=1)
```
"""

_READOUTS = {
    "span": (
        "The options stand behind the text, each closed by `，`. With `head.weight` and `head.bias` a last state has a "
        "start and an end logit. An option scores the start log-probability at its first token plus the end "
        "log-probability at its last, both normalised over `readout.support` (the options, or the sequence)."
    ),
    "prototype": (
        "The mean of a text's last states (those at the prompt left out unless `readout.pooling.pool_prompt`) is its "
        "embedding, `readout.pooling.prefix` before the text. An option is embedded as `task.prototype` says and "
        "scores `readout.pooling.scale` times the cosine. A pair whose task has `same` is two texts; with g going "
        "evenly from 1 for that option to -1 for the last on the other side, an option scores g times the scale times "
        "(cosine - `readout.pooling.threshold`)."
    ),
    "verbalizer": (
        "The text ends at, or has, a gap for an option word (`task.cloze`, or `task.template` up to its last question "
        "mark). A masked model scores a word by the mean logit of its tokens at mask tokens, a causal one by the logit "
        "of its first token at the last position. With `readout.synonyms` an option scores by the mean over all words "
        "of its label in `task.words`, and the mask tokens are as many as the longest of all words has."
    ),
}


def tensors_card(facts: Mapping[str, Any]) -> str:
    """`README.md` of plain tensors."""
    prompt, kind = facts["prompt"], facts["readout"]["kind"]
    layers, length = prompt["layers"], prompt["length"]
    prepended = prompt["injection"] == "prepend"
    head = ", `head.weight` [2, H] and `head.bias` [2]" if kind == "span" else ""
    offsets = ", `offsets` of the options" if facts["readout"]["offsets"] else ""
    return f"""{_title(facts)}
`prompt.safetensors` holds `prompt` [{layers}, {length}, {prompt["hidden"]}] (layers, positions, hidden size; float32),
`placeholders` [{length}] ({"-1 for no token" if prepended else "token ids"}){head}{offsets}.
`bbprompt.json` says the rest: backbone, readout, task.

## How to apply it

{_prepended(length) if prepended else _added(length, layers)}
{_READOUTS[kind]} Offsets, where there are some, are added to the scores. The best option wins.
{_weights(facts)}"""


def _added(length: int, layers: int) -> str:
    return f"""\
A sequence is: the special token that the tokenizer puts first ([CLS], <s>; some have none), the {length} placeholders,
the text, and for encoders the special token at the end. Positions count from the front as always. Before each of the
first {layers} blocks, `prompt[layer]` is **added** to the states at the placeholders; behind the embeddings and their
LayerNorm, where there is one. CPT models get token type 1 everywhere, others 0.

{_HOOKS}
`add_prompt(model.encoder.layer)` does it for BERT and its kin, `add_prompt(model.layers)` for Llama and the like,
`add_prompt(model.h)` for GPT-2; `special=0` where the tokenizer puts nothing first.
"""


def _prepended(length: int) -> str:
    return f"""\
A sequence is: the {length} rows of the prompt, the special token that the tokenizer puts first ([CLS], <s>; some have
none), the text, and for encoders the special token at the end. The rows are **no tokens**. An encoder has them behind
its embedding layer, without position, token type or LayerNorm, and its tokens keep the positions that they have without
them. A causal model and T5 are given them as embeddings, in the first positions. All tokens attend to them.

{_PREPEND}"""


def rows_card(facts: Mapping[str, Any]) -> str:
    """`README.md` of rows before the text."""
    usage = " ".join(f"{piece['field']}=…" for piece in facts["text"] if "field" in piece)
    client = (
        f"`python client.py http://127.0.0.1:8000 {usage}` labels a text by a vLLM server that was started with\n"
        "`--enable-prompt-embeds` (and `--dtype float32`, to be exact). Where the server has an `--api-key`,\n"
        "set the environment variable `BBPROMPT_TOKEN` to it; it is sent as `Authorization: Bearer`."
        if facts["options"] and facts["options"][0].keys() & {"token", "tokens"}
        else "There is no client here: the words that options are read by depend on the example."
    )
    shape = f"[{facts['rows']['count']}, {facts['prompt']['hidden']}]"
    return f"""{_title(facts)}
`prompt_embeds.safetensors` holds `prompt_embeds` {shape} (tokens, hidden size; float32), the embeddings that stand
before a text.{_special(facts)}
`bbprompt.json` has the pieces of the text and the options' words with their tokens.

## How to apply it

Tokenize the text **without** special tokens, embed it with the model's own embedding matrix, and put the rows before
it; feed the whole as `inputs_embeds` (transformers) or `prompt_embeds` (vLLM).
{_VERBALIZER}

{client}
{_weights(facts)}"""


def peft_card(facts: Mapping[str, Any], kind: str) -> str:
    """`README.md` of a PEFT directory of the kind PROMPT_TUNING or PREFIX_TUNING."""
    what = "keys and values of every layer" if kind == "PREFIX_TUNING" else "embeddings"
    return f"""{_title(facts)}
A PEFT adapter of the kind {kind} with {facts["rows"]["count"]} virtual tokens ({what}).{_special(facts)}
`bbprompt.json` has the pieces of the text and the options' words with their tokens.

## How to apply it

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM


def load(model_dir, adapter_dir="."):
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype="float32")
    return PeftModel.from_pretrained(model, adapter_dir).eval()
```

Tokenize the text **without** special tokens, one text at a time or padded on the right with an attention mask.
{_VERBALIZER}
{_weights(facts)}"""


_VERBALIZER = (
    "An option scores the logit of its `token` (the mean over its `tokens`, where it has several) behind the last\n"
    "token of the text, plus its offset where `readout.offsets` has some; the best one wins."
)


def _title(facts: Mapping[str, Any]) -> str:
    test, run = facts["test"], facts["run"]
    return f"""# A prompt for {facts["task"]["name"]} on {facts["backbone"]["id"]}

Tuned by `{run["method"]}` of bbprompt {facts["bbprompt"]} (seed {run["seed"]}): {test["metric"]} {test["value"]:.4f} on
{test["n"]} test examples (standard error {test["stderr"]:.4f}).
"""


def _special(facts: Mapping[str, Any]) -> str:
    special = facts["rows"]["special"]
    which = "last" if facts["prompt"]["injection"] == "prepend" else "first"
    return f"\nThe {which} {len(special)} stand for the tokenizer's own special tokens." if special else ""


def _weights(facts: Mapping[str, Any]) -> str:
    backbone = facts["backbone"]
    terms = f"\nLicence of the prompts it was made from: {facts['license']}\n" if facts["license"] else ""
    return f"""
## The model

The prompt belongs to the weights with digest `{backbone["digest"][:16]}…`; `load_backbone("{backbone["id"]}")` of
`bbprompt.backends.backbone` finds them and says their digest. The run computed in {backbone["precision"]} and read at
most {backbone["max_tokens"]} tokens, prompt included.
{terms}"""
