"""Coarse codes: what faiss's own index finds, from arrays; and files and entries that cannot be are refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import assert_same_hits

pytest.importorskip("faiss")

import faiss

from lorif_index.errors import CorruptionError
from lorif_index.search.coarse import Coarse, Codes, NormAxis, code_bytes, codebook_bytes, pieces_of, tilted
from lorif_index.storage.sealed import write_sealed

N = 700


def coordinates(n: int, dim: int, seed: int = 0) -> np.ndarray:
    """Of many sizes, with some directions stronger than others."""
    rng = np.random.default_rng(seed)
    z = rng.standard_normal((n, dim)) * np.linspace(2, 0.5, dim) * np.exp(0.4 * rng.standard_normal((n, 1)))
    return z.astype(np.float32)


def codes_of(z: np.ndarray, kind: str = "auto", sample: int = 400) -> Codes:
    made = Codes.train(kind, z[:sample])
    # In two parts, as a build encodes them.
    return made.with_rows(np.concatenate([made.encode(part) for part in (z[:300], z[300:])]))


def saved(codes: Codes, folder: Path) -> dict[str, Any]:
    entry: dict[str, Any] = json.loads(json.dumps(codes.save(folder, "coarse.h5")))
    return entry


def same(a: Codes, b: Codes) -> bool:
    return (a.dim, a.axis) == (b.dim, b.axis) and np.array_equal(a.books, b.books) and np.array_equal(a.rows, b.rows)


def test_pieces_divide_the_coordinates() -> None:
    for dim, pieces in {1: 1, 7: 7, 8: 4, 9: 9, 64: 32, 512: 256, 1024: 256, 2048: 256, 514: 1}.items():
        assert pieces_of(dim) == pieces and code_bytes("auto", dim) == -(-pieces // 2) <= 128
        assert code_bytes("flat", dim) == 4 * dim and codebook_bytes(dim) == 4 * 16 * dim
    # Where so few rows cannot teach 16 codewords, coordinates are kept.
    assert pieces_of(64, 15) == 0 and pieces_of(64, 16) == 32


@pytest.mark.parametrize("dim", [7, 8, 13, 16, 64])
@pytest.mark.parametrize("tilt", [0.0, 0.1])
def test_a_search_finds_what_faiss_finds(dim: int, tilt: float) -> None:
    z, x = coordinates(N, dim), coordinates(40, dim, 5)
    codes = codes_of(z)
    pieces = pieces_of(dim)
    assert codes.rows.shape == (N, -(-pieces // 2)) and codes.rows.dtype == np.uint8 and len(codes) == N
    assert codes.rows.shape[1] == code_bytes("auto", dim) and codes.books.nbytes == codebook_bytes(dim)
    index = faiss.index_factory(dim, f"PQ{pieces}x4fs", faiss.METRIC_INNER_PRODUCT)
    index.pq.cp.min_points_per_centroid = 1
    axis = codes.axis
    # Norms take the place of two coordinates, where there are some to spare.
    assert (axis is None) == (dim < 8)
    index.train(z[:400] if axis is None else axis.rows(z[:400]))
    index.add(z if axis is None else axis.rows(z))
    coarse = Coarse(codes)
    assert len(coarse) == N and coarse.dim == dim and coarse.tilts == (axis is not None)
    scores, positions = index.search(x if axis is None else axis.queries(x, tilt), 30)
    if axis is not None:
        scores = tilted(scores, x, np.full(30, axis.mean), tilt)
    found, got = coarse.search(x, 30, tilt)
    # Tables are rounded to bytes: the last bit of an entry may move it to the next level.
    wanted = SimpleNamespace(ids=positions, scores=scores)
    assert_same_hits(SimpleNamespace(ids=found, scores=got), wanted, 0.01)
    for i in (0, 7):
        alone, score = coarse.search(x[i : i + 1], 30, tilt)
        one = SimpleNamespace(ids=positions[i : i + 1], scores=scores[i : i + 1])
        assert_same_hits(SimpleNamespace(ids=alone, scores=score), one, 0.01)


@pytest.mark.parametrize("tilt", [0.0, 0.3])
def test_codes_are_about_the_coordinates(tilt: float) -> None:
    z, x = coordinates(N, 64), coordinates(40, 64, 5)
    exact = x @ z.T + tilt * np.linalg.norm(x, axis=1)[:, None] * np.linalg.norm(z, axis=1)
    positions, scores = Coarse(codes_of(z)).search(x, N, tilt)
    assert all(sorted(row) == list(range(N)) for row in positions.tolist())
    assert (np.diff(scores, axis=1) <= 0).all()
    assert np.corrcoef(scores.ravel(), np.take_along_axis(exact, positions, axis=1).ravel())[0, 1] > 0.9
    # More are asked for than there are.
    assert Coarse(codes_of(z)).search(x, N + 50, tilt)[0].shape == (40, N)


@pytest.mark.parametrize("tilt", [0.0, 0.3])
@pytest.mark.parametrize(("kind", "sample"), [("flat", 400), ("auto", 15)])
def test_flat_codes_are_the_coordinates(kind: str, sample: int, tilt: float) -> None:
    z, x = coordinates(N, 32), coordinates(5, 32, 5)
    codes = codes_of(z, kind, sample)
    assert codes.rows.dtype == np.float32 and codes.rows.shape == (N, 32) and codes.books.shape == (0, 16, 32)
    # But for two of them, where norms are.
    z[:, -2:] = x[:, -2:] = 0.0
    coarse, norms = Coarse(codes_of(z, kind, sample)), np.linalg.norm(z, axis=1)
    exact = x @ z.T + tilt * np.linalg.norm(x, axis=1)[:, None] * norms
    positions, scores = coarse.search(x, 20, tilt)
    np.testing.assert_allclose(scores, -np.sort(-exact, axis=1)[:, :20], rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(scores, np.take_along_axis(exact, positions, axis=1), rtol=1e-4, atol=1e-3)


def test_norms_that_are_all_alike_have_no_axis() -> None:
    z = coordinates(100, 16)
    assert NormAxis.fit(z / np.linalg.norm(z, axis=1, keepdims=True)) is None and NormAxis.fit(z[:, :7]) is None
    axis = NormAxis.fit(z)
    assert axis is not None and NormAxis.from_json(axis.to_json()) == axis and NormAxis.from_json(None) is None
    # The axis spreads as a coordinate does.
    rows = axis.rows(z)
    assert rows[:, -2].std() == pytest.approx(np.sqrt(np.square(z).mean()), rel=1e-3) and not rows[:, -1].any()
    assert np.array_equal(rows[:, :-2], z[:, :-2])


@pytest.mark.parametrize("kind", ["auto", "flat"])
@pytest.mark.parametrize("dim", [7, 64])
def test_codes_come_back_whole_and_in_part(kind: str, dim: int, tmp_path: Path) -> None:
    codes = codes_of(coordinates(N, dim), kind)
    entry = saved(codes, tmp_path)
    assert same(Codes.load(tmp_path, entry), codes)
    for part in (slice(0, 0), slice(0, 1), slice(13, 500), slice(N - 1, N), slice(600, 10 * N), slice(N, N)):
        assert same(Codes.load(tmp_path, entry, part), codes.with_rows(codes.rows[part]))
    x = coordinates(3, dim, 5)
    again, whole = Coarse(Codes.load(tmp_path, entry)).search(x, 9), Coarse(codes).search(x, 9)
    assert np.array_equal(again[0], whole[0]) and np.array_equal(again[1], whole[1])


@pytest.mark.parametrize("kind", ["auto", "flat"])
def test_there_may_be_no_rows(kind: str, tmp_path: Path) -> None:
    codes = Codes.train(kind, coordinates(50, 16))
    assert len(codes) == 0 and codes.encode(np.empty((0, 16), np.float32)).shape == codes.rows.shape
    again = Codes.load(tmp_path, saved(codes, tmp_path))
    assert same(again, codes) and len(Coarse(again)) == 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"dim": 0},
        {"dim": None},
        {"dim": 63},
        {"dim": "wide"},
        {"dim": 1e400},
        {"pieces": -1},
        {"pieces": 31},
        {"pieces": 258},
        {"pieces": [32]},
        {"rows": -1},
        {"rows": float("nan")},
        {"rows": 1 << 60},
        {"axis": [1.0]},
        {"axis": [1.0, 0.0]},
        {"axis": [float("inf"), 1.0]},
        {"axis": "ab"},
        {"axis": 3},
        {"file": None},
        {"file": "coarse.h5"},
    ],
)
def test_entries_that_cannot_be_are_refused(wrong: dict[str, Any], tmp_path: Path) -> None:
    entry = saved(codes_of(coordinates(N, 64)), tmp_path)
    with pytest.raises(CorruptionError):
        Codes.load(tmp_path, entry | wrong)
    with pytest.raises(CorruptionError):
        Codes.load(tmp_path, {key: value for key, value in entry.items() if key not in wrong})
    with pytest.raises(CorruptionError):
        Codes.load(tmp_path, None)


@pytest.mark.parametrize("kind", ["auto", "flat"])
def test_damaged_files_are_refused(kind: str, tmp_path: Path) -> None:
    codes = codes_of(coordinates(N, 16), kind)
    entry, path = saved(codes, tmp_path), tmp_path / "coarse.h5"
    raw = path.read_bytes()
    for at in (0, len(raw) // 2, len(raw) - 1):
        path.write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])
        for part in (None, slice(0, 1)):
            with pytest.raises(CorruptionError, match="digest"):
                Codes.load(tmp_path, entry, part)
    path.write_bytes(raw[:-1])
    with pytest.raises(CorruptionError, match=f"{len(raw) - 1} bytes where {len(raw)}"):
        Codes.load(tmp_path, entry)
    path.unlink()
    with pytest.raises(CorruptionError, match="cannot be opened"):
        Codes.load(tmp_path, entry)


@pytest.mark.parametrize("kind", ["auto", "flat"])
def test_files_that_were_sealed_with_inf_or_without_codes_are_refused(kind: str, tmp_path: Path) -> None:
    codes = codes_of(coordinates(N, 16), kind)
    spoilt = codes.rows.copy() if kind == "flat" else codes.books.copy()
    spoilt.reshape(-1)[3] = np.nan
    wrong = dataclasses.replace(codes, **{"rows" if kind == "flat" else "books": spoilt})
    with pytest.raises(CorruptionError, match="inf or NaN"):
        Codes.load(tmp_path, saved(wrong, tmp_path))
    info = write_sealed(tmp_path, "none.h5", {"other": codes.rows})
    with pytest.raises(CorruptionError, match="dataset"):
        Codes.load(tmp_path, saved(codes, tmp_path) | {"file": info.to_json()})
