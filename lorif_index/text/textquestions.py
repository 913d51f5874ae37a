"""Questions: asked in words, each an answer with what comes before it, from arguments or from a file.

A file may be a task as lm-evaluation-harness has them (https://github.com/EleutherAI/lm-evaluation-harness,
docs/task_guide.md): documents, and templates that make a prompt and an answer of each.
"""

from __future__ import annotations

import os
import unicodedata
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DataError
from .documents import read_rows
from .yamlfile import read_yaml

# After these a word begins anew. (Brackets that open, slashes and the like are often a part of what follows.)
_CLOSING = ".,;:!?)]}\"'\N{RIGHT-POINTING DOUBLE ANGLE QUOTATION MARK}\N{RIGHT DOUBLE QUOTATION MARK}"
_ANSWERS = ("answer", "completion")
_TASK = ("docs", "doc_to_text", "doc_to_target", "doc_to_choice", "description", "target_delimiter", "task")


@dataclass(frozen=True)
class TextQuestion:
    """One question in words.

    Attributes:
        text: what is asked about.
        prompt: what comes before it, and is not itself asked about; or None.
        place: where it is from, or None.
    """

    text: str
    prompt: str | None = None
    place: str | None = None

    @classmethod
    def written(cls, text: str, prompt: str | None = None) -> TextQuestion:
        """One whose parts a person wrote apart: with a blank between them, where words would run together else."""
        if prompt and text and not prompt[-1].isspace() and text[0].isalnum() and _ends_a_word(prompt[-1]):
            wide = unicodedata.east_asian_width(prompt[-1]) in "WF" or unicodedata.east_asian_width(text[0]) in "WF"
            text = text if wide else f" {text}"
        return cls(text, prompt)

    @property
    def row(self) -> dict[str, str]:
        """As a query for `Index.search`."""
        return {"prompt": self.prompt, "completion": self.text} if self.prompt else {"text": self.text}


def _ends_a_word(char: str) -> bool:
    return char.isalnum() or char in _CLOSING


def read_questions(path: str | os.PathLike[str]) -> list[TextQuestion]:
    """The questions of a file.

    A .jsonl file has one a line, a .yaml file a list of them: a text, {"text": ...}, or {"prompt": ..., "answer": ...}
    (or "completion"). A .yaml file may be a task instead: {"docs": a list of documents, or a file or saved dataset of
    them, beside it, "doc_to_text": template of the prompt, "doc_to_target": template of the answer}, templates in
    Jinja, or the name of a field; with "doc_to_choice", a list of answers or the field that has one, the target is the
    number of an answer. The answer follows the prompt after "target_delimiter", a space by default.

    Raises:
        DataError: no question, one that is none, one with a prompt among others without, or a template that cannot be
            filled; the message names the place. ConfigError: not YAML.
    """
    path = Path(path)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise DataError(f"{path} does not exist: pass a .jsonl or .yaml file of questions")
        found = read_yaml(path, f"a file of questions, {path},")
        if isinstance(found, Mapping):
            asked = list(_of_task(found, path))
        elif isinstance(found, list):
            asked = [_plain(row, f"{path.name}: item {number}") for number, row in enumerate(found)]
        else:
            raise DataError(f"{path} holds a {type(found).__name__}: write a list of questions, or a task")
    elif path.suffix == ".jsonl" and not path.is_dir():
        asked = [_plain(row, place) for place, row in read_rows(path)]
    else:
        raise DataError(f"{path} is no file of questions, which end in .jsonl, .yaml or .yml: rename it, or convert it")
    if not asked:
        raise DataError(f"{path} has no question in it")
    with_prompt = [bool(one.prompt) for one in asked]
    if any(with_prompt) and not all(with_prompt):
        lacking = asked[with_prompt.index(False)].place
        raise DataError(f"{path}: {lacking} has no prompt, and others have: put them in a file of their own")
    return asked


