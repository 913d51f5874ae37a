"""Payloads: what the user keeps beside each example (text, source, label, an id of their own), as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Protocol

import xxhash

from ..errors import CorruptionError, DataError

MOST_BYTES = 1 << 20
"""Of one payload: they are to be small."""


class Values(Protocol):
    """Anything with a length and integer keys: a list, a column of a dataset."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> Any: ...


class Payloads:
    """The payloads of a set of examples, encoded as they are asked for.

    Args:
        values: plain JSON values, one for each example: a list, or anything with a length and integer keys.
        count: number of examples.

    Attributes:
        digest: XXH3-128, in hex, of the first and the last of them.

    Raises:
        DataError: another number of values, or a first one that is no JSON.
    """

    def __init__(self, values: Values, count: int) -> None:
        if isinstance(values, (str, bytes)) or not (hasattr(values, "__len__") and hasattr(values, "__getitem__")):
            raise DataError(f"payloads must be a list of JSON values, one per example, got {type(values).__name__}")
        if len(values) != count:
            raise DataError(f"{len(values)} payloads were given for {count} examples: pass one for each, or none")
        self._values = values
        ends = self.encode(sorted({0, count - 1}) if count else [])
        self.digest = str(xxhash.xxh3_128_hexdigest(b"\n".join(ends)))

    def encode(self, numbers: Sequence[int]) -> list[bytes]:
        """The payloads of some examples, by their place in the data.

        Raises:
            DataError: one is no plain JSON, or larger than `MOST_BYTES`.
        """
        return [_encoded(int(number), self._values[int(number)]) for number in numbers]


def _encoded(number: int, value: Any) -> bytes:
    try:
        text = json.dumps(value, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
        # A lone surrogate, which JSON can spell and UTF-8 cannot hold.
        data = text.encode("utf-8", errors="replace")
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(f"the payload of example {number} is no plain JSON value: {error}") from None
    if len(data) > MOST_BYTES:
        raise DataError(f"the payload of example {number} has {len(data)} bytes, where {MOST_BYTES} are the most")
    return data


def decode(data: bytes | None) -> Any:
    """A payload as it was given, or None where there is none.

    Raises:
        CorruptionError: it is no JSON.
    """
    if data is None:
        return None
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CorruptionError(f"a payload is no JSON ({error}): restore the index from a copy") from None
