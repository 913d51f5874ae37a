"""Data: datasets, loaders and tensors as one kind of source of batches, in a fixed order, that can be walked again."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import islice
from typing import Any, Protocol

import numpy as np
import torch
import xxhash
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, SequentialSampler
from torch.utils.data import default_collate as torch_collate

from ..errors import DataError

Batch = Any
"""A tensor, or a tuple, list or dict of them, with examples along the first dimension."""

_PADDING = {"labels": -100}
# Of a sampler's two walks so many indices, or batches of them, are compared.
_COMPARED = 10_000
# Of so many times the most examples of a batch, those of like length are together. (Of lengths that are spread as those
# of texts are, a batch of 32 is 4.8 times as large as its tokens in the order of ids, 1.16 times in that of 32 batches,
# and 1.07 in that of 64.)
_BATCHES = 32
# Sequences of fewer tokens are spread over the batches.
_FEW_TOKENS = 2
# A batch by default. (GPT-2 small on two cores takes .46 s for each sequence of 128 tokens where a batch has 16 of
# them, .55 where it has 32, and twice the memory.)
MOST_EXAMPLES, _MOST_TOKENS = 32, 2048


class ExampleSource(Protocol):
    """Examples with ids 0 .. count - 1, as batches."""

    @property
    def count(self) -> int: ...

    @property
    def random_access(self) -> bool:
        """Whether batches in the middle are had without walking to them."""
        ...

    def batches(self, start: int = 0) -> Iterator[tuple[np.ndarray, Batch]]:
        """(ids, batch) of all batches from the one that holds example `start` on, in order, cut as they always are."""
        ...

    def select(self, ids: np.ndarray) -> Iterator[tuple[np.ndarray, Batch]]:
        """(ids, batch) of the given examples (sorted, unique)."""
        ...

    @property
    def window(self) -> int | None:
        """Within so many examples, from a multiple of it on, `walk` is in an order of its own; None: in that of ids."""
        ...

    def walk(self, start: int, stop: int) -> Iterator[tuple[np.ndarray, Batch]]:
        """(ids, batch) of all batches that hold an example from `start` to before `stop`, cut as they always are; ids
        rise within a batch. Examples of like length are together, so that little is padded."""
        ...

    def draw(self, ids: np.ndarray) -> Iterator[tuple[np.ndarray, Batch]]:
        """As `select`, with examples of like length together."""
        ...


def batch_examples(batch_size: int | str, tokens: int | None) -> int:
    """How many examples a batch has.

    Args:
        batch_size: that number, or "auto": 32, but of sequences no more than have 2,048 tokens together, and two at
            least, so that it is seen whether examples depend on each other.
        tokens: of an example; None where it is no sequence.
    """
    if batch_size != "auto":
        return int(batch_size)
    return MOST_EXAMPLES if not tokens else min(max(_MOST_TOKENS // tokens, 2), MOST_EXAMPLES)


def tokens_of(batch: Any) -> int | None:
    """How many tokens each example of a batch of tensors has; None where they are no sequences."""
    found = _sequence(batch)
    return int(found.shape[1]) if isinstance(found, torch.Tensor) and found.ndim == 2 and _of_words(found) else None


def _length(item: Any) -> int | None:
    """Tokens of an item; None where it is no sequence."""
    found = _sequence(item)
    if isinstance(found, torch.Tensor):
        return len(found) if found.ndim == 1 and _of_words(found) else None
    return len(found) if isinstance(item, Mapping) and hasattr(found, "__len__") else None


def _sequence(data: Any) -> Any:
    """Where tokens are, in an example or a batch, if it has some: its `input_ids`, the first of several tensors, or the
    tensor itself."""
    if isinstance(data, Mapping):
        return data.get("input_ids")
    return data[0] if isinstance(data, (tuple, list)) and len(data) else data


def _of_words(tensor: torch.Tensor) -> bool:
    """Pixels are bytes, and flags are bool."""
    return tensor.dtype in (torch.int64, torch.int32)


def _parts(batch_size: int | str, lengths: np.ndarray) -> Iterator[slice]:
    """What examples of such lengths, 0 for no sequence, are cut to batches at, in their order."""
    first = longest = 0
    for at, length in enumerate(lengths.tolist()):
        longest = max(longest, length)
        if at - first >= batch_examples(batch_size, longest):
            yield slice(first, at)
            first, longest = at, length
    yield slice(first, len(lengths))


def _lengths(items: Sequence[Any]) -> np.ndarray:
    return np.array([_length(item) or 0 for item in items], dtype=np.int64)


def first_batch(examples: ExampleSource) -> tuple[np.ndarray, Batch]:
    """(ids, batch)."""
    return next(iter(examples.batches()))


def as_source(data: Any, batch_size: int | str) -> ExampleSource:
    """A source from a torch Dataset, a DataLoader, a Hugging Face Dataset, a tensor or NumPy array, or a tuple or dict
    of them.

    Args:
        data: any of these.
        batch_size: see `batch_examples`.

    Raises:
        DataError: anything else; a shuffled loader; a one-shot iterator; no examples.
    """
    source: ExampleSource
    data = as_tensors(data)
    if isinstance(data, torch.Tensor) or _all_tensors(data):
        source = _of_tensors(data, batch_size)
    elif isinstance(data, DataLoader):
        source = LoaderSource(data)
    elif isinstance(data, IterableDataset) or _is_streaming(data):
        source = StreamSource(data, batch_size, _collate_of(data))
    elif hasattr(data, "__getitem__") and hasattr(data, "__len__") and not isinstance(data, (str, bytes, Mapping)):
        source = ItemSource(data, _collate_of(data), batch_size)
    else:
        raise DataError(
            "data must be a torch Dataset, a DataLoader, a Hugging Face Dataset, or a tuple or dict of tensors, got "
            f"{type(data).__name__}: a one-shot iterator cannot be walked twice, make it a Dataset"
        )
    if source.count == 0:
        raise DataError("the data holds no examples")
    return source


def as_tensors(data: Any) -> Any:
    """A NumPy array of numbers, or a tuple or dict of them and of tensors, as tensors of the same memory; all else as
    it is."""
    if isinstance(data, np.ndarray) and data.dtype.kind in "biuf":
        with warnings.catch_warnings():
            # Of arrays that cannot be written to, as nothing here does.
            warnings.simplefilter("ignore", UserWarning)
            return torch.from_numpy(np.ascontiguousarray(data))
    if isinstance(data, np.generic) and data.dtype.kind in "biuf":
        return torch.tensor(data.item())
    parts = data.values() if isinstance(data, Mapping) else data if type(data) is tuple else ()
    if not any(isinstance(part, np.ndarray) for part in parts):
        return data
    found = [as_tensors(part) for part in parts]
    if not all(isinstance(part, torch.Tensor) for part in found):
        return data
    return dict(zip(data, found, strict=True)) if isinstance(data, Mapping) else tuple(found)


def _collate_of(data: Any) -> Any:
    """How a dataset's items become a batch: its own `collate_examples`, or `collate`."""
    return getattr(data, "collate_examples", collate)


