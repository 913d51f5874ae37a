"""Show: an index, answers and errors as tables for people and as JSON for machines."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from ..build.estimate import Estimate, RankEstimate
from ..build.traffic import SEARCHES
from ..damping import Damping
from ..index import Index
from ..results import Hits
from ..text.demo import DemoResult
from ..text.passages import described
from ..text.textindex import METADATA
from ..web.visible import on_one_line

_WIDTH_OF_FILES = 100


def console() -> Console:
    """For stdout: as wide as the terminal, or a fixed width where there is none."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else _WIDTH_OF_FILES)


def write_json(document: Any) -> None:
    """One JSON document on stdout."""
    sys.stdout.write(json.dumps(document, ensure_ascii=False, indent=1, allow_nan=False) + "\n")
    sys.stdout.flush()


def excerpt(text: str, most: int = 160) -> Text:
    """The beginning of a text on one line, without what could move the terminal's cursor or be read as markup."""
    return Text(on_one_line(text, most))


# -- an estimate -------------------------------------------------------------------------------------------------


def show_estimate(out: Console, found: Estimate, disk: int | None) -> None:
    """Disk, memory and time by part, and the other ways to store rows."""
    out.print(
        f"{found.examples:,} passages as {found.codec}, {found.bytes_per_example:,} bytes each: "
        f"{in_units(found.disk_total)} on disk ({in_units(found.temporary)} more meanwhile), up to "
        f"{in_units(found.memory)} in memory, about {found.seconds_total:,.0f} s."
    )
    parts = Table("part", "on disk", "stage", "seconds", box=None, header_style="bold")
    disks, stages = list(found.disk.items()), list(found.seconds.items())
    for i in range(max(len(disks), len(stages))):
        left = (disks[i][0], in_units(disks[i][1])) if i < len(disks) else ("", "")
        right = (stages[i][0], f"{stages[i][1]:,.1f}") if i < len(stages) else ("", "")
        parts.add_row(*left, *right)
    out.print(parts)
    if found.ranks is not None:
        _show_ranks(out, found.ranks)
    room = "" if disk is None else f" (x: beyond the {in_units(disk)} that there are)"
    out.print(f"\nOther ways to store a passage{room}:", style="bold")
    ways = Table("settings", "bytes each", "on disk", "", box=None, header_style="bold")
    for choice in found.choices:
        settings = " ".join(f"{key}={value}" for key, value in choice.settings.items())
        ways.add_row(settings, f"{choice.bytes_per_example:,}", in_units(choice.disk), "" if choice.fits else "x")
    out.print(ways)


def _show_ranks(out: Console, ranks: RankEstimate) -> None:
    """What each rank takes, stage by stage."""
    disk = in_units(sum(ranks.disk.values()))
    out.print(
        f"\nEach of {ranks.size} ranks: {in_units(ranks.memory)} in memory, about {ranks.seconds_total:,.0f} s without "
        f"the network's, {in_units(sum(v for k, v in ranks.sent.items() if k not in SEARCHES))} sent; in a folder of "
        f"its own {disk} on disk, and {in_units(ranks.published)} more that rank 0 sends."
    )
    parts = Table("stage", "seconds", "in memory", "sent", box=None, header_style="bold")
    for stage in dict.fromkeys([*ranks.seconds, *ranks.held, *ranks.sent]):
        seconds = f"{ranks.seconds[stage]:,.1f}" if stage in ranks.seconds else ""
        held, sent = (in_units(part[stage]) if stage in part else "" for part in (ranks.held, ranks.sent))
        parts.add_row(f"{stage}, a query" if stage in SEARCHES else stage, seconds, held, sent)
    out.print(parts)


# -- an index ----------------------------------------------------------------------------------------------------


def index_json(index: Index) -> dict[str, Any]:
    """All that is known of an index, as plain JSON values."""
    damping: Damping = index.config.damping  # type: ignore[assignment]
    layers = []
    for spec in index.specs.values():
        curvature = index.curvature[spec.name]
        kept = float(curvature.eigenvalues.sum())
        layers.append(
            {
                "name": spec.name,
                "uses": list(spec.uses),
                "bias": spec.bias,
                "width_in": spec.width_in,
                "width_out": spec.width_out,
                "d_in": spec.d_in,
                "d_out": spec.d_out,
                "rank": spec.rank,
                "curvature_rank": curvature.rank,
                "trace": curvature.trace,
                "trace_kept": kept / curvature.trace if curvature.trace > 0 else None,
                "lambda": damping.value(curvature),
            }
        )
    return {
        "path": str(index.path),
        "fingerprint": index.fingerprint,
        "examples": len(index),
        "skipped": list(index.skipped),
        "generation": index.generation,
        "curvature_age": index.curvature_age,
        "bytes_per_example": index.bytes_per_example,
        "nbytes": index.nbytes,
        "codec": index.codec,
        "coarse": index.coarse,
        "config": index.config.to_json(),
        "layers": layers,
        "coverage": index.build_report.get("coverage"),
        "outliers": index.build_report.get("outliers"),
        "build_report": index.build_report,
        "metadata": index.metadata,
    }


