"""What a build will take, said before, against what it then takes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import small_data, small_model
from torch import nn

from lorif_index import BuildConfig, Estimate, Index
from lorif_index.build import candidates, estimate
from lorif_index.build.sizes import REMEDIES, Shapes, memory_of
from lorif_index.capture.gradients import LayerSpec
from lorif_index.codecs.registry import CODECS
from lorif_index.errors import ConfigError, DataError, StoreError

N = 2600


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 48), nn.Tanh(), nn.Linear(48, 10))


@pytest.fixture(scope="module")
def data() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(N, 40), torch.randint(0, 10, (N,))


@pytest.mark.parametrize(("store", "row_bytes"), [("factors", 100), ("eigen", 100), ("eigen", 41), ("eigen", "auto")])
def test_bytes_are_those_of_the_index(model: nn.Module, data: Any, tmp_path: Path, store: str, row_bytes: Any) -> None:
    settings: dict[str, Any] = {"store": store, "curvature": "empirical", "rank": 2, "coarse": {"queries": 16}}
    config = BuildConfig(**settings, eigen_bytes=row_bytes, projection_dim=16, projection_floor=1, sample=600)
    found = Index.estimate(model=model, data=data, config=config, payload_bytes=20.0)
    payloads = [{"number": i, "t": "abc"} for i in range(N)]
    index = Index.build(tmp_path / "i", model=model, data=data, config=config, payloads=payloads)
    assert found.codec == index.codec and found.examples == N
    assert found.bytes_per_example == pytest.approx(index.bytes_per_example, rel=0.05, abs=2)
    assert found.disk_total == pytest.approx(index.nbytes, rel=0.2)
    assert set(found.seconds) == {s for s in index.build_report["seconds"] if s not in ("compact",)}
    assert found.seconds_total > 0 and found.memory > 0


def test_choices_follow_the_budget(model: nn.Module, data: Any) -> None:
    config = BuildConfig(coarse={"queries": 8})
    free = Index.estimate(model=model, data=data, config=config, batches=1, examples=5000)
    assert all(choice.fits for choice in free.choices)
    room = free.choices[len(free.choices) // 2].disk
    found = Index.estimate(model=model, data=data, config=config, batches=1, disk=room, examples=5000)
    assert isinstance(found, Estimate) and found.examples == 5000
    assert [c.disk for c in found.choices] == sorted(c.disk for c in found.choices)
    assert all(choice.fits == (choice.disk <= room) for choice in found.choices)
    assert {True, False} == {choice.fits for choice in found.choices}
    assert found.to_json()["disk_total"] == found.disk_total


def test_gradients_are_estimated_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    blocks = [{"a": torch.randn(64, 12, 10)} for _ in range(20)]
    config = BuildConfig(store="factors", curvature_rank=20, coarse={"queries": 8})
    found = Index.estimate(gradients=blocks, config=config)
    index = Index.build(tmp_path / "i", gradients=blocks, config=config)
    assert found.disk_total == pytest.approx(index.nbytes, rel=0.2)
    assert found.bytes_per_example == index.bytes_per_example
    assert Index.estimate(gradients=iter(blocks), config=config).examples == 1280


def test_it_takes_few_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(300, 200), nn.Tanh(), nn.Linear(200, 40))
    passes = {"forward": 0, "backward": 0}
    backward = torch.Tensor.backward

    def counted(*given: Any, **more: Any) -> None:
        passes["backward"] += 1
        backward(*given, **more)

    model.register_forward_pre_hook(lambda *_: passes.update(forward=passes["forward"] + 1))
    monkeypatch.setattr(torch.Tensor, "backward", counted)
    config = BuildConfig(sample={"probes": 1}, coarse={"queries": 8})
    Index.estimate(model=model, data=(torch.randn(16, 300), torch.randint(0, 40, (16,))), config=config)
    # The width's choice, gradients (checked, too: twice backward), probes, projections; the head's form forward alone.
    assert passes["forward"] <= 5 and passes["backward"] <= 5


def test_few_layers_stand_for_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "_NUMBERS", 600)
    blocks = [{"words": torch.randn(16, 100, 60)} | {f"l{i}": torch.randn(16, 15, 20) for i in range(8)}]
    seen = estimate._Handful(None, None, blocks, None, BuildConfig(store="eigen"), 1, None, Path())
    assert list(estimate._some_layers(seen.specs)) == ["l0", "l1"]
    # Each of all layers would have as many directions as it has numbers.
    assert estimate._rank(seen, seen.specs) == "auto" and estimate._rank(seen, {"l0": seen.specs["l0"]}) == 300
    found = Index.estimate(gradients=blocks, config=seen.config, examples=2000)
    assert {"curvature", "codec", "encode", "sketch", "coarse", "calibration"} <= found.seconds.keys()
    assert all(seconds >= 0 for seconds in found.seconds.values()) and found.seconds["curvature"] > 0


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({}, DataError),
        ({"gradients": []}, DataError),
        ({"gradients": [{"a": torch.zeros(2, 3, 3)}], "disk": 0}, ConfigError),
    ],
)
def test_bad_questions(arguments: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        Index.estimate(**arguments)


def test_a_build_that_memory_cannot_hold_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = small_model(), small_data(40)
    config = BuildConfig(coarse="flat")
    with monkeypatch.context() as patched:
        patched.setattr("lorif_index.build.pipeline.memory_of", lambda device: 100_000)
        with pytest.raises(ConfigError, match=r"stage '\w+' would take [\d,]+ bytes .* there are 100,000: pass "):
            Index.build(tmp_path / "i", model=model, data=data, config=config)
        assert not (tmp_path / "i").exists()
    # Every stage has its setting; and there is memory.
    sizes = Shapes(BuildConfig(coarse="flat", projection_floor=32), {"a": LayerSpec("a", 64, 64, 32, 32, 1)}, "eigen")
    assert set(sizes.memory(10)) == set(REMEDIES)
    assert memory_of(torch.device("cpu")) > 100_000_000


def test_a_build_that_the_disk_cannot_hold_is_refused_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2000))
    blocks = [{"a": torch.randn(64, 12, 10)} for _ in range(4)]
    stages: list[str] = []
    with pytest.raises(StoreError, match=r"will take [\d,]+ bytes .* has 2,000 free"):
        Index.build(tmp_path / "i", gradients=blocks, progress=lambda event: stages.append(event.stage))
    assert "encode" not in stages and "curvature" not in stages


def test_more_rows_take_more() -> None:
    specs = {"a": LayerSpec("a", 64, 64, 32, 32, 1)}
    for codec in CODECS:
        one, two = (Shapes(BuildConfig(projection_floor=32), specs, codec).disk(n) for n in (10**6, 2 * 10**6))
        assert one.total < two.total < 2 * one.total and one.row == two.row


def test_a_coarse_index_is_estimated_where_a_build_makes_one(
    model: nn.Module, data: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The miniatures are too small for one by default."""
    monkeypatch.setattr(candidates, "COARSE_FROM", 10_001)
    config, stages = BuildConfig(coarse={"queries": 8}), {"sketch", "coarse", "calibration"}
    few = Index.estimate(model=model, data=data, config=config, batches=1, examples=10_000)
    many = Index.estimate(model=model, data=data, config=config, batches=1, examples=10_001)
    assert not stages & set(few.seconds) and stages <= set(many.seconds)
    assert few.disk["coarse"] == 0 < many.disk["coarse"]
