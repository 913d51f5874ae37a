"""Shards and the store: bytes come back, damage is found, HDF5 readers agree."""

from __future__ import annotations

import os
import threading
from contextlib import nullcontext
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from lorif_index.codecs.layout import RowLayout, Rows

from lorif_index.capture.gradients import LayerSpec
from lorif_index.codecs.bits import CodeLayout
from lorif_index.errors import CorruptionError
from lorif_index.storage.sealed import SealedInfo, write_sealed
from lorif_index.storage.shards import ShardInfo
from lorif_index.storage.store import Store, StoreWriter

SPECS = {
    "a": LayerSpec("a", 8, 6, 8, 6, 2),
    "b": LayerSpec("b", 4, 4, 4, 4, 4),
    "c": LayerSpec("c", 8, 6, 8, 6, 2),
}


def make(
    folder: Path, n: int, dtype: str = "float16", per_shard: int = 7, codes: CodeLayout | None = None
) -> tuple[Store, Rows, np.ndarray]:
    layout = RowLayout(SPECS, dtype, codes=codes)
    factors = torch.randn(n, layout.width).to(layout.torch_dtype)
    rows = layout.rows(factors, codes.encode(torch.randn(n, codes.dim)) if codes else None)
    ids = np.arange(n, dtype=np.int64) * 3 + 1
    writer = StoreWriter(folder, layout, per_shard * layout.row_bytes, [])
    for i in range(0, n, 5):
        writer.append(rows[i : i + 5], ids[i : i + 5])
    writer.flush()
    return Store(folder, layout, writer.sealed), rows, ids


def same(a: Rows, b: Rows) -> bool:
    return torch.equal(a.factors, b.factors) and torch.equal(a.codes, b.codes)


@pytest.mark.parametrize("codes", [None, CodeLayout(13, 4)])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_rows_come_back(tmp_path: Path, dtype: str, codes: CodeLayout | None) -> None:
    store, rows, ids = make(tmp_path, 40, dtype, codes=codes)
    assert len(store) == 40 and len(store.shards) == 6
    assert np.array_equal(store.ids, ids)
    for block in (1, store.layout.row_bytes * 3, 1 << 20):
        blocks = store.stream(block_bytes=block)
        got = [(start, Rows(part.factors.clone(), part.codes.clone())) for start, part in blocks]
        assert same(Rows(*(torch.cat([getattr(p, name) for _, p in got]) for name in ("factors", "codes"))), rows)
        assert [start for start, _ in got] == np.cumsum([0, *(len(p) for _, p in got[:-1])]).tolist()
    order = np.array([39, 0, 7, 6, 39, 21])
    assert same(store.gather(order), rows[torch.from_numpy(order)])
    assert torch.equal(store.all_codes(), rows.codes)


def test_codes_alone_are_rows_too(tmp_path: Path) -> None:
    layout = RowLayout(SPECS, "float16", factors=False, codes=CodeLayout(24, 2))
    rows = layout.rows(None, CodeLayout(24, 2).encode(torch.randn(20, 24)))
    writer = StoreWriter(tmp_path, layout, 7 * layout.row_bytes, [])
    writer.append(rows, np.arange(20))
    writer.flush()
    store = Store(tmp_path, layout, writer.sealed)
    assert layout.row_bytes == 12 and len(store.shards) == 3
    assert same(store.gather(np.arange(20)[::-1].copy()), rows[torch.arange(20).flip(0)])
    with h5py.File(store.shards[0].file.path, "r") as file:
        assert sorted(file) == ["code_checksums", "codes", "ids"]


def test_what_is_not_in_the_page_cache_is_read_all_the_same(tmp_path: Path) -> None:
    """Gathering asks for cached rows first; files that were dropped from the cache give the same."""
    store, rows, _ = make(tmp_path, 400, per_shard=50, codes=CodeLayout(64, 4))
    for shard in store.shards:
        os.posix_fadvise(shard.file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    order = np.random.default_rng(0).permutation(400)
    assert same(store.gather(order), rows[torch.from_numpy(order)])


@pytest.mark.parametrize("flags", [0, 1 << 30])
def test_systems_that_cannot_say_what_is_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: int) -> None:
    """No flag at all, and one that the system refuses."""
    store, rows, _ = make(tmp_path, 20)
    monkeypatch.setattr("lorif_index.storage.sealed._NO_WAIT", flags)
    assert same(store.gather(np.arange(20)), rows)


