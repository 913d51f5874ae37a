"""Every benchmark runs, in a tiny size, and keeps a result that can be read."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


BENCHES = (
    "build_cost scan_cost sample_size search_at_scale fidelity coarse_choices sketch_choices "
    "lds curvature_choices tail_patch frontier mislabelled duplicates"
).split()


@pytest.mark.parametrize("name", BENCHES)
def test_smoke(name: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    kept = tmp_path / "result.json"
    command = [sys.executable, "-m", f"bench.{name}", "--smoke", "--json", str(kept)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(kept.read_text())
    assert result["bench"] == name and result["environment"]["torch"]
    assert len(done.stdout.splitlines()) > 4


def test_eigencodes_at_scale(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    kept = tmp_path / "result.json"
    command = [sys.executable, "-m", "bench.search_at_scale", "--eigen", "--smoke", "--json", str(kept)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [e["rank"] for e in json.loads(kept.read_text())["indexes"]] == ["eigen", "eigen"]


def test_results_that_are_kept_say_where_they_come_from() -> None:
    for path in (ROOT / "bench" / "results").glob("*.json"):
        environment = json.loads(path.read_text())["environment"]
        assert len(environment["commit"]) == 40 and environment["command"].startswith("python -m bench."), path.name
