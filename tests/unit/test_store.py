"""Shards and the store: bytes come back, damage is found, HDF5 readers agree."""

from __future__ import annotations

import importlib.util
import itertools
import os
import threading
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from lorif_index.capture.contents import CONTENT_BYTES
from lorif_index.errors import CorruptionError
from lorif_index.storage import scattered
from lorif_index.storage import store as module
from lorif_index.storage.scattered import Scattered
from lorif_index.storage.sealed import SealedInfo, write_sealed
from lorif_index.storage.shards import (
    BESIDE_PAYLOAD,
    BESIDE_ROW,
    FILE_BYTES,
    Entries,
    ShardInfo,
    shard_bytes_of,
    write_shard,
)
from lorif_index.storage.store import Store, StoreWriter

SIZE = 24


def names() -> Callable[[], str]:
    numbers = itertools.count()
    return lambda: f"shard-{next(numbers)}.h5"


def random_rows(n: int, size: int = SIZE) -> torch.Tensor:
    return torch.randint(0, 256, (n, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(n))


def energies_of(n: int) -> np.ndarray:
    return np.linspace(1, 2, n, dtype=np.float32)


def make(
    folder: Path,
    n: int,
    size: int = SIZE,
    per_shard: int = 7,
    payloads: list[bytes] | None = None,
    contents: np.ndarray | None = None,
) -> tuple[Store, torch.Tensor, np.ndarray]:
    rows, energies = random_rows(n, size), energies_of(n)
    ids = np.arange(n, dtype=np.int64) * 3 + 1
    writer = StoreWriter(folder, size, per_shard * size, [], names())
    for i in range(0, n, 5):
        part = slice(i, i + 5)
        kept = None if payloads is None else payloads[part]
        writer.append(
            Entries(rows[part], ids[part], energies[part], None if contents is None else contents[part], kept)
        )
    writer.flush()
    return Store(folder, size, writer.sealed), rows, ids


def again(store: Store, folder: Path, change: Callable[[dict[str, Any]], None] = lambda entry: None) -> Store:
    """The same store, opened anew by what its first shard's entry says after a change."""
    entry = store.shards[0].info.to_json()
    entry["sealed"]["offsets"] = dict(entry["sealed"]["offsets"])
    change(entry)
    return Store(folder, store.row_bytes, [ShardInfo.from_json(entry)])


WITH = pytest.param(True, marks=pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="no numba"))


