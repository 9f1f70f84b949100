"""What is installed: every package by its version and by the digests of its files, as the metadata asks for it."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))

_ENTRY = re.compile(r"^(?P<pin>[a-z0-9][a-z0-9._-]*==[^ \\]+)(?: ; [^\\]+)? \\\n(?P<digests>(?:    .+\n?)+)", re.M)
_DIGEST = re.compile(r"^    --hash=sha256:[0-9a-f]{64}( \\)?$")


def locked(name: str) -> dict[str, Version]:
    """The versions of a lock; every line of it is read."""
    text = (ROOT / ".ci" / f"{name}.lock").read_text(encoding="utf-8")
    found = {}
    for entry in _ENTRY.finditer(text):
        assert all(_DIGEST.match(line) for line in entry["digests"].splitlines()), entry["pin"]
        pinned, _, version = entry["pin"].partition("==")
        assert pinned not in found
        found[pinned] = Version(version)
    assert not _ENTRY.sub("", text).strip(), "a line that is neither a pin nor a digest"
    return found


def wanted(extras: tuple[str, ...]) -> Iterator[Requirement]:
    optional = PROJECT["project"]["optional-dependencies"]
    lines = [*PROJECT["project"]["dependencies"], *PROJECT["build-system"]["requires"]]
    for line in lines + [line for extra in extras for line in optional[extra]]:
        requirement = Requirement(line)
        if requirement.name == PROJECT["project"]["name"]:
            yield from wanted(tuple(sorted(requirement.extras)))
        else:
            yield requirement


@pytest.mark.parametrize(("name", "extras"), [("run", ()), ("serve", ("serve",)), ("dev", ("dev",))])
def test_a_lock_holds_what_the_metadata_asks_for(name: str, extras: tuple[str, ...]) -> None:
    pins = locked(name)
    for requirement in wanted(extras):
        assert pins[canonicalize_name(requirement.name)] in requirement.specifier, str(requirement)


def test_what_is_run_and_served_is_what_is_tested() -> None:
    tested = locked("dev")
    for name in ("run", "serve"):
        assert all(tested[package] == version for package, version in locked(name).items())


def test_the_locks_are_what_is_installed() -> None:
    """By digest alone: nothing is resolved, and nothing is built in an environment of its own."""
    for path, names in (("Makefile", ("run", "dev")), ("deploy/Dockerfile", ("serve",))):
        text = (ROOT / path).read_text(encoding="utf-8")
        assert all(f"{name}.lock" in text for name in names)
        assert "--require-hashes --no-deps --requirement" in text
        assert "--no-deps --no-build-isolation" in text
