"""Examples: training examples by their ids, computed again with the model, and known by their gradients' norms."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..capture.data import Batch, ExampleSource, as_source
from ..capture.gradients import GradientBlock, energies
from ..capture.hooks import Capture
from ..errors import DataError

# How far a squared gradient norm may be from the stored one: what other batches, padding or another device's sums make
# of it, in full and in half precision.
_TOLERANCE, _HALF_TOLERANCE = 2e-3, 0.1


class TrainingData:
    """The examples of an index by their ids: the data of its build, and of what was added since.

    Args:
        pieces: (id of the first example, data), data as for `Index.build`.
        batch_size: of batches.
    """

    def __init__(self, pieces: Sequence[tuple[int, Any]], batch_size: int | str) -> None:
        self._pieces: list[tuple[int, ExampleSource]] = [(first, as_source(data, batch_size)) for first, data in pieces]

    def select(self, ids: np.ndarray) -> Iterator[tuple[np.ndarray, Batch]]:
        """(ids, batch) of examples (sorted, unique).

        Raises:
            DataError: an id beyond the data.
        """
        covered = np.zeros(len(ids), dtype=bool)
        for first, source in self._pieces:
            covered |= (ids >= first) & (ids < first + source.count)
        if not covered.all():
            have = ", ".join(f"{first} to {first + source.count - 1}" for first, source in self._pieces)
            raise DataError(
                f"the data holds examples {have}, and example {int(ids[~covered][0])} is to be computed again: pass as "
                "data= everything that was indexed, in order (ids are positions in it)"
            )
        for first, source in self._pieces:
            mine = ids[(ids >= first) & (ids < first + source.count)]
            if len(mine):
                for found, batch in source.select(mine - first):
                    yield found + first, batch


@dataclass(frozen=True)
class Examples:
    """An index's training examples, as gradients that are computed again.

    Attributes:
        data: where the examples are.
        capture: takes their gradients, of the loss.
    """

    data: TrainingData
    capture: Capture

    def gradients(self, ids: np.ndarray, stored: np.ndarray) -> Iterator[tuple[Batch, GradientBlock]]:
        """A batch at a time, as it comes from the data, and its projected gradients, whole and in all layers.

        Args:
            ids: (m,) int64, of the examples, sorted and unique.
            stored: (m,) their squared gradient norms, as they were indexed.

        Raises:
            DataError: the data do not hold an example, or hold another than was indexed.
        """
        for part, batch in self.data.select(ids):
            block = self.capture.gradients(part, batch)
            check_examples(stored[np.searchsorted(ids, part)], block, self.capture.half)
            yield batch, block


def training_data(pieces: Sequence[tuple[int, Any]], batch_size: int | str, what: str) -> TrainingData:
    """What the index was built from (see `TrainingData`).

    Args:
        pieces, batch_size: of the data.
        what: needs them, for the message.

    Raises:
        DataError: there are none.
    """
    if not pieces:
        raise DataError(
            f"{what} computes training examples again, and this index was opened without them: pass data= to "
            "Index.open, or to explain"
        )
    return TrainingData(pieces, batch_size)


def check_examples(stored: np.ndarray, block: GradientBlock, half: bool) -> None:
    """Compares examples with what was indexed under their ids, by their squared gradient norms.

    Args:
        stored: (n,) those norms, as they were indexed.
        block: the examples' gradients, in all layers.
        half: whether anything was computed in half precision.

    Raises:
        DataError: naming the first that differs.
    """
    found, tolerance = energies(block), _HALF_TOLERANCE if half else _TOLERANCE
    fits = np.abs(found - stored) <= tolerance * np.maximum(found, stored)
    if not fits.all():
        bad = int(np.flatnonzero(~fits)[0])
        raise DataError(
            f"example {int(block.ids[bad])} of the data has a squared gradient norm of {found[bad]:.6g}, where "
            f"{stored[bad]:.6g} was indexed: pass as data= what the index was built from, in the same order, with the "
            "same model and loss"
        )
