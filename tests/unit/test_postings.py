"""Postings: rows turned round score as rows do, by the kernel and without it; when they are turned."""

from __future__ import annotations

import importlib.util
import threading
from typing import Any

import numpy as np
import pytest
import torch

from lorif_index.codecs import postings
from lorif_index.codecs.compiled import Kernel
from lorif_index.codecs.postings import Postings, Shortened
from lorif_index.codecs.sparse import SparseLayout

WITH = pytest.param(True, marks=pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="no numba"))


@pytest.fixture(params=[WITH, False])
def kernel(request: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Kernel()
    if not request.param:
        made._failed = True
    monkeypatch.setattr(postings, "KERNEL", made)
    monkeypatch.setattr(postings, "BLOCK", 100)


def coded(rows: int, dim: int, entries: int, *, forged: bool = False) -> tuple[SparseLayout, torch.Tensor]:
    layout, generator = SparseLayout(dim, entries), torch.Generator().manual_seed(rows)
    codes = layout.encode(torch.randn(rows, dim, generator=generator) ** 3)
    if rows > 5:
        codes[5] = layout.encode(torch.zeros(1, dim))[0]
        if forged:
            # It names a place behind the last.
            codes[4, [0, entries, 2 * entries]] = 255
    return layout, codes


@pytest.mark.parametrize(("rows", "dim", "entries"), [(1, 5, 2), (100, 40, 7), (357, 3000, 60)])
@pytest.mark.parametrize("threads", [1, 3])
def test_scores_are_those_of_decoded_rows(rows: int, dim: int, entries: int, threads: int, kernel: None) -> None:
    layout, codes = coded(rows, dim, entries, forged=True)
    turned = Postings(layout, codes)
    generator = np.random.default_rng(0)
    for count in (0, 1, min(dim, 500)):
        places = np.sort(generator.choice(dim, count, replace=False)).astype(np.int64)
        numbers = generator.standard_normal(count).astype(np.float32)
        asked = np.zeros(dim)
        asked[places] = numbers
        expected = layout.decode(codes).double().numpy() @ asked
        near = 1e-5 * max(np.abs(expected).max(), 1e-6)
        for most in {rows, -(-rows // 2), min(rows, 3)}:
            found, got = turned.best(places, numbers, most, threads)
            assert got.dtype == np.float32 and len(found) == len(got) == most == len(np.unique(found))
            assert np.abs(got - expected[found]).max(initial=0.0) <= near and (np.diff(got) <= 0).all()
            assert np.abs(got + np.sort(-expected)[:most]).max(initial=0.0) <= near
    assert turned.nbytes < rows * (3 * entries + 4) + (rows // 100 + 1) * 4 * (dim + 1) + 1


@pytest.mark.parametrize("threads", [1, 3])
def test_what_is_no_number_is_seen(threads: int, kernel: None) -> None:
    layout, codes = coded(357, 300, 20)
    # Forged: the scales of two rows are no numbers.
    codes[[9, 250], -2:] = torch.tensor([float("nan")], dtype=torch.bfloat16).view(torch.uint8)
    rows, scores = Postings(layout, codes).best(np.arange(300), np.ones(300, np.float32), 20, threads)
    assert {9, 250} <= set(rows.tolist()) and np.isnan(scores).sum() == 2


def test_no_rows(kernel: None) -> None:
    layout, codes = coded(9, 30, 4)
    rows, scores = Postings(layout, codes[:0]).best(np.arange(3), np.ones(3, np.float32), 2, 2)
    assert len(rows) == len(scores) == 0


def test_rows_are_turned_for_many_questions_and_give_the_same(kernel: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postings, "_FEW_ROWS", 300)
    monkeypatch.setattr(postings, "_ASKED", 50)
    layout, codes = coded(350, 200, 30)
    x = np.random.default_rng(1).standard_normal((9, 200)).astype(np.float32)
    cut = np.where(np.abs(x) >= np.sort(np.abs(x), axis=1)[:, -50:][:, :1], x, 0)
    expected = cut.astype(np.float64) @ layout.decode(codes).double().numpy().T
    rows = Shortened(layout, codes)
    first = rows.best(x[:1], 20)
    assert not rows.turned
    by_row = rows.best(x[1:7], 20)
    for thread in threading.enumerate():
        if thread.name == "lorif-postings":
            thread.join()
    assert rows.turned, "two questions one after the other are worth it"
    at_once = Shortened(layout, codes)
    whole = at_once.best(x, 20)
    assert at_once.turned
    again = rows.best(x, 20)
    for positions, scores in (again, whole):
        found = np.take_along_axis(expected, positions, axis=1)
        best = -np.sort(-expected, axis=1)[:, :20]
        assert np.abs(found - best).max() <= 1e-4 * np.abs(best).max() >= np.abs(scores - best).max()
    for (positions, scores), part in ((first, slice(0, 1)), (by_row, slice(1, 7))):
        assert np.allclose(scores, again[1][part], rtol=1e-4) and (positions == again[0][part]).mean() > 0.95
    few = Shortened(*coded(120, 200, 30))
    assert few.best(x, 5)[0].shape == (9, 5) and not few.turned, "few rows are scored one by one"
    assert rows.best(x[:0], 4)[0].shape == (0, 4)
