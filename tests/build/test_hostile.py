"""Hostile indexes, one by one: refused with the library's own error before anything is allocated or read; nothing that
opening an index does reads a file outside of its folder."""

from __future__ import annotations

import itertools
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

from bench.faults_cases import ROWS, Case, N, blocks, query, read_json, sealed, write_manifest
from bench.faults_damage import reseal
from lorif_index import Index
from lorif_index.errors import CorruptionError, LorifError
from lorif_index.search.coarse import faiss_is_installed

pytestmark = pytest.mark.skipif(not faiss_is_installed(), reason="needs faiss")

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile") / "i"
    Index.build(folder, config=Case("eigen").config, progress=False, **Case("eigen").given(0, N)).close()
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


@pytest.mark.parametrize("name", ["shard-000001.h5", "curvature.h5", "sketch.h5", "coarse.h5", "manifest.json"])
@pytest.mark.parametrize("way", ["empty", "short", "long", "gone", "link", "fifo", "folder", "other"])
def test_files_that_are_something_else(folder: Path, name: str, way: str) -> None:
    path = folder / name
    data = path.read_bytes()
    path.unlink()
    if way == "link":
        path.symlink_to(folder.parent / "outside")
    elif way == "fifo":
        os.mkfifo(path)
    elif way == "folder":
        path.mkdir()
    elif way != "gone":
        other = (folder / "queries.h5").read_bytes()
        path.write_bytes({"empty": b"", "short": data[:-1], "long": data + b"\0", "other": other}[way])
    refused(folder)


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "", ".", "..", "a/b", "manifest.json", 3, None, "\0"])
@pytest.mark.parametrize("entry", ["shard", "curvature", "codec", "sketch", "queries", "coarse"])
def test_names_that_leave_the_folder(folder: Path, entry: str, name: Any) -> None:
    data = read_json(folder / "manifest.json")
    owners = data["fits"] | {"coarse": data["coarse"], "shard": {"file": data["shards"][0]["sealed"]}}
    owners[entry]["file"]["file"] = name
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
    "directions": lambda m: m["fits"]["curvature"]["layers"][0].update(rank=2**40, spectrum=2**40),
    "eigenvalues": lambda m: m["fits"]["curvature"]["layers"][0].update(spectrum=2**40),
    "bits of a codec": lambda m: m["fits"]["codec"].update(bits=2**40),
    "entries of a codec": lambda m: m["fits"]["codec"].update(bits=0, entries=2**40),
    "directions of a codec": lambda m: m["fits"]["codec"].update(counts=[2**40, 2**40]),
    "codes": lambda m: m["coarse"].update(rows=2**40),
    "the sketch": lambda m: m["fits"]["sketch"].update(dim=2**40),
    "weights": lambda m: m["fits"]["sketch"].update(counts=[2**40, 2**40]),
    "an offset": lambda m: m["fits"]["curvature"]["file"]["offsets"].update(factor_0=2**62),
    "a size": lambda m: m["fits"]["curvature"]["file"].update(size=2**62),
    "an offset below nothing": lambda m: m["fits"]["curvature"]["file"]["offsets"].update(factor_0=-8),
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


@pytest.mark.parametrize("count", [2**40, 2**62, -1, "all"])
def test_calibration_queries_that_are_not_there(folder: Path, count: Any) -> None:
    data = read_json(folder / "manifest.json")
    data["fits"]["queries"]["count"] = count
    write_manifest(folder / "manifest.json", data)
    before = _peak()
    with Index.open(folder) as index, pytest.raises(CorruptionError):
        index.rebuild_coarse("flat", progress=False)
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


