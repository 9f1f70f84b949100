"""Files that commands write: whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from bbprompt.commands.output import whole_file
from bbprompt.errors import DiskError


def write_and_fail(path: Path, kind: type[BaseException]) -> None:
    with whole_file(path) as stream:
        stream.write("half")
        stream.flush()
        raise kind


@pytest.mark.parametrize("kind", [KeyboardInterrupt, ZeroDivisionError])
@pytest.mark.parametrize("before", [{}, {"page.html": "old"}])
def test_what_is_stopped_half_way_leaves_what_was_there(
    kind: type[BaseException], before: dict[str, str], tmp_path: Path
) -> None:
    for name, text in before.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(kind):
        write_and_fail(tmp_path / "page.html", kind)
    assert {path.name: path.read_text(encoding="utf-8") for path in tmp_path.iterdir()} == before


def test_a_whole_file_replaces_the_old_one(tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text("old", encoding="utf-8")
    with whole_file(tmp_path / "page.html") as stream:
        stream.write("提示")
        assert (tmp_path / "page.html").read_text(encoding="utf-8") == "old"
    assert [path.read_text(encoding="utf-8") for path in tmp_path.iterdir()] == ["提示"]


@pytest.mark.parametrize(
    ("place", "cause"), [("/dev/full", "No space left on device"), ("/proc/labels.jsonl", "No such file or directory")]
)
def test_a_place_that_cannot_be_written_is_named_with_the_cause(place: str, cause: str) -> None:
    with pytest.raises(DiskError, match=rf"^{place}: cannot be written: {cause}; .* name another$"):
        write_to(Path(place))


def write_to(path: Path) -> None:
    with whole_file(path) as stream:
        stream.write("text")
