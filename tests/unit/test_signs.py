"""Random signs of probes: of an example's own, whatever it is drawn beside, and as good as independent."""

from __future__ import annotations

import time

import numpy as np
import torch

from lorif_index.linalg.signs import hashed_signs

KEY = (0, "ggn", 0)
LIKE = torch.empty(0)
# Row 1 of example 3 under `KEY`: positions x classes.
GOLDEN = [[1, 1, 1, 1, -1, 1, 1, -1, 1], [1, 1, 1, -1, 1, 1, -1, -1, 1]]


def test_signs_are_the_same_on_every_machine() -> None:
    found = hashed_signs(KEY, np.array([3]), 1, 2, 9, LIKE)[0]
    assert found.tolist() == GOLDEN


def test_an_example_has_its_signs_in_every_batch_and_under_longer_padding() -> None:
    many = hashed_signs(KEY, np.arange(40), 0, 12, 70, LIKE)
    few = hashed_signs(KEY, np.array([7, 31]), 0, 5, 70, LIKE)
    assert torch.equal(few, many[[7, 31], :5])
    # Fewer classes, down to one, take parts of words.
    for classes in (1, 7, 8, 9, 31, 32, 33):
        assert torch.equal(hashed_signs(KEY, np.arange(40), 0, 12, classes, LIKE), many[:, :, :classes])
    wide = hashed_signs(KEY, np.arange(40), 0, 12, 70, LIKE.double())
    assert wide.dtype == torch.float64 and torch.equal(wide.float(), many)


def test_all_that_signs_depend_on_tells_them_apart() -> None:
    ids = np.array([5])
    first = hashed_signs(KEY, ids, 0, 4, 64, LIKE)
    others = [
        hashed_signs((1, "ggn", 0), ids, 0, 4, 64, LIKE),
        hashed_signs((0, "ggn", 1), ids, 0, 4, 64, LIKE),
        hashed_signs(KEY, ids, 1, 4, 64, LIKE),
        hashed_signs(KEY, ids + 2**32, 0, 4, 64, LIKE),
        hashed_signs(KEY, ids + 1, 0, 4, 64, LIKE),
    ]
    for other in others:
        assert 80 < int((first != other).sum()) < 176
    assert len({tuple(row) for row in first[0].tolist()}) == 4


def test_signs_are_as_good_as_independent() -> None:
    """Means and correlations of all pairs are those of independent signs: of deviation 1 / sqrt(n)."""
    rows = torch.stack([hashed_signs(KEY, np.arange(8), row, 16, 512, LIKE) for row in range(4)], dim=1)
    assert set(rows.unique().tolist()) == {-1.0, 1.0}
    # (examples, rows and positions) x classes.
    flat = rows.flatten(0, 2)
    for of in (flat, flat.T.contiguous()):
        count, width = of.shape
        means = of.mean(dim=1) * width**0.5
        assert abs(float(means.mean())) < 5 / count**0.5 and 0.85 < float(means.std()) < 1.15
        pairs = (of @ of.T / width**0.5)[*torch.triu_indices(count, count, 1)]
        assert abs(float(pairs.mean())) < 0.02 and 0.98 < float(pairs.std()) < 1.02
        # Of 131,000 normal numbers the largest is about 4.5.
        assert float(pairs.abs().max()) < 6.5


def test_signs_take_nanoseconds_each() -> None:
    hashed_signs(KEY, np.arange(2), 0, 64, 50_257, LIKE)
    start = time.perf_counter()
    found = hashed_signs(KEY, np.arange(4), 0, 64, 50_257, LIKE)
    seconds = time.perf_counter() - start
    print(f"{found.numel():,} signs on {found.device}: {seconds:.3f} s, {1e9 * seconds / found.numel():.1f} ns each")
    assert seconds < 30
