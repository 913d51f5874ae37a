"""Timing: what a few batches' gradients take on the device of a build, and what projections will take to be learnt."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator

import torch

from ..capture.eigenbases import Side, Walk, needed, side_fits
from ..capture.gradients import GradientBlock, LayerSpec
from ..linalg.subspace import SubspaceFit, grouped
from ..ranks import ALONE

# A side's fit is tried up to this width, in so many rows: wider ones take as many times more as their operations. One
# of 3,072 would take 15 s on one core of a CPU.
_TRIED_WIDTH, _TRIED_ROWS = 2048, 512
# Seconds: batches of a large model take as long each, and no more of them are timed.
_ENOUGH = 10.0


def now(device: torch.device) -> float:
    """Seconds of a clock, when the device has done what it was asked to: calls do not wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def timed(
    blocks: Iterator[GradientBlock],
    batches: int,
    device: torch.device,
    *,
    each: int = 1,
    without: Callable[[], float] = float,
) -> tuple[float, list[GradientBlock]]:
    """Seconds an example and block, the first batch left out where there are others: it warms up; and the first block
    of each batch.

    Args:
        blocks: as many of each batch as `each` says.
        batches: how many are taken beside the first, at most: a few seconds of a clock say enough.
        device: where they are computed.
        each: blocks of a batch, which follow each other.
        without: gives the seconds that went so far into what is done in the first batches only; they are left out.
    """
    kept, seconds, counts = [], [], []
    began = now(device) - without()
    for block in blocks:
        seconds.append(now(device) - without() - began)
        counts.append(block.count)
        if (len(seconds) - 1) % each == 0:
            kept.append(block)
        whole = len(seconds) % each == 0
        if whole and (len(seconds) == (batches + 1) * each or sum(seconds[each:]) >= _ENOUGH):
            break
        began = now(device) - without()
    warm = slice(each if len(seconds) > each else 0, None)
    # Batches differ, above all in length: what they took together is divided, not the fastest one's.
    return sum(seconds[warm]) / max(sum(counts[warm]), 1), kept


def projections_line(
    walk: Walk, examples: int, specs: dict[str, LayerSpec], sides: list[Side], device: torch.device
) -> tuple[Callable[[int], float], int]:
    """Seconds to learn projections (see `eigenbases.fit_eigenbases`), as a function of the examples; and of how many,
    at most, they are learnt.

    A walk is timed that adds nothing up, and one fit of each width; sums and factorisations are those of all sides, by
    their operations.

    Args:
        walk: over some examples.
        examples: how many those are.
        specs, sides: what is learnt.
        device: where.
    """
    fits = side_fits(specs, sides, 0, device)
    rows: Counter[Side] = Counter()
    pieces: dict[tuple[int, int], int] = {}

    def shape(fit: SubspaceFit) -> tuple[int, int]:
        return min(fit.dim, _TRIED_WIDTH), min(fit.rank, _TRIED_WIDTH)

    def count(side: Side, part: torch.Tensor) -> None:
        if side in fits:
            rows[side] += len(part)
            pieces.setdefault(shape(fits[side]), len(part))

    began = now(device)
    walk(count)
    each = (now(device) - began) / examples
    _trial((8, 8), 8, device)
    trials = {tried: _trial(tried, piece, device) for tried, piece in pieces.items() if piece}
    walks = len(list(grouped(fits)))
    slope, fixed = walks * each, 0.0
    for side, fit in fits.items():
        add, factorise = trials.get(shape(fit), (0.0, 0.0))
        slope += add * fit.dim * fit.block * fit.products(0) * rows[side] / examples
        fixed += factorise * fit.cost
    return lambda n: fixed + slope * n, needed({side: rows[side] for side in fits}, examples, specs)


def _trial(tried: tuple[int, int], piece: int, device: torch.device) -> tuple[float, float]:
    """Of a side of such a width and rank, whose rows come in such pieces: seconds a row to add it, divided by width^2,
    and to find the eigenvectors, by their cost."""
    width, rank = tried
    fit = SubspaceFit(("trial",), width, rank, width, 0, device, whole_up_to=width)
    fit.begin(0, 1)
    piece = min(piece, _TRIED_ROWS)
    part, pieces = torch.randn(piece, width, device=device), -(-_TRIED_ROWS // piece)
    began = now(device)
    for _ in range(pieces):
        fit.add(part)
    fit.close(ALONE, 0)
    added = now(device)
    fit.result(1.0)
    return (added - began) / (pieces * piece * width**2), (now(device) - added) / fit.cost
