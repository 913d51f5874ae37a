"""Streamed scoring and top-k against plain sums and sorts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lorif_index.codecs.layout import RowLayout

from lorif_index.capture.gradients import LayerSpec
from lorif_index.curvature.inverse import products
from lorif_index.search.scoring import Scorer, TopK

SPECS = {
    "a": LayerSpec("a", 8, 6, 8, 6, 2),
    "full": LayerSpec("full", 4, 5, 4, 5, 4),
    "c": LayerSpec("c", 8, 6, 8, 6, 2),
    "one": LayerSpec("one", 7, 3, 7, 3, 1),
}


@pytest.mark.parametrize("queries", [1, 3, 40])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("names", [tuple(SPECS), ("c",), ("full", "one")])
def test_all_routes_are_the_sum_over_pairs(queries: int, dtype: str, names: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    layout = RowLayout(SPECS, dtype)
    rows = layout.rows(torch.randn(700, layout.width).to(layout.torch_dtype), None)
    question = {name: torch.randn(queries, SPECS[name].d_in, SPECS[name].d_out) for name in names}
    got = Scorer(layout, question).score(rows)
    expected = torch.zeros(queries, 700, dtype=torch.float64)
    for name, factors in layout.unpack(rows).items():
        if name in names:
            expected += torch.einsum("nij,qij->qn", factors.dense().double(), question[name].double())
    assert got.dtype == torch.float32
    assert float((got - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


@settings(deadline=None, max_examples=80)
@given(
    q=st.integers(1, 4),
    k=st.integers(1, 12),
    sizes=st.lists(st.integers(1, 20), min_size=1, max_size=6),
    levels=st.integers(1, 6),
    largest=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_top_k_is_a_stable_sort(q: int, k: int, sizes: list[int], levels: int, largest: bool, seed: int) -> None:
    """Few distinct values, so that ties are everywhere: they go to the earlier row."""
    scores = np.random.default_rng(seed).integers(-levels, levels, (q, sum(sizes))).astype(np.float32)
    k = min(k, scores.shape[1])
    top, at = TopK(q, k, largest=largest), 0
    for size in sizes:
        part = torch.from_numpy(scores[:, at : at + size])
        top.update(torch.arange(at, at + part.shape[1]), part)
        at += size
    positions, values = (t.numpy() for t in top.result())
    order = np.argsort(-scores if largest else scores, axis=1, kind="stable")[:, :k]
    assert np.array_equal(positions, order)
    assert np.array_equal(values, np.take_along_axis(scores, order, axis=1))


@pytest.mark.parametrize("count", [1, 3, 8, 9, 40])
def test_layers_that_lie_together_are_multiplied_together(count: int) -> None:
    """Neighbours in memory, layers left out, other shapes and single ones: always rows @ matrix."""
    torch.manual_seed(0)
    room = torch.randn(4, 7, 5)
    matrices = {f"n{i}": room[i] for i in range(4)} | {"far": torch.randn(7, 5), "other": torch.randn(9, 5)}
    for names in (list(matrices), ["n0", "n2", "n3", "other"], ["n3", "n2"], ["far"]):
        rows = {n: torch.randn(count, matrices[n].shape[0]) for n in names}
        found = products(rows, matrices)
        back = products(found, matrices, transposed=True)
        assert list(found) == list(back) == names
        for n in names:
            assert torch.allclose(found[n], rows[n] @ matrices[n], atol=1e-5)
            assert torch.allclose(back[n], found[n] @ matrices[n].T, atol=1e-4)
