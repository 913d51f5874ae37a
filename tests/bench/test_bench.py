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


# command -> name of the result that it keeps, where that is another.
BENCHES = {
    "lds": "",
    "frontier": "",
    "tail_patch": "",
    "mislabelled": "",
    "duplicates": "",
    "other_libraries": "",
    "search_at_scale": "",
    "scan_cost": "",
    "costs build": "build_cost",
    "costs explain": "explain_cost",
    "costs import": "import_cost",
    "costs estimate": "estimate_accuracy",
}


def smoke(kept: Path, *command: str) -> tuple[dict[str, Any], str]:
    """What a benchmark keeps and prints in its tiny size."""
    pytest.importorskip("transformers")
    code, printed = run_module([*command, "--smoke", "--json", str(kept)], ROOT, kept.with_suffix(".txt"))
    assert code == 0, printed
    return json.loads(kept.read_text()), printed


@pytest.mark.parametrize("command", BENCHES)
def test_smoke(command: str, tmp_path: Path) -> None:
    name, *words = command.split()
    result, printed = smoke(tmp_path / "result.json", f"bench.{name}", *words)
    assert result["bench"] == (BENCHES[command] or name) and result["environment"]["torch"]
    assert len(printed.splitlines()) > 4


def test_ranks_send_what_was_said(tmp_path: Path) -> None:
    """Two real ranks, in every stage whose messages are more than words."""
    result, _ = smoke(tmp_path / "result.json", "bench.scaling")
    assert set(result["efficiency"]) == {"capture", "scan, 1 questions", "scan, 32 questions"}
    sent = result["messages"]["sent"]
    assert {stage for stage, part in sent.items() if part["compared"]} == {
        "curvature", "sketch", "coarse", "calibration", "queries",
    }  # fmt: skip
    for stage, part in sent.items():
        # How deep calibration's searches go lies in the data.
        most = 1.6 if stage == "calibration" else 1.02
        assert not part["compared"] or 0.98 <= part["said"] / part["taken"] <= most, (stage, part)
    disk = result["messages"]["disk"]
    assert disk["said"] == pytest.approx(disk["taken"], rel=0.2)


def test_the_gpu_benchmark_runs_on_a_cpu(tmp_path: Path) -> None:
    """Every part of it is executed; where there is a GPU to measure, the command does so without --device."""
    result, printed = smoke(tmp_path / "result.json", "bench.gpu", "--device", "cpu")
    assert result["bench"] == "gpu" and result["device"] == "cpu"
    assert {"agreement", "asking", "capture", "curvature", "search", "scan"} <= result.keys()
    assert result["agreement"]["factors"] == pytest.approx({"difference": 0, "correlation": 1, "scored there": 0})
    for way in ("levels", "largest"):
        assert all(rate > 0 for rate in result["scan"][way]["bytes_a_second"].values()) and "ms a query" in printed
        seen = result["asking"][way]["scores"]
        assert set(seen) == {"rows", "whole gradients", "refined", "refined, whole gradients"}
        assert all(part == pytest.approx({"difference": 0, "correlation": 1}) for part in seen.values())
    if not torch.cuda.is_available():
        line = [sys.executable, "-m", "bench.gpu"]
        done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 2 and "no GPU" in done.stdout


def test_plots_are_the_same_from_the_same_results(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for folder in ("a", "b"):
        code, printed = run_module(["bench.plots", "--out", str(tmp_path / folder)], ROOT, tmp_path / f"{folder}.txt")
        assert code == 0, printed
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == ["frontier.svg", "quality.svg", "search_at_scale.svg"]
    for name in names:
        one, other = ((tmp_path / folder / name).read_bytes() for folder in ("a", "b"))
        assert one == other and b"<svg" in one


def test_results_that_are_kept_say_where_they_come_from() -> None:
    for path in (ROOT / "bench" / "results").glob("*.json"):
        environment = json.loads(path.read_text())["environment"]
        assert len(environment["commit"]) == 40 and environment["command"].startswith("python -m bench."), path.name


def test_windows_of_books_that_tell_stories_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    from bench import corpus, tasks

    generator = np.random.default_rng(0)

    def text(book: str) -> dict[str, str]:
        letter = "a" if book in corpus.BOOKS else "b"
        rows = generator.integers(0, 50, (40, 70))
        return {f"{book}{i + 1}:1": " ".join(f"{letter}{w}," for w in row) for i, row in enumerate(rows)}

    monkeypatch.setattr(corpus, "verses", lambda: text("Ge") | text("1Chr") | text("Acts"))
    base, train, queries = tasks.chapters(100, 20)
    assert base.shape == (40 * 140 // 64, 64)
    assert (len(train["input_ids"]), len(queries["input_ids"])) == (100, 20)
    asked, learnt, before = (set(map(tuple, ids.tolist())) for ids in (queries["input_ids"], train["input_ids"], base))
    assert len(asked) == 20 and len(learnt) == 100 and not asked & learnt
    comma = next(iter(set.intersection(*map(set, before))))
    assert set().union(*before) & set().union(*learnt, *asked) == {comma}
