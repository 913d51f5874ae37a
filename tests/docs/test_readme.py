"""The README and the docs are true: what they show runs, what they name exists."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def block(mark: str, page: str = README) -> str:
    found = re.search(rf"<!-- {mark} -->\n```\w+\n(.*?)```", page, re.DOTALL)
    assert found, mark
    return found[1]


def test_the_life_of_an_index_runs(run: Any) -> None:
    _, out = run(block("example", (ROOT / "docs" / "living.md").read_text()))
    assert out.splitlines()[-1] == "1400 300 1700"


def test_the_explanation_runs(run: Any) -> None:
    _, out = run(block("example", (ROOT / "docs" / "explain.md").read_text()))
    lines = out.splitlines()
    assert lines[0].startswith("[('eights', "), lines
    assert lines[-1] == str([(4, 2)] * 5), lines


def test_the_example_runs(run: Any) -> None:
    _, out = run(block("example"))
    asked, found = (json.loads(line.split(": ", 1)[1]) for line in out.splitlines() if line.startswith("labels"))
    assert sum(row.count(label) for label, row in zip(asked, found, strict=True)) >= 0.8 * 4 * 5, out


def test_the_commands_use_the_constraints_and_known_extras() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    for mark in ("demo-command", "test-command"):
        command = block(mark)
        assert "-c constraints.txt" in command
        for extra in re.findall(r"\.\[([\w,]+)\]", command)[0].split(","):
            assert re.search(rf"^{extra} = \[", project, re.MULTILINE), extra


def test_ci_runs_the_readme_command() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    assert "test-command" in script and "pip install" not in script
    extract = script.split("command=$(")[1].split("\n")[0].rstrip(")")
    done = subprocess.run(["bash", "-c", extract], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == block("test-command")


def test_links_lead_somewhere() -> None:
    for page in [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "bench").glob("*.md"),
    ]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_modules_named_in_the_architecture_exist() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    table = text.split("| module | what it does |")[1].split("## ")[0]
    named = set(
        re.findall(r"`(\w+)`", "\n".join(line.split("|")[1] for line in table.splitlines() if line.startswith("| `")))
    )
    there = {p.stem for p in (ROOT / "lorif_index").rglob("*.py")} - {
        "__init__",
        "__main__",
        "version",
        "errors",
        "progress",
    }
    assert named == there


@pytest.mark.parametrize("page", ["README.md", "docs/choosing.md"])
def test_no_placeholders(page: str) -> None:
    assert not re.search(r"\b(TODO|TBD|DEMO_TEXT|FIGURES)\b", (ROOT / page).read_text())
