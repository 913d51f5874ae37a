"""Options that several commands take, and what is written in them as values."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..damping import Damping, as_damping, damping_from_json
from ..text.textquestions import TextQuestion, read_questions

IndexFolder = Annotated[Path, typer.Argument(help="An index.")]
ModelFolder = Annotated[Path, typer.Option(help="A causal language model's folder, as save_pretrained writes it.")]
MovedModel = Annotated[Path | None, typer.Option(help="The model's folder, if it was moved since the build.")]
Texts = Annotated[
    Path,
    typer.Option(
        help="The training texts: .jsonl (each line is one text), .txt (one running text), a folder of them, or a "
        "saved dataset (each row is one text). Texts of more than --max-length tokens are cut into passages, which are "
        "then the examples."
    ),
]
TextArguments = Annotated[
    list[str] | None, typer.Argument(metavar="TEXT...", help="What to explain: one or more texts.", show_default=False)
]
QuestionFile = Annotated[
    Path | None,
    typer.Option(
        "--questions",
        metavar="FILE",
        help="A .jsonl or .yaml file of texts, or of prompts and answers, in place of TEXT.",
    ),
]
TextField = Annotated[str, typer.Option(help="The field that holds the text (.jsonl, dataset).")]
SourceField = Annotated[
    str | None,
    typer.Option(
        help="The field that says where a text is from; default: source, where there is one, else file and line."
    ),
]
MaxLength = Annotated[
    int | None, typer.Option(min=2, help="Tokens in a passage; default: the model's context, at most 1024.")
]
Prompt = Annotated[
    str | None,
    typer.Option(
        help="Text that comes before, and is not itself to be explained. A blank is put between the two where neither "
        "has one and words would run together; --questions takes both as they are."
    ),
]


def asked_about(texts: list[str] | None, prompt: str | None, file: Path | None) -> list[TextQuestion]:
    """The questions of a command.

    Raises:
        BadParameter: none, or some of both kinds. Else as `read_questions`.
    """
    if file is None and texts:
        return [TextQuestion.written(text, prompt) for text in texts]
    if file is None:
        raise typer.BadParameter("no question: write a TEXT, or pass a file of them by --questions")
    if texts or prompt is not None:
        raise typer.BadParameter("--questions takes the place of TEXT and --prompt: pass one of them")
    return read_questions(file)


Recall = Annotated[float, typer.Option(help="Share of the best passages to be found, above 0; 1 scans every passage.")]
SearchDamping = Annotated[
    str | None,
    typer.Option(help="A multiple of trace/D, or RULE:X with RULE absolute, relative or paper."),
]
SearchLayers = Annotated[
    list[str] | None, typer.Option(help="Sum over these layers only: a name or glob pattern; may be repeated.")
]
Normalize = Annotated[
    str | None,
    typer.Option(help="Divide scores by the root of passages' self-influence (relatif), and of the text's (cosine)."),
]
Rerank = Annotated[
    int | None,
    typer.Option(
        min=1, help="Compute so many of the best again with the model, at least -k, and order them by those scores."
    ),
]
RefineQuestion = Annotated[
    bool,
    typer.Option(
        "--refine", help="Refine the question with the model, on the exact curvature of some passages: takes minutes."
    ),
]
Lexical = Annotated[
    bool,
    typer.Option("--lexical", help="Also say where each passage stands by its words alone (BM25); - shares no word."),
]
Device = Annotated[str, typer.Option(help="Where the model runs: cpu, cuda, ...; auto takes a GPU if there is one.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout instead of tables.")]

_UNITS = {"": 1, "B": 1} | {
    f"{prefix}{infix}B": base**power
    for power, prefix in enumerate("KMGT", start=1)
    for infix, base in (("", 1000), ("I", 1024))
}


def byte_count(given: str) -> int:
    """Bytes of "20GB", "512 MB", "64MiB" or a plain number; GB and its like are decimal, as disks are sold.

    Raises:
        ValueError: anything else, or less than a byte.
    """
    number = given.strip().rstrip("bBiIkKmMgGtT")
    unit = given.strip()[len(number) :].upper()
    try:
        size = int(float(number) * _UNITS[unit])
    except (ValueError, KeyError, OverflowError):
        size = 0
    if size < 1:
        raise ValueError(f"takes bytes, as 20GB or 500MB, got {given!r}")
    return size


def damping_policy(given: str) -> Damping:
    """A damping of "X", a multiple of trace/D, "RULE:X", or "auto".

    Raises:
        ValueError: an unknown rule, or no number above 0.
    """
    if given == "auto":
        return as_damping(given)
    rule, _, number = given.rpartition(":")
    try:
        value = float(number)
        return damping_from_json({"rule": rule or "relative", "lam" if rule == "absolute" else "multiple": value})
    except ValueError as error:
        raise ValueError(f"takes auto, X or RULE:X, with X above 0, got {given!r} ({error})") from None


def search_damping(given: str | None) -> Damping | None:
    """What `--damping` of a search says.

    Raises:
        typer.BadParameter: it says nothing that is a damping.
    """
    try:
        return None if given is None else damping_policy(given)
    except ValueError as error:
        raise typer.BadParameter(f"--damping {error}") from None
