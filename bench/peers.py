"""Other libraries' attribution on the benchmarks' tasks: TRAK (traker), EK-FAC (kronfluence) and LoGRA (dattri).

Each adapter keeps the library's own defaults, but for half precision, which a CPU is slow in; what it sweeps is the
damping. The libraries are optional: each is imported when its adapter is called.
"""

from __future__ import annotations

import copy
import logging
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from bench.tasks import Task, batches, size, take
from lorif_index import default_loss

TRAK_MULTIPLES = (0.0, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0)
EKFAC_MULTIPLES = (1e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 10.0)
LOGRA_MULTIPLES = (1e-4, 1e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 10.0)
LOGRA_DEFAULT = 1e-5
"""What dattri takes where no damping is given, times the mean eigenvalue of each layer's Fisher matrix."""


@dataclass(frozen=True)
class Peer:
    """What one run of a peer gave.

    Attributes:
        scores: setting of the damping -> (q, n) float32; positive where training on the example lowers the loss.
        default: the setting that is the library's own.
        bytes_per_example: kept for scoring, per training example: numbers times bytes of their type.
        build_seconds: from the trained model to what a query needs, at the default setting.
        query_milliseconds: after that, at the default setting, all queries together divided by their number.
        note: what was chosen, and how it was counted.
    """

    scores: dict[str, np.ndarray]
    default: str
    bytes_per_example: float
    build_seconds: float
    query_milliseconds: float
    note: str


# -- what the adapters share ---------------------------------------------------------------------------------------


class Rows(Dataset):
    """One example a row: (x, y), or a dict; with `named`, always a dict."""

    def __init__(self, data: Any, named: bool = False) -> None:
        self.data = dict(zip("xy", data, strict=True)) if named and not isinstance(data, dict) else data

    def __len__(self) -> int:
        return len(self.data["x"]) if isinstance(self.data, dict) and "x" in self.data else size(self.data)

    def __getitem__(self, row: int) -> Any:
        return take(self.data, row)


def predictions(model: nn.Module, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (m, C) and the classes (m,) they are to predict: one for each example, or for each token but the first.

    Tokens that an `attention_mask` hides (padding on the right) are left out.
    """
    if not isinstance(batch, dict):
        return model(batch[0]), batch[1]
    logits = causal_logits(model, batch["input_ids"])
    shown = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))[:, 1:].bool()
    return logits[shown], batch["input_ids"][:, 1:][shown]


def causal_logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """(n, T - 1, C): what each token but the last says of the next."""
    places = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    return model(input_ids=ids, position_ids=places, use_cache=False).logits[:, :-1]


class Unfolded(nn.Module):
    """A Conv2d as a linear layer of its patches."""

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        if convolution.groups != 1 or convolution.padding_mode != "zeros" or isinstance(convolution.padding, str):
            raise ValueError(f"no linear form of {convolution}")
        self.unfold = nn.Unfold(
            convolution.kernel_size,  # type: ignore[arg-type]
            dilation=convolution.dilation,  # type: ignore[arg-type]
            padding=convolution.padding,  # type: ignore[arg-type]
            stride=convolution.stride,  # type: ignore[arg-type]
        )
        self.extents = tuple(zip(*(self.unfold.__dict__[k] for k in SHAPE), strict=True))
        self.linear = as_linear(convolution.weight.flatten(1), convolution.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        high, wide = (
            (length + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
            for length, (kernel, dilation, padding, stride) in zip(x.shape[-2:], self.extents, strict=True)
        )
        return self.linear(self.unfold(x).transpose(1, 2)).transpose(1, 2).unflatten(2, (high, wide))


SHAPE = ("kernel_size", "dilation", "padding", "stride")


def as_linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
    return layer


def with_linear_layers(model: nn.Module, convolutions: bool = False) -> nn.Module:
    """A copy where transformers' Conv1D, and with `convolutions` Conv2d too, are nn.Linear of the same weights."""
    model = copy.deepcopy(model).eval()
    for name, module in list(model.named_modules()):
        if type(module).__name__ == "Conv1D":
            layer: nn.Module = as_linear(module.weight.T, module.bias)
        elif convolutions and isinstance(module, nn.Conv2d):
            layer = Unfolded(module)
        else:
            continue
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, layer)
    return model


def layers(model: nn.Module, kinds: tuple[type[nn.Module], ...] = (nn.Linear,), *, head: bool = False) -> list[str]:
    """Names of the layers that are attributed to: all, or all but a language model's head."""
    return [n for n, m in model.named_modules() if isinstance(m, kinds) and (head or not n.endswith("lm_head"))]


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Torch's global generator at a seed, and back as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def solve(matrix: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """The inverse of a symmetric matrix times another; not by Cholesky where rounding has left it indefinite."""
    factor, failed = torch.linalg.cholesky_ex(matrix)
    return torch.linalg.solve(matrix, right) if failed else torch.cholesky_solve(right, factor)


