"""docs/transformers.md is true: its examples run, with small models, and take as many lines as it says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import CHAT, SENTENCES, decoder_tokenizer, make_model

PAGE = (Path(__file__).parents[2] / "docs" / "transformers.md").read_text()
EXAMPLES = dict(re.findall(r"<!-- example: (.*?) -->\n```python\n(.*?)```", PAGE, re.DOTALL))

transformers = pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")
pytest.importorskip("peft")
pytest.importorskip("accelerate")


def test_the_examples_run(tmp_path: Path) -> None:
    tokenizer = decoder_tokenizer()
    tokenizer.pad_token, tokenizer.chat_template = "<|endoftext|>", CHAT
    make_model("gpt2").save_pretrained(tmp_path / "my-model")
    tokenizer.save_pretrained(tmp_path / "my-model")
    make_model("gpt2").save_pretrained(tmp_path / "my-reference")
    pairs = {
        "prompt": [" ".join(s.split()[:2]) for s in SENTENCES],
        "chosen": [" " + s.split()[2] for s in SENTENCES],
        "rejected": [" " + s.split()[-1] for s in SENTENCES],
    }
    datasets.Dataset.from_dict(pairs).save_to_disk(tmp_path / "my-pairs")
    texts = datasets.Dataset.from_dict({"text": SENTENCES})
    texts.save_to_disk(tmp_path / "my-texts")
    tokens = texts.map(lambda r: tokenizer(r["text"]) | {"labels": tokenizer(r["text"])["input_ids"]})
    tokens.remove_columns("text").save_to_disk(tmp_path / "my-tokens")
    small = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24)
    config = transformers.ViTConfig(**small, image_size=8, patch_size=4, num_labels=3)
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "my-classifier")
    # One process for all: most of the time goes by in importing.
    code = "\n".join(EXAMPLES.values())
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert SENTENCES[3] in done.stdout and "lora_A.default" in done.stdout, done.stdout


def test_as_many_lines_as_it_says() -> None:
    assert len(EXAMPLES) == 4
    for name, code in EXAMPLES.items():
        about = [
            line for line in code.splitlines() if re.search(r"lorif_index|\bIndex\.|\bindex\.|IndexCallback", line)
        ]
        said = re.search(rf"^\| {name} \| (\d+) \|$", PAGE, re.MULTILINE)
        assert said and int(said[1]) == len(about), (name, about)


def run_guide(name: str, folder: Path, *launcher: str) -> str:
    """What an example of the guide on training loops prints."""
    page = (Path(__file__).parents[2] / "docs" / "guides" / "training-loop.md").read_text()
    (folder / "example.py").write_text(
        dict(re.findall(r"<!-- example: (.*?) -->\n```python\n(.*?)```", page, re.DOTALL))[name]
    )
    done = subprocess.run(
        [*(launcher or (sys.executable,)), "example.py"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_trainer_of_trl_builds_at_its_end(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    tokenizer = decoder_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token = "<|endoftext|>"
    make_model("llama").save_pretrained(tmp_path / "my-model")
    tokenizer.save_pretrained(tmp_path / "my-model")
    rows = [{"prompt": s[:14], "completion": s[14:]} for s in SENTENCES]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "my-prompts")
    printed = run_guide("sft", tmp_path).splitlines()[-1]
    assert printed.startswith("4 [{") and SENTENCES[3][14:] in printed


def test_a_loop_gathers_in_its_last_epoch(tmp_path: Path) -> None:
    printed = run_guide("gather", tmp_path)
    assert printed.splitlines()[-1].startswith("12000 12000 [[")


@pytest.mark.parametrize("processes", [1, 2])
def test_a_loop_with_accelerate_builds_at_its_end(processes: int, tmp_path: Path) -> None:
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    printed = run_guide("accelerate", tmp_path, *(launcher if processes == 2 else ()))
    assert printed.splitlines()[-1].startswith("400 [[")
