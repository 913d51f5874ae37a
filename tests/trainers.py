"""Trainers of transformers and TRL, of tiny models and a few sentences, for the tests of what is built of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import MARKED, SENTENCES, decoder_tokenizer, make_model

# Of both: on the CPU, and nothing shown or kept.
QUIET: dict[str, Any] = dict(report_to=[], disable_tqdm=True, save_strategy="no", use_cpu=True)


def trainer(model: Any, folder: Path, callback: Any = None, *, rows: Any = None, **more: Any) -> Any:
    """A `transformers.Trainer` of a language model on the sentences, or on other rows."""
    transformers, datasets = pytest.importorskip("transformers"), pytest.importorskip("datasets")
    tokenizer = decoder_tokenizer()
    tokenizer.pad_token = "<|endoftext|>"
    data = datasets.Dataset.from_dict({"text": SENTENCES}).map(lambda r: tokenizer(r["text"]), remove_columns="text")
    arguments = QUIET | dict(
        output_dir=str(folder / "out"),
        per_device_train_batch_size=2,
        logging_strategy="no",
        dataloader_pin_memory=False,
        seed=3,
    )
    return transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(**arguments | more),
        train_dataset=data if rows is None else rows,
        data_collator=transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False),
        processing_class=tokenizer,
        callbacks=[callback] if callback is not None else [],
    )


def sft(data: Any, folder: Path, callback: Any, **more: Any) -> Any:
    """TRL's trainer for supervised fine-tuning."""
    trl = pytest.importorskip("trl")
    tokenizer = decoder_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token = "<|endoftext|>"
    tokenizer.chat_template = MARKED
    arguments = QUIET | dict(output_dir=str(folder / "out"), per_device_train_batch_size=4, bf16=False, max_length=48)
    return trl.SFTTrainer(
        model=make_model("llama"),
        processing_class=tokenizer,
        train_dataset=data,
        args=trl.SFTConfig(**arguments | more),
        callbacks=[callback],
    )