def show_index(out: Console, facts: dict[str, Any]) -> None:
    """What `index_json` gave, for people."""
    config, report = facts["config"], facts["build_report"]
    summary = Table.grid(padding=(0, 2))
    summary.add_row("index", excerpt(facts["path"]))
    skipped = len(facts["skipped"])
    age = facts["curvature_age"]
    gone = f", {age['removed']:,} removed and not yet compacted" if age["removed"] else ""
    summary.add_row("examples", f"{facts['examples']:,}" + (f", {skipped} skipped" if skipped else "") + gone)
    if age["new_rows"]:
        share = "" if age["new_trace"] is None else f", {age['new_trace']:.1%} of the squared gradient norm"
        summary.add_row("since the fit", f"{age['new_rows']:,} examples added{share}")
    summary.add_row(
        "size", f"{facts['bytes_per_example']:,} bytes per example, {in_units(facts['nbytes'])} in all with curvature"
    )
    summary.add_row("rows", f"by the codec {facts['codec']}")
    coarse = facts["coarse"]
    if coarse is not None:
        summary.add_row(
            "coarse",
            f"{coarse['kind']} on {coarse['dim']} coordinates ({coarse['energy']:.0%} of the whitened gradients), "
            f"{coarse['bytes_per_example']:.0f} bytes per example",
        )
    summary.add_row("damping", " ".join(str(v) for v in config["damping"].values()) + f", {config['complement']}")
    seconds = ", ".join(f"{stage} {value:.1f} s" for stage, value in report.get("seconds", {}).items())
    summary.add_row("built", seconds or "unknown")
    text = facts["metadata"].get(METADATA)
    if isinstance(text, dict):
        summary.add_row("model", excerpt(str(text.get("model"))))
        summary.add_row("windows", f"{text.get('max_length')} tokens, every {text.get('stride')}")
    summary.add_row("fingerprint", facts["fingerprint"])
    out.print(summary)
    if facts["coverage"] is not None:
        out.print("\nOf the squared gradient norm, measured on some of the sample:", style="bold")
        out.print(_coverage(facts["coverage"]))
        out.print()
    if facts["outliers"] is not None:
        out.print(_outliers(facts["outliers"]["share"]))
        out.print()
    table = Table("layer", box=None, header_style="bold", padding=(0, 1))
    for column in ("in x out", "projected", "c", "r", "trace", "kept", "lambda"):
        table.add_column(column, justify="right", no_wrap=True)
    for layer in facts["layers"]:
        name = layer["name"] + (f" (tied: {', '.join(layer['uses'])})" if len(layer["uses"]) > 1 else "")
        table.add_row(
            Text(name),
            f"{layer['width_in']} x {layer['width_out']}",
            f"{layer['d_in']} x {layer['d_out']}",
            str(layer["rank"]),
            str(layer["curvature_rank"]),
            f"{layer['trace']:.3g}",
            "" if layer["trace_kept"] is None else f"{layer['trace_kept']:.0%}",
            f"{layer['lambda']:.3g}",
        )
    out.print(table)


# From here on a few examples are most of what scores sum up to (.87 where they hid what was asked for, .04 to .34 where
# they did not: `docs/quality.md`).
_MOST = 0.5
_COVERED = {
    "tracked": ("tracked layers", "of all trained parameters'; what the others learnt is not seen"),
    "projection": ("projection", "of that; more with a wider projection_dim"),
    "rows": ("rows", "of that, as the stored rows say it; more with eigen_bytes or rank"),
    "scores": ("scores", "rows again, as scores weigh gradients, by H^-1"),
}


def _coverage(coverage: dict[str, Any]) -> Table:
    """What an index keeps of gradients, a stage a line."""
    table = Table.grid(padding=(0, 2))
    table.add_column()
    table.add_column(justify="right", no_wrap=True)
    for key, (stage, meaning) in _COVERED.items():
        if coverage[key] is not None:
            table.add_row(stage, f"{coverage[key]:.1%}", Text(meaning, style="dim"))
    return table


def _outliers(share: float) -> str:
    """What a few examples hold of the self-influence, and what to do about it."""
    told = f"The hundredth of the examples with the largest gradients holds {share:.0%} of the self-influence"
    if share < _MOST:
        return told + "."
    return told + ', and may come first whatever is asked: search with normalize="relatif" (--normalize relatif).'


def in_units(count: int) -> str:
    """Bytes as people read them."""
    return decimal(count)


# -- answers -----------------------------------------------------------------------------------------------------


