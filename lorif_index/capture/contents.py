"""Contents: a hash of what the model was given of each example, by which it is found again in another data set.

Two examples with one hash are the same to the loss, and so have the same gradient. Numbers alone count: text, ids or
urls that stand beside them in a batch do not. What only the batch that an example came in brings about does not count:
padding on the right that `attention_mask` tells of, a mask of ones, labels that repeat the tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import numpy as np
import torch
import xxhash

from .data import Batch, as_tensors, batch_count

CONTENT_BYTES = 16
"""Of a hash, XXH3-128. Of 10^9 different examples two share one by chance once in 10^20 times."""
_TOKENS, _MASK, _LABELS = "input_ids", "attention_mask", "labels"
# What fields other than tokens are padded with.
_PADDING = (0, -100)


def contents_of(batch: Batch) -> np.ndarray:
    """(n, 16) uint8: the hash of each example of a batch."""
    fields = {name: _plain(value) for name, value in _fields(as_tensors(batch), "") if value.ndim}
    out = np.empty((batch_count(batch), CONTENT_BYTES), dtype=np.uint8)
    for i in range(len(out)):
        digest = xxhash.xxh3_128()
        for name, one in _without_padding({name: values[i] for name, values in fields.items()}):
            digest.update(f"{name}|{one.dtype.str}|{one.shape}|".encode())
            digest.update(np.ascontiguousarray(one).data)
        out[i] = np.frombuffer(digest.digest(), dtype=np.uint8)
    return out


def _fields(batch: Batch, name: str) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a batch and their names; a dict's by rising names."""
    if isinstance(batch, torch.Tensor):
        yield name, batch
    elif isinstance(batch, Mapping):
        for key in sorted(batch, key=str):
            yield from _fields(batch[key], f"{name}.{key}" if name else str(key))
    elif isinstance(batch, (tuple, list)):
        for i, part in enumerate(batch):
            yield from _fields(part, f"{name}.{i}" if name else str(i))


def _plain(values: torch.Tensor) -> np.ndarray:
    """On the CPU, little-endian; whole numbers as int64 and others as float32 (or complex64), so that the hash does not
    depend on how a data set stores them."""
    values = values.detach().cpu()
    if values.layout != torch.strided:
        values = values.to_dense()
    if values.is_complex():
        return values.to(torch.complex64).numpy().astype("<c8", copy=False)
    if values.is_floating_point():
        return values.float().numpy().astype("<f4", copy=False)
    return values.to(torch.int64).numpy().astype("<i8", copy=False)


def _without_padding(example: dict[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    """The fields of one example, cut to what is its own."""
    mask = example.get(_MASK)
    if mask is not None and mask.ndim:
        shown = np.flatnonzero(mask.reshape(-1, mask.shape[-1]).any(axis=0))
        length = int(shown[-1]) + 1 if len(shown) else 0
        labels = example.get(_LABELS)
        if labels is not None and labels.shape == mask.shape:
            # A token that is hidden from others may have a loss all the same.
            length = _end(labels, mask.ndim - 1, length)
        for name, one in example.items():
            if one.shape[: mask.ndim] == mask.shape:
                stop = length if name in (_TOKENS, _MASK) else _end(one, mask.ndim - 1, length)
                example[name] = one[(*[slice(None)] * (mask.ndim - 1), slice(stop))]
    for name, one in example.items():
        repeated = name == _LABELS and _TOKENS in example and np.array_equal(one, example[_TOKENS])
        if not repeated and not (name == _MASK and one.all()):
            yield name, one


def _end(one: np.ndarray, axis: int, length: int) -> int:
    """Where what is only padding begins, from `length` on."""
    rest = np.moveaxis(one, axis, 0)[length:]
    rest = rest.reshape(len(rest), math.prod(rest.shape[1:]))
    for value in _PADDING:
        if len(rest) and (rest[-1] == value).all():
            own = np.flatnonzero((rest != value).any(axis=1))
            return length + (int(own[-1]) + 1 if len(own) else 0)
    return one.shape[axis]
