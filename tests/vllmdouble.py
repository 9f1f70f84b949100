"""A vLLM server for tests: strict, on a real causal model, answering in the form in which vLLM 0.32 does."""

from __future__ import annotations

import base64
import binascii
import io
import json
import threading
from collections.abc import Mapping
from typing import Any

import httpx2
import torch

MODEL = "tiny"
KEYS = {
    *("model", "prompt", "prompt_embeds", "max_tokens", "temperature"),
    *("logprobs", "logprob_token_ids", "return_tokens_as_token_ids"),
}
Reply = tuple[int, dict[str, str], bytes]


class Double:
    """One model, or several names of it.

    Args:
        model: A stock causal model.
        embeds: Whether the server was started with --enable-prompt-embeds.
        given: Whether it is new enough to know logprob_token_ids.
        most: --max-logprobs, -1 for any number.
        room: --max-model-len.
        token: --api-key.
        names: Of its models.
        version: What it says of itself.
    """

    def __init__(
        self,
        model: Any,
        *,
        embeds: bool = True,
        given: bool = True,
        most: int = 20,
        room: int = 128,
        token: str | None = None,
        names: tuple[str, ...] = (MODEL,),
        version: str = "0.32.0",
    ) -> None:
        self.model, self.embeds, self.given, self.most, self.room = model, embeds, given, most, room
        self.token, self.names, self.version = token, names, version
        self.width = int(model.config.hidden_size)
        self.computed: list[int] = []  # texts of each request for embeddings that was answered
        self.garbage = 0
        self.lock = threading.Lock()

    def http(self, method: str, path: str, headers: Mapping[str, str], body: bytes) -> Reply:
        """Status, headers and body of an answer."""
        if path.startswith("/v1/") and self.token and headers.get("authorization") != f"Bearer {self.token}":
            return 401, {}, b'{"error":"Unauthorized"}'
        if (method, path) == ("GET", "/version"):
            return said(200, {"version": self.version})
        if (method, path) == ("GET", "/v1/models"):
            models = [{"id": name, "object": "model", "max_model_len": self.room} for name in self.names]
            return said(200, {"object": "list", "data": models})
        if (method, path) != ("POST", "/v1/completions"):
            return said(404, {"detail": "Not Found"})
        assert headers["content-type"] == "application/json"
        asked = json.loads(body)
        assert asked.keys() <= KEYS, asked.keys() - KEYS
        assert ("prompt" in asked) != ("prompt_embeds" in asked)
        assert (asked["max_tokens"], asked["temperature"]) == (1, 0)
        assert asked["return_tokens_as_token_ids"] is True
        if asked["model"] not in self.names:
            return refused(404, f"The model `{asked['model']}` does not exist.")
        with self.lock, torch.no_grad():
            return self.complete(asked)

    def complete(self, asked: dict[str, Any]) -> Reply:
        """The answer to a request for completions."""
        if "prompt" in asked:
            ids = torch.tensor([asked["prompt"]])
            assert ids.dtype == torch.int64
            texts = [self.model.get_input_embeddings()(ids)[0]]
        else:
            if not self.embeds:
                return refused(400, "You must set `--enable-prompt-embeds` to input `prompt_embeds`.")
            packed = asked["prompt_embeds"]
            try:
                texts = [unpacked(each) for each in ([packed] if isinstance(packed, str) else packed)]
            except (RuntimeError, binascii.Error, EOFError) as error:
                return refused(400, f"`prompt_embeds` could not be deserialized as a torch tensor: {error}")
            assert texts
            assert all(text.ndim == 2 and text.is_floating_point() for text in texts)
            if wrong := next((text.shape[1] for text in texts if text.shape[1] != self.width), None):
                return refused(400, f"`prompt_embeds` hidden_size {wrong} does not match hidden_size {self.width}.")
            self.garbage += sum(not bool(text.isfinite().all()) for text in texts)
            self.computed.append(len(texts))
        if (longest := max(map(len, texts))) + 1 > self.room:
            return refused(400, f"This model's maximum context length is {self.room} tokens, not {longest}.")
        count, vocabulary = asked.get("logprobs"), int(self.model.config.vocab_size)
        if count is not None and (vocabulary if count < 0 else count) > self.most >= 0:
            return refused(400, f"Requested sample logprobs of {count}, which is greater than max allowed: {self.most}")
        choices = []
        for index, text in enumerate(texts):
            logprobs = self.model(inputs_embeds=text[None]).logits[0, -1].log_softmax(-1)
            best = int(logprobs.argmax())
            told = {best, *logprobs.topk(vocabulary if count < 0 else count).indices.tolist()} if count else {best}
            if self.given:
                told |= set(asked.get("logprob_token_ids", ()))
            top = {f"token_id:{token}": float(logprobs[token]) for token in told}
            shown = None if count is None else {"top_logprobs": [top], "tokens": [f"token_id:{best}"]}
            choices.append({"index": index, "text": "x", "finish_reason": "length", "logprobs": shown})
        usage = {"prompt_tokens": sum(map(len, texts)), "completion_tokens": len(texts)}
        return said(200, {"object": "text_completion", "model": MODEL, "choices": choices[::-1], "usage": usage})

    def transport(self) -> httpx2.MockTransport:
        """The same without a network."""

        def handle(request: httpx2.Request) -> httpx2.Response:
            status, headers, body = self.http(request.method, request.url.path, request.headers, request.read())
            return httpx2.Response(status, headers=headers, content=body)

        return httpx2.MockTransport(handle)


def unpacked(text: str) -> torch.Tensor:
    """What a client packed."""
    tensor: torch.Tensor = torch.load(io.BytesIO(base64.b64decode(text, validate=True)), weights_only=True)
    return tensor


def said(status: int, value: Any) -> Reply:
    return status, {"content-type": "application/json"}, json.dumps(value).encode()


def refused(status: int, message: str) -> Reply:
    return said(status, {"error": {"message": message, "type": "BadRequestError", "code": status}})
