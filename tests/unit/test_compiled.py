"""The compiled kernel against decoded rows in float64, and when it is loaded."""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from lorif_index.codecs import bits, compiled, sparse
from lorif_index.codecs.bits import CodeLayout, CodeScorer
from lorif_index.codecs.compiled import Kernel
from lorif_index.codecs.sparse import SparseLayout

needs_numba = pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="numba is not installed")


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    """Loaded, for this test alone."""
    made = Kernel()
    made.load()
    monkeypatch.setattr(bits, "KERNEL", made)
    monkeypatch.setattr(sparse, "KERNEL", made)
    return made


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def made(width: int, widths: tuple[int, ...], rows: int, queries: int) -> tuple[CodeLayout, torch.Tensor, torch.Tensor]:
    """A layout, rows of it, and queries of very unlike coordinates."""
    layout = CodeLayout(sum(widths), width, widths)
    generator = torch.Generator().manual_seed(rows + width)
    codes = layout.encode(torch.randn(rows, layout.dim, generator=generator))
    asked = torch.randn(queries, layout.dim, generator=generator)
    return layout, codes, asked * torch.randn(layout.dim, generator=generator).abs() ** 3


@needs_numba
@pytest.mark.parametrize("width", bits.BITS)
@pytest.mark.parametrize("widths", [(64,), (1, 7, 130, 0, 513), (3,) * 40])
def test_scores_are_those_of_decoded_rows(
    width: int, widths: tuple[int, ...], kernel: Kernel, two_threads: None
) -> None:
    for rows, queries in ((1, 1), (8, 2), (203, 3)):
        layout, codes, asked = made(width, widths, rows, queries)
        expected = asked.double().numpy() @ layout.decode(codes).double().numpy().T
        # What is behind the last row must not matter, nor that rows are a part of a larger block.
        block = torch.full((rows + 2, layout.row_bytes), 255, dtype=torch.uint8)
        block[1:-1] = codes
        scorer = CodeScorer(layout, asked)
        got = scorer.score(block[1:-1]).numpy()
        largest = float(asked.abs().sum(dim=1).max() * layout.decode(codes).abs().max())
        assert np.abs(got - expected).max() <= 1e-6 * largest
        assert "_cut" in scorer.__dict__


@needs_numba
@pytest.mark.parametrize(("dim", "entries"), [(50, 7), (5, 9), (70_000, 300)])
def test_named_coordinates_are_scored(dim: int, entries: int, kernel: Kernel, two_threads: None) -> None:
    layout, generator = SparseLayout(dim, entries), torch.Generator().manual_seed(0)
    codes = layout.encode(torch.randn(131, dim, generator=generator) ** 3)
    codes[5] = layout.encode(torch.zeros(1, dim))[0]
    for queries in (1, 2, 3):
        asked = torch.randn(queries, dim, generator=generator)
        expected = asked.double() @ layout.decode(codes).double().T
        largest = float(asked.abs().sum(dim=1).max() * layout.decode(codes).abs().max())
        assert (layout.scorer(asked).score(codes).double() - expected).abs().max() <= 1e-6 * largest
    # Forged: a row that names a place far behind the last has nothing there.
    codes[6, [0, entries, 2 * entries]] = 255
    asked = torch.randn(1, dim, generator=generator)
    expected = asked.double() @ layout.decode(codes).double().T
    assert torch.allclose(layout.scorer(asked).score(codes).double(), expected, rtol=1e-4, atol=1e-4)


@needs_numba
def test_zeros_and_large_numbers(kernel: Kernel) -> None:
    layout, codes, asked = made(1, (40, 40), 20, 3)
    asked[0], asked[1, :40] = 0.0, 1e30
    got, expected = CodeScorer(layout, asked).score(codes), asked.double() @ layout.decode(codes).double().T
    assert (got[0] == 0).all()
    largest = asked.abs().sum(dim=1, keepdim=True).double() * float(layout.decode(codes).abs().max())
    assert ((got.double() - expected).abs() <= 1e-6 * largest).all()


@needs_numba
def test_it_is_loaded_in_the_background_when_there_is_work(monkeypatch: pytest.MonkeyPatch) -> None:
    layout, codes, asked = made(2, (90, 60), 50, 2)
    lazy = Kernel()
    monkeypatch.setattr(bits, "KERNEL", lazy)
    monkeypatch.setattr(compiled, "WORTH", 3 * 2 * codes.numel())
    scorer = CodeScorer(layout, asked)
    before = scorer.score(codes)
    assert not lazy._asked and "_cut" not in scorer.__dict__
    for _ in range(2):
        scorer.score(codes)
    for thread in threading.enumerate():
        if thread.name == "lorif-kernel":
            thread.join()
    after = scorer.score(codes)
    assert "_cut" in scorer.__dict__
    assert torch.allclose(after, before, rtol=0, atol=1e-5 * float(before.abs().max()))


def test_without_numba_torch_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled.importlib.util, "find_spec", lambda name: None)
    lazy = Kernel()
    assert not any(lazy.ready(compiled.WORTH) for _ in range(3))
    assert all(thread.name != "lorif-kernel" for thread in threading.enumerate())


@needs_numba
def test_many_questions_over_wide_levels_are_left_to_products(kernel: Kernel) -> None:
    layout, codes, asked = made(8, (30, 20), 10, 5)
    scorer = CodeScorer(layout, asked)
    scorer.score(codes)
    assert "_cut" not in scorer.__dict__
