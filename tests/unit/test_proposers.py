"""Proposers against plain sorts: rows that are gone, coordinates on a device, and teams."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import assert_same_hits

pytest.importorskip("faiss")

from lorif_index.search import proposers
from lorif_index.search.coarse import Coarse, Codes
from lorif_index.search.proposers import FlatSketch, JointProposer, LivingRows, Proposer
from lorif_index.storage.manifest import Manifest
from lorif_index.storage.shards import Entries, write_shard
from lorif_index.storage.team import Team

N, DIM = 500, 24
CPU = torch.device("cpu")


def coordinates(n: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((n, DIM)) * np.exp(0.5 * rng.standard_normal((n, 1)))).astype(np.float32)


def exact(x: np.ndarray, z: np.ndarray, tilt: float) -> np.ndarray:
    return x @ z.T + tilt * np.linalg.norm(x, axis=1)[:, None] * np.linalg.norm(z, axis=1)


def proposer(kind: str) -> Proposer:
    z = coordinates(N)
    if kind == "sketch":
        return FlatSketch([torch.from_numpy(z)], N, DIM, CPU)
    codes = Codes.train(kind, z)
    return Coarse(codes.with_rows(codes.encode(z)))


@pytest.mark.parametrize("tilt", [0.0, 0.2])
@pytest.mark.parametrize("pairs", [proposers._PAIRS, 300])
def test_a_flat_sketch_is_the_coordinates(tilt: float, pairs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many rows are looked at together; coordinates of any size."""
    monkeypatch.setattr(proposers, "_PAIRS", pairs)
    z, x = coordinates(N), coordinates(9, 5)
    for unit in (1e-30, 1.0, 1e12):
        sketch = FlatSketch([torch.from_numpy(part * np.float32(unit)) for part in np.array_split(z, 4)], N, DIM, CPU)
        assert len(sketch) == N and sketch.tilts
        positions, scores = sketch.search(x, 15, tilt)
        wanted = exact(x, z, tilt)
        none = 2e-3 * np.abs(wanted).max()
        np.testing.assert_allclose(scores / unit, -np.sort(-wanted, axis=1)[:, :15], rtol=0, atol=none)
        np.testing.assert_allclose(np.take_along_axis(wanted, positions, axis=1), scores / unit, rtol=0, atol=none)
        assert (np.diff(scores, axis=1) <= 0).all() and all(len(set(row)) == 15 for row in positions.tolist())
    assert sketch.search(x, 2 * N)[0].shape == (9, N)
    # Nor does the queries' size matter.
    sketch = FlatSketch([torch.from_numpy(z)], N, DIM, CPU)
    positions, scores = sketch.search(x, 15, tilt)
    found, small = sketch.search(x * np.float32(1e-25), 15, tilt)
    assert np.mean(found == positions) > 0.98
    np.testing.assert_allclose(small * 1e25, scores, rtol=1e-4)


def test_rows_and_queries_of_zeros_are_no_trouble() -> None:
    z, x = coordinates(N), np.zeros((2, DIM), np.float32)
    z[7] = 0.0
    positions, scores = FlatSketch([torch.from_numpy(z)], N, DIM, CPU).search(x, 4)
    assert positions.shape == (2, 4) and not scores.any()


@pytest.mark.parametrize("kind", ["sketch", "auto", "flat"])
@pytest.mark.parametrize("gone", ["few", "most", "the best", "all"])
def test_dead_rows_are_not_proposed(kind: str, gone: str) -> None:
    inner, x = proposer(kind), coordinates(6, 5)
    order, scores = inner.search(x, N, 0.1)
    dead = np.zeros(N, dtype=bool)
    if gone == "the best":
        # Of the first query: the first ones that are asked for are all gone.
        dead[order[0, :200]] = True
    else:
        dead[np.random.default_rng(0).permutation(N)[: {"few": 20, "most": 470, "all": N}[gone]]] = True
    living = LivingRows(inner, dead)
    assert living.tilts == inner.tilts
    for count in (1, 10, 25, N):
        most = min(count, int((~dead).sum()))
        positions, found = living.search(x, count, 0.1)
        assert positions.shape == found.shape == (6, most)
        for q in range(6):
            kept = ~dead[order[q]]
            assert not dead[positions[q]].any() and len(set(positions[q].tolist())) == most
            # The same scores; equal ones may be of other rows.
            np.testing.assert_allclose(found[q], scores[q][kept][:most], rtol=0, atol=1e-5 * np.abs(scores).max())


@pytest.mark.parametrize("ordered", [proposers.ORDERED_BYTES, 5000])
def test_one_rank_proposes_what_its_own_rows_do(tmp_path: Path, ordered: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many queries are put in order together."""
    monkeypatch.setattr(proposers, "ORDERED_BYTES", ordered)
    shard = write_shard(
        tmp_path, "a.h5", Entries(torch.zeros(N, 1, dtype=torch.uint8), np.arange(N), np.ones(N, np.float32))
    )
    team = Team.of(Manifest({}, {}, [], shards=[shard]))
    inner, x = proposer("auto"), coordinates(17, 5)
    joint = JointProposer(inner, team, tilts=True)
    positions, scores = inner.search(x, 10, 0.1)
    found, got = joint.search(x, 10, 0.1)
    assert joint.tilts
    assert_same_hits(SimpleNamespace(ids=found, scores=got), SimpleNamespace(ids=positions, scores=scores))
    assert joint.search(x[:0], 10)[0].shape == (0, 10)
    none, empty = JointProposer(None, team, tilts=False).search(x, 10)
    assert none.shape == empty.shape == (17, 0)
