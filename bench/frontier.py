"""Question: what does a stored byte buy in attribution quality? LDS and agreement against bytes per example.

Indexes of the default, from 256 bytes to 32 kB, are each built from the model; so are indexes whose rows are all in
levels, and all of their largest coordinates, between which the default chooses. Then projections of d = 32, without a
language model's head, and curvature are fitted once, and the same gradients are stored as factors; dense projected
gradients (LoGRA), in half precision and rounded to few bits, and the published LoRIF are beside them. Agreement is the
mean Spearman correlation with the scores of d = 32's unrounded, unfactored gradients under the full inverse; what has
other projections has none. Bytes are given without and with what all examples share: bases and curvature, divided by
their number. `bench.plots` draws it.
"""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.environment import arguments, keep, plus_minus, table
from bench.lds import correlations, lds, summary, trial
from bench.methods import NO_HEAD, WAYS, gathered, only, shaped, shared_bytes
from bench.tasks import batches, size
from lorif_index import BuildConfig, CurvatureRows, Index
from lorif_index.codecs.bits import CodeLayout
from lorif_index.errors import CurvatureError

Gradients = dict[str, torch.Tensor]
SIZES = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
RANKS = (1, 2, 4, 8)


@cache
def rotation(width: int) -> torch.Tensor:
    """A random rotation, the same each time."""
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (width,), generator=generator).float() * 2 - 1
    return signs[:, None] * torch.linalg.qr(torch.randn(width, width, generator=generator)).Q


def rounded(g: torch.Tensor, bits: int) -> tuple[torch.Tensor, float]:
    """Rows in few bits with a scale each, after a random rotation, and bytes a row."""
    layout, turn = CodeLayout(g.shape[1], bits, (g.shape[1],)), rotation(g.shape[1])
    return layout.decode(layout.encode(g @ turn)) @ turn.T, float(layout.row_bytes)


def dense(queries: Gradients, rows: Gradients, moment: Gradients, multiple: float) -> np.ndarray:
    """(q, n) scores under the full inverse of each layer's second moment."""
    parts = []
    for name, c in moment.items():
        h = c.double() + multiple * float(c.trace()) / len(c) * torch.eye(len(c), dtype=torch.float64)
        parts.append(torch.linalg.solve(h, queries[name].double().T).T.float() @ rows[name].T)
    return torch.stack(parts).sum(dim=0).numpy()


def main() -> None:
    parsed = arguments(
        __doc__,
        task={"default": "finetuned", "choices": ["finetuned", "scratch"]},
        multiple={"type": float, "default": 0.1, "help": "of the mean eigenvalue, as damping"},
    )
    smoke, multiple = parsed.smoke, parsed.multiple
    task, losses, members = trial(parsed.task, smoke)
    truth, n = losses.mean(axis=0), task.count
    model = task.full(0, smoke)
    rows: list[dict[str, Any]] = []
    reference: np.ndarray | None = None

    def note(family: str, what: str, scores: np.ndarray, each: float, shared: float) -> None:
        agreement = None if reference is None else round(float(correlations(scores, reference).mean()), 4)
        figures = {"lds": summary(lds(scores, members, truth)), "agreement": agreement}
        rows.append({"family": family, "what": what, "bytes": each, "with_shared": each + shared / n, **figures})
        print(rows[-1], flush=True)

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)

        def stored(family: str, what: str, query: Any, config: BuildConfig, **given: Any) -> None:
            """An index, and its figures at its own damping."""
            index = Index.build(folder / f"row-{len(rows)}", config=config, progress=False, **given)
            note(family, what, index.scores(query), index.bytes_per_example, shared_bytes(index))

        for room in SIZES[1:2] if smoke else SIZES:
            config = BuildConfig(store="eigen", eigen_bytes=room, coarse=None)
            given = {"model": model, "data": task.data}
            stored("library default", f"eigen_bytes={room}", task.queries, config, **given)
            for way in WAYS:
                try:
                    with only(way):
                        stored(f"library, {way}", f"eigen_bytes={room}", task.queries, config, **given)
                except CurvatureError as error:
                    print(f"{way}, {room} bytes: {error}", flush=True)
        dim = 8 if smoke else 32
        config = BuildConfig(curvature_rank=None, store="factors", coarse=None, projection_dim=dim, layers=NO_HEAD)
        fitted = Index.build(folder / "fit", model=model, data=task.data, config=config, progress=False)
        data, asked = (gathered(model, batches(part), config, fitted) for part in (task.data, task.queries))
        # All directions are kept, so that these rows' second moment is the curvature.
        roots = {name: layer.sides.turned_back(layer.factor.T) for name, layer in fitted.curvature.items()}
        reference = dense(asked, data, {name: root.T @ root for name, root in roots.items()}, multiple)
        wide = sum(g.shape[1] for g in data.values())
        square = sum(4.0 * g.shape[1] ** 2 for g in data.values())
        note("dense, library's fit", "half precision", reference, 2.0 * wide, square)

        plain = BuildConfig(projection="random", projection_dim=dim, coarse=None, layers=NO_HEAD)
        g, q = (gathered(model, batches(part), plain) for part in (task.data, task.queries))
        empirical = {name: v.T @ v / n for name, v in g.items()}
        note("LoGRA", "half precision", dense(q, g, empirical, multiple), 2.0 * wide, square)
        for bits in (8, 4, 2, 1):
            pieces = {name: rounded(v, bits) for name, v in g.items()}
            scores = dense(q, {name: p[0] for name, p in pieces.items()}, empirical, multiple)
            note("LoGRA", f"{bits} bits", scores, sum(p[1] for p in pieces.values()), square)

        def of_gradients(gradients: Gradients) -> list[Gradients]:
            return list(batches(shaped(gradients, fitted.specs), 512))

        # All layers have as many rows, or they are refused: a direction each, which add up to the moment.
        curvature = CurvatureRows([shaped(roots, fitted.specs)], rows_per_example=len(next(iter(roots.values()))))
        query = shaped(asked, fitted.specs)
        for rank in RANKS[:1] if smoke else RANKS:
            config = BuildConfig(store="factors", rank=rank, coarse=None, sample=n, damping=multiple)
            given = {"gradients": of_gradients(data), "curvature": curvature}
            stored("factors, d = 32", f"c={rank}", query, config, **given)
        for rank in () if smoke else RANKS:
            config = BuildConfig.paper(projection_dim=None, rank=rank, coarse=None)
            stored("LoRIF as published", f"c={rank}", shaped(q, fitted.specs), config, gradients=of_gradients(g))
    lines = [["stored", "bytes", "with shared", "LDS", "agreement"]]
    for r in rows:
        agreement = "" if r["agreement"] is None else f"{r['agreement']:.3f}"
        sizes = [f"{r['bytes']:,.0f}", f"{r['with_shared']:,.0f}"]
        lines.append([f"{r['family']}: {r['what']}", *sizes, plus_minus(r["lds"]), agreement])
    table(lines)
    keep("frontier", {"task": task.name, "examples": n, "queries": size(task.queries), "rows": rows}, parsed)


if __name__ == "__main__":
    main()
