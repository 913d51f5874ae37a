"""faiss's files, checked before faiss reads them: of a kind that reads no other file, and whose parts fit together.

faiss trusts what it reads: an inverted list may name another file, and a code, neighbour or size that is out of range
leads it out of its arrays. So every field that it uses to find its way is checked here, of the kinds of index that are
allowed; all others are refused. Numbers that only decide scores (codes, centroids) may be anything.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from ..errors import CorruptionError

Read = Callable[[int, memoryview], None]
"""Fills a buffer from an offset."""

INNER_PRODUCT, _L2 = 0, 1
# Of a vector: far beyond any index's, and such that products of two of them are no surprise.
_WIDEST = 1 << 20
_BLOCK = 1 << 20
_DEEPEST = 4
# Scalar quantisers by number: bits of a coordinate, and trained numbers for each coordinate, or for all.
_SCALAR_BITS = {0: 8, 1: 4, 2: 8, 3: 4, 4: 16, 5: 8, 6: 6, 7: 16, 8: 8}
_TRAINED_EACH, _TRAINED_ALL = {0, 1, 6}, {2, 3}
# Numbers that a RaBitQ code ends with.
_RABIT_FACTORS = 8


@dataclass(frozen=True)
class Facts:
    """What a checked file holds.

    Attributes:
        dim: width of its vectors.
        count: vectors.
        metric: faiss's number; 0 is the inner product.
        codes: where its vectors' codes lie, where they simply follow each other.
    """

    dim: int
    count: int
    metric: int
    codes: Codes | None = None


@dataclass(frozen=True)
class Codes:
    """Where the codes of a flat index lie.

    Attributes:
        at: of the field before them, which says how many numbers they are.
        width: bytes of such a number.
        block, size: so many vectors lie together, in so many bytes.
        padded: of a field that says how many vectors there is room for, or None.
    """

    at: int
    width: int
    block: int
    size: int
    padded: int | None = None


def part_of_faiss(read: Read, size: int, facts: Facts, start: int, stop: int) -> tuple[bytearray, int]:
    """The file that faiss would have written of some of the vectors, [start, stop), of a checked flat index.

    Args:
        read, size: as for `check_faiss`.
        facts: what that gave, with codes.
        start, stop: 0 <= start < stop <= count.

    Returns:
        the file, and how many vectors before `start` it begins with: blocks stay whole.
    """
    codes = facts.codes
    if codes is None:
        raise ValueError("an index whose codes do not follow each other cannot be read in part")
    first, last = start // codes.block, -(-stop // codes.block)
    begin, held = codes.at + 8, -(-facts.count // codes.block) * codes.size
    inside = (last - first) * codes.size
    out = bytearray(begin + inside + size - begin - held)
    view = memoryview(out)
    read(0, view[:begin])
    read(begin + first * codes.size, view[begin : begin + inside])
    if begin + held < size:
        read(begin + held, view[begin + inside :])
    count = stop - first * codes.block
    # The header's name and width come before the count.
    struct.pack_into("<q", out, 8, count)
    struct.pack_into("<q", out, codes.at, inside // codes.width)
    if codes.padded is not None:
        struct.pack_into("<q", out, codes.padded, (last - first) * codes.block)
    return out, start - first * codes.block


def check_faiss(read: Read, size: int) -> Facts:
    """Walks a faiss file from its first byte to its last.

    Args:
        read: gives its bytes.
        size: in bytes.

    Raises:
        CorruptionError: an index of a kind that is not allowed, or parts that do not fit together.
    """
    walk = _Walk(read, size)
    facts = walk.index()
    walk.need(walk.at == size, f"{size - walk.at} bytes follow the index")
    return facts


class _Walk:
    """A place in the file, which moves on as fields are read."""

    def __init__(self, read: Read, size: int) -> None:
        self._read, self._size = read, size
        self.at, self._depth = 0, 0
        self._codes: Codes | None = None

    def need(self, holds: bool, what: str) -> None:
        if not holds:
            raise CorruptionError(f"the faiss file is not as faiss writes it: {what} (at byte {self.at})")

    def _skip(self, size: int) -> int:
        self.need(0 <= size <= self._size - self.at, f"{size} bytes are said to follow, and {self._size} are all")
        at, self.at = self.at, self.at + size
        return at

    def _field(self, form: str) -> int | float:
        raw = bytearray(struct.calcsize(form))
        self._read(self._skip(len(raw)), memoryview(raw))
        value: int | float = struct.unpack(form, raw)[0]
        return value

    def _int(self) -> int:
        return int(self._field("<i"))

    def _long(self) -> int:
        value = int(self._field("<q"))
        self.need(value >= 0, f"{value} where a size was expected")
        return value

    def _flag(self) -> bool:
        value = int(self._field("<B"))
        self.need(value in (0, 1), f"{value} where a yes or no was expected")
        return bool(value)

    def _name(self) -> str:
        raw = bytearray(4)
        self._read(self._skip(4), memoryview(raw))
        return raw.decode("ascii", errors="replace")

    def _vector(self, width: int, count: int | None = None) -> int:
        """Passes a vector of values of so many bytes; how many there are, which must be `count` if given."""
        found = self._long()
        self.need(count is None or found == count, f"{found} values where {count} were expected")
        self._skip(found * width)
        return found

    def _array(self, dtype: str, count: int) -> np.ndarray:
        """Reads values that are used to find a way."""
        size = count * np.dtype(dtype).itemsize
        at = self._skip(size)
        out = np.empty(count, dtype=dtype)
        self._read(at, out.data.cast("B"))
        return out

    def _vector_of(self, dtype: str, count: int | None = None) -> np.ndarray:
        found = self._long()
        self.need(count is None or found == count, f"{found} values where {count} were expected")
        return self._array(dtype, found)

    # -- indexes -------------------------------------------------------------------------------------------------

    def index(self) -> Facts:
        self._depth += 1
        self.need(self._depth <= _DEEPEST, "indexes inside of indexes")
        kind = self._name()
        kinds: dict[str, Callable[[Facts], None]] = {
            "IxFI": self._flat,
            "IxF2": self._flat,
            "IxPq": self._pq,
            "IxSQ": self._sq,
            "IPfs": self._fast_scan,
            "Ixrq": self._rabitq,
            "IxPT": self._transformed,
            "IHNf": self._hnsw,
            "IHNs": self._hnsw,
            "IHNp": self._hnsw,
            "IwFl": self._ivf_flat,
            "IwSq": self._ivf_sq,
            "IwPQ": self._ivf_pq,
            "IwPf": self._ivf_fast_scan,
            "Iwrq": self._ivf_rabitq,
        }
        self.need(kind in kinds, f"an index of kind {kind!r}, which is not one of {', '.join(kinds)}")
        facts = self._header()
        kinds[kind](facts)
        self._depth -= 1
        return replace(facts, codes=self._codes) if self._depth == 0 else facts

    def _header(self) -> Facts:
        dim, count = self._int(), self._long()
        self._skip(16)
        self.need(self._flag(), "an index that is not trained")
        metric = self._int()
        self.need(metric in (INNER_PRODUCT, _L2), f"metric {metric}")
        self.need(0 < dim <= _WIDEST and count < 1 << 40, f"{count} vectors of width {dim}")
        return Facts(dim, count, metric)

    def _vectors(self, count: int, size: int, width: int = 1) -> None:
        """Passes the codes of a flat index: so many, of so many bytes, in numbers of so many bytes."""
        if self._depth == 1:
            self._codes = Codes(self.at, width, 1, size)
        self._vector(width, count * size // width)

    def _flat(self, facts: Facts) -> None:
        self._vectors(facts.count, 4 * facts.dim, 4)

    def _quantizer(self, dim: int) -> tuple[int, int]:
        """A product quantiser's pieces and bits of each."""
        width, pieces, bits = self._long(), self._long(), self._long()
        self.need(
            width == dim and 0 < pieces <= dim and dim % pieces == 0 and 0 < bits <= 16,
            f"{pieces} pieces of {bits} bits for vectors of width {width} in an index of {dim}",
        )
        self._vector(4, dim << bits)
        return pieces, bits

    def _pq(self, facts: Facts) -> None:
        pieces, bits = self._quantizer(facts.dim)
        self._vectors(facts.count, _bytes(pieces * bits))
        search, _, _ = self._int(), self._flag(), self._int()
        self.need(search == 0, f"search type {search}")

    def _scalar(self, dim: int) -> int:
        """A scalar quantiser's bytes of a code."""
        kind, _, _ = self._int(), self._int(), self._field("<f")
        width, size = self._long(), self._long()
        self.need(kind in _SCALAR_BITS, f"a scalar quantiser of type {kind}")
        self.need(width == dim and size == _bytes(dim * _SCALAR_BITS[kind]), f"codes of {size} bytes for width {width}")
        self._vector(4, 2 * dim if kind in _TRAINED_EACH else 2 if kind in _TRAINED_ALL else 0)
        return size

    def _sq(self, facts: Facts) -> None:
        self._vectors(facts.count, self._scalar(facts.dim))

    def _fast_scan(self, facts: Facts) -> None:
        pieces, bits = self._quantizer(facts.dim)
        implem, block, queries = self._int(), self._int(), self._int()
        room = self.at
        padded, even = self._long(), self._long()
        self._fast_scan_block(bits, implem, block, queries, pieces, even)
        if self._depth == 1:
            self._codes = Codes(self.at, 1, block, block * even // 2, room)
        self.need(padded == -(-facts.count // block) * block, f"room for {padded} vectors in blocks of {block}")
        self._vector(1, padded * even // 2)

    def _fast_scan_block(self, bits: int, implem: int, block: int, queries: int, pieces: int, even: int) -> None:
        self.need(
            bits == 4 and implem == 0 and queries == 0 and block > 0 and block % 32 == 0 and block <= 1 << 16,
            f"fast scan of {bits} bits, implementation {implem}, blocks of {block} and {queries}",
        )
        self.need(even == pieces + pieces % 2, f"{even} pieces of {pieces}")

    def _rabit(self, facts: Facts) -> int:
        """A RaBitQ quantiser's bytes of a code."""
        dim, size, metric = self._long(), self._long(), self._int()
        self.need(
            dim == facts.dim and size == _bytes(dim) + _RABIT_FACTORS and metric == facts.metric,
            f"RaBitQ codes of {size} bytes for width {dim}, metric {metric}",
        )
        return size

    def _rabitq(self, facts: Facts) -> None:
        self._vectors(facts.count, self._rabit(facts))
        self._vector(4, facts.dim)
        self._query_bits()

    def _query_bits(self) -> None:
        bits = int(self._field("<B"))
        self.need(bits <= 8, f"queries of {bits} bits")

    def _transformed(self, facts: Facts) -> None:
        steps, width = self._int(), facts.dim
        self.need(0 < steps <= 8, f"{steps} transforms")
        for _ in range(steps):
            width = self._transform(width)
        inner = self.index()
        self.need(
            (inner.dim, inner.count, inner.metric) == (width, facts.count, facts.metric),
            f"{inner.count} vectors of width {inner.dim} behind a transform to {width}",
        )

    def _transform(self, width: int) -> int:
        """A transform of vectors of some width; the width that it gives."""
        kind, matrix, bias = self._name(), -1, -1
        if kind == "Pcam":
            self._field("<f"), self._field("<f"), self._flag(), self._int()
            for _ in range(3):
                self._vector(4)
        if kind in ("Pcam", "LTra", "rrot"):
            shifted, matrix, bias = self._flag(), self._vector(4), self._vector(4)
            bias = bias if shifted else -1
        elif kind == "VNrm":
            self._field("<f")
        elif kind == "VCnt":
            bias = self._vector(4)
        else:
            self.need(False, f"a transform of kind {kind!r}")
        given, out, trained = self._int(), self._int(), self._flag()
        self.need(trained and given == width and 0 < out <= _WIDEST, f"a transform from {given} to {out}")
        self.need(matrix in (-1, given * out) and (matrix >= 0 or given == out), f"a matrix of {matrix}")
        self.need(bias in (-1, out), f"a shift of {bias}")
        return out

    # -- graphs --------------------------------------------------------------------------------------------------

    def _hnsw(self, facts: Facts) -> None:
        count = facts.count
        self._vector(8)
        ends = self._vector_of("<i4").astype(np.int64)
        levels = self._vector_of("<i4", count).astype(np.int64)
        offsets = self._vector_of("<u8", count + 1)
        self.need(
            1 < len(ends) <= 64 and ends[0] == 0 and bool((np.diff(ends) >= 0).all()) and ends[-1] < 1 << 24,
            "levels whose neighbours do not follow each other",
        )
        self.need(bool(((levels > 0) & (levels < len(ends))).all()), "nodes of levels that are not there")
        expected = np.concatenate([[0], np.cumsum(ends[levels])]).astype(np.uint64)
        self.need(np.array_equal(offsets, expected), "nodes whose neighbours do not follow each other")
        neighbours = self._vector_of("<i4", int(expected[-1]))
        self.need(bool(((neighbours >= -1) & (neighbours < count)).all()), "neighbours that are not there")
        self._neighbours_reach(neighbours, levels, ends, expected.astype(np.int64))
        entry, top = self._int(), self._int()
        self.need(count > 0 or (entry == -1 and top == -1), "an entry to a graph of nothing")
        self.need(
            count == 0 or (0 <= entry < count and 0 <= top == levels[entry] - 1 == levels.max() - 1),
            f"entry {entry} at level {top}",
        )
        for _ in range(2):
            beam = self._int()
            self.need(0 < beam < 1 << 20, f"a beam of {beam}")
        self._int()
        inner = self.index()
        self.need((inner.dim, inner.count) == (facts.dim, count), "a graph of other vectors")

    def _neighbours_reach(
        self, neighbours: np.ndarray, levels: np.ndarray, ends: np.ndarray, offsets: np.ndarray
    ) -> None:
        """A neighbour at a level must have neighbours there itself."""
        for level in range(1, int(levels.max(initial=1))):
            nodes = np.flatnonzero(levels > level)
            width = int(ends[level + 1] - ends[level])
            there = neighbours[offsets[nodes][:, None] + ends[level] + np.arange(width)]
            self.need(bool((levels[there[there >= 0]] > level).all()), f"neighbours that are not at level {level}")

    # -- inverted lists ------------------------------------------------------------------------------------------

    def _ivf(self, facts: Facts) -> int:
        """What inverted files begin with; how many lists there are."""
        lists, probed = self._long(), self._long()
        inner = self.index()
        self.need(
            facts.metric == INNER_PRODUCT and (inner.dim, inner.count) == (facts.dim, lists) and lists > 0 < probed,
            f"{lists} lists of width {facts.dim} by {inner.count} centroids of width {inner.dim}",
        )
        mapped, entries = int(self._field("<B")), self._vector(8)
        self.need(mapped == 0 and entries == 0, "a map of its rows")
        return lists

    def _ivf_flat(self, facts: Facts) -> None:
        self._lists(self._ivf(facts), 4 * facts.dim, facts.count)

    def _ivf_sq(self, facts: Facts) -> None:
        lists, size = self._ivf(facts), self._scalar(facts.dim)
        again, _ = self._long(), self._flag()
        self.need(again == size, f"codes of {again} bytes and of {size}")
        self._lists(lists, size, facts.count)

    def _ivf_pq(self, facts: Facts) -> None:
        lists, _, size = self._ivf(facts), self._flag(), self._long()
        pieces, bits = self._quantizer(facts.dim)
        self.need(size == _bytes(pieces * bits), f"codes of {size} bytes")
        self._lists(lists, size, facts.count)

    def _ivf_fast_scan(self, facts: Facts) -> None:
        lists, _, size = self._ivf(facts), self._flag(), self._long()
        block, even, implem, queries = self._int(), self._long(), self._int(), self._long()
        pieces, bits = self._quantizer(facts.dim)
        self._fast_scan_block(bits, implem, block, queries, pieces, even)
        self.need(size == _bytes(4 * pieces), f"codes of {size} bytes")
        self._blocks(lists, block, block * even // 2, facts.count)

    def _ivf_rabitq(self, facts: Facts) -> None:
        lists, size = self._ivf(facts), self._rabit(facts)
        again, _ = self._long(), self._flag()
        self._query_bits()
        self.need(again == size, f"codes of {again} bytes and of {size}")
        self._lists(lists, size, facts.count)

    def _lists(self, lists: int, size: int, count: int) -> None:
        """Plain lists; those that lie in other files, and all others, are refused."""
        kind, here, each = self._name(), self._long(), self._long()
        self.need(kind == "ilar" and here == lists and each == size, f"{here} lists of kind {kind!r}, {each} bytes")
        form, sizes = self._name(), np.zeros(lists, dtype=np.int64)
        if form == "full":
            sizes = self._vector_of("<i8", lists)
        elif form == "sprs":
            pairs = self._vector_of("<i8")
            self.need(len(pairs) % 2 == 0, "sizes of lists that are no pairs")
            named = pairs[::2]
            self.need(bool(((named >= 0) & (named < lists)).all()), "sizes of lists that are not there")
            self.need(len(np.unique(named)) == len(named), "two sizes of a list")
            sizes[named] = pairs[1::2]
        else:
            self.need(False, f"sizes of lists in the form {form!r}")
        self._sizes_fit(sizes, count)
        for held in sizes.tolist():
            self._skip(held * size)
            self._rows(self._array("<i8", held), count)

    def _blocks(self, lists: int, block: int, size: int, count: int) -> None:
        """Lists in blocks, as fast scan has them."""
        kind, here = self._name(), self._long()
        # Where plain lists have the size of a code, these have none.
        self._skip(8)
        each, bytes_each = self._long(), self._long()
        self.need(
            kind == "ilbl" and here == lists and each == block and bytes_each == size,
            f"{here} lists of kind {kind!r}, in blocks of {each} with {bytes_each} bytes",
        )
        total = 0
        for _ in range(lists):
            ids = self._vector_of("<i8")
            self._rows(ids, count)
            self._vector(1, -(-len(ids) // block) * size)
            total += len(ids)
        self.need(total == count, f"{total} rows in the lists of {count}")

    def _sizes_fit(self, sizes: np.ndarray, count: int) -> None:
        fits = bool(((sizes >= 0) & (sizes <= count)).all()) and int(sizes.sum()) == count
        self.need(fits, f"lists that do not add up to {count} rows")

    def _rows(self, ids: np.ndarray, count: int) -> None:
        self.need(bool(((ids >= 0) & (ids < count)).all()), "rows that are not there")


def _bytes(bits: int) -> int:
    return -(-bits // 8)
