"""Asking: `lorif search`, `explain`, `info`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from ..index import Index
from ..text.show import (
    answer_json,
    console,
    in_units,
    index_json,
    show_answer,
    show_index,
    show_question,
    unit_of_scores,
    write_json,
)
from ..text.textindex import Answer, TextIndex
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
from .shares import show_explanations


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
    policy, asked_about = search_damping(damping), asked_texts(text, texts)
    with reported_errors():
        asked = TextIndex.open(index, model=model, device=device)
        with asked.index:
            answers = asked.ask(
                asked_about,
                k,
                prompt=prompt,
                opponents=opponents,
                recall=recall,
                exact=exact or None,
                damping=policy,
                layers=layers or None,
                normalize=normalize,
                progress=None,
            )
            if json:
                write_json(
                    {
                        "index": str(index),
                        "fingerprint": asked.index.fingerprint,
                        "prompt": prompt,
                        "opponents": opponents,
                        "normalize": normalize,
                        "answers": [answer_json(answer) for answer in answers],
                        "stats": asdict(answers[0].stats),
                    }
                )
                return
            screen = console()
            for answer in answers:
                show_question(screen, answer)
                show_answer(screen, answer)
            stats = answers[0].stats
            spent = sum(v for name, v in stats.seconds.items() if name != "gradients")
            screen.print(
                f"{stats.plan}: {stats.examined:,} of {stats.total:,} passages scored exactly in {spent:.3f} s, recall "
                f"{stats.estimated_recall:.3f} as estimated, {in_units(stats.bytes_read)} read.",
                style="dim",
            )
            if normalize is None:
                screen.print(unit_of_scores(len(asked.index)), style="dim")
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
    policy, asked_about = search_damping(damping), asked_texts(text, texts)
    with reported_errors():
        asked = TextIndex.open(index, model=model, device=device)
        with asked.index:
            chosen: list[Answer] | list[list[int]] = [ids for _ in asked_about] if ids else []
            if not ids:
                chosen = asked.ask(
                    asked_about,
                    k,
                    prompt=prompt,
                    opponents=opponents,
                    damping=policy,
                    layers=layers or None,
                    progress=None,
                )
            found = asked.explain(
                asked_about, chosen, prompt=prompt, damping=policy, layers=layers or None, progress=None
            )
            if json:
                answers = [
                    {"text": one, "explanations": [e.to_json() for e in row]}
                    for one, row in zip(asked_about, found, strict=True)
                ]
                facts = {"index": str(index), "fingerprint": asked.index.fingerprint, "prompt": prompt}
                write_json(facts | {"opponents": opponents and not ids, "answers": answers})
                return
            screen = console()
            show_explanations(screen, asked_about, found)
            screen.print(unit_of_scores(len(asked.index)), style="dim")


@app.command()
def info(index: IndexFolder, json: Json = False) -> None:
    """Show what an index holds and how it was built."""
    with reported_errors(), Index.open(index) as opened:
        facts = index_json(opened)
        if json:
            write_json(facts)
        else:
            show_index(console(), facts)
