"""Temporary rows come back as they were written, whatever the batches, and a walk cannot change them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from lorif_index.capture import spool as module
from lorif_index.capture.gradients import GradientBlock, LayerGradient
from lorif_index.capture.spool import Spool
from lorif_index.errors import StoreError


def written(counts: list[int], inner: list[int]) -> list[GradientBlock]:
    """Blocks of a dense layer and of one in pairs, whose inner size may differ."""
    generator, at, out = torch.Generator().manual_seed(0), 0, []
    for count, m in zip(counts, inner, strict=True):
        layers = {
            "dense": LayerGradient([torch.randn(count, 3, 2, generator=generator)]),
            "pairs": LayerGradient([torch.randn(count, w, m, generator=generator) for w in (4, 5)]),
        }
        out.append(GradientBlock(np.arange(at, at + count), layers))
        at += count
    return out


def dense(blocks: list[GradientBlock]) -> tuple[np.ndarray, dict[str, torch.Tensor]]:
    ids = np.concatenate([block.ids for block in blocks])
    return ids, {name: torch.cat([block.layers[name].flat() for block in blocks]) for name in ("dense", "pairs")}


@pytest.mark.parametrize("inner", [[2, 2, 2, 2], [2, 2, 3, 3], [1, 2, 1, 2]])
@pytest.mark.parametrize("at_once", [1 << 20, 400, 1])
def test_rows_come_back(inner: list[int], at_once: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_READ_BYTES", at_once)
    blocks = written([5, 3, 6, 1], inner)
    ids, rows = dense(blocks)
    kept = Spool(tmp_path, blocks)
    assert kept.count == 15 and np.array_equal(kept.ids, ids)
    for wanted in (ids, ids[::2], ids[3:11], np.array([0, 1, 4, 8, 9, 14]), ids[:0]):
        for found in (list(kept.sample(wanted)), list(kept.sample(wanted))):
            assert bool(found) == bool(len(wanted))
            if found:
                got, values = dense(found)
                assert np.array_equal(got, wanted)
                assert all(torch.equal(values[name], rows[name][torch.from_numpy(wanted)]) for name in rows)
    got, _ = dense(list(kept.blocks(4, 9)))
    assert got.tolist() == [4, 5, 6, 7, 8]
    if len(set(inner)) == 1 and at_once > 400:
        assert len(list(kept.blocks())) == 1
    kept.close()
    assert not list(tmp_path.iterdir())


def test_a_walk_that_writes_into_its_rows_changes_nothing(tmp_path: Path) -> None:
    blocks = written([4], [2])
    kept = Spool(tmp_path, blocks)
    for block in kept.blocks():
        block.layers["dense"].parts[0].zero_()
    _, again = dense(list(kept.blocks()))
    assert torch.equal(again["dense"], dense(blocks)[1]["dense"])


def test_rows_that_were_cut_off_are_missed(tmp_path: Path) -> None:
    kept = Spool(tmp_path, written([4], [2]))
    file = next(tmp_path.rglob("rows.raw"))
    with file.open("r+b") as opened:
        opened.truncate(file.stat().st_size - 4)
    with pytest.raises(StoreError, match="ended early"):
        list(kept.blocks())
