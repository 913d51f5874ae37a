"""Charts: the numbers of the pages' pictures; templates draw them as SVG without a script."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np

BINS = 41
LEVELS = 8
"""Steps of shading on either side of none."""

_PART = re.compile(r"(, part \d+ of \d+|:\d+(-\d+)?)$")


@dataclass(frozen=True)
class Bar:
    """One line of a bar chart.

    Attributes:
        label: untrusted.
        value: signed.
        width: of the bar, in percent of the longest.
        count: of what was summed; 0 where nothing was.
        full: the label at its full length, where that is another.
    """

    label: str
    value: float
    width: float
    count: int = 0
    full: str = ""


@dataclass(frozen=True)
class Column:
    """One column of a histogram: its range, how many scores are in it, its height in percent (logarithmic), and whether
    one of them is shown."""

    low: float
    high: float
    count: int
    height: float
    found: bool


def family(source: str) -> str:
    """The document that a passage's source names: without its part or lines."""
    return _PART.sub("", source)


def bars(values: Mapping[str, float], counts: Mapping[str, int] | None = None, most: int = 12) -> list[Bar]:
    """The largest values, by size; what is left over is summed in a last line, without a bar: it would dwarf them.

    Args:
        values: label -> finite value.
        counts: label -> how many make it up.
        most: bars, at least 2.
    """
    counts = counts or {}
    order = sorted(values, key=lambda label: (-abs(values[label]), label))
    shown, rest = (order, []) if len(order) <= most else (order[: most - 1], order[most - 1 :])
    longest = max((abs(values[label]) for label in shown), default=0.0) or 1.0
    out = [
        Bar(label, values[label], round(100 * abs(values[label]) / longest, 2), counts.get(label, 0)) for label in shown
    ]
    if rest:
        out.append(Bar(f"{len(rest):,} others", sum(values[r] for r in rest), 0.0, sum(counts.get(r, 0) for r in rest)))
    return out


def layer_bars(values: Mapping[str, float], most: int = 12) -> list[Bar]:
    """Bars of layers, without the beginning that all their names share."""
    names = list(values)
    shared = 0
    if len(names) > 1:
        for parts in zip(*(name.split(".")[:-1] for name in names), strict=False):
            if len(set(parts)) > 1:
                break
            shared += len(parts[0]) + 1
    known = {f"…{name[shared:]}" if shared else name: name for name in names}
    cut = {label: values[name] for label, name in known.items()}
    return [replace(bar, full=known.get(bar.label, "")) for bar in bars(cut, most=most)]


def by_source(hits: Iterable[tuple[str | None, float]], most: int = 12) -> list[Bar]:
    """Summed scores of (source, score) by document."""
    sums: dict[str, float] = {}
    counts: dict[str, int] = {}
    for source, score in hits:
        name = "no source" if source is None else family(source)
        sums[name] = sums.get(name, 0.0) + score
        counts[name] = counts.get(name, 0) + 1
    return bars(sums, counts, most)


def histogram(scores: np.ndarray, found: np.ndarray) -> list[Column]:
    """Scores of all rows in `BINS` columns of one width.

    Args:
        scores: (n,) finite.
        found: (k,) scores of what is shown: columns that hold one of them are marked.
    """
    if not len(scores):
        return []
    low, high = float(scores.min()), float(scores.max())
    if not high > low:
        low, high = low - 0.5, high + 0.5
    counts, edges = np.histogram(scores, bins=BINS, range=(low, high))
    marked, _ = np.histogram(found, bins=BINS, range=(low, high))
    tallest = math.log1p(int(counts.max())) or 1.0
    return [
        Column(
            float(edges[i]), float(edges[i + 1]), int(c), round(100 * math.log1p(int(c)) / tallest, 2), marked[i] > 0
        )
        for i, c in enumerate(counts)
    ]


def strengths(shares: np.ndarray) -> np.ndarray:
    """How strongly each share is shaded, (T,) in -1 .. 1: by the root of its size against the largest, so that middling
    ones can be seen."""
    shares = np.nan_to_num(np.asarray(shares, np.float64))
    largest = float(np.abs(shares).max(initial=0.0))
    return np.sign(shares) * np.sqrt(np.abs(shares) / (largest or 1.0))


def levels(shares: np.ndarray) -> list[int]:
    """Each share's step of shading, -LEVELS .. LEVELS."""
    return np.rint(LEVELS * strengths(shares)).astype(int).tolist()
