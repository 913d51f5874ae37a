"""Cases of sharded models, run by `test_sharded` in a process of its own that forks its ranks.

    python sharded_cases.py FOLDER

Each rank writes FOLDER/WORLD.BACKEND/RANK.json: {case: {what: figure}}, or {case: {"raised": message}}. A figure is a
relative error against the unsharded model, in units of the largest entry, or a truth as 0 (true) or 1.
"""

from __future__ import annotations

import copy
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import transformers
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn import functional

from lorif_index import BuildConfig, Index, LayerSelection, default_loss
from lorif_index.capture.data import as_source, first_batch
from lorif_index.capture.gradients import GradientBlock
from lorif_index.capture.losses import PerExample
from lorif_index.capture.probes import Probes
from lorif_index.capture.sharded import data_ranks, evened, needs_lockstep
from lorif_index.capture.sources import ModelCapture, ModelGradients, ProbedGradients, head_of, model_digest
from lorif_index.errors import CaptureError

Figures = dict[str, float]
EXACT = {"projection_dim": None, "rank": None}
PROJECTED = {"projection_dim": 4, "projection_floor": 1, "rank": None}
EVERYTHING = LayerSelection(embeddings=True, head=True)


# -- models and data, the same on all ranks ----------------------------------------------------------------------------


class Mlp(nn.Module):
    """Three linear maps, the first two of which make a pair for tensor parallelism; one of the widths is odd."""

    def __init__(self, hidden: int = 6, positions: bool = False) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(5)
        self.up = nn.Linear(5, hidden)
        self.down = nn.Linear(hidden, 5)
        self.last = nn.LayerNorm(5)
        self.head = nn.Linear(5, 3)
        self.positions = positions

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.down(functional.gelu(self.up(self.norm(x))))
        x = self.last(x)
        return self.head(x.mean(dim=1) if self.positions else x)


def mlp(**kinds: Any) -> Mlp:
    torch.manual_seed(0)
    return Mlp(**kinds)


def gpt2() -> nn.Module:
    torch.manual_seed(1)
    sizes = dict(n_layer=2, n_embd=8, n_head=2, vocab_size=20, n_positions=8, bos_token_id=0, eos_token_id=0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))


def llama(tied: bool = False) -> nn.Module:
    torch.manual_seed(2)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
            vocab_size=20, max_position_embeddings=8, attention_bias=True, tie_word_embeddings=tied,
        )
    )  # fmt: skip


