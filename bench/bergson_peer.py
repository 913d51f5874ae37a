"""Bergson's attribution (EleutherAI) on the benchmarks' texts: EK-FAC, the same refined by CG, and TrackStar.

Its pipelines read a model, a data set and settings from folders, so they are written there first. Defaults are its own;
the library is optional, and imported when its adapter is called.
"""

from __future__ import annotations

import contextlib
import copy
import io
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from bench.peers import Peer, multiple, seeded
from bench.tasks import Task, size

TOKENS = 2048
"""Of a batch, by Bergson's default; it asks for a model that takes as many at once."""
MULTIPLES = (1e-3, 1e-2, 1.0)


def written(folder: Path, task: Task, model: Any) -> None:
    """The model with room for more positions (which no text has), its tokenizer's file, and both sets of texts."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    if not isinstance(task.data, dict):
        raise ValueError("Bergson attributes language models, and this task has images")
    config = copy.deepcopy(model.config)
    config.n_positions = TOKENS
    wide, state = type(model)(config), model.state_dict()
    places = state["transformer.wpe.weight"]
    state["transformer.wpe.weight"] = functional.pad(places, (0, 0, 0, TOKENS - len(places)))
    wide.load_state_dict(state)
    wide.save_pretrained(folder / "model")
    words = Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
    PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=TOKENS).save_pretrained(folder / "model")
    for name, data in (("data", task.data), ("queries", task.queries)):
        Dataset.from_dict({"input_ids": data["input_ids"].tolist()}).save_to_disk(folder / name)


@contextlib.contextmanager
def at_work(task: Task, model: nn.Module, seed: int) -> Iterator[Path]:
    """A folder with what `written` writes, a seed, and no word on stdout."""
    with tempfile.TemporaryDirectory() as made, seeded(seed), contextlib.redirect_stdout(io.StringIO()):
        written(Path(made), task, model)
        yield Path(made)


def found_in(folder: Path) -> np.ndarray:
    """(q, n) of a finished run."""
    from bergson.data import load_scores

    return np.ascontiguousarray(load_scores(folder / "scores")[:].T, dtype=np.float32)


def ekfac(
    task: Task,
    model: nn.Module,
    *,
    seed: int = 0,
    steps: int = 0,
    documents: int = 16,
    multiples: tuple[float, ...] = MULTIPLES,
) -> Peer:
    """EK-FAC; with `steps`, refined by so many of conjugate gradients, on the curvature of a few documents a query.

    Settings are its damping_factor, in mean eigenvalues of each layer; 0.1 is its default.
    """
    from bergson import DataConfig, IndexConfig, PreprocessConfig, QuerySetConfig, ScoreConfig
    from bergson.config.config import AstraConfig, HessianConfig, HessianPipelineConfig, InversionConfig
    from bergson.hessians import astra
    from bergson.hessians.hessian_approximations import approximate_hessians
    from bergson.hessians.pipeline import hessian_pipeline

    def copied(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.array(array))

    with at_work(task, model, seed) as folder:
        run = folder / "run"

        def index(path: Path) -> Any:
            data = DataConfig(dataset=str(folder / "data"))
            return IndexConfig(run_path=str(path), model=str(folder / "model"), data=data)

        hessian = HessianConfig(method="kfac", ev_correction=True)
        began = time.perf_counter()
        approximate_hessians(index(run / "hessian" / "kfac"), hessian)
        built = time.perf_counter() - began
        scores, seconds, default = {}, {}, multiple(InversionConfig().damping_factor)
        for label in (default, *map(multiple, multiples)):
            for before in ("query", "kfac_query", "astra_query", "scores"):
                shutil.rmtree(run / before, ignore_errors=True)
            settings = HessianPipelineConfig(
                query=QuerySetConfig(dataset=str(folder / "queries")),
                inversion_cfg=InversionConfig(damping_factor=float(label)),
                astra=AstraConfig(num_steps=steps, solver="cg", batch_size=documents),
                resume=True,
            )
            began = time.perf_counter()
            # On a CPU it would write its solutions into the read-only map that they came from, and crash.
            with mock.patch.object(astra, "numpy_to_tensor", copied):
                hessian_pipeline(index(run), hessian, ScoreConfig(), PreprocessConfig(), settings)
            seconds[label] = time.perf_counter() - began
            scores[label] = found_in(run)
    refined = f", refined by {steps} steps of its preconditioned CG on {documents} documents a query" if steps else ""
    note = (
        f"bergson, kfac with corrected eigenvalues, true Fisher, float32, no projection{refined}; settings are its "
        "damping_factor in mean eigenvalues. Bytes: nothing is kept per example, training gradients are computed again "
        "for each set of queries."
    )
    return Peer(scores, default, 0.0, built, 1e3 * seconds[default] / size(task.queries), note)


def trackstar(task: Task, model: nn.Module, *, seed: int = 0, dim: int = 16) -> Peer:
    """TrackStar (Chang et al., arXiv:2410.17413): cosines of projected gradients, whitened by a mixed second moment.

    Without the optimiser's second moments, which are not kept.
    """
    from bergson import DataConfig, PreprocessConfig, QuerySetConfig
    from bergson.cli.trackstar import trackstar as pipeline
    from bergson.config.config import TrackstarConfig, TrackstarIndexConfig

    with at_work(task, model, seed) as folder:
        index = TrackstarIndexConfig(
            run_path=str(folder / "run"),
            model=str(folder / "model"),
            data=DataConfig(dataset=str(folder / "data")),
            projection_dim=dim,
        )
        settings = TrackstarConfig(
            query=QuerySetConfig(dataset=str(folder / "queries")), preprocess_cfg=PreprocessConfig(unit_normalize=True)
        )
        began = time.perf_counter()
        pipeline(index, settings)
        seconds = time.perf_counter() - began
        found = found_in(folder / "run")
    layers = sum(name.endswith((".c_attn", ".c_proj", ".c_fc")) for name, _ in model.named_modules())
    note = (
        f"bergson, TrackStar with unit_normalize, projection_dim {dim} of {layers} layers, mixed second moments, no "
        "optimiser state; its one pipeline is timed whole. Bytes: float32 projected gradients, if they were kept."
    )
    return Peer({"default": found}, "default", 4.0 * dim * dim * layers, 0.0, 1e3 * seconds / len(found), note)
