"""Asking: `lorif search`, `explain`, `info`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from ..index import Index
from ..text.model import question
from ..text.passages import described
from ..text.textindex import open_text_index
from .app import app, reported_errors
from .options import (
    Device,
    Exact,
    IndexFolder,
    Json,
    MovedModel,
    Normalize,
    Prompt,
    Recall,
    SearchDamping,
    SearchLayers,
    TextArgument,
    TextOption,
    asked_texts,
    search_damping,
)
from .shares import Told, show_explanations
from .show import answers_json, console, in_units, index_json, show_answers, show_index, unit_of_scores, write_json


@app.command()
def search(
    index: Annotated[Path, typer.Argument(help="An index that `lorif build` or `lorif demo` made.")],
    text: TextArgument = None,
    texts: TextOption = None,
    prompt: Prompt = None,
    k: Annotated[int, typer.Option("-k", min=1, help="Passages to find.")] = 10,
    opponents: Annotated[
        bool, typer.Option("--opponents", help="Passages that worked against the text, most harmful first.")
    ] = False,
    recall: Recall = 0.99,
    exact: Exact = False,
    damping: SearchDamping = None,
    layers: SearchLayers = None,
    normalize: Normalize = None,
    model: MovedModel = None,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Find the training passages that made the model expect a text."""
    policy, questions = search_damping(damping), asked_texts(text, texts)
    with reported_errors():
        opened, text_model = open_text_index(index, model=model, device=device)
        with opened:
            asked = [question(one, prompt) for one in questions]
            hits = opened.search(
                asked,
                k,
                opponents=opponents,
                recall=recall,
                exact=exact or None,
                damping=policy,
                layers=layers or None,
                normalize=normalize,
                progress=None,
            )
            losses = text_model.losses(asked)
            if json:
                write_json(
                    {
                        "index": str(index),
                        "fingerprint": opened.fingerprint,
                        "prompt": prompt,
                        "opponents": opponents,
                        "normalize": normalize,
                        "answers": answers_json(questions, losses, hits),
                        "stats": asdict(hits.stats),
                    }
                )
                return
            screen, stats = console(), hits.stats
            show_answers(screen, questions, losses, hits)
            spent = sum(v for name, v in stats.seconds.items() if name != "gradients")
            screen.print(
                f"{stats.plan}: {stats.examined:,} of {stats.total:,} passages scored exactly in {spent:.3f} s, recall "
                f"{stats.estimated_recall:.3f} as estimated, {in_units(stats.bytes_read)} read.",
                style="dim",
            )
            if normalize is None:
                screen.print(unit_of_scores(len(opened)), style="dim")
            else:
                screen.print(f"Scores are divided as --normalize {normalize} says, and have no unit.", style="dim")


@app.command()
def explain(
    index: Annotated[Path, typer.Argument(help="An index that `lorif build` or `lorif demo` made.")],
    text: TextArgument = None,
    texts: TextOption = None,
    ids: Annotated[
        list[int] | None,
        typer.Option("--id", min=0, help="A passage, as search shows it; may be repeated. Default: the best ones."),
    ] = None,
    prompt: Prompt = None,
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
    policy, questions = search_damping(damping), asked_texts(text, texts)
    with reported_errors():
        opened, text_model = open_text_index(index, model=model, device=device)
        with opened:
            asked = [question(one, prompt) for one in questions]
            common: dict[str, Any] = {"damping": policy, "layers": layers or None, "progress": None}
            chosen = ids or opened.search(asked, k, opponents=opponents, **common)
            found = []
            for row, words in zip(opened.explain(asked, chosen, **common), text_model.token_texts(asked), strict=True):
                payloads = opened.payloads([e.id for e in row])
                parts = zip(row, payloads, text_model.token_texts(payloads), strict=True)
                found.append([Told(e, *described(payload), tokens, words) for e, payload, tokens in parts])
            if json:
                answers = [
                    {"text": one, "explanations": [told.to_json() for told in row]}
                    for one, row in zip(questions, found, strict=True)
                ]
                facts = {"index": str(index), "fingerprint": opened.fingerprint, "prompt": prompt}
                write_json(facts | {"opponents": opponents and not ids, "answers": answers})
                return
            screen = console()
            show_explanations(screen, questions, found)
            screen.print(unit_of_scores(len(opened)), style="dim")


@app.command()
def info(index: IndexFolder, json: Json = False) -> None:
    """Show what an index holds and how it was built."""
    with reported_errors(), Index.open(index) as opened:
        facts = index_json(opened)
        if json:
            write_json(facts)
        else:
            show_index(console(), facts)
