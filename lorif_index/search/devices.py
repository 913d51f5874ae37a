"""Devices: where rows are scored, and how much of a GPU's memory they may take."""

from __future__ import annotations

import torch

from ..errors import ConfigError
from ..linalg.scratch import CPU
from .coarse import faiss_is_installed, load_faiss

# Part of a GPU's free memory that an index may take.
_SHARE = 0.5


def search_device(asked: str | torch.device | None) -> torch.device:
    """The device that scores rows: a GPU where faiss and torch both see one, unless the CPU is asked for.

    Args:
        asked: "cuda", "cuda:1", "cpu", or None to choose.

    Raises:
        ConfigError: no such device.
    """
    try:
        device = torch.device("cuda" if asked is None else asked)
    except RuntimeError as error:
        raise ConfigError(f"device={asked!r} is no device ({error}): pass 'cpu', 'cuda' or None") from None
    if device.type == "cpu":
        return CPU
    # faiss-gpu imports and silently does nothing on a machine without a GPU: its own count is the gate.
    faiss_sees = int(getattr(load_faiss(), "get_num_gpus", lambda: 0)()) if faiss_is_installed() else 0
    torch_sees = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and min(faiss_sees, torch_sees) > (device.index or 0):
        return device
    if asked is None:
        return CPU
    raise ConfigError(
        f"device={asked!r}, but torch sees {torch_sees} and faiss {faiss_sees} CUDA devices: pass 'cpu' or None, or "
        "install lorif-index[gpu] where there is a GPU"
    )


def room_on(device: torch.device) -> int:
    """Bytes of a device's memory that an index may take; 0 for the CPU, which keeps none."""
    if device.type != "cuda":
        return 0
    free, _ = torch.cuda.mem_get_info(device)
    return int(_SHARE * free)
