"""A million real gradients, captured once and kept: a small GPT over the sources of all installed packages.

Documents are files; windows of 32 words do not overlap, duplicates are dropped. Whole files are held out for queries,
and a third text source, the packages' prose (licences, readmes, metadata), gives queries from another distribution.
The gradients, projected to 16 layers x 32 x 32, are kept unfactored in half precision, so that factors of any rank,
coordinates, dense baselines and smaller indexes are made from the very same numbers.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import os
import shutil
import site
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.corpus import gpt, tokens
from bench.environment import CACHE
from lorif_index import BuildConfig, default_loss
from lorif_index.capture.sources import ModelCapture

LENGTH, VOCABULARY, DIM = 32, 2000, 32
FOLDER = CACHE / "scale"
_CODE = ("*.py",)
_PROSE = ("METADATA", "LICENSE*", "*.md", "*.rst", "NOTICE*", "*.txt")
_TOP = {"METADATA": "*.dist-info/METADATA"}
SPLITS = ("train", "held-out", "shifted")
_BLOCK = 4096
_BATCH = 64


def windows(split: str, folder: Path = FOLDER, most: int | None = None) -> np.ndarray:
    """(n, 32) int16 word ids of a split, shuffled; read once from the installed packages, then from the cache.

    Args:
        split: "train", "held-out" (whole files kept apart) or "shifted" (prose).
        folder: the cache.
        most: files to read at most, of each kind (for a tiny run).
    """
    path = folder / f"windows-{split}.npy"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        for name, array in _read_everything(most).items():
            np.save(folder / f"windows-{name}.npy", array, allow_pickle=False)
    return np.load(path, mmap_mode="r", allow_pickle=False)


def _files(patterns: tuple[str, ...], most: int | None) -> list[Path]:
    roots = [Path(sysconfig.get_path("stdlib")), *map(Path, site.getsitepackages())]
    if most is not None:
        # A tiny run does not walk through everything.
        found = sorted({path for root in roots for name in patterns for path in root.glob(_TOP.get(name, name))})
        return found[:: max(len(found) // most, 1)][:most]
    # A virtual environment's standard library lies elsewhere than its packages; one may contain the other.
    return sorted({path for root in roots for name in patterns for path in root.rglob(name) if path.is_file()})


def _words(path: Path) -> list[str]:
    return tokens(path.read_text(encoding="utf-8", errors="ignore"))


def _read_everything(most: int | None) -> dict[str, np.ndarray]:
    code, prose = _files(_CODE, most), _files(_PROSE, most)
    counts: collections.Counter[str] = collections.Counter()
    # Every fourth file is plenty for counting words.
    for path in code[::4] if most is None else code:
        counts.update(_words(path))
    number = {word: i + 1 for i, (word, _) in enumerate(counts.most_common(VOCABULARY - 1))}
    parts: dict[str, list[np.ndarray]] = {name: [] for name in SPLITS}
    for paths, kind in ((code, "code"), (prose, "prose")):
        for path in paths:
            ids = np.array([number.get(word, 0) for word in _words(path)], dtype=np.int16)
            cut = ids[: len(ids) // LENGTH * LENGTH].reshape(-1, LENGTH)
            held = hashlib.sha256(str(path.name).encode()).digest()[0] < (5 if most is None else 60)
            parts["shifted" if kind == "prose" else "held-out" if held else "train"].append(cut)
    out, seen = {}, np.empty((0, LENGTH), dtype=np.int16)
    for name in SPLITS:
        unique = np.unique(np.concatenate(parts[name]), axis=0)
        # Windows that are mostly rare words say nothing.
        unique = unique[(unique == 0).mean(axis=1) < 0.5]
        if name != "train":
            unique = _without(unique, seen)
        else:
            seen = unique
        out[name] = np.ascontiguousarray(unique[np.random.default_rng(0).permutation(len(unique))])
    return out


def _without(rows: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Rows that are not among the others."""
    known = set(map(bytes, np.ascontiguousarray(other)))
    return rows[[bytes(row) not in known for row in np.ascontiguousarray(rows)]]


def trained_model(steps: int, folder: Path = FOLDER, most: int | None = None) -> Any:
    """A 4-layer, 64-wide GPT trained on the training windows, kept in the cache."""
    from transformers import GPT2LMHeadModel

    path = folder / f"model-{steps}"
    if not (path / "config.json").exists():
        model = gpt(vocabulary=VOCABULARY, length=LENGTH)
        ids = windows("train", folder, most)
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
        rng = np.random.default_rng(0)
        model.train()
        losses = []
        for step in range(steps):
            batch = torch.from_numpy(ids[np.sort(rng.integers(len(ids), size=64))].astype(np.int64))
            optimizer.zero_grad()
            loss = default_loss(model, {"input_ids": batch}).mean() / (LENGTH - 1)
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(float(loss.detach()))
            if step % 200 == 199:
                print(f"training step {step + 1}: {np.mean(losses[-100:]):.3f} nats a word", flush=True)
        model.save_pretrained(path)
    return GPT2LMHeadModel.from_pretrained(path).eval()