def _all_tensors(data: Any) -> bool:
    if isinstance(data, Mapping):
        return bool(data) and all(isinstance(v, torch.Tensor) for v in data.values())
    return isinstance(data, (tuple, list)) and bool(data) and all(isinstance(v, torch.Tensor) for v in data)


def _is_streaming(data: Any) -> bool:
    return not hasattr(data, "__len__") and isinstance(data, Iterable) and iter(data) is not data


class _InOrder:
    """What walks in the order of ids."""

    window: int | None = None
    count: int

    def batches(self, start: int = 0) -> Iterator[tuple[np.ndarray, Batch]]:
        raise NotImplementedError

    def select(self, ids: np.ndarray) -> Iterator[tuple[np.ndarray, Batch]]:
        raise NotImplementedError

    def walk(self, start: int, stop: int) -> Iterator[tuple[np.ndarray, Batch]]:
        if start >= stop:
            return
        for ids, batch in self.batches(start):
            yield ids, batch
            if ids[-1] >= stop - 1 and stop < self.count:
                return

    def draw(self, ids: np.ndarray) -> Iterator[tuple[np.ndarray, Batch]]:
        return self.select(ids)


class IndexedSource(_InOrder):
    """Data of which any examples are had at once.

    Args:
        count: of examples.
        items: gives those of some ids (m,) int64.
        collate: makes a batch of them.
        batch_size: see `batch_examples`.
    """

    random_access = True

    def __init__(
        self, count: int, items: Callable[[np.ndarray], Any], collate: Callable[[Any], Batch], batch_size: int | str
    ) -> None:
        self.count, self._items, self._collate, self._asked = count, items, collate, batch_size

    @cached_property
    def _together(self) -> int:
        """How many examples are had at once, of a multiple of that on: a batch, or what is cut to batches."""
        return batch_examples(self._asked, tokens_of(self._items(np.zeros(1, dtype=np.int64))))

    def batches(self, start: int = 0) -> Iterator[tuple[np.ndarray, Batch]]:
        return self.select(np.arange(start - start % self._together, self.count, dtype=np.int64))

    def select(self, ids: np.ndarray) -> Iterator[tuple[np.ndarray, Batch]]:
        return ((part, self._collate(self._items(part))) for part in _chunks(ids, self._together))