def test_hostile_hdf5_is_never_parsed(made: Path, tmp_path: Path) -> None:
    """In the place of a file, with a manifest that says it is right: its bytes may be taken as numbers, no more."""
    outside = tmp_path / "outside"
    outside.write_bytes(b"nobody may read this" * 1000)
    names = ["shard-000000.h5", "curvature.h5", "codec.h5", "sketch.h5", "coarse.h5"]
    for name, trick in itertools.product(names, TRICKS):
        folder = tmp_path / f"{name}{trick.__name__}"
        shutil.copytree(made, folder)
        path = folder / name
        room = path.stat().st_size
        path.unlink()
        with h5py.File(path, "w") as file:
            trick(file, outside)
        # Room for what the manifest says lies in it.
        data = path.read_bytes().ljust(room, b"\0")
        path.write_bytes(data)
        manifest = read_json(folder / "manifest.json")
        entry = next(entry for entry in sealed(manifest) if entry["file"] == name)
        reseal(folder, manifest, entry, data)
    opened = _opened(tmp_path)
    assert all(any(f"{name}{trick.__name__}" in path for path in opened) for name in names for trick in TRICKS)
    assert not [path for path in opened if "outside" in path]


def _opened(root: Path) -> list[str]:
    """Files that are opened while indexes are used, by any library of the process: their system calls are traced, where
    that is possible; else Python tells of its own."""
    code = (
        "import sys\nfrom pathlib import Path\n"
        "sys.path[:0] = ['tests/build', 'tests', '.']\n"
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


# -- coarse codes ----------------------------------------------------------------------------------------------------


@pytest.fixture
def coded(folder: Path) -> Path:
    """The folder with codes in the place of coordinates."""
    with Index.open(folder) as index:
        index.rebuild_coarse("auto", progress=False)
        assert index.coarse is not None and "pieces" in index.coarse["kind"]
    return folder


def forge_coarse(folder: Path, **fields: Any) -> None:
    data = read_json(folder / "manifest.json")
    data["coarse"].update(fields)
    write_manifest(folder / "manifest.json", data)


def refused_before_memory_is_taken(folder: Path) -> None:
    before = _peak()
    for rescore in (True, False):
        with Index.open(folder) as index, pytest.raises(CorruptionError, match="coarse"):
            index.search(query(), k=5, exact=False if rescore else None, rescore=rescore)
    assert _peak() - before < 100 << 20
    with Index.open(folder) as index:
        assert index.search(query(), k=5, exact=True).ids.shape == (3, 5), "what does not need it is answered"


@pytest.mark.parametrize("kind", ["auto", "flat"])
@pytest.mark.parametrize(
    "fields",
    [
        {"rows": N + 1}, {"rows": N - 1}, {"rows": 2**40}, {"rows": -1}, {"rows": 2**80}, {"rows": "many"},
        {"dim": 8}, {"dim": 0}, {"dim": -16}, {"dim": 2**40}, {"dim": 2**62},
        {"pieces": 3}, {"pieces": -8}, {"pieces": 2**40}, {"pieces": None},
        {"axis": [float(2**70), 0.0]}, {"axis": [1]}, {"axis": "north"},
    ],
    ids=str,
)  # fmt: skip
def test_entries_that_do_not_fit_their_codes(folder: Path, kind: str, fields: dict[str, Any]) -> None:
    with Index.open(folder) as index:
        index.rebuild_coarse(kind, progress=False)
    forge_coarse(folder, **fields)
    refused_before_memory_is_taken(folder)


def test_entries_that_lack_a_field(coded: Path) -> None:
    whole = read_json(coded / "manifest.json")
    for field in ("dim", "pieces", "rows", "axis"):
        data = json.loads(json.dumps(whole))
        del data["coarse"][field]
        write_manifest(coded / "manifest.json", data)
        refused_before_memory_is_taken(coded)


@pytest.mark.parametrize("array", ["codes", "books"])
@pytest.mark.parametrize("offset", [-8, 2**40, 2**62, None])
def test_codes_that_lie_beyond_their_file(coded: Path, array: str, offset: int | None) -> None:
    data = read_json(coded / "manifest.json")
    offsets = data["coarse"]["file"]["offsets"]
    if offset is None:
        del offsets[array]
    else:
        offsets[array] = offset
    write_manifest(coded / "manifest.json", data)
    with pytest.raises(CorruptionError):
        use(coded)


def _forged(folder: Path, change: Callable[[bytearray, dict[str, int]], None]) -> None:
    """Other bytes in the coarse file, and a manifest that says they are right."""
    manifest = read_json(folder / "manifest.json")
    entry = manifest["coarse"]["file"]
    data = bytearray((folder / entry["file"]).read_bytes())
    change(data, entry["offsets"])
    (folder / entry["file"]).write_bytes(data)
    reseal(folder, manifest, entry, bytes(data))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["auto", "flat"])
