"""Signs: random signs by a hash of where they stand, computed where they are wanted and the same on every device.

A sign is one bit of a hash of (key, example, row, position, class), so that it does not depend on what it is drawn
beside, and no state has to be kept or sent (counter-based, as Salmon et al., 2011). One word of 32 bits serves 32
classes. Words are held in int64, and multipliers are below 2^31: no product overflows, on any device.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch

_WORD = 0xFFFFFFFF
# The mixing function of 32 bits with two multipliers that has the least bias known (the search of hash-prospector).
_MULTIPLIERS = 0x21F0AAAD, 0x735A2D97

State = tuple[torch.Tensor, torch.Tensor]
"""64 bits as two words, of one shape."""


def hashed_signs(
    key: tuple[object, ...], ids: np.ndarray, row: int, positions: int, classes: int, like: torch.Tensor
) -> torch.Tensor:
    """(n, positions, classes) of +-1, of the dtype and on the device of `like`.

    Args:
        key: what else they depend on, each part written as text.
        ids: (n,) int64 of the examples.
        row: which of an example's.
        positions, classes: more of either leave the signs of fewer as they are.
        like: a tensor.
    """
    device, numbers = like.device, torch.from_numpy(ids).to(like.device)
    digest = hashlib.sha256("\x1f".join(map(str, key)).encode()).digest()
    first, second = (int.from_bytes(digest[at : at + 4], "little") for at in (0, 4))
    state = torch.full_like(numbers, first), torch.full_like(numbers, second)
    for part in (numbers & _WORD, numbers >> 32 & _WORD, torch.full_like(numbers, row)):
        state = _absorbed(state, part)
    a, b = _absorbed((state[0][:, None], state[1][:, None]), torch.arange(positions, device=device))
    words = torch.arange(-(-classes // 32), device=device)
    words = _mixed((_mixed(words ^ a.unsqueeze(2)) + b.unsqueeze(2)) & _WORD)
    # Byte by byte, by a table of what each says. Few classes take a part of a word.
    bits, taken = min(classes, 8), -(-min(classes, 32) // 8)
    parts = (words.unsqueeze(3) >> 8 * torch.arange(taken, device=device)).bitwise_and_(255)
    table = (torch.arange(256, device=device)[:, None] >> torch.arange(bits, device=device)) & 1
    signs = (2 * table - 1).to(like.dtype).index_select(0, parts.flatten())
    return signs.reshape(len(ids), positions, words.shape[2] * taken * bits)[:, :, :classes]


def _absorbed(state: State, part: torch.Tensor) -> State:
    """The state after another 32 bits: no two parts lead from one state to the same."""
    a = _mixed(state[0] ^ part)
    return a, _mixed((state[1] + a) & _WORD)


def _mixed(x: torch.Tensor) -> torch.Tensor:
    """A bijection of words of 32 bits, each bit of which depends on all."""
    for shift, by in zip((16, 15), _MULTIPLIERS, strict=True):
        x = (x ^ x >> shift) * by & _WORD
    return x ^ x >> 15
