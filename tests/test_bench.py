"""Every benchmark runs, in a tiny size, and keeps a result that can be read."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent


BENCHES = (
    "build_cost explain_cost scan_cost sample_size search_at_scale fidelity coarse_choices sketch_choices "
    "lds curvature_choices tail_patch frontier ensembles mislabelled duplicates other_libraries "
    "estimate_accuracy"
).split()


def smoke(kept: Path, *command: str) -> tuple[dict[str, Any], str]:
    """What a benchmark keeps and prints in its tiny size."""
    pytest.importorskip("transformers")
    line = [sys.executable, "-m", *command, "--smoke", "--json", str(kept)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(kept.read_text()), done.stdout


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


def test_eigencodes_at_scale(tmp_path: Path) -> None:
    result, _ = smoke(tmp_path / "result.json", "bench.search_at_scale", "--eigen")
    assert [e["rank"] for e in result["indexes"]] == ["eigen", "eigen"]


def test_results_that_are_kept_say_where_they_come_from() -> None:
    for path in (ROOT / "bench" / "results").glob("*.json"):
        environment = json.loads(path.read_text())["environment"]
        assert len(environment["commit"]) == 40 and environment["command"].startswith("python -m bench."), path.name
