"""Sharded models: over processes, in wrappers, over devices, they have the gradients of the one model that they are.

What runs on several processes is in `sharded_cases`: cases on two ranks, some of them again under the other backend,
then others on four, from one start of Python.
"""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import PATIENCE
from distributed_job import finish, start
from torch import nn

from lorif_index import BuildConfig, Index, LayerSelection
from lorif_index.capture.sharded import DataRanks, data_ranks, lockstep, needs_lockstep, unwrapped
from lorif_index.capture.sources import ModelCapture, model_digest
from lorif_index.errors import ConfigError, DataError, NotAnIndexError

CASES = {
    (2, "gloo"): (
        "ddp fsdp fsdp_gpt2 fsdp_refused fsdp_together tensor_parallel sequence_parallel tensor_parallel_llama "
        "tied_again positions_in_plain_tensors transformers_plan"
    ).split(),
    (2, "cpu:gloo"): "fsdp fsdp_refused fsdp_together tensor_parallel".split(),
    (4, "cpu:gloo"): "uneven hsdp two_dimensional copies_of_tensor_parallel".split(),
}
# Of the largest entry, in float32.
TOLERANCE = 1e-5
# Scores under a curvature that is fitted in each case's own order of sums.
SCORES = 1e-4
EVERYTHING = LayerSelection(embeddings=True, head=True)


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, str, int], dict[str, dict[str, Any]]]:
    """{(ranks, backend, rank): {case: {what: figure}}}."""
    folder = tmp_path_factory.mktemp("sharded")
    root = Path(__file__).parents[1]
    environment = os.environ | {
        "PYTHONPATH": str(root.parent),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, str(root / "sharded_cases.py"), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=PATIENCE)
    found = {}
    for ranks, backend in CASES:
        for rank in range(ranks):
            path = folder / f"{ranks}.{backend}" / f"{rank}.json"
            assert path.is_file(), done.stdout + done.stderr
            found[ranks, backend, rank] = json.loads(path.read_text())
    return found


@pytest.mark.parametrize(
    ("ranks", "backend", "case"), [(*group, case) for group, cases in CASES.items() for case in cases]
)
def test_a_sharded_model_has_the_gradients_of_the_unsharded_one(
    figures: dict[tuple[int, str, int], dict[str, dict[str, Any]]], ranks: int, backend: str, case: str
) -> None:
    for rank in range(ranks):
        found = figures[ranks, backend, rank].get(case)
        assert found is not None, "a case before it failed"
        assert "raised" not in found, f"rank {rank}: {found['raised']}"
        assert found, "nothing was compared"
        allowed = {what: SCORES if what == "index" else TOLERANCE for what in found}
        assert not {what: value for what, value in found.items() if not value <= allowed[what]}, f"rank {rank}"


def test_every_case_is_listed(figures: dict[tuple[int, str, int], dict[str, dict[str, Any]]]) -> None:
    for (ranks, backend), cases in CASES.items():
        assert list(figures[ranks, backend, 0]) == cases


@pytest.mark.parametrize(
    ("backend", "how", "rank"), [("gloo", "raises", 0), ("gloo", "is NaN", 1), ("cpu:gloo", "raises", 1)]
)
def test_an_error_inside_of_a_pass_ends_all_ranks(backend: str, how: str, rank: int, tmp_path: Path) -> None:
    """One rank leaves a pass that the other waits in: by the time-out, both have an error."""
    at, out = (300, 1390)[rank], tmp_path / "said"
    given = {"folder": str(tmp_path), "at": at, "how": how, "seconds": 3.0}
    # Until then, no other time-out passes.
    said = finish(start(2, "fails_in_a_pass", out, backend=backend, given=given), out, seconds=500)
    kind, text = said[rank]["error"]
    if how == "raises":
        assert kind == "ZeroDivisionError" and "examples" in text
        first, last = (int(word) for word in re.findall(r"examples (\d+) to (\d+)", text)[0])
        assert first <= at <= last < first + 32
    else:
        assert kind == "NonFiniteError" and f"example {at} " in text
    kind, text = said[1 - rank]["error"]
    assert kind == "DistributedError" and "while doing 'encode'" in text
    with pytest.raises(NotAnIndexError, match="interrupted"):
        Index.open(tmp_path / "index")


# -- one process -------------------------------------------------------------------------------------------------------


