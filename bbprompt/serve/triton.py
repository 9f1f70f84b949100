"""The model as the Python backend of NVIDIA Triton wants it. Runs inside Triton alone.

Tensors go in and out by DLPack: it copies nothing, and does not depend on the numpy that the backend was built for.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch.utils.dlpack
import triton_python_backend_utils as pb_utils

from bbprompt.oip import INPUTS
from bbprompt.serve.exported import open_exported

__all__ = ["TritonPythonModel"]


class TritonPythonModel:
    """What the backend looks for in `model.py`."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the model of `MODEL/VERSION`."""
        self._model = open_exported(Path(args["model_repository"]) / args["model_version"])

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer requests, one by one: a reply must not depend on who else is asking."""
        return [self._respond(request) for request in requests]

    def finalize(self) -> None:
        """Let go of the model."""
        self._model.close()

    def _respond(self, request: Any) -> Any:
        given = {name: pb_utils.get_input_tensor_by_name(request, name) for name in INPUTS}
        tensors = {
            name: torch.utils.dlpack.from_dlpack(tensor.to_dlpack()).cpu().numpy().copy()
            for name, tensor in given.items()
            if tensor is not None
        }
        try:
            reply = self._model.answer(tensors)
        except Exception as error:  # one request must not take the server along
            pb_utils.Logger.log_error(f"a request failed: {type(error).__name__}: {error}")
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(f"the model failed ({type(error).__name__})"))
        outputs = [
            pb_utils.Tensor.from_dlpack(name, torch.from_numpy(np.array(array))) for name, array in reply.items()
        ]
        return pb_utils.InferenceResponse(output_tensors=outputs)
