"""Kernel: loops over the bytes of rows, compiled by numba for the CPU that they run on.

Rows of levels meet questions cut into bit planes. A row is bits. A question's number for each bit is an integer of 24
bits, of which plane b holds bit b for all places of a row, so that the inner product is
sum_b 2^b popcount(row AND plane b), the last plane counting negative. A word of a row meets its 24 planes in three
vectors. Importing this needs numba; `compiled` says when that is worth it.
"""

# mypy: disable-error-code="no-untyped-call, untyped-decorator, no-untyped-def, call-arg"

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

LANES, VECTORS, ROWS = 8, 3, 8
"""Numbers of a vector, vectors of a word's planes, rows that are worked on together: what the registers hold."""
PLANES = LANES * VECTORS
"""b: as many bits as a float32's fraction has."""
_WORD, _AT_ONCE = 8, 64
# Rows of named coordinates are asked for so many rows before they are scored: a processor follows no stream of bytes
# from one page of memory to the next. A cache's line, in bytes.
_AHEAD, _LINE = 4, 64
# Lists of a question's places, which lie far from each other, likewise.
_AHEAD_PLACES = 16
# What a compiler may do to sums that nothing depends on to the last bit: add in vectors, and multiply with adding.
_SUMS = {"reassoc", "contract"}


def _compiled(function: Any = None, **options: Any) -> Any:
    """Compiled at its first call, and kept on disk for the next process, where numba finds a folder to write to."""
    if function is None:
        return partial(_compiled, **options)
    try:
        return njit(nogil=True, cache=True, **options)(function)
    except RuntimeError:
        return njit(nogil=True, **options)(function)


@intrinsic
def _fetch(typing: Any, address: Any):
    """Asks memory for the line at an address, which may be any, without waiting for it."""

    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        byte, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, number, number, number])
        fetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        # To read, to keep, as data.
        how = [ir.Constant(number, value) for value in (0, 3, 1)]
        builder.call(fetch, [builder.inttoptr(given[0], byte), *how])
        return context.get_dummy_value()

    return types.void(types.uint64), generate


@intrinsic
def _products(typing: Any, rows: Any, stride: Any, planes: Any, words: Any, out: Any):
    """out[r] = sum_b 2^b sum_w popcount(rows[r, w] & planes[w, b]) for `ROWS` rows; the last b counts negative.

    Args:
        rows: address of the first row's first word, at any byte.
        stride: bytes from row to row.
        planes: address of the words' planes, (words, PLANES) uint64.
        words: how many.
        out: address of (ROWS,) int64.
    """
    signature = types.void(types.uint64, types.int64, types.uint64, types.int64, types.uint64)
    word, vector = ir.IntType(64), ir.VectorType(ir.IntType(64), LANES)
    places = ir.VectorType(ir.IntType(32), LANES)

    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        rows, stride, planes, words, out = given

        def number(value: int) -> Any:
            return ir.Constant(word, value)

        def at(base: Any, offset: Any, kind: Any) -> Any:
            return builder.inttoptr(builder.add(base, offset), kind.as_pointer())

        def known(name: str, result: Any) -> Any:
            return cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, [vector]), name)

        zero, none = ir.Constant(vector, [number(0)] * LANES), ir.Constant(vector, ir.Undefined)
        first = ir.Constant(places, [ir.Constant(ir.IntType(32), 0)] * LANES)
        popcount, added = known("llvm.ctpop.v8i64", vector), known("llvm.vector.reduce.add.v8i64", word)
        before = builder.block
        loop, end = builder.append_basic_block("words"), builder.append_basic_block("end")
        builder.cbranch(builder.icmp_signed(">", words, number(0)), loop, end)

        builder.position_at_end(loop)
        w = builder.phi(word)
        w.add_incoming(number(0), before)
        sums = [builder.phi(vector) for _ in range(ROWS * VECTORS)]
        here = builder.mul(w, number(_WORD * PLANES))
        cut = [
            builder.load(at(planes, builder.add(here, number(_WORD * LANES * v)), vector), align=_WORD)
            for v in range(VECTORS)
        ]
        after = []
        for r in range(ROWS):
            offset = builder.add(builder.mul(stride, number(r)), builder.mul(w, number(_WORD)))
            read = builder.load(at(rows, offset, word), align=1)
            everywhere = builder.insert_element(none, read, ir.Constant(ir.IntType(32), 0))
            everywhere = builder.shuffle_vector(everywhere, none, first)
            for v in range(VECTORS):
                found = builder.call(popcount, [builder.and_(everywhere, cut[v])])
                after.append(builder.add(sums[VECTORS * r + v], found))
        following = builder.add(w, number(1))
        w.add_incoming(following, loop)
        for total, more in zip(sums, after, strict=True):
            total.add_incoming(zero, before)
            total.add_incoming(more, loop)
        builder.cbranch(builder.icmp_signed("<", following, words), loop, end)

        builder.position_at_end(end)
        results = []
        for more in after:
            result = builder.phi(vector)
            result.add_incoming(zero, before)
            result.add_incoming(more, loop)
            results.append(result)
        weights = [1 << b for b in range(PLANES - 1)] + [-(1 << (PLANES - 1))]
        for r in range(ROWS):
            together = zero
            for v in range(VECTORS):
                weight = ir.Constant(vector, [number(value) for value in weights[LANES * v : LANES * (v + 1)]])
                together = builder.add(together, builder.mul(results[VECTORS * r + v], weight))
            builder.store(builder.call(added, [together]), at(out, number(_WORD * r), word), align=_WORD)
        return context.get_dummy_value()

    return signature, generate