class Small(nn.Module):
    """Three linear maps, the middle one in a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.middle = nn.Sequential(nn.Linear(6, 5), nn.Tanh())
        self.last = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.middle(self.first(x).tanh()))


def small() -> nn.Module:
    torch.manual_seed(0)
    return Small()


def data(n: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 4, generator=generator), torch.randint(0, 3, (n,), generator=generator)


def taken(model: nn.Module, batch: Any, n: int, **config: Any) -> dict[str, torch.Tensor]:
    whole = ModelCapture(model, BuildConfig(projection_dim=None, rank=None, **config))
    block = whole.capture(None).gradients(np.arange(n), batch, require_all=True)
    return {name: gradient.dense() for name, gradient in block.layers.items()}


def check_same(model: nn.Module, plain: nn.Module, batch: Any, n: int, **config: Any) -> None:
    assert model_digest(model) == model_digest(plain)
    found, wanted = taken(model, batch, n, **config), taken(plain, batch, n, **config)
    assert list(found) == list(wanted)
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=TOLERANCE * float(gradient.abs().max()))


@pytest.mark.parametrize("how", ["whole", "part", "in place", "DataParallel"])
def test_wrappers_are_taken_off(how: str, tmp_path: Path) -> None:
    """Nothing runs compiled: what was compiled without hooks would not call them."""
    model: Any = small()
    compiled = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    torch._dynamo.reset()
    if how == "whole":
        model = torch.compile(model, backend=backend)
    elif how == "part":
        model.middle = torch.compile(model.middle, backend=backend)
    elif how == "in place":
        model.compile(backend=backend)
    else:
        model = nn.DataParallel(model)
    if how != "DataParallel":
        # As it is found: used already.
        model(data()[0])
        assert compiled
    before = len(compiled)
    check_same(model, small(), data(), 6)
    assert len(compiled) == before
    with Index.build(tmp_path / "index", model=model, data=data(), config=BuildConfig(coarse=None)) as index:
        scores = index.scores(data())
    with Index.open(tmp_path / "index", model=small()) as index:
        np.testing.assert_allclose(index.scores(data()), scores, rtol=0, atol=1e-5 * np.abs(scores).max())


def test_one_process_has_all_examples_and_no_steps_to_keep() -> None:
    assert data_ranks(small()) == data_ranks(None) == DataRanks(0, 1, True)
    assert not needs_lockstep(small())
    batches = list(lockstep(small(), iter([1, 2]), lambda: 0))
    assert batches == [(1, True), (2, True)]
    model = small()
    assert unwrapped(model) is model


def test_the_older_fsdp_is_refused_by_name() -> None:
    class FullyShardedDataParallel(nn.Module):
        """Stands for torch's class, which cannot be made without a process group; the name is what is looked at."""

    model = small()
    model.add_module("late", FullyShardedDataParallel())
    with pytest.raises(DataError, match=r"'late'.*fully_shard"):
        ModelCapture(model, BuildConfig())


# -- devices -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    torch.manual_seed(0)
    sizes = dict(n_layer=2, n_embd=8, n_head=2, vocab_size=20, n_positions=8, bos_token_id=0, eos_token_id=0)
    path = tmp_path_factory.mktemp("saved")
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).save_pretrained(path)
    return path


MAPS = {
    "one device": {"": "cpu"},
    "a block on the disk": {
        "transformer.wte": "cpu", "transformer.wpe": "cpu", "transformer.h.0": "cpu", "transformer.h.1": "disk",
        "transformer.ln_f": "disk", "lm_head": "cpu",
    },
    "all on the disk": {
        "transformer.wte": "disk", "transformer.wpe": "disk", "transformer.h": "disk", "transformer.ln_f": "disk",
        "lm_head": "disk",
    },
}  # fmt: skip


@pytest.mark.parametrize("places", MAPS)
def test_a_model_on_several_devices(saved: Path, tmp_path: Path, places: str) -> None:
    import transformers

    plain = transformers.GPT2LMHeadModel.from_pretrained(saved)
    model = transformers.GPT2LMHeadModel.from_pretrained(
        saved, device_map=dict(MAPS[places]), offload_folder=tmp_path / "weights"
    )
    state = [(name, p.device.type, p.requires_grad) for name, p in model.named_parameters()]
    generator = torch.Generator().manual_seed(1)
    batch = {"input_ids": torch.randint(1, 20, (3, 6), generator=generator)}
    for _ in range(2):
        # The embedding and the head are one weight, also after the passes, which take it apart.
        check_same(model, plain, batch, 3, layers=EVERYTHING, compute="cpu")
    assert [(name, p.device.type, p.requires_grad) for name, p in model.named_parameters()] == state
    # So do passes that are not ours.
    model(**batch)
    check_same(model, plain, batch, 3, layers=EVERYTHING)


def test_weights_without_data_are_refused_by_name() -> None:
    model = copy.deepcopy(small())
    model.middle.to("meta")
    with pytest.raises(DataError, match=r"'middle\.0\.weight' is on the meta device"):
        ModelCapture(model, BuildConfig())
    with pytest.raises(DataError, match=r"'middle\.0\.weight' is on the meta device"):
        model_digest(model)
    with pytest.raises(ConfigError, match="device='cuda'"):
        ModelCapture(small(), BuildConfig(compute="cuda"))
