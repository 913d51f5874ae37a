"""Charts: the numbers of the pages' bars and shades; templates draw them as SVG without a script."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from os.path import commonpath

import numpy as np

LEVELS = 8
"""Steps of shading on either side of none."""

_PART = re.compile(r"(, part \d+ of \d+|:\d+)$")
_MOST_BARS = 12


@dataclass(frozen=True)
class Bar:
    """One line of a bar chart.

    Attributes:
        label: untrusted.
        value: signed.
        width: of the bar, in percent of the longest.
        count: of what was summed; 0 where nothing was.
    """

    label: str
    value: float
    width: float
    count: int = 0


def family(source: str) -> str:
    """The document that a passage's source names: without its part or line."""
    return _PART.sub("", source)


def bars(values: Mapping[str, float], counts: Mapping[str, int] | None = None) -> list[Bar]:
    """The largest values, by size; what is left over is summed in a last line, without a bar: it would dwarf them.

    Args:
        values: label -> finite value.
        counts: label -> how many make it up.
    """
    counts = counts or {}
    order = sorted(values, key=lambda label: (-abs(values[label]), label))
    shown, rest = (order, []) if len(order) <= _MOST_BARS else (order[: _MOST_BARS - 1], order[_MOST_BARS - 1 :])
    longest = max((abs(values[label]) for label in shown), default=0.0) or 1.0
    out = [
        Bar(label, values[label], round(100 * abs(values[label]) / longest, 2), counts.get(label, 0)) for label in shown
    ]
    if rest:
        out.append(Bar(f"{len(rest):,} others", sum(values[r] for r in rest), 0.0, sum(counts.get(r, 0) for r in rest)))
    return out


def layer_bars(values: Mapping[str, float]) -> list[Bar]:
    """Bars of layers, without the beginning that all their names share."""
    shared = commonpath([name.replace(".", "/") for name in values]) if len(values) > 1 else ""
    return bars({f"…{name[len(shared) + 1 :]}" if shared else name: value for name, value in values.items()})


def by_source(hits: Iterable[tuple[str | None, float]]) -> list[Bar]:
    """Summed scores of (source, score) by document."""
    sums, counts = dict[str, float](), Counter[str]()
    for source, score in hits:
        name = "no source" if source is None else family(source)
        sums[name] = sums.get(name, 0.0) + score
        counts[name] += 1
    return bars(sums, counts)


def strengths(shares: np.ndarray) -> np.ndarray:
    """How strongly each share is shaded, (T,) in -1 .. 1: by the root of its size against the largest, so that middling
    ones can be seen."""
    shares = np.nan_to_num(np.asarray(shares, np.float64))
    largest = float(np.abs(shares).max(initial=0.0))
    return np.sign(shares) * np.sqrt(np.abs(shares) / (largest or 1.0))


def levels(shares: np.ndarray) -> list[int]:
    """Each share's step of shading, -LEVELS .. LEVELS."""
    return np.rint(LEVELS * strengths(shares)).astype(int).tolist()
