"""Question: what does a stored byte buy in attribution quality? LDS and agreement against bytes per example.

Indexes of the default, from 256 bytes to 16 kB, and of eigen_code="largest" are each built from the model: their
projections widen with the room of a row. Then projections of d = 32 and curvature are fitted once, and the same
gradients are stored in every way; dense projected gradients (LoGRA), in half precision and rounded to few bits, and the
published LoRIF are beside them. Agreement is the mean Spearman correlation with the scores of d = 32's unrounded,
unfactored gradients under the full inverse; what has other projections has none. Bytes are given without and with what
all examples share: bases and curvature, divided by their number.
"""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.agreement import correlations
from bench.environment import ROOT, arguments, keep, table
from bench.lds import lds, membership, summary
from bench.lds_truth import gather, make
from bench.methods import gathered, shaped, shared_bytes
from bench.tasks import TASKS, batches, size
from lorif_index import BuildConfig, CurvatureRows, Index
from lorif_index.codecs.bits import CodeLayout

Gradients = dict[str, torch.Tensor]
DEFAULT_BYTES = (256, 512, 1024, 1600, 2048, 4096, 8192, 16384)
LARGEST_BYTES = (128, 256, 512, 1024, 1600, 2048, 4096)
CASES: list[tuple[str, dict[str, Any]]] = [
    *(("eigen", {"eigen_bytes": b}) for b in (256, 512, 1024, 1600, 2048, 4096, 8192)),
    *(("coordinates", {"sketch_dim": k, "coordinate_bits": b}) for k in (256, 512, 1024) for b in (1, 2, 4)),
    ("coordinates", {"sketch_dim": 1024, "coordinate_bits": 8}),
    *(("factors", {"rank": c}) for c in (1, 2, 4, 8)),
    *(("both", {"rank": c, "sketch_dim": k}) for c in (1, 4) for k in (512, 1024)),
]


@cache
def rotation(width: int) -> torch.Tensor:
    """A random rotation, the same each time."""
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (width,), generator=generator).float() * 2 - 1
    return signs[:, None] * torch.linalg.qr(torch.randn(width, width, generator=generator)).Q


def rounded(g: torch.Tensor, bits: int) -> tuple[torch.Tensor, float]:
    """Rows in few bits with a scale each, as coordinates are stored (after a random rotation), and bytes a row."""
    layout, turn = CodeLayout(g.shape[1], bits), rotation(g.shape[1])
    return layout.decode(layout.encode(g @ turn)) @ turn.T, float(layout.row_bytes)


