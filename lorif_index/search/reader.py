"""Reader: one version of an index, read only: its rows and all that was fitted, each part loaded when first needed."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from functools import cached_property
from pathlib import Path

import torch

from ..codecs.base import RowCodec, Transformed
from ..codecs.registry import CODECS, codec_class
from ..config import BuildConfig
from ..curvature.inverse import Preconditioner
from ..curvature.sketch import Named, Sketch
from ..damping import Damping, as_damping, settled
from ..errors import CorruptionError, FingerprintError, LorifError
from ..linalg.scratch import CPU
from ..ranks import ALONE, Ranks
from ..storage.fitted import CalibrationQueries, FittedCurvature, FittedProjections, load_removed, load_sketch
from ..storage.locks import Lease
from ..storage.manifest import Manifest
from ..storage.sealed import SealedFile
from .calibration import Calibration
from .candidates import CandidateSearch
from .coarse import Coarse, Codes, coarse_fingerprint
from .devices import room_on
from .proposers import FlatSketch, JointProposer, LivingRows, Proposer
from .rows import IndexRows
from .scoring import Question


def config_of(manifest: Manifest) -> BuildConfig:
    """The choices of an index.

    Raises:
        CorruptionError: they are damaged.
    """
    try:
        return BuildConfig.from_json(manifest.config)
    except LorifError:
        raise
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
        raise CorruptionError(f"the manifest's config is damaged ({error!r}): restore it from a copy") from None


def curvature_of(folder: Path, manifest: Manifest) -> FittedCurvature:
    """The curvature of an index.

    Raises:
        CorruptionError: there is none, or its entry is damaged.
    """
    if "curvature" not in manifest.fits:
        raise CorruptionError(f"{folder} has no curvature in its manifest: restore it from a copy")
    return FittedCurvature(folder, manifest.fits["curvature"], {spec.name: spec for spec in manifest.layers})


def codec_of(folder: Path, manifest: Manifest, curvature: FittedCurvature | None) -> RowCodec:
    """The codec of an index's rows.

    Args:
        folder, manifest: of the index.
        curvature: its curvature, or None while there is none, of which the codec must not know.

    Raises:
        CorruptionError: no known codec, or its entry is damaged.
    """
    if manifest.codec not in CODECS or "codec" not in manifest.fits:
        raise CorruptionError(f"the manifest says that rows are by {manifest.codec!r}: known are {sorted(CODECS)}")
    specs = {spec.name: spec for spec in manifest.layers}
    return codec_class(manifest.codec).load(folder, manifest.fits["codec"], specs, curvature or {})


def policy_for(manifest: Manifest, codec: RowCodec, damping: Damping | float | str) -> Damping:
    """A damping settled for an index's rows: each model of an ensemble has its share of their bytes."""
    return settled(as_damping(damping), codec.row_bytes / manifest.members)


