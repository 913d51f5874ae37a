"""Launch: a program that torchrun started joins its process group."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from .errors import DistributedError


@contextmanager
def joined(timeout: float) -> Iterator[bool]:
    """Inside, the process group that torchrun has described in the environment is initialised; nothing where there is
    none, or one of a single process.

    Args:
        timeout: seconds that a rank waits for the others.

    Yields:
        whether this process is the one that talks to the user: rank 0, or the only one.

    Raises:
        DistributedError: the others cannot be reached.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or "RANK" not in os.environ or dist.is_initialized():
        yield not dist.is_initialized() or dist.get_rank() == 0
        return
    # Late: a torch may have been built without them.
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    try:
        wait = timedelta(seconds=timeout)
        store, rank, size = next(rendezvous("env://", timeout=wait))
        # An elastic agent's store outlives its ranks: a later attempt must not find the addresses of the last.
        store = PrefixStore(f"lorif/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        backend = "cpu:gloo,cuda:nccl" if gpu else "cpu:gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=wait)
    except (RuntimeError, ValueError) as error:
        raise DistributedError(
            f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']} cannot reach the others at "
            f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')} ({error}): start it with torchrun"
        ) from None
    try:
        yield dist.get_rank() == 0
    finally:
        dist.destroy_process_group()
