"""Tensors as the bytes of a safetensors file that knows its own checksum.

safetensors checks that a file is laid out as its header says, and not what is in it: a flipped bit is another number.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from bbprompt.jsontext import parse_json

__all__ = ["checksum", "pack", "unpack", "written"]

_KEY = "sha256"


def pack(tensors: Mapping[str, NDArray[Any]]) -> bytes:
    """The file, with the checksum of names, types, shapes and numbers in its metadata."""
    rows = {name: np.asarray(array, order="C") for name, array in tensors.items()}
    data: bytes = save(rows, metadata={_KEY: checksum(rows)})
    return data


def unpack(data: bytes) -> dict[str, NDArray[Any]]:
    """The tensors of a file; one without any metadata, as other programs write it, is taken as it is.

    Raises:
        SafetensorError, ValueError: It is damaged.
    """
    try:
        tensors: dict[str, NDArray[Any]] = dict(load(data))
    except KeyError as error:
        raise ValueError(f"numbers of the type {error.args[0]}, which numpy lacks") from None
    header = parse_json(data[8 : 8 + int.from_bytes(data[:8], "little")])
    if "__metadata__" in header and header["__metadata__"] != {_KEY: checksum(tensors)}:
        raise ValueError("it does not match its checksum")
    return tensors


@contextmanager
def written(path: Path) -> Iterator[None]:
    """Around a `save_file` to a path: its errors become those of the system, and the file gets a new file's rights.

    Raises:
        OSError: It cannot be written.
    """
    try:
        yield
    except SafetensorError as error:
        found = re.search(r"os error (\d+)", str(error))
        number = int(found[1]) if found else errno.EIO
        raise OSError(number, os.strerror(number), str(path)) from error
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)  # safetensors leaves it to its owner alone


def checksum(tensors: Mapping[str, NDArray[Any]]) -> str:
    """SHA-256 over names, types, shapes and numbers, in the order of the names."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        array = tensors[name]
        head = json.dumps([name, array.dtype.str, array.shape]).encode("ascii")
        sha.update(len(head).to_bytes(8, "big") + head + array.tobytes())
    return sha.hexdigest()
