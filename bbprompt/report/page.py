"""HTML by hand: every text is escaped where it enters, only `Html` passes as it is.

A page loads nothing and runs nothing: styles and figures are in it, and its content security policy forbids the rest.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

__all__ = ["Html", "bullets", "code", "details", "heat", "join", "page", "paragraph", "section", "table"]

_STYLE = """
:root { color-scheme: light; --line: #d5d9e0; --soft: #f4f6f9; --ink: #1c2430; --faint: #5d6878; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 2rem 1.5rem 4rem; color: var(--ink); background: #fff;
       font: 15px/1.5 system-ui, "Noto Sans", "Noto Sans CJK SC", "PingFang SC", "Microsoft YaHei", sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 .2rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; padding-bottom: .25rem; border-bottom: 1px solid var(--line); }
p { margin: .4rem 0; max-width: 60rem; }
.lead, .note { color: var(--faint); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: .6rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .28rem .7rem; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line);
         overflow-wrap: anywhere; }
th { font-weight: 600; background: var(--soft); }
td:first-child { min-width: min(11rem, 30vw); }
td:first-child.number, table.heat td { min-width: 0; }
.number, .short { white-space: nowrap; }
.number { text-align: right; }
table.heat { table-layout: auto; }
table.heat td, table.heat th { border: 1px solid #fff; padding: .25rem .5rem; text-align: center; }
table.heat th { font-weight: 500; }
table.heat th.row { text-align: right; }
table.heat td.dark { color: #fff; }
.figure { margin: .6rem 0; overflow-x: auto; }
.figure svg { max-width: 100%; height: auto; }
pre { background: var(--soft); border: 1px solid var(--line); border-radius: 4px; padding: .7rem .9rem;
      white-space: pre-wrap; overflow-wrap: anywhere; }
code, pre { font: 13px/1.45 ui-monospace, "DejaVu Sans Mono", monospace; }
details { margin: .6rem 0; }
summary { cursor: pointer; font-weight: 600; }
.wrong { color: #a4262c; }
@media print { body { max-width: none; padding: 0; } h2 { break-after: avoid; } tr, .figure { break-inside: avoid; } }
"""

_SHORT = 24  # characters of a cell that stays in one line


class Html(str):
    """Markup that is safe to write as it is."""

    __slots__ = ()


def escaped(value: object) -> Html:
    """A value as markup: `Html` as it is, anything else escaped."""
    if isinstance(value, Html):
        return value
    # Control characters other than tab and line end are no HTML; a reader should see that they are there.
    text = "".join(c if c >= " " or c in "\t\n" else f"\\x{ord(c):02x}" for c in str(value))
    return Html(html.escape(text.encode("utf-8", "backslashreplace").decode("utf-8")))


def join(parts: Iterable[object]) -> Html:
    """Parts behind one another."""
    return Html("\n".join(escaped(part) for part in parts))


def paragraph(text: object, kind: str = "") -> Html:
    """A paragraph, of a style class if one is given."""
    style = f' class="{kind}"' if kind else ""
    return Html(f"<p{style}>{escaped(text)}</p>")


def code(text: str) -> Html:
    """A block to copy."""
    return Html(f"<pre>{escaped(text)}</pre>")


def bullets(items: Sequence[object]) -> Html:
    """A list."""
    return Html("<ul>" + "".join(f"<li>{escaped(item)}</li>" for item in items) + "</ul>")


def section(title: str, *parts: object) -> Html:
    """A titled part of the page."""
    return Html(f"<section><h2>{escaped(title)}</h2>\n{join(parts)}</section>")


def details(title: str, *parts: object) -> Html:
    """A part that is folded away at first."""
    return Html(f"<details><summary>{escaped(title)}</summary>\n{join(parts)}</details>")


def table(head: Sequence[object], rows: Sequence[Sequence[object]]) -> Html:
    """A table; a column is set to the right if all its cells look like numbers, and unbroken if all are short."""
    styles = [_column(head[place], [row[place] for row in rows]) for place in range(len(head))]
    lines = ["<tr>" + "".join(f"<th{s}>{escaped(c)}</th>" for s, c in zip(styles, head, strict=True)) + "</tr>"]
    lines = lines if any(str(cell) for cell in head) else []
    for row in rows:
        lines.append("<tr>" + "".join(f"<td{s}>{escaped(c)}</td>" for s, c in zip(styles, row, strict=True)) + "</tr>")
    return Html('<div class="wide"><table>\n' + "\n".join(lines) + "\n</table></div>")


def heat(
    head: Sequence[object],
    names: Sequence[object],
    values: Sequence[Sequence[float]],
    form: str,
    corner: str = "",
    white: float = 0.0,
) -> Html:
    """A table of numbers whose cells are shaded from white to dark, the largest value being the darkest.

    Args:
        head: Column names.
        names: Row names.
        values: Numbers, none below `white`.
        form: Format of a number, such as `.2f`.
        corner: What stands over the row names.
        white: The value whose cell is white.
    """
    span = max((value for row in values for value in row), default=white) - white or 1.0
    lines = [f"<tr><th>{escaped(corner)}</th>" + "".join(f"<th>{escaped(name)}</th>" for name in head) + "</tr>"]
    for name, row in zip(names, values, strict=True):
        cells = "".join(_shaded(value, (value - white) / span, form) for value in row)
        lines.append(f'<tr><th class="row">{escaped(name)}</th>{cells}</tr>')
    return Html('<div class="wide"><table class="heat">\n' + "\n".join(lines) + "\n</table></div>")


def page(title: str, lead: str, parts: Sequence[Html]) -> str:
    """The whole page."""
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escaped(title)}</title>\n<style>{_STYLE}</style></head>\n<body>\n"
        f"<h1>{escaped(title)}</h1>\n{paragraph(lead, 'lead')}\n{join(parts)}\n</body></html>\n"
    )


def _shaded(value: float, share: float, form: str) -> Html:
    # From white to a dark blue, in a straight line through sRGB.
    red, green, blue = (round(255 + share * (end - 255)) for end in (23, 78, 138))
    dark = ' class="dark"' if share > 0.7 else ""
    return Html(f'<td{dark} style="background:rgb({red},{green},{blue})">{format(value, form)}</td>')


def _column(title: object, cells: Sequence[object]) -> str:
    if cells and all(_like_a_number(cell) for cell in cells):
        return ' class="number"'
    # Beside a column of long texts a browser would squeeze a short one to a character a line.
    return ' class="short"' if all(len(str(cell)) <= _SHORT for cell in (title, *cells)) else ""


def _like_a_number(value: object) -> bool:
    text = str(value)
    return text == "" or text == "–" or (any(c.isdigit() for c in text) and text[0] in "+-−.0123456789<")
