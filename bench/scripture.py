"""Real text that tells some stories twice: the King James Bible, of Debian's package bible-kjv."""

from __future__ import annotations

import re
import shutil
import subprocess

BOOKS = tuple("Ge Exo Josh Jdgs Ruth 1Sm 2Sm 1Ki 2Ki 1Chr 2Chr Ezra Neh Psa Isa Jer Mic".split())
"""The books that tell the same stories, or sing the same psalms."""


def verses() -> dict[str, str]:
    """Reference, such as 1Chr10:1, to text, in the order of the books.

    Raises:
        FileNotFoundError: the package is not installed.
    """
    if shutil.which("bible") is None:
        raise FileNotFoundError("no text: apt-get install bible-kjv")
    command = ["bible", "-f", "Gen1:1-Rev22:21"]
    printed = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True).stdout
    split = (line.partition(" ") for line in printed.splitlines())
    return {ref: text for ref, _, text in split}


def book(ref: str) -> str:
    return re.sub(r"\d+:\d+$", "", ref)


def words(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())