def vectors(n: int = 7, positions: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    shape = (n, 5) if positions is None else (n, positions, 5)
    return torch.randn(shape, generator=generator), torch.randint(0, 3, (n,), generator=generator)


def tokens(n: int = 5) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    mask = torch.ones(n, 6, dtype=torch.long)
    mask[1, 4:] = 0
    return {"input_ids": torch.randint(1, 20, (n, 6), generator=generator), "attention_mask": mask}


# -- figures -----------------------------------------------------------------------------------------------------------


def captured(model: nn.Module, data: Any, ids: np.ndarray, **config: Any) -> dict[str, torch.Tensor]:
    """The gradients of some examples, two a batch, through the route of a build."""
    whole = ModelCapture(model, BuildConfig(**(PROJECTED | {"batch_size": 2} | config)))
    source = ModelGradients(whole.capture(None), as_source(data, 2))
    return joined(source.sample(ids), whole)


def joined(blocks: Iterator[GradientBlock], whole: ModelCapture) -> dict[str, torch.Tensor]:
    parts = list(blocks)
    return {n: torch.cat([b.layers[n].dense() for b in parts]) if parts else torch.zeros(0) for n in whole.specs}


def probed(
    model: nn.Module, data: Any, ids: np.ndarray, examples: int, loss: PerExample | None = None
) -> dict[str, torch.Tensor]:
    whole, source = ModelCapture(model, BuildConfig(**PROJECTED)), as_source(data, 2)
    probes = Probes(head_of(loss, whole, lambda: first_batch(source)), 2, 0, examples)
    return joined(ProbedGradients(whole.capture(loss), source, probes).sample(ids), whole)


def own_loss(model: nn.Module, batch: Any) -> torch.Tensor:
    """The default one, which does not say what it is."""
    logits, labels = default_loss.logits(model, batch)  # type: ignore[attr-defined]
    return (
        functional.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none")
        .reshape(len(labels), -1)
        .sum(dim=1)
    )


def sides(model: nn.Module, data: Any, ids: np.ndarray) -> dict[str, torch.Tensor]:
    """The second moments of all sides that are projected."""
    whole, moments = ModelCapture(model, BuildConfig(**PROJECTED)), {}

    def take(side: tuple[str, str], rows: torch.Tensor) -> None:
        name = "/".join(side)
        moments[name] = moments.get(name, 0) + rows.T @ rows

    whole.sides(None, as_source(data, 2), ids)(take)
    return moments


def apart(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """The largest difference in units of the largest entry, layer by layer; infinite where names or shapes differ."""
    if list(found) != list(wanted):
        return float("inf")
    figures = [0.0]
    for name, right in wanted.items():
        if found[name].shape != right.shape:
            return float("inf")
        if right.numel():
            figures.append(float((found[name].double() - right.double()).abs().max() / right.abs().max()))
    return max(figures)


def no(truth: bool) -> float:
    return 0.0 if truth else 1.0


def by_autograd(model: nn.Module, data: tuple[torch.Tensor, torch.Tensor], names: list[str]) -> dict[str, torch.Tensor]:
    """Dense gradients in float64, inputs first, the bias as a last input: nothing of the package takes part."""
    model = copy.deepcopy(model).double()
    out: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    for x, y in zip(*data, strict=True):
        loss = functional.cross_entropy(model(x.double().unsqueeze(0)), y.unsqueeze(0))
        for name in names:
            module = model.get_submodule(name)
            weight, bias = torch.autograd.grad(loss, [module.weight, module.bias], retain_graph=True)
            out[name].append(torch.cat([weight.T, bias.unsqueeze(0)]))
    return {name: torch.stack(parts) for name, parts in out.items()}


def alike(model: nn.Module, plain: nn.Module, data: Any, ids: np.ndarray, **config: Any) -> Figures:
    """What is compared in every case: names, digest, gradients, probes' gradients, sides' second moments."""
    count = len(next(iter(data.values())) if isinstance(data, dict) else data[0])
    specs = [ModelCapture(m, BuildConfig(**(PROJECTED | config))).specs for m in (model, plain)]
    return {
        "specs": no(specs[0] == specs[1]),
        "digest": no(model_digest(model) == model_digest(plain)),
        "projected": apart(captured(model, data, ids, **config), captured(plain, data, ids, **config)),
        "whole": apart(captured(model, data, ids, **(EXACT | config)), captured(plain, data, ids, **(EXACT | config))),
        "probes": apart(probed(model, data, ids, count), probed(plain, data, ids, count)),
        "seen": apart(probed(model, data, ids, count, own_loss), probed(plain, data, ids, count)),
        "sides": apart(sides(model, data, ids), sides(plain, data, ids)),
    }


def indexed(model: nn.Module, plain: nn.Module, data: Any, path: Path) -> float:
    """An index of the sharded model, made, and asked; opened with the plain one; against one of the plain model."""
    config = BuildConfig(coarse=None, store="factors", batch_size=3, **PROJECTED)
    with Index.build(path, model=model, data=data, config=config, distributed=False) as index:
        scores = [index.scores(data)]
    with Index.open(path, model=plain, distributed=False) as index:
        scores.append(index.scores(data))
    path = path.with_name(f"{path.name}.plain")
    with Index.build(path, model=plain, data=data, config=config, distributed=False) as index:
        wanted = torch.as_tensor(index.scores(data))
    return max(apart({"": torch.as_tensor(found)}, {"": wanted}) for found in scores)


def mine(rank: int, world: int, count: int) -> np.ndarray:
    """Parts of unlike sizes: the last rank has the least, or nothing."""
    cuts = [0, *[count - world + 1 + r for r in range(world - 1)], count] if world > 2 else [0, count - 1, count]
    return np.arange(cuts[rank], cuts[rank + 1], dtype=np.int64)


def state_of(model: nn.Module) -> list[tuple[str, bool, bool, Any]]:
    return [
        (n, p.requires_grad, isinstance(p, DTensor), p.placements if isinstance(p, DTensor) else None)
        for n, p in model.named_parameters()
    ] + [(n, m.training, False, None) for n, m in model.named_modules()]


# -- two ranks ---------------------------------------------------------------------------------------------------------


def ddp(rank: int, world: int, folder: Path) -> Figures:
    plain, data = mlp(), vectors()
    model = nn.parallel.DistributedDataParallel(mlp())
    found = data_ranks(model)
    figures = alike(model, plain, data, mine(rank, world, 7))
    figures["ranks"] = no((found.index, found.count, found.first) == (rank, world, True) and not needs_lockstep(model))
    # One rank alone: nothing waits for the other.
    if rank == 0:
        figures["index"] = indexed(model, plain, data, folder / "ddp")
    functional.cross_entropy(model(data[0][rank : rank + 1]), data[1][rank : rank + 1]).backward()
    both = by_autograd(plain, (data[0][:2], data[1][:2]), ["up"])["up"]
    figures["training"] = apart({"": model.module.up.weight.grad.T}, {"": both.mean(dim=0)[:-1]})
    return figures


def sharded(model: nn.Module, mesh: Any, parts: list[nn.Module]) -> nn.Module:
    for part in parts:
        fully_shard(part, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def fsdp(rank: int, world: int, folder: Path) -> Figures:
    plain, data, mesh = mlp(), vectors(), init_device_mesh("cpu", (world,))
    model = mlp()
    sharded(model, mesh, [model.up])
    model.down.bias.requires_grad_(False)
    model.last.eval()
    before = state_of(model)
    ids = mine(rank, world, 7)
    figures = alike(model, plain, data, ids)
    figures["autograd"] = apart(
        captured(model, data, ids, **EXACT), by_autograd(plain, tuple(d[ids] for d in data), ["up", "down", "head"])
    )
    figures["as found"] = no(state_of(model) == before and all(p.grad is None for p in model.parameters()))
    found = data_ranks(model)
    figures["ranks"] = no((found.index, found.count, found.first) == (rank, world, True) and needs_lockstep(model))
    # The same data on both ranks, so that they keep in step through all stages.
    figures["index"] = indexed(model, plain, data, folder / f"fsdp.{rank}")
    # Spans of the data, more of them on one rank than on the other.
    spans = [(0, 3), (3, 4)] if rank == 0 else [(4, 7)]
    whole = ModelCapture(model, BuildConfig(**PROJECTED))
    source = ModelGradients(whole.capture(None), as_source(data, 2))
    blocks = (block for span in evened(model, spans, (0, 0)) for block in source.blocks(*span))
    figures["spans"] = apart(
        joined(blocks, whole), captured(plain, data, np.arange(4) if rank == 0 else np.arange(4, 7))
    )
    # The second rank may have nothing at all.
    figures["none"] = apart(*(captured(m, data, ids[: 3 * (1 - rank)]) for m in (model, plain)))
    # Trained on: gradients flow, and afterwards capture does not take part in them.
    functional.cross_entropy(model(data[0][rank : rank + 1]), data[1][rank : rank + 1]).backward()
    both = by_autograd(plain, (data[0][:2], data[1][:2]), ["up"])["up"].mean(dim=0)[:-1]
    figures["training"] = apart({"": model.up.weight.grad.full_tensor().T}, {"": both})
    figures["after"] = apart(captured(model, data, ids), captured(plain, data, ids))
    figures["kept"] = apart({"": model.up.weight.grad.full_tensor().T}, {"": both})
    return figures


def fsdp_gpt2(rank: int, world: int, folder: Path) -> Figures:
    model = gpt2()
    model = sharded(model, init_device_mesh("cpu", (world,)), list(model.transformer.h))
    return alike(model, gpt2(), tokens(), mine(rank, world, 5), layers=EVERYTHING)


def fsdp_refused(rank: int, world: int, folder: Path) -> Figures:
    """An error in the middle of a pass leaves a model that works."""
    plain, data = mlp(positions=True), vectors(4, positions=4)
    model = mlp(positions=True)
    sharded(model, init_device_mesh("cpu", (world,)), [model.up, model.down])
    before = state_of(model)

    def averaged(model: nn.Module, batch: Any) -> torch.Tensor:
        return default_loss(model, (batch[0].flatten(0, 1).unsqueeze(1), batch[1].repeat_interleave(4)))[:4]

    capture = ModelCapture(model, BuildConfig(**PROJECTED)).capture(averaged)
    try:
        capture.gradients(np.arange(4), data)
        raised = ""
    except CaptureError as error:
        raised = str(error)
    figures = {"refused": no("'up'" in raised), "as found": no(state_of(model) == before)}
    return figures | alike(model, plain, data, np.arange(4))


def fsdp_together(rank: int, world: int, folder: Path) -> Figures:
    """One index, built by all ranks: each gives the gradients of some of the examples."""
    data, config = vectors(41), BuildConfig(batch_size=3)
    model = sharded(mlp(), init_device_mesh("cpu", (world,)), [])
    with Index.build(folder / "together", model=model, data=data, config=config) as index:
        found = torch.as_tensor(index.scores(data))
    with Index.build(folder / f"alone.{rank}", model=mlp(), data=data, config=config, distributed=False) as index:
        return {"index": apart({"": found}, {"": torch.as_tensor(index.scores(data))})}


def tensor_parallel(rank: int, world: int, folder: Path) -> Figures:
    plain, data = mlp(), vectors()
    model = parallelize_module(
        mlp(), init_device_mesh("cpu", (world,)), {"up": ColwiseParallel(), "down": RowwiseParallel()}
    )
    before = state_of(model)
    figures = alike(model, plain, data, np.arange(7))
    figures["autograd"] = apart(
        captured(model, data, np.arange(7), **EXACT), by_autograd(plain, data, ["up", "down", "head"])
    )
    found = data_ranks(model)
    figures["ranks"] = no((found.index, found.count, found.first) == (0, 1, rank == 0) and not needs_lockstep(model))
    figures["as found"] = no(state_of(model) == before)
    figures["index"] = indexed(model, plain, data, folder / f"tensor.{rank}")
    return figures


def sequence_parallel(rank: int, world: int, folder: Path) -> Figures:
    """Positions are spread between the pair's ends; the middle's output stays a DTensor; the head comes last."""
    model = parallelize_module(
        mlp(positions=True),
        init_device_mesh("cpu", (world,)),
        {
            "norm": SequenceParallel(),
            "up": ColwiseParallel(input_layouts=Shard(1), use_local_output=False),
            "down": RowwiseParallel(output_layouts=Shard(1), use_local_output=False),
            "last": SequenceParallel(use_local_output=True),
        },
    )

    def forward(x: torch.Tensor) -> torch.Tensor:
        # The residual stream is spread over positions, too.
        x = DTensor.from_local(x, model.down.weight.device_mesh, [Replicate()]).redistribute(placements=[Shard(1)])
        x = x + model.down(functional.gelu(model.up(model.norm(x))))
        x = DTensor.from_local(model.last(x), model.down.weight.device_mesh, [Shard(1)])
        return model.head(x.redistribute(placements=[Replicate()]).to_local().mean(dim=1))

    model.forward = forward  # type: ignore[method-assign]
    return alike(model, mlp(positions=True), vectors(5, positions=4), np.arange(5))


def plan_of(model: nn.Module, head: ColwiseParallel) -> dict[str, Any]:
    plan: dict[str, Any] = {"model.embed_tokens": RowwiseParallel(input_layouts=Replicate()), "lm_head": head}
    for i in range(len(model.model.layers)):
        at = f"model.layers.{i}."
        plan |= {f"{at}self_attn.{name}_proj": ColwiseParallel() for name in "qkv"}
        plan |= {f"{at}mlp.{name}_proj": ColwiseParallel() for name in ("gate", "up")}
        plan |= {f"{at}self_attn.o_proj": RowwiseParallel(), f"{at}mlp.down_proj": RowwiseParallel()}
    return plan


def tensor_parallel_llama(rank: int, world: int, folder: Path) -> Figures:
    """Also the embedding, spread over tokens, and the head, whose logits stay spread over classes."""
    model = llama()
    head = ColwiseParallel(use_local_output=False)
    model = parallelize_module(model, init_device_mesh("cpu", (world,)), plan_of(model, head))
    return alike(model, llama(), tokens(), np.arange(5), layers=EVERYTHING)


def tied_again(rank: int, world: int, folder: Path) -> Figures:
    """Embedding and head are one weight, whose tokens are spread both times: its gradient is the sum of both uses."""
    model = llama(tied=True)
    head = ColwiseParallel(use_local_output=False)
    model = parallelize_module(model, init_device_mesh("cpu", (world,)), plan_of(model, head))
    model.lm_head.weight = model.model.embed_tokens.weight
    return alike(model, llama(tied=True), tokens(), np.arange(5), layers=EVERYTHING)


def positions_in_plain_tensors(rank: int, world: int, folder: Path) -> Figures:
    """A row-wise layer that gives each rank some of the positions, without saying so: refused, on all ranks."""
    mesh = init_device_mesh("cpu", (world,))
    model = parallelize_module(mlp(positions=True), mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    down = model.down

    def forward(x: torch.Tensor) -> torch.Tensor:
        whole = DTensor.from_local(functional.linear(x, down.weight.to_local()), mesh, [Partial()])
        return whole.redistribute(placements=[Shard(1)]).to_local()

    down.register_forward_pre_hook(lambda module, args: tuple(a.to_local() for a in args))
    down._forward_hooks.clear()
    down.forward = forward
    model.forward = lambda x: model.head(down(functional.gelu(model.up(x))).mean(dim=1))  # type: ignore[method-assign]
    try:
        captured(model, vectors(4, positions=4), np.arange(4))
    except CaptureError as error:
        return {"refused": no("'down' has inputs at 4 positions and gradients at 2" in str(error))}
    return {"refused": no(False)}


def transformers_plan(rank: int, world: int, folder: Path) -> Figures:
    """transformers' own tensor parallelism, which works inside of `forward`."""
    path = folder / f"llama{world}"
    if rank == 0:
        llama().save_pretrained(path)
    dist.barrier()
    model = transformers.LlamaForCausalLM.from_pretrained(path, tp_plan="auto")
    return alike(model, llama(), tokens(), np.arange(5), layers=EVERYTHING) | {
        "spread": no(any(isinstance(p, DTensor) for p in model.parameters())),
        "ranks": no(data_ranks(model).count == 1),
    }


# -- four ranks --------------------------------------------------------------------------------------------------------


def uneven(rank: int, world: int, folder: Path) -> Figures:
    """Six columns over four ranks: the last has none. Between the layers they stay a DTensor, which knows of six."""
    plan = {"up": ColwiseParallel(use_local_output=False), "down": RowwiseParallel()}
    model = parallelize_module(mlp(), init_device_mesh("cpu", (world,)), plan)
    return alike(model, mlp(), vectors(), np.arange(7))


def hsdp(rank: int, world: int, folder: Path) -> Figures:
    model = gpt2()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model = sharded(model, mesh, list(model.transformer.h))
    found = data_ranks(model)
    return alike(model, gpt2(), tokens(), mine(rank, world, 5)) | {
        "ranks": no((found.index, found.count, found.first) == (rank, world, True))
    }


def two_dimensional(rank: int, world: int, folder: Path) -> Figures:
    """FSDP2 over tensor parallelism: two groups of two, each with examples of its own."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    model = llama()
    parallelize_module(model, mesh["tensor"], plan_of(model, ColwiseParallel(output_layouts=Replicate())))
    model = sharded(model, mesh["data"], list(model.model.layers))
    before = state_of(model)
    found = data_ranks(model)
    figures = alike(model, llama(), tokens(), mine(found.index, found.count, 5), layers=EVERYTHING)
    figures["ranks"] = no((found.index, found.count, found.first) == (rank // 2, 2, rank % 2 == 0))
    figures["as found"] = no(state_of(model) == before)
    return figures


def copies_of_tensor_parallel(rank: int, world: int, folder: Path) -> Figures:
    """Two copies of a tensor parallel model: its mesh alone says which ranks belong together."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    model = parallelize_module(mlp(), mesh["tensor"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    found = data_ranks(model)
    ids = mine(found.index, found.count, 7)
    return {
        "ranks": no((found.index, found.count, found.first) == (rank // 2, 2, rank % 2 == 0)),
        "projected": apart(captured(model, vectors(), ids), captured(mlp(), vectors(), ids)),
    }


Case = Callable[[int, int, Path], Figures]
CASES: dict[tuple[int, str], list[Case]] = {
    (2, "gloo"): [
        ddp, fsdp, fsdp_gpt2, fsdp_refused, fsdp_together, tensor_parallel, sequence_parallel, tensor_parallel_llama,
        tied_again, positions_in_plain_tensors, transformers_plan,
    ],
    (2, "cpu:gloo"): [fsdp, fsdp_refused, fsdp_together, tensor_parallel],
    (4, "cpu:gloo"): [uneven, hsdp, two_dimensional, copies_of_tensor_parallel],
}  # fmt: skip


def run(rank: int, world: int, backend: str, folder: Path) -> None:
    """All cases of one size under one backend, on one rank."""
    folder.mkdir(exist_ok=True)
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    meeting = f"file://{folder}/meeting"
    dist.init_process_group(backend, init_method=meeting, rank=rank, world_size=world, timeout=timedelta(seconds=600))
    results: dict[str, Any] = {}
    for case in CASES[world, backend]:
        try:
            results[case.__name__] = case(rank, world, folder)
        except Exception:
            results[case.__name__] = {"raised": traceback.format_exc()}
        # Ranks that are out of step may be ended from outside.
        (folder / f"{rank}.json").write_text(json.dumps(results))
        if "raised" in results[case.__name__]:
            # What comes after it may wait for a rank that has gone on: the first failure ends them all.
            return
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    for size, backend in CASES:
        # Forked after the imports, which take longer than the cases.
        place = Path(sys.argv[1]) / f"{size}.{backend}"
        mp.start_processes(run, args=(size, backend, place), nprocs=size, start_method="fork")
