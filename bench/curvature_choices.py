"""Question: which curvature, projection and complement predict retraining best? With dense matrices, nothing cut off.

Unfactored projected gradients of the LDS tasks under the full inverse of each candidate curvature: empirical, GGN, and
mixtures of a share of the GGN's trace; the default's shrunk to its diagonal; with random and learnt projections; with r
directions kept and the complement weighted in three ways; with layers weighted by their traces. Also the mean
self-influence of a training example over N, beside the gap between held-out and training loss that a damping without
retraining would be matched to.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench.environment import arguments, keep, table
from bench.lds import lds, summary, trial
from bench.methods import gathered
from bench.tasks import TASKS, Task, batches, per_example
from lorif_index import BuildConfig, Index
from lorif_index.curvature.inverse import log_mean

Matrices = dict[str, torch.Tensor]
DAMPINGS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
SHARES = (0.25, 0.5, 0.75, 1.0)
RANKS = (128, 512)
SHRUNK = (0.1, 0.3, 0.5, 1.0)


def shrunk(moments: Matrices, share: float) -> Matrices:
    """(1 - share) C + share diag(C), in the learnt projections' coordinates: those in which K-FAC is diagonal."""
    return {name: (1 - share) * c + share * torch.diag(c.diagonal()) for name, c in moments.items()}


def fitted(task: Task, model: nn.Module, folder: Path, **settings: Any) -> tuple[Index, Matrices]:
    """An index with all directions kept, and its second moments, (D, D) float64 each."""
    config = BuildConfig(curvature_rank=None, store="factors", coarse=None, **settings)
    index = Index.build(folder, model=model, data=task.data, config=config, progress=False)
    moments = {}
    for name, layer in index.curvature.items():
        basis = layer.basis.double()
        moments[name] = (basis * layer.eigenvalues) @ basis.T
    return index, moments


class Scores:
    """Scores of a task's gradients under curvatures given layer by layer."""

    def __init__(self, task: Task, data: Matrices, queries: Matrices) -> None:
        self.task, self.data, self.queries = task, data, queries

    def under(self, moments: Matrices, rank: int | None = None, complement: str = "", power: float = 0.0) -> Any:
        """Damping -> (scores (q, n), mean self-influence); layers weighted by trace^power."""
        pairs = {name: torch.linalg.eigh(c) for name, c in moments.items()}
        out = {}
        for multiple in DAMPINGS:
            total, own = 0.0, 0.0
            for name, (values, vectors) in pairs.items():
                values, vectors = values.clamp_min(0.0).flip(0), vectors.flip(1).float()
                lam = multiple * float(values.mean())
                weights = 1.0 / (values + lam)
                if rank is not None and rank < len(values):
                    mean = float(values[rank:].mean())
                    mu = {"truncated": lam, "tail-corrected": lam + mean}.get(complement)
                    weights[rank:] = 1.0 / (log_mean(lam, float(values[rank - 1]), mean) if mu is None else mu)
                weights = (weights * float(values.sum()) ** power).float()
                rows = self.data[name] @ vectors
                total = total + ((self.queries[name] @ vectors) * weights) @ rows.T
                own = own + float((rows.square() @ weights).mean())
            out[multiple] = (total.numpy(), own / self.task.count)  # type: ignore[union-attr]
        return out


def main() -> None:
    parsed = arguments(
        __doc__,
        task={"default": "digits", "choices": sorted(TASKS)},
        widths={"type": int, "nargs": "*", "default": (), "help": "also compare projections of these widths"},
    )
    task, losses_of, members = trial(parsed.task, parsed.smoke)
    truth = losses_of.mean(axis=0)
    model = task.full(0, parsed.smoke)
    rows: list[dict[str, Any]] = []

    def note(what: str, found: Any) -> None:
        by_damping = {str(m): summary(lds(scores, members, truth)) for m, (scores, _) in found.items()}
        rows.append({"what": what, "lds": by_damping, "self_over_n": {str(m): own for m, (_, own) in found.items()}})
        print(what, {m: v[0] for m, v in by_damping.items()}, flush=True)

    def gradients(index: Index) -> Scores:
        return Scores(task, *(gathered(model, batches(d), index.config, index) for d in (task.data, task.queries)))

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        index, ggn = fitted(task, model, folder / "ggn", curvature="ggn")
        scores = gradients(index)
        empirical = {name: (g.T @ g).double() / len(g) for name, g in scores.data.items()}
        mixtures = {
            share: {
                name: share * c + (1 - share) * empirical[name] * (c.trace() / empirical[name].trace())
                for name, c in ggn.items()
            }
            for share in SHARES
        }
        note("empirical", scores.under(empirical))
        for share in SHARES:
            note(f"{share:g} GGN at its trace", scores.under(mixtures[share]))
        for rank in RANKS:
            for complement in ("truncated", "tail-corrected", "log-mean"):
                note(f"0.75 GGN, r={rank}, {complement}", scores.under(mixtures[0.75], rank, complement))
        for share in SHRUNK:
            note(f"0.75 GGN, shrunk by {share:g}", scores.under(shrunk(mixtures[0.75], share)))
        note("0.75 GGN, layers by trace", scores.under(mixtures[0.75], power=1.0))
        for width in parsed.widths:
            for projection in ("random", "eigen"):
                name = f"{projection}-{width}"
                index, moments = fitted(
                    task, model, folder / name, curvature="ggn", projection=projection, projection_dim=width
                )
                note(f"GGN, {projection} projection, d={width}", gradients(index).under(moments))
    losses = {"training": float(per_example(model, task.data).mean()), "held out": float(task.losses(model).mean())}
    lines = [["LDS at damping", *map(str, DAMPINGS)]]
    lines += [[r["what"], *(f"{r['lds'][str(m)][0]:.3f}" for m in DAMPINGS)] for r in rows]
    table(lines)
    print("losses:", losses)
    keep("curvature_choices", {"task": task.name, "losses": losses, "rows": rows}, parsed, task.name)


if __name__ == "__main__":
    main()
