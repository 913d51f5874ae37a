"""Browsing: `lorif report`, `serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import IndexExistsError
from ..web.explorer import Explorer, WrittenQuestion
from ..web.guard import is_loopback
from ..web.report import report as report_page
from ..web.server import make_app
from ..web.server import serve as serve_app
from .app import app, reported_errors
from .options import Device, IndexFolder, Json, MovedModel, Prompt, Recall
from .show import write


@app.command()
def report(
    index: IndexFolder,
    out: Annotated[Path, typer.Option("-o", "--out", help="The page: a new .html file.")],
    query: Annotated[str | None, typer.Option(help="The text whose origin is asked for.")] = None,
    row: Annotated[
        int | None, typer.Option("--id", min=0, help="Or a row's id: what is like it? Needs no model.")
    ] = None,
    prompt: Prompt = None,
    k: Annotated[int, typer.Option("-k", min=1, max=1000, help="Passages on each side.")] = 20,
    recall: Recall = 0.99,
    shade: Annotated[int, typer.Option(min=0, help="Passages on each side whose tokens are shaded.")] = 10,
    model: MovedModel = None,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Write one page, to keep or to send: a text's proponents and opponents, and how they were found."""
    if (query is None) == (row is None):
        raise typer.BadParameter("pass either --query or --id")
    with reported_errors():
        if out.exists():
            raise IndexExistsError(f"{out} exists: pass another file with --out, or delete it")
        explorer = Explorer.open(index, model=model, device=device)
        with explorer.index:
            question = WrittenQuestion(query, prompt, row)
            html = report_page(explorer, question, k=k, recall=recall, shade=shade)
            out.write_text(html, encoding="utf-8")
    write({"page": str(out), "bytes": len(html.encode())}, json)


@app.command()
def serve(
    index: IndexFolder,
    host: Annotated[str, typer.Option(help="What to bind to; another than loopback lets others in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8750,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="A further name that requests may call this server by; may be repeated.")
    ] = None,
    shade: Annotated[int, typer.Option(min=0, max=1000, help="Passages of a page that are shaded by themselves.")] = 10,
    model: MovedModel = None,
    device: Device = "auto",
) -> None:
    """Explore an index in the browser, on this machine alone unless another host is named."""
    with reported_errors():
        explorer = Explorer.open(index, model=model, device=device)
        with explorer.index:
            pages = make_app(explorer, host=host, names=allow_host or (), shade=shade)
            if not is_loopback(host):
                typer.echo(
                    f"lorif: warning: whoever can reach {host} can ask this index and read its training texts; there "
                    "is no password and no encryption",
                    err=True,
                )
            serve_app(pages, host=host, port=port, started=lambda address: typer.echo(address))
