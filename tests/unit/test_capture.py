"""Capture: the right gradient of the right example, whatever the batch, and the model left as it was found."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from lorif_index import BuildConfig, Compute, LayerSelection, default_loss
from lorif_index.capture.gradients import GradientBlock
from lorif_index.capture.hooks import Capture
from lorif_index.capture.sources import ModelCapture
from lorif_index.errors import CaptureError, ConfigError
from lorif_index.linalg.projection import projection_matrix

EXACT = {"projection_dim": None, "rank": None}


def capture_of(model: nn.Module, loss: Any = None, **config: Any) -> tuple[Capture, ModelCapture]:
    whole = ModelCapture(model, BuildConfig(**(EXACT | config)))
    return whole.capture(loss), whole


def take(model: nn.Module, batch: Any, n: int, loss: Any = None, **config: Any) -> GradientBlock:
    capture, _ = capture_of(model, loss, **config)
    return capture.gradients(np.arange(n), batch, require_all=True)


def dense(block: GradientBlock) -> dict[str, torch.Tensor]:
    return {name: g.dense() for name, g in block.layers.items()}


def by_autograd(
    model: nn.Module, losses: torch.Tensor, parameters: list[torch.Tensor]
) -> list[tuple[torch.Tensor, ...]]:
    return [torch.autograd.grad(loss, parameters, retain_graph=True) for loss in losses]


def gpt2(**changes: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = dict(n_layer=2, n_embd=16, n_head=2, vocab_size=40, n_positions=16, bos_token_id=0, eos_token_id=0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**(sizes | changes)))  # type: ignore[no-any-return]


def padded_batch(lengths: tuple[int, ...] = (9, 4, 6), width: int = 9, side: str = "right") -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 40, (len(lengths), width), generator=generator)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        if side == "right":
            mask[row, :length] = 1
        else:
            mask[row, width - length :] = 1
    return {"input_ids": ids * mask, "attention_mask": mask}


def single(batch: dict[str, torch.Tensor], row: int) -> dict[str, torch.Tensor]:
    """One example without its padding."""
    shown = batch["attention_mask"][row].bool()
    return {k: v[row : row + 1, shown] for k, v in batch.items()}


# -- right gradients -------------------------------------------------------------------------------------------------


class Everything(nn.Module):
    """Every kind of supported map, in-place activations, and a module called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6, padding_idx=0)
        self.conv1 = nn.Conv1d(6, 8, 3, stride=2, padding=1, groups=2, padding_mode="circular")
        self.conv2 = nn.Conv2d(1, 4, (3, 2), padding="same", dilation=(1, 2))
        self.depthwise = nn.Conv2d(4, 4, 3, groups=4, bias=False)
        self.twice = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens).transpose(1, 2)
        x = functional.relu(self.conv1(x), inplace=True).unsqueeze(1)
        x = self.depthwise(functional.relu_(self.conv2(x)))
        x = x.flatten(2).transpose(1, 2)
        x = x + self.twice(functional.relu(self.twice(x)))
        x += 1.0
        return self.head(x.mean(dim=1))


