"""Command line: `lorif demo`, `estimate`, `build`, `search`, `info`; `add`, `remove`, `refit`, `compact` and `merge`
change an index; `verify` and `repair` look after it; `report` and `serve` show it in a browser. Answers on stdout,
progress and errors on stderr.

Exit codes: 0 done, 1 an error of the user's or of the files, in one line, 2 usage, 130 interrupted.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any

import typer

from .config import BuildConfig
from .damping import Damping, damping_from_json
from .errors import CorruptionError, LorifError
from .index import Index
from .launch import joined
from .storage.damage import damage_message, find_damage
from .storage.manifest import read_manifest
from .text.demo import QUESTION, run_demo, show_demo
from .text.demo_model import DemoSettings
from .text.show import (
    answer_json,
    console,
    excerpt,
    in_units,
    index_json,
    show_answer,
    show_estimate,
    show_index,
    write_json,
)
from .text.textindex import TextIndex, build_text_index, estimate_text_index, load_text_model
from .text.texts import read_documents
from .version import VERSION
from .web.explorer import Explorer, Question
from .web.guard import is_loopback
from .web.report import report as report_page
from .web.report import write_report
from .web.server import make_app
from .web.server import serve as serve_app

app = typer.Typer(
    name="lorif",
    help="Training data attribution: which training examples made this model do that?",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ModelFolder = Annotated[Path, typer.Option(help="A causal language model's folder, as save_pretrained writes it.")]
Texts = Annotated[
    Path, typer.Option(help="The training texts: a .txt or .jsonl file, a folder of them, or a saved dataset.")
]
TextField = Annotated[str, typer.Option(help="The field that holds the text (.jsonl, dataset).")]
SourceField = Annotated[
    str | None, typer.Option(help="The field that says where a text is from; default: file and line.")
]
MaxLength = Annotated[
    int | None, typer.Option(min=2, help="Tokens in a passage; default: the model's context, at most 1024.")
]
Stride = Annotated[int | None, typer.Option(min=1, help="Tokens from one passage to the next; default: --max-length.")]
ProjectionDim = Annotated[
    str, typer.Option(help="Width each side of a gradient is projected to: an integer, a fraction, auto or none.")
]
Rank = Annotated[str, typer.Option(help="Factor pairs kept per passage and layer, c: an integer or full.")]
CurvatureRank = Annotated[str, typer.Option(help="Curvature directions kept per layer, r: an integer, full or auto.")]
CurvatureSample = Annotated[int, typer.Option(min=1, help="Passages that the curvature is fitted on.")]
Tracked = Annotated[
    list[str] | None, typer.Option(help="Track these layers only: a name or glob pattern; may be repeated.")
]
Stored = Annotated[
    str, typer.Option(help="What is kept of a passage: auto, eigen, both, factors, coordinates or coarse.")
]
EigenBytes = Annotated[int, typer.Option(min=1, help="Most bytes of a passage, with store eigen.")]
Dtype = Annotated[str, typer.Option(help="Of stored factors: float16, bfloat16 or float32.")]
SketchDim = Annotated[int, typer.Option(min=1, help="Coordinates of a passage, for all layers together.")]
CoordinateBits = Annotated[int, typer.Option(help="Bits of a stored coordinate: 1, 2, 4 or 8.")]
CoarseFactory = Annotated[str, typer.Option(help="The coarse index: a faiss.index_factory string, auto or none.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Passages per pass through the model.")]
Seed = Annotated[int, typer.Option(min=0, help="Of projections and samples.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout instead of tables.")]
Device = Annotated[str, typer.Option(help="Where the model runs: cpu, cuda, ...; auto takes a GPU if there is one.")]


@contextmanager
def reported_errors() -> Iterator[None]:
    """Errors that a user can cause as one line on stderr and exit code 1; an interruption as 130."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo("lorif: interrupted", err=True)
        raise typer.Exit(130) from None
    except BrokenPipeError:
        raise
    except (LorifError, OSError) as error:
        typer.echo(f"lorif: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(1) from None


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lorif {VERSION}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and leave.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Training data attribution: which training examples made this model do that?"""


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
        screen = None if json else console()
        settings = DemoSettings(seconds=seconds, seed=seed, k=k)
        result = run_demo(out, question or [QUESTION], settings)
        if screen is None:
            write_json(result.to_json())
        else:
            show_demo(screen, result)


@app.command()
def build(
    out: Annotated[Path, typer.Argument(help="The index: a new folder.")],
    model: ModelFolder,
    data: Texts,
    text_field: TextField = "text",
    source_field: SourceField = None,
    max_length: MaxLength = None,
    stride: Stride = None,
    projection_dim: ProjectionDim = "auto",
    rank: Rank = "1",
    curvature_rank: CurvatureRank = "auto",
    curvature_sample: CurvatureSample = BuildConfig.curvature_sample,
    damping: Annotated[
        str | None, typer.Option(help="The index's damping: a multiple of trace/D, or RULE:X (see search).")
    ] = None,
    layers: Tracked = None,
    store: Stored = BuildConfig.store,
    eigen_bytes: EigenBytes = BuildConfig.eigen_bytes,
    dtype: Dtype = "float16",
    sketch_dim: SketchDim = BuildConfig.sketch_dim,
    coordinate_bits: CoordinateBits = BuildConfig.coordinate_bits,
    coarse: CoarseFactory = "auto",
    batch_size: BatchSize = 32,
    seed: Seed = 0,
    device: Device = "auto",
    timeout: Annotated[
        float, typer.Option(min=1, help="Seconds that a process waits for the others, where torchrun started several.")
    ] = 1800.0,
    json: Json = False,
) -> None:
    """Index the texts that a model was trained on; by several processes, where torchrun starts it."""
    settings = _settings(
        projection_dim=projection_dim,
        rank=rank,
        curvature_rank=curvature_rank,
        curvature_sample=curvature_sample,
        damping=damping,
        layers=layers,
        store=store,
        eigen_bytes=eigen_bytes,
        dtype=dtype,
        sketch_dim=sketch_dim,
        coordinate_bits=coordinate_bits,
        coarse=coarse,
        batch_size=batch_size,
        seed=seed,
    )
    with reported_errors(), joined(timeout) as speaks:
        config = BuildConfig(**settings)
        documents = read_documents(data, text_field=text_field, source_field=source_field)
        text_model = load_text_model(model, device)
        index = build_text_index(
            out,
            text_model,
            documents,
            max_length=max_length,
            stride=stride,
            config=config,
            origin={"data": str(data), "text_field": text_field, "source_field": source_field},
        )
        with index:
            if not speaks:
                return
            if json:
                write_json(index_json(index))
                return
            screen, facts = console(), index_json(index)
            screen.print(
                f"{facts['examples']:,} passages indexed, {facts['bytes_per_example']:,} bytes each, "
                f"{in_units(facts['nbytes'])} in all."
            )
            screen.print(excerpt(f'Next: lorif search {out} --text "..."'))


@app.command()
def estimate(
    model: ModelFolder,
    data: Texts,
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
    stride: Stride = None,
    projection_dim: ProjectionDim = "auto",
    rank: Rank = "1",
    curvature_rank: CurvatureRank = "auto",
    curvature_sample: CurvatureSample = BuildConfig.curvature_sample,
    layers: Tracked = None,
    store: Stored = BuildConfig.store,
    eigen_bytes: EigenBytes = BuildConfig.eigen_bytes,
    dtype: Dtype = "float16",
    sketch_dim: SketchDim = BuildConfig.sketch_dim,
    coordinate_bits: CoordinateBits = BuildConfig.coordinate_bits,
    coarse: CoarseFactory = "auto",
    batch_size: BatchSize = 32,
    seed: Seed = 0,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Say what a build would take: disk, memory and time, from a handful of batches; nothing is kept."""
    room = None if disk is None else _bytes(disk)
    settings = _settings(
        projection_dim=projection_dim,
        rank=rank,
        curvature_rank=curvature_rank,
        curvature_sample=curvature_sample,
        damping=None,
        layers=layers,
        store=store,
        eigen_bytes=eigen_bytes,
        dtype=dtype,
        sketch_dim=sketch_dim,
        coordinate_bits=coordinate_bits,
        coarse=coarse,
        batch_size=batch_size,
        seed=seed,
    )
    with reported_errors():
        config = BuildConfig(**settings)
        documents = read_documents(data, text_field=text_field, source_field=source_field)
        found = estimate_text_index(
            load_text_model(model, device),
            documents,
            max_length=max_length,
            stride=stride,
            config=config,
            examples=examples,
            batches=batches,
            disk=room,
            world_size=world_size,
        )
        if json:
            write_json(found.to_json())
        else:
            show_estimate(console(), found, room)


@app.command()
def search(
    index: Annotated[Path, typer.Argument(help="An index that `lorif build` or `lorif demo` made.")],
    text: Annotated[list[str], typer.Option(help="What to explain; may be repeated.")],
    prompt: Annotated[
        str | None, typer.Option(help="Text that comes before, and is not itself to be explained.")
    ] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="Passages to find.")] = 10,
    opponents: Annotated[
        bool, typer.Option("--opponents", help="Passages that worked against the text, most harmful first.")
    ] = False,
    recall: Annotated[
        float, typer.Option(help="Share of the best passages to be found, above 0; 1 scans every passage.")
    ] = 0.99,
    exact: Annotated[bool, typer.Option("--exact", help="Score every passage.")] = False,
    damping: Annotated[
        str | None,
        typer.Option(help="A multiple of trace/D, or RULE:X with RULE absolute, relative, paper or release."),
    ] = None,
    layers: Annotated[
        list[str] | None, typer.Option(help="Sum over these layers only: a name or glob pattern; may be repeated.")
    ] = None,
    model: Annotated[Path | None, typer.Option(help="The model's folder, if it was moved since the build.")] = None,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Find the training passages that made the model expect a text."""
    policy = None if damping is None else _damping(damping)
    with reported_errors():
        asked = TextIndex.open(index, model=model, device=device)
        with asked.index:
            answers = asked.ask(
                text,
                k,
                prompt=prompt,
                opponents=opponents,
                recall=recall,
                exact=exact or None,
                damping=policy,
                layers=layers or None,
                progress=None,
            )
            if json:
                write_json(
                    {
                        "index": str(index),
                        "fingerprint": asked.index.fingerprint,
                        "prompt": prompt,
                        "opponents": opponents,
                        "answers": [answer_json(answer) for answer in answers],
                        "stats": asdict(answers[0].stats),
                    }
                )
                return
            screen = console()
            for answer in answers:
                show_answer(screen, answer)
            stats = answers[0].stats
            spent = sum(v for name, v in stats.seconds.items() if name != "gradients")
            screen.print(
                f"{stats.plan}: {stats.examined:,} of {stats.total:,} passages scored exactly in {spent:.3f} s, recall "
                f"{stats.estimated_recall:.3f} as estimated, {in_units(stats.bytes_read)} read; score / "
                f"{len(asked.index):,} estimates, in nats, by how much the text's loss would rise without the passage.",
                style="dim",
            )


@app.command()
def info(index: Annotated[Path, typer.Argument(help="An index.")], json: Json = False) -> None:
    """Show what an index holds and how it was built."""
    with reported_errors(), Index.open(index) as opened:
        facts = index_json(opened)
        if json:
            write_json(facts)
        else:
            show_index(console(), facts)


@app.command()
def add(
    index: Annotated[Path, typer.Argument(help="An index that `lorif build` made.")],
    data: Annotated[Path, typer.Option(help="Further texts, in any form that `lorif build` takes.")],
    text_field: Annotated[str, typer.Option(help="The field that holds the text (.jsonl, dataset).")] = "text",
    source_field: Annotated[
        str | None, typer.Option(help="The field that says where a text is from; default: file and line.")
    ] = None,
    model: Annotated[Path | None, typer.Option(help="The model's folder, if it was moved since the build.")] = None,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Index further texts; they can be found at once, and the curvature stays as it is."""
    with reported_errors():
        documents = read_documents(data, text_field=text_field, source_field=source_field)
        opened = TextIndex.open(index, model=model, device=device)
        with opened.index:
            ids = opened.add(documents).tolist()
            age = opened.index.curvature_age
            if json:
                write_json({"ids": ids, "examples": len(opened.index), "curvature_age": age})
                return
            console().print(
                f"{len(ids):,} passages added, {len(opened.index):,} in all; {_share(age['new_trace'])} of the squared "
                "gradient norm is of passages that the curvature has not seen."
            )


