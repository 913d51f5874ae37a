"""Coarse: a FAISS index over the coordinates, which proposes candidates by inner product. The one module that knows
faiss; most `faiss.index_factory` strings will do (see `faiss_file`), and flat 4-bit product quantisation with fast
scan is the default (André, Kermarrec and Le Scouarnec, VLDB 2015; Douze et al., arXiv:2401.08281).

What a code leaves out grows with its row's norm. A search may therefore *tilt* its order, <x, z> + tilt |x| |z|: large
rows are given the benefit of the doubt. In the index the norm takes the place of the last two coordinates.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigError, CorruptionError
from ..storage.sealed import SealedFile, SealedInfo, file_digest, part_name, seal_file
from .faiss_file import INNER_PRODUCT, check_faiss, part_of_faiss

TRAIN_ROWS = 50_000
_CODE_BYTES = 128
_LEAST_DIM = 8
# Codewords of 4 bits.
_LEAST_TRAINED = 16
# A width to try strings with.
_ANY_DIM = 64


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


def check_factory(factory: str) -> None:
    """Refuses what faiss cannot read for any width, before an index is built.

    Raises:
        ConfigError: faiss is not installed, or cannot parse the string.
    """
    faiss = load_faiss()
    if factory == "auto":
        return
    try:
        faiss.index_factory(_ANY_DIM, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        if "could not parse" in str(error):
            raise ConfigError(
                f"faiss refuses coarse={factory!r} ({_reason(error)}): choose another factory string, or coarse='auto'"
            ) from None


def default_factory(dim: int, rows: int) -> str:
    """4 bits for every pair of coordinates, at most 128 bytes, by fast scan; single ones where there are few. What so
    few rows cannot train is kept as it is."""
    if rows < _LEAST_TRAINED:
        return "Flat"
    most = 2 * _CODE_BYTES
    pieces = next((m for m in (most, dim // 2, dim) if m and m <= most and dim % m == 0), 1)
    return f"PQ{pieces}x4fs"


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


class Coarse:
    """A FAISS index of coordinates, by position; scores are approximate inner products.

    Args:
        index: a trained faiss index with inner product as its metric.
        factory: the string that it was made from.
        axis: where rows' norms lie, or None where searches cannot be tilted.
        before: how many of its first rows are not meant, and never proposed.
    """

    def __init__(self, index: Any, factory: str, axis: NormAxis | None, before: int = 0) -> None:
        self._index = index
        self.factory = factory
        self.axis = axis
        self._before = before

    @property
    def tilts(self) -> bool:
        """Whether searches can be tilted."""
        return self.axis is not None

    @classmethod
    def train(cls, factory: str, sample: np.ndarray) -> Coarse:
        """An empty index, trained on coordinates (m, k) float32.

        Raises:
            ConfigError: faiss does not take the string, the width or so few rows.
        """
        faiss = load_faiss()
        axis = NormAxis.fit(sample)
        sample = sample if axis is None else axis.rows(sample)
        try:
            index = faiss.index_factory(sample.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
            _quietly(faiss, index)
            index.train(np.ascontiguousarray(sample, dtype=np.float32))
            _check_kind(faiss.serialize_index(index), factory)
        except RuntimeError as error:
            raise ConfigError(
                f"faiss refuses coarse={factory!r} for {sample.shape[1]} coordinates and {len(sample)} training rows "
                f"({_reason(error)}): choose another factory string, or coarse='auto'"
            ) from None
        return cls(index, factory, axis)

    def add(self, rows: np.ndarray) -> None:
        """Takes the next rows, (n, k) float32."""
        rows = rows if self.axis is None else self.axis.rows(rows)
        self._index.add(np.ascontiguousarray(rows, dtype=np.float32))

    def __len__(self) -> int:
        return int(self._index.ntotal) - self._before

    @property
    def dim(self) -> int:
        return int(self._index.d)

    def search(self, x: np.ndarray, count: int, tilt: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
        """The `count` best of queries (q, k) by <x, z> + tilt |x| |z|.

        Returns:
            positions (q, count) int64, -1 where there are no more, and scores (q, count) float32, falling.
        """
        most = min(count, len(self))
        rows = np.ascontiguousarray(x if self.axis is None else self.axis.queries(x, tilt), dtype=np.float32)
        positions, scores = self._search(rows, most + self._before)
        if self._before:
            positions, scores = _without_first(positions, scores, self._before, most)
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

    def save(self, folder: Path, name: str) -> SealedInfo:
        """Writes and seals the index, as `name` or, where that is taken, as `name` and its digest.

        One that was trained again is of the same rows under the same name, but has other bytes: the version that is
        being replaced keeps its own until the next one is committed, and its readers longer.
        """
        temporary = folder / part_name(name)
        try:
            self.write(temporary)
            final = folder / name
            if final.exists():
                final = final.with_stem(f"{final.stem}-{file_digest(temporary)[:16]}")
            return seal_file(temporary, final)
        finally:
            temporary.unlink(missing_ok=True)

    def clear(self) -> None:
        """Forgets all rows, and keeps what it was trained to."""
        self._index.reset()

    def rebuilt(self, positions: np.ndarray) -> np.ndarray:
        """What the codes of some rows stand for, (m, k) float32, as `add_rebuilt` takes them back.

        Raises:
            ConfigError: this kind of faiss index cannot say.
        """
        try:
            return np.stack([self._index.reconstruct(int(position)) for position in positions])
        except RuntimeError as error:
            raise ConfigError(
                f"faiss cannot give back the rows of coarse={self.factory!r} ({_reason(error)}), which are all that "
                "the index keeps of them: build it anew without the removed rows"
            ) from None

    def add_rebuilt(self, rows: np.ndarray) -> None:
        """Takes rows that `rebuilt` gave."""
        self._index.add(np.ascontiguousarray(rows, dtype=np.float32))

    def to_bytes(self) -> np.ndarray:
        """faiss's own form, uint8: what `from_bytes` takes on another rank."""
        return load_faiss().serialize_index(self._index)

    @classmethod
    def from_bytes(cls, raw: np.ndarray, factory: str, axis: NormAxis | None) -> Coarse:
        """What another rank's `to_bytes` gave; checked like a file."""
        check_faiss(_reading(raw), len(raw))
        return cls(load_faiss().deserialize_index(np.ascontiguousarray(raw)), factory, axis)

    def write(self, path: Path) -> None:
        """As a file that is not sealed.

        Raises:
            OSError: the disk is full or refuses.
        """
        faiss = load_faiss()
        try:
            faiss.write_index(self._index, str(path))
        except RuntimeError as error:
            raise OSError(f"faiss cannot write {path} ({_reason(error)}): is the disk full?") from None

    def take(self, path: Path) -> bool:
        """Takes the rows that another index of the same training has written behind its own; whether faiss can, for
        this kind. The file is of this very build: another rank's."""
        other = load_faiss().read_index(str(path))
        for shift in (len(self), 0):
            # Inverted lists want to know from where to number; flat codes want to be told nothing.
            try:
                self._index.merge_from(other, shift)
            except RuntimeError:
                continue
            return True
        return False

    @classmethod
    def load(
        cls,
        file: SealedFile,
        factory: str,
        axis: NormAxis | None,
        dim: int,
        count: int,
        *,
        growing: bool = False,
        part: slice | None = None,
    ) -> tuple[Coarse, bool]:
        """Reads a sealed index; the digest, the kind and the sizes are checked before faiss takes memory for it.

        Args:
            file: as `save` sealed it.
            factory, axis, dim, count: what the manifest says of it.
            growing: rows are to be added: it is read into memory, not mapped where faiss can.
            part: of which rows it is wanted, where the kind can be read in part; None for all.

        Returns:
            the index, and whether its kind can be read in part: if so, it is of that part alone.

        Raises:
            CorruptionError: the file is damaged or not the index that the manifest speaks of.
        """
        faiss = load_faiss()
        file.verify()
        try:
            facts = check_faiss(file.read, file.info.size)
        except CorruptionError as error:
            raise CorruptionError(f"{file.path}: {error}: rebuild_coarse() anew") from None
        if (facts.dim, facts.count, facts.metric) != (dim, count, INNER_PRODUCT):
            raise CorruptionError(
                f"{file.path} holds {facts.count} rows of width {facts.dim}, where {count} of {dim} were expected: "
                "rebuild_coarse() anew"
            )
        some = part is not None and facts.codes is not None and part != slice(0, count)
        try:
            with _bounded(faiss, file.info.size):
                if some and part is not None:
                    raw, before = part_of_faiss(file.read, file.info.size, facts, part.start, part.stop)
                    index = faiss.deserialize_index(np.frombuffer(raw, dtype=np.uint8))
                    return cls(index, factory, axis, before), True
                index = faiss.read_index(str(file.path), 0 if growing else faiss.IO_FLAG_MMAP_IFC)
        except (RuntimeError, MemoryError) as error:
            raise CorruptionError(f"faiss cannot read {file.path} ({_reason(error)}): rebuild_coarse() anew") from None
        return cls(index, factory, axis), facts.codes is not None


