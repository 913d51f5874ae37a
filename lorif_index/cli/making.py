"""Making: `lorif demo`, `build`, `estimate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..index import Index
from ..launch import joined
from ..text.demo import QUESTION, run_demo
from ..text.demo_model import DemoSettings
from ..text.documents import read_documents
from ..text.model import load_text_model
from ..text.textindex import build_text_index, text_facts
from ..text.textquestions import TextQuestion
from .app import app, reported_errors
from .options import Json, MaxLength, ModelFolder, SourceField, TextField, Texts, byte_count
from .settings import Settings, configured
from .show import answers_json, console, excerpt, show, show_answers, unit_of_scores, write, write_index, write_json


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="A new folder for the model and the index.")] = Path("lorif-demo"),
    question: Annotated[
        list[str] | None, typer.Option(help="What to ask about, in place of the demo's own; may be repeated.")
    ] = None,
    seconds: Annotated[
        float, typer.Option(min=1, help="Training time aimed at, on one CPU core; training stops at 1.5 times that.")
    ] = DemoSettings.seconds,
    k: Annotated[int, typer.Option("-k", min=1, help="Passages to show.")] = 8,
    seed: Annotated[int, typer.Option(min=0, help="Of the training.")] = 0,
    json: Json = False,
) -> None:
    """Train a small model on Python's own documentation, index it, and ask which passages taught it a sentence."""
    with reported_errors():
        result = run_demo(out, question or [QUESTION], DemoSettings(seconds=seconds, seed=seed, k=k))
        facts = result.to_json()
        answers = facts["answers"] = answers_json(
            [TextQuestion(text) for text in result.questions], result.losses, result.hits
        )
        if json:
            write_json(facts)
            return
        screen = console()
        screen.print("Which training passages made the model know this?\n", style="bold")
        show_answers(screen, answers)
        show(screen, {name: value for name, value in facts.items() if name != "answers"})
        screen.print(f"\n{unit_of_scores(facts['passages'])}")
        screen.print(excerpt(f'Ask on: lorif search {out / "index"} "A lambda expression makes a function."', 1000))


@app.command()
@configured
def build(
    out: Annotated[Path, typer.Argument(help="The index: a new folder.")],
    model: ModelFolder,
    data: Texts,
    settings: Settings,
    text_field: TextField = "text",
    source_field: SourceField = None,
    max_length: MaxLength = None,
    timeout: Annotated[
        float, typer.Option(min=1, help="Seconds that a process waits for the others, where torchrun started several.")
    ] = 1800.0,
    json: Json = False,
) -> None:
    """Index the texts that a model was trained on; by several processes, where torchrun starts it."""
    with reported_errors(), joined(timeout) as speaks:
        config, device = settings.read()
        documents = read_documents(data, text_field=text_field, source_field=source_field)
        index = build_text_index(
            out,
            load_text_model(model, device),
            documents,
            max_length=max_length,
            config=config,
            origin={"data": str(data), "text_field": text_field, "source_field": source_field},
        )
        with index:
            if speaks:
                write_index(index, json)
            if speaks and not json:
                facts, screen = text_facts(index), console()
                if facts["documents"] != len(index):
                    screen.print(
                        f"\n{facts['documents']:,} texts are {len(index):,} passages of at most "
                        f"{facts['max_length']:,} tokens: ids are of passages, in the order of the texts."
                    )
                screen.print(excerpt(f'Ask: lorif search {out} "A text of yours."', 1000))


@app.command()
@configured
def estimate(
    model: ModelFolder,
    data: Texts,
    settings: Settings,
    disk: Annotated[
        str | None, typer.Option(help="Room for the index, such as 20GB: says which choices fit into it.")
    ] = None,
    examples: Annotated[
        int | None, typer.Option(min=1, help="Passages in all, where --data is only a part of them.")
    ] = None,
    batches: Annotated[int, typer.Option(min=1, help="Batches whose gradients are taken and timed.")] = 4,
    world_size: Annotated[
        int, typer.Option(min=1, help="Processes that are to build it together: says what each takes and sends.")
    ] = 1,
    text_field: TextField = "text",
    source_field: SourceField = None,
    max_length: MaxLength = None,
    json: Json = False,
) -> None:
    """Say what a build would take: disk, memory and time, from a handful of batches; nothing is kept."""
    try:
        room = None if disk is None else byte_count(disk)
    except ValueError as error:
        raise typer.BadParameter(f"--disk {error}") from None
    with reported_errors():
        config, device = settings.read()
        documents = read_documents(data, text_field=text_field, source_field=source_field)
        text_model = load_text_model(model, device)
        passages = text_model.passages(documents, max_length=max_length)
        found = Index.estimate(
            model=text_model.model,
            data=passages,
            tokenizer=text_model.tokenizer,
            config=config,
            examples=examples,
            batches=batches,
            disk=room,
            world_size=world_size,
            payload_bytes=passages.nbytes / len(passages),
        )
        write(found.to_json(), json)
