"""The docs are true: the site builds and asks the network for nothing; guides, the start page and notebooks run."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import lorif_index
from lorif_index import text
from scripts.notebooks import NAMES, NOTEBOOKS, cells, executed

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


def block(page: Path, mark: str) -> str:
    found = re.search(rf"<!-- {re.escape(mark)} -->\n```python\n(.*?)```", page.read_text(), re.DOTALL)
    assert found, mark
    return found[1]


# -- the site


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for package in ("mkdocs", "material", "mkdocstrings", "griffe"):
        pytest.importorskip(package, reason="the site is built with the docs extra")
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(out)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout + done.stderr == ""
    return out


class Loaded(HTMLParser):
    """What a page makes a browser fetch, and where its links lead."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag == "link" and values.get("rel") in ("canonical", "next", "prev"):
            return
        for name in ("src", "srcset", "poster", "data", *(["href"] if tag in ("link", "image", "use") else [])):
            if values.get(name):
                self.fetched.append(str(values[name]))
        if tag == "a" and values.get("href"):
            self.links.append(str(values["href"]))


def pages(site: Path) -> Iterator[tuple[Path, Loaded]]:
    for path in sorted(site.rglob("*.html")):
        loaded = Loaded()
        loaded.feed(path.read_text())
        yield path, loaded


def test_the_site_has_every_page_and_asks_the_network_for_nothing(site: Path) -> None:
    made = {path.relative_to(site).as_posix() for path, _ in pages(site)}
    written = {path.relative_to(DOCS).with_suffix(".html").as_posix() for path in DOCS.rglob("*.md")}
    notebooks = {f"notebooks/{name}.html" for name in NAMES}
    assert made == written | notebooks | {"404.html", "benchmarks.html", "changelog.html", "contributing.html"}
    for path, loaded in pages(site):
        assert loaded.fetched, path
        for address in loaded.fetched:
            assert not re.match(r"(https?:)?//", address), f"{path.name} fetches {address}"
    for style in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*[\"']?(https?:)?//", style.read_text()), style


def test_links_are_relative_and_lead_somewhere(site: Path) -> None:
    for path, loaded in pages(site):
        if path.name == "404.html":
            continue
        for link in loaded.links:
            if re.match(r"[a-z]+:", link):
                continue
            assert not link.startswith("/"), f"{path.name}: {link}"
            target = link.partition("#")[0]
            assert not target or (path.parent / target).exists(), f"{path.name}: {link}"


def test_the_reference_has_all_that_is_public(site: Path) -> None:
    page = (site / "api.html").read_text()
    for name in lorif_index.__all__:
        anchor = "lorif_index.errors.LorifError" if name == "LorifError" else f"lorif_index.{name}"
        assert f'id="{anchor}"' in page, name
    for name in ("search", "explain", "groups", "self_influence", "verify"):
        assert f'id="lorif_index.Index.{name}"' in page, name
    for name in text.__all__:
        assert f'id="lorif_index.text.{name}"' in page, name


def test_the_references_tables_are_of_the_docstrings() -> None:
    """The page says what there is without the site, too."""

    def first(thing: Any) -> str:
        return " ".join(str(inspect.getdoc(thing)).split("\n\n")[0].split())

    page = (DOCS / "api.md").read_text()
    names = {n: getattr(lorif_index, n) for n in lorif_index.__all__}
    names |= {f"text.{n}": getattr(text, n) for n in text.__all__}
    names |= {n: getattr(lorif_index.Index, n) for n in dir(lorif_index.Index) if not n.startswith("_")}
    assert re.findall(r"^\| `(.*?)` \| (.*) \|$", page, re.MULTILINE) == [(n, first(of)) for n, of in names.items()]


# -- the start page


def test_the_start_page_runs_in_as_many_lines_as_it_says(run: Any) -> None:
    start = DOCS / "index.md"
    example = block(start, "example: image classifier")
    names, _ = run(block(start, "setup: image classifier") + example)
    hits, labels = names["hits"], names["labels"]
    assert hits.ids.shape == (4, 5)
    same = labels[hits.ids] == labels[1500:1504, None]
    assert same.float().mean() >= 0.8
    said = dict(re.findall(r"^\| (?:\[)?([a-zA-Z ]+?)(?:\].*?)? \| (\d+) \|$", start.read_text(), re.MULTILINE))
    assert int(said["image classifier"]) == len([line for line in example.splitlines() if line])
    # Those of transformers.md are counted by its own tests.
    there = dict(re.findall(r"^\| ([a-zA-Z -]+) \| (\d+) \|$", (DOCS / "transformers.md").read_text(), re.MULTILINE))
    assert said["language model"] == there["language model"]
    assert re.search(rf"^\| \[LoRA fine-tune\].* \| {there['LoRA fine-tune']} \|$", start.read_text(), re.MULTILINE)


