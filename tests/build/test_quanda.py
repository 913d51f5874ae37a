"""quanda: its metrics take this library's scores, of images and of texts.

quanda 0.5 asks for a captum that asks for numpy below 2, and so is not installed beside what the other tests need. It
runs all the same in an environment of its own: `pip install quanda==0.5.0 omegaconf`, then `pip install "numpy>=2"`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_model, small_data, small_model, train
from torch.utils.data import Dataset, TensorDataset

import lorif_index.quanda
from lorif_index import Index
from lorif_index.errors import ConfigError, DataError, FingerprintError


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "quanda"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "lorif_index.quanda.explainer", raising=False)
    monkeypatch.setitem(sys.modules, "quanda", None)
    with pytest.raises(ConfigError, match="pip install quanda"):
        _ = lorif_index.quanda.LorifExplainer
    with pytest.raises(AttributeError, match="nothing"):
        _ = lorif_index.quanda.nothing


class Labelled(Dataset):
    """(input, label) with plain integers for labels, as quanda's data sets have them."""

    def __init__(self, data: tuple[torch.Tensor, torch.Tensor]) -> None:
        self._inner = TensorDataset(*data)

    def __len__(self) -> int:
        return len(self._inner)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        x, y = self._inner[i]
        return x, int(y)


def explainer(*arguments: Any, **more: Any) -> Any:
    pytest.importorskip("quanda")
    return lorif_index.quanda.LorifExplainer(*arguments, **more)


def test_images_are_explained_and_judged(tmp_path: Path) -> None:
    model, (x, y) = small_model(), small_data(120)
    train(model, (x, y))
    data = Labelled((x[:100], y[:100]))
    made = explainer(model, data, cache_dir=str(tmp_path), model_id="one", s=5)
    scores = made.explain(x[100:], y[100:].tolist())
    with Index.open(tmp_path / "one", model=model) as index:
        assert torch.equal(scores, torch.from_numpy(index.scores((x[100:], y[100:]))))
        assert torch.equal(made.self_influence(), torch.from_numpy(index.self_influence()))
    from quanda.metrics.downstream_eval import ClassDetectionMetric

    metric = ClassDetectionMetric(model=model, train_dataset=data, s=3)
    metric.update(scores, y[100:])
    best = scores.topk(3, dim=1).indices
    expected = (y[:100][best] == y[100:, None]).float().mean()
    assert float(metric.compute()["score"]) == pytest.approx(float(expected))
    # It is opened again, not built, and not under another model or data.
    before = (tmp_path / "one" / "manifest.json").stat().st_mtime_ns
    again = explainer(model, data, cache_dir=str(tmp_path), model_id="one")
    assert torch.equal(again.explain(x[100:], y[100:]), scores)
    assert (tmp_path / "one" / "manifest.json").stat().st_mtime_ns == before
    with pytest.raises(FingerprintError):
        explainer(small_model(seed=4), data, cache_dir=str(tmp_path), model_id="one")
    with pytest.raises(DataError, match="of 100 examples, and train_dataset has 50"):
        explainer(model, Labelled((x[:50], y[:50])), cache_dir=str(tmp_path), model_id="one")


def test_texts_are_explained(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    model, generator = make_model("gpt2"), np.random.default_rng(0)
    rows = generator.integers(1, 300, (20, 12))
    data = datasets.Dataset.from_dict(
        {"input_ids": rows.tolist(), "attention_mask": np.ones_like(rows).tolist(), "labels": rows.tolist()}
    )
    made = explainer(model, data.with_format("torch"), "causal_lm", cache_dir=str(tmp_path))
    some = torch.from_numpy(rows[[4, 9]])
    scores = made.explain({"input_ids": some, "attention_mask": torch.ones_like(some)}, some)
    assert scores.shape == (2, 20) and scores.argmax(dim=1).tolist() == [4, 9]
    listed = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in some]
    assert torch.allclose(made.explain(listed, some), scores)
