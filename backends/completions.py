"""The completions of a vLLM server: embeddings of a text in, log-probabilities of the next token out.

A request to `/v1/completions` carries one or more texts as `prompt_embeds`, each a float tensor (tokens, hidden) as
torch.save writes it, in base64; nothing is ever read in that form. It asks for one token, and of its distribution for
what `Way` says. A server is asked once, when it is connected to, which ways it knows.
"""

from __future__ import annotations

import base64
import io
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import unquote

import httpx2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bbprompt.backends.calls import Answer, Caller, Policy, plain
from bbprompt.errors import OracleError, UsageError
from bbprompt.wire import WireError

__all__ = ["SCHEMES", "Completions", "Way", "pack"]

_T = TypeVar("_T")
_Table = Mapping[str, Any]

#: Beginnings of a URL, and what is spoken there.
SCHEMES = {"vllm+http": "http", "vllm+https": "https"}
_URL = re.compile(r"(?P<scheme>[a-z+]+)://(?P<host>[A-Za-z0-9._-]+|\[[0-9a-fA-F:.]+\]):(?P<port>[0-9]{1,5})")
_SMALL = 65536  # bytes of an answer besides its numbers
_NUMBER = 64  # bytes of a token and its log-probability in JSON, at most
_WHOLE = 2**19  # tokens of a vocabulary, at most
_NONE = -9999.0  # in place of the logarithm of 0
#: How many of the most probable tokens are asked for where a server cannot be asked for given ones: all, or vLLM's
#: own limit for a request (`--max-logprobs`), or what every server of this kind gives.
_COUNTS = (-1, 20, 5)


@dataclass(frozen=True, slots=True)
class Way:
    """How the log-probabilities of given tokens are got.

    Attributes:
        given: The server is told which tokens (`logprob_token_ids`).
        most: Else so many of the most probable ones are got (`logprobs`), -1 for all, and the given must be among them.
    """

    given: bool
    most: int = 0

    def __str__(self) -> str:
        return "logprob_token_ids" if self.given else f"logprobs={self.most}"

    def asks(self, tokens: Sequence[int]) -> dict[str, Any]:
        """What a request says of it."""
        return {"logprobs": 0, "logprob_token_ids": list(tokens)} if self.given else {"logprobs": self.most}


