"""Threads: work that leaves the interpreter alone for most of its time, on as many threads as torch has."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from functools import cache
from typing import TypeVar

import torch

# Rows of one thread, at least.
_ROWS = 64
T = TypeVar("T")
R = TypeVar("R")


def side_by_side(work: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """What `work` gives for each item, in order. The caller's thread works, too, and does all where no other is free.
    When this returns or raises, nobody is at work any more."""
    threads = min(torch.get_num_threads(), len(items))
    if threads < 2:
        return [work(item) for item in items]
    done: dict[int, R] = {}
    numbers = itertools.count()

    def some() -> None:
        nonlocal numbers
        try:
            while (number := next(numbers)) < len(items):
                done[number] = work(items[number])
        except BaseException:
            # The others need not begin anything more.
            numbers = itertools.count(len(items))
            raise

    others: list[Future[None]] = []
    # A pool takes nothing more once the program ends.
    with suppress(RuntimeError):
        others.extend(_pool().submit(some) for _ in range(threads - 1))
    try:
        some()
    finally:
        running = [other for other in others if not other.cancel()]
        wait(running)
    for other in running:
        other.result()
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
