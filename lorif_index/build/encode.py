"""Encode: gradients -> rows -> shards, in one pass; the same for a build and for examples that are added later."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from ..capture.gradients import GradientBlock, energies
from ..codecs.base import Encoder
from ..progress import Stage
from ..storage.payloads import Payloads
from ..storage.store import StoreWriter


def encode_blocks(
    blocks: Iterable[GradientBlock],
    encoder: Encoder,
    writer: StoreWriter,
    stage: Stage,
    on_sealed: Callable[[], None],
    *,
    payloads: Payloads | None = None,
    shift: int = 0,
) -> None:
    """Writes the rows of all blocks, and seals them: a shard while the gradients of the next one are taken.

    Args:
        blocks: with the examples' places in the data as ids.
        encoder: makes the rows.
        writer: takes them.
        stage: is told.
        on_sealed: called whenever a shard was sealed.
        payloads: of the data's examples, or None.
        shift: added to an example's place to give its id.
    """
    with writer.aside(on_sealed):
        for block in blocks:
            rows = encoder.encode(block)
            kept = None if payloads is None else payloads.encode(block.ids.tolist())
            writer.append(rows, block.ids + shift, energies(block), kept)
            stage.advance(block.count, rows.numel())
        writer.flush()
