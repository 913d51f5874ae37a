"""Indexes of every format version that was ever released, and of every codec, as they lie on users' disks, for ever."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import assert_best, reader_of, share_of_best
from golden.make import QUERIES, SHAPES, WAYS, N, gradients

from lorif_index import Index
from lorif_index.codecs.registry import CODECS
from lorif_index.errors import CorruptionError, FormatVersionError
from lorif_index.search.coarse import faiss_is_installed
from lorif_index.storage.manifest import FORMAT_VERSION

GOLDEN = sorted(path for path in (Path(__file__).parents[1] / "golden").iterdir() if (path / "manifest.json").exists())
each = pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.name)


def way_of(path: Path) -> str:
    return path.name.partition("-")[2]


def near(a: object, b: object) -> None:
    expected = np.asarray(b)
    np.testing.assert_allclose(np.asarray(a), expected, rtol=0, atol=2e-5 * np.abs(expected).max())


def test_there_is_one_of_each_codec_and_version() -> None:
    manifests = [json.loads((path / "manifest.json").read_text()) for path in GOLDEN]
    assert {(one["format_version"], one["codec"]) for one in manifests} == {(FORMAT_VERSION, name) for name in CODECS}
    assert [one["codec"] for one in manifests] == [WAYS[way_of(path)]["store"] for path in GOLDEN]


def test_they_have_what_can_lie_in_an_index() -> None:
    """Codes in levels and in places, a side that is not turned, learnt projections, coarse codes and coordinates,
    removed rows."""
    found = {way_of(path): json.loads((path / "manifest.json").read_text()) for path in GOLDEN}
    levels, places = (found[way]["fits"]["codec"] for way in ("eigen", "sparse"))
    assert levels["bits"] > 1 and levels["entries"] == 0 and (places["bits"], places["entries"]) == (0, 10)
    sides = {way: set(one["fits"]["curvature"]["file"]["offsets"]) for way, one in found.items()}
    assert "left_0" in sides["eigen"] and "left_0" not in sides["sparse"] and "right_0" in sides["sparse"]
    assert all(layer["share"] == 0.3 for one in found.values() for layer in one["fits"]["curvature"]["layers"])
    assert "projections" in found["factors"]["fits"]
    assert found["factors"]["coarse"]["pieces"] == 0 < found["eigen"]["coarse"]["pieces"]
    assert all(one["removed"]["count"] == 2 for one in found.values())


@each
def test_old_indexes_answer_as_they_did_and_live_on(path: Path, tmp_path: Path) -> None:
    expected = json.loads((path / "expected.json").read_text())
    raw = {item.name: item.read_bytes() for item in path.iterdir()}
    shutil.copytree(path, tmp_path / "i")
    shapes = SHAPES[way_of(path)]
    index, query = Index.open(tmp_path / "i"), gradients(QUERIES, 1, shapes)
    index.verify()
    assert index.ids.tolist() == expected["ids"] and index.metadata == {"made": "golden"}
    scores = np.asarray(expected["scores"])
    near(index.scores(query), scores)
    near(index.self_influence(), expected["self"])
    assert_best(index.search(query, k=5), scores, index.ids, within=1e-4)
    if faiss_is_installed():
        assert share_of_best(index.search(query, k=5, exact=False), scores, index.ids, within=1e-4) == 1.0
    assert {item.name: item.read_bytes() for item in (tmp_path / "i").iterdir()} == raw, "asking changes nothing"
    gone = expected["hits"][0][0]
    index.remove([gone])
    assert index.add(gradients=[gradients(3, 2, shapes)]).tolist() == [N, N + 1, N + 2]
    index.compact()
    again = Index.open(tmp_path / "i")
    again.verify()
    kept = [place for place, i in enumerate(expected["ids"]) if i != gone]
    assert again.ids.tolist() == [*(i for i in expected["ids"] if i != gone), N, N + 1, N + 2]
    some = [again.ids[0], again.ids[40]]
    assert again.payloads([*some, N]) == [{"number": i} for i in some] + [None]
    near(again.scores(query)[:, : len(kept)], scores[:, kept])
    again.refit()
    Index.open(tmp_path / "i").verify()


@each
def test_a_file_of_theirs_that_is_damaged_is_named(path: Path, tmp_path: Path) -> None:
    shutil.copytree(path, tmp_path / "i")
    for file in reader_of(Index.open(tmp_path / "i")).files():
        damaged = file.path.read_bytes()
        file.path.write_bytes(damaged[:-1] + bytes([damaged[-1] ^ 1]))
        with pytest.raises(CorruptionError, match=file.path.name):
            Index.open(tmp_path / "i").verify()
        file.path.write_bytes(damaged)
    Index.open(tmp_path / "i").verify()


@each
def test_old_fits_are_taken(path: Path, tmp_path: Path) -> None:
    given = [gradients(20, 3, SHAPES[way_of(path)])]
    other = Index.build(tmp_path / "other", gradients=given, fit=path, progress=False)
    assert len(other) == 20 and other.codec == WAYS[way_of(path)]["store"]
    merged = Index.merge(tmp_path / "merged", [path, other], progress=False)
    assert len(merged) == N - 2 + 20
    merged.verify()


def test_a_newer_version_is_refused_by_name(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN[0], tmp_path / "i")
    path = tmp_path / "i" / "manifest.json"
    path.write_text(path.read_text().replace('"format_version": 1', '"format_version": 8'))
    with pytest.raises(FormatVersionError, match="version 8, and this library reads version 1"):
        Index.open(tmp_path / "i")
