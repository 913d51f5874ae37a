"""The largest of each group: stored as said, lost as theory has it, scored as decoded, nothing lost at the edges."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import damped, forge, inside_scores, lambdas, reader_of, within
from hypothesis import given, settings
from hypothesis import strategies as st
from lorif_index.codecs.largest import GROUPS, LargestCodec, LargestLayout, code_bits, kept_share

from lorif_index import BuildConfig, CoarseIndex, Index
from lorif_index.codecs.eigencodes import EigenCodec, Way
from lorif_index.errors import CorruptionError, FingerprintError


def layout_of(group: int, *units: int) -> LargestLayout:
    """Pieces of so many groups."""
    return LargestLayout(sum(units) * group, group, tuple(count * group for count in units))


def by_hand(z: np.ndarray, layout: LargestLayout) -> np.ndarray:
    """What rows stand for, in float64, without packing: the largest of each group, |z|^2 / sum |largest| long."""
    out = np.zeros_like(z, dtype=np.float64)
    for row, made in zip(z.astype(np.float64), out, strict=True):
        at = 0
        for width in layout.widths:
            piece = row[at : at + width]
            places = [g + int(np.abs(piece[g : g + layout.group]).argmax()) for g in range(0, width, layout.group)]
            if np.abs(piece[places]).sum() > 0:
                scale = (piece**2).sum() / np.abs(piece[places]).sum()
                made[[at + p for p in places]] = scale * np.where(piece[places] >= 0, 1.0, -1.0)
            at += width
    return out


@pytest.mark.parametrize("group", GROUPS)
def test_rows_stand_for_the_largest_of_each_group(group: int) -> None:
    torch.manual_seed(0)
    layout = layout_of(group, 17, 0, 1, 9)
    z = torch.randn(20, layout.dim) * torch.logspace(-6, 6, 20)[:, None]
    z[3, : layout.widths[0]] = 0.0
    z[4] = 0.0
    codes = layout.encode(z)
    assert codes.shape == (20, layout.row_bytes) and codes.dtype == torch.uint8
    assert layout.row_bytes - layout.packed == 2 * 4
    least = -(-27 * code_bits(group) // 8)
    assert least <= layout.packed <= least + Way(code_bits(group)).together and layout.packed % 2 == 0
    expected = by_hand(z.numpy(), layout)
    # Scales are bfloat16.
    np.testing.assert_allclose(layout.decode(codes).numpy(), expected, rtol=2**-8)
    assert bool((layout.decode(codes)[4] == 0).all())


@pytest.mark.parametrize("group", GROUPS)
def test_gaussian_rows_keep_what_theory_says(group: int) -> None:
    torch.manual_seed(0)
    layout = layout_of(group, 64)
    z = torch.randn(300, layout.dim)
    back = layout.decode(layout.encode(z))
    cosine = (back * z).sum(1) / back.norm(dim=1) / z.norm(dim=1)
    assert abs(float(cosine.square().mean()) / kept_share(group) - 1) < 0.03
    assert abs(float(cosine.mean()) / layout.cosine - 1) < 0.02
    along = (back * z).sum(1) / z.square().sum(1)
    assert torch.allclose(along, torch.ones(300), atol=5e-3)


def test_a_bit_keeps_more_in_larger_groups() -> None:
    by_bit = [0.6366, *(kept_share(g) * g / code_bits(g) for g in GROUPS)]
    assert by_bit == sorted(by_bit) and 0.99 < by_bit[-1] < 2 * np.log(2)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("queries", [1, 8, 9, 70])
def test_scores_are_inner_products_with_what_is_stored(group: int, queries: int) -> None:
    torch.manual_seed(0)
    layout = layout_of(group, 7, 0, 12)
    codes, x = layout.encode(torch.randn(1100, layout.dim)), torch.randn(queries, layout.dim)
    expected = x.double() @ layout.decode(codes).double().T
    scorer = layout.scorer(x)
    assert float((scorer.score(codes) - expected).abs().max()) < 1e-5 * float(expected.abs().max())
    assert scorer.score(codes[:0]).shape == (queries, 0)
    weights = torch.rand(layout.dim)
    squares = layout.decode(codes).double().square() @ weights.double()
    assert torch.allclose(layout.squares(codes, weights).double(), squares, rtol=1e-4)


@settings(deadline=None, max_examples=30)
@given(st.sampled_from(GROUPS), st.integers(0, 2**32 - 1), st.sampled_from([1e-30, 1.0, 1e30]))
def test_nothing_overflows_and_ties_have_a_place(group: int, seed: int, size: float) -> None:
    layout = layout_of(group, 5)
    values = np.random.default_rng(seed).integers(-2, 3, size=(4, layout.dim)).astype(np.float32)
    z = torch.from_numpy(values * np.float32(size))
    back = layout.decode(layout.encode(z))
    assert bool(torch.isfinite(back).all())
    kept = back.numpy() != 0
    assert (kept.reshape(4, -1, group).sum(axis=2) <= 1).all()
    # What is kept is one of the largest, with its sign (+ where all of a group is zero).
    largest = np.abs(values).reshape(4, -1, group).max(axis=2).repeat(group, axis=1)
    assert (np.abs(values)[kept] == largest[kept]).all()
    assert ((np.sign(back.numpy()) == np.sign(values)) | (values == 0))[kept].all()


# -- indexes of such rows ----------------------------------------------------------------------------------------------

WHITE = {"first": (20, 16), "second": (12, 12)}


def white(folder: Path, store: str, size: int, **settings: Any) -> tuple[Index, dict[str, np.ndarray]]:
    """An index of gradients whose directions all add as much, and these gradients in float64."""
    generator = np.random.default_rng(5)
    g = {name: generator.normal(size=(300, *shape)).astype(np.float32) for name, shape in WHITE.items()}
    fixed: dict[str, Any] = dict(curvature_rank=None, curvature="empirical", coarse=None)
    config = BuildConfig(**(fixed | settings), store=store, eigen_bytes=size)
    index = Index.build(folder / store, gradients=[g], config=config, progress=False)
    return index, {name: part.astype(np.float64) for name, part in g.items()}


def kept(index: Index) -> dict[str, torch.Tensor]:
    codec = reader_of(index).codec
    assert isinstance(codec, EigenCodec) and isinstance(codec, LargestCodec) == (index.codec == "largest")
    return {name: part.directions for name, part in codec.layers.items()}


def test_the_largest_of_groups_say_more_of_many_directions(tmp_path: Path) -> None:
    query = {name: np.random.default_rng(6).normal(size=(12, *shape)) for name, shape in WHITE.items()}
    asked = {name: torch.from_numpy(q).float() for name, q in query.items()}
    near, size = {}, 20
    room = 8 * (size - 4)
    for store in ("eigen", "largest"):
        index, rows = white(tmp_path, store, size)
        count = sum(len(directions) for directions in kept(index).values())
        assert index.codec == store and index.bytes_per_example <= size
        assert count <= room if store == "eigen" else count > room
        lam = lambdas(index, rows, 0.3)
        means = {name: g.double().numpy() for name, g in index.gradients(index.ids).items()}
        scores = index.scores(asked, damping=0.3)
        assert within(scores, inside_scores(index, query, means, lam, index.layers), 1e-4)
        assert within(index.scores({n: q[:1] for n, q in asked.items()}, damping=0.3)[0], scores[0], 1e-4)
        hits = index.search(asked, k=7, damping=0.3)
        assert within(hits.scores, -np.sort(-scores, axis=1)[:, :7], 1e-5)
        assert hits.stats.dtype == ("1 bits" if store == "eigen" else "largest of 8") and hits.stats.codec == store
        whole = inside_scores(index, query, rows, lam, index.layers)
        near[store] = np.corrcoef(scores.ravel(), whole.ravel())[0, 1]
        # Self-influence is that within the kept directions, made neither longer nor shorter.
        true = np.zeros(len(index))
        for name, directions in kept(index).items():
            layer = index.curvature[name]
            inside = rows[name].reshape(len(index), -1) @ layer.basis.double().numpy()
            true += (inside**2 / damped(layer, lam[name]))[:, directions].sum(axis=1)
        assert 0.85 < index.self_influence(damping=0.3).mean() / true.mean() < 1.15
        index.verify()
        again = Index.open(tmp_path / store)
        assert np.array_equal(again.scores(asked, damping=0.3), scores)
    assert near["largest"] > near["eigen"] + 0.05 > 0.3


@pytest.mark.parametrize("field", ["bits", "group", "counts", "codec"])
def test_rows_of_other_codes_are_not_merged(field: str, tmp_path: Path) -> None:
    first, _ = white(tmp_path, "largest", 20)
    second, _ = white(tmp_path / "second", "largest", 20)

    def change(facts: dict[str, Any]) -> None:
        # The same directions in more room, as another code would take them.
        entry = facts["fits"]["codec"]
        if field == "codec":
            facts["codec"] = "eigen"
        entry |= {"bits": {"bits": 8, "group": 1}, "group": {"group": 16}, "counts": {"counts": [8, 8]}}.get(field, {})

    forge(second.path, change)
    with pytest.raises(FingerprintError, match="rows" if field == "codec" else "codec"):
        Index.merge(tmp_path / "merged", [first.path, second.path], progress=False)


@pytest.mark.parametrize(
    "wrong", [{"group": 0}, {"group": 12}, {"group": -8}, {"group": 1e308}, {"bits": 5}, {"counts": [121, 128]}]
)
def test_groups_that_cannot_be_are_refused(wrong: dict[str, Any], tmp_path: Path) -> None:
    index, _ = white(tmp_path, "largest", 20)
    index.close()

    def change(facts: dict[str, Any]) -> None:
        entry = facts["fits"]["codec"]
        assert entry["group"] == 8 and entry["bits"] == 4
        entry |= wrong

    forge(index.path, change)
    with pytest.raises(CorruptionError, match="entry of the codec is damaged"):
        Index.open(index.path)


@pytest.mark.parametrize("size", [19, 20, 21, 23, 25, 38])
@pytest.mark.parametrize("store", ["eigen", "largest"])
def test_rows_are_never_longer_than_said(size: int, store: str, tmp_path: Path) -> None:
    assert white(tmp_path, store, size)[0].bytes_per_example <= size


def test_every_direction_has_its_bits_where_there_is_room(tmp_path: Path) -> None:
    index, _ = white(tmp_path, "largest", 400)
    codec = reader_of(index).codec
    assert index.codec == "largest" and codec.label == "4 bits"
    # Of the first layer as many as there are examples.
    assert [len(directions) for directions in kept(index).values()] == [300, 12 * 12]


def test_the_largest_of_groups_are_proposed_by_a_sketch(tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    index, _ = white(tmp_path, "largest", 20, coarse=CoarseIndex(kind="flat", dim=64))
    asked = {name: part[:5] for name, part in index.gradients(index.ids[:5]).items()}
    hits = index.search(asked, k=1, exact=False)
    assert hits.ids[:, 0].tolist() == [0, 1, 2, 3, 4] and not hits.stats.exact and hits.stats.candidates > 0
    added = index.add(gradients=[asked], progress=False)
    assert (index.search(asked, k=2, exact=True).scores[:, 1] > 0).all() and len(added) == 5
