"""What a server counts, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

__all__ = ["NOWHERE", "Metrics"]

#: The route of a request that came to none: refused before, or for a path that there is not.
NOWHERE = "none"

_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """Counters of one server, in a registry of their own.

    Attributes:
        calls: Candidates that were scored on a batch.
        repeated: Requests that were answered from an answer that was there already.
        texts: Texts that were scored, candidates times texts.
        tokens: Tokens that were scored, candidates times those of the texts, prompt positions included. What candidates
            share counts for each of them, though it is computed once.
        tokens_cut: Tokens that did not fit the model.
        refused: Answers with a status of 400 or more, by status; but for those to what is no HTTP.
        failed: Requests at which the model failed.
        waiting: Requests that wait for the model, the one it works on included.
        batches: Batches that are kept.
        requests: Seconds from a request's headers to the end of its answer, by route; `NOWHERE` for none.
        seconds: Seconds that the model took for a forward.
        together: Requests that a forward answered.
        parted: Forwards that failed for several requests together, each of which was then asked for alone.
        candidates: Candidates in a request.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        name, to = "bbprompt", self.registry
        self.calls = Counter(f"{name}_calls", "Candidates scored on a batch.", registry=to)
        self.repeated = Counter(f"{name}_repeated", "Requests answered without computing them again.", registry=to)
        self.texts = Counter(f"{name}_texts", "Texts scored, candidates times texts.", registry=to)
        self.tokens = Counter(f"{name}_tokens", "Tokens scored, candidates times those of the texts.", registry=to)
        self.tokens_cut = Counter(f"{name}_tokens_cut", "Tokens that did not fit the model.", registry=to)
        self.refused = Counter(f"{name}_refused", "Answers with a status of 400 or more.", ["status"], registry=to)
        self.failed = Counter(f"{name}_failed", "Requests at which the model failed.", registry=to)
        self.waiting = Gauge(f"{name}_waiting", "Requests at the model or waiting for it.", registry=to)
        self.batches = Gauge(f"{name}_batches", "Batches kept.", registry=to)
        self.requests = Histogram(
            f"{name}_request_seconds", "Time to answer a request.", ["route"], buckets=_SECONDS, registry=to
        )
        self.seconds = Histogram(f"{name}_model_seconds", "Model time of a forward.", buckets=_SECONDS, registry=to)
        self.together = Histogram(f"{name}_together", "Requests that a forward answered.", buckets=_SIZES, registry=to)
        self.parted = Counter(f"{name}_parted", "Forwards for several requests that failed.", registry=to)
        self.candidates = Histogram(f"{name}_candidates", "Candidates in a request.", buckets=_SIZES, registry=to)

    def text(self) -> bytes:
        """All of it in the text format of Prometheus."""
        return generate_latest(self.registry)
