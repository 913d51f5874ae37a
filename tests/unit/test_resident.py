"""Rows where they are scored: whatever part of them stays on the device, the same rows come out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lorif_index.capture.gradients import LayerSpec
from lorif_index.codecs.bits import CodeLayout
from lorif_index.codecs.layout import RowLayout, Rows
from lorif_index.storage import resident
from lorif_index.storage.resident import Resident
from lorif_index.storage.store import Store, StoreWriter

N = 50


@pytest.fixture(scope="module", params=["both", "factors", "coordinates", "eigen"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Rows]:
    specs = {"a": LayerSpec("a", 6, 5, 6, 5, 2), "b": LayerSpec("b", 4, 7, 4, 7, 2)}
    codes = CodeLayout(16, 4) if request.param in ("both", "coordinates") else None
    eigen = CodeLayout(30, 2, (17, 13)) if request.param == "eigen" else None
    layout = RowLayout(specs, "float16", factors=request.param != "coordinates", codes=codes, eigen=eigen)
    generator = torch.Generator().manual_seed(0)
    rows = Rows(
        (100 * torch.rand(N, layout.width, generator=generator)).to(layout.torch_dtype),
        torch.randint(0, 256, (N, layout.code_bytes), generator=generator, dtype=torch.uint8),
    )
    folder = tmp_path_factory.mktemp("rows")
    # Shards of 17 rows: what is kept ends inside of one.
    writer = StoreWriter(folder, layout, 17 * layout.row_bytes, [])
    writer.append(rows, np.arange(N))
    writer.flush()
    return Store(folder, layout, writer.sealed), rows


@pytest.mark.parametrize("kept", [0, 1, 17, 20, N, 10 * N])
def test_the_same_rows_come_out(made: tuple[Store, Rows], kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    store, rows = made
    monkeypatch.setattr(resident, "_KEPT_BLOCK_BYTES", 7 * store.layout.row_bytes)
    held = Resident(store, torch.device("cpu"), kept * store.layout.row_bytes)
    assert held.kept == min(kept, N) and len(held) == N
    at, read = 0, 0
    for start, block, size in held.stream():
        assert start == at
        assert torch.equal(block.factors, rows.factors[at : at + len(block)])
        assert torch.equal(block.codes, rows.codes[at : at + len(block)])
        at, read = at + len(block), read + size
    assert at == N and read == (N - held.kept) * store.layout.row_bytes
    for positions in ([], [0], [49], [0, 16, 17, 18, 19, 20, 21, 48, 49], list(range(N))):
        wanted = np.array(positions, dtype=np.int64)
        factors, size = held.factors(wanted)
        assert torch.equal(factors, rows.factors[wanted])
        assert size == int((wanted >= held.kept).sum()) * store.layout.factor_bytes
        codes, size = held.codes(wanted)
        assert torch.equal(codes, rows.codes[wanted]) and size == 0


def test_codes_too_many_to_keep_are_read(made: tuple[Store, Rows], monkeypatch: pytest.MonkeyPatch) -> None:
    store, rows = made
    monkeypatch.setattr(resident, "CODE_BYTES", 0)
    codes, read = Resident(store).codes(np.array([3, 30]))
    assert torch.equal(codes, rows.codes[[3, 30]]) and read == 2 * store.layout.code_bytes
