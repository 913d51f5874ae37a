"""A toy codec, dense float32 rows: one class, registered, known to no file of the package; and two ranks with it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from lorif_index import BuildConfig, Index
from lorif_index.capture.gradients import GradientBlock, LayerSpec
from lorif_index.codecs.base import CodecSizes, Encoder, Fitting, RowCodec
from lorif_index.codecs.registry import CODECS
from lorif_index.curvature.fit import LayerCurvature


class DenseCodec(RowCodec):
    """Gradients as they are."""

    name = "dense"
    label = "float32"

    @classmethod
    def sizes(cls, config: BuildConfig, specs: Mapping[str, LayerSpec], directions: int) -> CodecSizes:
        row = 4 * sum(spec.dim for spec in specs.values())
        return CodecSizes(row, 0, directions, row)

    @classmethod
    def fit(cls, fitting: Fitting) -> Self:
        return cls(fitting.specs, fitting.curvature)

    @classmethod
    def load(
        cls, folder: Path, entry: Any, specs: Mapping[str, LayerSpec], curvature: Mapping[str, LayerCurvature]
    ) -> Self:
        return cls(specs, curvature)

    @property
    def row_bytes(self) -> int:
        return 4 * sum(spec.dim for spec in self.specs.values())

    def encoder(self, device: torch.device) -> Encoder:
        return DenseEncoder()

    def decode(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        parts = rows.view(torch.float32).split([spec.dim for spec in self.specs.values()], dim=1)
        return dict(zip(self.specs, parts, strict=True))


class DenseEncoder(Encoder):
    def encode(self, block: GradientBlock) -> torch.Tensor:
        return torch.cat([g.flat().cpu() for g in block.layers.values()], dim=1).view(torch.uint8)


def register() -> None:
    """Puts it beside the real ones."""
    CODECS[DenseCodec.name] = DenseCodec


def rank(number: int, port: int, folder: str, config: dict[str, Any], data: dict[str, torch.Tensor], out: str) -> None:
    """One of two ranks: builds an index of gradients together with the other, searches it, and keeps the answer."""
    register()
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=number, world_size=2)
    Index.build(folder, gradients=[data], config=BuildConfig.from_json(config))
    index = Index.open(folder, distributed=True)
    query = {name: g[:3] for name, g in data.items()}
    hits, scores = index.search(query, k=5, exact=False), index.scores(query)
    if number == 0:
        np.savez(out, ids=hits.ids, hits=hits.scores, scores=scores)
    torch.distributed.destroy_process_group()