class Reader:
    """An index's parts.

    Args:
        folder: the index's folder.
        manifest: of a finished version; sketch and coarse index may be absent.
        device: where rows are scored.
        verify: when streamed shards are compared with their digests (`store.VERIFY`).
        damaged: names of shards that are left out.
        lease: keeps the files of this version from being removed, as long as this object lives.
        ranks: who read the index together, and all make their reader at the same time.

    Attributes:
        rows: those that this rank holds.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        device: torch.device = CPU,
        *,
        verify: str = "first",
        damaged: Collection[str] = (),
        lease: Lease | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.folder, self.manifest, self.device, self.ranks, self._lease = folder, manifest, device, ranks, lease
        self.config = config_of(manifest)
        self.specs = {spec.name: spec for spec in manifest.layers}
        with ranks.jointly():
            removed = None if manifest.removed is None else load_removed(folder, manifest.removed)
            self.curvature = curvature_of(folder, manifest)
            self.codec = codec_of(folder, manifest, self.curvature)
        self.rows = IndexRows(
            folder,
            manifest,
            self.codec,
            seed=self.config.seed,
            device=device,
            removed=removed,
            verify=verify,
            damaged=damaged,
            ranks=ranks,
        )
        self.store = self.rows.store
        self._kept: tuple[Damping, dict[str, Preconditioner]] | None = None

    def policy(self, damping: Damping | float | str | None = None) -> Damping:
        """The damping that is asked for, settled for the rows; None: the config's."""
        return policy_for(self.manifest, self.codec, self.config.damping if damping is None else damping)

    @property
    def live_count(self) -> int:
        """Rows of all ranks that answers are taken from."""
        return self.rows.live_count

    @cached_property
    def projections(self) -> FittedProjections | None:
        """The learnt projections, or None where all are random."""
        entry = self.manifest.fits.get("projections")
        return None if entry is None else FittedProjections(self.folder, entry, self.specs)

    @cached_property
    def sketch(self) -> Sketch | Named | None:
        """The sketch, or None where the index has none."""
        if "sketch" not in self.manifest.fits:
            return None
        return load_sketch(self.folder, self.manifest.fits["sketch"], self.specs)

    @cached_property
    def queries(self) -> CalibrationQueries | None:
        """The calibration queries, or None."""
        entry = self.manifest.fits.get("queries")
        return None if entry is None else CalibrationQueries(self.folder, entry, self.specs)

    @cached_property
    def coarse(self) -> Coarse | None:
        """The coarse index of this rank's rows, checked against what it was made from, or None where there is none.

        Raises:
            FingerprintError: it was made from other rows, curvature or sketch. CorruptionError: it is damaged.
        """
        codes = self.codes(self.rows.team.own)
        return None if codes is None else Coarse(codes)

    def codes(self, some: slice | None = None) -> Codes | None:
        """The coarse codes of some rows of this folder, or of all; None where there are none. Raises as `coarse`."""
        entry = self.manifest.coarse
        if entry is None or self.sketch is None:
            return None
        stored, expected = entry.get("fingerprint"), coarse_fingerprint(self.manifest)
        if stored != expected:
            raise FingerprintError(
                f"{entry['file']['file']} was made from other rows, curvature, damping or sketch ({str(stored)[:16]} "
                f"there, {expected[:16]} here): make it anew with rebuild_coarse()"
            )
        codes = Codes.load(self.folder, entry, some)
        held = sum(shard.rows for shard in self.manifest.shards)
        if (int(entry["rows"]), codes.dim) != (held, self.sketch.dim):
            raise CorruptionError(
                f"{entry['file']['file']} holds {entry['rows']} rows of width {codes.dim}, where {held} of "
                f"{self.sketch.dim} were expected: rebuild_coarse() anew"
            )
        return codes

    @cached_property
    def candidates(self) -> CandidateSearch | None:
        """The candidate search, or None where there is no coarse index."""
        if self.coarse is None or self.sketch is None:
            return None
        learnt = self.manifest.calibration
        calibration = Calibration.from_json(learnt) if learnt is not None else None
        return CandidateSearch(self.rows.rescorer, proposer_of(self.rows, self.coarse, self.sketch), calibration)

    def preconditioners(self, chosen: Iterable[str], policy: Damping) -> dict[str, Preconditioner]:
        """H^-1 of some layers under a damping policy; those of the last policy are kept."""
        # One assignment, so that searches in several threads never mix two policies.
        kept = self._kept
        if kept is None or kept[0] != policy:
            kept = self._kept = (policy, {})
        made = kept[1]
        for name in chosen:
            if name not in made:
                one = Preconditioner.of(name, self.curvature[name], policy)
                made[name] = one.usable(name)
        return {name: made[name] for name in chosen}

    def ask(self, asked: Transformed) -> Question:
        """The question that transformed gradients put to the rows."""
        return ask(self.codec, self.sketch, asked)

    def files(self) -> list[SealedFile]:
        """Every file of the index but the manifest."""
        infos = [shard.sealed for shard in self.manifest.shards] + list(self.manifest.files().values())
        return [SealedFile(self.folder, info) for info in infos]

    @property
    def has_payloads(self) -> bool:
        """Whether any row of this folder has a payload."""
        return any("payload_ends" in shard.sealed.offsets for shard in self.manifest.shards)

    @cached_property
    def any_payloads(self) -> bool:
        """Whether any row of any rank has one. All ranks ask at the same time, once."""
        return any(self.ranks.gather_values(self.has_payloads))

    def close(self) -> None:
        """Gives the file handles back, and the version up; the files are opened again when asked, if still there."""
        if self._lease is not None:
            self._lease.release()
        self.rows.close()
        self.curvature.file.close()
        for name in ("projections", "queries"):
            if self.__dict__.get(name) is not None:
                getattr(self, name).file.close()


def ask(codec: RowCodec, sketch: Sketch | Named | None, asked: Transformed) -> Question:
    """The question that a transformed query puts to rows of a codec, and to coordinates of a sketch if there is one."""
    parts = codec.question(asked)
    if isinstance(sketch, Named):
        # Rows and shortened ones have the same coordinates.
        (x,) = parts.values()
        return Question(parts, x, asked.count)
    return Question(parts, None if sketch is None else sketch.query(asked.turned, asked.curvature), asked.count)


def proposer_of(rows: IndexRows, coarse: Coarse, sketch: Sketch | Named) -> Proposer:
    """What proposes candidates among the rows of all ranks that were not removed: the coarse index, or the coordinates
    themselves on a GPU with room for them."""
    own: Proposer = coarse
    if isinstance(sketch, Sketch) and 2 * coarse.dim * len(rows.store) <= room_on(rows.device):
        own = FlatSketch(rows.coordinates(sketch), len(rows.store), coarse.dim, rows.device)
    if rows.store.dead is not None:
        own = LivingRows(own, rows.store.dead)
    if rows.ranks.size == 1:
        return own
    return JointProposer(own if len(rows.store) else None, rows.team, tilts=coarse.tilts)
