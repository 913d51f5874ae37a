"""Encode: gradients -> rows -> shards, in one pass; the same for a build and for examples that are added later."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch

from ..capture.gradients import GradientBlock, energies
from ..codecs.base import Encoder
from ..progress import Stage
from ..storage.payloads import Payloads
from ..storage.shards import Entries
from ..storage.store import StoreWriter


def encode_blocks(
    blocks: Iterable[GradientBlock],
    encoder: Encoder,
    writer: StoreWriter,
    stage: Stage,
    on_sealed: Callable[[], None],
    *,
    window: int | None,
    payloads: Payloads | None = None,
    shift: int = 0,
) -> None:
    """Writes the rows of all blocks by rising ids, and seals them: a shard while the gradients of the next one are
    taken.

    Args:
        blocks: with the examples' places in the data as ids.
        encoder: makes the rows.
        writer: takes them.
        stage: is told.
        on_sealed: called whenever a shard was sealed.
        window: of the blocks' source (see `GradientSource`); the rows of so many examples are held until all are there.
        payloads: of the data's examples, or None.
        shift: added to an example's place to give its id.
    """
    held: list[Entries] = []

    def write() -> None:
        """Hands over what is held."""
        if held:
            found = Entries.together(held)
            order = np.argsort(found.ids)
            ids, contents = found.ids[order], found.contents
            writer.append(
                Entries(
                    found.rows[torch.from_numpy(order)],
                    ids + shift,
                    found.energies[order],
                    None if contents is None else contents[order],
                    None if payloads is None else payloads.encode(ids.tolist()),
                )
            )
            held.clear()

    at = 0
    with writer.aside(on_sealed):
        for block in blocks:
            if window is not None and int(block.ids[0]) // window != at:
                write()
                at = int(block.ids[0]) // window
            rows = encoder.encode(block)
            # Copied: the rows' memory may be used again.
            held.append(Entries(rows.to("cpu", copy=True), block.ids, energies(block), block.contents))
            if window is None:
                write()
            stage.advance(block.count, rows.numel())
        write()
        encoder.check()
        writer.flush()
