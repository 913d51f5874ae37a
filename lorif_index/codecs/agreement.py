"""Agreement: which of several codecs' scores are most like those of whole gradients, measured on the sample.

Some examples of the sample ask, others answer. The measure is the mean over the questions of the rank correlation
(Spearman's) between the scores of the rows and those of the whole gradients, under the same inverse. No retraining is
needed: it says how much of what the inverse asks for the rows hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

import torch

from ..capture.gradients import GradientBlock
from ..curvature.fit import thinned
from .base import Fitting, RowCodec, Transformed

if TYPE_CHECKING:
    from ..config import BuildConfig

SIZES = (512, 1024, 2048, 4096)
"""Bytes of a row that eigen_bytes="auto" chooses from."""
ENOUGH = 0.9
"""The agreement that it asks for; where no size has it, the largest is taken."""
# A larger row, or another way, must be better by so much.
_BETTER = 0.005
_QUESTIONS, _ROWS = 64, 512

Codec = TypeVar("Codec", bound=RowCodec)
Written = Callable[[GradientBlock], Sequence[torch.Tensor]]
"""Gives a block's rows by each of several codecs."""


def sizes_of(config: BuildConfig) -> tuple[int, ...]:
    """Bytes of a row that a config leaves to choose from, rising."""
    return SIZES if config.eigen_bytes == "auto" else (int(config.eigen_bytes),)


def some_rows(fitting: Fitting, most: int) -> Iterator[GradientBlock]:
    """One walk over this rank's part of about so many rows of the sample, evenly spread."""
    rows, count = fitting.sample()
    step = max(count // most, 1)
    fitting.stage.total = (fitting.stage.total or 0) + -(-count // step)
    for block in thinned(rows, step)():
        fitting.stage.advance(block.count)
        yield block


def chosen(tried: Sequence[Codec], fitting: Fitting, written: Written) -> Codec:
    """The smallest codec with enough agreement, else the one with most; of one size the one with most.

    Args:
        tried: rising in size; those of one size follow each other.
        fitting: what they were fitted by.
        written: gives a block's rows by each of them.
    """
    found = agreements(tried, fitting, written)
    best = 0
    for number in range(1, len(tried)):
        larger = tried[number].row_bytes > 1.1 * tried[best].row_bytes
        if not (larger and found[best] >= ENOUGH) and found[number] > found[best] + _BETTER:
            best = number
    return tried[best]


def agreements(tried: Sequence[RowCodec], fitting: Fitting, written: Written) -> list[float]:
    """Of each codec, over all ranks' rows."""
    ranks = fitting.ranks
    sums, count = torch.zeros(len(tried), dtype=torch.float64), 0
    asked: dict[str, list[torch.Tensor]] = {name: [] for name in fitting.specs}
    rows: list[list[torch.Tensor]] = [[] for _ in tried]
    truth: list[torch.Tensor] = []
    there: dict[str, torch.Tensor] = {}
    question: Transformed | None = None
    with ranks.jointly():
        for block in some_rows(fitting, _ROWS + _QUESTIONS):
            if question is None:
                # The first rows ask. They are random: the sample is.
                for name, one in fitting.preconditioners.items():
                    g = block.layers[name].flat().float().cpu()
                    asked[name].append(one.apply(g[: _QUESTIONS - count]))
                took = min(block.count, _QUESTIONS - count)
                count += took
                if count < _QUESTIONS:
                    continue
                question = _question(asked, fitting)
                there = {name: x.flatten(1).to(fitting.device) for name, x in question.x.items()}
                block = block.select(torch.arange(took, block.count).numpy())
                if not block.count:
                    continue
            truth.append(_scores(there, block))
            for kept, found in zip(rows, written(block), strict=True):
                kept.append(found)
        if question is not None and sum(len(part) for part in truth) > 2:
            whole = _ranks(torch.cat(truth).T)
            for number, codec in enumerate(tried):
                scores = codec.scorer(codec.question(question)).score(torch.cat(rows[number]))
                sums[number] = (whole * _ranks(scores)).sum(dim=1).mean()
            seen = 1
        else:
            seen = 0
    together = ranks.count(seen)
    return (ranks.sum(sums) / max(together, 1)).tolist()


def _question(asked: dict[str, list[torch.Tensor]], fitting: Fitting) -> Transformed:
    shapes = {name: (-1, spec.d_in, spec.d_out) for name, spec in fitting.specs.items()}
    return Transformed({n: torch.cat(parts).reshape(shapes[n]) for n, parts in asked.items()}, fitting.curvature)


def _scores(questions: Mapping[str, torch.Tensor], block: GradientBlock) -> torch.Tensor:
    """(n, q) of whole gradients, by each layer's questions (q, D), computed where these are."""
    parts = [block.layers[name].flat().to(x.device) @ x.T for name, x in questions.items()]
    return torch.stack(parts).sum(dim=0).cpu()


def _ranks(scores: torch.Tensor) -> torch.Tensor:
    """(q, n) ranks of each row, centred and of length one: their inner products are Spearman's correlations."""
    ranks = scores.argsort(dim=1).argsort(dim=1).double()
    ranks -= ranks.mean(dim=1, keepdim=True)
    return ranks / ranks.norm(dim=1, keepdim=True).clamp_min(1e-12)
