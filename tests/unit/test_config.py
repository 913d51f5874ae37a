"""A build's choices: what they take, what they refuse, and that JSON brings them back."""

from __future__ import annotations

import dataclasses
import json
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import nn

from lorif_index import (
    AbsoluteDamping,
    BuildConfig,
    CoarseIndex,
    Compute,
    CurvatureRows,
    LayerSelection,
    PaperDamping,
    RelativeDamping,
    RowDamping,
    Sample,
)
from lorif_index.codecs.registry import CODECS
from lorif_index.config import PARTS, stores
from lorif_index.damping import damping_from_json, settled
from lorif_index.errors import ConfigError

OTHER: dict[str, Any] = dict(
    projection_dim=Fraction(1, 3),
    projection_floor=7,
    projection="random",
    rank=None,
    curvature="empirical",
    curvature_rank=9,
    power_iterations=0,
    damping=PaperDamping(),
    complement="truncated",
    store="factors",
    eigen_bytes=77,
    dtype="bfloat16",
    seed=3,
    layers=LayerSelection(include=("a", "b*"), types=("Linear",), bias=False),
    batch_size=5,
    on_nonfinite="skip",
    sample=Sample(size=12, rows="stored", probes=3),
    coarse=CoarseIndex(kind="flat", dim=9, sketch="per-layer", queries=0),
    compute=Compute(device="cuda:1", autocast="bfloat16", shard_bytes=1000, spool_bytes=0),
)


def test_every_choice_comes_back_from_json() -> None:
    assert set(OTHER) == {f.name for f in dataclasses.fields(BuildConfig)}
    for config in (BuildConfig(), BuildConfig.paper(), BuildConfig(**OTHER), BuildConfig(damping=0.3, layers=["a"])):
        data = json.loads(json.dumps(config.to_json()))
        assert BuildConfig.from_json(data) == config
        assert {name: set(data[name]) for name in PARTS} == {
            "sample": {"size", "rows", "probes"},
            "coarse": {"kind", "dim", "sketch", "queries"},
            "compute": {"device", "autocast", "shard_bytes", "spool_bytes"},
        }
    different, plain = BuildConfig(**OTHER).to_json(), BuildConfig().to_json()
    assert all(different[name] != plain[name] for name in plain)
    assert BuildConfig.from_json({}) == BuildConfig()
    # Parts may be told in part, by a bare value, and any of them left out.
    assert BuildConfig.from_json({"sample": {"probes": 2}, "coarse": "flat", "compute": None}) == BuildConfig(
        sample=Sample(probes=2), coarse=CoarseIndex(kind="flat")
    )


