"""Gather: gradients that a training gives on its way, kept on disk for the build at its end.

The projections are learnt when gathering begins, of the model as it is then; all else is fitted at the end. So at the
end gradients are computed of those few examples alone that the training did not reach.
"""

from __future__ import annotations

import shutil
import warnings
import weakref
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..capture.along import Along
from ..capture.contents import contents_of
from ..capture.data import Batch, ExampleSource, first_batch
from ..capture.ensemble import count_of
from ..capture.gradients import GradientBlock, keep_finite
from ..capture.sources import ModelGradients, model_digest
from ..capture.spool import Spool
from ..errors import ConfigError
from ..progress import Reporter
from ..ranks import ALONE
from ..storage.locks import WriterLock
from ..storage.manifest import BUILDING, Manifest, read_manifest
from .inputs import Given, Inputs
from .pipeline import begin_index, finish_index
from .sample import SampleRows
from .stages import fit_projections

# Names a build that was begun by gathering: no other call goes on with it.
_MARK = "gathering"


def forget(path: Path) -> None:
    """What a gathering left unfinished in a folder is of a model that is gone: the next build there begins anew."""
    if not (path / BUILDING).is_file():
        return
    lock = WriterLock(path)
    lock.acquire()
    try:
        if _MARK in read_manifest(path, BUILDING).fingerprint:
            Manifest({}, {}, []).write(path, BUILDING)
    finally:
        lock.release()


class Gathered(ModelGradients):
    """Gradients of a model over a source of examples, of which some are on disk already.

    Args:
        inputs: of the build.
        spool: what is there.
        said: its "gathered" counts those that were given.
    """

    def __init__(self, inputs: Inputs, spool: Spool, said: dict[str, Any]) -> None:
        if inputs.capture is None or inputs.examples is None:
            raise ValueError("gradients of a model are gathered")
        super().__init__(inputs.capture.capture(inputs.loss).trust(), inputs.examples)
        # Seen when it was begun.
        self._reached = True
        self._said = said
        self._spool, self._there = spool, np.zeros(self.count, dtype=bool)
        self._there[spool.ids] = True
        self._at_once = self.window = self.window or Spool.window

    def blocks(self, start: int = 0, stop: int | None = None) -> Iterator[GradientBlock]:
        stop = self.count if stop is None else stop
        for first in range(start - start % self._at_once, stop, self._at_once):
            ids = np.arange(max(first, start), min(first + self._at_once, stop), dtype=np.int64)
            there = self._there[ids]
            for block in self._spool.sample(ids[there]):
                self._said["gathered"] += block.count
                yield block
            yield from self.sample(ids[~there])


