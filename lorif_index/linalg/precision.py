"""Precision: products of fits and of scores are float32's, whatever a program has chosen for its model.

A program may let float32 products run in TF32 on a GPU, or in bfloat16 on a CPU (`torch.set_float32_matmul_precision`).
That is a choice for its model, and its passes keep it. Fits, and scores that are called exact, do not change with it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def _places() -> list[Any]:
    """Settings for each kind of device, which newer versions of torch have. There the one for all may be an error."""
    found = [getattr(getattr(torch.backends, name), "matmul", None) for name in ("cuda", "mkldnn")]
    return found if all(hasattr(place, "fp32_precision") for place in found) else []


def _chosen() -> Any:
    """What the program has chosen."""
    return [place.fp32_precision for place in _places()] or torch.get_float32_matmul_precision()


def _choose(values: Any) -> None:
    if isinstance(values, str):
        torch.set_float32_matmul_precision(values)
        return
    for place, value in zip(_places(), values, strict=True):
        if place.fp32_precision != value:
            place.fp32_precision = value


class _Held:
    """The setting is the process's: the first that asks for whole products keeps it, the last puts it back."""

    def __init__(self) -> None:
        self.lock, self.count = threading.RLock(), 0
        self.theirs: Any = None

    def take(self) -> None:
        with self.lock:
            if self.count == 0:
                self.theirs = _chosen()
                self.whole()
            self.count += 1

    def whole(self) -> None:
        """Chooses whole products, for the time that they are held."""
        _choose("highest" if isinstance(self.theirs, str) else ["ieee"] * len(self.theirs))

    def give(self) -> None:
        with self.lock:
            self.count -= 1
            if self.count == 0:
                _choose(self.theirs)


_HELD = _Held()


@contextmanager
def whole_products() -> Iterator[None]:
    """Inside, float32 products are float32's."""
    _HELD.take()
    try:
        yield
    finally:
        _HELD.give()


@contextmanager
def as_chosen() -> Iterator[None]:
    """Inside `whole_products`, for passes of the program's model: what it has chosen."""
    if _HELD.count == 0:
        yield
        return
    _choose(_HELD.theirs)
    try:
        yield
    finally:
        # Not what was there before: that may be the choice of another thread's pass.
        _HELD.whole()


def in_whole_products(function: Callable[P, R]) -> Callable[P, R]:
    """The function, all of it within `whole_products`."""

    @wraps(function)
    def inside(*args: P.args, **kwargs: P.kwargs) -> R:
        with whole_products():
            return function(*args, **kwargs)

    return inside
