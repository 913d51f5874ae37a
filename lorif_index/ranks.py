"""Ranks: the processes that work on one index together, as torchrun starts them; or this process alone.

Everything goes through torch.distributed, over the process group that the program has (gloo on CPUs, NCCL on GPUs).
What is not a tensor travels as JSON: nothing is pickled. Each rank does the same steps in the same order; what one does
by itself is wrapped in `jointly`, so that what fails on one rank is an error on all of them, and none waits for it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from . import errors
from .errors import ConfigError, DistributedError, LorifError, shown

# Bytes of a length, and of a message that comes with it.
_WORD, _AT_ONCE = 8, 1024


class Ranks:
    """A process group, or one process.

    Args:
        group: None for this process alone.

    Attributes:
        rank: of this process, from 0.
        size: how many there are.
        sent: stage -> bytes that this rank has sent, by the volume of ring algorithms: 2 (size - 1) / size of a tensor
            that is summed, size - 1 copies of one that is gathered, one of any other. What is small travels in room of
            a fixed size, of which only its own bytes are counted.
        stage: what is being done, for messages and accounts.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)
        self.sent: Counter[str] = Counter()
        self.stage = "start"
        # "cpu:gloo,cuda:nccl", or one of the two: what is on a device that the group does not serve is moved.
        serves = "cpu:" if group is None else dist.get_backend_config(group)
        self._cpu, self._gpu = "cpu:" in serves, "cuda:nccl" in serves

    @classmethod
    def of(cls, asked: Any) -> Ranks:
        """The ranks that `distributed=` names.

        Args:
            asked: False: this process alone. True: the default process group. None: the default group where one is
                initialised, else alone. Or a `torch.distributed.ProcessGroup`.

        Raises:
            ConfigError: no such group, or this process is not in it.
        """
        started = dist.is_available() and dist.is_initialized()
        if asked is False or (asked is None and not started):
            return cls()
        if not started:
            raise ConfigError(
                f"distributed={asked!r}, but no process group is initialised: start the program with torchrun and call "
                "torch.distributed.init_process_group() first"
            )
        if asked is None or asked is True:
            return cls(dist.group.WORLD) if dist.get_world_size() > 1 else cls()
        if not isinstance(asked, dist.ProcessGroup):
            raise ConfigError(f"distributed must be True, False, None or a ProcessGroup, got {asked!r}")
        if dist.get_rank(asked) < 0:
            raise ConfigError("distributed= is a process group that this process is not in: call on its ranks only")
        return cls(asked) if dist.get_world_size(asked) > 1 else cls()

    @property
    def everyone(self) -> bool:
        """Whether these are several, and all that the default process group has."""
        return self.size > 1 and self.size == dist.get_world_size()

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which writes and shows what is written and shown once."""
        return self.rank == 0

    def __repr__(self) -> str:
        return f"rank {self.rank} of {self.size}"

    # -- tensors -------------------------------------------------------------------------------------------------

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks, the same on each; the tensor itself may have become it."""
        if self.size == 1:
            return tensor
        with self._talking(tensor, 2.0 * (self.size - 1) / self.size) as here:
            dist.all_reduce(here, group=self._group)
        return here.to(tensor.device)

    def count(self, value: int) -> int:
        """The sum of an integer."""
        return int(self.sum(torch.tensor(value, dtype=torch.int64)))

    def reduced(self, tensor: torch.Tensor, to: int) -> torch.Tensor:
        """The sum over all ranks, on rank `to`; elsewhere the tensor may hold anything afterwards."""
        if self.size == 1:
            return tensor
        with self._talking(tensor, float(self.rank != to)) as here:
            dist.reduce(here, self._global(to), group=self._group)
        return here.to(tensor.device)

    def spread(self, tensor: torch.Tensor, source: int) -> torch.Tensor:
        """What rank `source` has, on all; the others pass a tensor of its shape and dtype."""
        if self.size == 1:
            return tensor
        with self._talking(tensor, float(self.rank == source)) as here:
            dist.broadcast(here, self._global(source), group=self._group)
        return here.to(tensor.device)

    def moved(self, tensor: torch.Tensor, source: int, to: int) -> torch.Tensor:
        """What rank `source` has, on rank `to`, which passes a tensor of its shape and dtype; others may pass any."""
        if source == to or self.rank not in (source, to):
            return tensor
        with self._talking(tensor, float(self.rank == source)) as here:
            if self.rank == source:
                dist.send(here, self._global(to), group=self._group)
            else:
                dist.recv(here, self._global(source), group=self._group)
        return here.to(tensor.device)

    def gather(self, array: np.ndarray | Exception) -> list[np.ndarray]:
        """Each rank's array, on all; they may differ in their first dimension. What went wrong in making one may be
        passed in its place: then all ranks raise it, as in `jointly`."""
        if self.size == 1:
            if isinstance(array, Exception):
                raise array
            return [array]
        rows = np.empty(0, np.uint8) if isinstance(array, Exception) else np.ascontiguousarray(array)
        raw = rows.reshape(-1).view(np.uint8)
        # What is small comes with its length, at once: rounds cost more than bytes.
        head = _head(-1 if isinstance(array, Exception) else len(rows), torch.from_numpy(raw.copy()))
        heads = self._gathered(head, len(raw) if len(raw) <= _AT_ONCE else 0)
        counts = [_number(part) for part in heads]
        if min(counts) < 0 or isinstance(array, Exception):
            self.fail(array if isinstance(array, Exception) else None)
            return []
        each = int(np.prod(array.shape[1:], dtype=np.int64)) * array.itemsize
        most = max(counts) * each
        parts = [part[_WORD:] for part in heads]
        if most > _AT_ONCE:
            room = torch.zeros(most, dtype=torch.uint8)
            room[: len(raw)] = torch.from_numpy(raw.copy())
            parts = self._gathered(room, most)
        return [
            part[: n * each].clone().numpy().view(array.dtype).reshape(n, *array.shape[1:])
            for part, n in zip(parts, counts, strict=True)
        ]

    def _gathered(self, room: torch.Tensor, counted: int) -> list[torch.Tensor]:
        """Each rank's bytes, as many on each, on all; so many of them are counted as sent."""
        with self._talking(room, (self.size - 1.0) * counted / len(room)) as here:
            parts = [torch.empty_like(here) for _ in range(self.size)]
            dist.all_gather(parts, here, group=self._group)
        return [part.cpu() for part in parts]

    def collected(self, array: np.ndarray) -> list[np.ndarray]:
        """Each rank's array, on rank 0; nothing elsewhere. They may differ in their first dimension."""
        if self.size == 1:
            return [array]
        out = []
        for rank, count in enumerate(self._counts(len(array))):
            mine = array if rank == self.rank else np.empty((count if self.first else 0, *array.shape[1:]), array.dtype)
            moved = self.moved(torch.from_numpy(np.ascontiguousarray(mine)), rank, 0) if count else None
            out.append(mine if moved is None else moved.numpy())
        return out if self.first else []

    def _counts(self, own: int) -> list[int]:
        """Each rank's number, on all."""
        counts = torch.zeros(self.size, dtype=torch.int64)
        counts[self.rank] = own
        return self.sum(counts).tolist()

    # -- values --------------------------------------------------------------------------------------------------

    def gather_values(self, value: Any) -> list[Any]:
        """Each rank's JSON value, on all."""
        if self.size == 1:
            return [value]
        found = self.gather(np.frombuffer(json.dumps(value).encode(), dtype=np.uint8))
        return [json.loads(part.tobytes()) for part in found]

    def told(self, value: Any, source: int = 0) -> Any:
        """Rank `source`'s JSON value, on all; what the others pass does not matter. What went wrong in making it may be
        passed in its place: then all ranks raise it, as in `jointly`."""
        wrong = value if isinstance(value, Exception) and self.rank == source else None
        if self.size == 1:
            if wrong is not None:
                raise wrong
            return value
        said = None if self.rank != source else value if wrong is None else _failure(wrong)
        raw = torch.frombuffer(bytearray(json.dumps(said).encode()), dtype=torch.uint8)
        head = _head(len(raw) if wrong is None else -len(raw), raw)
        with _rather(wrong):
            with self._talking(head, float(self.rank == source) * min(len(raw), _AT_ONCE) / len(head)) as here:
                dist.broadcast(here, self._global(source), group=self._group)
            head = here.cpu()
            size = abs(_number(head))
            if size <= _AT_ONCE:
                heard = json.loads(head[_WORD : _WORD + size].numpy().tobytes())
            else:
                room = raw if self.rank == source else torch.empty(size, dtype=torch.uint8)
                heard = json.loads(self.spread(room, source).numpy().tobytes())
        if _number(head) >= 0:
            return heard
        raise wrong if wrong is not None else _as_raised(source, heard)

    def agree(self, what: str, values: Mapping[str, Any] | Exception) -> None:
        """Checks that all ranks are here and were given the same.

        Args:
            what: for the message.
            values: name -> JSON value; or what went wrong in making them, which all ranks raise then, as in `jointly`.

        Raises:
            DistributedError: naming what differs, on which rank, and both values.
        """
        with _rather(values if isinstance(values, Exception) else None):
            self.wait()
            if isinstance(values, Exception):
                self.gather(values)
                return
        mine = json.loads(json.dumps(dict(values)))
        for rank, theirs in enumerate(self.gather_values(mine)):
            for name in sorted(mine.keys() | theirs.keys()):
                if mine.get(name) != theirs.get(name):
                    raise DistributedError(
                        f"{what} must be the same on all ranks, and {name} is {shown(mine.get(name))} on rank "
                        f"{self.rank} and {shown(theirs.get(name))} on rank {rank}: start all ranks with the same "
                        "arguments and data"
                    )

    def wait(self) -> None:
        """Waits until all ranks are here."""
        if self.size > 1:
            self._meet()

    # -- failing together ----------------------------------------------------------------------------------------

    @contextmanager
    def jointly(self, stage: str | None = None) -> Iterator[None]:
        """Work that each rank does by itself, without talking to the others; if it fails on one, it fails on all.

        Passes of a sharded model are the exception: ranks that wait in one learn of a failure by the time-out.

        Raises:
            LorifError: of the class that another rank raised, naming the rank. DistributedError: another rank raised
            something else, or did not come in time.
        """
        if stage is not None:
            self.stage = stage
        if self.size == 1:
            yield
            return
        error: Exception | None = None
        try:
            yield
        except Exception as raised:
            if _is_of_network(raised):
                # A pass of a sharded model talks to the others by itself: one of them has left it, and a wait for them
                # here would only be the second.
                raise self._lost(raised) from None
            error = raised
        with _rather(error):
            self._meet()
        self.fail(error)

    def fail(self, error: Exception | None) -> None:
        """Raises on all ranks what went wrong on some: each passes its own error, or None."""
        if self.size == 1:
            if error is not None:
                raise error
            return
        with _rather(error):
            found = self.gather_values(None if error is None else _failure(error))
        if error is not None:
            raise error
        for rank, failure in enumerate(found):
            if failure is not None:
                raise _as_raised(rank, failure)

    def _meet(self) -> None:
        """A barrier that says who is missing."""
        if self._group is None:
            return
        if not self._cpu:
            with self._talking(torch.empty(0), 0.0):
                dist.barrier(group=self._group, device_ids=[torch.cuda.current_device()])
            return
        try:
            # Rank 0 hears from each of the others, so that it can say who did not come. The group's own method goes to
            # its backend for CPUs; torch.distributed's function refuses every group that is not "gloo" by name.
            self._group.monitored_barrier(_timeout(self._group), wait_all_ranks=True)  # type: ignore[attr-defined]
        except RuntimeError as error:
            raise self._lost(error) from None

    @contextmanager
    def _talking(self, tensor: torch.Tensor, copies: float) -> Iterator[torch.Tensor]:
        """The tensor on a device that the group serves, of which so many copies are sent."""
        if tensor.device.type == "cpu" and not self._cpu:
            here = tensor.to(torch.device("cuda", torch.cuda.current_device()))
        else:
            here = tensor if tensor.device.type == "cpu" or self._gpu else tensor.cpu()
        self.sent[self.stage] += int(copies * tensor.numel() * tensor.element_size())
        try:
            yield here.contiguous()
        except RuntimeError as error:
            raise self._lost(error) from None

    def _lost(self, error: Exception) -> DistributedError:
        text = " ".join(str(error).split())
        return DistributedError(
            f"{self} lost touch with the others while doing {self.stage!r} ({text[:400]}): one of them failed, hangs, "
            "or is slower than the time-out of init_process_group; what was sealed stays, and the same call goes on "
            "from there, also with another number of ranks"
        )

    def _global(self, rank: int) -> int:
        return dist.get_global_rank(self._group, rank)  # type: ignore[arg-type]