class Gatherer:
    """A build that is begun while its model trains. Its folder is locked until it ends.

    Args:
        path: as for a build; what another gathering left unfinished there is begun anew.
        given: as for a build, with a model and data.
        report: of the first stages.

    Attributes:
        count: of the examples.
        trouble: why it has stopped; None where it has not.

    Raises:
        ConfigError: nothing would be gained, since the fit takes the gradients of all examples by itself.
        CaptureError: the model's own passes cannot be listened to. Otherwise as for a build.
    """

    def __init__(self, path: Path, given: Given, report: Reporter) -> None:
        forget(path)
        self._given = given
        self.trouble: str | None = None
        # Rows of batches that are no examples of the data, batches of which no pass was seen, and batches begun.
        self._unknown, self._unseen, self._begun = 0, 0, 0
        self._stack = ExitStack()
        # Also where the program ends before: temporary rows would stay.
        self._closing = weakref.finalize(self, self._stack.close)
        try:
            self._begin(path, self._stack, report)
        except BaseException:
            self._closing()
            forget(path)
            raise

    def _begin(self, path: Path, stack: ExitStack, report: Reporter) -> None:
        self._inputs, self._state = inputs, state = begin_index(path, self._given, report, ALONE, stack, {_MARK: True})
        if inputs.capture is None or inputs.examples is None or count_of(inputs.capture.model) is not None:
            raise ConfigError("gathering takes data= and the one model= that is trained")
        self.count, sample = inputs.source.count, inputs.config.sample.size
        if self.count <= sample:
            raise ConfigError(
                f"gathering has no use for {self.count} examples: a build's fit takes the gradients of {sample} "
                "(Sample.size) in any case. Build at the end"
            )
        self._along = Along(inputs.capture, inputs.loss)
        fit_projections(inputs, state, SampleRows(inputs, state))
        self._named = _Named(inputs.examples)
        self._there = np.zeros(self.count, dtype=bool)
        self._rows = self._ids = np.empty(0, np.int64)
        each = 4 * sum(spec.dim for spec in inputs.specs.values())
        self._most = min(inputs.config.compute.spool_bytes, shutil.disk_usage(path).free // 2) // each
        if self._most < self.count:
            warnings.warn(
                f"of {self.count:,} examples, of {each:,} bytes each, {self._most:,} are gathered: no more fit in "
                f"Compute(spool_bytes={inputs.config.compute.spool_bytes:,}) and half of the free disk. The others are "
                "computed at the end",
                stacklevel=5,
            )
        self._spool = Spool(path)
        stack.callback(self._spool.close)
        self._open = stack.enter_context(ExitStack())
        self._write = self._open.enter_context(self._spool.writing())
        self._ears = self._open.enter_context(ExitStack())
        self._ears.enter_context(self._along.listening())

    @property
    def found(self) -> int:
        """Of how many examples there are gradients."""
        return int(self._there.sum())

    def begin(self, batch: Batch) -> None:
        """The training's forward and backward pass of a batch follow."""
        if self.trouble is not None:
            return
        rows, ids, unknown = self._named.of(batch)
        self._begun, self._unknown = self._begun + 1, self._unknown + unknown
        # An example may come twice in a batch.
        self._ids, first = np.unique(ids, return_index=True)
        self._rows = rows[first]
        new = np.flatnonzero(~self._there[self._ids])[: max(self._most - self.found, 0)]
        self._rows, self._ids = self._rows[new], self._ids[new]
        if len(new):
            self._along.begin(self._named.own(batch))

    def end(self) -> None:
        """Its backward pass is done. What cannot be taken ends the gathering, with a warning, and not the training."""
        if not len(self._ids):
            return
        rows, ids = self._rows, self._ids
        self._rows = self._ids = np.empty(0, np.int64)
        try:
            block = self._along.end()
            if block is None:
                self._unseen += 1
                return
            block = replace(block.select(rows), ids=ids, contents=self._named.contents[ids])
            # Others are taken at the end, where it is decided what becomes of them.
            block = keep_finite(block, "skip", [])
            if block.count:
                self._write(block)
                self._there[block.ids] = True
        except Exception as error:
            # Whatever it is (the user's loss, the disk), the training is worth more.
            self.trouble = f"{type(error).__name__}: {error}"
            warnings.warn(f"gathering ends at {self.found} examples: {self.trouble}", stacklevel=3)
            self._ears.close()

    def drop(self) -> None:
        """Nothing is taken of the batch that was begun."""
        self._rows = self._ids = np.empty(0, np.int64)
        self._along.drop()

    def finish(self, metadata: dict[str, Any], report: Reporter) -> None:
        """Ends the build, of the model as it is now; raises as a build does."""
        if not self._closing.alive:
            raise ConfigError("this gathering has ended: open its index with Index.open, or begin another")
        if self.trouble is None and (self._unknown or self._unseen):
            warnings.warn(
                f"gradients of {self.found:,} of {self.count:,} examples were gathered: of {self._begun:,} batches "
                f"{self._unseen:,} had no pass that was seen, and {self._unknown:,} of their rows are no examples of "
                "the data (other labels, tokens or padding?). The others are computed now",
                stacklevel=5,
            )
        with ExitStack() as stack:
            stack.callback(self._closing)
            self._open.close()
            if self._inputs.capture is None:
                raise ValueError("gradients of a model are gathered")
            facts = {name: fact for name, fact in self._inputs.fingerprint.items() if name != _MARK}
            facts["model"] = model_digest(self._inputs.capture.model)
            said = {**self._given.metadata, **metadata, "gathered": 0}
            inputs = replace(self._inputs, source=Gathered(self._inputs, self._spool, said), fingerprint=facts)
            state = self._state
            state.reporter, state.manifest.fingerprint, state.manifest.metadata = report, facts, said
            finish_index(self._given, inputs, state)

    def close(self) -> None:
        """Gives it up. The folder stays an unfinished build's, which the next gathering there begins anew."""
        self._closing()


class _Named:
    """The ids of examples, by what the model is given of them (see `contents`).

    Attributes:
        contents: (count, 16) uint8.
    """

    def __init__(self, examples: ExampleSource) -> None:
        first = first_batch(examples)[1]
        self._fields = sorted(first, key=str) if isinstance(first, Mapping) else None
        self.contents = np.empty((examples.count, 16), dtype=np.uint8)
        for ids, batch in examples.walk(0, examples.count):
            self.contents[ids] = contents_of(batch)
        heads = self._heads(self.contents)
        self._order = np.argsort(heads, kind="stable")
        self._sorted = heads[self._order]

    def own(self, batch: Batch) -> Batch:
        """Of a batch what the data set's own batches have, too: a trainer adds to it."""
        if self._fields is None or not isinstance(batch, Mapping):
            return batch
        return {name: batch[name] for name in self._fields if name in batch}

    def of(self, batch: Batch) -> tuple[np.ndarray, np.ndarray, int]:
        """Which rows of the batch are examples, and of which ids; a row that several examples are equal to comes
        several times. And how many rows are none."""
        rows, ids = list[int](), list[int]()
        contents = contents_of(self.own(batch))
        heads = self._heads(contents)
        firsts, stops = np.searchsorted(self._sorted, heads, "left"), np.searchsorted(self._sorted, heads, "right")
        for row in range(len(contents)):
            for i in self._order[firsts[row] : stops[row]]:
                if np.array_equal(self.contents[i], contents[row]):
                    rows.append(row)
                    ids.append(int(i))
        return np.array(rows, dtype=np.int64), np.array(ids, dtype=np.int64), len(contents) - len(set(rows))

    @staticmethod
    def _heads(contents: np.ndarray) -> np.ndarray:
        """(n,) uint64: the hashes' first halves."""
        return np.ascontiguousarray(contents[:, :8]).view("<u8")[:, 0]
