"""Inverse: the Woodbury-preconditioned transform that turns a question into one small matrix per layer.

x = H^-1 vec(G_q), H = diag(d) + (1 - a) B B^T, d = a L + lambda (see `fit`). With U orthonormal in
W = (1 - a)^1/2 d^-1/2 B = U s^1/2 R^T,

    H^-1 = d^-1/2 (I - U s / (1 + s) U^T) d^-1/2

(the Woodbury identity; LoRIF, arXiv:2601.21929, section 3, has it with a constant d). It is applied to the query, and
to the query only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from ..damping import Damping
from ..errors import CurvatureError
from .fit import LayerCurvature

# Directions of W with less than this of its largest s are rounding.
_NOTHING = 1e-12


@dataclass(frozen=True)
class Preconditioner:
    """H^-1 of one layer under one damping.

    Attributes:
        layer: the curvature.
        root: d^-1/2, (D,) float32.
        vectors: U, (D, r) float32, orthonormal columns.
        strengths: s, (r,) float64, falling: (1 - a) B B^T in units of d.
        lam: lambda.
    """

    layer: LayerCurvature
    root: torch.Tensor
    vectors: torch.Tensor
    strengths: torch.Tensor
    lam: float

    def to(self, device: torch.device) -> Preconditioner:
        """The same, with what multiplies rows on a device; the curvature stays where it is."""
        moved = {name: getattr(self, name).to(device) for name in ("root", "vectors", "strengths")}
        return replace(self, **moved)

    def usable(self, name: str) -> Preconditioner:
        """This one, if float32 can hold it.

        Raises:
            CurvatureError: the gradients of the layer are so small that 1 / lambda is beyond float32's range.
        """
        if 1.0 / self.lam <= torch.finfo(torch.float32).max and bool(torch.isfinite(self.root).all()):
            return self
        raise CurvatureError(
            f"lambda={self.lam:.3g} of layer {name!r} has an inverse beyond float32's range: its gradients are too "
            "small; scale the loss, pass damping=AbsoluteDamping(...), or leave the layer out with layers="
        )

    @classmethod
    def of(cls, name: str, layer: LayerCurvature, damping: Damping) -> Preconditioner:
        """From a fitted layer.

        Raises:
            CurvatureError: the damping gives no lambda above 0, so that H is singular.
        """
        lam = damping.value(layer)
        if not lam > 0 or lam == float("inf"):
            raise CurvatureError(
                f"damping {damping} gives lambda={lam} for layer {name!r} (trace {layer.trace:.3g}), which leaves the "
                "curvature singular: pass AbsoluteDamping(...), or leave the layer out with layers="
            )
        root = layer.base(lam).rsqrt()
        scaled = layer.factor * (root * (1.0 - layer.share) ** 0.5).float()[:, None]
        strengths, turn = torch.linalg.eigh((scaled.T @ scaled).double())
        strengths, turn = strengths.flip(0), turn.flip(1)
        kept = strengths > _NOTHING * strengths[:1].clamp_min(torch.finfo(torch.float64).tiny)
        strengths, turn = strengths[kept], turn[:, kept]
        # Each vector's numbers lie together: one question meets them several times faster so.
        vectors = ((turn / strengths.sqrt()).float().T @ scaled.T).T
        return cls(layer, root.float(), vectors, strengths, lam)

    def divided(self, turned: torch.Tensor) -> torch.Tensor:
        """H^-1 of rows (q, D), both in the sides' coordinates, float32 or float64."""
        return self._times(turned, self.root.to(turned.dtype), -self.strengths / (1.0 + self.strengths))

    def apply(self, g: torch.Tensor) -> torch.Tensor:
        """H^-1 g for rows (q, D) float32 or float64."""
        return self.layer.sides.turned_back(self.divided(self.layer.sides.turned(g)))

    def multiply(self, g: torch.Tensor) -> torch.Tensor:
        """H g for rows (q, D) float32 or float64."""
        sides = self.layer.sides
        return sides.turned_back(self._times(sides.turned(g), 1.0 / self.root.to(g.dtype), self.strengths))

    def _times(self, turned: torch.Tensor, root: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """rows (q, D) times diag(root) (I + U diag(weights) U^T) diag(root)."""
        scaled, vectors = turned * root, self.vectors.to(turned.dtype)
        return scaled.addmm_((scaled @ vectors) * weights.to(turned.dtype), vectors.T).mul_(root)

    def quadratic(self, g: torch.Tensor) -> torch.Tensor:
        """g^T H^-1 g for rows (n, D) float32, (n,)."""
        turned = self.layer.sides.turned(g).mul_(self.root)
        inside = (turned @ self.vectors).square_() @ (self.strengths / (1.0 + self.strengths)).float()
        return turned.square_().sum(dim=1).sub_(inside)


Vectors = Mapping[str, torch.Tensor]
"""Layer -> (q, d_in, d_out)."""


def transform(gradients: Vectors, preconditioners: Mapping[str, Preconditioner]) -> dict[str, torch.Tensor]:
    """The transformed query x = H^-1 G, layer by layer: (q, d_in, d_out) -> (q, d_in, d_out), of the same dtype."""
    return {name: preconditioners[name].apply(g.flatten(1)).reshape(g.shape) for name, g in gradients.items()}


def transform_precisely(gradients: Vectors, preconditioners: Mapping[str, Preconditioner]) -> dict[str, torch.Tensor]:
    """`transform`, computed in float64, a layer at a time, and given in float32.

    What is large in G and small in H^-1 G cancels: in float32, <H^-1 a, b> and <a, H^-1 b> agree to some 1e-4 of the
    largest score only.
    """
    return {name: transform({name: g.double()}, preconditioners)[name].float() for name, g in gradients.items()}


def multiply(vectors: Vectors, preconditioners: Mapping[str, Preconditioner]) -> dict[str, torch.Tensor]:
    """H v, layer by layer: the inverse of `transform`."""
    return {name: preconditioners[name].multiply(v.flatten(1)).reshape(v.shape) for name, v in vectors.items()}


def inverses(curvature: Mapping[str, LayerCurvature], damping: Damping) -> dict[str, Preconditioner]:
    """Layer -> H^-1 under a damping policy.

    Raises:
        CurvatureError: a layer's H is singular.
    """
    return {name: Preconditioner.of(name, layer, damping) for name, layer in curvature.items()}


def lambdas(curvature: Mapping[str, LayerCurvature], damping: Damping) -> dict[str, float]:
    """Layer -> lambda of a damping policy.

    Raises:
        CurvatureError: a layer's H is singular, or float32 cannot hold its inverse.
    """
    return {name: one.usable(name).lam for name, one in inverses(curvature, damping).items()}