@_compiled
def cut(queries, firsts, counts, sizes, words, bits, planes, steps):
    """Cuts questions into planes.

    Args:
        queries: (q, dim) float32.
        firsts, counts, sizes: (pieces,) int64: each piece's first coordinate, coordinates and bytes.
        words: (pieces + 1,) int64: its first word among all.
        bits: of a coordinate in a row.
        planes: (q, words, PLANES) uint64 of zeros, to be filled.
        steps: (q, pieces) float32, to be filled: what an integer's unit is worth.
    """
    most, mask = 2.0 ** (PLANES - 1) - 1, (1 << PLANES) - 1
    for k in range(queries.shape[0]):
        for p in range(len(counts)):
            peak = 0.0
            for c in range(counts[p]):
                peak = max(peak, abs(queries[k, firsts[p] + c]))
            step = peak * 2.0 ** (bits - 1) / most if peak > 0 else 1.0
            steps[k, p] = step
            for c in range(counts[p]):
                # Byte j of a piece holds coordinates j, j + size, j + 2 size, ... (see `bits`).
                place = (c % sizes[p]) * 8 + c // sizes[p] * bits
                for t in range(bits):
                    value = np.int64(np.rint(queries[k, firsts[p] + c] * 2.0**t / step)) & mask
                    w, shift = words[p] + (place + t) // 64, np.uint64((place + t) % 64)
                    for b in range(PLANES):
                        planes[k, w, b] |= np.uint64((value >> b) & 1) << shift


@_compiled
def score(rows, starts, words, planes, steps, offsets, scales, first, out):
    """Scores rows.

    Args:
        rows: (n, row bytes) uint8, contiguous.
        starts: (pieces,) int64: each piece's first byte in a row.
        words, planes, steps: as in `cut`.
        offsets: (q, pieces) float32, taken off a piece's product before its scale.
        scales: (n, pieces) float32.
        first: column of `out` for the first row.
        out: (q, at least first + n) float32, to be filled.
    """
    n, wide = rows.shape
    # The last rows are copied: what is read beyond a piece's end must be there.
    last, found = np.zeros((ROWS, wide + _WORD), np.uint8), np.zeros(ROWS, np.int64)
    cuts, there = np.uint64(planes.ctypes.data), np.uint64(found.ctypes.data)
    each = np.int64(_WORD * PLANES)
    total = np.zeros(ROWS)
    # Of a question the planes stay in the cache for some rows, and these for all questions.
    for begin in range(0, n, _AT_ONCE):
        for k in range(planes.shape[0]):
            for r in range(begin, min(begin + _AT_ONCE, n), ROWS):
                some = min(ROWS, n - r)
                if r + ROWS >= n:
                    last[:some, :wide] = rows[r:]
                    base, stride = np.uint64(last.ctypes.data), wide + _WORD
                else:
                    base, stride = np.uint64(rows.ctypes.data) + np.uint64(r * wide), wide
                total[:] = 0.0
                for p in range(len(starts)):
                    here = cuts + np.uint64(each * (k * planes.shape[1] + words[p]))
                    _products(base + np.uint64(starts[p]), stride, here, words[p + 1] - words[p], there)
                    for i in range(some):
                        total[i] += scales[r + i, p] * (found[i] * np.float64(steps[k, p]) - offsets[k, p])
                for i in range(some):
                    out[k, first + r + i] = total[i]


