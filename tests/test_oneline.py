"""Words of unknown origin as one line."""

from __future__ import annotations

import pytest

from bbprompt.oneline import one_line


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain: 文字, naïve 😀", "plain: 文字, naïve 😀"),
        ("two\r\n lines\tand\u2028more ", "two lines and more"),
        ("\x1b[31mred\x1b[0m", "\\x1b[31mred\\x1b[0m"),
        ("\u202etxt.exe", "\\u202etxt.exe"),
        ("\x00\x7f\udcff", "\\x00\\x7f\\udcff"),
        ("", ""),
    ],
)
def test_what_is_seen_is_what_is_there(text: str, shown: str) -> None:
    assert one_line(text) == shown


def test_what_fills_the_screen_is_cut() -> None:
    assert one_line("a" * 4_000) == "a" * 4_000
    assert one_line("b" * 1_000_000) == "b" * 4_000 + " ... and 996000 characters more"
