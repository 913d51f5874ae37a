"""Every benchmark runs, in a tiny size, and keeps a result that can be read."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forked import run_module

ROOT = Path(__file__).parents[2]


BENCHES = (
    "build_cost explain_cost scan_cost sample_size search_at_scale fidelity coarse_choices sketch_choices "
    "lds curvature_choices levers tail_patch frontier ensembles mislabelled duplicates other_libraries "
    "estimate_accuracy scaling import_cost"
).split()


def smoke(kept: Path, *command: str) -> tuple[dict[str, Any], str]:
    """What a benchmark keeps and prints in its tiny size."""
    pytest.importorskip("transformers")
    code, printed = run_module([*command, "--smoke", "--json", str(kept)], ROOT, kept.with_suffix(".txt"))
    assert code == 0, printed
    return json.loads(kept.read_text()), printed


@pytest.mark.parametrize("name", BENCHES)
def test_smoke(name: str, tmp_path: Path) -> None:
    result, printed = smoke(tmp_path / "result.json", f"bench.{name}")
    assert result["bench"] == name and result["environment"]["torch"]
    assert len(printed.splitlines()) > 4


def test_the_gpu_benchmark_runs_on_a_cpu(tmp_path: Path) -> None:
    """Every part of it is executed; where there is a GPU to measure, the command does so without --device."""
    result, printed = smoke(tmp_path / "result.json", "bench.gpu", "--device", "cpu")
    assert result["bench"] == "gpu" and result["device"] == "cpu"
    assert {"agreement", "capture", "curvature", "search", "scan"} <= result.keys()
    assert result["agreement"]["factors"] == pytest.approx({"difference": 0, "correlation": 1, "scored there": 0})
    assert all(rate > 0 for rate in result["scan"]["bytes_a_second"].values()) and "ms a query" in printed
    if not torch.cuda.is_available():
        line = [sys.executable, "-m", "bench.gpu"]
        done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 2 and "no GPU" in done.stdout


def test_plots_are_the_same_from_the_same_results(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    pictures = []
    for name in ("a.svg", "b.svg"):
        line = [sys.executable, "-m", "bench.plots", "--out", str(tmp_path / name)]
        done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        pictures.append((tmp_path / name).read_bytes())
    assert pictures[0] == pictures[1] and b"<svg" in pictures[0]


def test_a_metric_of_the_damping_is_the_dense_one() -> None:
    pytest.importorskip("transformers")
    from bench.levers import diagonal, under
    from lorif_index.capture.gradients import LayerSpec
    from lorif_index.linalg.projection import Projections, projection_matrix

    generator = np.random.default_rng(0)
    spec = LayerSpec("a", 7, 6, 3, 2, 1)
    weights = generator.uniform(0.1, 2.0, (7, 6))
    both = np.kron(*(projection_matrix(0, "a", s, w, d).numpy() for s, w, d in (("in", 7, 3), ("out", 6, 2))))
    metric = diagonal(torch.from_numpy(weights), spec, Projections({"a": spec}, 0))
    assert np.allclose(metric, both.T @ np.diag(weights.flatten()) @ both, atol=1e-6)
    rows, q, r = (generator.standard_normal((n, 6)) for n in (9, 4, 3))
    moment = rows.T @ rows
    found = under(*({"a": torch.from_numpy(m)} for m in (moment, q, r)), {"a": metric})["a"][0.3]
    damped = moment + 0.3 * np.trace(moment) / np.trace(metric) * metric.numpy()
    assert np.allclose(found, q @ np.linalg.solve(damped, r.T), rtol=1e-4)


def test_eigencodes_at_scale(tmp_path: Path) -> None:
    result, _ = smoke(tmp_path / "result.json", "bench.search_at_scale", "--eigen")
    assert [e["rank"] for e in result["indexes"]] == ["levels", "levels"]


def test_results_that_are_kept_say_where_they_come_from() -> None:
    for path in (ROOT / "bench" / "results").glob("*.json"):
        environment = json.loads(path.read_text())["environment"]
        assert len(environment["commit"]) == 40 and environment["command"].startswith("python -m bench."), path.name


def test_windows_of_books_that_tell_stories_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    from bench import scripture, tasks

    generator = np.random.default_rng(0)

    def text(book: str) -> dict[str, str]:
        letter = "a" if book in scripture.BOOKS else "b"
        rows = generator.integers(0, 50, (40, 70))
        return {f"{book}{i + 1}:1": " ".join(f"{letter}{w}," for w in row) for i, row in enumerate(rows)}

    monkeypatch.setattr(scripture, "verses", lambda: text("Ge") | text("1Chr") | text("Acts"))
    base, train, queries = tasks.chapters(100, 20)
    assert base.shape == (40 * 140 // 64, 64)
    assert (len(train["input_ids"]), len(queries["input_ids"])) == (100, 20)
    asked, learnt, before = (set(map(tuple, ids.tolist())) for ids in (queries["input_ids"], train["input_ids"], base))
    assert len(asked) == 20 and len(learnt) == 100 and not asked & learnt
    comma = next(iter(set.intersection(*map(set, before))))
    assert set().union(*before) & set().union(*learnt, *asked) == {comma}
