from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from lorif_index import Index
from lorif_index.cli import app
from lorif_index.errors import IndexExistsError, QueryError
from lorif_index.text import TextModel
from lorif_index.text.demo import QUESTION, run_demo
from lorif_index.text.demo_model import DemoSettings, documentation, new_model, split, train, train_tokenizer

ROOT = Path(__file__).parents[2]
SMALL = DemoSettings(
    seconds=400,
    held_out=100,
    vocabulary=512,
    context=96,
    width=32,
    depth=1,
    heads=2,
    projection_dim=8,
    k=5,
)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A demo of smoke size, and where it is; torch is left as it was."""
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    out = tmp_path_factory.mktemp("demo") / "here"
    with pytest.MonkeyPatch.context() as patch:
        # As many steps on a slow machine.
        patch.setattr("lorif_index.text.demo_model._STEPS_PER_SECOND", 0.11)
        made = run_demo(out, [QUESTION, "Lambdas are functions."], SMALL, progress=False)
    assert torch.get_num_threads() == threads and torch.equal(torch.get_rng_state(), state)
    return out, made


def test_every_paragraph_is_kept_once():
    documents = documentation(SMALL.characters)
    paragraphs = Counter(" ".join(p.split()) for d in documents for p in d.text.split("\n\n"))
    assert max(paragraphs.values()) == 1
    assert {"with", "lambda", "try"} <= {d.source for d in documents}
    assert len(documents) > 500


def test_held_out_passages_are_apart_and_have_relatives():
    documents = documentation(SMALL.characters)
    training, held = split(documents, 20, seed=3)
    assert len(held) == 20 and len(training) + len(held) == len(documents)
    assert not {d.text for d in held} & {d.text for d in training}
    assert {d.source for d in held} <= {d.source for d in training}
    assert split(documents, 20, seed=3) == (training, held)
    assert split(documents, 20, seed=4)[1] != held


def test_the_question_is_no_sentence_of_the_text():
    assert not any(QUESTION in " ".join(d.text.split()) for d in documentation(SMALL.characters))


def test_training_is_the_same_again_and_learns(monkeypatch):
    monkeypatch.setattr("lorif_index.text.demo_model._STEPS_PER_SECOND", 0.5)
    settings = replace(SMALL, seconds=60.0)
    documents, held = split(documentation(settings.characters), settings.held_out, settings.seed)
    tokenizer = train_tokenizer(documents, settings.vocabulary)
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        made = TextModel(Path("never"), new_model(settings, len(tokenizer)), tokenizer)
        known, kept = (made.passages(part, progress=False) for part in (documents[:200], held))
        results.append(train(made, known, kept, settings, progress=False))
    first, second = results
    assert first.steps == first.planned == settings.steps == 30
    assert (first.loss, first.loss_held_out) == (second.loss, second.loss_held_out)
    assert first.loss < 6.2  # of ln 512 = 6.24 for guessing, after a few steps


def test_training_stops_at_its_time_limit(monkeypatch):
    documents = documentation(SMALL.characters)[:50]
    tokenizer = train_tokenizer(documents, SMALL.vocabulary)
    made = TextModel(Path("never"), new_model(SMALL, len(tokenizer)), tokenizer)
    passages = made.passages(documents, progress=False)
    clock = iter(range(0, 10_000, 2))
    monkeypatch.setattr("lorif_index.text.demo_model.time.perf_counter", lambda: float(next(clock)))
    training = train(made, passages, passages, replace(SMALL, seconds=4.0), progress=False)
    assert 0 < training.steps < training.planned


def test_the_demo_leaves_a_model_and_an_index(small):
    out, result = small
    assert {p.name for p in out.iterdir()} == {"model", "index"}
    with Index.open(out / "index") as index:
        index.verify()
        assert len(index) == result.passages
        assert index.bytes_per_example == result.bytes_per_example
    assert not list(out.rglob("*.bin")) and list((out / "model").glob("*.safetensors"))


def test_the_demos_index_is_asked_by_the_command_line(small):
    out, result = small
    done = CliRunner().invoke(app, ["search", str(out / "index"), QUESTION, "-k", "5", "--json"])
    assert done.exit_code == 0, done.stderr
    hits = json.loads(done.stdout)["answers"][0]["hits"]
    assert [hit["id"] for hit in hits] == result.hits.ids[0].tolist()
    assert [hit["score"] for hit in hits] == pytest.approx(result.hits.scores[0].tolist(), rel=1e-4)
    assert [hit["source"] for hit in hits] == [payload["source"] for payload in result.hits.payloads[0]]


def test_held_out_passages_find_their_topic_better_than_chance(small):
    _, result = small
    # By chance 4.7 of 100, with a standard deviation of about 2.
    assert result.check["asked"] == 100
    assert result.check["best"] >= 2 * max(result.check["expected"], 1)


def test_the_demo_is_shown(small, monkeypatch):
    _, result = small
    monkeypatch.setattr("lorif_index.cli.making.run_demo", lambda *arguments: result)
    shown = CliRunner().invoke(app, ["demo"]).stdout
    assert "Which training passages" in shown and "Lambdas are functions." in shown
    assert "steps" in shown and "check" in shown
    assert f"loss held out  {result.training.loss_held_out:.4g}" in shown  # in nats: "held" alone would mean bytes
    for payload in result.hits.payloads[0]:
        assert payload["source"].split(",")[0] in shown
    facts = json.loads(CliRunner().invoke(app, ["demo", "--json"]).stdout)
    assert len(facts["answers"][0]["hits"]) == 5 and facts["check"] == result.check


def test_the_demo_does_not_write_over_anything(tmp_path):
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(IndexExistsError, match="not empty"):
        run_demo(tmp_path, [QUESTION], SMALL, progress=False)
    done = CliRunner().invoke(app, ["demo", "--out", str(tmp_path)])
    assert done.exit_code == 1 and done.stdout == "" and done.stderr.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_bad_questions_are_refused_before_the_training(tmp_path):
    for question, message in (("", "no token that has a loss"), ("word " * 500, "more than 192 tokens")):
        with pytest.raises(QueryError, match=message):
            run_demo(tmp_path / "demo", [question], DemoSettings(), progress=False)
    assert not (tmp_path / "demo").exists()


@pytest.mark.slow
def test_the_whole_demo(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "lorif_index", "demo", "--out", str(tmp_path / "demo"), "--json"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=6000,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    check, training = found["check"], found["training"]
    assert training["loss"] < training["loss_held_out"] < 6
    assert check["best"] >= 0.4 * check["asked"] and check["expected"] <= 0.1 * check["asked"]
    topics = [hit["source"].split(",")[0] for hit in found["answers"][0]["hits"]]
    assert set(topics[:3]) & {"with", "context-managers"}