def multiple(value: float) -> str:
    return f"{value:g}"


# -- TRAK ----------------------------------------------------------------------------------------------------------


def trak(
    task: Task,
    model: nn.Module,
    *,
    seed: int = 0,
    proj_dim: int = 1024,
    batch: int = 64,
    multiples: tuple[float, ...] = TRAK_MULTIPLES,
    with_itself: bool = False,
) -> Peer:
    """TRAK of one model, with all its parameters; settings are lambda_reg, in mean eigenvalues of its X'X.

    With `with_itself` the scores are two rows: the sum over all queries, and each example's with itself.

    `proj_dim` is 2048 by traker's default. Its X'X is singular where there are fewer examples than that, and its own
    setting, no damping, is then of no use.
    """
    from trak import TRAKer
    from trak.modelout_functions import AbstractModelOutput
    from trak.projectors import BasicProjector, ProjectionType

    class TokenMargins(AbstractModelOutput):
        """Log-odds of the next token, summed over the tokens shown; its weight is the mean of 1 - p."""

        def __init__(self) -> None:
            super().__init__()

        @staticmethod
        def get_output(
            model: nn.Module, weights: Any, buffers: Any, ids: torch.Tensor, shown: torch.Tensor
        ) -> torch.Tensor:
            logits, targets = TokenMargins.predict(model, weights, buffers, ids[None])
            right = logits.gather(-1, targets[..., None])[..., 0]
            wrong = logits.scatter(-1, targets[..., None], -torch.inf).logsumexp(-1)
            return ((right - wrong) * shown[1:]).sum()

        def get_out_to_loss_grad(self, model: nn.Module, weights: Any, buffers: Any, batch: Any) -> torch.Tensor:
            with torch.no_grad():
                logits, targets = self.predict(model, weights, buffers, batch[0])
                right = logits.softmax(-1).gather(-1, targets[..., None])[..., 0]
            shown = batch[1][:, 1:]
            return ((1 - right) * shown).sum(dim=1, keepdim=True) / shown.sum(dim=1, keepdim=True)

        @staticmethod
        def predict(model: nn.Module, weights: Any, buffers: Any, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
            places = torch.arange(ids.shape[1]).expand_as(ids)
            inputs = {"input_ids": ids, "position_ids": places, "use_cache": False}
            output = torch.func.functional_call(model, (weights, buffers), args=(), kwargs=inputs)
            return output.logits[:, :-1], ids[:, 1:]

    class KeptProjector(BasicProjector):
        """One block, made once: the matrix is kept where TRAKer would free it between training set and queries."""

        def free_memory(self) -> None:
            pass

    model = copy.deepcopy(model).eval()
    text = isinstance(task.data, dict)
    if text:
        model.set_attn_implementation("eager")  # type: ignore[operator]
    parameters = sum(p.numel() for p in model.parameters())

    def pieces(data: Any) -> Iterator[tuple[list[torch.Tensor], int]]:
        for part in batches(data, batch):
            if text:
                ids = part["input_ids"]
                yield [ids, part.get("attention_mask", torch.ones_like(ids)).float()], size(part)
            else:
                yield list(part), size(part)

    with tempfile.TemporaryDirectory() as directory:
        began = time.perf_counter()
        traker = TRAKer(
            model=model,
            task=TokenMargins() if text else "image_classification",
            train_set_size=task.count,
            save_dir=directory,
            device="cpu",
            projector=KeptProjector(
                parameters, proj_dim, seed, ProjectionType.normal, "cpu", block_size=proj_dim, dtype=torch.float32
            ),
            proj_dim=proj_dim,
            logging_level=logging.ERROR,
            use_half_precision=False,
        )
        state = copy.deepcopy(model.state_dict())
        traker.load_checkpoint(state, model_id=0)
        for inputs, count in pieces(task.data):
            traker.featurize(batch=inputs, num_samples=count)
        traker.finalize_features()
        built = time.perf_counter() - began

        began = time.perf_counter()
        queries = size(task.queries)
        traker.start_scoring_checkpoint("queries", state, model_id=0, num_targets=queries)
        for inputs, count in pieces(task.queries):
            traker.score(batch=inputs, num_samples=count)
        own = np.array(traker.finalize_scores("queries")).T
        asked = time.perf_counter() - began

        kept = Path(directory) / "0"
        x, weights, asked_of = (
            torch.from_numpy(np.load(kept / f"{name}.mmap", allow_pickle=False))
            for name in ("grads", "out_to_loss", "queries_grads")
        )
        computer = traker.score_computer
        gram = computer.get_xtx(x)
        scores = {}
        for times in multiples:
            computer.lambda_reg = times * float(gram.diagonal().mean())
            features = computer.get_x_xtx_inv(x, gram)
            found = (features @ asked_of.T * weights).T.numpy() if times else own
            if with_itself:
                found = np.stack([found.sum(axis=0), ((features * x).sum(dim=1) * weights.flatten()).numpy()])
            scores[multiple(times)] = found
    note = (
        f"traker, one model, all {parameters} parameters, proj_dim {proj_dim} (its default is 2048), float32, normal "
        "projection held in memory; settings are lambda_reg in mean eigenvalues of X'X. Bytes: float32 features and "
        "one weight of the finalized store, without the gradients it need not keep. "
        + ("Output: log-odds summed over tokens." if text else "Output: its image_classification.")
    )
    return Peer(
        {label: np.ascontiguousarray(value, dtype=np.float32) for label, value in scores.items()},
        multiple(0.0),
        4.0 * (proj_dim + 1),
        built,
        1e3 * asked / queries,
        note,
    )


# -- EK-FAC --------------------------------------------------------------------------------------------------------


def ekfac(
    task: Task,
    model: nn.Module,
    *,
    seed: int = 0,
    batch: int = 64,
    multiples: tuple[float, ...] = EKFAC_MULTIPLES,
    with_itself: bool = False,
    head: bool = False,
) -> Peer:
    """EK-FAC influence, as kronfluence has it; settings are its damping_factor.

    "1e-08" is its default, as it is; the others are in mean eigenvalues of each layer, as its heuristic (0.1) is. With
    `with_itself` the scores are two rows: the sum over all queries, and each example's with itself. With `head` a
    language model's head is tracked, too: the weight's use there, not as an embedding that it may be tied to.
    """
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task as Kronfluence

    model = with_linear_layers(model)
    names = layers(model, (nn.Linear, nn.Conv2d), head=head)

    class Attributed(Kronfluence):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> torch.Tensor:
            logits, targets = predictions(model, batch)
            if sample:
                with torch.no_grad():
                    targets = torch.multinomial(logits.softmax(-1), 1)[:, 0]
            return functional.cross_entropy(logits, targets, reduction="sum")

        def compute_measurement(self, batch: Any, model: nn.Module) -> torch.Tensor:
            return self.compute_train_loss(batch, model)

        def get_influence_tracked_modules(self) -> list[str]:
            return names

    queries = size(task.queries)
    common: dict[str, Any] = {"query_gradient_accumulation_steps": -(-queries // batch)}
    if with_itself:
        common = {"aggregate_query_gradients": True}
    with tempfile.TemporaryDirectory() as directory, seeded(seed):
        attributed = Attributed()
        analyzer = Analyzer(
            "peer",
            prepare_model(model, attributed),
            attributed,
            cpu=True,
            disable_tqdm=True,
            output_dir=directory,
            log_level=logging.ERROR,
        )
        began = time.perf_counter()
        analyzer.fit_all_factors(
            factors_name="ekfac",
            dataset=Rows(task.data),
            per_device_batch_size=batch,
            factor_args=FactorArguments(strategy="ekfac"),
        )
        built = time.perf_counter() - began

        def pairwise(label: str, arguments: Any) -> np.ndarray:
            analyzer.compute_pairwise_scores(
                scores_name=label,
                factors_name="ekfac",
                query_dataset=Rows(task.queries),
                train_dataset=Rows(task.data),
                per_device_query_batch_size=batch,
                per_device_train_batch_size=batch,
                score_args=arguments,
            )
            found = analyzer.load_pairwise_scores(label)["all_modules"].float().numpy()
            if not with_itself:
                return found
            analyzer.compute_self_scores(
                scores_name=f"self-{label}",
                factors_name="ekfac",
                train_dataset=Rows(task.data),
                per_device_train_batch_size=batch,
                score_args=arguments,
            )
            own = analyzer.load_self_scores(f"self-{label}")["all_modules"].float().numpy()
            return np.stack([found.reshape(-1), own])

        began = time.perf_counter()
        default = ScoreArguments(**common)
        label = multiple(default.damping_factor)
        scores = {label: pairwise(label, default)}
        asked = time.perf_counter() - began
        for times in multiples:
            # Its heuristic is a constant times the mean eigenvalue; only the constant is another.
            with mock.patch("kronfluence.factor.config.HEURISTIC_DAMPING_SCALE", times):
                scores[f"{multiple(times)} mean"] = pairwise(
                    f"mean-{multiple(times)}", ScoreArguments(damping_factor=None, **common)
                )
        factors = sum(
            value.numel() * value.element_size()
            for found in (analyzer.load_eigendecomposition("ekfac"), analyzer.load_lambda_matrices("ekfac"))
            for of_module in found.values()
            for value in of_module.values()
        )
    note = (
        f"kronfluence, strategy ekfac, true Fisher, {len(names)} layers (no embeddings, {'with the' if head else 'no'} "
        f"head of a language model); settings are its damping_factor: {label} is the default as it is, the others are "
        "in mean eigenvalues of each layer, and 0.1 of them is what it takes for None. Bytes: nothing is kept per "
        f"example, training gradients are computed again for each batch of queries; {factors} bytes of factors are "
        "shared. A query's time is of all queries in one pass over the training set, which one query alone would take "
        "too."
    )
    return Peer(scores, label, 0.0, built, 1e3 * asked / queries, note)


# -- LoGRA ---------------------------------------------------------------------------------------------------------


class WithLoss(nn.Module):
    """A model that answers with the mean loss of a named batch, which is what dattri asks of one."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **batch: torch.Tensor) -> Answer:
        return Answer(default_loss(self.model, (batch["x"], batch["y"]) if "x" in batch else batch).mean())


@dataclass
class Answer:
    loss: torch.Tensor


def dattri_logra(
    task: Task,
    model: nn.Module,
    *,
    seed: int = 0,
    proj_dim: int = 4096,
    batch: int = 64,
    multiples: tuple[float, ...] = LOGRA_MULTIPLES,
    with_itself: bool = False,
) -> Peer:
    """LoGRA, as dattri's LoGraAttributor has it; settings are its damping, in mean eigenvalues of each layer.

    With `with_itself` the scores are two rows: the sum over all queries, and each example's with itself.

    `proj_dim` is of each layer, 4096 by its default. A Conv2d, which it does not take, is given to it as an nn.Linear.
    """
    from dattri.algorithm.logra import LoGraAttributor
    from dattri.task import AttributionTask

    asked_model = WithLoss(with_linear_layers(model, convolutions=True)).eval()
    names = layers(asked_model)

    def loss(model: nn.Module, batch: dict[str, torch.Tensor], device: str) -> torch.Tensor:
        return model(**batch).loss

    def loader(data: Any) -> DataLoader:
        return DataLoader(Rows(data, named=True), batch_size=batch, shuffle=False)

    queries = size(task.queries)
    with tempfile.TemporaryDirectory() as directory, seeded(seed), torch.compiler.set_stance("force_eager"):
        began = time.perf_counter()
        attributor = LoGraAttributor(
            AttributionTask(loss, asked_model, asked_model.state_dict()),
            layer_names=names,
            device="cpu",
            proj_dim=proj_dim,
            offload="cpu",
            cache_dir=directory,
        )
        attributor.sparsifier_kwargs["proj_seed"] = seed
        attributor.cache(loader(task.data))
        built = time.perf_counter() - began

        began = time.perf_counter()
        scores = {multiple(LOGRA_DEFAULT): attributor.attribute(loader(task.data), loader(task.queries)).T.numpy()}
        asked = time.perf_counter() - began
        if with_itself:
            ((default, found),) = scores.items()
            scores = {default: np.stack([found.sum(axis=0), attributor.compute_self_attribution().numpy()])}

        stored = attributor.offload_manager.cached_gradients
        attributor.offload_manager.cached_ifvp.clear()
        attributor.offload_manager.preconditioners.clear()
        of_queries, _ = attributor._compute_test_gradients(loader(task.queries))
        widths = list(attributor.layer_dims)
        for times in multiples:
            scores[multiple(times)] = np.zeros((2 if with_itself else queries, task.count), dtype=np.float32)
        start = 0
        for width in widths:
            columns = slice(start, start + width)
            start += width
            x = torch.cat([stored[i][:, columns] for i in sorted(stored)])
            fisher = x.T @ x / len(x)
            mean = fisher.diagonal().mean()
            for times in multiples:
                damped = fisher + times * mean * torch.eye(width)
                if with_itself:
                    inverse = solve(damped, torch.cat([of_queries[:, columns].sum(dim=0, keepdim=True), x]).T).T
                    rows = torch.stack([x @ inverse[0], (inverse[1:] * x).sum(dim=1)])
                else:
                    rows = solve(damped, of_queries[:, columns].T).T @ x.T
                scores[multiple(times)] += rows.numpy()
    note = (
        f"dattri's LoGraAttributor, eFIM, proj_dim {proj_dim} for each of {len(names)} layers (no embeddings, no head "
        "of a language model); settings are its damping, which is in mean eigenvalues of each layer's Fisher matrix. "
        "Bytes: float32 projected gradients times the inverse; it also holds those before, which scoring does not read."
    )
    return Peer(
        {label: np.ascontiguousarray(value, dtype=np.float32) for label, value in scores.items()},
        multiple(LOGRA_DEFAULT),
        4.0 * sum(widths),
        built,
        1e3 * asked / queries,
        note,
    )


PEERS: dict[str, Callable[..., Peer]] = {"trak": trak, "ekfac": ekfac, "dattri-logra": dattri_logra}
