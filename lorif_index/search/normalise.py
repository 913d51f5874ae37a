"""Normalise: scores divided by the roots of self-influences, of rows ("relatif") or of rows and questions ("cosine").

Examples of large gradients everywhere do not win then (RelatIF, Barshan, Brunet and Dziugaite, arXiv:2003.11630).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch

from ..curvature.inverse import Preconditioner
from ..damping import Damping
from ..errors import QueryError
from ..progress import reporter
from .reader import Reader
from .whole import self_influence

NORMALIZATIONS = ("relatif", "cosine")


def check_normalize(normalize: str | None) -> None:
    """Refuses what is no normalisation.

    Raises:
        QueryError: an unknown name.
    """
    if normalize is not None and normalize not in NORMALIZATIONS:
        raise QueryError(f"normalize must be one of {NORMALIZATIONS} or None, got {normalize!r}")


def inverse_roots(own: torch.Tensor) -> torch.Tensor:
    """1 / sqrt of self-influences, float32; 0 where there is none: what has no gradient influences nothing."""
    return torch.where(own > 0, torch.where(own > 0, own, 1.0).rsqrt(), 0.0)


def question_roots(
    gradients: Mapping[str, torch.Tensor], preconditioners: Mapping[str, Preconditioner], members: int
) -> torch.Tensor:
    """(q,) float32: 1 / the root of each question's own self-influence; gradients are (q, d_in, d_out) a layer."""
    own: Any = sum(preconditioners[name].quadratic(g.flatten(1)) for name, g in gradients.items())
    return inverse_roots(own / members)


class RowScales:
    """1 / the roots of all rows' self-influences, of one version of an index; those of the last damping are kept."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._kept: tuple[str, torch.Tensor] | None = None

    def of(self, policy: Damping, chosen: tuple[str, ...]) -> torch.Tensor:
        """(m,) float32, of the live rows that this rank holds: 4 bytes a row."""
        # One assignment, so that searches in several threads never mix two policies.
        kept, key = self._kept, json.dumps([policy.to_json(), chosen], sort_keys=True)
        if kept is None or kept[0] != key:
            with reporter(False) as report:
                own = self_influence(self._reader, policy, chosen, report)
            kept = self._kept = (key, inverse_roots(torch.from_numpy(own)))
        return kept[1]
