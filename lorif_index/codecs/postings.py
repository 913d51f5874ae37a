"""Postings: rows that name their largest coordinates, turned round: of each coordinate the rows that name it.

A question's inner product with such a row is mostly of the question's own largest coordinates. Asked by these alone,
only the rows that name one of them are touched: of a million rows of 128 entries some two million entries of 128
million. Rows lie in blocks, so that a row's number in its block takes two bytes: an entry takes three, as in a row.
"""

from __future__ import annotations

import importlib.util
import threading
from dataclasses import dataclass

import numpy as np
import torch

from ..linalg.largest import largest
from ..linalg.threads import side_by_side
from .compiled import KERNEL
from .sparse import SparseLayout, values_of_levels

BLOCK = 1 << 16
"""Rows of a block."""
# Of a question so many of its largest coordinates are asked (of 100,000 rows and two sets of 60 questions they propose
# .9997 of the ten best and .9991 of the 100 best that all 178,763 do, at the default's counts).
_ASKED = 2048
# Rows that are scored one by one as quickly as they are turned round.
_FEW_ROWS = 1 << 14
# Scores that are held at once, of rows one by one.
_PAIRS = 1 << 26
# Questions, one after the other, that are worth turning rows round for: scoring them row by row takes as long.
_WORTH = 8
Found = tuple[np.ndarray, np.ndarray]
"""Rows and their scores."""


@dataclass(frozen=True)
class _Block:
    """Some rows' entries, in the order of their coordinates.

    Attributes:
        starts: (dim + 1,) int32: where each coordinate's begin, and the last end.
        rows: uint16, of each entry: its row.
        levels: uint8: its low bits, which stand for its value.
        scales: (m,) float32 of the rows.
    """

    starts: np.ndarray
    rows: np.ndarray
    levels: np.ndarray
    scales: np.ndarray