class Words(nn.Module):
    """A language model of two maps: its head shares the embedding's weight, or has one of its own."""

    def __init__(self, tied: bool, padding: int | None) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, 12, padding_idx=padding)
        self.inner = nn.Linear(12, 12)
        self.lm_head = nn.Linear(12, 30, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.lm_head(torch.tanh(self.inner(self.embed(tokens))))  # type: ignore[no-any-return]


@pytest.mark.parametrize("floor", ["auto", 5])
@pytest.mark.parametrize("padding", [None, 0])
@pytest.mark.parametrize("tied", [True, False])
def test_a_head_keeps_its_words(tied: bool, padding: int | None, floor: Any) -> None:
    """Its own side of them; the other is projected like any. What a tied embedding adds is in the same rows."""
    torch.manual_seed(0)
    model = Words(tied, padding).eval()
    tokens = torch.randint(1, 30, (4, 7))
    tokens[0, :3] = 0

    def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        logits = model(batch[:, :-1])
        return functional.cross_entropy(logits.transpose(1, 2), batch[:, 1:], reduction="none").sum(dim=1)

    fixed = {"projection_dim": "auto", "projection": "random", "projection_floor": floor}
    block = take(model, tokens, 4, loss, **fixed)
    name = "embed" if tied else "lm_head"
    assert list(block.layers) == (["embed", "inner"] if tied else ["inner", "lm_head"])
    found, other = block.layers[name], 12 if floor == "auto" else 5
    assert found.shape == ((30, other) if tied else (other, 30))
    side = projection_matrix(0, name, "out" if tied else "in", 12, other)
    for i, (grad,) in enumerate(by_autograd(model, loss(model, tokens), [model.lm_head.weight])):
        expected = grad @ side if tied else (grad @ side).T
        assert torch.allclose(found.dense()[i], expected, atol=1e-5)


def test_widths_of_a_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """As narrow as its numbers ask for, but no narrower than 16; above, its words are projected, too."""
    torch.manual_seed(0)
    monkeypatch.setattr("lorif_index.capture.layers._LEAST_HEAD", 4)
    for numbers, widths in ((360, (30, 8)), (210, (30, 7)), (120, (30, 4)), (119, (8, 8))):
        monkeypatch.setattr("lorif_index.capture.layers.HEAD_NUMBERS", numbers)
        spec = ModelCapture(Words(True, None), BuildConfig(projection_floor=8)).specs["embed"]
        assert (spec.d_in, spec.d_out) == widths
    for config in (BuildConfig(projection_dim=6), BuildConfig(projection_dim=0.5, projection_floor=6)):
        spec = ModelCapture(Words(False, None), config).specs["lm_head"]
        assert (spec.d_in, spec.d_out) == (6, 6 if config.projection_dim == 6 else 15)
    assert list(ModelCapture(Words(False, None), BuildConfig(layers=LayerSelection(head=False))).specs) == ["inner"]


def test_every_kind_of_module_against_autograd() -> None:
    torch.manual_seed(0)
    model = Everything().eval()
    tokens, y = torch.randint(0, 11, (5, 14)), torch.randint(0, 3, (5,))
    tokens[0, :5] = 0
    got = dense(take(model, (tokens, y), 5, layers=LayerSelection(embeddings=True)))
    losses = functional.cross_entropy(model(tokens), y, reduction="none")
    named = dict(model.named_parameters())
    for i, grads in enumerate(by_autograd(model, losses, list(named.values()))):
        expected = dict(zip(named, grads, strict=True))
        for name, g in got.items():
            weight = expected[f"{name}.weight"]
            matrix = weight if name == "embed" else weight.flatten(1).T
            if f"{name}.bias" in expected:
                matrix = torch.cat([matrix, expected[f"{name}.bias"][None]])
            assert g[i].shape == matrix.shape
            assert torch.allclose(g[i], matrix, atol=1e-6), name


def test_projected_is_the_projection_of_the_unprojected() -> None:
    torch.manual_seed(0)
    model = Everything().eval()
    batch = (torch.randint(0, 11, (4, 14)), torch.randint(0, 3, (4,)))
    selection = LayerSelection(embeddings=True)
    full = take(model, batch, 4, layers=selection)
    capture, whole = capture_of(model, layers=selection, projection_dim=3, rank=None)
    got = capture.gradients(np.arange(4), batch)
    expected = whole.projections.project(full)
    assert {s.d_out for s in whole.specs.values()} == {3}
    for name in got.layers:
        assert torch.allclose(got.layers[name].dense(), expected.layers[name].dense(), atol=1e-5), name


def test_tied_weights_are_one_layer_and_their_uses_are_summed() -> None:
    model = gpt2().eval()
    batch = padded_batch()
    for selection in (
        LayerSelection(embeddings=True, head=True),
        LayerSelection(include=("*lm_head", "*.h.*", "*wpe")),
    ):
        whole = ModelCapture(model, BuildConfig(**EXACT, layers=selection))
        tied = whole.specs["transformer.wte"]
        assert tied.uses == ("transformer.wte", "lm_head") and "lm_head" not in whole.specs
        got = dense(whole.capture(None).gradients(np.arange(3), batch))
        weight, positions = model.transformer.wte.weight, model.transformer.wpe.weight
        for i, (w, p) in enumerate(by_autograd(model, default_loss(model, batch), [weight, positions])):
            assert torch.allclose(got["transformer.wte"][i], w, atol=1e-5)
            assert torch.allclose(got["transformer.wpe"][i], p, atol=1e-5)


def test_tied_linears_and_unlike_biases() -> None:
    class Tied(nn.Module):
        def __init__(self, bias: bool) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 5), nn.Linear(5, 5, bias=bias)
            self.b.weight = self.a.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(torch.tanh(self.a(x)))

    torch.manual_seed(0)
    model, x, y = Tied(False), torch.randn(4, 5), torch.randint(0, 5, (4,))
    got = dense(take(model, (x, y), 4))
    losses = functional.cross_entropy(model(x), y, reduction="none")
    for i, (w, b) in enumerate(by_autograd(model, losses, [model.a.weight, model.a.bias])):
        assert torch.allclose(got["a"][i], torch.cat([w.T, b[None]]), atol=1e-6)
    with pytest.raises(CaptureError, match="'a', 'b'.*different biases"):
        take(Tied(True), (x, y), 4)
    assert set(dense(take(Tied(True), (x, y), 4, layers=LayerSelection(bias=False)))) == {"a"}


