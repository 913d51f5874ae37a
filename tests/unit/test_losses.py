"""Default losses, per example, against straightforward computation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from lorif_index import default_loss
from lorif_index.errors import DataError


class Fixed(nn.Module):
    """Gives fixed logits, as a plain tensor or as an object with `.logits`."""

    def __init__(self, logits: torch.Tensor, *, wrapped: bool = False) -> None:
        super().__init__()
        self.logits, self.wrapped = logits, wrapped

    def forward(self, input_ids: torch.Tensor, attention_mask: Any = None) -> Any:
        if self.wrapped:
            return type("Output", (), {"logits": self.logits})()
        return self.logits


def test_classes() -> None:
    logits, y = torch.randn(4, 3), torch.tensor([0, 2, 1, 1])
    expected = functional.cross_entropy(logits, y, reduction="none")
    assert torch.allclose(default_loss(Fixed(logits), (torch.zeros(4), y)), expected)
    batch = {"input_ids": torch.zeros(4, 2).long(), "labels": y}
    assert torch.allclose(default_loss(Fixed(logits, wrapped=True), batch), expected)


@pytest.mark.parametrize("classes_last", [True, False])
def test_positions_are_summed(classes_last: bool) -> None:
    logits, y = torch.randn(4, 5, 3), torch.randint(0, 3, (4, 5))
    y[1, 2:] = -100
    expected = torch.zeros(4)
    for i in range(4):
        for t in range(5):
            if y[i, t] >= 0:
                expected[i] -= torch.log_softmax(logits[i, t], 0)[y[i, t]]
    given = logits if classes_last else logits.transpose(1, 2)
    assert torch.allclose(default_loss(Fixed(given), (torch.zeros(4), y)), expected, atol=1e-5)


def test_next_token_with_labels_and_mask() -> None:
    logits, ids = torch.randn(3, 6, 9), torch.randint(0, 9, (3, 6))
    mask = torch.ones(3, 6).long()
    mask[1, 4:] = 0
    labels = ids.clone()
    labels[2, :3] = -100
    got = default_loss(Fixed(logits, wrapped=True), {"input_ids": ids, "attention_mask": mask, "labels": labels})
    expected = torch.zeros(3)
    for i in range(3):
        for t in range(5):
            if mask[i, t + 1] and labels[i, t + 1] >= 0:
                expected[i] -= torch.log_softmax(logits[i, t], 0)[ids[i, t + 1]]
    assert torch.allclose(got, expected, atol=1e-5)
    whole = default_loss(Fixed(logits, wrapped=True), {"input_ids": ids, "attention_mask": mask})
    assert torch.allclose(whole[:2], expected[:2], atol=1e-5) and whole[2] > got[2]


def test_masked_language_models_are_not_shifted() -> None:
    class FixedForMaskedLM(Fixed):
        pass

    logits, labels = torch.randn(2, 4, 7), torch.tensor([[-100, 3, -100, -100], [1, -100, -100, 2]])
    got = default_loss(FixedForMaskedLM(logits, wrapped=True), {"input_ids": labels.clamp_min(0), "labels": labels})
    logp = torch.log_softmax(logits, -1)
    assert torch.allclose(got, torch.stack([-logp[0, 1, 3], -logp[1, 0, 1] - logp[1, 3, 2]]))


def test_matches_the_loss_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=1, n_embd=8, n_head=2, vocab_size=20, n_positions=8, bos_token_id=0, eos_token_id=0
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    ids = torch.randint(0, 20, (1, 7))
    got = default_loss(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids})
    assert torch.allclose(got / 6, model(input_ids=ids, labels=ids).loss, atol=1e-5)


@pytest.mark.parametrize(
    ("logits", "batch", "message"),
    [
        (torch.randn(4, 3), torch.zeros(4), "pass loss=fn"),
        (torch.randn(4, 3), (torch.zeros(4), torch.randn(4)), "integer targets"),
        (torch.randn(4, 3), (torch.zeros(4), torch.zeros(5).long()), r"\(4, 3\) do not fit targets \(5,\)"),
        (torch.randn(4, 5, 5), (torch.zeros(4), torch.zeros(4, 5).long()), "two ways"),
        (torch.randn(4, 3), {"pixels": torch.zeros(4)}, "neither input_ids nor labels"),
    ],
)
def test_unclear_batches_are_refused(logits: torch.Tensor, batch: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        default_loss(Fixed(logits), batch)


@pytest.mark.parametrize("kind", ["bart", "t5"])
@pytest.mark.parametrize("length", [7, 5])
def test_encoder_decoders_are_given_their_labels_moved_on(kind: str, length: int) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if kind == "bart":
        config = transformers.BartConfig(
            vocab_size=40, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=16,
            pad_token_id=1, bos_token_id=0, eos_token_id=2, decoder_start_token_id=2,
        )  # fmt: skip
        model = transformers.BartForConditionalGeneration(config).eval()
    else:
        config = transformers.T5Config(
            vocab_size=40, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0
        )
        model = transformers.T5ForConditionalGeneration(config).eval()
    source, labels = torch.randint(3, 40, (3, 7)), torch.randint(3, 40, (3, length))
    mask = torch.ones_like(source)
    # The source's padding says nothing of the labels.
    mask[1, 4:] = 0
    labels[2, 3:] = -100
    found = default_loss(model, {"input_ids": source, "attention_mask": mask, "labels": labels})
    for i in range(3):
        one = {"input_ids": source[i : i + 1], "attention_mask": mask[i : i + 1], "labels": labels[i : i + 1]}
        expected = model(**one).loss * (labels[i] != -100).sum()
        assert torch.allclose(found[i], expected, rtol=1e-4)
    hidden = torch.ones_like(labels)
    hidden[:, -1] = 0
    given = model.prepare_decoder_input_ids_from_labels(labels=labels)
    batch = {"input_ids": source, "attention_mask": mask, "labels": labels, "decoder_input_ids": given}
    assert torch.allclose(default_loss(model, batch), found, rtol=1e-5)
    fewer = default_loss(model, batch | {"decoder_attention_mask": hidden})
    assert (fewer[:2] < found[:2]).all()
