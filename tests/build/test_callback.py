"""The trainer's callback: an index at the end, at checkpoints; training goes on as if there had been none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SENTENCES, decoder_tokenizer, encoder_tokenizer, make_model
from trainers import sft, trainer

from lorif_index import BuildConfig, Index
from lorif_index.errors import ConfigError, DataError, IndexExistsError
from lorif_index.text import IndexCallback

transformers = pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")
pytest.importorskip("accelerate")

CONFIG = BuildConfig(batch_size=4, coarse=None)


STEPS: dict[str, Any] = dict(max_steps=4, learning_rate=1e-2)


def test_at_the_end(tmp_path: Path) -> None:
    callback = IndexCallback(tmp_path / "idx", config=CONFIG, payloads=SENTENCES, metadata={"run": "a"})
    assert isinstance(callback, transformers.TrainerCallback)
    work = trainer(make_model("gpt2"), tmp_path, callback, **STEPS)
    work.train()
    assert callback.built == [tmp_path / "idx"]
    index = Index.open(tmp_path / "idx", model=work.model, tokenizer=work.processing_class)
    assert index.metadata["step"] == 4 and index.metadata["run"] == "a" and len(index) == 10
    hits = index.search(SENTENCES[3], k=1, normalize="cosine")
    assert hits.ids[0, 0] == 3 and hits.payloads[0][0] == SENTENCES[3]
    # What Index.build makes of the trained model.
    by_hand = Index.build(
        tmp_path / "hand", model=work.model, data=SENTENCES, tokenizer=work.processing_class, config=CONFIG
    )
    assert np.allclose(by_hand.scores(SENTENCES[3]), index.scores(SENTENCES[3]), rtol=1e-3, atol=1e-3)
    with pytest.raises(IndexExistsError):
        trainer(make_model("gpt2"), tmp_path, IndexCallback(tmp_path / "idx"), **STEPS).train()


def test_at_checkpoints_and_training_does_not_notice(tmp_path: Path) -> None:
    # With dropout, so that random states matter.
    plain = trainer(make_model("gpt2"), tmp_path / "plain", **STEPS | {"max_steps": 5})
    plain.train()
    modes, seen = [], []

    class Watch(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **given: Any) -> None:
            modes.append(model.training)
            seen.append([p.requires_grad and p.grad is None for p in model.parameters()])

    callback = IndexCallback(tmp_path / "idx", config=CONFIG, when="save")
    saved = dict(save_strategy="steps", save_steps=2, save_only_model=True)
    work = trainer(make_model("gpt2"), tmp_path, callback, **STEPS | {"max_steps": 5} | saved)
    work.add_callback(Watch())
    work.train()
    assert callback.built == [tmp_path / "idx" / f"checkpoint-{step}" for step in (2, 4, 5)]
    assert all(modes) and all(all(flags) for flags in seen)
    for a, b in zip(plain.model.parameters(), work.model.parameters(), strict=True):
        assert torch.equal(a, b)
    prints = {Index.open(folder)._reader.manifest.fingerprint["model"] for folder in callback.built}
    assert len(prints) == 3
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "checkpoint-4")
    index = Index.open(callback.built[1], model=loaded, tokenizer=work.processing_class)
    assert index.search(SENTENCES[3], k=1, normalize="cosine").ids[0, 0] == 3


def test_bf16_training_and_a_classifier(tmp_path: Path) -> None:
    tokenizer, model = encoder_tokenizer(), make_model("bert-classifier")
    rows = datasets.Dataset.from_dict({"text": SENTENCES, "label": [i % 3 for i in range(10)]})
    rows = rows.map(lambda r: tokenizer(r["text"]))
    callback = IndexCallback(tmp_path / "idx", config=CONFIG, tokenizer=tokenizer)
    work = trainer(model, tmp_path, callback, rows=rows, bf16=True, **STEPS)
    work.data_collator = transformers.DataCollatorWithPadding(tokenizer)
    work.train()
    index = Index.open(tmp_path / "idx", model=work.model, tokenizer=tokenizer)
    assert index.search({"text": SENTENCES[4], "label": 1}, k=1, normalize="cosine").ids[0, 0] == 4


def test_what_would_fail_later_fails_first(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="when must be one of"):
        IndexCallback(tmp_path / "idx", when="sometimes")
    work = trainer(make_model("gpt2"), tmp_path, IndexCallback(tmp_path / "idx", data=["and " * 100]), **STEPS)
    with pytest.raises(DataError, match="more than 60 tokens"):
        work.train()
    assert work.state.global_step == 0


# -- trainers of TRL


PROMPTS = [{"prompt": s[:14], "completion": s[14:]} for s in SENTENCES]
CHATS = [
    {"messages": [{"role": "user", "content": s[:14]}, {"role": "assistant", "content": s[14:]}]} for s in SENTENCES
]


@pytest.mark.parametrize(
    ("rows", "more"),
    [
        ([{"text": s} for s in SENTENCES], {}),
        (PROMPTS, {}),
        (CHATS, {"assistant_only_loss": True}),
    ],
    ids=["texts", "completions", "answers"],
)
def test_trl_has_its_own_examples_indexed(rows: Any, more: Any, tmp_path: Path) -> None:
    """The index is that of the trainer's tokens and labels, whatever it made them of."""
    callback = IndexCallback(tmp_path / "idx", config=CONFIG)
    work = sft(datasets.Dataset.from_list(rows), tmp_path, callback, max_steps=2, **more)
    work.train()
    index = Index.open(callback.built[0], model=work.model)
    asked = work.train_dataset[4]
    item = {name: torch.tensor([asked[name]]) for name in ("input_ids", "labels")}
    assert (item["labels"] == -100).any() == ("text" not in rows[0])
    assert index.search(item, 1, normalize="cosine").ids[0, 0] == 4 and len(index) == len(SENTENCES)
    assert [found.tolist() for found in index.find(item)] == [[4]]


def test_what_trl_packs_is_unpacked(tmp_path: Path) -> None:
    """Its rows name the lengths of their documents, which must not see each other."""
    pytest.importorskip("trl")
    from trl.data_utils import pack_dataset

    tokenizer = decoder_tokenizer()
    ids = [tokenizer(s)["input_ids"][:40] for s in SENTENCES]
    packed = pack_dataset(datasets.Dataset.from_dict({"input_ids": ids}), 48, "bfd")
    assert "seq_lengths" in packed.column_names and len(packed) < len(ids)
    model = make_model("llama")
    index = Index.build(tmp_path / "i", model=model, data=packed, tokenizer=tokenizer, config=CONFIG, progress=False)
    alone = Index.build(
        tmp_path / "alone",
        model=model,
        data=[{"input_ids": row} for row in ids],
        tokenizer=tokenizer,
        config=CONFIG,
        fit=index,
        progress=False,
    )
    where = [int(found[0]) for found in index.find([{"input_ids": row} for row in ids])]
    assert sorted(where) == list(range(len(ids)))
    one, other = index.scores(SENTENCES[2]), alone.scores(SENTENCES[2])
    assert np.abs(one[:, where] - other).max() <= 1e-3 * np.abs(other).max()
    broken = packed.map(lambda row: {"seq_lengths": [1]})
    with pytest.raises(DataError, match="seq_lengths sum to 1, of"):
        Index.build(tmp_path / "b", model=model, data=broken, tokenizer=tokenizer, config=CONFIG, progress=False)
