"""Explainer: an index as one of quanda's explainers, of which a metric or benchmark asks scores of all examples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from quanda.explainers.base import Explainer
from torch import nn

from ..capture.data import collate
from ..capture.losses import PerExample
from ..config import BuildConfig
from ..curvature.refine import Refine
from ..damping import Damping
from ..errors import DataError
from ..index import Index
from ..storage.manifest import MANIFEST


class LorifExplainer(Explainer):  # type: ignore[misc]
    """Scores by an index of the training data, which is built with the explainer, or opened where it is already.

    Args:
        model: the trained model.
        train_dataset: of quanda's kinds: a torch dataset of (input, label), or a data set of Hugging Face with labels.
        task: one of `accepted_tasks`.
        checkpoints, checkpoints_load_func: as of every explainer; the last one is loaded into the model.
        cache_dir, model_id: the index lies in the folder `cache_dir/model_id`.
        config, loss: as for `Index.build`.
        damping, layers, refine: as for `Index.scores`.
        kwargs: what quanda's configurations pass to all explainers; not used.

    Attributes:
        index: opened.

    Raises:
        FingerprintError: another model or loss than that of the index that is there.
    """

    accepted_tasks = ["image_classification", "text_classification", "causal_lm"]  # noqa: RUF012 - as quanda has it

    def __init__(
        self,
        model: nn.Module,
        train_dataset: Any,
        task: str = "image_classification",
        checkpoints: str | list[str] | None = None,
        checkpoints_load_func: Callable[..., Any] | None = None,
        *,
        cache_dir: str = "./cache",
        model_id: str = "lorif",
        config: BuildConfig | None = None,
        loss: PerExample | None = None,
        damping: Damping | float | str | None = None,
        layers: str | Sequence[str] | None = None,
        refine: bool | Refine | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            model=model,
            train_dataset=train_dataset,
            task=task,
            checkpoints=checkpoints,
            checkpoints_load_func=checkpoints_load_func,
        )
        if self.checkpoints:
            self.load_last_checkpoint()
        self._asked: dict[str, Any] = {"damping": damping, "layers": layers}
        self._refine = refine
        path = Path(cache_dir) / str(model_id)
        if (path / MANIFEST).is_file():
            self.index = Index.open(path, model=model, loss=loss, data=train_dataset)
            if self.index.build_report["examples"] != len(train_dataset):
                raise DataError(
                    f"{path} is an index of {self.index.build_report['examples']:,} examples, and train_dataset has "
                    f"{len(train_dataset):,}: pass another model_id"
                )
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.index = Index.build(
                path, model=model, data=train_dataset, loss=loss, config=config, progress=False, distributed=False
            )

    def explain(self, test_data: Any, targets: Any) -> torch.Tensor:
        """Scores of all training examples, (q, n) float32 on the model's device; 0 of those that were left out.

        Args:
            test_data: (q, ...) inputs; of texts a dict of them, or a list of dicts.
            targets: (q,) labels, or of a causal language model (q, T).
        """
        targets = torch.as_tensor(targets)
        if isinstance(test_data, torch.Tensor):
            query: Any = (test_data, targets.to(test_data.device))
        else:
            columns = test_data if isinstance(test_data, Mapping) else collate(test_data)
            query = {**columns, "labels": targets}
        return self._of_all(self.index.scores(query, refine=self._refine, **self._asked))

    def self_influence(self, batch_size: int = 1) -> torch.Tensor:
        """Each training example's score with itself, (n,) float32; batch_size is not used."""
        return self._of_all(self.index.self_influence(**self._asked))

    def _of_all(self, scores: np.ndarray) -> torch.Tensor:
        out = np.zeros((*scores.shape[:-1], len(self.train_dataset)), dtype=np.float32)
        out[..., self.index.ids] = scores
        return torch.from_numpy(out).to(self.device)
