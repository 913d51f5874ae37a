"""Callback: a `transformers.Trainer` builds the index of its training data, at the end or at checkpoints on the way."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from ..build.choice import leaving_out
from ..build.gather import forget
from ..build.state import check_free
from ..capture.data import as_source
from ..capture.losses import PerExample
from ..capture.sources import ModelCapture
from ..config import BuildConfig
from ..errors import ConfigError
from ..gathering import Gathering, undisturbed
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
        gather: with when="end": take the examples' gradients from the passes of the last epoch, so that the end has
            few to compute (see `Gathering`). What cannot be gathered is computed at the end, with a warning.
        config, loss, payloads, metadata, progress: as for `Index.build`; `step` and `epoch` are added to the metadata.

    Attributes:
        built: folders of the indexes that were built, in order.

    Raises:
        ConfigError: another `when`; gather with when="save". At the beginning of training: IndexExistsError, or what
        `Index.build` raises of data and model; ConfigError where the model is sharded over processes, or where a
        training to gather from is of several processes, compiled, or ends with the best model.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        data: Any = None,
        tokenizer: Any = None,
        when: str = "end",
        gather: bool = False,
        config: BuildConfig | None = None,
        loss: PerExample | None = None,
        payloads: Values | None = None,
        metadata: dict[str, Any] | None = None,
        progress: bool | ProgressCallback | None = False,
    ) -> None:
        if when not in WHEN:
            raise ConfigError(f"when must be one of {WHEN}, got {when!r}")
        if gather and when != "end":
            raise ConfigError(f"gather=True is for when='end', got when={when!r}: a checkpoint's index is of its model")
        self.path = Path(path)
        self.when = when
        self.built: list[Path] = []
        self._data, self._tokenizer = data, tokenizer
        self._config, self._loss, self._payloads = config, loss, payloads
        self._metadata, self._progress = dict(metadata or {}), progress
        self._gather = gather
        self._wants, self._count = gather, 0
        self._gathering: Gathering | None = None
        self._hook: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Tries what can be tried."""
        sharded = [name for name in ("fsdp", "deepspeed") if getattr(args, name, None)]
        if sharded:
            raise ConfigError(
                f"IndexCallback needs the whole model in one process, and training uses {sharded[0]}: build the index "
                "from a saved checkpoint instead"
            )
        self._wants = self._gather
        self._stop_gathering()
        if self._wants:
            _check_gathered(args)
        if not state.is_world_process_zero:
            return
        if self.when == "end":
            forget(self.path)
            check_free(self.path)
        config = BuildConfig() if self._config is None else self._config
        with undisturbed(given["model"]):
            model, tokenizer = given["model"], self._tokenizer_of(given)
            source = as_source(prepared(self._data_of(given), model, tokenizer), config.batch_size)
            self._count = source.count
            ids, batch = next(iter(source.batches()))

            def look(config: BuildConfig) -> None:
                ModelCapture(model, config).capture(self._loss).gradients(ids, batch, require_all=True)

            leaving_out(config, model, look)

    def on_step_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Begins to gather, where an epoch's steps are left."""
        if not self._wants or self._gathering is not None:
            return
        each = args.gradient_accumulation_steps * args.train_batch_size
        if state.max_steps - state.global_step > -(-self._count // each):
            return
        model = given["model"]
        try:
            self._gathering = Gathering(self.path, model=model, **self._asked(given))
        except Exception as error:
            # Whatever it is, the training is worth more.
            self._wants = False
            warnings.warn(f"nothing is gathered, and all is computed at the end: {error}", stacklevel=2)
        else:
            self._hook = model.register_forward_pre_hook(self._on_forward, with_kwargs=True)

    def _on_forward(self, model: nn.Module, args: tuple[Any, ...], batch: dict[str, Any]) -> None:
        if self._gathering is not None and model.training and torch.is_grad_enabled():
            self._gathering.end()
            self._gathering.begin({name: value for name, value in batch.items() if isinstance(value, torch.Tensor)})

    def _stop_gathering(self) -> None:
        """Gives up what an earlier training of this trainer had begun."""
        if self._gathering is not None:
            self._hook.remove()
            self._gathering.close()
            self._gathering = None

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Takes what a batch's passes gave, while the weights are still theirs."""
        if self._gathering is not None:
            self._gathering.end()

    def on_substep_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Takes what a batch's passes gave."""
        if self._gathering is not None:
            self._gathering.end()

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
        more = {"step": int(state.global_step), "epoch": state.epoch, **self._metadata}
        with undisturbed(given["model"]):
            if self._gathering is None:
                # The other processes are not called.
                index = Index.build(
                    folder, model=given["model"], metadata=more, distributed=False, **self._asked(given)
                )
            else:
                self._hook.remove()
                index = self._gathering.build(more)
                self._gathering = None
            index.close()
        self.built.append(folder)

    def _asked(self, given: dict[str, Any]) -> dict[str, Any]:
        return {
            "data": self._data_of(given),
            "loss": self._loss,
            "config": self._config,
            "payloads": self._payloads,
            "tokenizer": self._tokenizer_of(given),
            "progress": self._progress,
        }

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


def _check_gathered(args: Any) -> None:
    """Raises ConfigError where gradients of such a training are not gathered."""
    why = None
    if args.world_size > 1 or args.n_gpu > 1:
        why = f"is shared by {max(args.world_size, args.n_gpu)} processes or GPUs, each of which sees a part"
    elif args.torch_compile:
        why = "is of a compiled model, whose modules are not called"
    elif args.load_best_model_at_end:
        why = "ends with another model than the last step's (load_best_model_at_end)"
    if why is not None:
        raise ConfigError(f"gather=True: the training {why}. Leave gather out: the index is built at the end")
