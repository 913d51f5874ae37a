"""Truth for the LDS: each task's model trained again on halves of its data, with several seeds.

One small file for each training, so that it goes on where it stopped and several processes can share it
(`--part I OF`); what is complete is gathered in `bench/truth/TASK.npz`.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np

from bench.environment import CACHE, arguments
from bench.tasks import TASKS, Task, size

KEPT = Path(__file__).parent / "truth"


def _file(task: Task, smoke: bool, seed: int, number: int) -> Path:
    return CACHE / "truth" / (task.name + ("-smoke" if smoke else "")) / f"{seed}-{number:03d}.npy"


def _kept(task: Task, smoke: bool) -> np.ndarray:
    """(seeds, subsets, q) float32: the whole seeds that `bench/truth/` has."""
    path = KEPT / f"{task.name}.npz"
    if smoke or not path.exists():
        return np.empty((0, task.subsets, size(task.queries)), dtype=np.float32)
    with np.load(path, allow_pickle=False) as found:
        return found["losses"]


def make(task: Task, smoke: bool = False, part: int = 0, of: int = 1) -> None:
    """Trains what is missing; seed after seed, so that an early stop leaves whole ones."""
    seeds = range(len(_kept(task, smoke)), task.seeds)
    jobs = [(seed, number) for seed in seeds for number in range(task.subsets)]
    missing = [job for job in jobs[part::of] if not _file(task, smoke, *job).exists()]
    began = time.perf_counter()
    for done, (seed, number) in enumerate(missing):
        path = _file(task, smoke, seed, number)
        path.parent.mkdir(parents=True, exist_ok=True)
        losses = task.losses(task.train(task.subset(number), seed))
        temporary = path.with_suffix(f".{part}.part")
        with temporary.open("wb") as file:
            np.save(file, losses.astype(np.float32), allow_pickle=False)
        temporary.replace(path)
        each = (time.perf_counter() - began) / (done + 1)
        left = (len(missing) - done - 1) * each / 60
        print(f"{task.name} seed {seed} subset {number}: {each:.1f} s each, {left:.0f} min left", flush=True)


def gather(task: Task, smoke: bool = False) -> np.ndarray:
    """(seeds, subsets, q) float32 losses after retraining; seeds that are not complete are left out.

    Raises:
        FileNotFoundError: not one seed is complete.
    """
    kept = _kept(task, smoke)
    seeds = list(kept)
    for seed in range(len(kept), task.seeds):
        files = [_file(task, smoke, seed, number) for number in range(task.subsets)]
        if not all(file.exists() for file in files):
            break
        seeds.append(np.stack([np.load(file, allow_pickle=False) for file in files]))
    if not seeds:
        raise FileNotFoundError(f"no seed of {task.name} is complete: run python -m bench.lds_truth --task {task.name}")
    losses = np.stack(seeds)
    if len(seeds) > len(kept) and not smoke:
        KEPT.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(KEPT / f"{task.name}.npz", losses=losses)
    return losses


def main() -> None:
    parsed = arguments(
        __doc__,
        task={"default": "digits", "choices": sorted(TASKS)},
        part={"type": int, "nargs": 2, "default": (0, 1)},
    )
    task = TASKS[parsed.task](parsed.smoke)
    make(task, parsed.smoke, *parsed.part)
    losses = gather(task, parsed.smoke)
    print(f"{task.name}: {losses.shape[0]} seeds x {losses.shape[1]} halves, {losses.shape[2]} queries")


if __name__ == "__main__":
    main()