def _capture(model: Any) -> ModelCapture:
    return ModelCapture(model, BuildConfig(projection_dim=DIM))


class Dense:
    """Unfactored projected gradients on disk, (n, width) half precision, in blocks that are read when touched.

    An iterable of gradient blocks, as `Index.build(gradients=...)` takes them; `first(n)` is a shorter one.
    """

    def __init__(self, path: Path, shapes: dict[str, tuple[int, int]], start: int, stop: int) -> None:
        self.path, self.shapes, self.start, self.stop = path, shapes, start, stop
        self.width = sum(a * b for a, b in shapes.values())

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for start in range(self.start, self.stop, 512):
            yield self.block(start, min(start + 512, self.stop))

    def array(self) -> np.ndarray:
        """(n, width) float16, mapped (shared: not to be written to)."""
        return np.memmap(self.path, dtype="<f2", mode="r+").reshape(-1, self.width)[self.start : self.stop]

    def block(self, start: int, stop: int) -> dict[str, torch.Tensor]:
        """Layer -> (m, d_in, d_out) float16 of rows start .. stop - 1 of the file."""
        rows = torch.from_numpy(np.memmap(self.path, dtype="<f2", mode="r+").reshape(-1, self.width)[start:stop])
        out, at = {}, 0
        for name, (a, b) in self.shapes.items():
            out[name] = rows[:, at : at + a * b].unflatten(1, (a, b))
            at += a * b
        return out

    def first(self, count: int) -> Dense:
        if count > len(self):
            raise ValueError(f"{count} rows were asked for, {len(self)} are kept")
        return Dense(self.path, self.shapes, self.start, self.start + count)


def gradients(
    split: str, count: int, steps: int, folder: Path = FOLDER, most: int | None = None, part: tuple[int, int] = (0, 1)
) -> Dense:
    """The first `count` gradients of a split, captured now if they are not kept yet; goes on where it was stopped.

    Args:
        part: (i, m): only every m-th block from the i-th, so that several processes can share the work.
    """
    model = trained_model(steps, folder, most)
    taken = _capture(model)
    shapes = {name: (spec.d_in, spec.d_out) for name, spec in taken.specs.items()}
    width = sum(a * b for a, b in shapes.values())
    source = windows(split, folder, most)
    if len(source) < count:
        raise ValueError(f"{count} windows of {split!r} were asked for, the installed packages have {len(source)}")
    path = folder / f"dense-{split}-{steps}.f2"
    if not path.exists():
        path.touch()
    if path.stat().st_size < count * width * 2:
        os.truncate(path, count * width * 2)
    done = folder / f"{path.name}.done"
    done.mkdir(exist_ok=True)
    capture = taken.capture(None)
    began, fresh = time.perf_counter(), 0
    with path.open("r+b", buffering=0) as file:
        for number, start in enumerate(range(0, count, _BLOCK)):
            stop = min(start + _BLOCK, count)
            mark = done / f"{start}-{stop}"
            if number % part[1] != part[0] or mark.exists():
                continue
            rows = np.empty((stop - start, width), dtype="<f2")
            for at in range(start, stop, _BATCH):
                ids = np.arange(at, min(at + _BATCH, stop))
                batch = torch.from_numpy(source[ids].astype(np.int64))
                block = capture.gradients(ids, {"input_ids": batch})
                flat = torch.cat([block.layers[name].dense().flatten(1) for name in shapes], dim=1)
                rows[ids - start] = flat.half().numpy()
            if not np.isfinite(rows).all():
                raise ValueError(f"gradients {start} to {stop} overflow half precision")
            os.pwrite(file.fileno(), rows.data.cast("B"), start * width * 2)
            mark.touch()
            fresh += stop - start
            rate = fresh / (time.perf_counter() - began)
            print(f"{split}: {stop:,} of {count:,}, {rate:,.0f} examples/s", flush=True)
    return Dense(path, shapes, 0, count)


def remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    """Captures ahead of the benchmarks, in one of several processes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--split", choices=SPLITS, default="train")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--part", type=int, nargs=2, default=(0, 1), metavar=("I", "OF"))
    parser.add_argument("--threads", type=int, default=1)
    parsed = parser.parse_args()
    torch.set_num_threads(parsed.threads)
    gradients(parsed.split, parsed.count, parsed.steps, part=tuple(parsed.part))


if __name__ == "__main__":
    main()
