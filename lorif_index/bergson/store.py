"""Store: the folder that `bergson build` writes, read as blocks of gradients.

It holds `processor_config.yaml` (`projection_dim`), `info.json` (`num_items`, `num_grads`, `grad_sizes`: layer ->
numbers of a row, in the order of the columns, `base_dtype`, `attribute_tokens`), `gradients.bin` (num_grads, sum of
sizes), and of gradients of single tokens also `offsets.npy`, where each example's begin (`bergson.data.create_index`
and `create_token_index` of Bergson 2.5.1).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ..errors import DataError
from ..search.named import as_ids

_READ_BYTES = 64 << 20


class BergsonStore:
    """Gradients of a Bergson run, for `Index.build(gradients=)`, `index.add` and, of a few examples, `index.search`.

    A row's numbers become (inputs, outputs) of its layer: of projected gradients (p, p), of whole ones as the model's
    module says. Gradients of single tokens are summed to their example's. Questions must have been stored by a run with
    the same projection (`projection_dim`, `projection_seed`).

    Args:
        path: the run's folder.
        model: that it was made of; needed for whole gradients.

    Attributes:
        shapes: layer -> (d_in, d_out).

    Raises:
        DataError: no such store, one that is shorter than it says, one projection over all layers together
        (`projection_target="global"`), or whole gradients without their model.
    """

    def __init__(self, path: str | os.PathLike[str], model: nn.Module | None = None) -> None:
        self._path = Path(path)
        try:
            info = json.loads((self._path / "info.json").read_text(encoding="utf-8"))
            sizes = {str(name): int(size) for name, size in info["grad_sizes"].items()}
            kind, tokens = str(info["base_dtype"]), bool(info["attribute_tokens"])
            self._count, rows = int(info["num_items"]), int(info["num_grads"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{self._path} is no store of gradients that Bergson 2.5 writes ({type(error).__name__}: {error}): "
                "pass the run_path of `bergson build`"
            ) from None
        if list(sizes) == ["gradients"]:
            raise DataError(
                f"{self._path} keeps one projection of all layers together, of which none can be told apart: build it "
                "with projection_target='per_module'"
            )
        side = _projected(self._path / "processor_config.yaml")
        self.shapes = {name: _shape(name, size, side, model) for name, size in sizes.items()}
        half = kind == "bfloat16"
        # NumPy has no bfloat16.
        dtype = np.dtype("<u2") if half else np.dtype(kind).newbyteorder("<")
        file, width = self._path / "gradients.bin", sum(sizes.values())
        there, wanted = file.stat().st_size if file.exists() else 0, dtype.itemsize * rows * width
        if there != wanted:
            raise DataError(f"{file} has {there:,} bytes, where {wanted:,} were recorded: was the run interrupted?")
        self._rows = np.memmap(file, dtype, "r", shape=(rows, width))
        self._half = half
        self._ends = _offsets(self._path / "offsets.npy", self._count, rows) if tokens else np.arange(rows + 1)
        self._at_once = max(_READ_BYTES * self._count // max(wanted, 1), 1)

    def __len__(self) -> int:
        """Number of examples."""
        return self._count

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        """Blocks {layer: (n, d_in, d_out)} of all examples, in order."""
        for start in range(0, self._count, self._at_once):
            yield self.gradients(np.arange(start, min(start + self._at_once, self._count)))

    def gradients(self, ids: Iterable[int] | np.ndarray) -> dict[str, torch.Tensor]:
        """Gradients of some examples, as a block or a question.

        Args:
            ids: their numbers, in the order wanted.

        Returns:
            Layer -> (n, d_in, d_out) float32.

        Raises:
            DataError: a number that it does not have.
        """
        wanted = as_ids(ids)
        if len(wanted) and (wanted.min() < 0 or wanted.max() >= self._count):
            raise DataError(f"{self._path} has examples 0 to {self._count - 1}, got {wanted.min()} to {wanted.max()}")
        parts = [self._read(int(self._ends[i]), int(self._ends[i + 1])).sum(0, keepdim=True) for i in wanted.tolist()]
        flat, out, at = torch.cat(parts) if parts else self._read(0, 0), {}, 0
        for name, (d_in, d_out) in self.shapes.items():
            size = d_in * d_out
            # There outputs come first.
            out[name] = flat[:, at : at + size].reshape(-1, d_out, d_in).mT.contiguous()
            at += size
        return out

    def _read(self, start: int, stop: int) -> torch.Tensor:
        """(rows, numbers) float32."""
        part = np.array(self._rows[start:stop])
        found = torch.from_numpy(part.view(np.int16) if self._half else part)
        return (found.view(torch.bfloat16) if self._half else found).float()


def _offsets(path: Path, count: int, rows: int) -> np.ndarray:
    """Where the rows of each example begin, and the end."""
    try:
        with path.open("rb") as file:
            found = np.lib.format.read_array(file, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}): the store keeps gradients of single tokens") from None
    rising = found.shape == (count + 1,) and found.dtype.kind in "iu" and bool((np.diff(found) >= 0).all())
    if not rising or (found[0], found[-1]) != (0, rows):
        raise DataError(f"{path} does not divide {rows} rows among {count} examples")
    return found.astype(np.int64)


def _projected(path: Path) -> int:
    """Width of a side under the run's projection; 0 where there is none."""
    try:
        said = re.search(r"^projection_dim: (\d+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    except (OSError, ValueError):
        said = None
    return int(said[1]) if said else 0


def _shape(name: str, size: int, side: int, model: nn.Module | None) -> tuple[int, int]:
    """(d_in, d_out) of a layer's numbers."""
    if side and size == side * side:
        return side, side
    if model is not None:
        modules = [m for path, m in model.named_modules() if path == name or path.endswith(f".{name}")]
        for module in modules:
            weight = getattr(module, "weight", None)
            if isinstance(weight, torch.Tensor) and weight.ndim == 2:
                a, b = weight.shape
                d_out, d_in = (a, b) if isinstance(module, nn.Linear) else (b, a)
                if size in (d_in * d_out, (d_in + 1) * d_out):
                    return size // d_out, d_out
    remedy = "pass model=, the one that it was made of" if model is None else "is it the model that it was made of?"
    raise DataError(f"layer {name!r} has {size} numbers, whose inputs and outputs are not known: {remedy}")
