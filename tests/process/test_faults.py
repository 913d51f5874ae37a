"""An index survives its writers' deaths, failing disks, flipped bits and forged files, and readers see whole versions:
the benchmark's trials in small numbers, and lives of random operations against a model of dense float64 matrices."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import dense_inverse
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from bench.faults_cases import Calls, PowerCut
from lorif_index import BuildConfig, Index
from lorif_index.errors import NotAnIndexError
from lorif_index.search.coarse import faiss_is_installed

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def trials(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The benchmark's tiny run, in a process of its own: it forks, which wants no other threads."""
    if not faiss_is_installed():
        pytest.skip("needs faiss")
    kept = tmp_path_factory.mktemp("faults") / "faults.json"
    command = [sys.executable, "-m", "bench.faults", "--smoke", "--json", str(kept)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert kept.exists(), done.stdout + done.stderr
    return dict(json.loads(kept.read_text())["parts"])


@pytest.mark.parametrize("part", ["kill", "inject", "flip", "fuzz", "readers"])
def test_nothing_is_lost_or_wrong(trials: dict[str, Any], part: str) -> None:
    assert trials[part]["wrong"] == []


def test_the_trials_did_what_they_say(trials: dict[str, Any]) -> None:
    assert trials["kill"]["outcomes"]["killed"] >= 12 and set(trials["kill"]["by_operation"]) == {
        "build", "add", "remove", "compact", "refit",
    }  # fmt: skip
    assert {"fsync", "pwrite", "open"} <= set(trials["inject"]["by_call"])
    assert trials["inject"]["outcomes"]["OSError"] and trials["inject"]["outcomes"]["ended"]
    assert trials["flip"]["outcomes"]["verify refused"] == trials["flip"]["flips"] >= 40
    assert trials["fuzz"]["outcomes"]["refused"] > 0
    assert trials["readers"]["answers"] > 4 and trials["readers"]["versions_read"] > 1
    assert trials["cost"]["ratios"]["build"] > 0


# -- random lives ----------------------------------------------------------------------------------------------------

SIZES = {"a": (4, 3), "b": (2, 3)}
WIDTH = 18


def blocks(rows: np.ndarray) -> list[dict[str, torch.Tensor]]:
    part = torch.from_numpy(rows.astype(np.float32))
    return [{"a": part[:, :12].reshape(-1, 4, 3), "b": part[:, 12:].reshape(-1, 2, 3)}]


class Life(RuleBasedStateMachine):
    """An index of whole gradients in float32, and a dictionary of its rows."""

    def __init__(self) -> None:
        super().__init__()
        self._place = tempfile.TemporaryDirectory()
        self.folder = Path(self._place.name) / "i"
        self.rows: dict[int, np.ndarray] = {}
        self.next_id = 0
        self.random = np.random.default_rng(0)

    def teardown(self) -> None:
        self.index.close()
        self._place.cleanup()

    def _new(self, count: int) -> np.ndarray:
        return self.random.standard_normal((count, WIDTH)) * np.linspace(2, 0.3, WIDTH)

    @initialize(seed=st.integers(0, 2**16), count=st.integers(3, 30), crash=st.none() | st.integers(0, 60))
    def build(self, seed: int, count: int, crash: int | None) -> None:
        self.random = np.random.default_rng(seed)
        given = self._new(count)
        config = BuildConfig(
            store="factors", rank=None, dtype="float32", coarse=None, curvature_rank=None, compute={"shard_bytes": 400},
            projection="random", projection_dim=None, damping=0.1,
        )  # fmt: skip

        def make() -> None:
            Index.build(self.folder, gradients=blocks(given), config=config, payloads=list(range(count))).close()

        if crash is not None and self._cut(make, crash) and not (self.folder / "manifest.json").exists():
            with pytest.raises(NotAnIndexError):
                Index.open(self.folder)
        if not (self.folder / "manifest.json").exists():
            make()
        self.index = Index.open(self.folder)
        self.rows = dict(enumerate(given))
        self.next_id = count

    def _cut(self, work: Any, at: int) -> bool:
        """Does some work until a call that changes the file system, after which nothing is written; whether so far."""
        try:
            with Calls(at, "cut").installed():
                work()
        except PowerCut:
            return True
        return False

    def _change(self, work: Any, crash: int | None) -> bool:
        """Does it, or dies in it and opens what is there; whether it was committed."""
        before = self.index.generation
        if crash is None:
            work()
        elif self._cut(work, crash):
            self.index.close()
            self.index = Index.open(self.folder)
        return self.index.generation != before

    crashes = st.none() | st.integers(0, 70)

    @rule(count=st.integers(1, 12), crash=crashes)
    def add(self, count: int, crash: int | None) -> None:
        given = self._new(count)
        first = self.next_id
        payloads = list(range(first, first + count))
        if self._change(lambda: self.index.add(gradients=blocks(given), payloads=payloads), crash):
            self.rows |= dict(enumerate(given, first))
            self.next_id += count

    @precondition(lambda self: len(self.rows) > 2)
    @rule(data=st.data(), crash=crashes)
    def remove(self, data: Any, crash: int | None) -> None:
        ids = sorted(self.rows)
        gone = data.draw(st.lists(st.sampled_from(ids), min_size=1, max_size=len(ids) // 2, unique=True))
        if self._change(lambda: self.index.remove(gone), crash):
            self.rows = {i: row for i, row in self.rows.items() if i not in gone}

    @rule(crash=crashes)
    def compact(self, crash: int | None) -> None:
        self._change(lambda: self.index.compact(), crash)

    @rule(crash=crashes)
    def refit(self, crash: int | None) -> None:
        if self._change(lambda: self.index.refit(), crash):
            # The curvature is that of what is there.
            rows = np.stack([self.rows[i] for i in sorted(self.rows)])
            for name, part in (("a", rows[:, :12]), ("b", rows[:, 12:])):
                trace = float((part**2).sum(axis=1).mean())
                assert self.index.curvature[name].trace == pytest.approx(trace, rel=1e-4)

    @rule()
    def reopen(self) -> None:
        self.index.close()
        self.index = Index.open(self.folder)

    @rule(k=st.integers(1, 8), seed=st.integers(0, 99))
    def search(self, k: int, seed: int) -> None:
        asked = np.random.default_rng(seed).standard_normal((2, WIDTH))
        ids = np.array(sorted(self.rows))
        expected = self._dense(asked) @ np.stack([self.rows[int(i)] for i in ids]).T
        scale = np.abs(expected).max()
        np.testing.assert_allclose(self.index.scores(blocks(asked)[0]), expected, rtol=0, atol=2e-4 * scale)
        hits = self.index.search(blocks(asked)[0], k=k)
        assert hits.ids.shape == (2, min(k, len(ids)))
        np.testing.assert_allclose(hits.scores, -np.sort(-expected, axis=1)[:, :k], rtol=0, atol=2e-4 * scale)
        assert hits.payloads == hits.ids.tolist()

    def _dense(self, asked: np.ndarray) -> np.ndarray:
        """H^-1 of questions, by dense float64 matrices."""
        out, at = np.empty_like(asked), 0
        for name, (d_in, d_out) in SIZES.items():
            dim, layer = d_in * d_out, self.index.curvature[name]
            out[:, at : at + dim] = asked[:, at : at + dim] @ dense_inverse(layer, 0.1 * layer.trace / dim)
            at += dim
        return out

    @invariant()
    def what_is_there_is_what_was_put_there(self) -> None:
        if not self.rows:
            return
        assert self.index.ids.tolist() == sorted(self.rows)
        assert self.index.payloads() == sorted(self.rows)
        found = self.index.gradients(self.index.ids)
        for name, part in (("a", slice(0, 12)), ("b", slice(12, 18))):
            stored = found[name].flatten(1).numpy()
            kept = np.stack([self.rows[i] for i in sorted(self.rows)])[:, part].astype(np.float32)
            np.testing.assert_allclose(stored, kept, rtol=1e-5, atol=1e-6)
        self.index.verify()


_SETTINGS: dict[str, Any] = {
    "deadline": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
    "database": None,
    "print_blob": True,
}


def test_random_lives() -> None:
    from hypothesis.stateful import run_state_machine_as_test

    run_state_machine_as_test(Life, settings=settings(max_examples=15, stateful_step_count=12, **_SETTINGS))


@pytest.mark.slow
def test_a_thousand_random_lives() -> None:
    from hypothesis.stateful import run_state_machine_as_test

    run_state_machine_as_test(Life, settings=settings(max_examples=1000, stateful_step_count=20, **_SETTINGS))
