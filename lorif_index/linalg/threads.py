"""Threads: compiled work, which needs no interpreter, on as many threads as torch has."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from typing import TypeVar

import torch

# Rows of one thread, at least.
_ROWS = 64
T = TypeVar("T")
R = TypeVar("R")


def side_by_side(work: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """What `work` gives for each item, in order. It must not come here itself: threads would wait for each other."""
    threads = min(torch.get_num_threads(), len(items))
    if threads < 2:
        return [work(item) for item in items]
    done: dict[int, R] = {}
    numbers = itertools.count()

    def some() -> None:
        while (number := next(numbers)) < len(items):
            done[number] = work(items[number])

    running = [_pool().submit(some) for _ in range(threads)]
    # What one of them raises waits for the others: they write to what the caller holds.
    wait(running)
    for one in running:
        one.result()
    return [done[number] for number in range(len(items))]


def in_parts(count: int, work: Callable[[slice], None]) -> None:
    """Shares `count` rows out, a part to each thread."""
    each = max(-(-count // torch.get_num_threads()), _ROWS)
    side_by_side(work, [slice(at, min(at + each, count)) for at in range(0, count, each)])


@cache
def _pool() -> ThreadPoolExecutor:
    # A process that is forked off has none of these threads.
    os.register_at_fork(after_in_child=_pool.cache_clear)
    return ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="lorif-rows")