def _plain(row: Any, place: str) -> TextQuestion:
    """A question that is written out."""
    fields = {"text": row} if isinstance(row, str) else row
    if not isinstance(fields, Mapping):
        raise DataError(f"{place} is no question, but of type {type(row).__name__}: write a text, or prompt and answer")
    answers = [name for name in ("text", *_ANSWERS) if name in fields]
    if len(answers) != 1:
        raise DataError(
            f"{place} has the fields {sorted(map(str, fields))}: a question has one of text, answer and completion, "
            "and perhaps a prompt"
        )
    text, prompt = fields[answers[0]], fields.get("prompt")
    if not isinstance(text, str) or not isinstance(prompt, str | None) or not text:
        raise DataError(f"{place}: {answers[0]} and prompt are texts, and the first is not empty")
    return TextQuestion(text, prompt or None, place)


def _of_task(task: Mapping[str, Any], path: Path) -> Iterator[TextQuestion]:
    """The questions of a task's documents."""
    lacking = [name for name in ("docs", "doc_to_text", "doc_to_target") if name not in task]
    if lacking:
        raise DataError(f"{path}: a task has docs, doc_to_text and doc_to_target, and {lacking} are not there")
    if unread := sorted(str(name) for name in task if name not in _TASK):
        warnings.warn(f"{path}: {unread} of the task are not read", stacklevel=3)
    delimiter, before = task.get("target_delimiter", " "), task.get("description", "")
    if not isinstance(delimiter, str) or not isinstance(before, str):
        raise DataError(f"{path}: target_delimiter and description are texts")
    docs = task["docs"]
    if isinstance(docs, list):
        rows: Iterator[tuple[str, Any]] = ((f"{path.name}: document {i}", doc) for i, doc in enumerate(docs))
    elif isinstance(docs, str):
        rows = read_rows(path.parent / docs)
    else:
        raise DataError(f"{path}: docs is a list of documents, or the name of a file of them")
    for place, doc in rows:
        if not isinstance(doc, Mapping):
            raise DataError(f"{place} is no document, a mapping of fields, but of type {type(doc).__name__}")
        target = _filled(task["doc_to_target"], doc, f"{place}: doc_to_target")
        if "doc_to_choice" in task:
            target = _chosen(task["doc_to_choice"], target, doc, place)
        what = f"{place}: doc_to_text"
        prompt = before + _words(_filled(task["doc_to_text"], doc, what), what)
        answer = _words(target, f"{place}: doc_to_target")
        if not answer:
            raise DataError(f"{place}: doc_to_target gives an empty answer")
        # Without a prompt nothing is to be set apart.
        yield TextQuestion(delimiter + answer, prompt, place) if prompt else TextQuestion(answer, None, place)


def _filled(template: Any, doc: Mapping[str, Any], what: str) -> Any:
    """A document's field of that name, or a template of it."""
    if isinstance(template, int):
        return template
    if not isinstance(template, str):
        raise DataError(f"{what} is of type {type(template).__name__}: write a template, or the name of a field")
    if template in doc:
        return doc[template]
    try:
        from jinja2 import StrictUndefined
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        raise DataError(f"{what} needs jinja2: install the extra text of lorif-index") from None
    try:
        written = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
        return written.from_string(template).render({str(name): value for name, value in doc.items()})
    except Exception as error:  # whatever a template makes of a document
        raise DataError(f"{what}: {error}; the document has the fields {sorted(map(str, doc))}") from None


def _words(value: Any, what: str) -> str:
    """A text, or a number as a text.

    Raises:
        DataError: anything else, which would read as Python's own spelling.
    """
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise DataError(f"{what} gives {value!r}, where a text or a number is wanted (a word such as no in quotes)")
    return str(value)


def _chosen(choices: Any, target: Any, doc: Mapping[str, Any], place: str) -> str:
    """The answer of a number."""
    answers = doc.get(choices) if isinstance(choices, str) else choices
    if not isinstance(answers, list):
        raise DataError(f"{place}: doc_to_choice is a list of answers, or the name of a field that has one")
    if isinstance(target, str) and target.strip().isdecimal():
        target = int(target)
    if type(target) is not int:
        raise DataError(f"{place}: doc_to_target gives {target!r}, where the number of a choice is wanted")
    number = target
    if not 0 <= number < len(answers):
        raise DataError(f"{place}: doc_to_target gives {number}, and there are {len(answers)} choices, from 0 on")
    return _words(answers[number], f"{place}: doc_to_choice")
