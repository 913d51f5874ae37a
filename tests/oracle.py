"""A dense float64 reference for everything a score is made of. Imports nothing from the package: slow and obvious.

Gradients come from differentiating the parameters themselves, one example at a time.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn


def example_gradients(
    model: nn.Module,
    batch_of: Callable[[int], Any],
    count: int,
    loss: Callable[[nn.Module, Any], torch.Tensor],
    weights: dict[str, tuple[str, str | None, bool]],
) -> dict[str, np.ndarray]:
    """Per-example gradients (n, inputs [+ 1 for the bias], outputs) in float64.

    Args:
        batch_of: example number -> a batch of one.
        loss: scalar loss of a batch of one.
        weights: layer -> (weight's parameter name, bias's or None, whether the weight is stored inputs first).
    """
    model = copy.deepcopy(model).double().eval()
    named = dict(model.named_parameters())
    out: dict[str, list[np.ndarray]] = {layer: [] for layer in weights}
    for i in range(count):
        model.zero_grad(set_to_none=True)
        loss(model, batch_of(i)).sum().backward()
        for layer, (weight, bias, inputs_first) in weights.items():
            grad = named[weight].grad
            assert grad is not None
            matrix = (grad if inputs_first else grad.flatten(1).T).numpy().copy()
            if bias is not None:
                bias_grad = named[bias].grad
                assert bias_grad is not None
                matrix = np.concatenate([matrix, bias_grad.numpy()[None]])
            out[layer].append(matrix)
    return {layer: np.stack(parts) for layer, parts in out.items()}


def position_gradients(
    model: nn.Module,
    batch: Any,
    loss: Callable[[nn.Module, Any], torch.Tensor],
    layers: dict[str, list[tuple[str, bool]]],
    biases: dict[str, bool],
) -> dict[str, dict[str, np.ndarray]]:
    """One example's gradient position by position: layer -> module -> (T, inputs [+ 1 for the bias], outputs), float64.

    A module is run again on its own input, and its output's gradient goes back from one position at a time.

    Args:
        batch: of one.
        layers: layer -> the modules that use its weight, and whether they store it inputs first.
        biases: layer -> whether its bias is tracked.
    """
    model = copy.deepcopy(model).double().eval()
    modules = dict(model.named_modules())
    calls: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    handles = []
    for uses in layers.values():
        for name, _ in uses:

            def hook(module: nn.Module, args: Any, output: torch.Tensor, name: str = name) -> torch.Tensor:
                output.retain_grad()
                calls.setdefault(name, []).append((args[0].detach().clone(), output))
                # What follows may change its input in place.
                return output.clone()

            handles.append(modules[name].register_forward_hook(hook))
    loss(model, batch).sum().backward()
    for handle in handles:
        handle.remove()
    out: dict[str, dict[str, np.ndarray]] = {}
    for layer, uses in layers.items():
        out[layer] = {}
        for name, inputs_first in uses:
            module, total = modules[name], 0.0
            for x, output in calls[name]:
                assert output.grad is not None
                spatial = isinstance(module, (nn.Conv1d, nn.Conv2d))
                # Positions last for convolutions, before the features elsewhere.
                dy = output.grad.flatten(2) if spatial else output.grad.reshape(1, -1, output.grad.shape[-1])
                rows = []
                for t in range(dy.shape[2 if spatial else 1]):
                    only = torch.zeros_like(dy)
                    if spatial:
                        only[:, :, t] = dy[:, :, t]
                    else:
                        only[:, t] = dy[:, t]
                    wanted = [module.weight, *([module.bias] if biases[layer] else [])]
                    with torch.enable_grad():
                        grads = torch.autograd.grad(module(x), wanted, only.reshape(output.shape))
                    matrix = (grads[0] if inputs_first else grads[0].flatten(1).T).numpy()
                    if biases[layer]:
                        matrix = np.concatenate([matrix, grads[1].numpy()[None]])
                    rows.append(matrix)
                total = total + np.stack(rows)
            out[layer][name] = np.asarray(total)
    return out


def project(g: np.ndarray, p_in: np.ndarray, p_out: np.ndarray) -> np.ndarray:
    return np.einsum("ia,nij,jb->nab", p_in.astype(np.float64), g, p_out.astype(np.float64))


def truncate(g: np.ndarray, rank: int | None) -> np.ndarray:
    """The best rank-c approximation of each matrix."""
    if rank is None or rank >= min(g.shape[1:]):
        return g
    u, s, v = np.linalg.svd(g, full_matrices=False)
    s[:, rank:] = 0
    return (u * s[:, None, :]) @ v


def second_moment(g: np.ndarray, rows_per_example: int = 1) -> np.ndarray:
    flat = g.reshape(len(g), -1)
    return flat.T @ flat / (len(g) / rows_per_example)


def eigen(c: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(eigenvectors, eigenvalues), falling."""
    values, vectors = np.linalg.eigh(c)
    return vectors[:, ::-1], values[::-1]


def damping(
    rule: str, c: np.ndarray, rank: int | None = None, value: float = 0.0, row_bytes: int | None = None
) -> float:
    """lambda of a second moment; "auto" is .03 of the mean eigenvalue for rows of 4 kB, by the root of their bytes."""
    if rule == "auto":
        assert row_bytes is not None
        return 0.03 * 64 / row_bytes**0.5 * np.trace(c) / len(c)
    if rule == "relative":
        return value * np.trace(c) / len(c)
    if rule == "absolute":
        return value
    assert rule == "paper"
    return 0.1 * eigen(c)[1][: None if rank is None else rank + 10].mean()


def sides(g: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvectors of both sides' second moments, (inputs, inputs) and (outputs, outputs), falling."""
    return eigen(np.einsum("nij,nkj->ik", g, g))[0], eigen(np.einsum("nji,njk->ik", g, g))[0]


def products(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """(D, D): the columns are vec(u_a w_b^T)."""
    return np.kron(left, right)


def low_rank(c: np.ndarray, rank: int | None, share: float) -> np.ndarray:
    """B (D, r): the low-rank part of C is B B^T, in directions that stand out against a diagonal that is asked for."""
    d = share * np.diag(c) + 1e-3 * np.diag(c).mean() if share else np.ones(len(c))
    root = np.sqrt(d)
    vectors, values = eigen(c / np.outer(root, root))
    return root[:, None] * vectors[:, :rank] * np.sqrt(values[:rank].clip(0))


def inverse(
    squares: np.ndarray, factor: np.ndarray, share: float, lam: float, basis: np.ndarray | None = None
) -> np.ndarray:
    """The dense inverse of a diag(L) + (1 - a) B B^T + lambda I, whose coordinates are those of `basis`."""
    inside = np.linalg.inv(share * np.diag(squares) + (1 - share) * factor @ factor.T + lam * np.eye(len(squares)))
    return inside if basis is None else basis @ inside @ basis.T


def scores(queries: np.ndarray, stored: np.ndarray, h_inverse: np.ndarray) -> np.ndarray:
    """(q, n) of one layer."""
    return queries.reshape(len(queries), -1) @ h_inverse @ stored.reshape(len(stored), -1).T
