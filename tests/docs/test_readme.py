"""The README and the docs are true: what they show runs, what they name exists."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from lorif_index.text.demo import QUESTION

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def block(mark: str, page: str = README) -> str:
    found = re.search(rf"<!-- {mark} -->\n```\w*\n(.*?)```", page, re.DOTALL)
    assert found, mark
    return found[1]


def test_the_life_of_an_index_runs(run: Any) -> None:
    _, out = run(block("example", (ROOT / "docs" / "living.md").read_text()))
    assert out.splitlines()[-1] == "1200 300 1500"


def test_the_explanation_runs(run: Any) -> None:
    _, out = run(block("example", (ROOT / "docs" / "explain.md").read_text()))
    lines = out.splitlines()
    assert lines[0].startswith("[('eights', "), lines
    assert lines[-1] == str([(4, 2)] * 5), lines


def test_the_example_runs_and_prints_what_is_shown(run: Any) -> None:
    code, shown = block("example"), block("example-prints")
    assert len([line for line in code.splitlines() if line]) == 12
    _, out = run(code)
    first, best = out.splitlines()
    ids, scores = zip(*re.findall(r"(\d+): ([\d.]+)", best), strict=True)
    assert first == shown.splitlines()[0]
    assert list(ids) == re.findall(r"(\d+):", shown.splitlines()[1])
    said = [float(score) for score in re.findall(r": ([\d.]+)", shown.splitlines()[1])]
    assert [float(score) for score in scores] == pytest.approx(said, rel=0.02)


def test_losses_and_gradients_of_your_own_run(run: Any) -> None:
    names, _ = run(block("example: own", (ROOT / "docs" / "options.md").read_text()))
    assert len(names["raised"].ids) == 2 and len(names["index"]) == 400


def sentences(page: str) -> list[str]:
    """Those of paragraphs, lists and headings: without code blocks, tables, comments and links' targets."""
    page = re.sub(r"^```.*?^```$|<!--.*?-->", "", page, flags=re.DOTALL | re.MULTILINE)
    page = re.sub(r"\]\([^)]*\)", "]", page)
    lines = ["" if line.startswith("|") else line for line in page.splitlines()]
    # A list's entry, a heading and an empty line end a sentence, too.
    page = "\n".join(
        re.sub(r"^\s*(- |#+ |\d+\. )(.*)", r"\n\2", line) + ("\n" * line.startswith("#")) for line in lines
    )
    parts = [part for paragraph in re.split(r"\n\s*\n", page) for part in re.split(r"(?<=[.?!])\W*\s+", paragraph)]
    return [" ".join(part.split()) for part in parts if part.strip()]


def test_sentences_are_told_apart() -> None:
    page = "# One\nTwo [is](a.b). *Three?* Four: yes.\n\n```bash\nx. y\n```\n<!-- z -->\n"
    page += "- Five\n- six `a.b` .5\n| t |\n1. Seven"
    assert sentences(page) == ["One", "Two [is].", "*Three?", "Four: yes.", "Five", "six `a.b` .5", "Seven"]


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 120


# Made of the commands' own words.
PAGES = ["README.md", *(str(p.relative_to(ROOT)) for p in sorted((ROOT / "docs").rglob("*.md")) if p.name != "cli.md")]


@pytest.mark.parametrize("page", PAGES)
def test_sentences_are_short(page: str) -> None:
    longest = max(sentences((ROOT / page).read_text()), key=lambda sentence: len(re.findall(r"\w\S*", sentence)))
    assert len(re.findall(r"\w\S*", longest)) <= 30, longest


# Methods of bench.lds -> how a row of the tables begins.
METHODS = {
    "TRAK p=2048": "TRAK (traker, p = 2048)",
    "LoGRA (dattri)": "LoGRA (dattri)",
    "LoGRA d=32": "LoGRA, d = 32, our implementation",
    "LoRIF c=4": "LoRIF as published, c = 4",
    "EK-FAC (kronfluence)": "EK-FAC (kronfluence)",
    "library default": "**this library's default**",
}


def test_the_tables_have_the_figures_that_are_kept() -> None:
    tables = re.findall(r"(?:^\|.*\n)+", README, re.MULTILINE)
    assert len(tables) == 2 and all(len(table.splitlines()) == 2 + len(METHODS) for table in tables)
    kept = {
        task: json.loads((ROOT / "bench" / "results" / f"lds_{task}.json").read_text())["methods"]
        for task in ("digits", "fashion", "finetuned", "bible")
    }
    for method, name in METHODS.items():
        quality, speed = (next(line for line in table.splitlines() if line.startswith(f"| {name}")) for table in tables)
        figures = [kept[task][method] for task in kept]
        lds = [f"{figure[which][0]:.3f}".lstrip("0") for figure in figures for which in ("lds", "best_odd")]
        assert re.findall(r"(?<!\d)\.\d{3}", quality) == lds, name
        one = kept["finetuned"][method]
        size = f"{one['bytes_per_example']:,.0f}" if one["bytes_per_example"] else "none"
        assert quality.endswith(f" | {size} |"), name
        assert speed.endswith(f"| {one['build_seconds']:.0f} s | {one['query_milliseconds']:.0f} ms | {size} |"), name


def test_the_demo_is_shown_as_it_asks() -> None:
    page = (ROOT / "docs" / "demo.md").read_text()
    transcript = " ".join(block("demo-prints", page).split())
    assert f"“{QUESTION}”" in transcript and "Ask on: lorif search lorif-demo/index" in transcript
    assert block("demo-command") in page


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
