"""Questions, streamed scores and top-k against plain sums and sorts."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorif_index.capture.gradients import LayerSpec
from lorif_index.codecs.factors import FactorCodec
from lorif_index.search.scoring import Question, TopK, stream_scores
from lorif_index.storage.resident import Resident
from lorif_index.storage.shards import Entries
from lorif_index.storage.store import Store, StoreWriter


def test_some_of_a_question_and_its_multiples() -> None:
    question = Question(
        {"a": torch.randn(4, 2, 3), "b": torch.randn(4, 5)}, torch.randn(4, 8), 4, torch.rand(9), torch.rand(4)
    )
    some = question.some(slice(1, 3))
    assert some.count == 2 and some.scale is question.scale and some.x is not None and some.thresholds is not None
    assert all(torch.equal(some.parts[name], question.parts[name][1:3]) for name in "ab")
    assert torch.equal(some.x, question.x[1:3]) and torch.equal(some.thresholds, question.thresholds[1:3])  # type: ignore[index]
    assert question.some(slice(3, 9)).count == 1
    times = torch.tensor([1.0, -2.0, 0.0, 3.0])
    scaled = question.scaled(times)
    assert torch.equal(scaled.parts["a"], question.parts["a"] * times[:, None, None])
    assert torch.equal(scaled.parts["b"], question.parts["b"] * times[:, None])
    assert torch.equal(scaled.x, question.x * times[:, None]) and scaled.count == 4  # type: ignore[arg-type, operator]
    bare = Question({"a": torch.ones(2, 3)}, None, 2)
    assert bare.some(slice(1)).x is None and bare.scaled(torch.ones(2)).x is None


@pytest.mark.parametrize("removed", [[], [0, 3, 4, 48]])
@pytest.mark.parametrize("scaled", [False, True])
def test_streamed_scores_are_those_of_living_rows(tmp_path: Path, removed: list[int], scaled: bool) -> None:
    codec = FactorCodec({"a": LayerSpec("a", 3, 4, 3, 4, 3)}, {}, "float32")
    g, q, numbers = torch.randn(50, 12), torch.randn(3, 12), itertools.count()
    writer = StoreWriter(tmp_path, codec.row_bytes, 17 * codec.row_bytes, [], lambda: f"{next(numbers)}.h5")
    writer.append(Entries(g.view(torch.uint8), np.arange(50), np.ones(50, np.float32)))
    writer.flush()
    rows = Resident(Store(tmp_path, codec.row_bytes, writer.sealed, removed=np.array(removed) if removed else None))
    alive = np.setdiff1d(np.arange(50), removed)
    scale = torch.rand(len(alive)) if scaled else None
    parts = {"a": q.view(3, 3, 4)}
    found = list(stream_scores(rows, codec.scorer(parts), Question(parts, None, 3, scale)))
    assert torch.cat([positions for positions, _, _ in found]).tolist() == alive.tolist()
    expected = (q @ g.T)[:, alive] * (1.0 if scale is None else scale)
    assert torch.allclose(torch.cat([scores for _, scores, _ in found], dim=1), expected, atol=1e-5)
    assert sum(read for _, _, read in found) == 50 * codec.row_bytes


@settings(deadline=None, max_examples=60)
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
