"""The model behind a server of the Open Inference Protocol: inputs in, outputs out, whatever server it is."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Any

from numpy.typing import NDArray

from bbprompt.errors import DataError, OracleError
from bbprompt.oip import Tensors, read_question, reply_description, reply_refusal, reply_scores
from bbprompt.oracle import Oracle, TextBatch, check_scores
from bbprompt.serve.batches import Batches
from bbprompt.serve.settings import ServeSettings
from bbprompt.wire import OtherModel, ScoreRequest, WireError, check_model, decode_batch

__all__ = ["Responder"]


class _Refused(Exception):
    """A request that is answered with no: a word and a line."""


class Responder:
    """Answers requests with an oracle, one at a time, from any thread.

    A repeated request gets the answer that is there. Texts are kept by their digest; requests for texts that are not
    here (any longer, or because another replica got them) are refused with `texts` and come again with them.

    Args:
        oracle: The model.
        settings: Its limits; those of the server around it are the server's.
    """

    def __init__(self, oracle: Oracle, settings: ServeSettings | None = None) -> None:
        self._oracle, self._settings = oracle, settings or ServeSettings()
        self._batches = Batches(self._settings.batches, self._settings.lease, self._settings.room)
        self._replies: OrderedDict[str, dict[str, NDArray[Any]]] = OrderedDict()
        self._size = 0
        self._lock = threading.Lock()

    def answer(self, tensors: Tensors) -> dict[str, NDArray[Any]]:
        """Outputs for `tensors`; what is wrong with them is said in the reply.

        Raises:
            Exception: The model failed, which is not the request's fault.
        """
        try:
            with self._lock:
                return self._answer(tensors)
        except _Refused as refused:
            return reply_refusal(*refused.args)
        except WireError as error:
            return reply_refusal("message", str(error))
        except OtherModel as error:
            return reply_refusal("model", str(error))
        except DataError as error:
            return reply_refusal("data", str(error))
        except OracleError as error:
            return reply_refusal("oracle", str(error))

    def close(self) -> None:
        """Let go of the model."""
        self._oracle.close()

    def _answer(self, tensors: Tensors) -> dict[str, NDArray[Any]]:
        info, limits = self._oracle.info, self._settings
        asked = read_question(tensors, info, limits.points)
        if asked is None:
            return reply_description(info, limits.points, limits.texts)
        check_model(asked, info)
        if asked.call_id in self._replies:
            self._replies.move_to_end(asked.call_id)
            return dict(self._replies[asked.call_id])
        batch = self._texts(asked, tensors)
        longest = asked.longest_answer
        scores = self._oracle.score(batch, asked.points, asked.support, longest)
        check_scores(scores, batch, len(asked.points), answers=longest is not None, channels=info.channels)
        return self._keep(asked.call_id, reply_scores(asked.call_id, scores))

    def _texts(self, asked: ScoreRequest, tensors: Tensors) -> TextBatch:
        batch = self._batches.get(asked.batch)
        if batch is not None:
            return batch
        if "texts" not in tensors:
            raise _Refused("texts", "these texts are not kept here, or no longer; send them along")
        batch = decode_batch(tensors["texts"].tobytes(), most=self._settings.texts)
        if batch.digest() != asked.batch:
            raise WireError("the texts are not those of the digest")
        self._batches.put(asked.batch, batch, tensors["texts"].nbytes)
        return batch

    def _keep(self, call_id: str, reply: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        self._replies[call_id] = reply
        self._size += _bytes(reply)
        while self._size > self._settings.replies:
            self._size -= _bytes(self._replies.popitem(last=False)[1])
        return dict(reply)


def _bytes(reply: Tensors) -> int:
    return sum(array.nbytes for array in reply.values())
