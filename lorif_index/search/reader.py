"""Reader: the parts of an index folder put together, and what can be read from its rows."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..capture.gradients import LayerGradient, LayerSpec
from ..codecs.bits import CodeLayout
from ..codecs.eigencodes import EigenCode, EigenSketcher
from ..codecs.layout import RowLayout, Rows
from ..codecs.scratch import CPU
from ..config import REPRESENTATIONS, BuildConfig
from ..curvature.inverse import Preconditioner
from ..curvature.sketch import Sketch, SketchEncoder
from ..damping import Damping
from ..errors import CorruptionError, FingerprintError, LorifError, StoreError
from ..ranks import ALONE, Ranks
from ..storage.fitted import (
    CalibrationQueries,
    FittedCurvature,
    FittedProjections,
    load_eigencode,
    load_removed,
    load_sketch,
    stored_eigen_layout,
)
from ..storage.locks import Lease
from ..storage.manifest import Manifest
from ..storage.resident import Resident
from ..storage.sealed import SealedFile, SealedInfo
from ..storage.shards import ShardInfo
from ..storage.store import Store, StoreWriter
from .calibration import Calibration
from .candidates import CandidateSearch
from .coarse import Coarse, NormAxis, coarse_fingerprint
from .devices import room_on
from .flat import FlatSketch
from .joint import JointProposer
from .living import LivingRows
from .pursuit import Proposer
from .rescoring import Rescorer
from .scoring import Question, ask, self_scores
from .team import Team

# Coordinates wait in so many bits for the coarse code, where that alone is kept in the end.
_WAITING_BITS = 8


def row_layout(manifest: Manifest, config: BuildConfig, specs: Mapping[str, LayerSpec]) -> RowLayout:
    """The layout of an index's rows.

    Raises:
        CorruptionError: no known representation, or coordinates without a sketch.
    """
    store, bits = manifest.stored, config.coordinate_bits
    if store not in REPRESENTATIONS:
        raise CorruptionError(f"the manifest says that rows hold {store!r}: known are {REPRESENTATIONS}")
    if store == "eigen":
        return RowLayout(specs, config.dtype, eigen=stored_eigen_layout(manifest.eigen, len(specs)))
    if store == "coarse":
        # Until the coarse index is made, its coordinates are kept.
        store, bits = ("coarse", 0) if manifest.coarse is not None else ("coordinates", _WAITING_BITS)
    codes = None
    if store in ("both", "coordinates"):
        try:
            codes = CodeLayout(int(manifest.sketch["dim"]), bits)  # type: ignore[index]
        except (TypeError, KeyError, ValueError):
            raise CorruptionError(f"the manifest's sketch is missing or damaged, which store={store!r} needs") from None
    return RowLayout(specs, config.dtype, factors=store in ("both", "factors"), codes=codes)


def shard_writer(
    folder: Path, manifest: Manifest, layout: RowLayout, config: BuildConfig, ranks: Ranks = ALONE
) -> StoreWriter:
    """Appends shards to a manifest, under names that it gives; ranks that share a folder never give the same."""
    names = manifest.naming("shard" if layout.row_bytes else "ids", ranks.rank, ranks.size)
    return StoreWriter(folder, layout, config.shard_bytes, manifest.shards, names)


class Reader:
    """An index's parts, each loaded when first needed.

    Args:
        folder: the index's folder.
        manifest: with its curvature; sketch and coarse index may be absent.
        layout: of the rows; by default what the manifest says.
        device: where rows are scored.
        verify: when streamed shards are compared with their digests (`store.VERIFY`).
        damaged: names of shards that are left out.
        lease: keeps the files of this version from being removed, as long as this object lives.
        ranks: who read the index together, and all make their reader at the same time.

    Attributes:
        team: which rows this rank holds; `store` and `rows` are those.
        live_count: rows of all ranks that answers are taken from.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        layout: RowLayout | None = None,
        device: torch.device = CPU,
        *,
        verify: str = "first",
        damaged: Collection[str] = (),
        lease: Lease | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.folder, self._lease, self.ranks = folder, lease, ranks
        self.device = device
        self.manifest = manifest
        try:
            self.config = BuildConfig.from_json(manifest.config)
        except LorifError:
            raise
        except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
            raise CorruptionError(f"the manifest's config is damaged ({error!r}): restore it from a copy") from None
        self.specs = {spec.name: spec for spec in manifest.layers}
        self.representation = str(manifest.stored)
        self.layout = row_layout(manifest, self.config, self.specs) if layout is None else layout
        self.team, held = Team.of(manifest, ranks), -1
        with ranks.jointly():
            self._removed = None if manifest.removed is None else load_removed(folder, manifest.removed)
            shards = self.team.shards
            self.store = Store(folder, self.layout, shards, removed=self._removed, verify=verify, damaged=damaged)
            if manifest.curvature is None:
                raise CorruptionError(f"{folder} has no curvature in its manifest: restore it from a copy")
            self.curvature = FittedCurvature(folder, manifest.curvature, self.specs, manifest.curvature_layers)
            held = self.store.live_count if ranks.size > 1 else -1
        self._coarse_file: SealedFile | None = None
        self._of_part = True
        self._live = -1 if ranks.size == 1 else ranks.count(held)
        self._kept: tuple[Damping, dict[str, Preconditioner]] | None = None

    @property
    def live_count(self) -> int:
        return self.store.live_count if self._live < 0 else self._live

    @cached_property
    def projections(self) -> FittedProjections | None:
        """The learnt projections, or None where all are random."""
        if self.manifest.projections is None:
            return None
        return FittedProjections(self.folder, self.manifest.projections, self.specs)

    @cached_property
    def sketch(self) -> Sketch | None:
        """The sketch, or None where the index has none."""
        if self.manifest.sketch is None:
            return None
        sketch = load_sketch(self.folder, self.manifest.sketch, self.specs)
        for name, part in sketch.layers.items():
            most = int(part.directions.max()) + 1 if len(part.directions) else 0
            if most > self.curvature.rank(name):
                raise CorruptionError(
                    f"the sketch weighs {most} directions of layer {name!r}, whose curvature has "
                    f"{self.curvature.rank(name)}: restore the index from a copy"
                )
        return sketch

    @cached_property
    def eigen(self) -> EigenCode | None:
        """What eigencodes mean, or None where rows hold something else."""
        if self.manifest.eigen is None:
            return None
        return load_eigencode(self.folder, self.manifest.eigen, self.curvature)

    @cached_property
    def queries(self) -> CalibrationQueries | None:
        """The calibration queries, or None."""
        if self.manifest.queries is None:
            return None
        return CalibrationQueries(self.folder, self.manifest.queries, self.specs)

    @cached_property
    def coarse(self) -> Coarse | None:
        """The coarse index, checked against what it was made from, or None where there is none. Over several ranks: of
        this rank's rows, or where that kind cannot be read in part, of all in its folder.

        Raises:
            FingerprintError: it was made from other rows, curvature or sketch. CorruptionError: it is damaged.
        """
        entry = self.manifest.coarse
        if entry is None or self.sketch is None:
            return None
        try:
            info, factory, stored = SealedInfo.from_json(entry["file"]), str(entry["factory"]), entry["fingerprint"]
            axis = NormAxis.from_json(entry["axis"])
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptionError(f"the manifest's entry of the coarse index is damaged: {error!r}") from None
        expected = self.coarse_fingerprint(factory)
        if stored != expected or not _is_named(info.file, expected):
            raise FingerprintError(
                f"{info.file} was made from other rows, curvature, damping or sketch ({str(stored)[:16]} there, "
                f"{expected[:16]} here): make it anew with rebuild_coarse()"
            )
        self._coarse_file = SealedFile(self.folder, info)
        held = sum(shard.rows for shard in self.manifest.shards)
        coarse, self._of_part = Coarse.load(
            self._coarse_file, factory, axis, self.sketch.dim, held, part=self.team.own if len(self.store) else None
        )
        return coarse

    def growing_coarse(self) -> Coarse:
        """A copy of the coarse index that takes further rows.

        Raises:
            StoreError: there is none. Else as `coarse`.
        """
        if self.coarse is None or self._coarse_file is None or self.sketch is None:
            raise StoreError("the index has no coarse stage: make one with rebuild_coarse()")
        old = self.coarse
        file, dim = self._coarse_file, self.sketch.dim
        return Coarse.load(file, old.factory, old.axis, dim, len(self.store), growing=True)[0]

    def keep_coarse(self, coarse: Coarse) -> dict[str, Any]:
        """Seals a coarse index of all rows; the manifest's entry."""
        fingerprint = self.coarse_fingerprint(coarse.factory)
        info = coarse.save(self.folder, coarse_name(fingerprint))
        axis = None if coarse.axis is None else coarse.axis.to_json()
        return {"file": info.to_json(), "factory": coarse.factory, "fingerprint": fingerprint, "axis": axis}

    @cached_property
    def candidates(self) -> CandidateSearch | None:
        """The candidate search, or None where there is no coarse index."""
        if self.coarse is None:
            return None
        learnt = self.manifest.calibration
        calibration = Calibration.from_json(learnt) if learnt is not None else None
        # The sketch takes its room on the device before the rows do.
        return CandidateSearch(self.rescorer, self.proposer, calibration)

    @cached_property
    def proposer(self) -> Proposer:
        """What proposes candidates among the rows of all ranks that were not removed.

        Raises:
            StoreError: there is no coarse index.
        """
        coarse = self.coarse
        if coarse is None:
            raise StoreError("the index has no coarse stage: make one with rebuild_coarse()")
        if self.ranks.size == 1:
            return _living(self._proposer(coarse), self.store.dead)
        inner: Proposer | None = None
        if self._of_part and len(self.store):
            inner = _living(self._proposer(coarse), self.store.dead)
        elif not self._of_part and self.team.firsts:
            everything = Store(
                self.folder, self.layout, self.manifest.shards, removed=self._removed, damaged=self.store.damaged
            )
            inner = _living(coarse, everything.dead)
        return JointProposer(inner, self.team, tilts=coarse.tilts, of_folder=not self._of_part)

    @cached_property
    def rescorer(self) -> Rescorer:
        """Scores rows of all ranks by their positions."""
        return Rescorer(self.rows, self.team, self.live_count)

    @cached_property
    def rows(self) -> Resident:
        """The rows where they are scored: on a GPU those that fit stay there."""
        return Resident(self.store, self.device, room_on(self.device))

    def _proposer(self, coarse: Coarse) -> Proposer:
        """The coarse index, or the coordinates themselves on a GPU with room for them."""
        if not self.layout.row_bytes or 2 * coarse.dim * len(self.store) > room_on(self.device):
            return coarse
        return FlatSketch(self.all_coordinates(), len(self.store), coarse.dim, self.device)

    def coarse_fingerprint(self, factory: str) -> str:
        """What a coarse index of these rows must be made from."""
        sketch = self.manifest.sketch or {}
        curvature = self.manifest.curvature
        return coarse_fingerprint(
            [
                # Where rows are not kept, their number and ids stand for them.
                [
                    _without_rows(s) if self.representation == "coarse" else s.sealed.digest
                    for s in self.manifest.shards
                ],
                curvature.digest if curvature else None,
                sketch.get("lams"),
                sketch.get("file", {}).get("digest"),
                factory,
            ]
        )

    def preconditioners(self, chosen: Iterable[str], policy: Damping) -> dict[str, Preconditioner]:
        """H^-1 of some layers under a damping policy; those of the last policy are kept."""
        # One assignment, so that searches in several threads never mix two policies.
        kept = self._kept
        if kept is None or kept[0] != policy:
            kept = self._kept = (policy, {})
        made = kept[1]
        for name in chosen:
            if name not in made:
                one = Preconditioner.of(name, self.curvature[name], policy, self.config.complement)
                made[name] = one.usable(name)
        return {name: made[name] for name in chosen}

    def ask(self, gradients: Mapping[str, torch.Tensor], preconditioners: Mapping[str, Preconditioner]) -> Question:
        """The question that gradients {layer: (q, d_in, d_out)} put to the rows."""
        return ask(self.layout, self.specs, self.sketch, self.curvature, gradients, preconditioners, self.eigen)

    def self_scores(self, rows: Rows, preconditioners: Mapping[str, Preconditioner]) -> torch.Tensor:
        """g^T H^-1 g of rows, summed over layers, (n,) float32."""
        sketch = self.sketch if self.layout.codes is not None else None
        return self_scores(self.layout, rows, preconditioners, sketch, self.curvature, self.eigen)

    def coordinates(self, rows: Rows) -> torch.Tensor:
        """z (n, k) float32 of rows: those stored, or computed from factors or eigencodes.

        Raises:
            StoreError: the index keeps neither, or has no sketch.
        """
        if self.layout.codes is not None:
            return self.layout.codes.decode(rows.codes)
        if not len(rows) and self.sketch is not None:
            return torch.empty(0, self.sketch.dim)
        if self.eigen is not None and self.sketch is not None:
            blocks = rows.factors.split(512)
            return torch.cat([self._sketcher.encode(block) for block in blocks])
        if not self.layout.groups or self.sketch is None:
            raise StoreError("the index keeps no coordinates, and no factors to compute them from: build it anew")
        parts = []
        for start in range(0, len(rows), 512):
            factors = self.layout.unpack(rows[start : start + 512])
            layers = {name: LayerGradient.from_dense(f.dense()) for name, f in factors.items()}
            parts.append(self._encoder.encode(layers))
        return torch.cat(parts)

    @cached_property
    def _sketcher(self) -> EigenSketcher:
        if self.sketch is None or self.eigen is None:
            raise StoreError("the index has no sketch of eigencodes: make one with rebuild_coarse()")
        return EigenSketcher(self.eigen, self.sketch, self.curvature)

    @cached_property
    def _encoder(self) -> SketchEncoder:
        if self.sketch is None:
            raise StoreError("the index has no sketch: make one with rebuild_coarse()")
        return SketchEncoder(self.sketch, self.curvature)

    def all_coordinates(self) -> Iterator[torch.Tensor]:
        """z of all rows in order, a block at a time."""
        for _, rows in self.store.stream():
            yield self.coordinates(rows)

    def coordinates_of_folder(self) -> Iterator[torch.Tensor]:
        """z of all rows in this rank's folder, whoever holds them."""
        store = Store(self.folder, self.layout, self.manifest.shards)
        try:
            for _, rows in store.stream():
                yield self.coordinates(rows)
        finally:
            store.close()

    def positions_of(self, ids: np.ndarray) -> np.ndarray:
        """Positions of rows by their ids, in the whole index; -1 where there is no such row, or no longer."""
        with self.ranks.jointly():
            local = positions_of(self.store, ids)
        if self.ranks.size == 1:
            return local
        # One rank has it: the sum of what is found, plus one, is that.
        found = torch.from_numpy(self.team.globally(local) + 1)
        return self.ranks.sum(found).numpy() - 1

    def ids_at(self, positions: np.ndarray) -> np.ndarray:
        """Ids of rows at positions (any shape) in the whole index."""
        if self.ranks.size == 1:
            return self.store.ids[positions]
        places, local = self.team.locally(positions.ravel())
        found = self.team.assembled(lambda: [self.store.ids[local]], [places], [positions.size], dtype=np.int64)
        return found[0].reshape(positions.shape)

    def payloads_at(self, positions: np.ndarray) -> list[bytes | None]:
        """Payloads of rows at positions (m,) in the whole index; None where a row has none."""
        if self.ranks.size == 1:
            return self.store.payloads(positions)
        places, local = self.team.locally(positions)
        with self.ranks.jointly():
            found = zip(places.tolist(), self.store.payloads(local), strict=True)
            mine = [(place, value.decode()) for place, value in found if value is not None]
        out: list[bytes | None] = [None] * len(positions)
        for theirs in self.ranks.gather_values(mine):
            for place, value in theirs:
                out[place] = value.encode()
        return out

    @property
    def has_payloads(self) -> bool:
        """Whether any row of this folder has a payload."""
        return any("payload_ends" in shard.sealed.offsets for shard in self.manifest.shards)

    def files(self) -> list[SealedFile]:
        """Every file of the index but the manifest."""
        files = [SealedFile(self.folder, shard.sealed) for shard in self.manifest.shards] + [self.curvature.file]
        files += [SealedFile(self.folder, SealedInfo.from_json(e["file"])) for e in self.manifest.side_files()]
        return files

    def close(self) -> None:
        """Gives the file handles back, and the version up; the files are opened again when asked, if still there."""
        if self._lease is not None:
            self._lease.release()
        self.store.close()
        self.curvature.file.close()
        if self._coarse_file is not None:
            self._coarse_file.close()
        if "projections" in self.__dict__ and self.projections is not None:
            self.projections.file.close()
        if "queries" in self.__dict__ and self.queries is not None:
            self.queries.file.close()


