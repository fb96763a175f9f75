"""A report as data (sections of notes, tables, figures), and its two forms: Markdown and one self-contained HTML page."""

from __future__ import annotations

import base64
import dataclasses
import html
import re
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Table:
    """Cells as text; the first column is left-aligned, the others right-aligned unless they hold words."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""
    words: bool = False


@dataclasses.dataclass(frozen=True)
class Picture:
    """A PNG image: its file name beside the report, what it shows in words, and its bytes."""

    file: str
    caption: str
    png: bytes


@dataclasses.dataclass(frozen=True)
class Section:
    """A heading with notes, figures, tables and literal text, shown in this order."""

    title: str
    notes: tuple[str, ...] = ()
    pictures: tuple[Picture, ...] = ()
    tables: tuple[Table, ...] = ()
    literal: str = ""


def to_markdown(title: str, sections: Sequence[Section]) -> str:
    """The report as Markdown; pictures are linked by file name."""
    lines = [f"# {_plain(title)}", ""]
    for section in sections:
        lines += [f"## {_plain(section.title)}", ""]
        for note in section.notes:
            lines += [_plain(note), ""]
        for picture in section.pictures:
            lines += [f"![{_plain(picture.caption)}]({picture.file})", "", _plain(picture.caption), ""]
        for table in section.tables:
            lines += ([_plain(table.caption), ""] if table.caption else []) + [markdown_table(table), ""]
        if section.literal:
            # A fence must be longer than any run of backticks inside it.
            fence = "`" * max(3, 1 + max(map(len, re.findall("`+", section.literal)), default=0))
            lines += [fence, section.literal, fence, ""]
    return "\n".join(lines)


def markdown_table(table: Table) -> str:
    """One table in Markdown."""
    marks = ["---" if column == 0 or table.words else "---:" for column in range(len(table.head))]
    rows = [[_plain(cell) for cell in row] for row in (table.head, *table.rows)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (rows[0], marks, *rows[1:]))


def _plain(text: str) -> str:
    """Text that Markdown shows as it stands, on one line."""
    text = re.sub(r"([\\`*|\[\]])", r"\\\1", " ".join(text.split()))
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


# The policy lets the page load nothing but what is inside it.
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
:root {{ color-scheme: light; }}
body {{ margin: 0 auto; max-width: 70rem; padding: 1.5rem; background: #ffffff; color: #1b1f24;
       font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }}
h1 {{ font-size: 1.7rem; margin: 0 0 1rem; }}
h2 {{ font-size: 1.25rem; margin: 2.5rem 0 0.75rem; padding-top: 0.75rem; border-top: 1px solid #d5dae0; }}
p {{ max-width: 50rem; margin: 0 0 0.75rem; }}
.scroll {{ overflow-x: auto; margin: 0 0 1.25rem; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
caption {{ text-align: left; color: #4a525c; padding: 0 0 0.4rem; }}
th, td {{ padding: 0.3rem 0.8rem; border-bottom: 1px solid #e4e8ec; text-align: right; white-space: nowrap; }}
th:first-child, td:first-child {{ text-align: left; padding-left: 0; white-space: normal; }}
.words th, .words td {{ text-align: left; white-space: normal; }}
thead th {{ border-bottom: 2px solid #9aa4af; vertical-align: bottom; white-space: normal; }}
tbody th {{ font-weight: normal; }}
figure {{ margin: 0 0 1.5rem; }}
figure img {{ max-width: 100%; height: auto; }}
figcaption {{ color: #4a525c; max-width: 50rem; }}
pre {{ background: #f4f6f8; border-radius: 4px; padding: 0.8rem; white-space: pre-wrap; overflow-wrap: anywhere; }}
</style>
</head>
<body>
<main>
<h1>{title}</h1>
{body}
</main>
</body>
</html>
"""


def to_html(title: str, sections: Sequence[Section]) -> str:
    """The report as one HTML page with style and pictures inside; every text is escaped."""
    return _PAGE.format(title=html.escape(title), body="\n".join(map(_html_section, sections)))


def _html_section(section: Section) -> str:
    parts = [f"<section>\n<h2>{html.escape(section.title)}</h2>"]
    parts += [f"<p>{html.escape(note)}</p>" for note in section.notes]
    for picture in section.pictures:
        data, caption = base64.b64encode(picture.png).decode("ascii"), html.escape(picture.caption)
        parts.append(f'<figure><img alt="{caption}" src="data:image/png;base64,{data}"><figcaption>{caption}</figcaption></figure>')
    parts += map(_html_table, section.tables)
    if section.literal:
        parts.append(f"<pre>{html.escape(section.literal)}</pre>")
    return "\n".join((*parts, "</section>"))


def _html_table(table: Table) -> str:
    caption = f"<caption>{html.escape(table.caption)}</caption>" if table.caption else ""
    head = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in table.head)
    rows = []
    for first, *rest in table.rows:
        cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in rest)
        rows.append(f'<tr><th scope="row">{html.escape(first)}</th>{cells}</tr>')
    body, kind = "\n".join(rows), ' class="words"' if table.words else ""
    return f'<div class="scroll"><table{kind}>{caption}<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'