@contextmanager
def _bounded(faiss: Any, size: int) -> Iterator[None]:
    """While faiss reads, no vector may be said to be longer than the whole file, nor a loop."""
    limits = {}
    for name in ("vector_byte_limit", "loop_limit"):
        # Not in faiss before 1.15.
        get = getattr(faiss, f"get_deserialization_{name}", None)
        if get is not None:
            limits[name] = get()
    try:
        for name in limits:
            getattr(faiss, f"set_deserialization_{name}")(size)
        yield
    finally:
        for name, old in limits.items():
            getattr(faiss, f"set_deserialization_{name}")(old)


def _without_first(positions: np.ndarray, scores: np.ndarray, before: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """What a search found, without the index's first rows, and numbered from behind them."""
    order = np.argsort(positions < before, axis=1, kind="stable")[:, :count]
    positions, scores = np.take_along_axis(positions, order, axis=1), np.take_along_axis(scores, order, axis=1)
    good = positions >= before
    return np.where(good, positions - before, -1), np.where(good, scores, np.float32(-np.inf))


def _reading(raw: np.ndarray) -> Any:
    def read(offset: int, view: memoryview) -> None:
        view[:] = raw[offset : offset + len(view)].data

    return read


def _check_kind(raw: np.ndarray, factory: str) -> None:
    """Refuses at once what would be refused when it is opened."""
    try:
        facts = check_faiss(_reading(raw), len(raw))
    except CorruptionError as error:
        raise ConfigError(
            f"coarse={factory!r} makes an index that is not read back ({error}): choose PQ, SQ, Flat, HNSW or RaBitQ, "
            "with IVF and a transform before it or without, or coarse='auto'"
        ) from None
    if facts.metric != INNER_PRODUCT:
        raise ConfigError(f"coarse={factory!r} knows distances, not inner products: choose another, or coarse='auto'")


def _quietly(faiss: Any, index: Any) -> None:
    """Small samples are meant: without faiss's warnings about points per centroid."""
    inner = faiss.downcast_index(index.index) if isinstance(index, faiss.IndexPreTransform) else index
    for owner in (inner, getattr(inner, "pq", None)):
        if owner is not None and hasattr(owner, "cp"):
            owner.cp.min_points_per_centroid = 1


def _reason(error: Exception) -> str:
    """faiss's own message, without the place in its sources."""
    text = str(error)
    return text.rpartition("Error: " if "Error: " in text else ": ")[2].strip()


def coarse_fingerprint(parts: Iterable[Any]) -> str:
    """SHA-256, in hex, over what a coarse index was made from: factors, curvature, damping, sketch, factory."""
    return hashlib.sha256(json.dumps(list(parts), sort_keys=True).encode()).hexdigest()