class Postings:
    """Scores all rows for one question after another.

    Args:
        layout: the rows'.
        codes: (n, row_bytes) uint8. They are not kept.
    """

    def __init__(self, layout: SparseLayout, codes: torch.Tensor) -> None:
        self._values = values_of_levels().numpy()
        if importlib.util.find_spec("numba") is not None:
            KERNEL.load_once()
        self._blocks = []
        for start in range(0, len(codes), BLOCK):
            if not threading.main_thread().is_alive():
                raise SystemExit("the program ends: nobody will ask")
            self._blocks.append(_turned(layout, codes[start : start + BLOCK].contiguous()))

    @property
    def nbytes(self) -> int:
        """Memory that they take."""
        return sum(b.starts.nbytes + b.rows.nbytes + b.levels.nbytes + b.scales.nbytes for b in self._blocks)

    def best(self, places: np.ndarray, numbers: np.ndarray, most: int, threads: int = 1) -> Found:
        """Positions (most,) int64 and scores (most,) float32, falling, of the best rows for a question that is zero but
        at some places (m,) int64, rising, where it is `numbers` (m,); by so many threads."""
        each = max(-(-len(self._blocks) // threads), 1)
        spans = [range(at, min(at + each, len(self._blocks))) for at in range(0, max(len(self._blocks), 1), each)]
        found = side_by_side(lambda blocks: self._best_of(blocks, places, numbers, most), spans)
        rows, scores = (np.concatenate(part) for part in zip(*found, strict=True))
        rows, scores = _most(rows, scores, most)
        order = np.argsort(-scores, kind="stable")
        return rows[order], scores[order]

    def _best_of(self, blocks: range, places: np.ndarray, numbers: np.ndarray, most: int) -> Found:
        """The best rows of some blocks, in no order."""
        # Rows of a block that are no better than the worst of those that are kept are passed over: few are ordered.
        rows, scores, worst = np.empty(0, np.int64), np.empty(0, np.float32), np.float32(np.nan)
        room = np.zeros(BLOCK, np.float32), np.empty(BLOCK, np.int32), np.empty(BLOCK, np.float32)
        for number in blocks:
            better, part = self._better(self._blocks[number], places, numbers, worst, *room)
            rows, scores = np.append(rows, better + np.int64(number * BLOCK)), np.append(scores, part)
            if len(rows) > most:
                rows, scores = _most(rows, scores, most)
                worst = scores.min()
        return rows, scores

    def _better(
        self,
        block: _Block,
        places: np.ndarray,
        numbers: np.ndarray,
        worst: np.float32,
        sums: np.ndarray,
        rows: np.ndarray,
        scores: np.ndarray,
    ) -> Found:
        """A block's rows whose scores are not `worst` or less; all, of NaN. What is no number is kept always, here and
        by `_most`, and is seen by whoever asks. `sums` are zeros before and afterwards."""
        if KERNEL.module is not None:
            KERNEL.module.add_named(block.starts, block.rows, block.levels, places, numbers, self._values, sums)
            count = KERNEL.module.take_better(sums, block.scales, worst, rows, scores)
            return rows[:count], scores[:count]
        here = sums[: len(block.scales)]
        self._add(block, places, numbers, here)
        found = here * block.scales
        here[:] = 0.0
        better = np.flatnonzero(~(found <= worst))
        return better, found[better]

    def _add(self, block: _Block, places: np.ndarray, numbers: np.ndarray, out: np.ndarray) -> None:
        """What the kernel does, by numpy."""
        counts = block.starts[places + 1] - block.starts[places]
        firsts = np.repeat(block.starts[places] - (np.cumsum(counts) - counts), counts)
        at = firsts + np.arange(len(firsts), dtype=firsts.dtype)
        weights = np.repeat(numbers, counts) * self._values[block.levels[at]]
        out += np.bincount(block.rows[at], weights=weights, minlength=len(out)).astype(np.float32)


def _most(rows: np.ndarray, scores: np.ndarray, most: int) -> Found:
    """The `most` best, in no order; what is no number counts as the best."""
    if len(rows) <= most:
        return rows, scores
    kept = largest(torch.from_numpy(scores)[None], most)[0].numpy()
    return rows[kept], scores[kept]


def _turned(layout: SparseLayout, codes: torch.Tensor) -> _Block:
    m, dim = layout.entries, layout.dim
    scales = layout.scales(codes)[:, 0].contiguous().numpy().astype(np.float32)
    numbers = codes.numpy()
    if KERNEL.module is not None:
        starts = np.zeros(dim + 1, np.int32)
        KERNEL.module.count_named(numbers, m, starts)
        starts = np.cumsum(starts, dtype=np.int32)
        rows, levels = np.empty(int(starts[-1]), np.uint16), np.empty(int(starts[-1]), np.uint8)
        KERNEL.module.turn_named(numbers, m, starts[:-1].copy(), rows, levels)
        return _Block(starts, rows, levels, scales)
    entries = layout.joined(codes).numpy().reshape(-1)
    there = np.flatnonzero(entries >> 5 < dim)
    order = there[np.argsort(entries[there] >> 5, kind="stable")]
    starts = np.concatenate([[0], np.cumsum(np.bincount(entries[there] >> 5, minlength=dim))]).astype(np.int32)
    return _Block(starts, (order // m).astype(np.uint16), (entries[order] & 31).astype(np.uint8), scales)


class Shortened:
    """Shortened rows, the best of which are wanted for questions: scored row by row at first, and turned round where
    there are enough questions. Both give the same scores, but for rounding.

    Args:
        layout: the rows'.
        codes: (n, row_bytes) uint8.
    """

    def __init__(self, layout: SparseLayout, codes: torch.Tensor) -> None:
        self._layout, self._count = layout, len(codes)
        self._codes: torch.Tensor | None = codes
        self._postings: Postings | None = None
        self._lock, self._turning, self._seen = threading.Lock(), threading.Lock(), 0

    @property
    def turned(self) -> bool:
        """Whether rows have been turned round."""
        return self._postings is not None

    def best(self, x: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
        """The `most` best rows of questions (q, dim) float32, by their largest coordinates.

        Returns:
            positions (q, most) int64 and scores (q, most) float32, falling.
        """
        self._look(len(x))
        asked = torch.from_numpy(x)
        places = largest(asked.abs(), min(_ASKED, x.shape[1])).sort(dim=1).values
        numbers = asked.gather(1, places)
        with self._lock:
            codes, postings = self._codes, self._postings
        if postings is None and codes is not None:
            found = self._by_row(torch.zeros_like(asked).scatter_(1, places, numbers), codes, most)
        else:
            found = self._by_postings(places.numpy(), numbers.numpy(), postings, most)  # type: ignore[arg-type]
        if not found:
            return np.empty((0, most), np.int64), np.empty((0, most), np.float32)
        positions, scores = (torch.cat(list(part)).numpy() for part in zip(*found, strict=True))
        return positions, scores

    def _by_row(self, asked: torch.Tensor, codes: torch.Tensor, most: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Some questions at a time."""
        together, found = max(_PAIRS // max(len(codes), 1), 1), []
        for part in asked.split(together):
            best = torch.topk(self._layout.scorer(part).score(codes), most, dim=1)
            found.append((best.indices, best.values))
        return found

    @staticmethod
    def _by_postings(
        places: np.ndarray, numbers: np.ndarray, postings: Postings, most: int
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """As many questions side by side as torch has threads; of one alone, parts of the rows."""
        threads = torch.get_num_threads()
        if len(places) == 1:
            found = [postings.best(places[0], numbers[0], most, threads)]
        else:
            found = side_by_side(lambda q: postings.best(places[q], numbers[q], most), range(len(places)))
        return [(torch.from_numpy(rows)[None], torch.from_numpy(scores)[None]) for rows, scores in found]

    def _look(self, questions: int) -> None:
        """Turns rows round where questions are worth it: at once for many, in the background for one after another."""
        self._seen += questions
        if self._postings is not None or self._count < _FEW_ROWS or self._seen < 2:
            return
        if questions >= _WORTH:
            self._turn()
        elif not self._turning.locked():
            # Waited for where the program ends, which it sees after each block: a thread that is cut off in the middle
            # of compiled code may take the program with it.
            threading.Thread(target=self._turn, name="lorif-postings").start()

    def _turn(self) -> None:
        with self._turning:
            if self._codes is None:
                return
            made = Postings(self._layout, self._codes)
            with self._lock:
                self._postings, self._codes = made, None
