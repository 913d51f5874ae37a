"""Hostile indexes, one by one: refused with the library's own error before anything is allocated or read; nothing that
opening an index does reads a file outside of its folder."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from lorif_index.search.faiss_file import check_faiss

from bench.faults_cases import ROWS, Case, N, blocks, query, read_json, write_manifest
from bench.faults_damage import reseal
from lorif_index import Index
from lorif_index.errors import ConfigError, CorruptionError, LorifError
from lorif_index.search.coarse import Coarse, faiss_is_installed

pytestmark = pytest.mark.skipif(not faiss_is_installed(), reason="needs faiss")

ROOT = Path(__file__).parents[2]
KINDS = (
    "Flat SQ4 SQ8 SQfp16 PQ8x4fs PQ8x4 IVF8,Flat IVF8,SQ8 IVF8,PQ8x4fs IVF8,PQ8x4 HNSW8 HNSW8,SQ8 RaBitQ IVF8,RaBitQ "
    "PCA8,PQ8x4fs OPQ8,PQ8x4 RR,SQ4 L2norm,Flat"
).split()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile") / "i"
    Index.build(folder, config=Case("factors").config, progress=False, **Case("factors").given(0, N)).close()
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    (tmp_path / "outside").write_bytes(b"nobody may read this" * 1000)
    shutil.copytree(made, tmp_path / "i")
    return tmp_path / "i"


def use(folder: Path) -> None:
    """Everything that reads files."""
    with Index.open(folder) as index:
        index.scores(query())
        index.search(query(), k=5, exact=False)
        index.payloads()
        index.gradients(index.ids)


def refused(folder: Path) -> None:
    """Quickly, and as damage."""
    began = time.perf_counter()
    with pytest.raises(LorifError):
        use(folder)
    assert time.perf_counter() - began < 1.0
    with pytest.raises(LorifError):
        Index.open(folder).verify()


# -- files that are no files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["shard-000001.h5", "curvature.h5", "sketch.h5", "coarse-*", "manifest.json"])
@pytest.mark.parametrize("way", ["empty", "short", "long", "gone", "link", "fifo", "folder", "other"])
def test_files_that_are_something_else(folder: Path, pattern: str, way: str) -> None:
    path = next(folder.glob(pattern))
    data = path.read_bytes()
    path.unlink()
    if way == "link":
        path.symlink_to(folder.parent / "outside")
    elif way == "fifo":
        os.mkfifo(path)
    elif way == "folder":
        path.mkdir()
    elif way != "gone":
        other = next(folder.glob("calibration.h5")).read_bytes()
        path.write_bytes({"empty": b"", "short": data[:-1], "long": data + b"\0", "other": other}[way])
    refused(folder)


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "", ".", "..", "a/b", "manifest.json", 3, None, "\0"])
@pytest.mark.parametrize("entry", ["shard", "curvature", "sketch", "coarse"])
def test_names_that_leave_the_folder(folder: Path, entry: str, name: Any) -> None:
    data = read_json(folder / "manifest.json")
    owner = data["shards"][0]["sealed"] if entry == "shard" else data[entry]
    (owner if entry in ("shard", "curvature") else owner["file"])["file"] = name
    write_manifest(folder / "manifest.json", data)
    refused(folder)


def test_a_link_inside_of_the_folder_is_refused_too(folder: Path) -> None:
    path = folder / "shard-000000.h5"
    path.rename(folder / "aside")
    path.symlink_to("aside")
    refused(folder)


# -- sizes that cannot be --------------------------------------------------------------------------------------------

ENORMOUS: dict[str, Callable[[dict[str, Any]], None]] = {
    "rows of a shard": lambda m: m["shards"][-1].update(rows=2**40, last_id=2**41),
    "a layer's width": lambda m: m["layers"][0].update(d_in=2**30),
    "directions": lambda m: m["curvature_layers"][0].update(rank=2**40, spectrum=2**40),
    "eigenvalues": lambda m: m["curvature_layers"][0].update(spectrum=2**40),
    "the sketch": lambda m: m["sketch"].update(dim=2**40),
    "weights": lambda m: m["sketch"].update(counts=[2**40, 2**40]),
    "an offset": lambda m: m["curvature"]["offsets"].update(basis_0=2**62),
    "a size": lambda m: m["curvature"].update(size=2**62),
    "an offset below nothing": lambda m: m["curvature"]["offsets"].update(basis_0=-8),
    "payloads": lambda m: m["shards"][0]["sealed"]["offsets"].update(payload_ends=0),
}


@pytest.mark.parametrize("what", ENORMOUS)
def test_enormous_sizes_are_refused_before_memory_is_taken(folder: Path, what: str) -> None:
    data = read_json(folder / "manifest.json")
    ENORMOUS[what](data)
    write_manifest(folder / "manifest.json", data)
    before = _peak()
    with pytest.raises(LorifError):
        use(folder)
    assert _peak() - before < 200 << 20


def _peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


# -- HDF5 that is more than numbers ----------------------------------------------------------------------------------


def _external_link(file: h5py.File, outside: Path) -> None:
    file["ids"] = h5py.ExternalLink(str(outside), "/ids")


def _external_storage(file: h5py.File, outside: Path) -> None:
    file.create_dataset("ids", (100,), "<i8", external=[(str(outside), 0, 800)])


def _virtual(file: h5py.File, outside: Path) -> None:
    layout = h5py.VirtualLayout(shape=(100,), dtype="<i8")
    layout[:] = h5py.VirtualSource(str(outside), "ids", shape=(100,))
    file.create_virtual_dataset("ids", layout)


def _soft_link(file: h5py.File, outside: Path) -> None:
    file["ids"] = h5py.SoftLink("/ids")


def _bomb(file: h5py.File, outside: Path) -> None:
    file.create_dataset("ids", (1 << 24,), "<i8", chunks=(1 << 20,), compression="gzip", fillvalue=0)


def _enormous(file: h5py.File, outside: Path) -> None:
    file.create_dataset("ids", (1 << 50,), "<i8", chunks=(1 << 16,))


def _references(file: h5py.File, outside: Path) -> None:
    file.create_dataset("ids", (10,), h5py.ref_dtype)


def _committed(file: h5py.File, outside: Path) -> None:
    file["kind"] = np.dtype("<i8")
    file.create_dataset("ids", (10,), dtype=file["kind"])


def _filter(file: h5py.File, outside: Path) -> None:
    # Number 32015 (zstd) would be loaded as a plugin; optional here, so that the file can be made without it.
    plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plist.set_chunk((10,))
    plist.set_filter(32015, h5py.h5z.FLAG_OPTIONAL, (3,))
    h5py.h5d.create(file.id, b"ids", h5py.h5t.NATIVE_INT64, h5py.h5s.create_simple((10,)), plist)


TRICKS = [
    _external_link, _external_storage, _virtual, _soft_link, _bomb, _enormous, _references, _committed, _filter,
]  # fmt: skip


@pytest.mark.parametrize("pattern", ["shard-000000.h5", "curvature.h5", "sketch.h5"])
def test_hostile_hdf5_is_never_parsed(made: Path, tmp_path: Path, pattern: str) -> None:
    """In the place of a file, with a manifest that says it is right: its bytes may be taken as numbers, no more."""
    outside = tmp_path / "outside"
    outside.write_bytes(b"nobody may read this" * 1000)
    for trick in TRICKS:
        folder = tmp_path / trick.__name__
        shutil.copytree(made, folder)
        path = folder / pattern
        room = path.stat().st_size
        path.unlink()
        with h5py.File(path, "w") as file:
            trick(file, outside)
        # Room for what the manifest says lies in it.
        data = path.read_bytes().ljust(room, b"\0")
        path.write_bytes(data)
        manifest = read_json(folder / "manifest.json")
        entry = {
            "shard-000000.h5": manifest["shards"][0]["sealed"],
            "curvature.h5": manifest["curvature"],
            "sketch.h5": manifest["sketch"]["file"],
        }[pattern]
        reseal(folder, manifest, entry, data)
    opened = _opened(tmp_path)
    assert all(any(trick.__name__ in path for path in opened) for trick in TRICKS)
    assert not [path for path in opened if "outside" in path]


def _opened(root: Path) -> list[str]:
    """Files that are opened while indexes are used, by any library of the process: their system calls are traced, where
    that is possible; else Python tells of its own."""
    code = (
        "import sys\nfrom pathlib import Path\n"
        "sys.path[:0] = ['tests', '.']\n"
        "from test_hostile import use\n"
        "from lorif_index.errors import LorifError\n"
        "sys.addaudithook(lambda e, a: print(a[0]) if e == 'open' else None)\n"
        "for folder in Path(sys.argv[1]).iterdir():\n"
        "    try:\n        use(folder)\n    except LorifError:\n        pass\n"
    )
    line = [sys.executable, "-c", code, str(root)]
    tracer = shutil.which("strace")
    if tracer is not None:
        line = [tracer, "-f", "-e", "trace=open,openat", *line]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return [line for line in (done.stdout + done.stderr).splitlines() if str(root) in line]


# -- faiss -----------------------------------------------------------------------------------------------------------


def _written(kind: str, rows: np.ndarray) -> bytes:
    import faiss

    index = faiss.index_factory(rows.shape[1], kind, faiss.METRIC_INNER_PRODUCT)
    index.train(rows)
    index.add(rows)
    return bytes(faiss.serialize_index(index).tobytes())


def _check(data: bytes) -> Any:
    def read(offset: int, view: memoryview) -> None:
        view[:] = data[offset : offset + len(view)]

    return check_faiss(read, len(data))


@pytest.fixture(scope="module")
def z() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((300, 16)).astype(np.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_what_faiss_writes_is_walked_to_its_end(kind: str, z: np.ndarray) -> None:
    data = _written(kind, z)
    facts = _check(data)
    assert (facts.dim, facts.count, facts.metric) == (16, 300, 0)
    for wrong in (data[:-1], data + b"\0", data[: len(data) // 2], b"", b"\0" * 100):
        with pytest.raises(CorruptionError):
            _check(wrong)


@pytest.mark.parametrize("kind", ["Flat,RFlat", "RaBitQfs"])
def test_kinds_that_are_not_read_are_not_built(kind: str, z: np.ndarray) -> None:
    with pytest.raises(ConfigError, match="not read back"):
        Coarse.train(kind, z)


def _forged(folder: Path, data: bytes) -> None:
    path = next(folder.glob("coarse-*"))
    path.write_bytes(data)
    manifest = read_json(folder / "manifest.json")
    reseal(folder, manifest, manifest["coarse"]["file"], data)


@pytest.mark.parametrize(
    "place",
    [(4, "<i", 2**31 - 1), (4, "<i", 0), (8, "<q", 2**62), (8, "<q", -1), (16 + 20, "<i", 23), (0, "<4s", b"xxxx")],
)
def test_a_forged_faiss_header(folder: Path, place: tuple[int, str, Any]) -> None:
    at, form, value = place
    data = bytearray(next(folder.glob("coarse-*")).read_bytes())
    struct.pack_into(form, data, at, value)
    _forged(folder, bytes(data))
    with pytest.raises(CorruptionError):
        Index.open(folder).search(query(), k=5, exact=False)


def test_inverted_lists_in_another_file_are_refused(folder: Path) -> None:
    import faiss

    rows = np.random.default_rng(0).standard_normal((N, 16)).astype(np.float32)
    index = faiss.index_factory(16, "IVF8,Flat", faiss.METRIC_INNER_PRODUCT)
    index.train(rows)
    lists = faiss.OnDiskInvertedLists(8, index.code_size, str(folder.parent / "lists"))
    index.replace_invlists(lists)
    index.add(rows)
    data = bytes(faiss.serialize_index(index).tobytes())
    assert b"ilod" in data and str(folder.parent / "lists").encode() in data
    _forged(folder, data)
    with pytest.raises(CorruptionError, match="ilod"):
        Index.open(folder).search(query(), k=5, exact=False)


def test_other_kinds_of_faiss_files_are_refused(folder: Path, z: np.ndarray) -> None:
    import faiss

    rows = np.random.default_rng(0).standard_normal((N, 16)).astype(np.float32)
    binary = faiss.IndexBinaryFlat(16)
    binary.add(np.zeros((N, 2), np.uint8))
    mapped = faiss.IndexIDMap(faiss.IndexFlatIP(16))
    mapped.add_with_ids(rows, np.arange(N))
    nested = faiss.IndexFlatIP(16)
    nested.add(rows)
    refined = faiss.IndexRefineFlat(faiss.IndexFlatIP(16))
    refined.add(rows)
    deep: Any = nested
    for _ in range(6):
        deep = faiss.IndexPreTransform(faiss.NormalizationTransform(16), deep)
    for data in (
        faiss.serialize_index_binary(binary),
        faiss.serialize_index(mapped),
        faiss.serialize_index(refined),
        faiss.serialize_index(deep),
    ):
        _forged(folder, bytes(data.tobytes()))
        with pytest.raises(CorruptionError):
            Index.open(folder).search(query(), k=5, exact=False)


def test_a_graph_that_leads_out_of_itself_is_refused(z: np.ndarray) -> None:
    data = _written("HNSW8", z)
    # The last neighbour stands before five numbers and the vectors themselves.
    at = data.index(b"IxFI") - 24
    for value in (300, 2**31 - 1, -2):
        wrong = bytearray(data)
        struct.pack_into("<i", wrong, at, value)
        with pytest.raises(CorruptionError, match="neighbours"):
            _check(bytes(wrong))


@pytest.mark.parametrize("value", [300, -1, 2**62])
def test_lists_of_rows_that_are_not_there_are_refused(z: np.ndarray, value: int) -> None:
    data = bytearray(_written("IVF8,Flat", z))
    # The file ends with the last list's ids.
    struct.pack_into("<q", data, len(data) - 8, value)
    with pytest.raises(CorruptionError, match="not there"):
        _check(bytes(data))


def test_json_that_is_too_deep(folder: Path) -> None:
    (folder / "manifest.json").write_text("[" * 100_000)
    refused(folder)
    (folder / "manifest.json").write_text(json.dumps({"format": "lorif-index", "format_version": 6}))
    refused(folder)


def test_rows_are_what_was_given(made: Path) -> None:
    """The index that all of these harm is sound."""
    with Index.open(made) as index:
        index.verify()
        assert len(index) == N and blocks(ROWS[:1])[0]["a"].dtype == torch.float32
    use(made)


def test_a_config_of_the_wrong_form(folder: Path) -> None:
    data = read_json(folder / "manifest.json")
    data["config"]["damping"] = {"rule": [1]}
    write_manifest(folder / "manifest.json", data)
    refused(folder)


def test_a_curvature_of_fewer_directions_than_the_sketch_weighs(folder: Path) -> None:
    data = read_json(folder / "manifest.json")
    data["curvature_layers"][1]["rank"] = 0
    write_manifest(folder / "manifest.json", data)
    with pytest.raises(CorruptionError, match="weighs"):
        use(folder)


def test_a_curvature_of_no_directions_answers(tmp_path: Path) -> None:
    case = Case("factors", coarse=None)
    Index.build(tmp_path / "i", config=case.config, progress=False, **case.given(0, N)).close()
    data = read_json(tmp_path / "i" / "manifest.json")
    data["curvature_layers"][1]["rank"] = 0
    write_manifest(tmp_path / "i" / "manifest.json", data)
    with Index.open(tmp_path / "i") as index:
        assert np.isfinite(index.scores(query())).all()
