"""Sizes: bytes on disk and in memory that a build will take, from the layers' shapes and the choices alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..capture.gradients import LayerSpec
from ..codecs.bits import CodeLayout
from ..codecs.eigencodes import alone_for, directions_for, most_kept, products_for
from ..codecs.layout import RowLayout
from ..config import BITS, BuildConfig
from ..linalg.subspace import OVERSAMPLING, SubspaceFit
from ..search.coarse import TRAIN_ROWS, default_factory

# Directions of a layer's curvature, where the config says "auto" and rows of eigencodes do not ask for more.
CURVATURE_RANK = 512
# Calibration queries of large models are fewer, so that their gradients take no more than this.
QUERY_BYTES = 256 << 20
# Beside a row: its id, its gradient's squared norm, and a checksum of each part that is kept.
_ID_BYTES, _CHECKSUM_BYTES = 8 + 4, 8
# Of a payload: where it ends, and its checksum.
PAYLOAD_EXTRA = 16
# What HDF5 puts around a file's arrays, and the manifest says of it.
FILE_BYTES = 4096 + 700
ENTRY_BYTES = 400
"""Of the manifest, for each shard."""
# Of the coarse index's codebooks: 16 centroids of float32 for each coordinate.
_COARSE_FIXED = 64


@dataclass(frozen=True)
class DiskSizes:
    """Bytes on disk, by part.

    Attributes:
        row: of one example's row, as `Index.bytes_per_example` counts it.
        rows: of all shards, with ids and checksums.
        fit: projections, curvature, directions and sketch.
        coarse: the coarse index and its calibration queries.
        payloads: the user's own.
        code: of one example's row in the coarse index.
    """

    row: int
    rows: int
    fit: int
    coarse: int
    payloads: int
    code: int = 0

    @property
    def total(self) -> int:
        return self.rows + self.fit + self.coarse + self.payloads


@dataclass(frozen=True)
class CurvatureShape:
    """What is fitted of one layer's curvature.

    Attributes:
        rank: directions that are found, None for all.
        products: of its sides' eigenvectors, that they are found among (see `grid`); 0: among all of D.
        diagonal: further products that are directions by themselves.
    """

    rank: int | None
    products: int = 0
    diagonal: int = 0

    def directions(self, dim: int, rows: int | None = None) -> int:
        """r of a layer of D = dim, of so many rows if they bound it."""
        return self.found(dim, rows) + self.diagonal

    def found(self, dim: int, rows: int | None = None) -> int:
        """The same without the diagonal."""
        whole = min(dim if self.rank is None else self.rank, dim)
        return whole if rows is None else min(whole, rows)

    def height(self, dim: int) -> int:
        """M, rows of the matrix that the directions are."""
        return self.products or dim


def curvature_shapes(config: BuildConfig, specs: Mapping[str, LayerSpec], stored: str) -> dict[str, CurvatureShape]:
    """What is fitted of each layer: as the config says, or what rows of eigencodes have use for; of layers too wide for
    that within a grid, and then more directions on its diagonal, unless rows have room for all there are anyway."""
    if config.curvature_rank != "auto":
        return dict.fromkeys(specs, CurvatureShape(config.curvature_rank))  # type: ignore[arg-type]
    if stored != "eigen":
        return dict.fromkeys(specs, CurvatureShape(CURVATURE_RANK))
    out, chosen = {}, sum(spec.dim for spec in specs.values()) > 8 * config.eigen_bytes
    for name, spec in specs.items():
        rank = max(CURVATURE_RANK, directions_for(config.eigen_bytes, len(specs), spec.dim))
        products = products_for(rank)
        if products < spec.dim:
            alone = (
                min(alone_for(config.eigen_bytes, len(specs), config.eigen_code), spec.dim - products) if chosen else 0
            )
            out[name] = CurvatureShape(rank, products, alone)
        else:
            out[name] = CurvatureShape(rank)
    return out


def directions_in_all(config: BuildConfig, specs: Mapping[str, LayerSpec], stored: str, rows: int | None = None) -> int:
    """Of all layers' curvatures together, of so many rows if they bound them."""
    shapes = curvature_shapes(config, specs, stored)
    return sum(shape.directions(specs[name].dim, rows) for name, shape in shapes.items())


def directions_kept(config: BuildConfig, specs: Mapping[str, LayerSpec], stored: str, rows: int | None = None) -> int:
    """How many of them a sketch is made of: those that rows of eigencodes keep, or all."""
    total = directions_in_all(config, specs, stored, rows)
    return min(total, most_kept(config.eigen_bytes, config.eigen_code)) if stored == "eigen" else total


