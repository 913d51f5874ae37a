"""Question: do the layers chosen and weighted, the optimiser's second moments, or whitened sides predict better?

Dense matrices under the default's curvature, as in `bench.curvature_choices`; an LDS needs only the gradients' sums
over the halves, so that a setting costs next to nothing. Three levers:

- layers: the output head in or out (a language model's is tied to its embedding), one kind of layer left out at a
  time, weights by a power of the layer's trace, each layer's scores brought to one size, and weights fitted to the even
  questions, which no attribution could have;
- metric of the damping: H = C + lambda M. Whitening the sides of a projection before the curvature is taken is
  M = (A x B)^p, with A = E[G G^T] and B = E[G^T G] (Shampoo's, Gupta et al., arXiv:1802.09568); an optimiser that
  holds weights back by sqrt(v) would say M = P^T diag(sqrt(v) + eps) P; the diagonal of the empirical Fisher is beside;
- preconditioned inner products of unprojected gradients, g_q^T diag(sqrt(v) + eps)^-1 g_i (LESS, Xia et al.,
  arXiv:2402.04333, divides likewise), without any other curvature.

Every setting's damping is chosen on the even questions and reported on the odd ones.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from bench.agreement import correlations
from bench.curvature_choices import DAMPINGS, Matrices, fitted
from bench.environment import arguments, keep, table
from bench.lds import membership, summary
from bench.lds_truth import gather, make
from bench.methods import blocks, gathered
from bench.tasks import TASKS, Task, batches, size
from lorif_index import BuildConfig, LayerSelection
from lorif_index.capture.gradients import LayerSpec
from lorif_index.linalg.projection import Projections

HEADS = {"digits": "4", "finetuned": "transformer.wte"}
OUT_BY_DEFAULT = ("finetuned",)
SHARE = 0.75
POWERS = (-1.0, -0.5, 0.5, 1.0)
Scores = dict[str, dict[float, np.ndarray]]
"""Layer -> damping -> (q, halves): scores summed over each half."""


def under(moments: Matrices, asked: Matrices, sums: Matrices, metrics: Matrices | None = None) -> Scores:
    """Scores of half sums (halves, D) under (C + multiple * mean eigenvalue * M)^-1, M of trace D or the identity."""
    out: Scores = {}
    for name, moment in moments.items():
        q, r = asked[name].double(), sums[name].double()
        wide = len(moment)
        mean = float(moment.trace()) / wide
        if metrics is not None:
            metric = metrics[name].double()
            metric = metric * (wide / float(metric.trace())) + 1e-6 * torch.eye(wide, dtype=torch.float64)
            lower = torch.linalg.cholesky(metric)
            moment, q, r = (torch.linalg.solve_triangular(lower, m, upper=False) for m in (moment, q.T, r.T))
            moment = torch.linalg.solve_triangular(lower, moment.T, upper=False)
            q, r = q.T, r.T
        values, vectors = torch.linalg.eigh((moment + moment.T) / 2)
        q, r = q @ vectors, r @ vectors
        values = values.clamp_min(0.0)
        out[name] = {m: ((q / (values + m * mean)) @ r.T).numpy() for m in DAMPINGS}
    return out


def sides(gradients: torch.Tensor, spec: LayerSpec, power: float) -> torch.Tensor:
    """(A x B)^power of gradients (n, D)."""
    g = gradients.reshape(-1, spec.d_in, spec.d_out)
    roots = []
    for moment in (torch.einsum("nab,ncb->ac", g, g), torch.einsum("nab,nac->bc", g, g)):
        values, vectors = torch.linalg.eigh(moment.double())
        # What rounding leaves of a direction without gradients is not whitened.
        values = values.clamp_min(1e-6 * float(values.max()))
        roots.append((vectors * values**power) @ vectors.T)
    return torch.kron(*roots)


def diagonal(weights: torch.Tensor, spec: LayerSpec, projections: Projections) -> torch.Tensor:
    """P^T diag(weights) P, (D, D), of one positive number for each of a layer's weights (width_in, width_out)."""
    pairs = []
    for side, width in (("in", spec.width_in), ("out", spec.width_out)):
        matrix = projections.side(spec.name, side, torch.device("cpu"), torch.float32)
        p = (torch.eye(width) if matrix is None else matrix).double()
        pairs.append((p[:, :, None] * p[:, None, :]).flatten(1))
    left, right = pairs
    found = left.T @ weights.double() @ right
    d_in, d_out = spec.d_in, spec.d_out
    return found.reshape(d_in, d_in, d_out, d_out).permute(0, 2, 1, 3).reshape(spec.dim, spec.dim)


