"""Projection: random sign matrices that are the same on every device and machine, or learnt ones (`eigenbases`).

Two-sided projection of a layer's gradient, G = P_in^T dW P_out (LoGRA, arXiv:2405.13954; LoRIF, arXiv:2601.21929),
with entries +-1/sqrt(d) drawn on the CPU by the counter-based Philox generator (Salmon et al., 2011), keyed by
(seed, layer, side).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch

from ..capture.gradients import SIDES, GradientBlock, LayerGradient, LayerSpec

ALGORITHM = "philox4x64-signs-1"


def keyed_generator(*key: object) -> np.random.Philox:
    """A counter-based bit generator keyed by the SHA-256 of the parts (each written as text)."""
    text = "\x1f".join(str(part) for part in key).encode()
    words = np.frombuffer(hashlib.sha256(text).digest()[:16], dtype="<u8")
    return np.random.Philox(key=words.astype(np.uint64))


def projection_matrix(seed: int, layer: str, side: str, width: int, dim: int) -> torch.Tensor:
    """The projection of one side, "in" or "out", of one layer: (width, dim) float32 of +-1/sqrt(dim); the identity
    matrix where dim >= width."""
    if dim >= width:
        return torch.eye(width)
    bits = width * dim
    raw = keyed_generator(seed, layer, side).random_raw(-(-bits // 64)).astype("<u8")
    signs = np.unpackbits(raw.view(np.uint8), count=bits, bitorder="little").reshape(width, dim)
    return torch.from_numpy((signs.astype(np.float32) * 2 - 1) / np.float32(np.sqrt(dim)))


class Projections:
    """The projections of all layers; a side that keeps its own width has none.

    Matrices are made on the CPU when first asked for, and kept on the device of the gradients.

    Args:
        learnt: (layer, side) -> (width, d) matrix of the sides whose projection was learnt.
    """

    def __init__(
        self, specs: dict[str, LayerSpec], seed: int, learnt: Mapping[tuple[str, str], torch.Tensor] | None = None
    ) -> None:
        self.specs = specs
        self._seed = seed
        self._learnt: Mapping[tuple[str, str], torch.Tensor] = {} if learnt is None else learnt
        self._cache: dict[tuple[str, str, torch.device, torch.dtype], torch.Tensor] = {}

    def use(self, learnt: Mapping[tuple[str, str], torch.Tensor]) -> None:
        """Takes learnt projections from now on."""
        self._learnt = learnt
        self._cache.clear()

    def side(self, layer: str, side: str, device: torch.device, dtype: torch.dtype) -> torch.Tensor | None:
        """(width, d) matrix, or None where that side is not projected."""
        if not self.specs[layer].projected(side):
            return None
        key = (layer, side, device, dtype)
        if key not in self._cache:
            # Not asked whether it is there, which would read a stored one twice.
            matrix = self._learnt.get((layer, side))
            if matrix is None:
                matrix = projection_matrix(self._seed, layer, side, *self.specs[layer].side(side))
            self._cache[key] = matrix.to(device=device, dtype=dtype)
        return self._cache[key]

    def project(self, block: GradientBlock) -> GradientBlock:
        """Projects gradients that were handed over at the layers' own widths.

        A layer that already has its projected shape is passed on as it is.
        """
        return replace(block, layers={name: self._project(name, g) for name, g in block.layers.items()})

    def _project(self, name: str, gradient: LayerGradient) -> LayerGradient:
        spec = self.specs[name]
        if gradient.shape == (spec.d_in, spec.d_out):
            return gradient
        device, dtype = gradient.device, torch.float32
        p_in, p_out = (self.side(name, side, device, dtype) for side in SIDES)
        if gradient.pair is not None:
            left, right = gradient.pair
            left = left if p_in is None else torch.matmul(p_in.T, left)
            right = right if p_out is None else torch.matmul(p_out.T, right)
            return LayerGradient.from_pair(left, right)
        dense = gradient.dense()
        dense = dense if p_in is None else torch.matmul(p_in.T, dense)
        dense = dense if p_out is None else torch.matmul(dense, p_out)
        return LayerGradient.from_dense(dense)
