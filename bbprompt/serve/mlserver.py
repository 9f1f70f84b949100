"""The model as a runtime of MLServer. Runs inside MLServer alone."""

from __future__ import annotations

import asyncio
from pathlib import Path

import mlserver
from mlserver.codecs import NumpyCodec

from bbprompt.serve.exported import open_exported
from bbprompt.serve.oip import Responder

__all__ = ["BBPromptModel"]


class BBPromptModel(mlserver.MLModel):  # type: ignore[misc]
    """What `model-settings.json` names; `parameters.uri` is the folder with `bbprompt.json`."""

    _responder: Responder

    async def load(self) -> bool:
        """Open the model."""
        folder = Path(await mlserver.utils.get_model_uri(self.settings))
        self._responder = await asyncio.to_thread(open_exported, folder)
        return True

    async def predict(self, payload: mlserver.types.InferenceRequest) -> mlserver.types.InferenceResponse:
        """Answer a request, in a thread: the server's own loop goes on meanwhile."""
        tensors = {tensor.name: NumpyCodec.decode_input(tensor) for tensor in payload.inputs}
        reply = await asyncio.to_thread(self._responder.answer, tensors)
        outputs = [NumpyCodec.encode_output(name, array) for name, array in reply.items()]
        for output in outputs:
            output.shape = list(reply[output.name].shape)  # the codec makes [n, 1] of [n]
        return mlserver.types.InferenceResponse(model_name=self.name, id=payload.id, outputs=outputs)

    async def unload(self) -> bool:
        """Let go of the model."""
        self._responder.close()
        return True
