"""Asking: `lorif search`, `explain`, `info`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from ..index import Index
from ..text.passages import described
from ..text.textindex import open_text_index
from .app import app, reported_errors
from .options import (
    Device,
    IndexFolder,
    Json,
    Lexical,
    MovedModel,
    Normalize,
    Prompt,
    QuestionFile,
    Recall,
    RefineQuestion,
    Rerank,
    SearchDamping,
    SearchLayers,
    TextArguments,
    asked_about,
    search_damping,
)
from .shares import show_explanations
from .show import answers_json, console, question_json, show_answers, unit_of_scores, write_index, write_json


@app.command()
def search(
    index: Annotated[Path, typer.Argument(help="An index that `lorif build` or `lorif demo` made.")],
    texts: TextArguments = None,
    prompt: Prompt = None,
    questions: QuestionFile = None,
    k: Annotated[int, typer.Option("-k", min=1, help="Passages to find.")] = 10,
    opponents: Annotated[
        bool, typer.Option("--opponents", help="Passages that worked against the text, most harmful first.")
    ] = False,
    recall: Recall = 0.99,
    damping: SearchDamping = None,
    layers: SearchLayers = None,
    normalize: Normalize = None,
    rerank: Rerank = None,
    refine: RefineQuestion = False,
    lexical: Lexical = False,
    model: MovedModel = None,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Find the training passages that made the model expect a text."""
    policy = search_damping(damping)
    with reported_errors():
        wanted = asked_about(texts, prompt, questions)
        opened, text_model = open_text_index(index, model=model, device=device)
        with opened:
            asked = [one.row for one in wanted]
            hits = opened.search(
                asked,
                k,
                opponents=opponents,
                recall=recall,
                damping=policy,
                layers=layers or None,
                normalize=normalize,
                rerank=rerank,
                refine=refine,
                lexical=lexical,
                progress=None,
            )
            answers, stats = answers_json(wanted, text_model.losses(asked), hits), hits.stats
            if json:
                facts: dict[str, Any] = {"index": str(index), "fingerprint": opened.fingerprint}
                facts |= {"opponents": opponents, "normalize": normalize}
                write_json(facts | {"answers": answers, "stats": asdict(stats)})
                return
            screen = console()
            show_answers(screen, answers)
            spent = sum(v for name, v in stats.seconds.items() if name != "gradients")
            screen.print(
                f"{stats.plan}: {stats.examined:,} of {stats.total:,} passages scored exactly in {spent:.3f} s, recall "
                f"{stats.estimated_recall:.3f} as estimated.",
                style="dim",
            )
            unit = f"Scores are divided as --normalize {normalize} says, and have no unit."
            screen.print(unit_of_scores(len(opened)) if normalize is None else unit, style="dim")


@app.command()
def explain(
    index: Annotated[Path, typer.Argument(help="An index that `lorif build` or `lorif demo` made.")],
    texts: TextArguments = None,
    ids: Annotated[
        list[int] | None,
        typer.Option("--id", min=0, help="A passage, as search shows it; may be repeated. Default: the best ones."),
    ] = None,
    prompt: Prompt = None,
    questions: QuestionFile = None,
    k: Annotated[int, typer.Option("-k", min=1, help="Passages to find, where no --id names them.")] = 3,
    opponents: Annotated[
        bool, typer.Option("--opponents", help="Find those that worked against the text, most harmful first.")
    ] = False,
    damping: SearchDamping = None,
    layers: SearchLayers = None,
    model: MovedModel = None,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Take the scores of passages apart: which of their tokens, and of the text's, and which layers they come from."""
    policy = search_damping(damping)
    with reported_errors():
        wanted = asked_about(texts, prompt, questions)
        opened, text_model = open_text_index(index, model=model, device=device)
        with opened:
            asked = [one.row for one in wanted]
            common: dict[str, Any] = {"damping": policy, "layers": layers or None, "progress": None}
            chosen = ids or opened.search(asked, k, opponents=opponents, **common)
            found, words = opened.explain(asked, chosen, **common), text_model.token_texts(asked)
            answers = []
            for one, row, query_texts in zip(wanted, found, words, strict=True):
                payloads, told = opened.payloads([e.id for e in row]), []
                for e, payload, tokens in zip(row, payloads, text_model.token_texts(payloads), strict=True):
                    passage, source = described(payload)
                    more = {"source": source, "text": passage, "texts": tokens, "query_texts": query_texts}
                    told.append(e.to_json() | more)
                answers.append(question_json(one) | {"explanations": told})
            if json:
                facts = {"index": str(index), "fingerprint": opened.fingerprint}
                write_json(facts | {"opponents": opponents and not ids, "answers": answers})
                return
            screen = console()
            show_explanations(screen, answers)
            screen.print(unit_of_scores(len(opened)), style="dim")


@app.command()
def info(
    index: IndexFolder,
    every: Annotated[
        bool, typer.Option("--all", help="Settings, layers and the whole report of the build, too.")
    ] = False,
    json: Json = False,
) -> None:
    """Show what an index holds and how it was built."""
    with reported_errors(), Index.open(index) as opened:
        write_index(opened, json, every)