@pytest.fixture(params=[False, WITH])
def loop(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether rows are gathered by the compiled loop."""
    made = Scattered()
    monkeypatch.setattr(module, "SCATTERED", made)
    if request.param:
        made.load()
        assert made._loop is not None
    return bool(request.param)


@pytest.mark.parametrize("size", [1, SIZE, 37])
def test_rows_come_back(tmp_path: Path, size: int, loop: bool) -> None:
    store, rows, ids = make(tmp_path, 40, size)
    assert (
        len(store) == 40
        and len(store.shards) == 6
        and store.nbytes == sum(p.stat().st_size for p in tmp_path.iterdir())
    )
    assert np.array_equal(store.ids, ids)
    for block in (1, size * 3, 1 << 20):
        for first in (0, 9, 40):
            got = [(start, part.clone()) for start, part in store.stream(first, block)]
            assert torch.equal(torch.cat([rows[:0], *(p for _, p in got)]), rows[first:])
            assert [start for start, _ in got] == (first + np.cumsum([0, *(len(p) for _, p in got)]))[:-1].tolist()
    order = np.array([39, 0, 7, 6, 39, 21])
    assert torch.equal(store.gather(order), rows[order])
    room = torch.empty(6, size, dtype=torch.uint8)
    assert store.gather(order, out=room) is room and torch.equal(room, rows[order])
    assert store.gather(order[:0]).shape == (0, size)
    assert np.array_equal(store.energies_at(order), energies_of(40)[order])
    assert store.positions_of(np.array([1, 2, 118, 119, 22])).tolist() == [0, -1, 39, -1, 7]


def test_an_empty_store_has_no_rows(tmp_path: Path) -> None:
    store = Store(tmp_path, SIZE, [])
    assert len(store) == 0 and not list(store.stream()) and store.ids.shape == (0,)


def test_removed_rows_and_those_of_damaged_shards_are_dead(tmp_path: Path) -> None:
    made, rows, ids = make(tmp_path, 40)
    infos = [shard.info for shard in made.shards]
    assert made.dead is None and made.live_count == 40 and np.array_equal(made.live_ids, ids)
    # A shard that is not read is not looked at either.
    made.shards[2].file.path.unlink()
    store = Store(tmp_path, SIZE, infos, removed=ids[[0, 39]], damaged=[infos[2].sealed.file])
    dead = np.isin(np.arange(40), [0, 39, *range(14, 21)])
    assert store.dead is not None and np.array_equal(store.dead, dead) and store.live_count == 31
    assert np.array_equal(store.live, np.flatnonzero(~dead)) and np.array_equal(store.live_ids, ids[~dead])
    assert np.array_equal(store.positions_of(ids), np.where(dead, -1, np.arange(40)))
    read = {start: part.clone() for start, part in store.stream()}
    assert torch.equal(torch.cat(list(read.values())), torch.cat([rows[:14], rows[21:]])) and 14 not in read


def test_cached_rows_are_read_by_the_loop(tmp_path: Path, loop: bool) -> None:
    store, rows, _ = make(tmp_path, 400, per_shard=50)
    assert torch.equal(store.gather(np.arange(400)), rows), "and so they are in the cache"
    order, room = np.random.default_rng(0).permutation(400)[:170], torch.zeros(170, SIZE, dtype=torch.uint8)
    read = store._read_cached(list(store._by_shard(order)), room.numpy())
    assert (read == loop).all() and torch.equal(room, rows[order]) == loop
    with store.shards[3].file.path.open("r+b") as file:
        file.truncate(store.shards[3].file.info.offsets["rows"] + 7 * SIZE - 1)
    room.zero_()
    read = store._read_cached(list(store._by_shard(np.arange(150, 200))), room[:50].numpy())
    assert not read[6:].any()
    with pytest.raises(CorruptionError, match="truncated"):
        store.gather(order)


def test_what_is_not_in_the_page_cache_is_read_all_the_same(tmp_path: Path, loop: bool) -> None:
    """Gathering asks for cached rows first; files that were dropped from the cache give the same."""
    store, rows, _ = make(tmp_path, 400, per_shard=50)
    for shard in store.shards:
        with shard.file.path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    order = np.random.default_rng(0).permutation(400)
    assert torch.equal(store.gather(order), rows[order])


@pytest.mark.parametrize("flags", [0, 1 << 30])
@pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="no numba")
def test_systems_that_cannot_say_what_is_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: int) -> None:
    """No flag at all, and one that the system refuses."""
    store, rows, _ = make(tmp_path, 20)
    monkeypatch.setattr("lorif_index.storage.sealed.NO_WAIT", flags)
    monkeypatch.setattr(scattered, "NO_WAIT", flags)
    made = Scattered()
    made.load()
    monkeypatch.setattr(module, "SCATTERED", made)
    assert (made._loop is None) == (flags == 0)
    assert torch.equal(store.gather(np.arange(20)), rows)


def test_any_hdf5_reader_reads_a_shard(tmp_path: Path) -> None:
    store, rows, ids = make(tmp_path, 10, per_shard=10, payloads=[b"x" * i for i in range(10)])
    info = store.shards[0].file.info
    with h5py.File(store.shards[0].file.path, "r") as file:
        assert set(file) == set(info.offsets)
        assert set(file) == {
            *("ids", "rows", "checksums", "energies"),
            *("payloads", "payload_ends", "payload_checksums"),
        }
        assert np.array_equal(file["rows"][...], rows.numpy()) and np.array_equal(file["ids"][...], ids)
        assert np.array_equal(file["energies"][...], energies_of(10)) and file["payloads"][...].tobytes() == b"x" * 45
        assert file["rows"].chunks is None and file["rows"].compression is None
        assert all(file[name].id.get_offset() == offset for name, offset in info.offsets.items())


def test_every_flipped_bit_is_found(tmp_path: Path, loop: bool) -> None:
    store, _, _ = make(tmp_path, 10, per_shard=10)
    path, info = store.shards[0].file.path, store.shards[0].file.info
    data, generator = path.read_bytes(), np.random.default_rng(0)
    for at in [info.offsets["rows"] + 5, *generator.integers(0, len(data), 30).tolist()]:
        damaged = bytearray(data)
        damaged[at] ^= 1 << int(generator.integers(8))
        path.write_bytes(damaged)
        fresh = again(store, tmp_path)
        with pytest.raises(CorruptionError, match="digest"):
            fresh.shards[0].file.verify()
        with pytest.raises(CorruptionError, match="digest"):
            list(fresh.stream())
        row = (at - info.offsets["rows"]) // SIZE
        if 0 <= row < 10:
            with pytest.raises(CorruptionError, match=f"row {row} .*checksum"):
                fresh.gather(np.arange(10))
    path.write_bytes(data)
    again(store, tmp_path).shards[0].file.verify()


@pytest.mark.parametrize(
    ("verify", "seen"), [("always", [False, False]), ("first", [False, True]), ("never", [True, True])]
)
def test_shards_are_compared_as_often_as_was_said(tmp_path: Path, verify: str, seen: list[bool]) -> None:
    """Whether a scan goes through: over a damaged file, and over one that was damaged after a scan."""
    made, _, _ = make(tmp_path, 10, per_shard=10)
    path, infos = made.shards[0].file.path, [made.shards[0].info]
    data = bytearray(path.read_bytes())
    data[made.shards[0].file.info.offsets["rows"]] ^= 1
    after = Store(tmp_path, SIZE, infos, verify=verify)
    list(after.stream())
    path.write_bytes(data)
    for store, fine in zip((Store(tmp_path, SIZE, infos, verify=verify), after), seen, strict=True):
        with nullcontext() if fine else pytest.raises(CorruptionError, match="digest"):
            list(store.stream())


@pytest.mark.parametrize(
    "field", ["rows", "first_id", "last_id", "shift", "ids_digest", "sealed"]
)  # fmt: skip
def test_entries_of_shards_that_cannot_be_are_refused(tmp_path: Path, field: str) -> None:
    store, _, _ = make(tmp_path, 10, per_shard=10)
    for wrong in (None, "x", -1, 1 << 62, 1.5, True, {}):
        if field == "ids_digest" and wrong == "x":
            continue
        with pytest.raises(CorruptionError, match="shard|a file"):
            again(store, tmp_path, lambda entry, wrong=wrong: entry.update({field: wrong}))  # type: ignore[misc]
    with pytest.raises(CorruptionError, match="shard"):
        again(store, tmp_path, lambda entry: entry.pop(field))  # type: ignore[arg-type, return-value]


def test_ids_that_were_not_sealed_are_refused(tmp_path: Path) -> None:
    store, _, ids = make(tmp_path, 10, per_shard=10)
    moved = again(store, tmp_path, lambda entry: entry.update(first_id=101, last_id=128, shift=100))
    assert np.array_equal(moved.ids, ids + 100)
    with pytest.raises(CorruptionError, match="has ids 1 to 28, where rising ones from 0 to 28"):
        _ = again(store, tmp_path, lambda entry: entry.update(first_id=0)).ids
    with pytest.raises(CorruptionError, match="ids .* checksum"):
        _ = again(store, tmp_path, lambda entry: entry.update(ids_digest="0" * 16)).ids


def test_truncated_replaced_or_linked_files_are_refused(tmp_path: Path) -> None:
    store, _, _ = make(tmp_path, 10, per_shard=10)
    path = store.shards[0].file.path
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    with pytest.raises(CorruptionError, match=f"{len(data) - 1} bytes where {len(data)}"):
        next(iter(again(store, tmp_path).stream()))
    path.unlink()
    with pytest.raises(CorruptionError, match="cannot be opened"):
        again(store, tmp_path).gather(np.array([0]))
    (tmp_path / "elsewhere").write_bytes(data)
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CorruptionError, match="cannot be opened"):
        again(store, tmp_path).shards[0].file.verify()
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(CorruptionError, match="0 bytes where"):
        again(store, tmp_path).shards[0].file.verify()


@pytest.mark.parametrize("name", ["../x.h5", "/etc/passwd", "", "..", 3])
def test_names_that_leave_the_folder_are_refused(name: object) -> None:
    with pytest.raises(CorruptionError):
        SealedInfo.from_json({"file": name, "size": 1, "digest": "", "offsets": {}})


@pytest.mark.parametrize("dataset", ["ids", "rows"])
def test_offsets_outside_the_file_are_refused(tmp_path: Path, dataset: str) -> None:
    store, _, _ = make(tmp_path, 10, per_shard=10)
    with pytest.raises(CorruptionError, match="manifest is damaged"):
        again(store, tmp_path, lambda entry: entry["sealed"]["offsets"].update({dataset: 10**9}))
    with pytest.raises(CorruptionError, match="manifest is damaged"):
        again(store, tmp_path, lambda entry: entry["sealed"]["offsets"].pop(dataset))


def test_a_full_disk_leaves_nothing_under_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, data: object, offset: int) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space"):
        write_sealed(tmp_path, "x.h5", {"rows": np.zeros((4, 4), "<f2")})
    assert list(tmp_path.iterdir()) == []


def test_one_example_is_adjacent(tmp_path: Path) -> None:
    """All layers of an example in one piece of row_bytes bytes."""
    store, rows, _ = make(tmp_path, 10, per_shard=10)
    raw = store.shards[0].file.path.read_bytes()
    at = store.shards[0].file.info.offsets["rows"] + 4 * SIZE
    assert raw[at : at + SIZE] == rows[4].numpy().tobytes()


@pytest.mark.parametrize("payloads", [False, True])
def test_sizes_are_known_beforehand(tmp_path: Path, payloads: bool) -> None:
    given, contents = [b"12345"] * 20_000 if payloads else None, np.zeros((20_000, CONTENT_BYTES), np.uint8)
    store, _, _ = make(tmp_path, 20_000, per_shard=10_000, payloads=given, contents=contents)
    rows, beside = shard_bytes_of(20_000, SIZE, 10_000 * SIZE, 5.0 if payloads else 0.0)
    assert rows == 20_000 * (SIZE + BESIDE_ROW) + 2 * FILE_BYTES
    assert beside == 20_000 * (5 + BESIDE_PAYLOAD) * payloads
    assert 0.95 * (rows + beside) < store.nbytes <= rows + beside


def test_payloads_come_back(tmp_path: Path) -> None:
    payloads = [bytes([i]) * (i % 4 * 10) for i in range(40)]
    store, _, _ = make(tmp_path, 40, payloads=payloads)
    for order in ([], [39], [3, 1, 1, 38, 2], list(range(40))):
        assert store.payloads(np.array(order, dtype=np.int64)) == [payloads[i] for i in order]
    assert all(shard.has_payloads for shard in store.shards) and len(store.shards) == 6
    # Large payloads fill a shard before its rows do.
    (tmp_path / "large").mkdir()
    large = make(tmp_path / "large", 40, payloads=[b"x" * 100] * 40)[0]
    assert len(large.shards) == 8 and large.payloads(np.array([17])) == [b"x" * 100]
    (tmp_path / "without").mkdir()
    bare = make(tmp_path / "without", 10)[0]
    assert bare.payloads(np.array([0, 9])) == [None, None]


def test_a_damaged_payload_is_found(tmp_path: Path) -> None:
    store, _, _ = make(tmp_path, 10, per_shard=100, payloads=[b"payload %d" % i for i in range(10)])
    path, info = store.shards[0].file.path, store.shards[0].file.info
    data = bytearray(path.read_bytes())
    data[info.offsets["payloads"] + 3 * 9 + 1] ^= 1
    path.write_bytes(data)
    fresh = again(store, tmp_path)
    assert fresh.payloads(np.array([2, 4])) == [b"payload 2", b"payload 4"]
    with pytest.raises(CorruptionError, match="payload of row 3 .*checksum"):
        fresh.payloads(np.array([2, 3]))


def test_the_same_rows_give_the_same_file(tmp_path: Path) -> None:
    rows, ids = random_rows(9), np.arange(9)
    one, two = (write_shard(tmp_path, f"{name}.h5", Entries(rows, ids, energies_of(9))) for name in "ab")
    assert (tmp_path / "a.h5").read_bytes() == (
        tmp_path / "b.h5"
    ).read_bytes() and one.sealed.digest == two.sealed.digest
    assert one.span == (0, 9) and ShardInfo.from_json(one.to_json()) == one


def test_a_shard_is_written_while_the_next_is_made(tmp_path: Path) -> None:
    rows, digests = random_rows(40), []
    for name in ("alone", "aside"):
        (tmp_path / name).mkdir()
        writer = StoreWriter(tmp_path / name, SIZE, 7 * SIZE, [], names())
        seen: list[int] = []
        with writer.aside(lambda w=writer, s=seen: s.append(len(w.sealed))) if name == "aside" else nullcontext():  # type: ignore[misc]
            for i in range(0, 40, 5):
                writer.append(Entries(rows[i : i + 5], np.arange(i, i + 5), energies_of(5)))
            writer.flush()
        assert len(writer.sealed) == 6 and seen == ([1, 2, 3, 4, 5, 6] if name == "aside" else [])
        digests.append([(s.sealed.file, s.sealed.digest, s.first_id) for s in writer.sealed])
    assert digests[0] == digests[1]
    assert not [t for t in threading.enumerate() if t.name.startswith("lorif-write")]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_what_is_being_written_counts_whatever_ends_the_work(tmp_path: Path, error: type[BaseException]) -> None:
    rows, writer = random_rows(16), StoreWriter(tmp_path, SIZE, 7 * SIZE, [], names())
    noted: list[int] = []
    with pytest.raises(error), writer.aside(lambda: noted.append(len(writer.sealed))):
        writer.append(Entries(rows, np.arange(16), energies_of(16)))
        raise error("of the caller")
    # Two shards are there and counted; the rows that had not filled a third are gone.
    assert noted == [1, 2] and [s.rows for s in writer.sealed] == [7, 7] and len(list(tmp_path.glob("*.h5"))) == 2
    assert torch.equal(Store(tmp_path, SIZE, writer.sealed).gather(np.arange(14)), rows[:14])


def test_an_error_of_the_writer_reaches_the_caller(tmp_path: Path) -> None:
    rows, given = random_rows(40), iter(["a.h5", "b.h5", "c.h5", "d.h5"])
    # Nothing can be renamed to it.
    (tmp_path / "b.h5" / "full").mkdir(parents=True)
    writer = StoreWriter(tmp_path, SIZE, 7 * SIZE, [], lambda: next(given))
    with pytest.raises(OSError, match=r"b\.h5"), writer.aside(lambda: None):
        for i in range(0, 40, 5):
            writer.append(Entries(rows[i : i + 5], np.arange(i, i + 5), energies_of(5)))
    assert [s.sealed.file for s in writer.sealed] == ["a.h5"]
    assert {p.name for p in tmp_path.iterdir()} == {"a.h5", "b.h5"}