def test_codes_of_no_finite_numbers_are_refused(folder: Path, kind: str, value: float) -> None:
    with Index.open(folder) as index:
        index.rebuild_coarse(kind, progress=False)

    def change(data: bytearray, offsets: dict[str, int]) -> None:
        struct.pack_into("<f", data, offsets["books" if kind == "auto" else "codes"] + 12, value)

    _forged(folder, change)
    with pytest.raises(CorruptionError, match="inf or NaN"):
        use(folder)


def test_a_coarse_file_that_was_cut_is_refused(coded: Path) -> None:
    def change(data: bytearray, offsets: dict[str, int]) -> None:
        del data[max(offsets.values()) + 8 :]

    _forged(coded, change)
    refused_before_memory_is_taken(coded)


@pytest.mark.parametrize("pieces", [4, 8])
def test_any_codes_propose_rows_that_are_there(coded: Path, pieces: int) -> None:
    """A code is a number below 16, whatever the bytes are, and codebooks in fewer pieces are some, too: forged ones
    propose other rows, whose scores are right."""
    forge_coarse(coded, pieces=pieces)

    def change(data: bytearray, offsets: dict[str, int]) -> None:
        manifest = read_json(coded / "manifest.json")["coarse"]
        size = manifest["rows"] * -(-manifest["pieces"] // 2)
        data[offsets["codes"] : offsets["codes"] + size] = b"\xff" * size

    _forged(coded, change)
    with Index.open(coded) as index:
        scores = index.scores(query())
        hits = index.search(query(), k=5, exact=False)
        assert (hits.ids >= 0).all() and (hits.ids < N).all()
        np.testing.assert_allclose(np.take_along_axis(scores, hits.ids, 1), hits.scores, rtol=1e-4)


def test_json_that_is_too_deep(folder: Path) -> None:
    (folder / "manifest.json").write_text("[" * 100_000)
    refused(folder)
    (folder / "manifest.json").write_text(json.dumps({"format": "lorif-index", "format_version": 1}))
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


def test_a_sketch_of_more_coordinates_than_a_layer_has(folder: Path) -> None:
    data = read_json(folder / "manifest.json")
    offsets = data["fits"]["sketch"]["file"]["offsets"]
    # Other bytes of the file as their numbers.
    offsets["directions_1"] = offsets["weights_0"]
    write_manifest(folder / "manifest.json", data)
    with pytest.raises(CorruptionError, match="weighs|names direction"):
        use(folder)
    with Index.open(folder) as index, pytest.raises(CorruptionError, match="weighs|names direction"):
        index.rebuild_coarse("flat", progress=False)


def test_a_curvature_of_no_directions_answers(tmp_path: Path) -> None:
    case = Case("factors", coarse=None)
    Index.build(tmp_path / "i", config=case.config, progress=False, **case.given(0, N)).close()
    data = read_json(tmp_path / "i" / "manifest.json")
    data["fits"]["curvature"]["layers"][1]["rank"] = 0
    write_manifest(tmp_path / "i" / "manifest.json", data)
    with Index.open(tmp_path / "i") as index:
        assert np.isfinite(index.scores(query())).all()
