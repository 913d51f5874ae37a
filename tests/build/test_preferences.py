"""Preferences: DPO's loss and gradients against the formula, the reference's part, an index of pairs."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SENTENCES, WHOLE, captured, close, tiny_model_folder

from lorif_index import Index, default_loss
from lorif_index.errors import ConfigError, DataError
from lorif_index.text import DPOLoss, PreferencePairs, load_text_model

pytest.importorskip("transformers")

ROWS = [
    {
        "prompt": " ".join(text.split()[:2]),
        "chosen": " " + text.split()[2],
        "rejected": " " + " ".join(other.split()[:2]),
    }
    for text, other in zip(SENTENCES, reversed(SENTENCES), strict=True)
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: Any) -> Any:
    """A model, the model that it started from, and pairs."""
    found = load_text_model(tiny_model_folder(tmp_path_factory.mktemp("dpo") / "model"))
    model, reference = found.model, copy.deepcopy(found.model)
    torch.manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model, reference, found.tokenizer, PreferencePairs(ROWS, found.tokenizer, model=model, reference=reference)


def log_probability(model: Any, tokenizer: Any, row: dict[str, str], answer: str) -> torch.Tensor:
    """Of an answer's tokens, one by one."""
    before, after = (tokenizer(row[name])["input_ids"] for name in ("prompt", answer))
    logits = model(input_ids=torch.tensor([before + after])).logits[0].log_softmax(-1)
    return sum(logits[len(before) - 1 + at, word] for at, word in enumerate(after))  # type: ignore[return-value]


def by_hand(made: Any, row: dict[str, str], beta: float) -> torch.Tensor:
    model, reference, tokenizer, _ = made
    margin = torch.zeros(())
    for sign, answer in ((1, "chosen"), (-1, "rejected")):
        with torch.no_grad():
            old = log_probability(reference, tokenizer, row, answer)
        margin = margin + sign * beta * (log_probability(model, tokenizer, row, answer) - old)
    return -torch.nn.functional.logsigmoid(margin)


def test_losses_and_gradients_are_the_formulas(made: Any) -> None:
    model, pairs, loss = made[0], made[3], DPOLoss(0.3)
    batch = pairs.collate_examples(pairs.__getitems__(range(len(pairs))))
    assert batch["input_ids"].shape[:2] == (len(ROWS), 2)
    found = captured(model, pairs, WHOLE, loss)
    names = {f"{layer}.weight": layer for layer in found}
    weights = {name: p for name, p in model.named_parameters() if name in names}
    assert len(weights) == len(found)
    for i, row in enumerate(ROWS):
        wanted = by_hand(made, row, 0.3)
        assert float(loss(model, batch)[i]) == pytest.approx(float(wanted), abs=2e-5)
        for name, grad in zip(weights, torch.autograd.grad(wanted, list(weights.values())), strict=True):
            # Conv1D's weights are (inputs, outputs).
            assert close(found[names[name]][i][: len(grad)], grad.numpy(), 1e-3), name


def test_stored_log_probabilities_take_the_references_place(made: Any) -> None:
    model, reference, tokenizer, pairs = made
    with torch.no_grad():
        logs = [[float(log_probability(reference, tokenizer, row, a)) for a in ("chosen", "rejected")] for row in ROWS]
    names = ("ref_chosen_logps", "ref_rejected_logps")
    rows = [row | dict(zip(names, log, strict=True)) for row, log in zip(ROWS, logs, strict=True)]
    other = PreferencePairs(rows, tokenizer, model=model)
    batches = [p.collate_examples(p.__getitems__(range(len(p)))) for p in (pairs, other)]
    torch.testing.assert_close(*(DPOLoss()(model, batch) for batch in batches))


def test_an_index_of_pairs_is_searched(made: Any, tmp_path: Path) -> None:
    model, reference, tokenizer, pairs = made
    with warnings.catch_warnings():
        # The Gauss-Newton matrix is seen by itself.
        warnings.simplefilter("error")
        index = Index.build(tmp_path / "i", model=model, data=pairs, loss=DPOLoss(), payloads=ROWS, tokenizer=tokenizer)
    assert index.fingerprint and len(index) == len(ROWS)
    asked = PreferencePairs(ROWS[2:4], tokenizer, model=model, reference=reference, progress=False)
    hits = index.search(asked, k=1)
    assert hits.ids[:, 0].tolist() == [2, 3] and hits.payloads[0][0] == ROWS[2]
    # A text under its own loss is a question, too.
    assert np.isfinite(index.scores(SENTENCES[0], measure=default_loss)).all()
    opened = Index.open(tmp_path / "i", model=model, loss=DPOLoss())
    assert np.array_equal(opened.search(asked, k=3).ids, index.search(asked, k=3).ids)


def test_texts_without_a_prompt(made: Any) -> None:
    model, reference, tokenizer, _ = made
    rows = [{"chosen": "An owl sang.", "rejected": "A dog"}]
    item = PreferencePairs(rows, tokenizer, model=model, reference=reference)[0]
    assert [answer["input_ids"] for answer in item["answers"]] == [
        tokenizer(text)["input_ids"] for text in ("An owl sang.", "A dog")
    ]


def test_what_is_no_pair_is_refused(made: Any) -> None:
    model, reference, tokenizer, _ = made
    with pytest.raises(DataError, match=r"pair 1 has not the columns chosen and rejected, but \['text'\]"):
        PreferencePairs([ROWS[0], {"text": "x"}], tokenizer, model=model, reference=reference)
    with pytest.raises(DataError, match="holds no pairs"):
        PreferencePairs([], tokenizer, model=model, reference=reference)
    with pytest.raises(DataError, match=r"pair 0 has no log-probabilities.*pass reference="):
        PreferencePairs(ROWS, tokenizer, model=model)
    with pytest.raises(DataError, match="pass data=PreferencePairs"):
        DPOLoss()(model, {"input_ids": torch.ones(2, 3, dtype=torch.long)})
    for beta in (0.0, -1.0, float("nan")):
        with pytest.raises(ConfigError, match="beta must be above 0"):
            DPOLoss(beta)