@app.command()
def remove(
    index: Annotated[Path, typer.Argument(help="An index.")],
    ids: Annotated[list[int], typer.Argument(help="Ids of the examples, as search shows them.")],
    json: Json = False,
) -> None:
    """Remove examples: no later answer has them. `compact` takes them off the disk."""
    with reported_errors(), Index.open(index) as opened:
        removed = opened.remove(ids)
        if json:
            write_json({"removed": removed, "examples": len(opened)})
            return
        console().print(f"{removed:,} removed, {len(opened):,} left. Next: lorif compact {index}")


@app.command()
def compact(index: Annotated[Path, typer.Argument(help="An index.")], json: Json = False) -> None:
    """Take removed examples off the disk, and join small shards."""
    with reported_errors(), Index.open(index) as opened:
        done = opened.compact()
        if json:
            write_json(done)
            return
        console().print(f"{in_units(max(done['bytes'], 0))} freed.")
        if done["held"]:
            console().print(f"{len(done['held'])} files are still being read, and go with the next change after that.")


@app.command()
def refit(index: Annotated[Path, typer.Argument(help="An index.")], json: Json = False) -> None:
    """Renew curvature, sketch and coarse index from what is stored, without the model."""
    with reported_errors(), Index.open(index) as opened:
        done = opened.refit()
        if json:
            write_json(done)
            return
        console().print(f"renewed: {', '.join(done['renewed']) or 'nothing'}")
        for name, why in done["kept"].items():
            console().print(f"kept: {name} ({why})")


