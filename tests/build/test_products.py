"""Gauss-Newton products against explicit Jacobians in float64; all ways of differentiating give the same."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from conftest import CASES, Case, logits_of, make_model
from torch import nn

from lorif_index import BuildConfig, LayerSelection, default_loss
from lorif_index.capture.data import parts_of, repeated
from lorif_index.capture.ensemble import Ensemble
from lorif_index.capture.heads import Declared
from lorif_index.capture.products import WAYS, Products
from lorif_index.capture.sources import ModelCapture
from lorif_index.errors import CaptureError
from lorif_index.linalg.projection import projection_matrix


def jacobian(case: Case, specs: Any, batch: Any) -> tuple[np.ndarray, np.ndarray]:
    """Of a batch of one: ((positions C, all layers' D) float64, M (positions C, positions C))."""
    case.model.double().eval()
    with torch.no_grad():
        p = logits_of(case.model, batch).softmax(1).numpy()
    found = oracle.example_gradients(
        case.model,
        lambda at: (batch, at),
        p.size,
        lambda model, given: logits_of(model, given[0]).flatten()[given[1]],
        case.weights,
    )
    case.model.float()
    parts = []
    for name, spec in specs.items():
        p_in = projection_matrix(0, name, "in", spec.width_in, spec.d_in).numpy()
        p_out = projection_matrix(0, name, "out", spec.width_out, spec.d_out).numpy()
        parts.append(oracle.project(found[name], p_in, p_out).reshape(p.size, -1))
    middle = np.zeros((p.size, p.size))
    for t, row in enumerate(p):
        at = slice(t * len(row), (t + 1) * len(row))
        middle[at, at] = np.diag(row) - np.outer(row, row)
    return np.concatenate(parts, axis=1), middle


def dense_ggn(case: Case, specs: Any, data: Any, count: int) -> np.ndarray:
    """sum_i J_i^T M_i J_i over the first examples, of all layers together."""
    total: Any = 0.0
    for i in range(count):
        j, middle = jacobian(case, specs, case.one(data, i))
        total = total + j.T @ middle @ j
    return np.asarray(total)


def flat(vectors: dict[str, torch.Tensor]) -> np.ndarray:
    return np.concatenate([v.flatten(1).double().cpu().numpy() for v in vectors.values()], axis=1)


def random_vectors(specs: Any, count: int, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(count, s.d_in, s.d_out, generator=generator) for n, s in specs.items()}


def some(data: Any, count: int) -> Any:
    return {k: v[:count] for k, v in data.items()} if isinstance(data, dict) else tuple(t[:count] for t in data)


def products_of(model: nn.Module, config: BuildConfig, way: str | None = None) -> tuple[Products, ModelCapture]:
    taken = ModelCapture(model, config)
    head = Declared(default_loss.logits)  # type: ignore[attr-defined]
    assert head is not None
    products = Products(taken.capture(None).trust(), head)
    products.way = way
    return products, taken


@pytest.mark.parametrize("way", ["forward", "twice"])
@pytest.mark.parametrize(("name", "dim"), [("mlp", 5), ("cnn", 4), ("cnn", None), ("gpt2", 4)])
def test_products_are_those_of_explicit_jacobians(name: str, dim: int | None, way: str) -> None:
    case, count = CASES[name](), 3
    config = BuildConfig(projection_dim=dim, layers=case.selection or LayerSelection(), projection="random")
    unfused = " without fused attention" if name == "gpt2" else ""
    products, taken = products_of(case.model, config, way + unfused)
    dense = dense_ggn(case, taken.specs, case.data, count)
    vectors = random_vectors(taken.specs, 4)
    found = products.summed(vectors, some(case.data, count))
    expected = flat(vectors) @ dense
    assert np.abs(flat(found) - expected).max() <= 1e-4 * np.abs(expected).max()
    assert list(found) == list(vectors) and all(found[n].shape == v.shape for n, v in vectors.items())
    # Of some layers: the others do not change.
    first = next(iter(taken.specs))
    one = {first: vectors[first]}
    d = vectors[first][0].numel()
    expected = flat(one) @ dense[:d, :d]
    assert np.abs(flat(products.summed(one, some(case.data, count))) - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize(("padding", "dim"), [(None, "auto"), (3, "auto"), (3, 4)])
def test_a_tied_embedding_and_head_keep_their_words(padding: int | None, dim: Any) -> None:
    """Also where a word is padding, which the head has gradients for and the embedding has not; or are projected."""
    case, count = CASES["gpt2"](), 2
    case.model.transformer.wte.padding_idx = padding
    data = some(case.data, count)
    assert (data["input_ids"][data["attention_mask"] > 0] == 3).any()
    config = BuildConfig(projection="random", projection_dim=dim, layers=LayerSelection(include=("*wte", "*0*c_fc")))
    specs = ModelCapture(case.model, config).specs
    spec = specs["transformer.wte"]
    assert (spec.d_in, spec.d_out, len(spec.uses)) == ((24, 8, 2) if dim == "auto" else (4, 4, 2))
    vectors = random_vectors(specs, 4)
    expected = flat(vectors) @ dense_ggn(case, specs, data, count)
    for way in ("forward without fused attention", "twice without fused attention", None):
        products, _ = products_of(case.model, config, way)
        found = products.summed(vectors, data)
        assert str(products.way).startswith(way or "forward")
        assert np.abs(flat(found) - expected).max() <= 1e-4 * np.abs(expected).max()
    if padding is not None:
        # It makes a difference.
        case.model.transformer.wte.padding_idx = None
        other = flat(vectors) @ dense_ggn(case, specs, data, count)
        assert np.abs(other - expected).max() > 1e-2 * np.abs(expected).max()


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "llama-classifier"])
def test_all_ways_agree_on_models_of_transformers(name: str) -> None:
    pytest.importorskip("transformers")
    model = make_model(name)
    if "bert" not in name:
        assert model.config._attn_implementation == "sdpa"
    torch.manual_seed(1)
    ids = torch.randint(8, 100, (4, 12))
    mask = (torch.arange(12)[None] < torch.tensor([[12], [9], [5], [12]])).long()
    batch = {"input_ids": ids, "attention_mask": mask}
    if "classifier" in name:
        batch["labels"] = torch.tensor([0, 1, 2, 1])
    config = BuildConfig(projection_dim=4, projection="random")
    products, taken = products_of(model, config)
    vectors = random_vectors(taken.specs, 3)
    chosen = products.summed(vectors, batch)
    assert products.way in WAYS and str(products.way).startswith("forward")
    found = [chosen]
    for way in ("forward without fused attention", "twice without fused attention"):
        products, _ = products_of(model, config, way)
        found.append(products.summed(vectors, batch))
    for other in found[1:]:
        assert np.abs(flat(other) - flat(chosen)).max() <= 1e-4 * np.abs(flat(chosen)).max()
    # A matrix: symmetric, not negative, linear; and the sum over examples.
    gram = flat(chosen) @ flat(vectors).T
    assert np.abs(gram - gram.T).max() <= 1e-4 * np.abs(gram).max() and np.linalg.eigvalsh(gram).min() > 0
    by_one = [products.summed(vectors, part) for part in parts_of(batch, 1)]
    assert np.abs(sum(flat(part) for part in by_one) - flat(chosen)).max() <= 1e-4 * np.abs(flat(chosen)).max()


class OneWay(torch.autograd.Function):
    """x^2, without a forward-mode formula."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return 2 * x * dy


class Silent(torch.autograd.Function):
    """x, whose tangent is lost without a word, and whose derivative has none."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def jvp(ctx: Any, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return torch.zeros_like(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return dy


class Odd(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.a, self.b, self.function = nn.Linear(6, 5), nn.Linear(5, 3), function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.function.apply(self.a(x)))


def odd_data() -> Iterator[Any]:
    torch.manual_seed(0)
    while True:
        yield torch.randn(5, 6), torch.randint(0, 3, (5,))


def test_the_first_batch_decides() -> None:
    data = next(odd_data())
    torch.manual_seed(0)
    products, taken = products_of(Odd(OneWay), BuildConfig())
    vectors = random_vectors(taken.specs, 2)
    found = products.summed(vectors, data)
    assert products.way == "twice"
    assert np.abs(flat(products.summed(vectors, data)) - flat(found)).max() == 0

    class Square(torch.nn.Module):
        @staticmethod
        def apply(x: torch.Tensor) -> torch.Tensor:
            return x * x

    torch.manual_seed(0)
    plain, _ = products_of(Odd(Square), BuildConfig())
    expected = flat(plain.summed(vectors, data))
    assert plain.way == "forward" and np.abs(flat(found) - expected).max() <= 1e-4 * np.abs(expected).max()
    lost, _ = products_of(Odd(Silent), BuildConfig())
    with pytest.raises(CaptureError, match=r"<v, H v> is .* and <J v, M J v>.*attn_implementation='eager'"):
        lost.summed(vectors, data)


def test_of_an_ensemble_each_member_has_its_own() -> None:
    case, other = CASES["mlp"](), CASES["mlp"]()
    with torch.no_grad():
        for p in other.model.parameters():
            p.mul_(1.3)
    config, data = BuildConfig(projection_dim=None), some(case.data, 4)
    both, taken = products_of(Ensemble([case.model, other.model]), config)
    vectors = random_vectors(taken.specs, 2)
    found = both.summed(vectors, data)
    for number, model in enumerate((case.model, other.model)):
        single, alone = products_of(model, config)
        expected = single.summed({n: vectors[f"{number}.{n}"] for n in alone.specs}, data)
        for name, part in expected.items():
            assert torch.allclose(found[f"{number}.{name}"], part, rtol=1e-4, atol=1e-5)


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    case = CASES["cnn"]()
    case.model.train()
    products, taken = products_of(case.model, BuildConfig(projection_dim=4))
    products.summed(random_vectors(taken.specs, 2), some(case.data, 3))
    assert case.model.training and all(p.requires_grad and p.grad is None for p in case.model.parameters())
    assert not any(m._forward_hooks for m in case.model.modules())
    batch = some(case.data, 3)
    assert torch.equal(repeated(batch, 2)[1], torch.cat([batch[1], batch[1]]))
