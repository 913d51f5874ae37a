"""A program's choice of float32 products is its model's: fits and scores do not change with it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import small_data, small_model
from torch import nn

from lorif_index import Index, default_loss
from lorif_index.linalg.precision import as_chosen, whole_products


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    yield
    torch.set_float32_matmul_precision("highest")


def chosen() -> str:
    return str(torch.backends.mkldnn.matmul.fp32_precision)


def gradients() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {"a": torch.randn(90, 40, 30, generator=generator), "b": torch.randn(90, 64, 64, generator=generator)}


def test_fits_and_scores_are_the_same(tmp_path: Path) -> None:
    query = {name: g[:3] + 0.5 * g[3:6] for name, g in gradients().items()}
    found = []
    for number, precision in enumerate(("highest", "medium", "high")):
        torch.set_float32_matmul_precision(precision)
        index = Index.build(tmp_path / str(number), gradients=[gradients()], progress=False)
        found.append((index.scores(query), index.self_influence(), index.search(query, 5).scores))
        assert torch.get_float32_matmul_precision() == precision
    for other in found[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_the_model_has_what_the_program_has_chosen(tmp_path: Path) -> None:
    seen: set[str] = set()

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        seen.add(chosen())
        return default_loss(model, batch)

    torch.set_float32_matmul_precision("medium")
    wanted = chosen()
    index = Index.build(tmp_path / "i", model=small_model(), data=small_data(40), loss=loss, progress=False)
    index.scores(small_data(2, seed=3))
    assert seen == {wanted} and wanted != "ieee"


@pytest.mark.skipif(not hasattr(torch.backends.mkldnn.matmul, "fp32_precision"), reason="an older torch")
def test_it_is_put_back_whoever_ends_first() -> None:
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    first, second = threading.Event(), threading.Event()
    inside: list[str] = []

    def other() -> None:
        with whole_products():
            first.set()
            second.wait()
            inside.append(chosen())

    thread = threading.Thread(target=other)
    with whole_products():
        thread.start()
        first.wait()
        with as_chosen():
            assert chosen() == "bf16"
    assert chosen() == "ieee"
    second.set()
    thread.join()
    assert inside == ["ieee"] and chosen() == "bf16"
    with pytest.raises(ValueError, match="x"), whole_products():
        raise ValueError("x")
    assert chosen() == "bf16"
    torch.backends.mkldnn.matmul.fp32_precision = "none"


@pytest.mark.skipif(not hasattr(torch.backends.mkldnn.matmul, "fp32_precision"), reason="an older torch")
def test_a_pass_that_ends_later_leaves_whole_products() -> None:
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    with whole_products():
        first, second = as_chosen(), as_chosen()
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        second.__exit__(None, None, None)
        assert chosen() == "ieee"
    assert chosen() == "bf16"
    torch.backends.mkldnn.matmul.fp32_precision = "none"