@contextmanager
def _rather(error: Exception | None) -> Iterator[None]:
    """Where the others cannot be reached: this rank's own error, if it has one, says more than that."""
    try:
        yield
    except DistributedError:
        if error is not None:
            raise error from None
        raise


def _failure(error: Exception) -> list[Any]:
    """What the others are told of an error."""
    return [type(error).__name__, errors.message_of(error), isinstance(error, LorifError)]


def _as_raised(rank: int, failure: list[Any]) -> Exception:
    """The error that they raise."""
    name, text, ours = failure
    kind: type[Exception] = getattr(errors, name, DistributedError) if ours else DistributedError
    return kind(f"rank {rank}: {text}" if ours else f"rank {rank} failed: {name}: {text}")


def _head(number: int, raw: torch.Tensor) -> torch.Tensor:
    """A number, and the first bytes of a message."""
    head = torch.zeros(_WORD + _AT_ONCE, dtype=torch.uint8)
    head[:_WORD] = torch.tensor([number]).view(torch.uint8)
    head[_WORD : _WORD + min(len(raw), _AT_ONCE)] = raw[:_AT_ONCE]
    return head


def _number(head: torch.Tensor) -> int:
    return int(head[:_WORD].view(torch.int64))


ALONE = Ranks()


def _is_of_network(error: Exception) -> bool:
    """Whether torch raised it because other ranks do not answer. Gloo has no class of its own, but names its source."""
    return isinstance(error, dist.DistError) or (type(error) is RuntimeError and "/gloo/" in str(error))


def shared_out(costs: Sequence[float], size: int) -> list[int]:
    """For things of some costs which of `size` ranks does each: the largest first, to whoever has least to do."""
    loads, out = [0.0] * size, [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        out[i] = loads.index(min(loads))
        loads[out[i]] += costs[i]
    return out


def share(count: int, index: int, parts: int) -> slice:
    """Part `index` of `parts` of `count` things: contiguous, and of equal size."""
    return slice(count * index // parts, count * (index + 1) // parts)


def _timeout(group: dist.ProcessGroup | None) -> timedelta:
    """The group's own, which torch shows under names of its own only; where they change, torch's default."""
    backend = getattr(group, "_get_backend", lambda _: None)(torch.device("cpu"))
    found = getattr(getattr(backend, "options", None), "_timeout", None)
    return found if isinstance(found, timedelta) else dist.constants.default_pg_timeout
