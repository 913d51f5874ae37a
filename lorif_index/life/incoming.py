"""Incoming: examples that are to be added, as a source of gradients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ..capture.data import as_source
from ..capture.gradients import GradientSource
from ..capture.sources import GivenGradients, ModelGradients, data_digest, rewound
from ..errors import DataError
from ..identity import Identity
from ..snapshot import Snapshot


@dataclass(frozen=True)
class Incoming:
    """What is to be added.

    Attributes:
        source: gradients, projected as the index's.
        digest: tells these examples from others.
        device: where gradients are.
    """

    source: GradientSource
    digest: str
    device: torch.device


@contextmanager
def incoming(now: Snapshot, identity: Identity, data: Any, gradients: Any) -> Iterator[Incoming]:
    """Examples for an index, until the block ends.

    Args:
        now: the newest version; the writer's lock is held.
        identity: has the model, where there are data.
        data: of `Identity.data_to_add`, or None.
        gradients: where there are no data.

    Raises:
        DataError: there are none, or they do not fit.
    """
    if data is not None:
        taken = identity.capture(now)
        capture, examples = taken.capture(identity.loss), as_source(data, taken.config.batch_size)
        yield Incoming(ModelGradients(capture, examples), data_digest(examples), capture.device)
        return
    with ExitStack() as stack:
        given = GivenGradients(rewound(gradients, lambda: now.path, stack), now.projections)
        if not given.count:
            raise DataError("gradients is empty: pass an iterable of {layer: (n, d_in, d_out)} blocks")
        yield Incoming(given, given.digest, torch.device("cpu"))
