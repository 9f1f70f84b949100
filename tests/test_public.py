"""The public names: all there, nothing else, and cheap until they are used."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

import bbprompt
from bbprompt import errors

HEAVY = ("torch", "transformers", "ray", "cma", "botorch", "gpytorch", "scipy", "rich", "httpx2")


def loaded_after(code: str) -> set[str]:
    """Heavy modules that a fresh process has loaded after some code."""
    end = f"import sys; print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", f"{code}\n{end}"], capture_output=True, text=True, check=True)
    return set(eval(done.stderr.splitlines()[-1]))


@pytest.mark.parametrize("name", bbprompt.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(bbprompt, name) is getattr(bbprompt, name)
    assert name in dir(bbprompt)


def test_nothing_else_is_public() -> None:
    own = {
        name
        for name, value in vars(bbprompt).items()
        if not name.startswith("_")
        and not inspect.ismodule(value)
        and str(getattr(value, "__module__", "")).startswith("bbprompt")
    }
    assert own | {"__version__"} <= set(bbprompt.__all__)
    assert sorted(bbprompt.__all__) == bbprompt.__all__
    with pytest.raises(AttributeError, match="no attribute 'Journal'"):
        _ = bbprompt.Journal  # type: ignore[attr-defined]


def test_the_whole_error_tree_is_public() -> None:
    assert set(errors.__all__) <= set(bbprompt.__all__)


def test_importing_is_light() -> None:
    assert loaded_after("import bbprompt") == set()
    assert loaded_after("import bbprompt; bbprompt.tune, bbprompt.open_oracle, bbprompt.Task") == set()
    assert loaded_after("import bbprompt.optimizers, bbprompt.backends, bbprompt.testing") == set()


def test_every_public_function_and_class_is_documented() -> None:
    for name in bbprompt.__all__:
        value = getattr(bbprompt, name)
        assert isinstance(value, str) or inspect.getdoc(value), name
