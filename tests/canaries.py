"""Files that touch another one as soon as somebody runs what stands in them, in every form that some reader runs."""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["payloads"]


class _Touch:
    """Unpickled, it makes a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.canary,)


def payloads(canary: Path) -> dict[str, bytes]:
    """About twenty of them by name; each would make the file `canary`."""
    found = {f"pickle {number}": pickle.dumps(_Touch(canary), number) for number in range(pickle.HIGHEST_PROTOCOL + 1)}
    pickled = found["pickle 2"]
    zipped = io.BytesIO()
    with zipfile.ZipFile(zipped, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", "3\n")
    array, arrays = io.BytesIO(), io.BytesIO()
    objects = np.array([_Touch(canary)], dtype=object)
    np.save(array, objects, allow_pickle=True)
    np.savez(arrays, point=objects)
    found |= {"torch": zipped.getvalue(), "npy": array.getvalue(), "npz": arrays.getvalue()}
    found["old torch"] = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2) + pickled
    code = f"__import__('pathlib').Path({str(canary)!r}).touch()"
    for tag in ("object/apply:os.system", "object/new:os.system"):
        found[f"yaml {tag}"] = f"!!python/{tag} ['touch {canary}']\n".encode()
        found[f"yaml value {tag}"] = f"name: !!python/{tag} ['touch {canary}']\n".encode()
    found["yaml eval"] = f'!!python/object/apply:eval ["{code}"]\n'.encode()
    found["python"] = code.encode()
    found["json"] = f'{{"py/reduce": [{{"py/function": "os.system"}}, {{"py/tuple": ["touch {canary}"]}}]}}'.encode()
    found["shell"] = f"$(touch {canary})`touch {canary}`;touch {canary}\n".encode()
    found["header"] = len(pickled).to_bytes(8, "little") + pickled
    return found
