"""Timing before a build: the clock waits for a GPU, the first batch warms up, and sides are counted by operations."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from lorif_index.build import timing
from lorif_index.capture.eigenbases import Sink
from lorif_index.capture.gradients import GradientBlock, LayerGradient, LayerSpec

CPU = torch.device("cpu")


def test_the_clock_waits_for_a_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    timing.now(CPU)
    assert not waited
    timing.now(torch.device("cuda", 1))
    assert waited == [torch.device("cuda", 1)]


@pytest.mark.parametrize(("there", "taken", "expected"), [(1, 1, 2.0), (3, 3, 1.0), (9, 3, 1.0)])
def test_the_first_batch_warms_up_unless_it_is_alone(
    monkeypatch: pytest.MonkeyPatch, there: int, taken: int, expected: float
) -> None:
    clock = [0.0]
    monkeypatch.setattr(timing, "now", lambda device: clock[0])

    def blocks() -> Iterator[GradientBlock]:
        for batch in range(there):
            # Two blocks a batch, of four examples, of which the first takes all the time.
            clock[0] += 8.0 if batch else 16.0
            for _ in range(2):
                yield GradientBlock(np.arange(4), {"a": LayerGradient.from_dense(torch.zeros(4, 1, 1))})

    each, kept = timing.timed(blocks(), 2, CPU, each=2)
    assert each == expected and len(kept) == taken
    # A batch of a large model says enough.
    monkeypatch.setattr(timing, "_ENOUGH", 8.0)
    each, kept = timing.timed(blocks(), 2, CPU, each=2)
    assert each == expected and len(kept) == min(taken, 2)


def test_sides_take_the_walks_sums_and_factorisations_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    specs = {name: LayerSpec(name, 6000, 900, 32, 32, 1) for name in "ab"}
    monkeypatch.setattr(timing, "_trial", lambda width, piece, device: (1.0, 1000.0))
    clock = iter((0.0, 4.0))
    monkeypatch.setattr(timing, "now", lambda device: next(clock))
    sides = [(name, side) for name in "ab" for side in ("in", "out")]

    def walk(sink: Sink) -> None:
        for side in sides:
            sink(side, torch.zeros(8, specs[side[0]].side(side[1])[0]))

    line, most = timing.projections_line(walk, 2, specs, sides, CPU)
    # A side of 6,000 features wants 64 positions for each, and an example has 4.
    assert most == 4096
    # Sides 900 wide are summed whole; those 6,000 wide have two products with four times 32 + 10 directions.
    slope = 4.0 / 2 + 2 * (8 / 2) * (900**2 + 2 * 6000 * 168)
    fixed = 2 * 1000 * (900**2 * 42 + 4 * 6000 * 168**2)
    assert line(0) == pytest.approx(fixed) and line(10) == pytest.approx(fixed + 10 * slope)


def test_a_trial_runs() -> None:
    began = time.perf_counter()
    add, factorise = timing._trial((48, 48), 10, CPU)
    taken = time.perf_counter() - began
    assert 0 < add * 48**2 < taken and 0 < factorise * 48**3 < taken
