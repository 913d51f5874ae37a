"""The exception tree. Every error names the values that disagree and a remedy.

LorifError
|-- ConfigError            a setting that cannot be honoured (also a ValueError)
|-- DataError              training data, a batch or a gradient block of the wrong form (also a ValueError)
|   `-- QueryError         a query that does not fit the index
|-- CaptureError           a module whose per-example gradient cannot be taken
|-- NonFiniteError         inf or NaN in an example's gradient, or a value the stored dtype cannot hold
|-- CurvatureError         a curvature that cannot be fitted or inverted
|-- DistributedError       a rank that failed, hangs, or was given something else than the others
`-- StoreError             files: missing, foreign, damaged, of another version
    |-- IndexExistsError
    |-- NotAnIndexError
    |-- FormatVersionError
    |-- FingerprintError
    |-- LockedError
    `-- CorruptionError
"""

from __future__ import annotations

import json
from typing import Any


class LorifError(Exception):
    """Base of every error raised on purpose by lorif_index."""


class ConfigError(LorifError, ValueError):
    """A setting that is unknown, out of range, or cannot be honoured."""


class DataError(LorifError, ValueError):
    """Training data, a batch or a gradient block that does not have the promised form."""


class QueryError(DataError):
    """A query that does not fit the index it was put to."""


class CaptureError(LorifError):
    """A module whose per-example gradient cannot be taken, by name.

    Args:
        message: what is wrong.
        layers: modules whose gradients cannot be taken, where those of others can.
        second: those of them whose examples may lie along their second dimension.
    """

    def __init__(self, message: str, layers: tuple[str, ...] = (), second: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.layers, self.second = layers, second


class NonFiniteError(LorifError):
    """inf or NaN in an example's gradient, or a value that the stored dtype cannot hold."""


class CurvatureError(LorifError):
    """A curvature that cannot be fitted, or that the chosen damping leaves singular.

    Args:
        message: what is wrong.
        idle: layers that have no gradient in any example of what is fitted on, where others have.
    """

    def __init__(self, message: str, idle: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.idle = idle


class DistributedError(LorifError):
    """Another rank failed, did not come in time, or was given something else."""


class StoreError(LorifError):
    """A problem with the files of an index."""


class IndexExistsError(StoreError):
    """The folder already holds an index, or something else that must not be overwritten."""


class NotAnIndexError(StoreError):
    """The path does not hold a finished index."""


class FormatVersionError(StoreError):
    """The index was written in a format version that this library does not read."""


class FingerprintError(StoreError):
    """What was given differs from what the index was built from; the message names the fields."""


class LockedError(StoreError):
    """Another writer is changing the index."""


class CorruptionError(StoreError):
    """Stored bytes do not match their recorded size or checksum."""


def message_of(error: BaseException) -> str:
    """An error's message with its notes, where no traceback shows them."""
    return " ".join([str(error), *getattr(error, "__notes__", ())])


def shown(value: Any) -> str:
    """A JSON value for a message, cut where it is long."""
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