def answers_json(questions: Sequence[str], losses: Sequence[tuple[int, float]], hits: Hits) -> list[dict[str, Any]]:
    """What was found for each question, as plain JSON values.

    Args:
        questions: texts.
        losses: of each, (tokens that have a loss, nats).
        hits: of them all.
    """
    out = []
    for text, (tokens, loss), found in zip(questions, losses, _found(hits), strict=True):
        rows = [
            {"rank": rank, "id": row, "score": score, "source": source, "text": words}
            for rank, (row, score, words, source) in enumerate(found, start=1)
        ]
        mean = loss / max(tokens, 1)
        out.append({"text": text, "tokens": tokens, "loss": loss, "loss_per_token": mean, "hits": rows})
    return out


def _found(hits: Hits) -> list[list[tuple[int, float, str | None, str | None]]]:
    """For each question (id, score, text, source) of its hits, best first."""
    payloads = hits.payloads or [[None] * len(row) for row in hits.ids]
    rows = zip(hits.ids.tolist(), hits.scores.tolist(), payloads, strict=True)
    return [[(i, s, *described(p)) for i, s, p in zip(*row, strict=True)] for row in rows]


def show_answers(
    out: Console, questions: Sequence[str], losses: Sequence[tuple[int, float]], hits: Hits, most: int = 160
) -> None:
    """What was asked about, the model's loss on it, and what was found, as tables.

    Args:
        questions, losses, hits: as for `answers_json`.
        most: characters of a question that are shown.
    """
    for text, (count, loss), found in zip(questions, losses, _found(hits), strict=True):
        out.print(Text.assemble("“", excerpt(text, most), "”"), style="bold")
        tokens = "1 token" if count == 1 else f"{count:,} tokens"
        out.print(f"loss {loss / max(count, 1):.2f} nats a token, mean of {tokens}", style="dim")
        table = Table(box=None, header_style="bold", padding=(0, 1))
        table.add_column("", justify="right", style="dim")
        table.add_column("score", justify="right", no_wrap=True)
        table.add_column("id", justify="right", no_wrap=True, style="dim")
        table.add_column("source", style="cyan", max_width=28)
        table.add_column("passage")
        for rank, (row, score, words, source) in enumerate(found, start=1):
            table.add_row(str(rank), f"{score:.4g}", str(row), excerpt(source or "-"), excerpt(words or "-"))
        out.print(table)


def unit_of_scores(total: int) -> str:
    """What scores are estimates of, in a sentence; total: N, how many examples the index has."""
    return (
        f"score / {total:,} estimates, in nats, by how much the text's loss, summed over its tokens, would rise "
        "without the passage: to first order, under this curvature, damping and choice of layers. Trust the order "
        "before the size."
    )


# -- the demo ----------------------------------------------------------------------------------------------------


def demo_json(result: DemoResult) -> dict[str, Any]:
    """What the demo did and found, as plain JSON values."""
    facts = {f.name: getattr(result, f.name) for f in fields(result) if f.name not in ("hits", "questions", "losses")}
    for name in ("settings", "training", "check"):
        facts[name] = asdict(facts[name])
    return facts | {
        "folder": str(result.folder),
        "answers": answers_json(result.questions, result.losses, result.hits),
        "stats": asdict(result.hits.stats),
    }


def show_demo(out: Console, result: DemoResult) -> None:
    """What was done and found, for people."""
    training, check, settings = result.training, result.check, result.settings
    facts = Table.grid(padding=(0, 2))
    facts.add_row(
        "text",
        f"{result.passages:,} passages, {result.tokens:,} tokens, on {result.topics} topics of Python's documentation",
    )
    stopped = "" if training.steps == training.planned else f" of {training.planned:,}, stopped by its time limit,"
    facts.add_row(
        "model",
        f"GPT-2 architecture, {settings.depth} layers of width {settings.width}, {training.parameters / 1e6:.1f} M "
        f"parameters, {training.steps:,} steps{stopped} in {training.seconds:.0f} s; "
        f"{training.loss:.2f} nats per token, {training.loss_held_out:.2f} on held-out passages",
    )
    facts.add_row(
        "index",
        f"built in {result.index_seconds:.0f} s, {result.bytes_per_example:,} bytes per passage, "
        f"{in_units(result.nbytes)} with curvature",
    )
    out.print(facts)
    out.print("\nWhich training passages made the model know this?\n", style="bold")
    show_answers(out, result.questions, result.losses, result.hits, most=1000)
    took = ", ".join(f"{stage} {1000 * seconds:.0f} ms" for stage, seconds in result.hits.stats.seconds.items())
    out.print(f"\nThe search took: {took}.", style="dim")
    out.print(unit_of_scores(result.passages))
    out.print(
        f"Check: of {check.asked} passages held out of the training, {check.best} have a passage of their own topic as "
        f"best hit; by chance it would be {check.expected:.0f}."
    )
    out.print(f"All in {result.seconds:.0f} s. Ask on:")
    out.print(excerpt(f'lorif search {result.folder / "index"} --text "A lambda expression makes a function."', 1000))
