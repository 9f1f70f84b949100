"""Tensors that know their checksum: what was changed is noticed."""

from __future__ import annotations

import errno
from pathlib import Path

import numpy as np
import pytest
from safetensors import SafetensorError
from safetensors.numpy import load, save, save_file

from bbprompt.tensorfile import pack, unpack, written

TENSORS = {"point": np.arange(12, dtype=np.float32).reshape(3, 4), "offsets": np.array([0.5, -0.5])}


def same(found: dict[str, np.ndarray]) -> bool:
    return found.keys() == TENSORS.keys() and all(
        found[name].dtype == array.dtype and np.array_equal(found[name], array) for name, array in TENSORS.items()
    )


def test_tensors_come_back_and_others_can_read_them() -> None:
    assert same(unpack(pack(TENSORS)))
    assert same(dict(load(pack(TENSORS))))
    assert pack(TENSORS) == pack(dict(reversed(TENSORS.items())))
    assert same(unpack(pack({name: array.T.copy().T for name, array in TENSORS.items()})))
    assert same(unpack(save(TENSORS))), "a file of another program has no checksum"


def test_every_bit_flip_is_noticed_or_means_nothing() -> None:
    whole, noticed = pack(TENSORS), 0
    for at in range(8 * len(whole)):
        data = bytearray(whole)
        data[at // 8] ^= 1 << at % 8
        try:
            assert same(unpack(bytes(data))), f"bit {at} changed the numbers"
        except (SafetensorError, ValueError):
            noticed += 1
    assert noticed > 0.9 * 8 * len(whole)


@pytest.mark.parametrize("end", [0, 7, 8, 100, -1])
def test_what_is_cut_is_refused(end: int) -> None:
    with pytest.raises((SafetensorError, ValueError)):
        unpack(pack(TENSORS)[:end])


def test_a_file_of_tensors_has_the_rights_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    with written(tmp_path / "model.safetensors"):
        save_file(TENSORS, tmp_path / "model.safetensors")
    assert (tmp_path / "model.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_what_the_system_said_is_what_is_raised(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left on device") as caught, written(tmp_path / "full"):
        raise SafetensorError("I/O error: No space left on device (os error 28)")
    assert caught.value.errno == errno.ENOSPC
    nowhere = tmp_path / "no" / "model.safetensors"
    with pytest.raises(FileNotFoundError), written(nowhere):
        save_file(TENSORS, nowhere)