def test_bare_values_stand_for_a_part() -> None:
    assert BuildConfig(sample=2000).sample == Sample(size=2000)
    assert BuildConfig(coarse="flat").coarse == CoarseIndex(kind="flat")
    assert BuildConfig(coarse=None).coarse == BuildConfig(coarse="none").coarse == CoarseIndex(kind="none")
    assert BuildConfig(compute="cuda").compute == Compute(device="cuda")
    cpu: Any = torch.device("cpu")
    assert BuildConfig(compute=cpu).compute == Compute(device=cpu) == Compute(device="cpu")
    assert BuildConfig(sample={"size": 5, "probes": 1}).sample == Sample(size=5, probes=1)
    assert BuildConfig(coarse={}).coarse == CoarseIndex() and BuildConfig(compute=None).compute == Compute()
    assert BuildConfig(damping=0.5).policy == RelativeDamping(0.5) == BuildConfig(damping=RelativeDamping(0.5)).damping


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"sample": 0}, "size must be an integer of at least 1, got 0"),
        ({"sample": None}, "size must be an integer of at least 1, got None"),
        ({"sample": "few"}, "size must be an integer of at least 1, got 'few'"),
        ({"sample": True}, "size must be an integer"),
        ({"sample": {"rows": "all"}}, r"rows must be one of \('sample', 'stored'\), got 'all'"),
        ({"sample": {"probes": 0}}, "probes must be an integer of at least 1, or None"),
        ({"sample": {"sizes": 3}}, r"unknown keys \['sizes'\] of sample: known are \['size', 'rows', 'probes'\]"),
        ({"coarse": "PQ64x4fs"}, r"kind must be one of \('auto', 'pq', 'flat', 'none'\), got 'PQ64x4fs'"),
        ({"coarse": {"dim": 0}}, "dim must be an integer of at least 1"),
        ({"coarse": {"sketch": "random"}}, "sketch must be one of"),
        ({"coarse": {"queries": -1}}, "queries must be an integer of at least 0"),
        ({"coarse": {"factory": "Flat"}}, r"unknown keys \['factory'\] of coarse"),
        ({"compute": {"autocast": "float32"}}, "autocast must be one of"),
        ({"compute": {"shard_bytes": 0}}, "shard_bytes must be an integer of at least 1"),
        ({"compute": {"spool_bytes": -1}}, "spool_bytes must be an integer of at least 0"),
        ({"compute": {"gpu": 1}}, r"unknown keys \['gpu'\] of compute"),
        ({"projection_dim": 0}, "projection_dim must be an int of at least 1"),
        ({"projection_dim": 1.0}, "projection_dim must be"),
        ({"projection_floor": "wide"}, "projection_floor must be an integer of at least 1"),
        ({"projection": "none"}, "projection must be one of"),
        ({"rank": 0}, "rank must be an integer of at least 1, or None"),
        ({"curvature_rank": "all"}, "curvature_rank must be an integer of at least 1, or None"),
        ({"curvature": "fisher"}, "curvature must be one of"),
        ({"power_iterations": -1}, "power_iterations must be an integer of at least 0"),
        ({"complement": "none"}, "complement must be one of"),
        ({"store": "both"}, "store must be one of"),
        ({"eigen_bytes": 0}, "eigen_bytes must be an integer of at least 5"),
        ({"dtype": "float64"}, "dtype must be one of"),
        ({"seed": 1.5}, "seed must be an integer"),
        ({"batch_size": 0}, "batch_size must be an integer of at least 1"),
        ({"on_nonfinite": "ignore"}, "on_nonfinite must be one of"),
        ({"damping": 0.0}, "above 0"),
        ({"layers": []}, "layers is empty"),
        ({"layers": 3}, "layers takes glob patterns"),
        ({"store": "eigen", "sample": Sample(rows="stored")}, "store='eigen' needs it before"),
        ({"store": "largest"}, r"store must be one of \('auto', 'eigen', 'factors'"),
        ({"eigen_bytes": "most"}, "eigen_bytes must be an integer of at least 5"),
        ({"complement": "log-mean"}, r"complement must be one of \('diagonal', 'truncated'\)"),
        ({"curvature": "ggn", "sample": Sample(rows="stored")}, "needs rows of its own"),
    ],
)
def test_what_cannot_be_is_refused_by_its_name(wrong: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        BuildConfig(**wrong)
    if not any(dataclasses.is_dataclass(value) for value in wrong.values()):
        with pytest.raises(ConfigError, match=told):
            BuildConfig.from_json(wrong)


def test_unknown_keys_of_json_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"unknown BuildConfig keys \['curvature_sample', 'sketch_dim'\]"):
        BuildConfig.from_json({"sketch_dim": 4, "curvature_sample": 10, "seed": 1})
    with pytest.raises(ConfigError, match="layers: .*includes"):
        BuildConfig.from_json({"layers": {"includes": ["a"]}})
    with pytest.raises(TypeError, match="probes"):
        BuildConfig(probes=3)  # type: ignore[call-arg]


def test_parts_are_frozen_and_are_given_by_name() -> None:
    for made in (Sample(), CoarseIndex(), Compute(), BuildConfig()):
        field = dataclasses.fields(made)[0].name
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(made, field, 1)
        with pytest.raises(TypeError, match="positional"):
            type(made)(1)
        assert type(made)() == made and hash(made.__class__)


def test_stores_are_the_codecs() -> None:
    assert stores() == ("auto", *CODECS)
    for name in stores():
        assert BuildConfig(store=name).store == name


