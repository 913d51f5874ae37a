"""The largest of many numbers against a full sort, and work that threads share."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorif_index.linalg import largest as module
from lorif_index.linalg.largest import largest
from lorif_index.linalg.threads import in_parts, side_by_side


def check(values: torch.Tensor, count: int) -> None:
    found = largest(values, count)
    assert found.shape == (len(values), count) and found.dtype == torch.int64
    for row, places in zip(values.double().numpy(), found.numpy(), strict=True):
        assert len(np.unique(places)) == count
        assert (np.sort(row[places]) == np.sort(row)[len(row) - count :]).all()


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """The threshold is tried with few numbers."""
    monkeypatch.setattr(module, "_LEAST", 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("rows", "dim", "count"), [(1, 40_000, 1), (5, 40_000, 2000), (3, 20_000, 1250), (2, 9, 9)])
def test_the_largest_are_found(rows: int, dim: int, count: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(dim)
    # Some columns are much larger than others.
    values = torch.randn(rows, dim, generator=generator, dtype=dtype) * torch.rand(dim, generator=generator) ** 8
    check(values, count)
    check(values.abs(), count)
    check(values.abs().round(decimals=2), count)


def test_a_part_that_says_nothing_of_the_rest(few: None) -> None:
    values = torch.rand(4, 1700)
    # Row 0: only what the part sees is large; row 1: only what it does not; row 2: all are equal; row 3 is as it is.
    values[0, ::17] += 5
    values[1] += 5
    values[1, ::17] = 0
    values[2] = 1
    check(values, 90)
    check(values[:1], 106)
    check(values[2:3], 50)
    # A row of zeros, and one of which more than is wanted are not.
    values[3] = 0
    values[0] = 0
    values[0, 5:40] = 2
    check(values, 30)
    check(values, 36)
    values[:] = -torch.inf
    values[:, 3] = 7
    check(values, 20)
    assert largest(values[:0], 5).shape == (0, 5)


@pytest.mark.parametrize("at", [[], [17], [5], [5, 17, 40, 51], range(600), range(0, 17 * 100, 17)])
def test_nan_counts_as_the_largest(at: Any) -> None:
    values = torch.randn(3, 50_000)
    values[1, list(at)] = torch.nan
    found = largest(values, 300)
    taken = values[1, found[1]]
    assert int(taken.isnan().sum()) == min(len(at), 300)
    rest = values[1][~values[1].isnan()].sort(descending=True).values[: 300 - min(len(at), 300)]
    assert torch.equal(taken[~taken.isnan()].sort(descending=True).values, rest)
    check(values[[0, 2]], 300)


def test_of_equal_numbers_no_lists_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most numbers of a sparse row pass a threshold of 0: memory would grow with all of them."""
    found: list[int] = []
    before = np.flatnonzero

    def counted(array: np.ndarray) -> np.ndarray:
        out = before(array)
        found.append(len(out))
        return out

    monkeypatch.setattr(module.np, "flatnonzero", counted)
    values = torch.zeros(20, 50_000)
    values[:, ::100] = torch.rand(20, 500)
    values[7] = torch.rand(50_000)
    check(values, 1000)
    assert max(found) <= 5 * 1000


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 60), st.integers(1, 4))
def test_of_any_numbers(seed: int, rows: int, count: int, distinct: int) -> None:
    generator = np.random.default_rng(seed)
    width = int(generator.integers(16 * count, 40 * count + 1))
    numbers = generator.standard_normal((rows, width)).round(distinct).astype(np.float32)
    before = module._LEAST
    module._LEAST = 1
    try:
        check(torch.from_numpy(numbers), count)
    finally:
        module._LEAST = before


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_work_is_shared_out(threads: int) -> None:
    here: list[str] = []

    def work(item: int) -> int:
        here.append(threading.current_thread().name)
        return item * item

    assert side_by_side(work, range(50)) == [i * i for i in range(50)]
    assert side_by_side(work, range(0)) == []
    assert len(set(here)) <= threads
    rows = np.zeros(1000, int)

    def count(part: slice) -> None:
        rows[part] += 1

    in_parts(1000, count)
    in_parts(0, count)
    assert (rows == 1).all()


def test_work_within_work(threads: int) -> None:
    """Nobody waits for a thread that waits for it."""
    found = side_by_side(lambda i: sum(side_by_side(lambda j: i * j, range(6))), range(12))
    assert found == [15 * i for i in range(12)]


def test_nobody_works_on_after_an_error(threads: int) -> None:
    working: set[int] = set()

    def work(item: int) -> None:
        working.add(item)
        time.sleep(0.01)
        if item == 1:
            raise KeyboardInterrupt
        working.discard(item)

    with pytest.raises(KeyboardInterrupt):
        side_by_side(work, range(40))
    assert working == {1}
    time.sleep(0.05)
    assert working == {1}


def test_what_fails_is_raised(threads: int) -> None:
    def work(item: int) -> int:
        if item == 3:
            raise KeyError(item)
        return item

    with pytest.raises(KeyError):
        side_by_side(work, range(7))
    assert side_by_side(work, range(3)) == [0, 1, 2]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_process_has_threads_of_its_own(threads: int) -> None:
    assert side_by_side(abs, range(-9, 0)) == [*range(9, 0, -1)]
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        os._exit(0 if side_by_side(abs, range(-9, 0)) == [*range(9, 0, -1)] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
