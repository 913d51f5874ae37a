"""Hooks of the site (mkdocs.yml): pages that are made of files elsewhere in the repository, and links to them.

bench/README.md, CHANGELOG.md and CONTRIBUTING.md become pages; so does each notebook, with its outputs. Links are
written so that they work in the repository, and rewritten to the pages.
"""

from __future__ import annotations

import json
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
PAGES = {"benchmarks.md": "bench/README.md", "changelog.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md"}
"""Page -> the file that it is made of."""


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages that are no files of the docs folder."""
    for page, source in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    for path in sorted((ROOT / "docs" / "notebooks").glob("*.ipynb")):
        content = as_markdown(json.loads(path.read_text()), path.name)
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=content))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Turns links between files of the repository into links between pages."""
    here = page.file.src_uri
    source = PAGES.get(here, f"docs/{here}")
    to_page = {written: at for at, written in PAGES.items()}

    def link(found: re.Match[str]) -> str:
        target, anchor = found[1], found[2] or ""
        if re.match(r"[a-z]+:", target):
            return found[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        goal = to_page.get(path, path.removeprefix("docs/"))
        if goal.startswith("notebooks/") and source == f"docs/{here}" and not here.startswith("notebooks/"):
            goal = goal.replace(".ipynb", ".md")
        return f"]({posixpath.relpath(goal, posixpath.dirname(here) or '.')}{anchor})"

    return with_room_for_lists(re.sub(r"\]\(([^)#\s]+)(#[^)\s]*)?\)", link, markdown))


def with_room_for_lists(markdown: str) -> str:
    """An empty line before each list that follows a paragraph at once, which Python-Markdown takes for its text."""
    lines: list[str] = []
    fenced = listed = False
    for line in markdown.splitlines():
        fenced ^= line.startswith("```")
        item = line.startswith("- ") and not fenced
        if item and not listed and lines and lines[-1].strip():
            lines.append("")
        listed = item or (listed and line.startswith(" "))
        lines.append(line)
    return "\n".join(lines) + "\n"


def as_markdown(notebook: dict[str, Any], name: str) -> str:
    """A notebook's cells and outputs: text in fences, tables and pictures as they are."""
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
        elif cell["cell_type"] == "code":
            parts.append(f"```python\n{source}\n```")
            parts += [_output(one) for one in cell["outputs"]]
    title, _, rest = "\n\n".join(parts).partition("\n")
    return f"{title}\n\n[The notebook itself]({name})\n{rest}\n"


def _output(output: dict[str, Any]) -> str:
    if output["output_type"] == "stream":
        return f"```text\n{''.join(output['text']).rstrip()}\n```"
    data = output["data"]
    if "image/png" in data:
        return f"![](data:image/png;base64,{''.join(data['image/png']).strip()})"
    if "text/html" in data:
        return f'<div class="notebook-table">{" ".join("".join(data["text/html"]).split())}</div>'
    return f"```text\n{''.join(data['text/plain']).rstrip()}\n```"
