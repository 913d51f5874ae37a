"""Rows where they are scored: whatever part of them stays on the device, the same rows come out."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from lorif_index.storage import resident
from lorif_index.storage.resident import Resident
from lorif_index.storage.shards import Entries
from lorif_index.storage.store import Store, StoreWriter

N, SIZE = 50, 22


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, torch.Tensor]:
    rows = torch.randint(0, 256, (N, SIZE), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    folder, numbers = tmp_path_factory.mktemp("rows"), itertools.count()
    # Shards of 17 rows: what is kept ends inside of one.
    writer = StoreWriter(folder, SIZE, 17 * SIZE, [], lambda: f"{next(numbers)}.h5")
    writer.append(Entries(rows, np.arange(N), np.ones(N, np.float32)))
    writer.flush()
    return Store(folder, SIZE, writer.sealed), rows


@pytest.mark.parametrize("kept", [0, 1, 17, 20, N, 10 * N])
def test_the_same_rows_come_out(made: tuple[Store, torch.Tensor], kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    store, rows = made
    monkeypatch.setattr(resident, "_KEPT_BLOCK_BYTES", 7 * SIZE)
    held = Resident(store, torch.device("cpu"), kept * SIZE + SIZE - 1)
    assert held.kept == min(kept, N) and len(held) == N
    at, read = 0, 0
    for start, block, size in held.stream():
        assert start == at and torch.equal(block, rows[at : at + len(block)])
        at, read = at + len(block), read + size
    assert at == N and read == (N - held.kept) * SIZE
    for positions in ([], [0], [49], [0, 16, 17, 18, 19, 20, 21, 48, 49], list(range(N))):
        wanted = np.array(positions, dtype=np.int64)
        found, size = held.gather(wanted)
        assert torch.equal(found, rows[wanted]) and size == int((wanted >= held.kept).sum()) * SIZE
