"""Processes that begin with the heavy imports done: forked from a server that has imported and done nothing else."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
import traceback
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
# What cannot be imported is left to whoever needs it.
CONTEXT.set_forkserver_preload(
    ["torch", "torch.distributed", "transformers", "sklearn.datasets", "faiss", "lorif_index", "distributed_job"]
)


def run_module(command: list[str], folder: Path, out: Path, seconds: float = 900) -> tuple[int, str]:
    """`python -m` in a process of its own.

    Args:
        command: the module and its arguments.
        folder: to be in.
        out: a file for what it prints.
        seconds: after which it is killed.

    Returns:
        exit code, and what it printed on stdout and stderr.
    """
    process = CONTEXT.Process(target=_run_module, args=(command, str(folder), str(out)), daemon=False)
    process.start()
    process.join(seconds)
    if process.is_alive():
        process.kill()
        process.join()
    return process.exitcode or 0, out.read_text()


def _run_module(command: list[str], folder: str, out: str) -> None:
    file = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.chdir(folder)
    sys.path.insert(0, folder)
    sys.argv = list(command)
    code = 0
    try:
        runpy.run_module(command[0], run_name="__main__", alter_sys=True)
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else int(left.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
