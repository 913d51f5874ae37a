"""Losses: the default per-example losses, for (x, y) pairs and for dict batches of transformers models.

A loss that is a cross-entropy of logits can say which, by an attribute `logits`: a function (model, batch) -> (logits,
labels). `default_loss` and `CrossEntropy` have it. The GGN needs to know what a loss is of (see `heads`); one that does
not say so is watched (see `seeing`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from ..errors import DataError
from .sharded import full

PerExample = Callable[[nn.Module, Any], torch.Tensor]
"""loss(model, batch) or measure(model, batch) -> (n,) tensor that depends on the model differentiably."""

IGNORE = -100

# In names of transformers' classes whose labels are of the inputs' own positions.
_UNSHIFTED = ("MaskedLM", "TokenClassification")
# What collators call the borders of documents in a packed row.
_PACKED = {"document_ids", "cu_seq_lens_q", "cu_seqlens"}

LogitsOf = Callable[[nn.Module, Any], tuple[torch.Tensor, torch.Tensor]]
"""logits(model, batch) -> (logits, labels): (n, C) with (n,), or (n, ..., C) with (n, ...); -100 counts nothing."""


def default_loss(model: nn.Module, batch: Any) -> torch.Tensor:
    """Per-example loss of a batch, (n,).

    - `(x, y)`: cross-entropy of `model(x)` with y; logits (n, C) with y (n,), or one prediction per position, summed
      over them: logits (n, T, C) or (n, C, T, ...) with y (n, T, ...). Positions of -100 are left out.
    - dict with `labels` (n,): cross-entropy of the classifier's logits (n, C).
    - dict with `input_ids` (n, T): next-token cross-entropy, summed over tokens; labels are `labels`, or the inputs;
      -100 and positions that `attention_mask` hides contribute nothing. Encoder-decoder and masked language models
      and token classifiers are taken unshifted; an encoder-decoder's decoder is given `decoder_input_ids`, or the
      labels moved on by one as its own class does for training, and `decoder_attention_mask` hides labels.

    Raises:
        DataError: a batch or logits of another form.
    """
    return cross_entropy(*default_logits(model, batch))


def default_logits(model: nn.Module, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """What `default_loss` is the cross-entropy of: logits (n, ..., C), and labels (n, ...) of which -100 do not count.

    Raises:
        DataError: a batch or logits of another form.
    """
    if isinstance(batch, Mapping):
        return _dict_logits(model, batch)
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return _pair_logits(_logits(model(batch[0])), batch[1])
    raise DataError(
        f"the default loss takes (x, y) or a dict with input_ids or labels, got {type(batch).__name__}: "
        "pass loss=fn with fn(model, batch) -> (n,)"
    )


default_loss.logits = default_logits  # type: ignore[attr-defined]


class CrossEntropy:
    """A loss that is the cross-entropy, summed over positions, of logits that a function finds; the GGN can use it.

    Args:
        logits: logits(model, batch) -> (logits (n, ..., C), labels (n, ...) int64); labels of -100 do not count.
    """

    def __init__(self, logits: LogitsOf) -> None:
        self.logits = logits
        self.__name__ = f"CrossEntropy({getattr(logits, '__name__', type(logits).__name__)})"

    def __call__(self, model: nn.Module, batch: Any) -> torch.Tensor:
        """Per-example losses, (n,)."""
        return cross_entropy(*checked_logits(self.logits(model, batch)))


def logits_of(loss: PerExample) -> LogitsOf | None:
    """How a loss says which logits it is the cross-entropy of; None where it does not."""
    found = getattr(loss, "logits", None)
    return found if callable(found) else None


def checked_logits(found: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """What a `logits` function gave, if it is of the right form.

    Raises:
        DataError: anything else than (logits (n, ..., C), labels (n, ...)).
    """
    if isinstance(found, tuple) and len(found) == 2 and all(isinstance(part, torch.Tensor) for part in found):
        logits, labels = full(found[0]), found[1]
        if logits.ndim >= 2 and logits.shape[:-1] == labels.shape and not labels.is_floating_point():
            return logits, labels
        got = f"shapes {tuple(logits.shape)} and {tuple(labels.shape)}, labels {labels.dtype}"
    else:
        got = type(found).__name__
    raise DataError(f"a loss's logits function must give (logits (n, ..., C), integer labels (n, ...)), got {got}")


def is_cross_entropy(loss: PerExample) -> bool:
    """Whether a loss is `cross_entropy` of its `logits` because it computes no other thing; a function that only says
    so, by that attribute, might, and so might a class of the user's own."""
    return loss is default_loss or type(loss) is CrossEntropy


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Summed over positions, (n,), of logits (n, ..., C) and labels (n, ...), of which -100 do not count.

    Raises:
        DataError: a label that is none of the classes.
    """
    labels = labels.long()
    _check_labels(labels, logits.shape[-1])
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    if logits.ndim > 2:
        logits = logits.movedim(-1, 1)
    losses = functional.cross_entropy(logits, labels, reduction="none", ignore_index=IGNORE)
    return losses.flatten(1).sum(dim=1) if losses.ndim > 1 else losses


def _check_labels(labels: torch.Tensor, classes: int) -> None:
    """On a GPU a label out of range ends the process's use of it, not only the call.

    Raises:
        DataError: a label is neither one of the classes nor -100.
    """
    wrong = (labels != IGNORE) & ((labels < 0) | (labels >= classes))
    if bool(wrong.any()):
        raise DataError(
            f"the label {int(labels[wrong][0])} of example {int(wrong.nonzero()[0, 0])} of the batch is none of the "
            f"{classes} classes of the model's logits, 0 to {classes - 1}: mend the label, or make it {IGNORE} to "
            "leave it out"
        )


def _logits(output: Any) -> torch.Tensor:
    logits = getattr(output, "logits", output)
    if isinstance(logits, Mapping):
        logits = logits.get("logits")
    if not isinstance(logits, torch.Tensor):
        raise DataError(f"the model's output has no logits ({type(output).__name__}): pass loss=fn")
    # A head that is tensor parallel may leave classes where they were computed.
    return full(logits)


def _pair_logits(logits: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if y.is_floating_point():
        raise DataError(f"the default loss takes integer targets, got {y.dtype}: pass loss=fn for a regression")
    last = logits.shape[:-1] == y.shape
    second = logits.ndim >= 2 and (logits.shape[0], *logits.shape[2:]) == tuple(y.shape)
    if last and (logits.ndim == 2 or not second):
        return logits, y
    if second and not last:
        return logits.movedim(1, -1), y
    how = "can be read two ways (classes last or second) beside" if last else "do not fit"
    raise DataError(f"logits {tuple(logits.shape)} {how} targets {tuple(y.shape)}: pass loss=fn")


def _dict_logits(model: nn.Module, batch: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    labels = batch.get("labels")
    inputs = batch.get("input_ids")
    if labels is None and inputs is None:
        raise DataError(f"the batch has neither input_ids nor labels, but {sorted(map(str, batch))}: pass loss=fn")
    mask = batch.get("decoder_attention_mask" if _is_encoder_decoder(model) else "attention_mask")
    if labels is None:
        labels = inputs
    if not isinstance(labels, torch.Tensor) or labels.is_floating_point():
        got = str(labels.dtype) if isinstance(labels, torch.Tensor) else type(labels).__name__
        raise DataError(
            f"labels must be an integer tensor for the default loss, got {got}{_problem(model)}: for a regression or "
            "several labels an example pass loss=fn with fn(model, batch) -> (n,)"
        )
    _refuse_packed(batch)
    logits = _logits(model(**_model_inputs(model, batch, labels)))
    if logits.shape[-1] == 1:
        raise DataError(
            f"logits {tuple(logits.shape)} have a single class, of which the cross-entropy is always zero"
            f"{_problem(model)}: pass loss=fn with fn(model, batch) -> (n,)"
        )
    if batch.get("labels") is None and logits.ndim == 2:
        raise DataError(
            f"{type(base_model(model)).__name__} gives one prediction an example, and the batch has no labels, only "
            f"{sorted(map(str, batch))}: pass labels (n,), or another measure"
        )
    if labels.ndim == 1:
        return _pair_logits(logits, labels)
    if logits.ndim != 3 or logits.shape[:2] != labels.shape:
        raise DataError(
            f"logits {tuple(logits.shape)} do not fit labels {tuple(labels.shape)}{_problem(model)}: pass loss=fn"
        )
    if mask is not None and mask.shape == labels.shape:
        labels = labels.masked_fill(mask == 0, IGNORE)
    unshifted = any(part in type(base_model(model)).__name__ for part in _UNSHIFTED)
    if not unshifted and not _is_encoder_decoder(model):
        logits, labels = logits[:, :-1], labels[:, 1:]
        if mask is not None and mask.shape[1] == labels.shape[1] + 1:
            # Padding on the left: the first token is not predicted, least of all from padding.
            labels = labels.masked_fill(mask[:, :-1] == 0, IGNORE)
    return logits, labels


def _is_encoder_decoder(model: nn.Module) -> bool:
    return bool(getattr(getattr(base_model(model), "config", None), "is_encoder_decoder", False))


def base_model(model: nn.Module) -> nn.Module:
    """The model inside a model of peft, which has another class and forward; any other as it is."""
    inside = getattr(model, "get_base_model", None)
    found = inside() if callable(inside) else model
    return found if isinstance(found, nn.Module) else model


def offset_positions(model: nn.Module) -> int | None:
    """The first position of models that count from behind their padding's index (RoBERTa's kind); None for others.

    They are known by a position embedding with a padding index, and find the positions themselves, from what is
    padding.
    """
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            return module.padding_idx + 1
    return None


def restarts(positions: torch.Tensor, shown: torch.Tensor) -> torch.Tensor:
    """Where another document begins in a row: position 0 right after something else that is shown; (n, T - 1) bool."""
    return (positions[:, 1:] == 0) & shown[:, 1:] & shown[:, :-1]


def _refuse_packed(batch: Mapping[str, Any]) -> None:
    """Rows of several documents are no examples.

    Raises:
        DataError: the batch says that its rows are packed.
    """
    packed = sorted(_PACKED & set(batch))
    positions, mask, inputs = batch.get("position_ids"), batch.get("attention_mask"), batch.get("input_ids")
    if not packed and isinstance(positions, torch.Tensor) and isinstance(inputs, torch.Tensor):
        if positions.ndim != 2 or inputs.ndim != 2:
            return
        shown = mask.bool() if isinstance(mask, torch.Tensor) and mask.shape == positions.shape else positions >= 0
        if bool(restarts(positions, shown).any()):
            packed = ["position_ids that restart at 0"]
    if packed:
        raise DataError(
            f"the batch is packed ({', '.join(packed)}): its rows hold several documents, which are the examples. Pass "
            "the dataset itself as data=, with a column document_ids or position_ids, and it is unpacked"
        )


def _problem(model: nn.Module) -> str:
    """What a model's config says that it does, for messages."""
    problem = getattr(getattr(base_model(model), "config", None), "problem_type", None)
    return f" (the model's problem_type is {problem!r})" if isinstance(problem, str) else ""