@app.command()
def merge(
    out: Annotated[Path, typer.Argument(help="The merged index: a new folder.")],
    indexes: Annotated[list[Path], typer.Argument(help="Indexes of one fit, in the order of their examples.")],
    json: Json = False,
) -> None:
    """Make one index of several that were built with the same fit."""
    with reported_errors(), Index.merge(out, indexes) as merged:
        if json:
            write_json(index_json(merged))
        else:
            console().print(f"{len(merged):,} examples in {out}.")


@app.command()
def verify(index: Annotated[Path, typer.Argument(help="An index.")], json: Json = False) -> None:
    """Compare every byte of an index with its checksums. Exit code 1 where something differs."""
    with reported_errors():
        found = find_damage(index, read_manifest(index))
        if json:
            write_json({"whole": not found, "damaged": [asdict(damage) for damage in found]})
        if found:
            raise CorruptionError(damage_message(index, found))
        if not json:
            console().print(f"{index}: every file is as it was sealed.")


@app.command()
def repair(index: Annotated[Path, typer.Argument(help="An index.")], json: Json = False) -> None:
    """Drop what is damaged, and make again what can be made from the rest. Nothing is deleted."""
    with reported_errors():
        done = Index.repair(index)
        if json:
            write_json(done)
            return
        screen = console()
        if not done["dropped"] and not done["rebuilt"]:
            screen.print(f"{index}: nothing is damaged.")
        for part in done["dropped"]:
            screen.print(
                f"dropped: {part['file']}, {part['rows']:,} examples with ids {part['first_id']} to {part['last_id']}"
            )
        if done["rebuilt"]:
            screen.print(f"made again: {', '.join(done['rebuilt'])}")


