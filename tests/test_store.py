"""Shards and the store: bytes come back, damage is found, HDF5 readers agree."""

from __future__ import annotations

import os
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from lorif_index.errors import CorruptionError
from lorif_index.gradients import LayerSpec
from lorif_index.rows import RowLayout
from lorif_index.sealed import SealedInfo, write_sealed
from lorif_index.shards import ShardInfo
from lorif_index.store import Store, StoreWriter

SPECS = {
    "a": LayerSpec("a", 8, 6, 8, 6, 2),
    "b": LayerSpec("b", 4, 4, 4, 4, 4),
    "c": LayerSpec("c", 8, 6, 8, 6, 2),
}


def make(folder: Path, n: int, dtype: str = "float16", per_shard: int = 7) -> tuple[Store, torch.Tensor, np.ndarray]:
    layout = RowLayout(SPECS, dtype)
    rows = torch.randn(n, layout.width).to(layout.torch_dtype)
    ids = np.arange(n, dtype=np.int64) * 3 + 1
    writer = StoreWriter(folder, layout, per_shard * layout.row_bytes, [])
    for i in range(0, n, 5):
        writer.append(rows[i : i + 5], ids[i : i + 5])
    writer.flush()
    return Store(folder, layout, writer.sealed), rows, ids


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_rows_come_back(tmp_path: Path, dtype: str) -> None:
    store, rows, ids = make(tmp_path, 40, dtype)
    assert len(store) == 40 and len(store.shards) == 6
    assert np.array_equal(store.ids, ids)
    for block in (1, store.layout.row_bytes * 3, 1 << 20):
        got = [(start, part.clone()) for start, part in store.stream(block)]
        assert torch.equal(torch.cat([part for _, part in got]), rows)
        assert [start for start, _ in got] == np.cumsum([0, *(len(p) for _, p in got[:-1])]).tolist()
    order = np.array([39, 0, 7, 6, 39, 21])
    assert torch.equal(store.gather(order), rows[torch.from_numpy(order)])
    store.verify()


def test_any_hdf5_reader_reads_a_shard(tmp_path: Path) -> None:
    store, rows, ids = make(tmp_path, 10, per_shard=10)
    with h5py.File(store.shards[0].file.path, "r") as file:
        assert sorted(file) == ["checksums", "ids", "rows"]
        assert file.attrs["dtype"] == "float16"
        assert np.array_equal(file["rows"][...], rows.numpy()) and np.array_equal(file["ids"][...], ids)
        assert file["rows"].chunks is None and file["rows"].compression is None
        assert file["rows"].id.get_offset() == store.shards[0].file.info.offsets["rows"]


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    store, _, _ = make(tmp_path, 10, per_shard=10)
    path = store.shards[0].file.path
    data = path.read_bytes()
    info = store.shards[0].file.info
    generator = np.random.default_rng(0)
    for at in [info.offsets["rows"] + 5, *generator.integers(0, len(data), 30).tolist()]:
        damaged = bytearray(data)
        damaged[at] ^= 1 << int(generator.integers(8))
        path.write_bytes(damaged)
        fresh = Store(tmp_path, store.layout, [ShardInfo.from_json(store_json(store))])
        with pytest.raises(CorruptionError, match="digest"):
            fresh.verify()
        row = (at - info.offsets["rows"]) // store.layout.row_bytes
        if 0 <= row < 10:
            with pytest.raises(CorruptionError, match=f"row {row} .*checksum"):
                fresh.gather(np.arange(10))
    path.write_bytes(data)
    store.verify()


def store_json(store: Store) -> dict[str, object]:
    shard = store.shards[0]
    info = ShardInfo(shard.file.info, shard.count, 1, 28)
    return info.to_json()


def test_truncated_replaced_or_linked_files_are_refused(tmp_path: Path) -> None:
    store, _, _ = make(tmp_path, 10, per_shard=10)
    path, info = store.shards[0].file.path, [ShardInfo.from_json(store_json(store))]
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    with pytest.raises(CorruptionError, match=f"{len(data) - 1} bytes where {len(data)}"):
        next(iter(Store(tmp_path, store.layout, info).stream()))
    path.unlink()
    with pytest.raises(CorruptionError, match="cannot be opened"):
        Store(tmp_path, store.layout, info).gather(np.array([0]))
    (tmp_path / "elsewhere").write_bytes(data)
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CorruptionError, match="cannot be opened"):
        Store(tmp_path, store.layout, info).verify()
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(CorruptionError, match="0 bytes where"):
        Store(tmp_path, store.layout, info).verify()


@pytest.mark.parametrize("name", ["../x.h5", "/etc/passwd", "", "..", 3])
def test_names_that_leave_the_folder_are_refused(name: object) -> None:
    with pytest.raises(CorruptionError):
        SealedInfo.from_json({"file": name, "size": 1, "digest": "", "offsets": {}})


def test_offsets_outside_the_file_are_refused(tmp_path: Path) -> None:
    store, _, _ = make(tmp_path, 10, per_shard=10)
    entry = store_json(store)
    entry["sealed"]["offsets"]["rows"] = 10**9  # type: ignore[index]
    with pytest.raises(CorruptionError, match="manifest is damaged"):
        Store(tmp_path, store.layout, [ShardInfo.from_json(entry)])


def test_a_full_disk_leaves_nothing_under_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, data: object, offset: int) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space"):
        write_sealed(tmp_path, "x.h5", {"rows": np.zeros((4, 4), "<f2")}, {})
    assert list(tmp_path.iterdir()) == []


def test_one_example_is_adjacent(tmp_path: Path) -> None:
    """All layers of an example in one piece of row_bytes bytes."""
    store, rows, _ = make(tmp_path, 10, per_shard=10)
    info = store.shards[0].file.info
    raw = store.shards[0].file.path.read_bytes()
    at = info.offsets["rows"] + 4 * store.layout.row_bytes
    assert raw[at : at + store.layout.row_bytes] == rows[4].numpy().tobytes()
    assert store.layout.row_bytes == 2 * (2 * 2 * (8 + 6) + 16)