def _model_inputs(model: nn.Module, batch: Mapping[str, Any], labels: torch.Tensor) -> dict[str, Any]:
    """The batch without its labels, and without what the model's forward does not name; what a decoder is to be given
    is made of the labels, where they are of positions."""
    model = base_model(model)
    named = inspect.signature(model.forward).parameters
    inputs = {k: v for k, v in batch.items() if k in named and k != "labels"}
    ids, mask = batch.get("input_ids"), batch.get("attention_mask")
    wanted = "position_ids" in named and "position_ids" not in batch and offset_positions(model) is None
    if wanted and isinstance(ids, torch.Tensor):
        # Positions counted over what the mask shows: padding on the left then moves nothing. One row per example, so
        # that a tracked position embedding sees whose position it is.
        shown = torch.ones_like(ids) if mask is None else mask.long()
        inputs["position_ids"] = (shown.cumsum(dim=1) - 1).clamp_min(0)
    given = "decoder_input_ids" in batch or "decoder_inputs_embeds" in batch
    if _is_encoder_decoder(model) and labels.ndim == 2 and not given:
        make = getattr(model, "prepare_decoder_input_ids_from_labels", None)
        inputs["decoder_input_ids"] = _moved_on(model, labels) if make is None else make(labels=labels)
    if "use_cache" in named:
        inputs["use_cache"] = False
    return inputs


def _moved_on(model: nn.Module, labels: torch.Tensor) -> torch.Tensor:
    """Labels moved on by one behind the decoder's first token, as Whisper's kind does it by itself.

    Raises:
        DataError: the model's config does not name that token, or padding.
    """
    config = getattr(model, "config", None)
    first, padding = (getattr(config, name, None) for name in ("decoder_start_token_id", "pad_token_id"))
    if not isinstance(first, int) or not isinstance(padding, int):
        raise DataError(
            f"{type(model).__name__} does not say what its decoder is given for labels: pass decoder_input_ids in the "
            "batch"
        )
    before = labels.roll(1, dims=1).masked_fill(labels.roll(1, dims=1) == IGNORE, padding)
    before[:, 0] = first
    return before


def loss_name(loss: PerExample | None) -> str:
    """How a loss is remembered: "default", or its own name (not the module's or function's that it stands in)."""
    if loss is None:
        return "default"
    return getattr(loss, "__name__", type(loss).__name__)
