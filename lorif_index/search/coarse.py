"""Coarse: short codes of the rows' coordinates, from which candidates are proposed by inner product.

The one module that knows faiss, which searches the codes. On disk they are arrays like all others.

By default codes are of product quantisation, 4 bits for every pair of coordinates, searched by fast scan (André,
Kermarrec and Le Scouarnec, VLDB 2015; Douze et al., arXiv:2401.08281). What a code leaves out grows with its row's
norm. A search may therefore *tilt* its order, <x, z> + tilt |x| |z|: a bonus that grows with the row's norm. In the
codes the norm takes the place of the last two coordinates.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..codecs.postings import Shortened
from ..codecs.sparse import SparseLayout
from ..errors import ConfigError, CorruptionError
from ..storage.manifest import Manifest
from ..storage.sealed import SealedFile, entry_of, write_sealed

TRAIN_ROWS = 50_000
"""Rows that codebooks are learnt from, at most."""
_CODE_BYTES = 128
_LEAST_DIM = 8
# Of a piece's codebook; also the fewest rows that can teach one.
_CODEWORDS, _BITS = 16, 4
# Coordinates: beyond any sketch's, and so few that sizes made from them cannot overflow.
_WIDEST = 1 << 31
# Codes that faiss's fast scan takes together.
_TOGETHER = 32


def faiss_is_installed() -> bool:
    return importlib.util.find_spec("faiss") is not None


def load_faiss() -> Any:
    """The faiss module.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import faiss
    except ImportError as error:
        raise ConfigError(
            f"the coarse stage needs faiss, which cannot be imported ({error}): install lorif-index[cpu], or "
            "lorif-index[gpu] where there is a GPU; exact=True works without"
        ) from None
    return faiss