@_compiled
def _entry(row, entries, e):
    """Entry e of a row that names so many: its place, above 5 bits that stand for its value (see `sparse`)."""
    middle, high = np.int32(row[entries + e]) << np.int32(8), np.int32(row[2 * entries + e]) << np.int32(16)
    return np.int32(row[e]) | middle | high


@_compiled(fastmath=_SUMS)
def named(rows, entries, query, values, scales, first, out):
    """Scores rows that name their largest coordinates (see `sparse`).

    Args:
        rows: (n, row bytes) uint8, contiguous.
        entries: how many a row names.
        query: (dim + 1,) float32, 0 behind the last coordinate.
        values: (32,) float32: what the low bits of an entry stand for.
        scales: (n,) float32.
        first: place in `out` for the first row.
        out: (at least first + n,) float32, to be filled.
    """
    low, last = np.int32(31), np.int32(len(query) - 1)
    n, wide = rows.shape
    base = np.uint64(rows.ctypes.data)
    for r in range(n):
        following = base + np.uint64(min(r + _AHEAD, n - 1) * wide)
        for byte in range(0, wide, _LINE):
            _fetch(following + np.uint64(byte))
        row, total = rows[r], np.float32(0.0)
        for e in range(entries):
            entry = _entry(row, entries, e)
            # A forged place must not be read behind the end.
            total += query[min(entry >> np.int32(5), last)] * values[entry & low]
        out[first + r] = total * scales[r]


@_compiled
def count_named(rows, entries, counts):
    """Counts how often each coordinate is named.

    Args:
        rows: (n, row bytes) uint8.
        entries: how many a row names.
        counts: (dim + 1,) int32 of zeros, to be filled from its second number on.
    """
    for r in range(rows.shape[0]):
        row = rows[r]
        for e in range(entries):
            entry = _entry(row, entries, e)
            place = entry >> np.int32(5)
            if place < len(counts) - 1:
                counts[place + 1] += np.int32(1)


@_compiled
def turn_named(rows, entries, at, numbers, levels):
    """Puts entries in the order of their coordinates.

    Args:
        rows, entries: as in `count_named`.
        at: (dim,) int32: where each coordinate's begin; changed.
        numbers: (m,) uint16, to be filled with the entries' rows.
        levels: (m,) uint8, to be filled with their low bits.
    """
    for r in range(rows.shape[0]):
        row = rows[r]
        for e in range(entries):
            entry = _entry(row, entries, e)
            place = entry >> np.int32(5)
            if place < len(at):
                k = at[place]
                at[place] = k + np.int32(1)
                numbers[k] = r
                levels[k] = entry & np.int32(31)


@_compiled
def add_named(starts, numbers, levels, places, asked, values, out):
    """Adds to each row its inner product with a question, before the rows' scales.

    Args:
        starts, numbers, levels: of a block of `Postings`.
        places: (q,) int64, where the question is not zero.
        asked: (q,) float32, its numbers there.
        values: (32,) float32: what the low bits of an entry stand for.
        out: (n,) float32.
    """
    table, last = np.empty(32, np.float32), len(places) - 1
    at, beside = np.uint64(numbers.ctypes.data), np.uint64(levels.ctypes.data)
    first = np.uint64(starts.ctypes.data)
    for i in range(len(places)):
        _fetch(first + np.uint64(4 * places[min(i + 2 * _AHEAD_PLACES, last)]))
        following = np.uint64(starts[places[min(i + _AHEAD_PLACES, last)]])
        _fetch(at + following * np.uint64(2))
        _fetch(at + following * np.uint64(2) + np.uint64(_LINE))
        _fetch(beside + following)
        for level in range(32):
            table[level] = asked[i] * values[level]
        for k in range(starts[places[i]], starts[places[i] + 1]):
            out[numbers[k]] += table[levels[k]]


@_compiled
def take_better(sums, scales, worst, rows, scores):
    """Takes sums away, which are zeros afterwards, and keeps those rows whose scores are not `worst` or less.

    Args:
        sums: (at least n,) float32, of `add_named`.
        scales: (n,) float32 of the rows.
        worst: a score; of NaN all are kept, as what is no number always is.
        rows: (at least n,) int32, to be filled with those rows.
        scores: (at least n,) float32, to be filled with their scores.

    Returns:
        how many they are.
    """
    count = 0
    for r in range(len(scales)):
        score = sums[r] * scales[r]
        sums[r] = np.float32(0.0)
        # Always written, and gone on from only where it is kept: no branch, which a processor would guess wrongly.
        rows[count] = r
        scores[count] = score
        count += not score <= worst
    return count
