"""Indexes of every format version that was ever released, as they lie on users' disks, for ever."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from golden.make import QUERIES, SHAPES, WIDE, N, gradients

from lorif_index import Index
from lorif_index.errors import FormatVersionError
from lorif_index.search.coarse import faiss_is_installed
from lorif_index.storage.manifest import READABLE

GOLDEN = sorted(path for path in (Path(__file__).parents[1] / "golden").iterdir() if (path / "manifest.json").exists())


def near(a: object, b: object) -> None:
    expected = np.asarray(b)
    np.testing.assert_allclose(np.asarray(a), expected, rtol=0, atol=2e-5 * np.abs(expected).max())


def test_there_is_one_of_each_version() -> None:
    versions = {json.loads((path / "manifest.json").read_text())["format_version"] for path in GOLDEN}
    assert versions == set(READABLE)


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.name)
def test_old_indexes_answer_as_they_did_and_live_on(path: Path, tmp_path: Path) -> None:
    expected = json.loads((path / "expected.json").read_text())
    raw = {item.name: item.read_bytes() for item in path.iterdir()}
    shutil.copytree(path, tmp_path / "i")
    shapes = WIDE if path.name.endswith(("-wide", "-largest")) else SHAPES
    index, query = Index.open(tmp_path / "i"), gradients(QUERIES, 1, shapes)
    index.verify()
    assert index.ids.tolist() == expected["ids"] and index.metadata == {"made": "golden"}
    if expected["scores"] is not None:
        near(index.scores(query), expected["scores"])
        near(index.self_influence(), expected["self"])
        assert index.search(query, k=5).ids.tolist() == expected["hits"]
    elif faiss_is_installed():
        assert index.search(query, k=5).ids.tolist() == expected["hits"]
    assert {item.name: item.read_bytes() for item in (tmp_path / "i").iterdir()} == raw, "asking changes nothing"
    gone = expected["hits"][0][0]
    index.remove([gone])
    assert index.add(gradients=[gradients(3, 2, shapes)]).tolist() == [N, N + 1, N + 2]
    index.compact()
    again = Index.open(tmp_path / "i")
    again.verify()
    kept = [place for place, i in enumerate(expected["ids"]) if i != gone]
    assert again.ids.tolist() == [*(i for i in expected["ids"] if i != gone), N, N + 1, N + 2]
    if json.loads(raw["manifest.json"])["format_version"] >= 5:
        assert again.payloads([2, 47, N]) == [{"number": 2}, {"number": 47}, None]
    if expected["scores"] is not None:
        near(again.scores(query)[:, : len(kept)], np.asarray(expected["scores"])[:, kept])
    assert json.loads((tmp_path / "i" / "manifest.json").read_text())["format_version"] == READABLE[-1]


@pytest.mark.parametrize("path", [p for p in GOLDEN if int(p.name[1]) >= 6], ids=lambda path: path.name)
def test_old_fits_are_taken(path: Path, tmp_path: Path) -> None:
    largest = path.name.endswith("-largest")
    other = Index.build(tmp_path / "other", gradients=[gradients(20, 3, WIDE)], fit=path, progress=False)
    assert len(other) == 20 and (other._reader.layout.eigen.label[:7] == "largest") == largest


def test_a_newer_version_is_refused_by_name(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN[0], tmp_path / "i")
    path = tmp_path / "i" / "manifest.json"
    path.write_text(path.read_text().replace('"format_version": 1', '"format_version": 8'))
    with pytest.raises(FormatVersionError, match=r"version 8, and this library reads versions \(1, 2, 3, 4, 5, 6, 7\)"):
        Index.open(tmp_path / "i")