class Completions:
    """One model of a vLLM server.

    Args:
        url: `vllm+http://HOST:PORT` or `vllm+https://`, and behind a slash the model where the server has several.
        token: The server's `--api-key`; None for nothing.
        policy: How patient to be.
        workers: Most requests at once.
        transport: Instead of the network.

    Attributes:
        url: As given.
        model: Name at the server.
        room: Longest text in tokens, so that there is one more for the answer.
        version: What the server says of itself.
        way: How it is asked.

    Raises:
        UsageError: What is no such URL.
        OracleError: Nobody answers there, the token is wrong, there is no such model, or it takes no embeddings.
    """

    def __init__(
        self,
        url: str,
        token: str | None = None,
        policy: Policy | None = None,
        workers: int = 1,
        transport: httpx2.BaseTransport | None = None,
    ) -> None:
        base, asked = _parts(url)
        self.url = url
        self._caller = Caller(base, token, policy or Policy(), workers, transport)
        try:
            self.version = self._caller.call("GET", "/version", self._version, most=_SMALL)
            models = self._caller.call("GET", "/v1/models", self._models, most=16 * _SMALL)
            self.model, self.room = self._chosen(models, asked)
            self._takes_embeddings()
            self.way = self._found_way()
        except BaseException:
            self.close()
            raise

    def score(self, texts: Sequence[Tensor], tokens: Sequence[int]) -> NDArray[np.float64]:
        """Log-probabilities `(N, E)` of E tokens behind each of N texts, tensors `(tokens, H)` of embeddings.

        Raises:
            OracleError: A number of a text is not finite, there is no answer, or it is not what was asked for.
        """
        if not all(bool(text.isfinite().all()) for text in texts):
            raise OracleError(f"{self.url}: the embeddings of a prompt hold NaN or infinity; nothing was sent")

        def pick(tables: Sequence[_Table]) -> NDArray[np.float64]:
            return np.array([[self._number(table, token) for token in tokens] for table in tables])

        return self._ask({"prompt_embeds": [pack(text) for text in texts]}, [len(text) for text in texts], tokens, pick)

    def difference(self, ids: Sequence[int], text: Tensor, tokens: Sequence[int]) -> float:
        """Largest difference of two log-probabilities behind a text that the server embeds and one embedded here.

        Args:
            ids: Token ids of the text.
            text: Their embeddings `(tokens, H)`.
            tokens: To compare, or those that the server tells where it cannot be told.
        """
        (there,) = self._ask({"prompt": list(ids)}, [len(ids)], tokens, list)
        (here,) = self._ask({"prompt_embeds": [pack(text)]}, [len(ids)], tokens, list)
        shared = [int(name.partition(":")[2]) for name in there.keys() & here.keys()]
        return max((abs(self._number(there, token) - self._number(here, token)) for token in shared), default=math.inf)

    def close(self) -> None:
        """Close the connections; safe to call twice."""
        self._caller.close()

    def _ask(
        self,
        texts: Mapping[str, Any],
        lengths: Sequence[int],
        tokens: Sequence[int],
        pick: Callable[[Sequence[_Table]], _T],
    ) -> _T:
        """What `pick` makes of the tables of log-probabilities behind some texts."""

        def read(answer: Answer) -> _T:
            self._expect(answer)
            return pick(_tables(answer.body, lengths))

        each = len(tokens) + 1 if self.way.given else _WHOLE if self.way.most < 0 else self.way.most + 1
        return self._post({**texts, **self.way.asks(tokens)}, read, len(lengths) * (_SMALL + _NUMBER * each))

    def _post(self, asked: Mapping[str, Any], read: Callable[[Answer], _T], most: int) -> _T:
        settings = {"model": self.model, "max_tokens": 1, "temperature": 0, "return_tokens_as_token_ids": True}
        body = json.dumps({**settings, **asked}).encode("ascii")
        return self._caller.call("POST", "/v1/completions", read, body=body, kind="application/json", most=most)

    def _number(self, table: _Table, token: int) -> float:
        value: Any = table.get(f"token_id:{token}")
        if value is None and not self.way.given:
            raise OracleError(
                f"{self.url}: token {token} is not among the {self.way.most} most probable, which is all that the "
                "server tells; start it with --max-logprobs -1, or give the task likelier `words`"
            )
        if type(value) not in (int, float) or not _NONE < value < 1e-3:  # NaN lies nowhere
            raise WireError(f"the log-probability of token {token} is {plain(repr(value))}")
        return float(value)

    def _version(self, answer: Answer) -> str:
        if answer.status == 404:
            raise OracleError(f"{self.url}: no vLLM server there; correct --backend")
        self._expect(answer)
        try:
            version = json.loads(answer.body)["version"]
            if not isinstance(version, str) or not version or plain(version) != version:
                raise ValueError
        except (ValueError, TypeError, LookupError, RecursionError) as error:
            raise WireError("it does not tell a version as vLLM does") from error
        return version

    def _models(self, answer: Answer) -> dict[str, int]:
        self._expect(answer)
        try:
            models = {str(model["id"]): model["max_model_len"] for model in json.loads(answer.body)["data"]}
            if not models or any(type(length) is not int or length < 2 for length in models.values()):
                raise ValueError
        except (ValueError, TypeError, LookupError, RecursionError) as error:
            raise WireError("it does not list models as vLLM does") from error
        return models

    def _chosen(self, models: dict[str, int], asked: str) -> tuple[str, int]:
        names = ", ".join(map(plain, sorted(models)))
        if not asked and len(models) > 1:
            raise OracleError(f"{self.url}: there are several models ({names}); name one behind a slash")
        name = asked or next(iter(models))
        if name not in models:
            raise OracleError(f"{self.url}: no model {plain(name)!r} there ({names}); correct --backend")
        return name, models[name] - 1

    def _takes_embeddings(self) -> None:
        """Ask with a text of the wrong width, which no model takes: the reason tells whether others are taken."""

        def read(answer: Answer) -> None:
            if "enable-prompt-embeds" in answer.body.decode("utf-8", "replace"):
                raise OracleError(f"{self.url}: the server takes no embeddings; start it with --enable-prompt-embeds")
            if answer.status != 400:
                self._expect(answer)

        self._post({"prompt_embeds": pack(torch.zeros(1, 1))}, read, _SMALL)

    def _found_way(self) -> Way:
        """The first way that the server knows, tried on tokens 0 and 1 behind token 0."""

        def knows(way: Way) -> bool:
            def read(answer: Answer) -> bool:
                if answer.status in (400, 422):
                    return False
                self._expect(answer)
                (table,) = _tables(answer.body, [1])
                return {"token_id:0", "token_id:1"} <= table.keys() if way.given else bool(table)

            return self._post({"prompt": [0], **way.asks([0, 1])}, read, _SMALL + _NUMBER * _WHOLE)

        ways = [Way(given=True), *(Way(given=False, most=count) for count in _COUNTS)]
        found = next((way for way in ways if knows(way)), None)
        if found is None:
            raise OracleError(f"{self.url}: the server tells no log-probabilities; start it with --max-logprobs -1")
        return found

    def _expect(self, answer: Answer) -> None:
        """Raise what a status means unless it is 200."""
        if answer.status == 200:
            return
        if answer.status in (401, 403):
            raise OracleError(f"{self.url}: missing or wrong token; set BBPROMPT_TOKEN to the server's --api-key")
        raise OracleError(f"{self.url}: refused (status {answer.status}): {_said(answer.body)}")


