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
    "tail_patch": "",
    "removal": "",
    "selection": "",
    "mislabelled": "",
    "duplicates": "",
    "other_libraries": "",
    "search_at_scale": "",
    "scan_cost": "",
    "widths": "",
    "costs build": "build_cost",
    "costs explain": "explain_cost",
    "costs import": "import_cost",
    "costs layers": "layer_cost",
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


def test_what_is_left_out_leaves_all_else_in_place() -> None:
    pytest.importorskip("sklearn")
    from bench import tasks

    task, seen = tasks.digits(smoke=True), []

    def trained(without: list[int] | None) -> list[torch.Tensor]:
        model = task.begin(0)
        model.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
        task.fit(model, np.arange(task.count), 0, None if without is None else np.array(without, dtype=np.int64))
        batches, seen[:] = list(seen), []
        return batches

    whole, none, less = trained(None), trained([]), trained([3, 77])
    assert all(torch.equal(a, b) for a, b in zip(whole, none, strict=True))
    gone = task.data[0][[3, 77]]
    for a, b in zip(whole, less, strict=True):
        kept = ~(a[:, None] == gone[None]).all(dim=2).any(dim=1)
        assert torch.equal(a[kept], b)
    assert sum(len(a) - len(b) for a, b in zip(whole, less, strict=True)) == 2 * task.recipe.epochs


def test_a_rise_is_over_the_trainings_of_the_other_pools() -> None:
    from bench.removal import Plan, by_pool, differences, figure, rises

    plan = Plan(questions=6, seeds=2, pool={4: 2})
    pools = plan.pools(4, 9)
    assert [len(pool) for pool in pools] == [2, 2, 2] and len(set(np.concatenate(pools))) == 6
    generator = np.random.default_rng(0)
    always = np.tile(generator.normal(size=9), (2, 3, 1))
    mine = always.copy()
    for number, pool in enumerate(pools):
        mine[:, number, pool] += 0.5
    assert rises(mine, pools) == pytest.approx(0.5)
    assert rises(mine + 1.0, pools) == pytest.approx(0.5)  # What every pool's training lacks is no question's own.
    assert rises(mine + 1.0, pools, always) == pytest.approx(1.5)
    mine[1, 2] = np.nan
    found = rises(mine, pools)
    assert np.isnan(found[1, 4:]).all() and found[0] == pytest.approx(0.5)
    # Where one has not all trainings, the other's are those that both have.
    more = always + generator.normal(size=(2, 3, 9))
    less = np.where(np.isfinite(mine), more, np.nan)
    assert np.array_equal(differences(mine, more, pools), found - rises(less, pools), equal_nan=True)
    assert figure(found) == pytest.approx([0.5, 0.0]) and by_pool(found, pools) == pytest.approx(0.0)


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