@app.command()
def report(
    index: Annotated[Path, typer.Argument(help="An index.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The page: a new .html file.")],
    query: Annotated[str | None, typer.Option(help="The text whose origin is asked for.")] = None,
    row: Annotated[
        int | None, typer.Option("--id", min=0, help="Or a row's id: what is like it? Needs no model.")
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="Text that comes before, and is not itself to be explained.")
    ] = None,
    k: Annotated[int, typer.Option("-k", min=1, max=1000, help="Passages on each side.")] = 20,
    recall: Annotated[float, typer.Option(help="Share of the best passages to be found, above 0.")] = 0.99,
    exact: Annotated[bool, typer.Option("--exact", help="Score every passage.")] = False,
    shade: Annotated[int, typer.Option(min=0, help="Passages on each side whose tokens are shaded.")] = 10,
    replace: Annotated[bool, typer.Option("--replace", help="Write over a page that is there.")] = False,
    model: Annotated[Path | None, typer.Option(help="The model's folder, if it was moved since the build.")] = None,
    device: Device = "auto",
) -> None:
    """Write one page, to keep or to send: a text's proponents and opponents, and how they were found."""
    if (query is None) == (row is None):
        raise typer.BadParameter("pass either --query or --id")
    with reported_errors():
        explorer = Explorer.open(index, model=model, device=device)
        with explorer.index:
            question = Question(query, prompt, row)
            html = report_page(explorer, question, k=k, recall=recall, exact=exact, shade=shade)
            write_report(out, html, replace=replace)
    console().print(excerpt(f"{out}: {len(html.encode()) / 1000:,.0f} kB"))


