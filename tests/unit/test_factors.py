"""Factors: what is stored is what was given, and what half precision cannot hold is told."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lorif_index.capture.gradients import GradientBlock, LayerGradient, LayerSpec
from lorif_index.codecs.factors import FactorCodec, groups_of
from lorif_index.codecs.truncation import factorise
from lorif_index.errors import NonFiniteError

SPECS = {
    "a": LayerSpec("a", 8, 6, 8, 6, 2),
    "full": LayerSpec("full", 4, 5, 4, 5, 4),
    "c": LayerSpec("c", 8, 6, 8, 6, 2),
    "one": LayerSpec("one", 7, 3, 7, 3, 1),
}
NAMES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def block(scale: float = 1.0, n: int = 40) -> GradientBlock:
    generator = torch.Generator().manual_seed(0)
    layers = {
        name: LayerGradient.from_pair(
            scale * torch.randn(n, spec.d_in, 5, generator=generator),
            torch.randn(n, spec.d_out, 5, generator=generator),
        )
        for name, spec in SPECS.items()
    }
    return GradientBlock(np.arange(100, 100 + n), layers)


def test_layers_of_one_shape_lie_together() -> None:
    groups = groups_of(SPECS)
    assert [group.names for group in groups] == [("a", "c"), ("full",), ("one",)]
    assert [group.dense for group in groups] == [False, True, False]
    widths = [2 * 2 * (8 + 6), 4 * 5, 7 + 3]
    assert [group.width for group in groups] == widths and [group.offset for group in groups] == [0, 56, 76]
    codec = FactorCodec(SPECS, {}, "float16")
    assert codec.width == sum(widths) and codec.row_bytes == 2 * codec.width


@pytest.mark.parametrize("dtype", NAMES)
def test_stored_factors_are_those_of_the_gradient(dtype: str) -> None:
    codec, given = FactorCodec(SPECS, {}, dtype), block()
    encoder = codec.encoder(torch.device("cpu"))
    rows, wanted = encoder.encode(given), factorise(given, SPECS)
    found = codec.factors(rows)
    assert list(found) == list(SPECS) and encoder.vanished == 0
    for name, part in found.items():
        assert torch.equal(part.left, wanted[name].left.to(NAMES[dtype]).float())
        assert (part.right is None) == SPECS[name].dense
        if part.right is not None:
            assert torch.equal(part.right, wanted[name].right.to(NAMES[dtype]).float())  # type: ignore[union-attr]
        assert torch.allclose(codec.decode(rows)[name], part.dense().flatten(1))


def test_numbers_beyond_half_precision_are_named() -> None:
    half = FactorCodec(SPECS, {}, "float16").encoder(torch.device("cpu"))
    with pytest.raises(
        NonFiniteError, match=r"example 1\d\d overflow float16: build with BuildConfig\(dtype='bfloat16'"
    ):
        half.encode(block(1e10))
    with pytest.raises(NonFiniteError, match=r"factors of all 40 examples underflow to zero in float16"):
        half.encode(block(1e-20))
        half.check()
    for dtype in ("bfloat16", "float32"):
        encoder = FactorCodec(SPECS, {}, dtype).encoder(torch.device("cpu"))
        assert encoder.encode(block(1e10)).any() and encoder.encode(block(1e-20)).any() and encoder.vanished == 0


def test_gradients_that_vanish_in_some_layers_are_counted() -> None:
    given = block()
    given.layers["one"] = given.layers["one"].scaled(1e-20)
    # A gradient that was zero already is none that vanished.
    given.layers["c"] = LayerGradient.from_dense(torch.zeros(40, 8, 6))
    codec = FactorCodec(SPECS, {}, "float16")
    encoder = codec.encoder(torch.device("cpu"))
    for times in (1, 2):
        rows = encoder.encode(given)
        assert encoder.vanished == 40 * times
    assert not codec.decode(rows)["one"].any() and not codec.decode(rows)["c"].any()
    zero = GradientBlock(given.ids, {name: part.scaled(0.0) for name, part in given.layers.items()})
    assert not encoder.encode(zero).any()