def disk_sizes(
    config: BuildConfig,
    specs: Mapping[str, LayerSpec],
    stored: str,
    count: int,
    *,
    coarse: bool = True,
    payload_bytes: float = 0.0,
    curvature_rows: int | None = None,
) -> DiskSizes:
    """What an index of `count` rows will take.

    Args:
        config: the choices.
        specs: the layers.
        stored: what rows hold: "eigen", "both", "factors", "coordinates" or "coarse".
        count: n.
        coarse: whether there will be a coarse index.
        payload_bytes: of an example's payload, on average; 0: none are kept.
        curvature_rows: that the curvature is fitted on, which bound its rank; None: enough.
    """
    total_rank = directions_in_all(config, specs, stored, curvature_rows)
    coordinates = config.sketch_dim if stored in ("both", "coordinates") else 0
    layout = RowLayout(
        specs,
        config.dtype,
        factors=stored in ("both", "factors"),
        codes=CodeLayout(min(coordinates, max(total_rank, 1)), config.coordinate_bits) if coordinates else None,
    )
    row, parts = layout.row_bytes, 2 if stored == "both" else 1
    if stored == "eigen":
        # Where all directions fit, they get as many bits as fit, and no more.
        scales = 2 * len(specs)
        bits = max((b for b in BITS if total_rank * b <= 8 * (config.eigen_bytes - scales)), default=0)
        row = -(-total_rank * bits // 8) + scales if bits else config.eigen_bytes
    if stored == "coarse":
        row, parts = 0, 0
    each = row + _ID_BYTES + parts * _CHECKSUM_BYTES
    shards = -(-count * max(row, 8) // max(config.shard_bytes, 1))
    fit = sum(fit_sizes(config, specs, stored, coarse=coarse, curvature_rows=curvature_rows).values())
    codes = code = 0
    if coarse or stored == "coarse":
        dim = min(config.sketch_dim, max(total_rank, 1))
        code = code_bytes(dim)
        codes = count * code + trained_bytes(dim)
        codes += query_count(config, specs, count) * (8 + 4 * sum(spec.dim for spec in specs.values()))
    payloads = int(count * (payload_bytes + PAYLOAD_EXTRA)) if payload_bytes else 0
    return DiskSizes(row, count * each + shards * FILE_BYTES, fit, codes, payloads, code)


def fit_sizes(
    config: BuildConfig,
    specs: Mapping[str, LayerSpec],
    stored: str,
    *,
    coarse: bool = True,
    curvature_rows: int | None = None,
) -> dict[str, int]:
    """Bytes of what all rows share, whatever their number: "projections", "curvature", "eigencodes", "sketch"."""
    curvature, kept = 0, directions_kept(config, specs, stored, curvature_rows)
    for name, shape in curvature_shapes(config, specs, stored).items():
        spec = specs[name]
        rank = shape.found(spec.dim, curvature_rows)
        curvature += 4 * shape.height(spec.dim) * rank + 8 * (rank + OVERSAMPLING)
        if shape.products:
            curvature += 4 * (spec.d_in**2 + spec.d_out**2) + 8 * (shape.products + 2 * shape.diagonal)
    projections = 0
    if config.projection == "eigen":
        projections = sum(
            4 * width * dim
            for spec in specs.values()
            for width, dim in ((spec.width_in, spec.d_in), (spec.width_out, spec.d_out))
            if dim < width
        )
    eigen = 12 * kept if stored == "eigen" else 0
    sketched = coarse or stored in ("both", "coordinates", "coarse")
    # Eigencodes' sketches name their directions, too.
    sketch = (4 * min(config.sketch_dim, max(kept, 1)) + (8 if stored == "eigen" else 0)) * kept if sketched else 0
    return {"projections": projections, "curvature": curvature, "eigencodes": eigen, "sketch": sketch}


def query_count(config: BuildConfig, specs: Mapping[str, LayerSpec], count: int) -> int:
    """Calibration queries that are kept, of `count` examples."""
    each = 4 * sum(spec.dim for spec in specs.values())
    return min(config.calibration_queries, max(QUERY_BYTES // each, 1), count)


def trained_bytes(dim: int) -> int:
    """Bytes of the default coarse index without rows."""
    return _COARSE_FIXED * dim


def code_bytes(dim: int) -> int:
    """Bytes of a row in the coarse index: of the default's; other factory strings are taken to be like it."""
    factory = default_factory(dim, TRAIN_ROWS)
    return max(int(factory.removeprefix("PQ").removesuffix("x4fs")) // 2, 1)


def curvature_bytes(config: BuildConfig, specs: Mapping[str, LayerSpec], stored: str, group_bytes: int) -> int:
    """Memory that fitting the curvature takes at once: blocks or dense matrices, in groups of layers."""
    each = []
    for name, shape in curvature_shapes(config, specs, stored).items():
        dim, size = specs[name].dim, shape.products
        fit = SubspaceFit((), shape.height(dim), shape.rank, dim, 0, torch.device("cpu"), whole_up_to=size)
        each.append((fit.held_bytes, fit.nbytes))
    return min(sum(held for held, _ in each), group_bytes) + max((whole for _, whole in each), default=0)