# -- rows do not depend on their batch -------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("projection", [None, 6])
def test_rows_do_not_depend_on_batch_or_padding(side: str, projection: int | None) -> None:
    model = gpt2(resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5).train()
    batch = padded_batch(side=side)
    selection = LayerSelection(embeddings=True, head=True)
    together = dense(take(model, batch, 3, projection_dim=projection, layers=selection))
    for row in range(3):
        alone = dense(take(model, single(batch, row), 1, projection_dim=projection, layers=selection))
        for name in together:
            assert torch.allclose(together[name][row], alone[name][0], atol=2e-6, rtol=1e-4), (name, row)


def test_batch_norm_is_used_in_eval_mode() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)).train()
    x, y = torch.randn(5, 4), torch.randint(0, 3, (5,))
    mean = model[1].running_mean.clone()
    together = dense(take(model, (x, y), 5))
    assert torch.equal(mean, model[1].running_mean) and model[1].training
    for row in range(5):
        alone = dense(take(model, (x[row : row + 1], y[row : row + 1]), 1))
        for name in together:
            assert torch.allclose(together[name][row], alone[name][0], atol=1e-6)


# -- the model is left as it was found -------------------------------------------------------------------------------


def state_of(model: nn.Module) -> dict[str, Any]:
    return {
        "training": [m.training for m in model.modules()],
        "requires": [p.requires_grad for p in model.parameters()],
        "grads": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "hooks": [(len(m._forward_hooks), len(m._backward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        "values": [p.detach().clone() for p in [*model.parameters(), *model.buffers()]],
    }


def same_state(a: dict[str, Any], b: dict[str, Any]) -> bool:
    def equal(x: Any, y: Any) -> bool:
        if isinstance(x, torch.Tensor):
            return isinstance(y, torch.Tensor) and torch.equal(x, y)
        return bool(x == y)

    return all(len(a[k]) == len(b[k]) and all(equal(x, y) for x, y in zip(a[k], b[k], strict=True)) for k in a)


@pytest.mark.parametrize("failing", [None, "loss", "forward", "shape"])
def test_the_model_is_left_exactly_as_it_was_found(failing: str | None) -> None:
    model = gpt2().train()
    model.transformer.h[0].eval()
    for p in list(model.parameters())[::2]:
        p.requires_grad_(False)
    next(p for p in model.parameters() if p.requires_grad).grad = None
    wanted = [p for p in model.parameters() if p.requires_grad]
    wanted[0].grad = torch.ones_like(wanted[0])
    before = state_of(model)

    def loss(m: nn.Module, batch: Any) -> torch.Tensor:
        if failing == "loss":
            raise RuntimeError("no loss")
        out = default_loss(m, batch if failing != "forward" else {**batch, "input_ids": batch["input_ids"] + 1000})
        return out.mean() if failing == "shape" else out

    fused = torch.backends.mha.get_fastpath_enabled()
    if failing is None:
        take(model, padded_batch(), 3, loss)
    else:
        with pytest.raises((RuntimeError, IndexError, CaptureError)):
            take(model, padded_batch(), 3, loss)
    assert same_state(before, state_of(model))
    assert torch.backends.mha.get_fastpath_enabled() == fused and torch.is_grad_enabled()


def test_no_parameter_gradient_is_formed() -> None:
    model = gpt2()
    seen: list[bool] = []

    def loss(m: nn.Module, batch: Any) -> torch.Tensor:
        seen.extend(p.requires_grad for p in m.parameters())
        return default_loss(m, batch)

    take(model, padded_batch(), 3, loss, projection_dim=4, layers=LayerSelection(embeddings=True, head=True))
    assert seen and not any(seen)
    assert all(p.grad is None for p in model.parameters())


def test_works_inside_no_grad() -> None:
    model, (x, y) = nn.Linear(4, 3), (torch.randn(2, 4), torch.tensor([0, 1]))
    with torch.no_grad():
        got = dense(take(model, (x, y), 2))
    assert float(got[""].abs().sum()) > 0


# -- refusals --------------------------------------------------------------------------------------------------------


class Flattened(nn.Module):
    """Positions of all examples as rows, in the order of the examples or of the positions; or some of them."""

    def __init__(self, order: str) -> None:
        super().__init__()
        self.first, self.expert, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.order = order

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        if self.order == "some":
            flat = h.flatten(0, 1)
            h = torch.cat([self.expert(flat[:-1]), flat[-1:]]).view_as(h)
        elif self.order == "positions":
            h = self.expert(h.transpose(0, 1).flatten(0, 1)).view(h.shape[1], len(h), -1).transpose(0, 1)
        else:
            h = self.expert(h.flatten(0, 1)).view_as(h)
        return self.last(h.mean(dim=1))


class TimeFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.last = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.inner(x.transpose(0, 1)).transpose(0, 1).mean(dim=1))


def test_rows_of_positions_are_their_examples() -> None:
    batch = (torch.randn(3, 5, 4), torch.tensor([0, 1, 2]))
    model = Flattened("examples")
    found = dense(take(model, batch, 3))["expert"]
    for i, (weight, bias) in enumerate(
        by_autograd(model, default_loss(model, batch), [model.expert.weight, model.expert.bias])
    ):
        assert np.allclose(found[i], torch.cat([weight.T, bias[None]]).numpy(), atol=1e-6)


@pytest.mark.parametrize(
    ("order", "message"),
    [("some", r"'expert'.*\(14, 4\).*3 examples.*exclude"), ("positions", r"'expert'.*rows of others.*exclude")],
)
def test_rows_of_no_example_are_refused_by_name(order: str, message: str) -> None:
    batch = (torch.randn(3, 5, 4), torch.tensor([0, 1, 2]))
    with pytest.raises(CaptureError, match=message) as raised:
        take(Flattened(order), batch, 3)
    assert raised.value.layers == ("expert",)
    found = take(Flattened(order), batch, 3, layers=LayerSelection(exclude=("expert",)))
    assert set(dense(found)) == {"first", "last"}


def test_rows_in_another_dimension_are_refused_even_where_sizes_agree() -> None:
    with pytest.raises(CaptureError, match=r"'inner'.*rows of others"):
        take(TimeFirst(), (torch.randn(3, 3, 4), torch.tensor([0, 1, 2])), 3)


def test_examples_that_interact_are_refused() -> None:
    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.inner(x)
            return h - h.mean(dim=0, keepdim=True)

    with pytest.raises(CaptureError, match="rows of others"):
        take(Mixing(), (torch.randn(3, 4), torch.tensor([0, 1, 2])), 3)


def test_losses_of_the_wrong_shape_are_refused() -> None:
    model, batch = nn.Linear(4, 3), (torch.randn(3, 4), torch.tensor([0, 1, 2]))
    with pytest.raises(CaptureError, match=r"shape \(3,\).*reduction='none'"):
        take(model, batch, 3, lambda m, b: functional.cross_entropy(m(b[0]), b[1]))


def test_a_layer_without_gradient_is_named() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.never, self.aside = nn.Linear(4, 3), nn.Linear(2, 2), nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.aside(x)
            return self.used(x)

    batch = (torch.randn(3, 4), torch.tensor([0, 1, 2]))
    with pytest.raises(CaptureError, match="'never' got no gradient: it is never called"):
        take(Unused(), batch, 3)
    with pytest.raises(CaptureError, match="'aside' got no gradient.*does not depend"):
        take(Unused(), batch, 3, layers=LayerSelection(exclude=("never",)))


def test_a_layer_of_attention_is_not_fused() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.Sequential(layer, nn.Flatten(), nn.Linear(32, 3)).eval()
    got = take(model, (torch.randn(2, 4, 8), torch.tensor([0, 1])), 2)
    assert set(got.layers) == {f"0.self_attn.{part}_proj" for part in ("q", "k", "v", "out")} | {
        "0.linear1",
        "0.linear2",
        "2",
    }
    assert "forward" not in layer.self_attn.__dict__


def test_attention_is_followed_where_only_its_output_is_tracked() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.Sequential(layer, nn.Flatten(), nn.Linear(32, 3)).eval()
    batch = (torch.randn(2, 4, 8), torch.tensor([0, 1]))
    whole = take(model, batch, 2)
    for layers in (LayerSelection(types=("Linear",)), LayerSelection(include=("*out_proj",))):
        got = take(model, batch, 2, layers=layers)
        assert "0.self_attn.out_proj" in got.layers and "0.self_attn.q_proj" not in got.layers
        name = "0.self_attn.out_proj"
        torch.testing.assert_close(got.layers[name].dense(), whole.layers[name].dense())


def test_attention_of_other_forms_is_left_out() -> None:
    class Other(nn.MultiheadAttention):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out, weights = super().forward(*args, **kwargs)
            return 2 * out, weights

    class Attends(nn.Module):
        def __init__(self, attention: nn.Module) -> None:
            super().__init__()
            self.attention, self.head = attention, nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.attention(x, x, x)[0].mean(dim=1))

    for attention in (
        nn.MultiheadAttention(8, 2, batch_first=True, add_bias_kv=True),
        nn.MultiheadAttention(8, 2, batch_first=True, add_zero_attn=True),
        Other(8, 2, batch_first=True),
    ):
        assert set(take(Attends(attention), (torch.randn(2, 4, 8), torch.tensor([0, 1])), 2).layers) == {"head"}


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("kdim", [None, 6])
@pytest.mark.parametrize("mask", ["none", "causal", "bool", "heads", "padding"])
def test_attention_without_modules_is_autograds(batch_first: bool, kdim: int | None, mask: str) -> None:
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=batch_first, kdim=kdim, vdim=kdim)
            self.keys, self.head = nn.Linear(8, kdim or 8), nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            given: dict[str, Any] = {}
            n, length = x.shape[:2]
            if mask == "causal":
                given = {"attn_mask": nn.Transformer.generate_square_subsequent_mask(length).to(x), "is_causal": True}
            elif mask == "bool":
                given = {"attn_mask": torch.eye(length).roll(1, 0).bool(), "average_attn_weights": False}
            elif mask == "heads":
                its = torch.arange(2 * length * length).reshape(2, length, length).to(x).sin()
                given = {"attn_mask": its.repeat(n, 1, 1)}
            elif mask == "padding":
                given = {"key_padding_mask": torch.arange(length).expand(n, -1) > 2, "need_weights": False}
            keys = self.keys(x)
            h, k = (x, keys) if batch_first else (x.transpose(0, 1), keys.transpose(0, 1))
            out, weights = self.attention(h, k, k.sin(), **given)
            out = out if batch_first else out.transpose(0, 1)
            return self.head(out.mean(dim=1)) + (0 if weights is None else weights.square().flatten(1).sum(1)[:, None])

    torch.manual_seed(0)
    model = Attends().double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    x, y = torch.randn(3, 4, 8, dtype=torch.float64), torch.tensor([0, 1, 2])
    got = take(model, (x, y), 3)
    parts = ("q", "k", "v")
    for i in range(3):
        loss = default_loss(model, (x[i : i + 1], y[i : i + 1])).sum()
        names = ["in_proj_weight"] if kdim is None else [f"{part}_proj_weight" for part in parts]
        held = [getattr(model.attention, name) for name in names]
        *grads, bias, out = torch.autograd.grad(
            loss, [*held, model.attention.in_proj_bias, model.attention.out_proj.weight]
        )
        blocks = grads[0].chunk(3) if kdim is None else grads
        for number, part in enumerate(parts):
            its = got.layers[f"attention.{part}_proj"].dense()[i].double()
            wanted = blocks[number].T
            torch.testing.assert_close(its[: len(wanted)], wanted, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(its[-1], bias.chunk(3)[number], rtol=1e-4, atol=1e-6)
        its = got.layers["attention.out_proj"].dense()[i].double()
        torch.testing.assert_close(its[:-1], out.T, rtol=1e-4, atol=1e-6)


def test_embedding_settings_that_depend_on_the_batch_are_refused() -> None:
    model = nn.Sequential(nn.Embedding(5, 4, max_norm=1.0), nn.Flatten(), nn.Linear(8, 3))
    with pytest.raises(CaptureError, match="'0' has max_norm=1.0"):
        capture_of(model, layers=LayerSelection(embeddings=True))


def test_patterns_and_types() -> None:
    model = gpt2()
    assert set(capture_of(model, layers="*.mlp.c_fc")[1].specs) == {f"transformer.h.{i}.mlp.c_fc" for i in (0, 1)}
    torch.manual_seed(0)
    mixed = Everything()
    assert set(capture_of(mixed, layers=nn.Conv2d)[1].specs) == {"conv2", "depthwise"}
    assert set(capture_of(mixed, layers=[nn.Linear, nn.Embedding])[1].specs) == {"embed", "twice", "head"}
    with pytest.raises(ConfigError, match=r"'nothing\*' matches none.*'embed'"):
        capture_of(mixed, layers="nothing*")
    with pytest.raises(ConfigError, match="leaves no layer"):
        capture_of(mixed, layers=LayerSelection(exclude=("*",)))


def test_mixed_precision_is_close_and_half_models_work() -> None:
    model = gpt2().eval()
    batch = padded_batch()
    exact = dense(take(model, batch, 3, projection_dim=6))
    cast = dense(take(model, batch, 3, projection_dim=6, compute=Compute(autocast="bfloat16")))
    half = dense(take(gpt2().to(torch.bfloat16), batch, 3, projection_dim=6))
    for other in (cast, half):
        for name, g in exact.items():
            assert other[name].dtype == torch.float32
            cosine = functional.cosine_similarity(g.flatten(1), other[name].flatten(1))
            assert float(cosine.min()) > 0.97, name