def dense(queries: Gradients, rows: Gradients, moment: Gradients, multiple: float) -> np.ndarray:
    total = 0.0
    for name, c in moment.items():
        h = c.double() + multiple * float(c.trace()) / len(c) * torch.eye(len(c), dtype=torch.float64)
        total = total + (torch.linalg.solve(h, queries[name].double().T).T.float() @ rows[name].T)
    return total.numpy()  # type: ignore[union-attr]


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for family in dict.fromkeys(r["family"] for r in rows):
        points = sorted((r["bytes"], r["lds"][0], r["lds"][1]) for r in rows if r["family"] == family)
        axes.errorbar(*np.array(points).T[:2], yerr=[p[2] for p in points], marker="o", ms=4, lw=1, label=family)
    axes.set(xscale="log", xlabel="bytes per example, without what all share", ylabel="LDS")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parsed = arguments(
        __doc__ or "",
        task={"default": "finetuned", "choices": ["finetuned", "scratch"]},
        multiple={"type": float, "default": 0.1},
    )
    task = TASKS[parsed.task](parsed.smoke)
    if parsed.smoke:
        make(task, smoke=True)
    truth, members = gather(task, parsed.smoke).mean(axis=0), membership(task)
    model = task.full(0, parsed.smoke)
    n = task.count
    rows: list[dict[str, Any]] = []
    reference: np.ndarray | None = None

    def note(family: str, what: str, scores: np.ndarray, each: float, shared: float) -> None:
        agreement = None if reference is None else round(float(correlations(scores, reference).mean()), 4)
        figures = {"lds": summary(lds(scores, members, truth)), "agreement": agreement}
        rows.append({"family": family, "what": what, "bytes": each, "with_shared": each + shared / n, **figures})
        print(rows[-1], flush=True)

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for code, family, rooms in (
            ("levels", "library default", DEFAULT_BYTES),
            ("largest", "library, largest of groups", LARGEST_BYTES),
        ):
            for room in rooms[:2] if parsed.smoke else rooms:
                config = BuildConfig(eigen_bytes=room, eigen_code=code, coarse=None)
                index = Index.build(
                    folder / f"{code}-{room}", model=model, data=task.data, config=config, progress=False
                )
                scores = index.scores(task.queries)
                note(family, f"eigen_bytes={room}", scores, index.bytes_per_example, shared_bytes(index))
        config = BuildConfig(
            curvature_rank=None, store="factors", coarse=None, projection_dim=8 if parsed.smoke else "auto"
        )
        fitted = Index.build(folder / "fit", model=model, data=task.data, config=config, progress=False)
        data, asked = (gathered(model, batches(part), config, fitted) for part in (task.data, task.queries))
        roots = {name: (layer.basis * layer.eigenvalues.float().sqrt()).T for name, layer in fitted.curvature.items()}
        moment = {name: root.T @ root for name, root in roots.items()}
        reference = dense(asked, data, moment, parsed.multiple)
        wide = sum(g.shape[1] for g in data.values())
        square = sum(4.0 * g.shape[1] ** 2 for g in data.values())
        note("dense, library's fit", "half precision", reference, 2.0 * wide, square)
        plain = BuildConfig(projection="random", projection_dim=config.projection_dim, coarse=None)
        g, q = (gathered(model, batches(part), plain) for part in (task.data, task.queries))
        empirical = {name: v.T @ v / n for name, v in g.items()}
        note("LoGRA", "half precision", dense(q, g, empirical, parsed.multiple), 2.0 * wide, square)
        for bits in (8, 4, 2, 1):
            pieces = {name: rounded(v, bits) for name, v in g.items()}
            scores = dense(q, {name: p[0] for name, p in pieces.items()}, empirical, parsed.multiple)
            note("LoGRA", f"{bits} bits", scores, sum(p[1] for p in pieces.values()), square)

        def stored(
            family: str, what: str, gradients: Gradients, query: Gradients, config: BuildConfig, **how: Any
        ) -> None:
            """An index of gradients, and its figures at its own damping."""
            rows_of = list(batches(shaped(gradients, fitted.specs), 512))
            path = folder / f"row-{len(rows)}"
            index = Index.build(path, gradients=rows_of, config=config, progress=False, **how)
            scores = index.scores(shaped(query, fitted.specs))
            note(family, what, scores, index.bytes_per_example, shared_bytes(index))

        # All layers have as many rows, or they are refused: a direction each, which add up to the moment.
        count = len(next(iter(roots.values())))
        curvature = CurvatureRows([shaped(roots, fitted.specs)], rows_per_example=count)
        for store, settings in CASES[:3] if parsed.smoke else CASES:
            chosen = BuildConfig(store=store, coarse=None, curvature_sample=n, damping=parsed.multiple, **settings)
            what = ", ".join(f"{k}={v}" for k, v in settings.items())
            stored(f"{store}, d = 32", what, data, asked, chosen, curvature=curvature)
        for rank in () if parsed.smoke else (1, 2, 4, 8):
            stored(
                "LoRIF as published", f"c={rank}", g, q, BuildConfig.paper(projection_dim=None, rank=rank, coarse=None)
            )
    lines = [["stored", "bytes", "with shared", "LDS", "agreement"]]
    for r in rows:
        what = f"{r['family']}: {r['what']}"
        lines.append(
            [
                what,
                f"{r['bytes']:,.0f}",
                f"{r['with_shared']:,.0f}",
                "{:.3f} ± {:.3f}".format(*r["lds"]),
                "" if r["agreement"] is None else f"{r['agreement']:.3f}",
            ]
        )
    table(lines)
    keep("frontier", {"task": task.name, "examples": n, "queries": size(task.queries), "rows": rows}, parsed)
    if not parsed.smoke:
        plot(rows, ROOT / "docs" / "frontier.svg")


if __name__ == "__main__":
    main()
