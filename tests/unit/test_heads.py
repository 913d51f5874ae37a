"""Heads: their products and roots against dense float64 Hessians, and losses of one's own that are seen or refused."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import gpt2, low_rank_part, mlp, own_loss, reader_of
from torch import nn
from torch.autograd.functional import hessian, jacobian
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lorif_index import BuildConfig, CrossEntropy, Index, default_loss
from lorif_index.capture.data import as_source, first_batch
from lorif_index.capture.ensemble import Ensemble
from lorif_index.capture.heads import Bernoulli, Declared, Head, Softmax, Squared
from lorif_index.capture.probes import Probes
from lorif_index.capture.seeing import Seen, UnseenLoss
from lorif_index.capture.sources import ModelCapture, ModelGradients, ProbedGradients, head_of
from lorif_index.errors import CaptureError, DataError

Loss = Callable[[nn.Module, Any], torch.Tensor]
N, T, C = 6, 3, 5
WEIGHT = torch.tensor([0.5, 1.0, 2.0, 0.2, 1.5]).double()


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def labels(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, C, shape, generator=torch.Generator().manual_seed(seed))


X, Y = numbers(N, 4), labels(N)
XS, YS = numbers(N, T, 4), labels(N, T)
YS[0, 1], YS[2, :] = -100, torch.tensor([1, -100, -100])
ONE = functional.one_hot(Y, C).double()


def linear() -> nn.Module:
    torch.manual_seed(3)
    return nn.Linear(4, C).double()


def entropy(z: torch.Tensor, y: torch.Tensor, **settings: Any) -> torch.Tensor:
    return functional.cross_entropy(z, y, reduction="none", **settings)


def binary(z: torch.Tensor, y: torch.Tensor, **settings: Any) -> torch.Tensor:
    return functional.binary_cross_entropy_with_logits(z, y, reduction="none", **settings)


def squared(z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return functional.mse_loss(z, y, reduction="none")


def focal(losses: torch.Tensor) -> torch.Tensor:
    return losses * (1.0 - (-losses).exp()) ** 2


def one_by_one(z: torch.Tensor) -> torch.Tensor:
    return torch.stack([functional.cross_entropy(own, y) for own, y in zip(z, Y, strict=True)])


def positions_first(z: torch.Tensor) -> torch.Tensor:
    return entropy(z.transpose(0, 1).flatten(0, 1), YS.T.flatten()).view(T, N).sum(0)


def over_positions(losses: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return losses.sum(1) / (y != -100).sum(1)


# Name -> the head, and the loss of outputs z, whether it is of sequences.
SEEN: dict[str, tuple[type[Head], bool, Callable[[torch.Tensor], torch.Tensor]]] = {
    "cross-entropy": (Softmax, False, lambda z: entropy(z, Y)),
    "its class": (Softmax, False, lambda z: nn.CrossEntropyLoss(reduction="none")(z, Y)),
    "half of it": (Softmax, False, lambda z: 0.5 * entropy(z, Y)),
    "temperature": (Softmax, False, lambda z: entropy(z / 3.0, Y)),
    "class weights": (Softmax, False, lambda z: entropy(z, Y, weight=WEIGHT)),
    "smoothed": (Softmax, False, lambda z: entropy(z, Y, label_smoothing=0.1)),
    "smoothed with weights": (Softmax, False, lambda z: entropy(z, Y, label_smoothing=0.1, weight=WEIGHT)),
    "soft labels": (Softmax, False, lambda z: entropy(z, 0.3 * ONE + 0.1, weight=WEIGHT)),
    "log_softmax and nll_loss": (
        Softmax,
        False,
        lambda z: functional.nll_loss(functional.log_softmax(z, 1), Y, reduction="none"),
    ),
    "their classes": (Softmax, False, lambda z: nn.NLLLoss(reduction="none", weight=WEIGHT)(nn.LogSoftmax(1)(z), Y)),
    "sum over positions": (Softmax, True, lambda z: entropy(z.transpose(1, 2), YS).sum(1)),
    "mean over positions": (Softmax, True, lambda z: over_positions(entropy(z.transpose(1, 2), YS), YS)),
    "flat positions": (Softmax, True, lambda z: entropy(z.flatten(0, 1), YS.flatten()).view(N, T).sum(1)),
    "another label ignored": (
        Softmax,
        True,
        lambda z: entropy(z.transpose(1, 2), YS.clamp_min(0), ignore_index=1, weight=WEIGHT).sum(1),
    ),
    "nll_loss of positions": (
        Softmax,
        True,
        lambda z: functional.nll_loss(z.log_softmax(-1).transpose(1, 2), YS, reduction="none").mean(1),
    ),
    "binary": (Bernoulli, False, lambda z: binary(z, ONE).sum(1)),
    "binary of one output": (Bernoulli, False, lambda z: nn.BCEWithLogitsLoss(reduction="none")(z[:, 0], ONE[:, 1])),
    "binary with weights": (
        Bernoulli,
        False,
        lambda z: binary(z, 0.8 * ONE + 0.1, weight=WEIGHT, pos_weight=2.0 * WEIGHT).mean(1),
    ),
    "squared": (Squared, False, lambda z: squared(z, ONE).sum(1)),
    "mean squared": (Squared, False, lambda z: nn.MSELoss(reduction="none")(z, ONE).mean(1)),
    "half squared, sides changed": (Squared, False, lambda z: 0.5 * squared(ONE, z).sum(1)),
    "squared of one output": (Squared, False, lambda z: squared(z[:, 2], ONE[:, 2])),
    "squared of positions": (Squared, True, lambda z: squared(z, z.detach() + 1.0).sum((1, 2))),
}

REFUSED: dict[str, tuple[str, bool, Callable[[torch.Tensor], torch.Tensor]]] = {
    "a penalty": ("add up to", False, lambda z: entropy(z, Y) + 0.001 * z.square().sum(1)),
    "a penalty of no value": ("its gradient at an output", False, lambda z: entropy(z, Y) + (z - z.detach()).sum(1)),
    "a power": ("add up to", False, lambda z: entropy(z, Y) ** 1.1),
    "an exponential": ("add up to", True, lambda z: entropy(z.transpose(1, 2), YS).mean(1).exp()),
    "focal": ("add up to", False, lambda z: focal(entropy(z, Y))),
    "a root": ("add up to", False, lambda z: squared(z, ONE).mean(1).sqrt()),
    "a norm of terms": ("its Hessian at an output", False, lambda z: squared(z, ONE).square().sum(1).sqrt()),
    "two losses": ("terms of 2 calls", False, lambda z: entropy(z, Y) + squared(z, ONE).sum(1)),
    "a negative loss": ("negative weight -1", False, lambda z: -entropy(z, Y)),
    "positions first": ("add up to", True, positions_first),
    "hidden positions cut out": (
        "do not say which of the 6",
        True,
        lambda z: z.new_zeros(N).index_add(0, (YS != -100).nonzero()[:, 0], entropy(z[YS != -100], YS[YS != -100])),
    ),
    "nll_loss of logits": ("log-probabilities", False, lambda z: functional.nll_loss(z, Y, reduction="none")),
    "one by one": ("alone", False, one_by_one),
    "both sides": ("both sides", False, lambda z: squared(z, z.roll(1, 1)).sum(1)),
    "another shape": ("two shapes", False, lambda z: squared(z, ONE[:, :1]).sum(1)),
    "by hand": ("calls none", False, lambda z: (z - ONE).square().sum(1)),
    "huber": ("calls none", False, lambda z: functional.huber_loss(z, ONE, reduction="none").sum(1)),
    "a loss that ends": ("cannot be watched", False, lambda z: entropy(z, Y).numpy()),
}


def dense(of_outputs: Callable[[torch.Tensor], torch.Tensor], z: torch.Tensor) -> torch.Tensor:
    """(n, m, m): Hessians of each example's loss at its own outputs (n, ...)."""
    whole = hessian(lambda flat: of_outputs(flat.reshape(z.shape)).sum(), z.detach().flatten())
    m = z[0].numel()
    return torch.stack([whole[i * m : (i + 1) * m, i * m : (i + 1) * m] for i in range(len(z))])


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize("name", SEEN)
def test_products_and_rows_are_those_of_the_dense_hessian(name: str) -> None:
    kind, sequences, of_outputs = SEEN[name]
    model, x = linear(), XS if sequences else X
    seen = Seen(lambda model, batch: of_outputs(model(batch)))
    seen.check(model, x)
    head = seen(model, x)
    assert type(head) is kind and seen.kind == kind.kind and head.outputs.requires_grad
    # Of the model's own outputs, with what the loss takes of them before.
    taken = jacobian(lambda z: seen(lambda batch: batch, z).outputs.sum(0), model(x).detach())
    expected = dense(of_outputs, model(x))
    n, m = len(x), head.outputs[0].numel()
    products = head.product(torch.eye(m).double().reshape(m, 1, *head.outputs.shape[1:]).expand(m, *head.outputs.shape))
    products = products.movedim(0, 1).reshape(n, m, m)
    for i in range(n):
        j = taken.reshape(m, n, -1)[:, i]
        assert torch.allclose(j.T @ products[i] @ j, expected[i], atol=1e-12)
    assert torch.allclose(products, products.mT, atol=1e-12)
    if head.exact is not None:
        rows = torch.stack([head.row(number) for number in range(head.exact)]).flatten(2)
        assert torch.allclose(torch.einsum("rni,rnj->nij", rows, rows), products, atol=1e-12)
    count, moment = 4000, torch.zeros_like(products)
    signs = torch.randint(0, 2, (count, *head.outputs.shape), generator=torch.Generator().manual_seed(5)) * 2.0 - 1.0
    for e in signs.double():
        v = head.root(e).flatten(1)
        moment += torch.einsum("ni,nj->nij", v, v) / count
    assert float((moment - products).abs().max()) < 0.08 * float(products.abs().max())


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_something_else_is_refused(name: str) -> None:
    reason, sequences, of_outputs = REFUSED[name]
    seen = Seen(lambda model, batch: of_outputs(model(batch)))
    with pytest.raises(UnseenLoss, match=f"<lambda>.*{reason}.*curvature='empirical'"):
        seen.check(linear(), XS if sequences else X)


