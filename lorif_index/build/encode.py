"""Encode: gradients -> rows -> shards, in one pass; the same for a build and for examples that are added later."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch

from ..capture.gradients import GradientBlock, LayerSpec, energies
from ..codecs.eigencodes import EigenEncoder
from ..codecs.layout import RowLayout, Rows
from ..codecs.truncation import factorise
from ..curvature.sketch import SketchEncoder
from ..errors import NonFiniteError
from ..progress import Stage
from ..storage.payloads import Payloads
from ..storage.store import StoreWriter


class RowEncoder:
    """Makes rows of gradients.

    Args:
        layout: of the rows.
        specs: the layers.
        eigen: encodes eigencodes, or None where the layout has none.
        sketch: encodes coordinates, or None where the layout has none.

    Attributes:
        vanished: how many (example, layer) gradients became zero in the stored dtype.
    """

    def __init__(
        self,
        layout: RowLayout,
        specs: dict[str, LayerSpec],
        eigen: EigenEncoder | None = None,
        sketch: SketchEncoder | None = None,
    ) -> None:
        self.layout = layout
        self._specs, self._eigen, self._sketch = specs, eigen, sketch
        self.vanished = 0

    def encode(self, block: GradientBlock) -> Rows:
        """The rows of a block's examples, on the CPU.

        Raises:
            NonFiniteError: values beyond the stored dtype's range, or an example that vanishes in all layers.
        """
        stored = codes = None
        if self.layout.groups:
            packed = self.layout.pack(factorise(block, self._specs)).cpu()
            stored, vanished = _stored(packed, block.ids, self.layout)
            self.vanished += vanished
        if self._eigen is not None:
            stored = self._eigen.encode(block.layers)
        if self._sketch is not None and self.layout.codes is not None:
            codes = self.layout.codes.encode(self._sketch.encode(block.layers))
        return self.layout.rows(stored, codes)


def encode_blocks(
    blocks: Iterable[GradientBlock],
    encoder: RowEncoder,
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
            stage.advance(block.count, block.count * encoder.layout.row_bytes)
        writer.flush()


def _stored(rows: torch.Tensor, ids: np.ndarray, layout: RowLayout) -> tuple[torch.Tensor, int]:
    """Rows in the stored dtype, and how many (example, layer) gradients became zero by it.

    Raises:
        NonFiniteError: values beyond the dtype's range, or an example that vanishes in all layers.
    """
    stored = rows.to(dtype=layout.torch_dtype)
    fine = torch.isfinite(stored).all(dim=1)
    if not bool(fine.all()):
        bad = int(ids[int((~fine).nonzero()[0, 0])])
        raise NonFiniteError(
            f"the factors of example {bad} overflow {layout.dtype}: build with dtype='bfloat16' or 'float32'"
        )
    vanished = layout.vanished(rows, stored)
    gone = vanished.any(dim=1) & ~(stored != 0).any(dim=1)
    if bool(gone.any()):
        bad = int(ids[int(gone.nonzero()[0, 0])])
        raise NonFiniteError(
            f"the factors of example {bad} underflow to zero in {layout.dtype}: build with dtype='bfloat16' or "
            "'float32'"
        )
    return stored, int(vanished.sum())
