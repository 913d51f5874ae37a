"""Makes docs/notebooks/*.ipynb of scripts/cells/*.py, executed, with their outputs.

    python -m scripts.notebooks [NAME ...]

A source is Python in cells: `# %%` begins one of code, `# %% [markdown]` one of text. Its first cell of code has
nothing but sizes, so that tests run the others on small ones.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

SOURCES = Path(__file__).parent / "cells"
NOTEBOOKS = Path(__file__).parent.parent / "docs" / "notebooks"
NAMES = ("digits", "language_model")
TIMEOUT = 900
"""Seconds that one cell may take."""


def cells(name: str) -> list[tuple[str, str]]:
    """("code" or "markdown", text) of each cell of a source."""
    found = []
    for part in (SOURCES / f"{name}.py").read_text().split("# %%")[1:]:
        first, _, body = part.partition("\n")
        kind = "markdown" if "[markdown]" in first else "code"
        lines = body.strip().splitlines()
        if kind == "markdown":
            lines = [line.removeprefix("#").removeprefix(" ") for line in lines]
        found.append((kind, "\n".join(lines)))
    return found


def notebook(name: str) -> Any:
    """The notebook of a source, not executed."""
    import nbformat

    made = nbformat.v4.new_notebook()
    made.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    for number, (kind, text) in enumerate(cells(name)):
        cell = nbformat.v4.new_code_cell(text) if kind == "code" else nbformat.v4.new_markdown_cell(text)
        # Of its own accord nbformat draws names, and every making would differ.
        cell["id"] = f"cell-{number}"
        made.cells.append(cell)
    return made


def executed(name: str) -> Any:
    """The notebook of a source, run in an empty folder.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell fails.
    """
    from nbclient import NotebookClient

    made = notebook(name)
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(
            made, timeout=TIMEOUT, kernel_name="python3", record_timing=False, resources={"metadata": {"path": folder}}
        ).execute()
    for cell in made.cells:
        if cell["cell_type"] == "code":
            # Warnings of other libraries, with paths of this machine.
            cell["outputs"] = [o for o in cell["outputs"] if o.get("name") != "stderr"]
    return made


def main(names: list[str]) -> None:
    """Makes the named notebooks, or all."""
    import nbformat

    NOTEBOOKS.mkdir(exist_ok=True)
    for name in names or NAMES:
        nbformat.write(executed(name), NOTEBOOKS / f"{name}.ipynb")


if __name__ == "__main__":
    main(sys.argv[1:])