@app.command()
def serve(
    index: Annotated[Path, typer.Argument(help="An index.")],
    host: Annotated[str, typer.Option(help="What to bind to; another than loopback lets others in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8750,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="A further name that requests may call this server by; may be repeated.")
    ] = None,
    example: Annotated[
        list[str] | None, typer.Option(help="A question to offer on the first page; may be repeated.")
    ] = None,
    k: Annotated[int, typer.Option("-k", min=1, max=1000, help="Passages that a search finds.")] = 50,
    shade: Annotated[int, typer.Option(min=0, max=1000, help="Passages of a page that are shaded by themselves.")] = 10,
    model: Annotated[Path | None, typer.Option(help="The model's folder, if it was moved since the build.")] = None,
    device: Device = "auto",
) -> None:
    """Explore an index in the browser, on this machine alone unless another host is named."""
    with reported_errors():
        explorer = Explorer.open(index, model=model, device=device, examples=example or ())
        with explorer.index:
            pages = make_app(explorer, host=host, names=allow_host or (), k=k, shade=shade)
            if not is_loopback(host):
                typer.echo(
                    f"lorif: warning: whoever can reach {host} can ask this index and read its training texts; there "
                    "is no password and no encryption",
                    err=True,
                )
            serve_app(pages, host=host, port=port, started=lambda address: typer.echo(address))


def main() -> None:
    """The entry point `lorif`."""
    app()


# -- values of options -------------------------------------------------------------------------------------------


def _settings(
    *,
    projection_dim: str,
    rank: str,
    curvature_rank: str,
    damping: str | None,
    coarse: str,
    layers: list[str] | None,
    **plain: Any,
) -> dict[str, Any]:
    """What `BuildConfig` takes, of options as they are written."""
    settings: dict[str, Any] = plain | {
        "projection_dim": _projection_dim(projection_dim),
        "rank": _rank("--rank", rank),
        "curvature_rank": "auto" if curvature_rank == "auto" else _rank("--curvature-rank", curvature_rank),
        "coarse": None if coarse == "none" else coarse,
        "layers": layers or None,
    }
    if damping is not None:
        settings["damping"] = _damping(damping)
    return settings


def _bytes(given: str) -> int:
    """Bytes of "20GB", "512 MB" or a plain number; decimal units, as disks are sold."""
    units = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
    digits = given.strip().rstrip("bBkKmMgGtT")
    unit = given.strip()[len(digits) :].upper()
    try:
        size = int(float(digits) * units[unit])
    except (ValueError, KeyError, OverflowError):
        size = 0
    if size < 1:
        raise typer.BadParameter(f"--disk takes bytes, as 20GB or 500MB, got {given!r}")
    return size


def _projection_dim(given: str) -> int | Fraction | str | None:
    if given in ("auto", "none"):
        return None if given == "none" else given
    try:
        value = Fraction(given)
    except (ValueError, ZeroDivisionError):
        allowed = "an integer, a fraction such as 1/16, auto or none"
        raise typer.BadParameter(f"--projection-dim takes {allowed}, got {given!r}") from None
    return int(value) if value.denominator == 1 else value


def _share(value: float | None) -> str:
    return "an unknown share" if value is None else f"{100 * value:.1f}%"


def _rank(option: str, given: str) -> int | None:
    if given == "full":
        return None
    if not given.isdecimal():
        raise typer.BadParameter(f"{option} takes an integer or full, got {given!r}")
    return int(given)


def _damping(given: str) -> Damping:
    rule, _, number = given.rpartition(":")
    try:
        value = float(number)
        return damping_from_json({"rule": rule or "relative", "lam" if rule == "absolute" else "multiple": value})
    except ValueError as error:
        raise typer.BadParameter(f"--damping takes X or RULE:X, with X above 0, got {given!r} ({error})") from None