def test_the_default_inverse() -> None:
    config = BuildConfig()
    assert config.damping == RowDamping() and config.complement == "diagonal"
    assert config.curvature_rank == config.eigen_bytes == config.projection_floor == "auto"
    assert config.layers.head and not config.layers.embeddings


def test_the_published_recipe() -> None:
    config = BuildConfig.paper()
    assert config.sample == Sample(rows="stored") and config.store == "factors" and config.damping == PaperDamping()
    assert config.complement == "truncated" and not config.layers.head
    assert config.projected_width(4800, from_model=True) == 300 and config.projected_width(20, from_model=True) == 1
    changed = BuildConfig.paper(rank=4, damping=0.1)
    assert changed.rank == 4 and changed.damping == RelativeDamping(0.1) and changed.curvature_rank == 2048


def test_widths_of_projections() -> None:
    auto = BuildConfig()
    # The floor, and never above the layer's own.
    assert auto.projected_width(4096, from_model=True) == 32 and auto.projected_width(4096, from_model=False) == 4096
    assert auto.projected_width(100, from_model=True) == 32 and auto.projected_width(20, from_model=True) == 20
    assert BuildConfig(projection_floor=50).projected_width(100, from_model=True) == 50
    # A fraction is never below it.
    part = BuildConfig(projection_dim=1 / 16)
    assert part.projected_width(4096, from_model=True) == 256 and part.projected_width(100, from_model=True) == 32
    for from_model in (True, False):
        assert BuildConfig(projection_dim=8).projected_width(100, from_model=from_model) == 8
        assert BuildConfig(projection_dim=8).projected_width(5, from_model=from_model) == 5
        assert BuildConfig(projection_dim=None).projected_width(100, from_model=from_model) == 100
        assert BuildConfig(projection_dim=0.5).projected_width(100, from_model=from_model) == 50
        assert BuildConfig(projection_dim=Fraction(1, 3)).projected_width(99, from_model=from_model) == 33


def test_layers_are_chosen_by_names_classes_or_a_selection() -> None:
    assert LayerSelection.of(None) == LayerSelection() == BuildConfig().layers
    assert LayerSelection.of("a*") == LayerSelection(include=("a*",)) == BuildConfig(layers="a*").layers
    assert LayerSelection.of(nn.Linear) == LayerSelection(types=("Linear",)) == LayerSelection(types=nn.Linear)  # type: ignore[arg-type]
    assert LayerSelection.of(["a", nn.Linear]) == LayerSelection(include=("a",), types=("Linear",))
    assert LayerSelection(include="a").include == ("a",)  # type: ignore[arg-type]
    for wrong in ({"include": [3]}, {"exclude": [""]}, {"adapters": "all"}):
        with pytest.raises(ConfigError, match="LayerSelection"):
            LayerSelection(**wrong)  # type: ignore[arg-type]


def test_dampings_come_back_from_json_and_the_rest_is_refused() -> None:
    for policy in (RelativeDamping(0.3), AbsoluteDamping(2.0), PaperDamping()):
        assert damping_from_json(json.loads(json.dumps(policy.to_json()))) == policy
    for data in ({"rule": "release"}, {}, {"rule": "relative", "multiple": -1}, {"rule": "relative", "more": 1}):
        with pytest.raises(ConfigError):
            damping_from_json(data)


def test_rows_per_example_is_a_count() -> None:
    for wrong in (0, -1, 1.5, True):
        with pytest.raises(ConfigError, match="rows_per_example"):
            CurvatureRows([], rows_per_example=wrong)  # type: ignore[arg-type]


def test_small_rows_have_more_damping() -> None:
    auto = BuildConfig().policy
    assert settled(auto, 4096) == RelativeDamping(0.03)
    assert settled(auto, 1024) == RelativeDamping(0.06) and settled(auto, 16384) == RelativeDamping(0.015)
    assert settled(RelativeDamping(0.2), 1024) == RelativeDamping(0.2)
    assert BuildConfig.from_json(BuildConfig().to_json()).damping == RowDamping()
