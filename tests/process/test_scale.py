"""What large indexes and several ranks take: said by formulas, and compared with what is sent and held."""

from __future__ import annotations

import io
import json
import resource
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import assert_same_hits, reader_of
from distributed_job import together
from rich.console import Console

from bench import scale_on_paper
from lorif_index import BuildConfig, Index
from lorif_index.build.sizes import Shapes
from lorif_index.build.traffic import Traffic, build_traffic, search_traffic
from lorif_index.capture.gradients import LayerSpec
from lorif_index.cli.show import show
from lorif_index.codecs.registry import CODECS
from lorif_index.errors import ConfigError, StoreError
from lorif_index.ranks import ALONE
from lorif_index.search import proposers
from lorif_index.search.candidates import most_proposed
from lorif_index.search.proposers import FlatSketch, JointProposer
from lorif_index.storage.store import Store
from lorif_index.storage.team import Team

ROOT = Path(__file__).parents[2]


def test_the_tables_of_the_page_are_those_of_the_command() -> None:
    page = (ROOT / "docs" / "scale.md").read_text()
    assert scale_on_paper.filled(page) == page, "python -m bench.scale_on_paper --write"


@pytest.mark.parametrize("kind", ["eigen", "factors"])
def test_ranks_send_and_take_what_was_said(kind: str, tmp_path: Path) -> None:
    """Two ranks build and search: what each has sent in every stage whose messages are more than words."""
    (found,) = together(1, "estimate", tmp_path / "estimate", kind=kind)
    ranks = found["ranks"]
    said = together(2, "account", tmp_path / "said", folder=str(tmp_path), kind=kind)
    taken = {stage: max(one["sent"].get(stage, 0) for one in said) for stage in set().union(*(s["sent"] for s in said))}
    compared = {stage: size for stage, size in taken.items() if size >= 64 << 10}
    assert set(compared) >= {"curvature", "sketch", "coarse", "calibration"}
    for stage, size in compared.items():
        # How deep the searches of calibration go lies in the data: said is the most, of so few rows all of them.
        most = 2.5 if stage == "calibration" else 1.02
        assert 0.98 <= ranks["sent"][stage] / size <= most, (stage, ranks["sent"][stage], size)
    for stage in ("queries", "scan"):
        assert ranks["sent"][stage] == pytest.approx(taken[stage], rel=0.1), stage
    assert found["disk_total"] == pytest.approx(said[0]["disk"], rel=0.1)
    assert ranks["memory"] == pytest.approx(max(one["memory"] for one in said), rel=0.35)


def test_volumes_are_those_of_ring_algorithms() -> None:
    traffic = Traffic(4)
    traffic.summed("a", 1000)
    traffic.reduced("b", 1000, 1)
    traffic.spread("c", 1000, 2)
    traffic.moved("d", 1000, 3, 0)
    traffic.moved("d", 1000, 0, 0)
    traffic.gathered("e", 1000)
    assert traffic.sent == {
        "a": [1500] * 4,
        "b": [1000, 0, 1000, 1000],
        "c": [0, 0, 1000, 0],
        "d": [0, 0, 0, 1000],
        "e": [3000] * 4,
    }
    alone = Traffic(1)
    for act in (alone.summed, alone.gathered):
        act("a", 1000)
    alone.reduced("a", 1000, 0)
    alone.spread("a", 1000, 0)
    assert alone.most() == {"a": 0}


def test_an_estimate_of_ranks_is_of_each() -> None:
    torch.manual_seed(0)
    blocks = [{"a": torch.randn(64, 12, 10)} for _ in range(20)]
    config = BuildConfig(store="factors", curvature_rank=20, coarse={"queries": 8})
    found = Index.estimate(gradients=blocks, config=config, world_size=4, examples=10**6)
    ranks = found.ranks
    assert ranks is not None and ranks.size == 4
    assert (
        ranks.disk["rows"] == pytest.approx(found.disk["rows"] / 4, rel=0.01) and ranks.disk["fit"] == found.disk["fit"]
    )
    assert ranks.seconds.keys() == found.seconds.keys() and 0 < ranks.seconds_total < found.seconds_total
    assert {"curvature", "sketch", "coarse", "calibration", "scan", "candidates"} <= ranks.sent.keys()
    assert json.loads(json.dumps(found.to_json()))["ranks"]["seconds_total"] == ranks.seconds_total
    out = io.StringIO()
    show(Console(file=out, width=120), found.to_json())
    assert "\nranks\nsize" in out.getvalue() and "candidates" in out.getvalue()
    with pytest.raises(ConfigError, match="world_size must be an integer of at least 1, got 0"):
        Index.estimate(gradients=blocks, world_size=0)


@pytest.mark.parametrize("codec", CODECS)
def test_more_ranks_take_less_each_and_none_send_nothing(codec: str) -> None:
    specs = {name: LayerSpec(name, 768, 3072, 48, 192, 1) for name in "abc"}
    shapes = Shapes(BuildConfig(projection_floor=32, store=codec), specs, codec)
    alone, each = shapes.memory(10**8), shapes.memory(10**8, ranks=8, shared=False)
    assert alone.keys() == each.keys() and each["search"] < 0.3 * alone["search"]
    assert not any(build_traffic(shapes, 10**6, 1).most().values())
    assert not any(search_traffic(shapes, 10**6, 1).most().values())
    # What is fitted is sent once, whatever N is.
    one, two = (build_traffic(shapes, n, 8).most() for n in (10**6, 10**8))
    assert one["curvature"] == two["curvature"] and one["sketch"] == two["sketch"] > 0


def test_proposals_are_bounded_and_put_in_order_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [most_proposed(n) for n in (10, 50_000, 10**6, 10**9)] == [10, 20_000, 250_000, 1 << 18]
    generator = torch.Generator().manual_seed(0)
    z, x = torch.randn(300, 16, generator=generator), torch.randn(7, 16, generator=generator).numpy()
    flat = FlatSketch([z], 300, 16, torch.device("cpu"))
    team = Team(ALONE, [], [], slice(0, 0), 300)
    proposer = JointProposer(flat, team, tilts=True)
    monkeypatch.setattr(proposers, "ORDERED_BYTES", 3 * 20 * proposers.BYTES_ORDERED)
    got, expected = (SimpleNamespace(ids=i, scores=s) for i, s in (of.search(x, 20, 0.1) for of in (proposer, flat)))
    assert got.ids.shape == (7, 20)
    assert_same_hits(got, expected, 1e-3)


def test_too_many_open_files_is_no_damage(tmp_path: Path) -> None:
    rows = [{"a": torch.randn(210, 3, 3)}]
    index = Index.build(tmp_path / "i", gradients=rows, config=BuildConfig(compute={"shard_bytes": 1}), progress=False)
    store = reader_of(index).store
    assert len(store.shards) == 210
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(list(Path("/proc/self/fd").iterdir()))
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (used + 12, hard))
        with pytest.raises(StoreError, match=r"Too many open files.*ulimit -n.*shard_bytes"):
            for _ in store.stream():
                pass
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    store.close()
    again = Store(index.path, store.row_bytes, [shard.info for shard in store.shards])
    assert sum(len(rows) for _, rows in again.stream()) == 210