def test_a_later_batch_that_is_something_else_is_refused() -> None:
    def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        losses = entropy(model(batch), Y[: len(batch)])
        return losses if len(batch) > 2 else losses.square()

    seen = Seen(loss)
    seen.check(linear(), X)
    with pytest.raises(UnseenLoss, match="'loss' is not known: the loss of example . of a batch is"):
        seen(linear(), X[:2])


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_batch_of_one_may_be_reduced(reduction: str) -> None:
    losses: list[Loss] = [
        lambda m, b: functional.cross_entropy(m(b).transpose(1, 2), YS[:1], WEIGHT, reduction=reduction),
        lambda m, b: functional.cross_entropy(m(b)[:, 0], ONE[:1], WEIGHT, label_smoothing=0.2, reduction=reduction),
        lambda m, b: functional.nll_loss(m(b)[:, 0].log_softmax(1), Y[:1], WEIGHT, reduction=reduction),
        lambda m, b: functional.binary_cross_entropy_with_logits(m(b)[:, 0], ONE[:1], WEIGHT, reduction=reduction),
        lambda m, b: functional.mse_loss(m(b)[:, 0], ONE[:1], reduction=reduction),
    ]
    if "weight" in inspect.signature(functional.mse_loss).parameters:
        weight = WEIGHT.expand(1, C)
        losses.append(lambda m, b: functional.mse_loss(m(b)[:, 0], ONE[:1], reduction=reduction, weight=weight))
    model = linear()
    for loss in losses:
        seen = Seen(lambda m, b, loss=loss: loss(m, b).reshape(1))
        seen.check(model, XS[:1])
        head = seen(model, XS[:1])
        outputs = model(XS[:1])
        expected = hessian(lambda z, loss=loss: loss(lambda b: z.reshape(1, T, C), None), outputs.detach().flatten())
        taken = jacobian(lambda z, seen=seen: seen(lambda b: b, z).outputs, outputs.detach())
        j = taken.reshape(head.outputs[0].numel(), -1)
        product = head.product(j.T.reshape(-1, *head.outputs.shape)).flatten(1)
        assert torch.allclose(product @ j, expected, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rounding_is_not_taken_for_another_loss(dtype: torch.dtype) -> None:
    model, x = linear().to(dtype), (3.0 * XS).to(dtype)
    for loss in (
        lambda m, b: entropy(m(b).transpose(1, 2), YS).sum(1),
        lambda m, b: entropy(m(b).float().transpose(1, 2), YS).mean(1),
        lambda m, b: squared(m(b), m(b).detach().round()).sum((1, 2)),
    ):
        Seen(loss).check(model, x)


def rows(loss: Loss | None, model: nn.Module, data: Any) -> list[dict[str, torch.Tensor]]:
    capture, examples = ModelCapture(model, BuildConfig(projection_dim=None)), as_source(data, 16)
    probes = Probes(head_of(loss, capture, lambda: first_batch(examples)), None, 0, 40)
    blocks = ProbedGradients(capture.capture(loss), examples, probes).blocks()
    return [{name: layer.dense() for name, layer in block.layers.items()} for block in blocks]


def test_rows_of_a_loss_that_is_seen_are_those_of_one_that_says_so() -> None:
    case = mlp()
    said = CrossEntropy(lambda model, batch: (model(batch[0]), batch[1]))
    plain = rows(lambda model, batch: entropy(model(batch[0]), batch[1]), case.model, case.data)
    for seen, expected in zip(plain, rows(said, case.model, case.data), strict=True):
        assert all(torch.equal(seen[name], expected[name]) for name in expected)
    case = gpt2()

    def own(model: nn.Module, batch: Any) -> torch.Tensor:
        logits, wanted = default_loss.logits(model, batch)
        return entropy(logits.flatten(0, 1), wanted.flatten()).view(wanted.shape).sum(1)

    for seen, expected in zip(rows(own, case.model, case.data), rows(None, case.model, case.data), strict=True):
        assert all(torch.equal(seen[name], expected[name]) for name in expected)


def weighted(model: nn.Module, batch: Any) -> torch.Tensor:
    return entropy(model(batch[0]), batch[1]) * (1.0 + batch[0][:, 0].abs())


@pytest.mark.parametrize("loss", [None, CrossEntropy(lambda m, b: (m(b[0]), b[1])), weighted, "two models"])
def test_gradients_and_curvature_rows_from_one_forward_pass(loss: Any) -> None:
    case = gpt2() if loss is None else mlp()
    model = Ensemble([mlp().model, copy.deepcopy(mlp().model)]) if loss == "two models" else case.model
    loss = weighted if loss == "two models" else loss
    taken, examples = ModelCapture(model, BuildConfig(projection_dim=None)), as_source(case.data, 16)
    probes = Probes(head_of(loss, taken, lambda: first_batch(examples)), 2, 0, 40)
    calls = []
    handle = model.modules().__next__().register_forward_hook(lambda *given: calls.append(1))
    if isinstance(model, Ensemble):
        handle = model[1].register_forward_hook(lambda *given: calls.append(1))
    probed = ProbedGradients(taken.capture(loss), examples, probes)
    calls.clear()
    ids = np.arange(20)
    together = list(probed.with_losses(ids))
    handle.remove()
    assert len(calls) == len(together) == 2
    gradients = list(ModelGradients(taken.capture(loss), examples).sample(ids))
    rows = list(probed.sample(ids))
    for number, (first, *others) in enumerate(together):
        assert first.contents is not None and np.array_equal(first.contents, gradients[number].contents)
        for block, expected in zip(
            [first, *others], [gradients[number], *rows[2 * number : 2 * number + 2]], strict=True
        ):
            assert np.array_equal(block.ids, expected.ids)
            for name, layer in block.layers.items():
                wanted = expected.layers[name].dense()
                assert torch.allclose(layer.dense(), wanted, atol=1e-5 * float(wanted.abs().max()))


def test_a_build_is_the_same_where_both_are_taken_apart(tmp_path: Path) -> None:
    case = gpt2()

    def said(model: nn.Module, batch: Any) -> torch.Tensor:
        return default_loss(model, batch)

    # It only says what it is the cross-entropy of: that it is no other thing is not known.
    said.logits = default_loss.logits
    stages: list[set[str]] = []
    scores = []
    for number, loss in enumerate((None, said)):
        index = Index.build(tmp_path / str(number), model=case.model, data=case.data, loss=loss)
        stages.append(set(index.build_report["seconds"]))
        scores.append(index.scores(case.query))
    assert stages[1] - stages[0] == {"probes"} and stages[0] < stages[1]
    assert np.abs(scores[0] - scores[1]).max() < 1e-3 * np.abs(scores[1]).max()


class Weighted(CrossEntropy):
    """A class of the user's own, which is something else than the cross-entropy of its logits."""

    def __call__(self, model: nn.Module, batch: Any) -> torch.Tensor:
        return super().__call__(model, batch) * batch[2]


class Centred(nn.Module):
    """Examples depend on each other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, C)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        return self.last(torch.relu(h - 0.5 * h.mean(dim=0, keepdim=True)))


class Branched(Centred):
    """A layer that few examples reach."""

    def __init__(self) -> None:
        super().__init__()
        self.few = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h, reach = self.first(x), x[:, 0] > 2.0
        return self.last(torch.where(reach[:, None], h + self.few(h), h) if bool(reach.any()) else h)


def test_what_is_stored_of_a_sample_is_the_losss_own_gradient(tmp_path: Path) -> None:
    x, y, weights = numbers(60, 4).float(), labels(60), torch.linspace(0.1, 9.0, 60)
    torch.manual_seed(0)
    model, loss = nn.Linear(4, C), Weighted(lambda m, b: (m(b[0]), b[1]))
    config = BuildConfig(store="factors", rank=None, projection_dim=None, dtype="float32")
    index = Index.build(tmp_path / "i", model=model, data=(x, y, weights), loss=loss, config=config)
    for i, found in enumerate(index.gradients([3, 50])[""]):
        at = [3, 50][i]
        loss(model, (x[at : at + 1], y[at : at + 1], weights[at : at + 1])).sum().backward()
        own = torch.cat([model.weight.grad, model.bias.grad[:, None]], dim=1).T
        assert torch.allclose(torch.as_tensor(found), own, rtol=1e-4, atol=1e-5)
        model.zero_grad()


def test_a_sample_is_checked_where_the_first_batch_proves_nothing(tmp_path: Path) -> None:
    x, y = numbers(65, 4).float(), labels(65)
    unsaid = y.clone()
    unsaid[:32] = -100
    batches = [[0], *(list(range(i, i + 8)) for i in range(1, 65, 8))]
    for data in (DataLoader(TensorDataset(x, y), batch_sampler=batches), (x, unsaid)):
        with pytest.raises(CaptureError, match="a gradient in rows of others"):
            Index.build(tmp_path / "i", model=Centred(), data=data)
    # Nor has the sample's first batch to reach all that the data's does.
    reaching = x.clamp(max=1.0).repeat(8, 1)
    reaching[::65, 0] = 3.0
    index = Index.build(
        tmp_path / "b", model=Branched(), data=(reaching, y.repeat(8)), config=BuildConfig(batch_size=8)
    )
    assert set(index.layers) == {"first", "few", "last"}


@pytest.mark.parametrize("outputs", [1, 3])
def test_the_curvature_of_a_regression_is_the_dense_one(outputs: int, tmp_path: Path) -> None:
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, outputs))
    x, y = torch.randn(40, 4), torch.randn(40, outputs)

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        losses = functional.mse_loss(model(batch[0]), batch[1], reduction="none")
        return losses.mean(dim=1)

    settings: dict[str, Any] = dict(projection_dim=None, rank=None, curvature_rank=None, store="factors")
    config = BuildConfig(**settings, dtype="float32", curvature="ggn", layers=["0", "2"], batch_size=16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        index = Index.build(tmp_path / "i", model=model, data=(x, y), loss=loss, config=config)
        Index.estimate(model=model, data=(x, y), loss=loss, config=config)
    assert reader_of(index).manifest.fingerprint["curvature"] == "ggn"
    assert reader_of(index).manifest.fingerprint["head"] == "squared"
    model.double()
    for name in ("0", "2"):
        layer = model.get_submodule(name)
        own = torch.cat([layer.weight, layer.bias[:, None]], dim=1).T.detach()

        def predicted(matrix: torch.Tensor, name: str = name) -> torch.Tensor:
            given = {f"{name}.weight": matrix[:-1].T, f"{name}.bias": matrix[-1]}
            return torch.func.functional_call(model, given, (x.double(),))

        j = jacobian(predicted, own).flatten(2).reshape(40 * outputs, -1)
        expected = (2.0 / outputs) * j.T @ j / 40
        fitted = index.curvature[name]
        found = torch.from_numpy(low_rank_part(fitted))
        # It is kept in half precision.
        assert float((found - expected).norm() / expected.norm()) < 3e-4
        assert fitted.trace == pytest.approx(float(expected.trace()), rel=1e-4)


def test_ensembles_and_batches_of_another_form(tmp_path: Path) -> None:
    case = mlp()
    models = [case.model, mlp().model]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        index = Index.build(tmp_path / "i", model=models, data=case.data, loss=own_loss, curvature="ggn")
        alone = Index.build(tmp_path / "one", model=case.model, data=case.data, loss=own_loss, curvature="ggn")
    for layer in alone.layers:
        assert index.curvature[f"1.{layer}"].trace == pytest.approx(alone.curvature[layer].trace, rel=1e-4)
    probes = Probes(Declared(lambda model, batch: (batch, batch[..., 0].long())), None, 0, 9)
    probes.prepare(nn.Identity(), torch.zeros(2, 4))
    assert probes.exact and probes.each == 4
    with pytest.raises(DataError, match="4 outputs an example.*example 7.*\\(2, 3\\)"):
        probes(nn.Identity(), torch.zeros(2, 3), np.array([7, 8]))
