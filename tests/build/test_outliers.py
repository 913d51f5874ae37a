"""A few examples that hold most of the self-influence are noticed at the build, and told of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import reader_of
from rich.console import Console

from lorif_index import BuildConfig, Index
from lorif_index.build import outliers
from lorif_index.cli.show import index_json, show_index

N = 400


def built(path: Path, large: int, **settings: Any) -> Index:
    """Of gradients, so many of them a hundred times the others'."""
    g = np.random.default_rng(3).normal(size=(N, 4, 5)).astype(np.float32)
    g[7 : 7 + large] *= 100
    return Index.build(path, gradients=[{"a": g}], config=BuildConfig(**settings), progress=False)


@pytest.mark.parametrize("store", ["eigen", "factors"])
@pytest.mark.parametrize("large", [0, 3])
def test_share_is_of_the_largest_self_influences(store: str, large: int, tmp_path: Path) -> None:
    index = built(tmp_path / "i", large, store=store)
    found = index.build_report["outliers"]
    own = np.sort(index.self_influence().astype(np.float64))[::-1]
    assert found["examples"] == N
    assert found["share"] == pytest.approx(own[: N // 100].sum() / own.sum(), rel=1e-4)
    assert (found["share"] > 0.5) == (large > 0) and json.loads(json.dumps(found)) == found


@pytest.mark.parametrize("large", [0, 3])
def test_it_is_told_with_its_remedy(large: int, tmp_path: Path) -> None:
    out = Console(record=True, width=200)
    show_index(out, index_json(built(tmp_path / "i", large)))
    told = out.export_text()
    assert ("holds" in told and "search with --normalize relatif" in told) == (large > 0)


def test_where_nothing_can_be_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outliers, "_LEAST", N + 1)
    assert built(tmp_path / "i", 3).build_report["outliers"] is None


def test_a_sample_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = built(tmp_path / "i", 3)
    monkeypatch.setattr(outliers, "_EXAMPLES", 200)
    reader = reader_of(index)
    found = outliers.measure_outliers(reader.rows, reader.preconditioners(index.layers, index.damping))
    chosen, _ = reader.rows.drawn("outliers", 200)
    own = np.sort(index.self_influence()[chosen].astype(np.float64))[::-1]
    assert found is not None and found["examples"] == 200 == len(np.unique(chosen))
    assert found["share"] == pytest.approx(own[:2].sum() / own.sum(), rel=1e-4)
