"""Callback: a `transformers.Trainer` builds the index of its training data, at the end or at checkpoints on the way."""

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
from transformers import TrainerCallback

from ..build.choice import leaving_out
from ..build.state import check_free
from ..capture.data import as_source
from ..capture.losses import PerExample
from ..capture.sources import ModelCapture
from ..config import BuildConfig
from ..errors import ConfigError
from ..index import Index
from ..progress import ProgressCallback
from ..storage.payloads import Values
from .tokenised import prepared

WHEN = ("end", "save")


class IndexCallback(TrainerCallback):
    """Builds an index of the training data under the model as it is then.

    Training goes on as if nothing had happened: train and eval mode, gradients, `requires_grad` and the states of
    random generators are put back. What could fail only after hours is tried at the beginning of the training: the
    folder, the data, and the gradients of the first batch.

    Args:
        path: with when="end", the index's folder; else of one folder for each index, `checkpoint-<step>`.
        data: as for `Index.build`; default: the trainer's training data set, in its own order. (What the trainer's
            collator makes of it is not looked at: where labels come from there, pass data that has them.)
        tokenizer: default: the trainer's `processing_class`, if it is a tokenizer.
        when: "end": after training, of the model that the trainer ends with (the best one under
            load_best_model_at_end); "save": whenever a checkpoint is saved.
        config, loss, payloads, metadata, progress: as for `Index.build`; `step` and `epoch` are added to the metadata.

    Attributes:
        built: folders of the indexes that were built, in order.

    Raises:
        ConfigError: another `when`. At the beginning of training: IndexExistsError, or what `Index.build` raises of
        data and model; ConfigError where the model is sharded over processes.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        data: Any = None,
        tokenizer: Any = None,
        when: str = "end",
        config: BuildConfig | None = None,
        loss: PerExample | None = None,
        payloads: Values | None = None,
        metadata: dict[str, Any] | None = None,
        progress: bool | ProgressCallback | None = False,
    ) -> None:
        if when not in WHEN:
            raise ConfigError(f"when must be one of {WHEN}, got {when!r}")
        self.path = Path(path)
        self.when = when
        self.built: list[Path] = []
        self._data, self._tokenizer = data, tokenizer
        self._config, self._loss, self._payloads = config, loss, payloads
        self._metadata, self._progress = dict(metadata or {}), progress

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Tries what can be tried."""
        sharded = [name for name in ("fsdp", "deepspeed") if getattr(args, name, None)]
        if sharded:
            raise ConfigError(
                f"IndexCallback needs the whole model in one process, and training uses {sharded[0]}: build the index "
                "from a saved checkpoint instead"
            )
        if not state.is_world_process_zero:
            return
        if self.when == "end":
            check_free(self.path)
        config = BuildConfig() if self._config is None else self._config
        with _random_states(given["model"]):
            model, tokenizer = given["model"], self._tokenizer_of(given)
            source = as_source(prepared(self._data_of(given), model, tokenizer), config.batch_size)
            ids, batch = next(iter(source.batches()))

            def look(config: BuildConfig) -> None:
                ModelCapture(model, config).capture(self._loss).gradients(ids, batch, require_all=True)

            leaving_out(config, model, look)

    def on_save(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Builds with each checkpoint."""
        if self.when == "save":
            self._build(self.path / f"checkpoint-{state.global_step}", state, given)

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Builds at the end."""
        if self.when == "end":
            self._build(self.path, state, given)

    def _build(self, folder: Path, state: Any, given: dict[str, Any]) -> None:
        if not state.is_world_process_zero or folder in self.built:
            return
        with _random_states(given["model"]):
            index = Index.build(
                folder,
                model=given["model"],
                data=self._data_of(given),
                loss=self._loss,
                config=self._config,
                metadata={"step": int(state.global_step), "epoch": state.epoch, **self._metadata},
                payloads=self._payloads,
                tokenizer=self._tokenizer_of(given),
                # The other processes are not called.
                distributed=False,
                progress=self._progress,
            )
            index.close()
        self.built.append(folder)

    def _data_of(self, given: dict[str, Any]) -> Any:
        if self._data is not None:
            return self._data
        loader = given.get("train_dataloader")
        if loader is None:
            raise ConfigError("the trainer has no training data set to index: pass IndexCallback(path, data=...)")
        return loader.dataset

    def _tokenizer_of(self, given: dict[str, Any]) -> Any:
        if self._tokenizer is not None:
            return self._tokenizer
        found = given.get("processing_class")
        return found if callable(getattr(found, "get_vocab", None)) else None


@contextmanager
def _random_states(model: nn.Module) -> Iterator[None]:
    """Random generators and gradients of the parameters are as before afterwards."""
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - the trainer's own generator
    grads = [(p, p.grad) for p in model.parameters()]
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        for p, grad in grads:
            p.grad = grad
