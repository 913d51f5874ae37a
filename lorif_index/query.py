"""Query: the Woodbury-preconditioned transform that turns a question into one small matrix per layer.

Q'_l = H_l^-1 vec(G_q), H = V S V^T + lambda I (LoRIF, arXiv:2601.21929, section 3): inside the subspace each direction
is divided by its eigenvalue + lambda, outside by mu, which is lambda ("truncated") or lambda + the mean tail
eigenvalue ("tail-corrected"). It is applied to the query, and to the query only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from .curvature import LayerCurvature
from .damping import Damping
from .errors import CurvatureError


@dataclass(frozen=True)
class Preconditioner:
    """H^-1 of one layer under one damping.

    Attributes:
        basis: V, (D, r) float32.
        inside: (r,) float32, 1 / (S + lambda).
        outside: 1 / mu; 0 where V is complete.
        lam: lambda.
    """

    basis: torch.Tensor
    inside: torch.Tensor
    outside: float
    lam: float

    @classmethod
    def of(cls, name: str, layer: LayerCurvature, damping: Damping, complement: str) -> Preconditioner:
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
        mu = lam + layer.tail_mean if complement == "tail-corrected" else lam
        inside = (1.0 / (layer.eigenvalues.double() + lam)).float()
        return cls(layer.basis, inside, 0.0 if layer.rank == layer.dim else 1.0 / mu, lam)

    def apply(self, g: torch.Tensor) -> torch.Tensor:
        """H^-1 g for rows (q, D) float32."""
        return self.combine(g, g @ self.basis, 0.0)

    def combine(self, g: torch.Tensor, coordinates: torch.Tensor, less: torch.Tensor | float) -> torch.Tensor:
        """H^-1 g - V less, for rows g (q, D) whose coordinates V^T g (q, r) are known; less (q, r) or a number."""
        out = (coordinates * (self.inside - self.outside) - less) @ self.basis.T
        if self.outside:
            out.add_(g, alpha=self.outside)
        return out

    def quadratic(self, g: torch.Tensor) -> torch.Tensor:
        """g^T H^-1 g for rows (n, D) float32, (n,)."""
        squares = (g @ self.basis).square_()
        out = squares @ self.inside
        if self.outside:
            rest = (g.square().sum(dim=1) - squares.sum(dim=1)).clamp_min_(0.0)
            out += rest * self.outside
        return out


def transform(
    gradients: Mapping[str, torch.Tensor], preconditioners: Mapping[str, Preconditioner]
) -> dict[str, torch.Tensor]:
    """The transformed query, layer by layer: (q, d_in, d_out) -> (q, d_in, d_out), float32."""
    return {name: preconditioners[name].apply(g.flatten(1)).reshape(g.shape) for name, g in gradients.items()}
