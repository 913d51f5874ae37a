"""Questions from files: texts, prompts and answers, and tasks of lm-evaluation-harness."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lorif_index.errors import ConfigError, DataError, LorifError
from lorif_index.text import TextQuestion, read_questions

pytest.importorskip("yaml")
pytest.importorskip("jinja2")


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("prompt", "text", "asked"),
    [
        ("Return the", "event", " event"),
        ("What came before.", "What follows.", " What follows."),
        ("Return the ", "event", "event"),
        ("Return the", " event", " event"),
        ("print(", "name", "name"),
        ("Say", "!", "!"),
        ("\u65e5\u672c", "\u8a9e", "\u8a9e"),
        (None, "event", "event"),
        ("", "event", "event"),
    ],
)
def test_words_that_are_written_apart_do_not_run_together(prompt: str | None, text: str, asked: str) -> None:
    assert TextQuestion.written(text, prompt) == TextQuestion(asked, prompt)


def test_a_line_is_a_question(tmp_path: Path) -> None:
    rows = [{"prompt": "Who?", "answer": " Ada"}, {"prompt": "Where?", "completion": " Köln"}]
    file = written(tmp_path / "q.jsonl", "\n".join(json.dumps(row) for row in rows))
    assert read_questions(file) == [
        TextQuestion(" Ada", "Who?", "q.jsonl:1"),
        TextQuestion(" Köln", "Where?", "q.jsonl:2"),
    ]
    texts = read_questions(written(tmp_path / "t.yaml", "- One text.\n- text: Another.\n"))
    assert [(q.text, q.prompt) for q in texts] == [("One text.", None), ("Another.", None)]
    assert texts[0].row == {"text": "One text."}


TASK = """
task: capitals
docs: {docs}
doc_to_text: "Question: What is the capital of {{{{ land }}}}?\\nAnswer:"
doc_to_target: {target}
"""


def test_a_task_makes_questions_of_documents(tmp_path: Path) -> None:
    written(tmp_path / "lands.jsonl", '{"land": "France", "city": "Paris"}\n{"land": "Italy", "city": "Rome"}\n')
    task = written(tmp_path / "task.yaml", TASK.format(docs="lands.jsonl", target="city"))
    first, second = read_questions(task)
    assert first == TextQuestion(" Paris", "Question: What is the capital of France?\nAnswer:", "lands.jsonl:1")
    assert second.row == {"prompt": "Question: What is the capital of Italy?\nAnswer:", "completion": " Rome"}
    here = "[{land: France, cities: [Rome, Paris], right: 1}]"
    chosen = TASK.format(docs=here, target="right") + "doc_to_choice: cities\ndescription: 'Say it.\n\n  '\n"
    (one,) = read_questions(written(tmp_path / "choice.yaml", chosen))
    assert one.text == " Paris" and one.prompt is not None and one.prompt.startswith("Say it.\nQuestion: ")
    upper = TASK.format(docs="lands.jsonl", target="'{{ city|upper }}'") + "target_delimiter: ''\nmetric_list: []\n"
    with pytest.warns(UserWarning, match=r"\['metric_list'\] of the task are not read"):
        assert [q.text for q in read_questions(written(tmp_path / "upper.yaml", upper))] == ["PARIS", "ROME"]


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.jsonl", "", "has no question in it"),
        ("a.jsonl", '{"question": "x"}', r"a.jsonl:1 has the fields \['question'\]: a question has one of"),
        ("a.jsonl", '{"text": "x", "answer": "y"}', "has one of text, answer and completion"),
        ("a.jsonl", '{"text": 3}', "text and prompt are texts"),
        ("a.jsonl", "[1]", "a.jsonl:1 is no question, but of type list"),
        ("a.jsonl", '{"prompt": "a", "answer": "b"}\n{"text": "c"}', "a.jsonl:2 has no prompt, and others have"),
        ("a.txt", "x", "is no file of questions"),
        ("a.yaml", "3", "holds a int"),
        ("a.yaml", "docs: []\ndoc_to_text: x", r"\['doc_to_target'\] are not there"),
        ("a.yaml", "docs: 3\ndoc_to_text: x\ndoc_to_target: y", "docs is a list of documents"),
        (
            "a.yaml",
            "docs: [{a: b}]\ndoc_to_text: '{{ c }}'\ndoc_to_target: a",
            r"document 0: doc_to_text: 'c' is undef",
        ),
        ("a.yaml", "docs: [{a: b}]\ndoc_to_text: '{{ a'\ndoc_to_target: a", "doc_to_text: "),
        ("a.yaml", "docs: [{a: 2}]\ndoc_to_text: q\ndoc_to_target: a\ndoc_to_choice: [x, y]", "there are 2 choices"),
        ("a.yaml", "docs: [{a: 1}]\ndoc_to_text: '{{ a / 0 }}'\ndoc_to_target: a", "division by zero"),
        ("a.yaml", "docs: [{a: null}]\ndoc_to_text: q\ndoc_to_target: a", "gives None, where a text or a number"),
        ("a.yaml", "docs: [{a: [x]}]\ndoc_to_text: a\ndoc_to_target: q", "where a text or a number is wanted"),
        ("a.yaml", "docs: [{a: 0}]\ndoc_to_text: q\ndoc_to_target: a\ndoc_to_choice: [no, yes]", "gives False"),
        ("a.yaml", "docs: [{a: 1.9}]\ndoc_to_text: q\ndoc_to_target: a\ndoc_to_choice: [x, y]", "number of a choice"),
        ("a.yaml", "docs: [{a: ''}]\ndoc_to_text: q\ndoc_to_target: a", "gives an empty answer"),
        ("a.yaml", "docs: nowhere.jsonl\ndoc_to_text: q\ndoc_to_target: a", "nowhere.jsonl does not exist"),
        ("a.yaml", "docs: [{a: b}]\ndocs: []\n", "docs is there twice"),
    ],
)
def test_what_is_no_question_is_named(tmp_path: Path, name: str, text: str, says: str) -> None:
    with pytest.raises((DataError, ConfigError), match=says):
        read_questions(written(tmp_path / name, text))


def test_templates_cannot_reach_beyond_the_document(tmp_path: Path) -> None:
    text = 'docs: [{a: b}]\ndoc_to_text: "{{ a.__class__.__mro__[1].__subclasses__() }}"\ndoc_to_target: a'
    with pytest.raises(DataError, match="doc_to_text"):
        read_questions(written(tmp_path / "a.yaml", text))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.yaml"):
        with pytest.raises(LorifError, match="does not exist"):
            read_questions(tmp_path / name)


def test_questions_of_a_file_are_those_of_the_index(tmp_path: Path) -> None:
    """The same scores as of the rows that they stand for."""
    pytest.importorskip("transformers")
    from conftest import SENTENCES, tiny_model_folder

    from lorif_index import Index
    from lorif_index.text import load_text_model

    made = load_text_model(tiny_model_folder(tmp_path / "model"))
    arguments: dict[str, Any] = {"model": made.model, "tokenizer": made.tokenizer}
    index = Index.build(tmp_path / "i", data=list(SENTENCES), **arguments, progress=False)
    file = written(tmp_path / "q.jsonl", '{"prompt": "The dog", "answer": " looked at the moon."}\n')
    asked = [q.row for q in read_questions(file)]
    rows = [{"prompt": "The dog", "completion": " looked at the moon."}]
    assert np.array_equal(index.scores(asked), index.scores(rows))
