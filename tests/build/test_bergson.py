"""Bergson: stores that Bergson 2.5.1 wrote are read as the gradients that autograd gives, indexed and asked.

`tests/golden/bergson` has five stores of twelve texts (`rows.json`) under a GPT-2 8 wide (`model`), as `bergson.build`
wrote them: whole gradients with biases, projected ones (projection_dim=4), those of single tokens, whole ones in
bfloat16, and one projection of all layers.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import autograd, dense_inverse

from lorif_index import BuildConfig, Index
from lorif_index.bergson import BergsonStore
from lorif_index.errors import DataError

GOLDEN = Path(__file__).parent.parent / "golden" / "bergson"
COUNT = 12


@pytest.fixture(scope="module")
def model() -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.GPT2LMHeadModel.from_pretrained(GOLDEN / "model").eval()


def texts() -> list[list[int]]:
    return json.loads((GOLDEN / "rows.json").read_text())


def expected(model: Any, layer: str) -> np.ndarray:
    """(n, inputs + 1, outputs) by autograd, one text at a time."""
    items = [{"input_ids": torch.tensor(row), "labels": torch.tensor(row)} for row in texts()]
    return np.stack([autograd(model, item, f"transformer.{layer}") for item in items])


def together(store: BergsonStore) -> dict[str, np.ndarray]:
    blocks = list(store)
    return {name: torch.cat([block[name] for block in blocks]).numpy() for name in store.shapes}


@pytest.mark.parametrize(("run", "tolerance"), [("whole", 1e-5), ("tokens", 1e-5), ("half", 0.05)])
def test_gradients_are_autograds(run: str, tolerance: float, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    store = BergsonStore(GOLDEN / run, model)
    found = together(store)
    assert len(store) == COUNT
    assert list(found) == ["h.0.attn.c_attn", "h.0.attn.c_proj", "h.0.mlp.c_fc", "h.0.mlp.c_proj"]
    for name, rows in found.items():
        wanted = expected(model, name)
        wanted = wanted if run == "whole" else wanted[:, :-1]
        assert rows.shape == wanted.shape
        assert np.abs(rows - wanted).max() <= tolerance * np.abs(wanted).max(), name
    # A few examples at a time, in any order.
    some = store.gradients([7, 2])
    assert all(np.array_equal(some[name].numpy(), rows[[7, 2]]) for name, rows in found.items())
    monkeypatch.setattr("lorif_index.bergson.store._READ_BYTES", 8_000)
    small = BergsonStore(GOLDEN / run, model)
    assert len(list(small)) > 1
    assert all(np.array_equal(part, found[name]) for name, part in together(small).items())


def test_projected_gradients_are_indexed_and_asked(tmp_path: Path) -> None:
    store = BergsonStore(GOLDEN / "projected")
    assert set(store.shapes.values()) == {(4, 4)} and BergsonStore(GOLDEN / "projected", torch.nn.Linear(2, 2))
    raw = np.fromfile(GOLDEN / "projected" / "gradients.bin", "<f4").reshape(COUNT, 4, 4, 4)
    for number, rows in enumerate(together(store).values()):
        assert np.array_equal(rows, raw[:, number].transpose(0, 2, 1)), "there outputs come first"
    config = BuildConfig(projection_dim=None, rank=None, store="factors", dtype="float32", damping=0.1)
    index = Index.build(tmp_path / "i", gradients=store, config=config, progress=False)
    query = store.gradients([3, 8])
    rows = {name: part.reshape(COUNT, -1).astype(np.float64) for name, part in together(store).items()}
    scores = index.scores(query)
    wanted = np.zeros((2, COUNT))
    for name, part in rows.items():
        curvature = index.curvature[name]
        wanted += part[[3, 8]] @ dense_inverse(curvature, index.damping.value(curvature)) @ part.T
    assert np.abs(scores - wanted).max() <= 1e-4 * np.abs(wanted).max()
    assert index.search(query, 1).ids.ravel().tolist() == [3, 8]
    index.add(gradients=store, progress=False)
    assert len(index) == 2 * COUNT


def test_what_cannot_be_read_is_refused(tmp_path: Path, model: Any) -> None:
    with pytest.raises(DataError, match="whose inputs and outputs are not known: pass model="):
        BergsonStore(GOLDEN / "whole")
    with pytest.raises(DataError, match="is it the model that it was made of"):
        BergsonStore(GOLDEN / "whole", torch.nn.Linear(3, 3))
    with pytest.raises(DataError, match="projection_target='per_module'"):
        BergsonStore(GOLDEN / "global")
    with pytest.raises(DataError, match=r"is no store of gradients .*FileNotFoundError"):
        BergsonStore(tmp_path)
    with pytest.raises(DataError, match="has examples 0 to 11, got 3 to 12"):
        BergsonStore(GOLDEN / "projected").gradients([3, 12])
    for run, file, message in (
        ("projected", "gradients.bin", "where 3,072 were recorded"),
        ("tokens", "offsets.npy", "cannot be read"),
        ("tokens", "info.json", "is no store"),
    ):
        copy = tmp_path / f"{run}-{file}"
        shutil.copytree(GOLDEN / run, copy)
        (copy / file).write_bytes((copy / file).read_bytes()[:-8])
        with pytest.raises(DataError, match=message):
            BergsonStore(copy, model)