def _living(proposer: Proposer, dead: np.ndarray | None) -> Proposer:
    """A proposer that leaves out removed rows."""
    return proposer if dead is None else LivingRows(proposer, dead)


def _without_rows(shard: ShardInfo) -> Any:
    return shard.rows if shard.ids_digest is None else [shard.rows, shard.ids_digest, shard.shift]


def coarse_name(fingerprint: str) -> str:
    """The coarse index's file, by what it was made from."""
    return f"coarse-{fingerprint[:16]}.faiss"


def _is_named(file: str, fingerprint: str) -> bool:
    """Whether a coarse index's file is named by what it was made from, perhaps with its own digest behind."""
    stem = coarse_name(fingerprint).removesuffix(".faiss")
    return file == f"{stem}.faiss" or (file.startswith(f"{stem}-") and file.endswith(".faiss"))


def positions_of(store: Store, wanted: np.ndarray) -> np.ndarray:
    """Positions of rows by their ids, in a store; -1 where it has no such row, or no longer."""
    own, dead = store.ids, store.dead
    at = np.searchsorted(own, wanted)
    inside = at < len(own)
    good = np.zeros(len(wanted), dtype=bool)
    good[inside] = own[at[inside]] == wanted[inside]
    if dead is not None:
        good[inside] &= ~dead[at[inside]]
    return np.where(good, at, -1)