def of_weights(model: nn.Module, spec: LayerSpec, value: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """What `value` says of a layer's parameters, in the shape of its gradient: (width_in, width_out), bias last."""
    module = model.get_submodule(spec.uses[0])
    found = value(module.weight)  # type: ignore[arg-type]
    found = found.T if isinstance(module, nn.Linear) else found
    return torch.cat([found, value(module.bias)[None]]) if spec.bias else found  # type: ignore[arg-type]


class Unprojected:
    """Gradients of all weights: sums over the halves, those of the questions, and the mean of their squares."""

    def __init__(self, task: Task, model: nn.Module, members: np.ndarray, config: BuildConfig) -> None:
        halves = torch.from_numpy(members).float()
        self.asked = gathered(model, batches(task.queries), config)
        self.sums = {name: torch.zeros(len(halves), q.shape[1]) for name, q in self.asked.items()}
        self.squares = {name: torch.zeros(q.shape[1]) for name, q in self.asked.items()}
        start = 0
        for block in blocks(model, batches(task.data), config):
            count = len(next(iter(block.values())))
            for name, g in block.items():
                self.sums[name] += halves[:, start : start + count] @ g
                self.squares[name] += g.square().sum(dim=0) / task.count
            start += count

    def divided(self, by: dict[str, torch.Tensor]) -> Scores:
        """By one number a weight, plus a multiple of their mean over all layers' weights."""
        mean = float(sum(v.sum() for v in by.values())) / sum(v.numel() for v in by.values())
        return {
            name: {m: ((self.asked[name] / (v.flatten() + m * mean)) @ self.sums[name].T).numpy() for m in DAMPINGS}
            for name, v in by.items()
        }


class Judge:
    """Compares settings with the base, on questions that they were not chosen by."""

    def __init__(self, truth: np.ndarray) -> None:
        self.truth = -truth.T
        self.rows: list[dict[str, Any]] = []
        self.base: np.ndarray | None = None

    def lds(self, scores: Scores, multiple: float, weights: dict[str, float] | None = None) -> np.ndarray:
        parts = [s[multiple] * (1.0 if weights is None else weights[name]) for name, s in scores.items()]
        return correlations(np.sum(parts, axis=0), self.truth)

    def note(self, what: str, scores: Scores, weights: dict[str, float] | None = None) -> None:
        found = {m: self.lds(scores, m, weights) for m in DAMPINGS}
        best = max(found, key=lambda m: found[m][::2].mean())
        odd = found[best][1::2]
        self.base = odd if self.base is None else self.base
        row = {
            "what": what,
            "lds": {str(m): summary(v) for m, v in found.items()},
            "best": best,
            "best_odd": summary(odd),
            "minus_base_odd": summary(odd - self.base),
        }
        if weights is not None:
            row["weights"] = {name: round(w, 4) for name, w in weights.items()}
        self.rows.append(row)
        print(what, f"{row['lds']['0.1'][0]:.3f}", best, row["best_odd"], row["minus_base_odd"], flush=True)

    def fitted_weights(self, scores: Scores, multiple: float, rounds: int) -> dict[str, float]:
        """Coordinate ascent of the mean LDS of the even questions, from ones."""
        even = {name: s[multiple][::2] for name, s in scores.items()}
        weights = dict.fromkeys(scores, 1.0)
        total = np.sum(list(even.values()), axis=0)
        best = correlations(total, self.truth[::2]).mean()
        for _ in range(rounds):
            for name, part in even.items():
                for factor in (0.0, 0.5, 0.8, 1.25, 2.0):
                    tried = total + part * weights[name] * (factor - 1)
                    value = correlations(tried, self.truth[::2]).mean()
                    if value > best:
                        best, total, weights[name] = value, tried, weights[name] * factor
        return weights


def second_moments(task: Task, model: nn.Module) -> tuple[dict[int, torch.Tensor], float, float]:
    """Adam's exp_avg_sq at the end of the training, by id of the asked model's parameter; its eps; and how far the
    weights of this training are from the asked model's at most."""
    again, optimizer = task.trained(np.arange(task.count), 0)
    pairs = list(zip(model.parameters(), again.parameters(), strict=True))
    apart = max(float((mine - theirs).detach().abs().max()) for mine, theirs in pairs)
    correction = 1 - optimizer.defaults["betas"][1] ** float(optimizer.state[pairs[0][1]]["step"])
    moments = {id(mine): optimizer.state[theirs]["exp_avg_sq"] / correction for mine, theirs in pairs}
    return moments, float(optimizer.defaults["eps"]), apart


def main() -> None:
    parsed = arguments(__doc__ or "", task={"default": "digits", "choices": sorted(HEADS)})
    task = TASKS[parsed.task](parsed.smoke)
    if parsed.smoke:
        make(task, smoke=True)
    losses = gather(task, parsed.smoke)
    members = membership(task)
    model = task.full(0, parsed.smoke)
    judge = Judge(losses.mean(axis=0))
    layers = LayerSelection(head=True)
    apart = None
    with tempfile.TemporaryDirectory() as temporary:
        width = {"projection_dim": 8} if parsed.smoke else {}
        index, ggn = fitted(task, model, Path(temporary) / "i", curvature="ggn", layers=layers, **width)
        specs = index.specs
        data, asked = (gathered(model, batches(part), index.config, index) for part in (task.data, task.queries))
        halves = torch.from_numpy(members).float()
        sums = {name: halves @ g for name, g in data.items()}
        moments = {}
        for name, c in ggn.items():
            empirical = (data[name].T @ data[name]).double() / task.count
            moments[name] = SHARE * c + (1 - SHARE) * empirical * (c.trace() / empirical.trace())
        head = HEADS[task.name]
        default = [name for name in moments if name != head or task.name not in OUT_BY_DEFAULT]

        def only(parts: dict[str, Any], names: list[str] = default) -> dict[str, Any]:
            return {name: parts[name] for name in names}

        everything = under(moments, asked, sums)
        base = only(everything)
        judge.note("the default's layers", base)
        # -- layers
        other = "without the head" if head in default else "with the head"
        judge.note(other, {n: s for n, s in everything.items() if (n == head) != (head in default) or n != head})
        judge.note("the head alone", {head: everything[head]})
        for kind in sorted({name.rpartition(".")[2] for name in default if len(default) > 4} or default):
            names = [name for name in default if name != kind and name.rpartition(".")[2] != kind]
            judge.note(f"without {kind}", only(everything, names))
        traces = {name: float(moments[name].trace()) for name in default}
        scale = float(np.mean(list(traces.values())))
        for power in POWERS:
            judge.note(f"layers by trace^{power:g}", base, {n: (t / scale) ** power for n, t in traces.items()})
        equal = {
            n: {m: s / np.linalg.norm(s, axis=1, keepdims=True) for m, s in each.items()} for n, each in base.items()
        }
        judge.note("layers' scores of one size", equal)
        chosen = max(DAMPINGS, key=lambda m: judge.lds(base, m)[::2].mean())
        rounds = 1 if parsed.smoke else 4
        judge.note("weights fitted to even questions", base, judge.fitted_weights(base, chosen, rounds))
        # -- metrics of the damping
        for power in (0.25, 0.5, 1.0):
            metrics = {name: sides(data[name], specs[name], power) for name in default}
            judge.note(f"damping by sides^{power:g}", under(only(moments), asked, sums, metrics))
        del data
        full = Unprojected(task, model, members, BuildConfig(projection_dim=None, coarse=None, layers=layers))
        shaped = {n: (specs[n].width_in, specs[n].width_out) for n in default}
        fisher = {n: full.squares[n].reshape(shaped[n]) for n in default}
        diagonals = {"diagonal Fisher^0.5": {n: f.sqrt() for n, f in fisher.items()}, "diagonal Fisher": fisher}
        if task.recipe.optimizer == "adamw":
            state, eps, apart = second_moments(task, model)
            print(f"weights of the training with its optimiser kept are at most {apart:.2g} from the model's")
            held = {n: of_weights(model, specs[n], lambda p: state[id(p)].sqrt() + eps) for n in default}
            diagonals["Adam's sqrt(v)"] = held
        for what, weights in diagonals.items():
            metrics = {n: diagonal(weights[n], specs[n], index._now.projections) for n in default}
            judge.note(f"damping by {what}", under(only(moments), asked, sums, metrics))
        judge.note("unprojected inner product", full.divided({n: torch.ones(f.shape) for n, f in fisher.items()}))
        for what, weights in diagonals.items():
            judge.note(f"unprojected, divided by {what}", full.divided(weights))
    lines = [["setting", "LDS at 0.1", "at the best of even, odd", "at", "minus the default's"]]
    for r in judge.rows:
        cells = ["{:.3f} ± {:.3f}".format(*r["lds"]["0.1"]), "{:.3f} ± {:.3f}".format(*r["best_odd"])]
        lines.append([r["what"], *cells, str(r["best"]), "{:+.3f} ± {:.3f}".format(*r["minus_base_odd"])])
    table(lines)
    result = {
        "task": task.name,
        "examples": task.count,
        "queries": size(task.queries),
        "halves": len(members),
        "seeds": len(losses),
        "weights_apart": apart,
        "rows": judge.rows,
    }
    keep("levers", result, parsed, task.name)


if __name__ == "__main__":
    main()