def _tables(body: bytes, lengths: Sequence[int]) -> list[_Table]:
    """The one table of log-probabilities behind each text, texts in order.

    Raises:
        WireError: The answer is no completion of one token for texts of these lengths.
    """
    try:
        value = json.loads(body)
        choices = sorted(value["choices"], key=lambda choice: int(choice["index"]))
        numbers, read = [choice["index"] for choice in choices], value["usage"]["prompt_tokens"]
        tables = [table for choice in choices for table in choice["logprobs"]["top_logprobs"]]
    except (ValueError, TypeError, LookupError, OverflowError, RecursionError) as error:
        raise WireError("it is no completion with log-probabilities") from error
    if numbers != list(range(len(lengths))) or read != sum(lengths):
        raise WireError(f"it is of {len(numbers)} texts, not of the {len(lengths)} that were sent, or of other lengths")
    if len(tables) != len(lengths) or not all(isinstance(table, dict) for table in tables):
        raise WireError("it has other than one token for each text")
    return tables


def pack(text: Tensor) -> str:
    """A tensor as vLLM takes it."""
    written = io.BytesIO()
    torch.save(text.contiguous().clone(), written)
    return base64.b64encode(written.getbuffer()).decode("ascii")


def _parts(url: str) -> tuple[str, str]:
    """The HTTP URL of the server, and the model, empty where none is named."""
    place, slash, model = url.partition("://")
    host, _, model = model.partition("/")
    found = _URL.fullmatch(f"{place}{slash}{host}")
    model = unquote(model)
    if found is None or found["scheme"] not in SCHEMES or not 1 <= int(found["port"]) <= 65535 or "?" in model:
        # Not shown: there may be a secret in it.
        raise UsageError(
            "--backend: expected vllm+http://HOST:PORT or vllm+http://HOST:PORT/MODEL; a token goes into BBPROMPT_TOKEN"
        )
    return f"{SCHEMES[found['scheme']]}://{host}", model


def _said(body: bytes) -> str:
    """The line of a refusal."""
    try:
        value = json.loads(body)["error"]
        return plain(str(value["message"] if isinstance(value, dict) else value))
    except (ValueError, TypeError, LookupError, RecursionError):
        return plain(body[:400].decode("utf-8", "replace"))
