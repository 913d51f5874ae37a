"""Gathering: an index of a model that is being trained, out of the training's own passes."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from .build.gather import Gatherer
from .build.inputs import Given, chosen_config
from .build.state import check_free
from .capture.data import Batch
from .capture.ensemble import as_model
from .capture.losses import PerExample
from .capture.sharded import is_compiled
from .config import BuildConfig
from .errors import ConfigError
from .index import Index
from .linalg.precision import in_whole_products
from .progress import ProgressCallback, reporter
from .ranks import Ranks
from .storage.payloads import Values
from .text.tokenised import TOKENIZER, prepared, tokenizer_digest


class Gathering:
    """Begins an index while its model trains, and takes examples' gradients from the passes that the training makes.

    It is begun before the last epoch, and learns the projections then. What it takes is kept on disk, up to
    `Compute.spool_bytes`. `build` fits the rest, of the model as it is then, and takes the gradients of those examples
    alone that the training did not reach. The training is not changed: it makes the same steps, to the bit.

    An example is known by what the model is given of it, whatever order it comes in. The training's loss must be the
    examples' losses up to a factor for each batch (a mean, an accumulation, a loss scale); that is seen at the model's
    outputs, and another loss ends the gathering with a warning. Gradients are those of the weights of the step that
    they were taken in, and with dropout where the training has it.

    Args:
        path: as for `Index.build`; what another gathering left unfinished there is begun anew.
        model: that is trained, in this process alone; it gives a tensor, or something with `logits`.
        data: what it is trained on, in the order that gives the ids, not the loader that shuffles.
        loss, config, metadata, payloads, tokenizer, progress: as for `Index.build`.

    Raises:
        ConfigError: no more examples than the fit takes by itself (`Sample.size`); several processes. CaptureError: a
        model whose passes cannot be listened to (fused experts, `nn.MultiheadAttention`, batch norms that train,
        compiled modules). Otherwise as `Index.build` does.
    """

    @in_whole_products
    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        model: nn.Module,
        data: Any,
        loss: PerExample | None = None,
        config: BuildConfig | None = None,
        metadata: dict[str, Any] | None = None,
        payloads: Values | None = None,
        tokenizer: Any = None,
        progress: bool | ProgressCallback | None = None,
    ) -> None:
        self.path = Path(path)
        self._model, self._loss, self._tokenizer, self._progress = model, loss, tokenizer, progress
        if Ranks.of(None).size > 1:
            raise ConfigError(
                f"gathering is of one process, and this is one of {Ranks.of(None).size}, each of which sees a part of "
                "the data: build at the end instead, with all of them"
            )
        if is_compiled(model):
            raise ConfigError("gathering needs the modules' calls, and the model is compiled: build at the end instead")
        check_free(self.path)
        known = {} if tokenizer is None else {TOKENIZER: tokenizer_digest(tokenizer)}
        inner, chosen, kept = as_model(model), chosen_config(config), known | (metadata or {})
        with undisturbed(model), reporter(progress) as report:
            data = prepared(data, model, tokenizer)
            given = Given(inner, data, None, loss, None, chosen, kept, payloads, None)
            self._gatherer = Gatherer(self.path, given, report)

    def __enter__(self) -> Gathering:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def found(self) -> int:
        """Of how many examples there are gradients."""
        return self._gatherer.found

    @property
    def trouble(self) -> str | None:
        """Why it has stopped, if it has."""
        return self._gatherer.trouble

    @contextmanager
    def of(self, batch: Batch) -> Iterator[None]:
        """Inside, the program makes the forward and the backward pass of a batch, of the same form as the data's."""
        self._gatherer.begin(batch)
        try:
            yield
        except BaseException:
            self._gatherer.drop()
            raise
        self._gatherer.end()

    def begin(self, batch: Batch) -> None:
        """As on entering `of`, for programs that have no one place for both passes."""
        self._gatherer.begin(batch)

    def end(self) -> None:
        """As on leaving `of`; without an effect where nothing was begun."""
        self._gatherer.end()

    @in_whole_products
    def build(self, metadata: dict[str, Any] | None = None) -> Index:
        """Ends the index, and opens it; raises as `Index.build` does.

        Args:
            metadata: more of it. "gathered" says of how many examples the gradients are the training's.
        """
        with reporter(self._progress) as report:
            self._gatherer.finish(metadata or {}, report)
        return Index.open(self.path, model=self._model, loss=self._loss, tokenizer=self._tokenizer)

    def close(self) -> None:
        """Gives the index up, unless it was built; what was written is of no use then."""
        self._gatherer.close()


@contextmanager
def undisturbed(model: Any) -> Iterator[None]:
    """Random generators, and gradients of the parameters, are as before afterwards."""
    parameters = list(model.parameters()) if isinstance(model, nn.Module) else []
    devices = sorted({p.device.index or 0 for p in parameters if p.device.type == "cuda"})
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - the program's own generator
    grads = [(p, p.grad) for p in parameters]
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        for p, grad in grads:
            p.grad = grad
