"""Question: what should the sketch keep? Candidates needed for the exact answers, reduction by reduction.

In float32, so that only the reduction counts: all half-whitened coordinates, PCA to k of them, each layer's own
eigenvectors, a subsampled randomised Hadamard rotation, and PCA of gradients that were half-whitened with the
complement too; and what a tilt by the rows' norms changes. Exact answers are those of indexes that rescore from both
representations, at c = 1 and c = 4.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from bench.environment import CACHE, arguments, keep, table
from bench.scale_data import FOLDER, Dense, gradients
from bench.scale_index import FULL_RANK, derived, full_index
from bench.search_at_scale import asked
from lorif_index import Index
from lorif_index.build.coarse_build import TILTS
from lorif_index.damping import as_damping
from lorif_index.search.coarse import tilted

Whiten = Callable[[torch.Tensor], torch.Tensor]


def whitenings(index: Index) -> tuple[Whiten, Whiten, torch.Tensor]:
    """Half-whitening inside the subspace and of the whole space, for rows of all layers, and S / (S + lambda)."""
    policy = as_damping(index.config.damping)
    parts, at = [], 0
    for name in index.layers:
        layer = index.curvature[name]
        lam = policy.value(layer)
        root = torch.sqrt(layer.eigenvalues + lam).float()
        parts.append((slice(at, at + layer.dim), layer.basis, root, (lam + layer.tail_mean) ** 0.5))
        at += layer.dim

    def inside(rows: torch.Tensor) -> torch.Tensor:
        return torch.cat([(rows[:, part].float() @ v) / root for part, v, root, _ in parts], dim=1)

    def whole(rows: torch.Tensor) -> torch.Tensor:
        out = []
        for part, v, root, outside in parts:
            g = rows[:, part].float()
            c = g @ v
            out.append((c / root) @ v.T + (g - c @ v.T) / outside)
        return torch.cat(out, dim=1)

    shares = [
        s / (s + policy.value(index.curvature[n]))
        for n in index.layers
        if (s := index.curvature[n].eigenvalues) is not None
    ]
    return inside, whole, torch.cat(shares)


def hadamard(width: int, kept: int, seed: int) -> Whiten:
    """Subsampled randomised Hadamard transform (Ailon and Chazelle, 2009) to `kept` coordinates."""
    size = 1 << (width - 1).bit_length()
    rng = np.random.default_rng(seed)
    signs = torch.from_numpy(rng.choice([-1.0, 1.0], width)).float()
    chosen = torch.from_numpy(np.sort(rng.permutation(size)[:kept]))

    def apply(e: torch.Tensor) -> torch.Tensor:
        x = torch.nn.functional.pad(e * signs, (0, size - width))
        step = 1
        while step < size:
            x = x.view(len(x), -1, 2, step)
            x = torch.cat([x[:, :, 0] + x[:, :, 1], x[:, :, 0] - x[:, :, 1]], dim=2).flatten(1)
            step *= 2
        return x[:, chosen] / kept**0.5

    return apply


def chunks(dense: Dense, whiten: Whiten) -> torch.Tensor:
    rows = torch.from_numpy(dense.array())
    return torch.cat([whiten(rows[i : i + 1000]) for i in range(0, len(rows), 1000)])


def needed(approximate: np.ndarray, exact: np.ndarray, k: int) -> dict[str, int]:
    """Candidates for .95 and .99 of the k best, pooled over the queries."""
    n = exact.shape[1]
    best = np.argsort(-exact, axis=1, kind="stable")[:, :k]
    place = np.empty_like(best, shape=exact.shape)
    np.put_along_axis(place, np.argsort(-approximate, axis=1, kind="stable"), np.arange(n)[None], 1)
    ranks = np.sort(np.take_along_axis(place, best, 1).ravel())
    return {str(t): int(ranks[int(np.ceil(t * len(ranks))) - 1]) + 1 for t in (0.95, 0.99)}


def main() -> None:
    parsed = arguments(
        __doc__ or "",
        n={"type": int, "default": 20_000},
        full={"type": int, "default": 1_000_000},
        steps={"type": int, "default": 2000},
    )
    folder, most, steps, n, full, count, ks = FOLDER, None, parsed.steps, parsed.n, parsed.full, 200, (256, 512, 1024)
    settings: dict[str, Any] = {}
    if parsed.smoke:
        folder, most, steps, n, full, count, ks = CACHE / "smoke" / "sketches", 60, 3, 1100, 1200, 8, (64,)
        settings = {"curvature_rank": 32, "sketch_dim": 64, "curvature_sample": 400, "calibration_queries": 4}
        shutil.rmtree(folder, ignore_errors=True)
    whole_index = full_index(full, steps, folder, most, settings)
    dense = gradients("train", n, steps, folder, most)
    queries = asked("held-out", count, steps, folder, most)
    exact = {f"c={c}": derived(whole_index, c, n).scores(queries) for c in (1, FULL_RANK)}
    inside, whole, shares = whitenings(whole_index)
    flat = torch.cat([queries[name].flatten(1) for name in whole_index.layers], dim=1)
    results: list[dict[str, Any]] = []

    def note(name: str, x: torch.Tensor, z: torch.Tensor) -> None:
        approximate = (x @ z.T).numpy()
        for sign, word in ((1, "proponents"), (-1, "opponents")):
            for stored, scores in exact.items():
                found = {f"k={k}": needed(sign * approximate, sign * scores, k) for k in (10, 100)}
                results.append({"sketch": name, "sign": word, "rescored from": f"both, {stored}", **found})
        print(results[-4]["sketch"], results[-4]["k=100"], flush=True)

    def note_tilted(name: str, x: torch.Tensor, z: torch.Tensor) -> None:
        """The best tilt for one half of the queries, and what it needs on the other half."""
        half, approximate, norms = count // 2, (x @ z.T).numpy(), z.norm(dim=1).numpy()

        def depths(tilt: float, part: slice, sign: int, scores: np.ndarray) -> dict[str, dict[str, int]]:
            order = tilted(sign * approximate[part], x[part].numpy(), norms, tilt)
            return {f"k={k}": needed(order, sign * scores[part], k) for k in (10, 100)}

        for sign, word in ((1, "proponents"), (-1, "opponents")):
            for stored, scores in exact.items():
                found = [depths(tilt, slice(0, half), sign, scores) for tilt in TILTS]
                costs = [sum(np.log(at["0.99"]) for at in each.values()) for each in found]
                for tilt in (0.0, TILTS[int(np.argmin(costs))]):
                    row = {
                        "sketch": f"{name}, other half, tilt {tilt}",
                        "sign": word,
                        "rescored from": f"both, {stored}",
                    }
                    results.append(row | depths(tilt, slice(half, None), sign, scores))
                print(results[-1], flush=True)

    e, xe = chunks(dense, inside), inside(flat)
    note(f"all {e.shape[1]:,} coordinates", xe, e)
    fitting = e[: n // 2]
    torch.manual_seed(0)
    directions = torch.svd_lowrank(fitting, q=max(ks) + 10, niter=3)[2]
    order = torch.argsort(shares, descending=True, stable=True)
    for k in ks:
        note(f"PCA, k={k}", xe @ directions[:, :k], e @ directions[:, :k])
        note_tilted(f"PCA, k={k}", xe @ directions[:, :k], e @ directions[:, :k])
        note(f"per layer, k={k}", xe[:, order[:k]], e[:, order[:k]])
        turn = hadamard(e.shape[1], k, 0)
        note(f"Hadamard, k={k}", turn(xe), torch.cat([turn(part) for part in e.split(500)]))
    del e
    e, xe = chunks(dense, whole), whole(flat)
    directions = torch.svd_lowrank(e[: n // 2], q=max(ks) + 10, niter=3)[2]
    for k in ks:
        note(f"PCA with the complement, k={k}", xe @ directions[:, :k], e @ directions[:, :k])
    rows = [["sketch", "sign", "rescored from", "k=10: .95", ".99", "k=100: .95", ".99"]]
    for r in results:
        numbers = [str(r[f"k={k}"][t]) for k in (10, 100) for t in ("0.95", "0.99")]
        rows.append([r["sketch"], r["sign"], r["rescored from"], *numbers])
    table(rows)
    keep("sketch_choices", {"n": n, "queries": count, "results": results}, parsed)


if __name__ == "__main__":
    main()
