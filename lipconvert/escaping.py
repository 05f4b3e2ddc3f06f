"""Text of strangers (names in files, of folders, of plugins; messages of their code) as it is shown: it changes nothing
around it, and what is odd in it is seen.

`printable` is for terminals, and comes first everywhere else: `markdown` adds what Markdown needs, `html.escape` what HTML
does, and JSON has escapes of its own (``ensure_ascii``).
"""

from __future__ import annotations

import re
import unicodedata

# ASCII that means something in Markdown, its tables, addresses ("www.") and formulas. A backslash before it takes that away;
# before a backslash it would begin a formula on the Hub.
_MARKDOWN = re.compile(r"[&`*_{}\[\]<>#!|~$:@\\]|(?<=[wW])\.")


def printable(text: str) -> str:
    r"""One line of text for a terminal: what is not printed in its place stands there as Python escapes it, as in ``\x1b``.

    That is control characters (also the newline), what turns the direction of writing, what has no width, separators of
    lines and paragraphs, halves of characters (bytes of a file's name that are no text), and what Unicode does not know.
    Letters of all languages, combining marks, emoji and spaces stay.
    """
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() or unicodedata.category(c) == "Zs" else c.encode("unicode_escape").decode() for c in text
    )


def paragraph(text: str) -> str:
    """Text of several lines for a terminal: each is `printable`, and all but the first are indented, so that none passes for
    a line of ours."""
    first, *others = map(printable, text.split("\n"))
    return "\n".join([first, *(line if line.startswith("    ") else f"    {line}" for line in others)])


def markdown(text: str) -> str:
    """Text inside a paragraph or a cell of a table in Markdown (CommonMark, and GitHub's tables and links)."""
    return _MARKDOWN.sub(lambda found: "&#92;" if found[0] == "\\" else f"\\{found[0]}", printable(text))
