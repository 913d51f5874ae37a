"""Subspace: the leading eigenpairs of a sum of outer products whose rows are walked, never held.

Subspace iteration (Halko, Martinsson and Tropp, arXiv:0909.4061): a block Q of directions is multiplied by
A = sum g g^T in each walk, O(D r) memory, and made orthonormal between two. The last product Y = A Q gives the
eigenpairs without a further walk, by a Nyström approximation,

    A ~ Y (Q^T Y)^-1 Y^T

(Tropp, Yurtsever, Udell and Cevher, arXiv:1706.05736, algorithm 3, which shifts A by what it is rounded by). The
curvature of a layer, learnt projections and the principal components of a sketch are found so.

Rows may stand for M g, of a linear map M (`Lift`): the sum of M g (M g)^T B is M (sum g g^T (M^T B)), so that M is
applied to the block of directions once a pass and never to the rows.

Over several ranks each walks its own rows. A pass's partial sums, D x (r + 10), are reduced to the rank that owns the
fit, which orthonormalises them and spreads the basis: the bytes of a ring all-reduce, each factorisation done once
and the fits of different layers side by side, and the same basis to the last bit everywhere. (Giving each rank some
layers' rows instead would move D floats a row and layer: more as soon as a rank has more rows than passes x (r + 10).)
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import torch

from ..ranks import ALONE, Ranks, shared_out
from .projection import keyed_generator

OVERSAMPLING = 10
GROUP_BYTES = 4 << 30
"""Of fits that go through their passes together."""
# A dense matrix up to so many times as wide as the block takes no more operations than the walks that it saves (with
# one power iteration four products with the block), and is exact.
_WHOLE_RATIO = 4
# Of iterations on a dense matrix.
_MOST_ITERATIONS, _STANDS_STILL = 30, 1e-6
# Of a Nyström approximation, over the norm of Y; and the least of its middle's eigenvalues, over the largest.
_SHIFT, _SMALLEST = 1e-8, 1e-12
# Rows that are added to a dense matrix together: fewer would wait for its memory.
_TOGETHER = 512

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Eigenpairs:
    """What a fit found, for the sum over the rows divided by what was asked for.

    Attributes:
        vectors: (D, r) float32, orthonormal columns, in falling order; signs are fixed.
        values: (at least r,) float64, falling: those of the vectors and up to 10 more.
        trace: the rows' squared norms, summed and divided likewise; exact. Of M g it is 0.
    """

    vectors: torch.Tensor
    values: torch.Tensor
    trace: float


def with_fixed_signs(vectors: torch.Tensor) -> torch.Tensor:
    """Columns whose largest entries are positive, so that a refit of the same rows gives the same files."""
    largest = vectors.abs().argmax(dim=0, keepdim=True)
    return vectors * torch.sign(torch.gather(vectors, 0, largest))


class Lift(Protocol):
    """A linear map M of rows (n, D)."""

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """M g of each row g, (n, D)."""
        ...

    def back(self, rows: torch.Tensor) -> torch.Tensor:
        """M^T g of each row g, (n, D)."""
        ...


class SubspaceFit:
    """The state of one fit: a block of directions, and what the rows make of it in a walk.

    Args:
        key: names the starting block's random numbers, with the seed.
        dim: D, the width of the rows.
        rank: r, or None for all; never above D or the number of rows.
        count: number of rows.
        seed: of the starting block.
        device: where the products are computed.
        whole_up_to: a D up to which the dense matrix is held, whatever the rank.
        times: how many times as wide as r + 10 the block is; with one walk a wider one makes up for others.
        lift: M, where the sum is of M g of the rows g; None: of the rows.

    Attributes:
        trace: squared norms of the rows seen, summed; with M it is not looked at, and 0.
    """

    def __init__(
        self,
        key: tuple[str, ...],
        dim: int,
        rank: int | None,
        count: int,
        seed: int,
        device: torch.device,
        *,
        whole_up_to: int = 0,
        times: int = 1,
        lift: Lift | None = None,
    ) -> None:
        self.dim = dim
        self.device = device
        self.rank = min(dim if rank is None else rank, dim, count)
        narrow = min(self.rank + OVERSAMPLING, dim)
        whole = dim <= max(whole_up_to, _WHOLE_RATIO * narrow if times == 1 else 0)
        self.block = dim if whole else min(times * narrow, dim)
        self.exact = self.block >= dim
        self._key = key
        self._seed = seed
        self._lift = lift
        self.trace = 0.0
        self._squares = torch.zeros((), dtype=torch.float64)
        self._last, self._tracing = False, lift is None
        # Of the rows that wait to be added, the first so many are there.
        self._held = 0
        self._basis: torch.Tensor
        # What rows are multiplied by: the basis, or M^T times it.
        self._block: torch.Tensor
        self._sum: torch.Tensor
        self._room: torch.Tensor
        self.forget()

    @property
    def nbytes(self) -> int:
        """Memory that the fit takes."""
        if self.exact:
            return 12 * self.dim * self.block + 8 * self.block**2 + 8 * self.dim * _TOGETHER
        # Three of the block's size, in float64, while it is factorised.
        return self.held_bytes + 24 * self.dim * self.block

    @property
    def held_bytes(self) -> int:
        """What it holds between two blocks of rows; the rest of `nbytes` is taken by one fit at a time."""
        if self.exact:
            return 8 * self.block**2 + 4 * self.dim * _TOGETHER
        return 4 * self.dim * self.block * (2 if self._lift is None else 3)

    @property
    def cost(self) -> float:
        """Of its factorisations, beside other fits'."""
        if self._few:
            return self.dim**2 * (self.rank + OVERSAMPLING)
        return self.dim**3 if self.exact else 4 * self.dim * self.block**2

    @property
    def _few(self) -> bool:
        """Whether few eigenvectors are wanted of a dense matrix (see `leading`)."""
        return self.exact and (self.rank + OVERSAMPLING) * _WHOLE_RATIO < self.dim

    def passes(self, power_iterations: int) -> int:
        """Walks over the rows that it needs: one where the dense matrix is held."""
        return 1 if self.exact else 1 + power_iterations

    def products(self, power_iterations: int) -> int:
        """Products of the rows with its block, in all its walks: two in each, one with a dense matrix."""
        return 1 if self.exact else 2 * self.passes(power_iterations)

    @property
    def last_bytes(self) -> int:
        """Of what is summed over ranks in the last walk."""
        return 8 * self.block**2 if self.exact else 4 * self.dim * self.block

    def begin(self, number: int, passes: int) -> bool:
        """Prepares pass `number` of `passes`; whether this fit takes part in it."""
        self._last = number == passes - 1
        if self.exact and not self._last:
            # One pass is enough.
            return False
        kind = torch.float64 if self.exact else torch.float32
        self._sum = torch.zeros(self.dim, self.block, dtype=kind, device=self.device)
        if number == 0 and not self.exact:
            self._basis = self._start(self.block)
            self._block = self._lifted_basis()
        return True

    def _start(self, columns: int) -> torch.Tensor:
        """A random block (D, columns)."""
        generator = np.random.Generator(keyed_generator(self._seed, *self._key))
        return torch.from_numpy(generator.standard_normal((self.dim, columns), dtype=np.float32)).to(self.device)

    def _lifted_basis(self) -> torch.Tensor:
        return self._basis if self._lift is None else self._lift.back(self._basis.T).T.contiguous()

    def add(self, g: torch.Tensor) -> None:
        """Takes rows (b, D)."""
        if self._tracing:
            # Summed where the rows are, so that a GPU is not waited for at each block.
            norms = torch.linalg.vector_norm(g, dim=1, dtype=torch.float64)
            self._squares = self._squares.to(g.device) + norms.square().sum()
        if self.exact:
            self._hold(g)
        else:
            self._sum.addmm_(g.T, g @ self._block)

    def _hold(self, g: torch.Tensor) -> None:
        """Copies rows, whose memory may be used again, until there are enough of them."""
        if not len(self._room):
            self._room = torch.empty(_TOGETHER, self.dim, device=self.device)
        for part in g.split(_TOGETHER):
            first = part[: _TOGETHER - self._held]
            for rows in (first, part[len(first) :]):
                self._room[self._held : self._held + len(rows)] = rows
                self._held += len(rows)
                if self._held == _TOGETHER:
                    self._add_held()

    def _add_held(self) -> None:
        rows = self._room[: self._held]
        if len(rows):
            self._sum += rows.T @ rows
            self._held = 0

    def close(self, ranks: Ranks, owner: int) -> None:
        """Ends a walk: what all ranks have seen comes together on the owner."""
        self._add_held()
        self.trace += float(self._squares)
        self._squares, self._tracing = torch.zeros((), dtype=torch.float64), False
        self._sum = ranks.reduced(self._sum, owner)

    def orthonormalise(self) -> None:
        """On the owner, between two passes: the sketch becomes the next basis."""
        if not self._last:
            # Scaled first: sums of squares of very small gradients would leave float32's range in the factorisation.
            sketch = self._lifted_sum().double()
            peak = sketch.abs().amax()
            self._basis = torch.linalg.qr(sketch / torch.where(peak > 0, peak, 1.0)).Q.float().contiguous()

    def _lifted_sum(self) -> torch.Tensor:
        return self._sum if self._lift is None else self._lift.forward(self._sum.T).T

    def share(self, ranks: Ranks, owner: int) -> None:
        """All ranks get the owner's basis."""
        if not self._last:
            self._basis = ranks.spread(self._basis, owner)
            self._block = self._lifted_basis()
            self._sum = torch.empty(0)

    def result(self, divisor: float) -> Eigenpairs:
        """The eigenpairs of the sum divided by `divisor`, on the owner; the fit is used up."""
        values, vectors = self._whole(divisor) if self.exact else self._nystrom(divisor)
        self.forget()
        most = min(self.rank + OVERSAMPLING, self.block)
        found = torch.zeros(most, dtype=torch.float64)
        found[: min(len(values), most)] = values.clamp_min(0.0)[:most].cpu()
        basis = with_fixed_signs(vectors[:, : self.rank])
        return Eigenpairs(basis.float().contiguous().cpu(), found, self.trace / divisor)

    def _whole(self, divisor: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the dense matrix."""
        moment = self._sum / divisor
        if self._lift is not None:
            # M C M^T of a symmetric C.
            moment = self._lift.forward(self._lift.forward(moment).T)
            moment = (moment + moment.T) / 2
        if self._few:
            return leading(moment, self._start(self.rank + OVERSAMPLING).double())
        values, vectors = torch.linalg.eigh(moment)
        return values.flip(0), vectors.flip(1)

    def _nystrom(self, divisor: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Of A ~ Y (Q^T Y)^-1 Y^T, with A + s I in place of A."""
        start, product = self._basis.double(), self._lifted_sum().double() / divisor
        shift = float(_SHIFT * product.norm())
        product += shift * start
        middle = start.T @ product
        values, vectors = torch.linalg.eigh((middle + middle.T) / 2)
        kept = values > _SMALLEST * values[-1]
        if not bool(kept.any()):
            return torch.zeros_like(values), torch.linalg.qr(start).Q
        root = vectors[:, kept] / values[kept].sqrt()
        left, sizes, _ = torch.linalg.svd(product @ root, full_matrices=False)
        if left.shape[1] < self.rank:
            # What rounding has left of directions that nothing lies in.
            left = torch.linalg.qr(torch.cat([left, start], dim=1)).Q
        return sizes.square() - shift, left

    def forget(self) -> None:
        """Gives its memory back, if it has any yet."""
        # The block that rows are multiplied by, what is summed in a pass, and rows that wait to be added.
        self._basis = self._block = self._sum = self._room = torch.empty(0)

    def empty(self) -> Eigenpairs:
        """Room for a result that another rank has."""
        values = torch.empty(min(self.rank + OVERSAMPLING, self.block), dtype=torch.float64)
        return Eigenpairs(torch.empty(self.dim, self.rank), values, 0.0)


def leading(matrix: torch.Tensor, start: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The leading eigenvalues, falling, and eigenvectors of a dense symmetric matrix that has no negative ones, by
    subspace iteration from a block of columns, until the sum of the values stands still. Of few eigenvectors of many
    that takes a small part of what all would (of 26 of 3,072 a sixth)."""
    basis, before = torch.linalg.qr(start).Q, 0.0
    for _ in range(_MOST_ITERATIONS):
        product = matrix @ basis
        kept = float((basis * product).sum())
        basis = torch.linalg.qr(product).Q
        if kept <= before * (1 + _STANDS_STILL):
            break
        before = kept
    values, vectors = torch.linalg.eigh(basis.T @ matrix @ basis)
    return values.flip(0), basis @ vectors.flip(1)


def grouped(fits: Mapping[Key, SubspaceFit]) -> Iterator[list[tuple[Key, SubspaceFit]]]:
    """Fits that go through their passes together, in order: as many as `GROUP_BYTES` hold, or one that is larger."""
    group: list[tuple[Key, SubspaceFit]] = []
    held = peak = 0
    for key, fit in fits.items():
        # As `together_bytes` counts, but each fit once: of experts there are thousands.
        held, peak = held + fit.held_bytes, max(peak, fit.nbytes - fit.held_bytes)
        if group and held + peak > GROUP_BYTES:
            yield group
            group, held, peak = [], fit.held_bytes, fit.nbytes - fit.held_bytes
        group.append((key, fit))
    if group:
        yield group


def together_bytes(fits: Iterable[SubspaceFit]) -> int:
    """Memory of fits that go through their passes together: what all hold, and the factorisation of one at a time."""
    fits = list(fits)
    return sum(fit.held_bytes for fit in fits) + max((fit.nbytes - fit.held_bytes for fit in fits), default=0)


def fit_in_groups(
    fits: Mapping[Key, SubspaceFit],
    power_iterations: int,
    divisor: float,
    walk: Callable[[Mapping[Key, SubspaceFit]], None],
    planned: Callable[[int], None],
    ranks: Ranks = ALONE,
) -> Iterator[tuple[Key, Eigenpairs]]:
    """Runs fits through their passes, as many together as 4 GiB hold, and yields their results, in order.

    Args:
        fits: key -> a fit that has not begun; the same on all ranks.
        power_iterations: walks that a fit takes beside its last.
        divisor: of the sum over the rows.
        walk: walks this rank's rows once and adds them to the fits that it is given, some of `fits`.
        planned: told how many walks a group will take, before its first.
        ranks: who have the rows. Results are rank 0's; on others they hold the trace alone.
    """
    for group in grouped(fits):
        costs = [fit.cost for _, fit in group]
        owners = dict(zip((key for key, _ in group), shared_out(costs, ranks.size), strict=True))
        passes = max(fit.passes(power_iterations) for _, fit in group)
        planned(passes)
        for number in range(passes):
            active = {key: fit for key, fit in group if fit.begin(number, passes)}
            with ranks.jointly():
                walk(active)
            for key, fit in active.items():
                fit.close(ranks, owners[key])
            with ranks.jointly():
                for key, fit in active.items():
                    if owners[key] == ranks.rank:
                        fit.orthonormalise()
            for key, fit in active.items():
                fit.share(ranks, owners[key])
        traces = ranks.sum(torch.tensor([fit.trace for _, fit in group], dtype=torch.float64)).tolist()
        found: dict[Key, Eigenpairs] = {}
        with ranks.jointly():
            for (key, fit), trace in zip(group, traces, strict=True):
                fit.trace = trace
                if ranks.size > 1 and owners[key] == ranks.rank:
                    # Side by side, before any waits for another's.
                    found[key] = fit.result(divisor)
        for key, fit in group:
            mine = found.pop(key) if key in found else fit.result(divisor) if ranks.size == 1 else fit.empty()
            fit.forget()
            vectors = ranks.moved(mine.vectors, owners[key], 0)
            values = ranks.moved(mine.values, owners[key], 0)
            yield key, Eigenpairs(vectors, values, fit.trace / divisor)
