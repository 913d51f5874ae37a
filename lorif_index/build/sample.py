"""Sample: the random examples that everything is fitted on: their gradients and curvature rows, for several walks."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np

from ..capture.gradients import GradientBlock, GradientSource, finite_blocks
from ..capture.probes import Probes
from ..capture.sources import GivenGradients, ModelGradients, ProbedGradients
from ..capture.spool import Spool
from ..curvature.fit import RowPass, thinning
from ..errors import NonFiniteError
from ..linalg.sampling import drawn
from .inputs import Inputs
from .state import BuildState


class SampleRows:
    """The sample of a build, this rank's part of it.

    Args:
        inputs: what is built of.
        state: how far the build is.

    Attributes:
        spool: the gradients of all examples, where the sample is all of them and they are kept on disk: encoding reads
            them back instead of computing them again. None before they are taken.
        skipped: ids of all examples that were left out then.
    """

    def __init__(self, inputs: Inputs, state: BuildState) -> None:
        self._inputs, self._state = inputs, state
        self._taken: tuple[RowPass, int] | None = None
        self._kept: Spool | None = None
        self._beside: Spool | None = None
        self.spool: Spool | None = None
        self.skipped: list[int] = []

    def drawn(self, count: int) -> np.ndarray:
        """The first ids of all in random order: the fitting sample's, then further ones."""
        total = self._inputs.source.count
        return drawn(total, count, self._inputs.config.seed, "curvature-sample", total)

    @cached_property
    def ids(self) -> np.ndarray:
        """Sorted ids of the sample."""
        return np.sort(self.drawn(self._inputs.config.sample.size))

    @property
    def on_disk(self) -> bool:
        """Whether the gradients, once they were taken, are kept there; the same on all ranks."""
        return self._kept is not None

    def gradients(self, step: int = 1) -> tuple[RowPass, int]:
        """Unfactored gradients of this rank's part, the same at each walk, or every step-th of them; and how many there
        are in the whole."""
        if self._taken is None:
            wanted = self.ids
            everything = len(wanted) == self._inputs.source.count
            mine = self._state.own(wanted)
            if self._together is not None:
                rows, count, spool, skipped = self._with_rows(self._together, mine)
            else:
                rows, count, spool, skipped = self.walkable("sample", self._inputs.source, mine, everything)
            if everything and spool is not None:
                self.spool, self.skipped = spool, skipped
            self._taken, self._kept = (rows, count), spool
        if step == 1:
            return self._taken
        kept = self._kept
        if kept is None:
            some = self._state.own(self.ids[::step])
            return self.walkable("sample", self._inputs.source, some, False)[:2]
        return (lambda: kept.sample(kept.ids[::step])), self._state.ranks.count(len(kept.ids[::step]))

    @cached_property
    def probed(self) -> ProbedGradients | None:
        """The source of the curvature's rows, where these are of probes, and still to be taken."""
        inputs, config = self._inputs, self._inputs.config
        fitted = "curvature" in self._state.manifest.fits
        if (
            fitted
            or inputs.curvature is not None
            or inputs.head is None
            or not isinstance(inputs.source, ModelGradients)
        ):
            return None
        return inputs.source.probed(Probes(inputs.head, config.sample.probes, config.seed, len(self.ids)))

    @cached_property
    def step(self) -> int:
        """Of the sample every step-th example has curvature rows: what the fit would leave out is not computed."""
        if self.probed is None:
            return 1
        mixed = self._inputs.curvature_kind == "mixed"
        return thinning(len(self.ids), self._inputs.specs, self.probed.probes.each + mixed)

    def curvature_rows(self) -> tuple[RowPass, int, Spool | None]:
        """The rows of `probed`, for several walks; how many there are in the whole; and where they are kept."""
        if self._together is not None:
            # They come with the gradients.
            self.gradients()
        if self._beside is not None:
            return self._beside.walk, self._some(self._state.ranks.count(self._beside.count)), self._beside
        if self.probed is None:
            raise ValueError("there are no curvature rows to take: `probed` is None")
        mine = self._state.own(self.ids[:: self.step])
        return self.walkable("probes", self.probed, mine, False, each=self.probed.probes.each)[:3]

    @cached_property
    def _together(self) -> ProbedGradients | None:
        """What gives gradients and curvature rows of the sample from the same forward passes, where both are wanted of
        all of it and are kept on disk; else None, on all ranks."""
        probed, inputs, ids = self.probed, self._inputs, self.ids
        if probed is None or self.step > 1 or not probed.probes.gives_losses:
            return None
        everything = len(ids) == inputs.source.count
        wanted = everything or inputs.curvature_kind == "mixed"
        fit = wanted and self._fits(self._state.own(ids), inputs.source, everything, 1 + probed.probes.each)
        return probed if fit else None

    def _with_rows(self, probed: ProbedGradients, mine: np.ndarray) -> tuple[RowPass, int, Spool | None, list[int]]:
        """As `walkable` gives the gradients; the curvature rows beside them."""
        state, policy = self._state, self._inputs.config.on_nonfinite
        skipped: list[int] = []
        with state.stage("sample", len(mine)) as progress, state.ranks.jointly():
            gradients, beside = Spool(state.path), Spool(state.path)
            state.stack.callback(gradients.close)
            state.stack.callback(beside.close)
            with gradients.writing() as write, beside.writing() as write_beside:
                for first, *others in state.spoken_for(probed.with_losses(mine)):
                    for block in finite_blocks([first], policy, skipped):
                        write(block)
                    for block in finite_blocks(others, policy, []):
                        write_beside(block)
                    progress.advance(first.count)
        self._beside = beside
        return gradients.walk, self._some(state.ranks.count(gradients.count)), gradients, skipped

    def walkable(
        self, stage: str, source: GradientSource, wanted: np.ndarray, everything: bool, *, each: int = 1
    ) -> tuple[RowPass, int, Spool | None, list[int]]:
        """Some rows of a source, for several walks, kept on disk meanwhile where they fit; how many of these all ranks
        have; and the ids of what was skipped here.

        Args:
            stage: what taking them is called.
            source: of examples.
            wanted: this rank's.
            everything: whether all ranks together take all of them.
            each: rows of an example.
        """
        state, config, ranks = self._state, self._inputs.config, self._state.ranks
        skipped: list[int] = []

        def walk() -> Iterator[GradientBlock]:
            skipped.clear()
            return state.spoken_for(finite_blocks(source.sample(wanted), config.on_nonfinite, skipped))

        if not self._fits(wanted, source, everything, each):
            with ranks.jointly("sample"):
                count = sum(block.count for block in walk())
            return walk, self._some(ranks.count(count)), None, skipped
        with state.stage(stage, len(wanted) * each) as progress:
            with ranks.jointly():
                spool = Spool(state.path, _told(walk(), progress.advance))
            state.stack.callback(spool.close)
            count = self._some(ranks.count(spool.count))
        return spool.walk, count, spool, list(skipped)

    def _fits(self, wanted: np.ndarray, source: GradientSource, everything: bool, each: int) -> bool:
        """Whether so many rows of this rank's examples are kept on disk; the same on all ranks."""
        state, config, ranks = self._state, self._inputs.config, self._state.ranks
        need = len(wanted) * each * sum(spec.dim for spec in self._inputs.specs.values()) * 4
        sharing = state.home.leaders.count(state.home.leader)
        most = min(config.compute.spool_bytes, shutil.disk_usage(state.path).free // 2 // sharing)
        # Given gradients are there to be walked again; a part of them is found faster in a copy.
        return not ranks.count(int(need > most)) and not (everything and isinstance(source, GivenGradients))

    def _some(self, count: int) -> int:
        """The count of rows to fit with, where there are some."""
        if not count:
            raise NonFiniteError(
                "every example of the sample has inf or NaN gradients, and on_nonfinite='skip' leaves nothing to fit "
                "with: mend the data or the loss"
            )
        return count


def _told(blocks: Iterator[GradientBlock], advance: Any) -> Iterator[GradientBlock]:
    for block in blocks:
        yield block
        advance(block.count)