class ItemSource(IndexedSource):
    """A map-style dataset (torch or Hugging Face), and the function that makes a batch of its items. Where these are
    sequences of tokens, `walk` and `draw` bring those of like length together."""

    def __init__(self, dataset: Any, collate: Callable[[Any], Batch], batch_size: int | str) -> None:
        together = getattr(dataset, "__getitems__", None)

        def items(ids: np.ndarray) -> Any:
            return [dataset[i] for i in ids.tolist()] if together is None else together(ids.tolist())

        super().__init__(len(dataset), items, collate, batch_size)

        self._together = batch_examples(batch_size, None)

    @cached_property
    def window(self) -> int | None:  # type: ignore[override]
        first = self._items(np.zeros(1, dtype=np.int64))[0]
        return None if _length(first) is None else _BATCHES * self._together

    def select(self, ids: np.ndarray) -> Iterator[tuple[np.ndarray, Batch]]:
        for some in _chunks(ids, self._together):
            items = self._items(some)
            for part in _parts(self._asked, _lengths(items)):
                yield some[part], self._collate(items[part])

    def walk(self, start: int, stop: int) -> Iterator[tuple[np.ndarray, Batch]]:
        if self.window is None:
            yield from super().walk(start, stop)
            return
        for first in range(start - start % self.window, stop, self.window):
            for ids, items in self._alike(np.arange(first, min(first + self.window, self.count), dtype=np.int64)):
                if ((ids >= start) & (ids < stop)).any():
                    yield ids, self._collate(items)

    def draw(self, ids: np.ndarray) -> Iterator[tuple[np.ndarray, Batch]]:
        if self.window is None:
            yield from super().draw(ids)
            return
        for some in _chunks(ids, self.window):
            for part, items in self._alike(some):
                yield part, self._collate(items)

    def _alike(self, ids: np.ndarray) -> Iterator[tuple[np.ndarray, list[Any]]]:
        """Batches of items of like length."""
        items = self._items(ids)
        lengths = _lengths(items)
        order = np.argsort(lengths, kind="stable")
        # Together these would make batches without any loss.
        few, others = order[lengths[order] < _FEW_TOKENS], order[lengths[order] >= _FEW_TOKENS]
        order = np.insert(others, np.linspace(0, len(others), len(few) + 2)[1:-1].astype(int), few)
        parts = [order[part] for part in _parts(self._asked, lengths[order])]
        if lengths.min() < lengths.max():
            # The first is of middle length, and the first few of all: what they show and take is what all will.
            turns = sorted(range(len(parts)), key=lambda i: f"{i:032b}"[::-1])
            parts = [parts[(i + len(parts) // 2) % len(parts)] for i in turns]
        for part in parts:
            part.sort()
            yield ids[part], [items[i] for i in part.tolist()]


def _of_tensors(data: Any, batch_size: int | str) -> IndexedSource:
    """A tensor, or a tuple or dict of tensors with examples along the first dimension.

    Raises:
        DataError: a number in place of a tensor with examples.
    """
    parts = data.values() if isinstance(data, Mapping) else [data] if isinstance(data, torch.Tensor) else data
    if any(part.ndim == 0 for part in parts):
        raise DataError(
            "tensors must have examples along the first dimension, and one is a single number: of one example i pass "
            "x[i : i + 1], not x[i]"
        )
    return IndexedSource(batch_count(data), lambda ids: _rows(data, ids), lambda rows: rows, batch_size)


class StreamSource(_InOrder):
    """An iterable dataset that gives the same items in the same order each time it is walked.

    Raises:
        DataError: its first items differ from walk to walk.
    """

    random_access = False

    def __init__(self, stream: Iterable[Any], batch_size: int | str, collate_fn: Any) -> None:
        self._stream = stream
        self._collate = collate_fn
        self._asked, self._together = batch_size, batch_examples(batch_size, None)
        first, self.count = _counted(stream)
        _same_order(first, stream)

    def batches(self, start: int = 0) -> Iterator[tuple[np.ndarray, Batch]]:
        at = start - start % self._together
        items = islice(iter(self._stream), at, None)
        while some := list(islice(items, self._together)):
            for part in _parts(self._asked, _lengths(some)):
                yield np.arange(at + part.start, at + part.stop, dtype=np.int64), self._collate(some[part])
            at += len(some)
        _same_length(self.count, at)

    def select(self, ids: np.ndarray) -> Iterator[tuple[np.ndarray, Batch]]:
        wanted = set(ids.tolist())
        chosen = (item for i, item in enumerate(self._stream) if i in wanted)
        for some in _chunks(ids, self._together):
            items = list(islice(chosen, len(some)))
            _same_length(len(some), len(items))
            for part in _parts(self._asked, _lengths(items)):
                yield some[part], self._collate(items[part])


class LoaderSource(_InOrder):
    """A DataLoader that does not shuffle; its batches, workers and collate function are kept.

    Raises:
        DataError: it shuffles, or its order differs from walk to walk.
    """

    # A loader walks to the batch, with its workers.
    random_access = False

    def __init__(self, loader: DataLoader[Any]) -> None:
        if isinstance(loader.sampler, RandomSampler):
            raise _shuffled("the DataLoader shuffles")
        self._loader = loader
        ordered = isinstance(loader.sampler, SequentialSampler) and loader.batch_size is not None
        streamed = isinstance(loader.dataset, IterableDataset)
        self._map: ItemSource | None = None
        if ordered and not streamed:
            self._map = ItemSource(loader.dataset, loader.collate_fn, loader.batch_size or 1)
            full = self._map.count
            self.count = full - full % (loader.batch_size or 1) if loader.drop_last else full
        else:
            if not streamed:
                _same_indices(loader.batch_sampler or loader.sampler)
            first, self.count = _counted(loader, batch_count)
            if streamed:
                _same_order(first, loader)

    def batches(self, start: int = 0) -> Iterator[tuple[np.ndarray, Batch]]:
        at = 0
        for batch in self._loader:
            n = batch_count(batch)
            if at + n > start:
                yield np.arange(at, at + n, dtype=np.int64), batch
            at += n
        _same_length(self.count, at)

    def select(self, ids: np.ndarray) -> Iterator[tuple[np.ndarray, Batch]]:
        if self._map is not None:
            yield from self._map.select(ids)
            return
        for found, batch in self.batches():
            rows = np.flatnonzero(np.isin(found, ids))
            if len(rows):
                yield found[rows], _rows(batch, rows)


def collate(items: Sequence[Any]) -> Batch:
    """A batch from a dataset's items: tensors stacked, dicts of sequences padded on the right.

    Dict items may have sequences of different lengths: `labels` are padded with -100, everything else with 0, and an
    `attention_mask` is made if there is none. Columns of text are left out.
    """
    first = items[0]
    if not isinstance(first, Mapping):
        try:
            return torch_collate(list(items))
        except RuntimeError as error:
            raise DataError(
                f"items cannot be stacked ({error}): pass a DataLoader with a collate_fn, or dict items (padded)"
            ) from None
    batch: dict[str, torch.Tensor] = {}
    for key, example in first.items():
        if isinstance(example, (str, bytes)) or example is None:
            continue
        columns = [torch.as_tensor(item[key]) for item in items]
        # An empty list has no dtype of its own.
        kind = next((c.dtype for c in columns if c.numel()), torch.int64)
        columns = [c if c.numel() else c.to(kind) for c in columns]
        if len({tuple(c.shape) for c in columns}) == 1:
            batch[key] = torch.stack(columns)
        else:
            batch[key] = _padded(key, columns)
            if key == "input_ids" and "attention_mask" not in first:
                batch["attention_mask"] = _padded(key, [torch.ones_like(c) for c in columns])
    if not batch:
        raise DataError(
            f"items have no columns of numbers, only {sorted(map(str, first))}: tokenise the text first, "
            "or pass tokenizer="
        )
    return batch


def _padded(key: str, columns: list[torch.Tensor]) -> torch.Tensor:
    if any(c.ndim != 1 for c in columns):
        raise DataError(f"column {key!r} has items of different shapes {[tuple(c.shape) for c in columns[:4]]}")
    return torch.nn.utils.rnn.pad_sequence(columns, batch_first=True, padding_value=_PADDING.get(key, 0))


def batch_count(batch: Batch) -> int:
    """Number of examples in a batch: the length of its tensors' first dimension.

    Raises:
        DataError: no tensors, or tensors that disagree.
    """
    tensors: list[torch.Tensor] = []
    _map(batch, lambda t: tensors.append(t) or t)  # type: ignore[func-returns-value]
    counts = {int(t.shape[0]) for t in tensors if t.ndim}
    if len(counts) != 1:
        raise DataError(
            f"the tensors of a batch must agree on the number of examples, got first dimensions {sorted(counts)}"
        )
    return counts.pop()


def one_of(batch: Batch, i: int) -> Batch:
    """A batch of its example i alone, padded as it was."""
    return _map(batch, lambda t: t[i : i + 1] if t.ndim else t)


def repeated(batch: Batch, times: int) -> Batch:
    """A batch that holds all its examples so many times, one run of them after another."""
    return batch if times == 1 else _map(batch, lambda t: t.repeat(times, *(1 for _ in t.shape[1:])) if t.ndim else t)


def parts_of(batch: Batch, most: int) -> Iterator[Batch]:
    """A batch in parts of so many examples at most, in order."""
    for start in range(0, batch_count(batch), most):
        yield _map(batch, lambda t: t[start : start + most] if t.ndim else t)  # noqa: B023


def digest_of(*values: Any) -> str:
    """XXH3-128, in hex, of batches or items: of their tensors, arrays, numbers and words; of other things, the type."""
    digest = xxhash.xxh3_128()
    for value in values:
        feed(digest, value)
    return str(digest.hexdigest())


def feed(digest: Any, value: Any) -> None:
    """Updates a digest with a batch or an item."""
    value = as_tensors(value)
    if isinstance(value, torch.Tensor):
        data = value.detach().cpu().contiguous()
        digest.update(f"{tuple(data.shape)}|{data.dtype}".encode())
        if data.numel():
            digest.update(data.reshape(-1).view(torch.uint8).numpy().data)
    elif hasattr(value, "items"):
        for key, part in value.items():
            digest.update(str(key).encode())
            feed(digest, part)
    elif isinstance(value, (tuple, list)):
        for part in value:
            feed(digest, part)
    else:
        known = value is None or isinstance(value, (str, bytes, int, float))
        digest.update(repr(value if known else type(value)).encode())


def _rows(batch: Batch, rows: np.ndarray) -> Batch:
    index = torch.from_numpy(rows)
    return _map(batch, lambda t: t[index.to(t.device)])


def dtypes_of(batch: Batch) -> set[torch.dtype]:
    """Of its tensors."""
    found: set[torch.dtype] = set()
    _map(batch, lambda t: found.add(t.dtype) or t)  # type: ignore[func-returns-value]
    return found


def to_device(batch: Batch, device: torch.device) -> Batch:
    return _map(batch, lambda t: t.to(device))


def _map(batch: Batch, function: Any) -> Batch:
    if isinstance(batch, torch.Tensor):
        return function(batch)
    if isinstance(batch, Mapping):
        return {k: _map(v, function) for k, v in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(_map(v, function) for v in batch))
    if isinstance(batch, (tuple, list)):
        return type(batch)(_map(v, function) for v in batch)
    return batch


def _chunks(ids: np.ndarray, size: int) -> Iterator[np.ndarray]:
    for i in range(0, len(ids), size):
        yield ids[i : i + size]


def _counted(walk: Iterable[Any], size: Callable[[Any], int] = lambda item: 1) -> tuple[Any, int]:
    """The first of what is walked over, None where there is nothing, and the sum of all sizes."""
    first, count = None, 0
    for item in walk:
        first, count = item if count == 0 else first, count + size(item)
    return first, count


def _same_indices(sampler: Any) -> None:
    """Compares what a sampler gives in two walks, whose random state is then as it was."""
    with torch.random.fork_rng(devices=[]):
        # One walk after the other: a sampler may keep its place in itself.
        if list(islice(iter(sampler), _COMPARED)) != list(islice(iter(sampler), _COMPARED)):
            name = type(getattr(sampler, "sampler", sampler)).__name__
            raise _shuffled(f"the DataLoader's {name} gives another order in each walk")


def _same_order(first: Any, walk: Iterable[Any]) -> None:
    """Compares what came first in one walk with what comes first in another."""
    with torch.random.fork_rng(devices=[]):
        if digest_of(first) != digest_of(next(iter(walk), None)):
            raise _shuffled(f"the {type(walk).__name__} begins with other data in each walk")


def _shuffled(what: str) -> DataError:
    return DataError(
        f"{what}, so row ids would name nothing: pass shuffle=False, a torch.utils.data.Subset of what was drawn, or "
        "the dataset itself"
    )


def _same_length(expected: int, got: int) -> None:
    if expected != got:
        raise DataError(
            f"the data gave {got} examples where it gave {expected} before: it must not change between walks"
        )
