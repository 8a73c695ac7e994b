"""Pages that open offline: one HTML file with its style, its script and its data in it, and nothing from elsewhere.

And Markdown tables that hold any text.
"""

import html
import json
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from utils.console import printable

WEB = Path(__file__).parent / "web"
# The browser itself is told to fetch nothing, whatever a prompt may hold.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


def embed_json(data: Any) -> str:
    """JSON that cannot end the <script> element it stands in.  NaN and infinity, which JSON has not, become null.

    U+2028 and U+2029 are line ends to older JavaScript and not to JSON.
    """
    text = json.dumps(_finite(data), ensure_ascii=False, separators=(",", ":"), allow_nan=False, default=str)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {str(key): _finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def html_page(title: str, body: str, data: Any = None, program: str | None = None) -> str:
    """A whole page; `body` is HTML, `title` is text.

    program: name of the .js file in reporting/web that the page runs, and of the .css file beside it; data: what it finds as
    JSON in the element #data.
    """
    style = _web_file("style.css") + ("" if program is None else _web_file(f"{program}.css"))
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{html.escape(title)}</title>",
        f"<style>\n{style}</style>",
        "</head>",
        "<body>",
        body,
    ]
    if program is not None:
        parts.append(f'<script type="application/json" id="data">{embed_json(data)}</script>')
        parts.append(f"<script>\n{_web_file(program + '.js')}</script>")
    return "\n".join([*parts, "</body>", "</html>", ""])


def write_page(page: str, path: str) -> None:
    """Write a page; half a surrogate pair, which UTF-8 has not, becomes a question mark."""
    with open(path, "w", encoding="utf-8", errors="replace") as file:
        file.write(page)


def _web_file(name: str) -> str:
    return (WEB / name).read_text(encoding="utf-8")


def markdown_cell(text: str) -> str:
    """Text that a Markdown table shows as it is, in one cell: no markup, no HTML, no column or row ends in it."""
    text = html.escape(printable(text), quote=False).replace("|", "&#124;")
    text = re.sub(r"([\\`*_\[\]~$])", r"\\\1", text)
    return "<br>".join(text.splitlines())


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table that shows these texts as they are."""

    def row(cells: Sequence[str]) -> str:
        return "| " + " | ".join(map(markdown_cell, cells)) + " |"

    return [row(head), "|---" * len(head) + "|", *map(row, rows)]