def pieces_of(dim: int, rows: int = TRAIN_ROWS) -> int:
    """Into how many pieces of 4 bits k = dim coordinates are coded, at most 128 bytes together; 0: they are kept as
    they are, where so few rows cannot teach codebooks."""
    if rows < _CODEWORDS:
        return 0
    most = 2 * _CODE_BYTES
    return next((m for m in (most, dim // 2, dim) if m and m <= most and dim % m == 0), 1)


def code_bytes(kind: str, dim: int) -> int:
    """Of a row's code."""
    return 4 * dim if kind == "flat" else -(-pieces_of(dim) // 2)


def codebook_bytes(dim: int) -> int:
    """Of the codebooks, whatever the number of rows."""
    return 4 * _CODEWORDS * dim


def tilted(scores: np.ndarray, x: np.ndarray, norms: np.ndarray, tilt: float) -> np.ndarray:
    """scores + tilt |x| |z|, (q, n) float32, from scores (q, n), queries (q, k) and norms (n,) of rows."""
    if not tilt:
        return scores
    weights = np.float32(tilt) * np.linalg.norm(x, axis=1).astype(np.float32)
    return scores + weights[:, None] * norms.astype(np.float32)


@dataclass(frozen=True)
class NormAxis:
    """How a row's norm lies among the coordinates of a coarse index: as (|z| - mean) / unit.

    Attributes:
        mean: of the norms.
        unit: such that the axis spreads as much as a coordinate does.
    """

    mean: float
    unit: float

    @classmethod
    def from_json(cls, data: Any) -> NormAxis | None:
        """From the manifest's [mean, unit], or null; ValueError or TypeError where it cannot be."""
        if data is None:
            return None
        mean, unit = map(float, data)
        if not (math.isfinite(mean) and 0 < unit < math.inf):
            raise ValueError(f"an axis of {data}")
        return cls(mean, unit)

    def to_json(self) -> list[float]:
        return [self.mean, self.unit]

    @classmethod
    def fit(cls, sample: np.ndarray) -> NormAxis | None:
        """From coordinates (m, k); None where two of so few would be missed, or all norms are equal."""
        if sample.shape[1] < _LEAST_DIM:
            return None
        norms = np.linalg.norm(sample.astype(np.float64), axis=1)
        spread, rms = float(norms.std()), float(np.sqrt(np.square(sample, dtype=np.float64).mean()))
        return cls(float(norms.mean()), spread / rms) if spread > 1e-6 * rms else None

    def rows(self, z: np.ndarray) -> np.ndarray:
        """Coordinates (n, k) as the index takes them."""
        out = np.array(z, dtype=np.float32)
        out[:, -2] = (np.linalg.norm(z, axis=1) - self.mean) / self.unit
        out[:, -1] = 0.0
        return out

    def queries(self, x: np.ndarray, tilt: float) -> np.ndarray:
        """Queries (q, k) as the index takes them."""
        out = np.array(x, dtype=np.float32)
        out[:, -2] = tilt * self.unit * np.linalg.norm(x, axis=1)
        out[:, -1] = 0.0
        return out


@dataclass(frozen=True)
class Codes:
    """The coarse codes of rows, as they are kept.

    Attributes:
        dim: k, of the coordinates.
        axis: where rows' norms lie, or None where searches cannot be tilted.
        books: (pieces, 16, k / pieces) float32 codebooks; (0, 16, k) where rows are kept as coordinates.
        rows: (n, bytes) uint8: two pieces a byte, the first in the low bits; or float32 coordinates (n, k); or
            shortened rows, which name coordinates (see `codecs.sparse`).
        entries: how many a shortened row names; 0: rows are none.
    """

    dim: int
    axis: NormAxis | None
    books: np.ndarray
    rows: np.ndarray
    entries: int = 0

    @classmethod
    def named(cls, dim: int, entries: int) -> Codes:
        """Codes of no rows, that are to be shortened ones."""
        width = SparseLayout(dim, entries).row_bytes
        return cls(dim, None, np.empty((0, _CODEWORDS, dim), np.float32), np.empty((0, width), np.uint8), entries)

    @classmethod
    def train(cls, kind: str, sample: np.ndarray) -> Codes:
        """Codes of no rows, with codebooks learnt from coordinates (m, k) float32.

        Args:
            kind: "auto", "pq" or "flat".
            sample: some rows' coordinates.
        """
        dim, axis = sample.shape[1], NormAxis.fit(sample)
        pieces = 0 if kind == "flat" else pieces_of(dim, len(sample))
        if not pieces:
            return cls(dim, axis, np.empty((0, _CODEWORDS, dim), np.float32), np.empty((0, dim), np.float32))
        faiss = load_faiss()
        quantiser = faiss.ProductQuantizer(dim, pieces, _BITS)
        # Small samples are meant: without faiss's warnings about points per centroid.
        quantiser.cp.min_points_per_centroid = 1
        quantiser.train(np.ascontiguousarray(sample if axis is None else axis.rows(sample), dtype=np.float32))
        books = faiss.vector_to_array(quantiser.centroids).reshape(pieces, _CODEWORDS, dim // pieces)
        return cls(dim, axis, books, np.empty((0, quantiser.code_size), np.uint8))

    def __len__(self) -> int:
        return len(self.rows)

    def encode(self, z: np.ndarray) -> np.ndarray:
        """What is kept of coordinates (n, k) float32, or of shortened rows."""
        if self.entries:
            return z
        turned = np.ascontiguousarray(z if self.axis is None else self.axis.rows(z), dtype=np.float32)
        if not len(self.books) or not len(turned):
            return turned if not len(self.books) else np.empty((0, self.rows.shape[1]), np.uint8)
        found: np.ndarray = _quantiser(self.books).compute_codes(turned)
        return found

    def with_rows(self, rows: np.ndarray) -> Codes:
        """The same codebooks with these rows, as `encode` gave them."""
        return replace(self, rows=rows)

    def save(self, folder: Path, name: str) -> dict[str, Any]:
        """Seals them as arrays `codes` and, where there are some, `books`; what the manifest keeps."""
        info = write_sealed(folder, name, {"codes": self.rows, "books": self.books})
        axis = None if self.axis is None else self.axis.to_json()
        return {"file": info.to_json(), "dim": self.dim, "pieces": len(self.books), "rows": len(self), "axis": axis} | (
            {"entries": self.entries} if self.entries else {}
        )

    @classmethod
    def load(cls, folder: Path, entry: Any, some: slice | None = None) -> Codes:
        """What `save` wrote, after checking the file's digest.

        Args:
            folder, entry: where it is.
            some: of which rows; None: of all.

        Raises:
            CorruptionError: the file or the entry is damaged.
        """
        file = SealedFile.of_entry(folder, entry)
        with entry_of("the coarse index"):
            dim, pieces, count = (int(entry[key]) for key in ("dim", "pieces", "rows"))
            axis, entries = NormAxis.from_json(entry["axis"]), int(entry.get("entries", 0))
            if not 0 < dim < _WIDEST or count < 0 or not 0 <= entries <= dim:
                raise ValueError(f"{count} rows of {dim} coordinates, {entries} of which are named")
            if not 0 <= pieces <= 2 * _CODE_BYTES or (pieces and dim % pieces):
                raise ValueError(f"{count} rows of {dim} coordinates in {pieces} pieces")
        width = SparseLayout(dim, entries).row_bytes if entries else -(-pieces // 2) or dim
        kind = np.dtype(np.uint8 if pieces or entries else "<f4")
        start, stop, _ = (some or slice(None)).indices(count)
        with closing(file):
            file.verify()
            books = np.empty((0, _CODEWORDS, dim), np.float32)
            if pieces:
                books = file.read_array("books", (pieces, _CODEWORDS, dim // pieces), "<f4")
            offset = file.require("codes", count * width * kind.itemsize)
            rows = np.empty((stop - start, width), kind)
            file.read(offset + start * width * kind.itemsize, rows.reshape(-1).view(np.uint8).data)
        if not (np.isfinite(books).all() and (kind == np.uint8 or np.isfinite(rows).all())):
            raise CorruptionError(f"{file.path} holds inf or NaN: rebuild_coarse() anew")
        return cls(dim, axis, books, rows, entries)


def _quantiser(books: np.ndarray) -> Any:
    faiss = load_faiss()
    pieces, _, width = books.shape
    quantiser = faiss.ProductQuantizer(pieces * width, pieces, _BITS)
    faiss.copy_array_to_vector(np.ascontiguousarray(books, np.float32).reshape(-1), quantiser.centroids)
    return quantiser


class Coarse:
    """Coarse codes ready to be searched, by position; scores are approximate inner products.

    Args:
        codes: of the rows. faiss makes its index of them here, in memory.

    Attributes:
        shortened: the rows, where they are shortened ones.
    """

    def __init__(self, codes: Codes) -> None:
        self.axis, self.dim, self._count = codes.axis, codes.dim, len(codes)
        self.shortened: Shortened | None = None
        if codes.entries:
            rows = torch.from_numpy(np.ascontiguousarray(codes.rows))
            self.shortened = Shortened(SparseLayout(codes.dim, codes.entries), rows)
            return
        faiss = load_faiss()
        if not len(codes.books):
            self._index = faiss.IndexFlatIP(codes.dim)
            self._index.add(np.ascontiguousarray(codes.rows, np.float32))
            return
        flat = faiss.IndexPQ(codes.dim, len(codes.books), _BITS, faiss.METRIC_INNER_PRODUCT)
        flat.pq = _quantiser(codes.books)
        flat.is_trained = True
        faiss.copy_array_to_vector(np.ascontiguousarray(codes.rows).reshape(-1), flat.codes)
        flat.ntotal = len(codes)
        self._index = faiss.IndexPQFastScan(flat, _TOGETHER)

    @property
    def tilts(self) -> bool:
        """Whether searches can be tilted."""
        return self.axis is not None

    def __len__(self) -> int:
        return self._count

    def search(self, x: np.ndarray, count: int, tilt: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
        """The `count` best of queries (q, k) by <x, z> + tilt |x| |z|.

        Returns:
            positions (q, count) int64, -1 where there are no more, and scores (q, count) float32, falling.
        """
        most = min(count, len(self))
        if self.shortened is not None:
            return self.shortened.best(np.ascontiguousarray(x, dtype=np.float32), most)
        rows = np.ascontiguousarray(x if self.axis is None else self.axis.queries(x, tilt), dtype=np.float32)
        positions, scores = self._search(rows, most)
        if self.axis is not None:
            scores = tilted(scores, x, np.full(most, self.axis.mean), tilt)
        return positions, scores

    def _search(self, rows: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
        if len(rows) > 1:
            scores, positions = self._index.search(rows, most)
            return positions, scores
        # One query is searched by one thread: a team of others would spin beside it and beside torch's afterwards.
        faiss = load_faiss()
        threads = faiss.omp_get_max_threads()
        faiss.omp_set_num_threads(1)
        try:
            scores, positions = self._index.search(rows, most)
        finally:
            faiss.omp_set_num_threads(threads)
        return positions, scores


def coarse_fingerprint(manifest: Manifest) -> str:
    """SHA-256, in hex, over what a coarse index of these rows is made from: rows, curvature, codec, damping, sketch."""
    files = {name: info.digest for name, info in manifest.files().items() if name in ("curvature", "codec", "sketch")}
    lams = manifest.fits.get("sketch", {}).get("lams")
    facts = [[shard.sealed.digest for shard in manifest.shards], files, lams]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