def test_the_table_of_extras_is_that_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    table = (DOCS / "index.md").read_text().partition("\n## Extras\n")[2].partition("\n## ")[0]
    said = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", table, re.MULTILINE))
    assert list(said) == list(project)
    for name, cell in said.items():
        needs = [re.match(r"[\w-]+", one)[0] for one in project[name]]  # type: ignore[index]
        others = [extra for one in project[name] for extra in re.findall(r"lorif-index\[(.*)\]", one)]
        own = set(needs) - {"lorif-index"}
        assert set(re.findall(r"[\w-]+", re.sub(r"`\w+`", "", cell))) - {"and"} == own, name
        assert re.findall(r"`(\w+)`", cell) == [one for part in others for one in part.split(",")], name


# -- guides


def test_a_wrong_answer_is_found_explained_and_gone_without_its_cause(run: Any) -> None:
    pytest.importorskip("transformers")
    names, printed = run(block(DOCS / "guides" / "wrong-answer.md", "example"))
    assert names["said"] == names["rumour"][names["wrong"]], "the model does not say what the forum says"
    groups = {group.value: group.sum for group in names["hits"].groups[0]}
    assert groups["forum"] > 0 > groups["archive"]
    assert {note["source"] for note in names["hits"].payloads[0]} == {"forum"}
    assert f"without them: {names['home'][names['wrong']]}" in printed
    assert names["texts"][names["best"].id][0].split()[names["place"]] == "in"


def test_mislabelled_examples_are_found(run: Any) -> None:
    names, _ = run(block(DOCS / "guides" / "mislabelled.md", "example"))
    assert names["found"] > 0.8 and names["by_loss"] > 0.8


def test_a_careless_source_is_found(run: Any) -> None:
    names, _ = run(block(DOCS / "guides" / "sources.md", "example"))
    total = names["total"]
    assert total["careless"] < 0 < min(total["north"], total["south"])


def test_removing_what_harms_helps(run: Any) -> None:
    names, _ = run(block(DOCS / "guides" / "removal.md", "example"))
    everything = names["held_out"](names["model"])
    assert names["without_harmful"] < 0.9 * min(everything, names["without_any"])
    assert len(names["index"]) == 900


def test_what_is_chosen_teaches_more_than_chance(run: Any) -> None:
    names, printed = run(block(DOCS / "guides" / "select.md", "example"))
    losses = [float(line.split("loss ")[1].split()[0]) for line in printed.splitlines()[:4]]
    assert max(losses[1:]) < 0.8 * losses[0]
    assert set(names["rows"]) == {"id", "score", "question", "x", "y"}


# -- notebooks

TINY = {
    "digits": "examples, flips, steps = 300, 30, 40",
    "language_model": "passages, seconds, width, depth, vocabulary = 12, 1, 16, 1, 300",
}


@pytest.mark.parametrize("name", NAMES)
def test_the_cells_of_notebooks_run(run: Any, name: str) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("transformers")
    code = [text for kind, text in cells(name) if kind == "code"]
    sizes = TINY[name].partition(" = ")[0]
    assert code[0].startswith(f"{sizes} = ") and "\n" not in code[0], "the first cell has the sizes"
    names, printed = run("\n".join([TINY[name], *code[1:]]))
    assert printed and len(names["index"])


@pytest.mark.parametrize("name", NAMES)
def test_notebooks_are_those_of_their_sources_with_outputs(name: str) -> None:
    made = json.loads((NOTEBOOKS / f"{name}.ipynb").read_text())
    assert [(cell["cell_type"], "".join(cell["source"])) for cell in made["cells"]] == cells(name)
    outputs = [output for cell in made["cells"] for output in cell.get("outputs", ())]
    assert all(cell["execution_count"] for cell in made["cells"] if cell["cell_type"] == "code")
    assert outputs and all(output["output_type"] != "error" for output in outputs)
    assert any("image/png" in output.get("data", ()) for output in outputs)
    assert not re.search(r"/(home|tmp|root|work)/", (NOTEBOOKS / f"{name}.ipynb").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_notebooks_run_as_they_are(name: str) -> None:
    for package in ("nbformat", "nbclient", "ipykernel", "matplotlib"):
        pytest.importorskip(package)
    outputs = [o for cell in executed(name).cells for o in cell.get("outputs", ())]
    assert outputs and all(o["output_type"] != "error" for o in outputs)