def test_any_hdf5_reader_reads_a_shard(tmp_path: Path) -> None:
    store, rows, ids = make(tmp_path, 10, per_shard=10, codes=CodeLayout(16, 8))
    with h5py.File(store.shards[0].file.path, "r") as file:
        assert sorted(file) == ["checksums", "code_checksums", "codes", "ids", "rows"]
        assert file.attrs["dtype"] == "float16"
        assert np.array_equal(file["codes"][...], rows.codes.numpy())
        assert np.array_equal(file["rows"][...], rows.factors.numpy()) and np.array_equal(file["ids"][...], ids)
        assert file["rows"].chunks is None and file["rows"].compression is None
        assert file["rows"].id.get_offset() == store.shards[0].file.info.offsets["rows"]


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    store, _, _ = make(tmp_path, 10, per_shard=10, codes=CodeLayout(40, 4))
    path = store.shards[0].file.path
    data = path.read_bytes()
    info = store.shards[0].file.info
    generator = np.random.default_rng(0)
    for at in [info.offsets["rows"] + 5, info.offsets["codes"] + 70, *generator.integers(0, len(data), 30).tolist()]:
        damaged = bytearray(data)
        damaged[at] ^= 1 << int(generator.integers(8))
        path.write_bytes(damaged)
        fresh = Store(tmp_path, store.layout, [ShardInfo.from_json(store_json(store))])
        with pytest.raises(CorruptionError, match="digest"):
            fresh.shards[0].file.verify()
        for part, size in (("rows", store.layout.factor_bytes), ("codes", store.layout.code_bytes)):
            row = (at - info.offsets[part]) // size
            if not 0 <= row < 10:
                continue
            with pytest.raises(CorruptionError, match=f"row {row} .*checksum"):
                fresh.gather(np.arange(10))
    path.write_bytes(data)


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
        Store(tmp_path, store.layout, info).shards[0].file.verify()
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(CorruptionError, match="0 bytes where"):
        Store(tmp_path, store.layout, info).shards[0].file.verify()


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
    assert raw[at : at + store.layout.row_bytes] == rows.factors[4].numpy().tobytes()
    assert store.layout.row_bytes == 2 * (2 * 2 * (8 + 6) + 16)


def test_a_shard_is_written_while_the_next_is_made(tmp_path: Path) -> None:
    layout = RowLayout(SPECS, "float16")
    rows = layout.rows(torch.randn(40, layout.width).half(), None)
    digests = []
    for name in ("alone", "aside"):
        (tmp_path / name).mkdir()
        writer = StoreWriter(tmp_path / name, layout, 7 * layout.row_bytes, [])
        seen: list[int] = []
        with writer.aside(lambda w=writer, s=seen: s.append(len(w.sealed))) if name == "aside" else nullcontext():  # type: ignore[misc]
            told = [writer.append(rows[i : i + 5], np.arange(i, i + 5), np.ones(5)) for i in range(0, 40, 5)]
            writer.flush()
        assert len(writer.sealed) == 6 and any(told) and seen == ([1, 2, 3, 4, 5, 6] if name == "aside" else [])
        digests.append([(s.sealed.file, s.sealed.digest, s.first_id) for s in writer.sealed])
    assert digests[0] == digests[1]
    assert not [t for t in threading.enumerate() if t.name.startswith("lorif-write")]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_what_is_being_written_counts_whatever_ends_the_work(tmp_path: Path, error: type[BaseException]) -> None:
    layout = RowLayout(SPECS, "float16")
    rows = layout.rows(torch.randn(16, layout.width).half(), None)
    writer = StoreWriter(tmp_path, layout, 7 * layout.row_bytes, [])
    noted: list[int] = []
    with pytest.raises(error), writer.aside(lambda: noted.append(len(writer.sealed))):
        writer.append(rows, np.arange(16))
        raise error("of the caller")
    # Two shards are there and counted; the rows that had not filled a third are gone.
    assert noted == [1, 2] and [s.rows for s in writer.sealed] == [7, 7] and len(list(tmp_path.glob("*.h5"))) == 2
    store = Store(tmp_path, layout, writer.sealed)
    assert same(store.gather(np.arange(14)), rows[:14])


def test_an_error_of_the_writer_reaches_the_caller(tmp_path: Path) -> None:
    layout = RowLayout(SPECS, "float16")
    rows = layout.rows(torch.randn(40, layout.width).half(), None)
    names = iter(["a.h5", "b.h5", "c.h5", "d.h5"])
    # Nothing can be renamed to it.
    (tmp_path / "b.h5" / "full").mkdir(parents=True)
    writer = StoreWriter(tmp_path, layout, 7 * layout.row_bytes, [], lambda: next(names))
    with pytest.raises(OSError, match=r"b\.h5"), writer.aside(lambda: None):
        for i in range(0, 40, 5):
            writer.append(rows[i : i + 5], np.arange(i, i + 5))
    assert [s.sealed.file for s in writer.sealed] == ["a.h5"]
    assert {p.name for p in tmp_path.iterdir()} == {"a.h5", "b.h5"}
