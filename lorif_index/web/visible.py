"""Visible: untrusted text as pieces to print, in which what could hide or reorder characters is a mark.

Escaping keeps text from being markup. It does not keep a right-to-left override from showing words in another order,
nor a zero-width space from splitting one that a reader looks for ("Trojan Source", Boucher and Anderson,
arXiv:2111.00169). Such characters are shown by their number, with their name at hand.
"""

from __future__ import annotations

import re
import unicodedata
from typing import NamedTuple

# Controls, formats (bidi marks, zero width), lone surrogates, line and paragraph separators.
_HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}
# Letters that show nothing; they are assigned as letters or marks.
_BLANK = {0x034F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x2800, 0x3164, 0xFFA0}
# All others can be seen.
_SPECIAL = re.compile(r"[^ -~\n\t]")
# These join and part letters of some scripts and emoji, where they belong.
_JOINERS = {"\u200c", "\u200d"}


class TextRun(NamedTuple):
    """Text as it is, with an empty name, or one hidden character as "U+202E" with its name."""

    text: str
    name: str = ""


def pieces(text: str) -> list[TextRun]:
    """A text in pieces: their texts are safe to show once escaped. Newlines and tabs stay; "\\r\\n" is one newline.

    Args:
        text: anything; lone surrogates, too.
    """
    text = text.replace("\r\n", "\n")
    found: list[TextRun] = []
    start = 0
    for match in _SPECIAL.finditer(text):
        at, char = match.start(), match[0]
        if not _hidden(text, at, char):
            continue
        if at > start:
            found.append(TextRun(text[start:at]))
        found.append(TextRun(f"U+{ord(char):04X}", unicodedata.name(char, "") or _unnamed(char)))
        start = at + 1
    if start < len(text):
        found.append(TextRun(text[start:]))
    return found


def visible(text: str) -> str:
    """The same as one string, for attributes and titles, which take no markup: hidden characters as ⟨U+202E⟩."""
    return "".join(f"⟨{piece.text}⟩" if piece.name else piece.text for piece in pieces(text))


def on_one_line(text: str, most: int | None = None) -> str:
    """The same on one line, with blanks in a row as one and no more than `most` characters of text."""
    line = " ".join((text if most is None else text[: 4 * most]).split())
    return visible(line if most is None or len(line) <= most else line[: most - 1].rstrip() + "…")


def _hidden(text: str, at: int, char: str) -> bool:
    code = ord(char)
    if char in _JOINERS:
        # Between ASCII, or at an end, they join nothing.
        around = (text[at - 1 : at] or "a", text[at + 1 : at + 2] or "a")
        return all(c.isascii() for c in around)
    if code in _BLANK or code & 0xFFFE == 0xFFFE or 0xFDD0 <= code <= 0xFDEF or 0xE0000 <= code <= 0xE0FFF:
        return True
    return unicodedata.category(char) in _HIDDEN


def _unnamed(char: str) -> str:
    kinds = {"Cc": "control character", "Cs": "lone surrogate", "Cf": "format character"}
    return kinds.get(unicodedata.category(char), "no character")
