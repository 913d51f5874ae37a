"""Show: what commands answer, as plain JSON values, and the same values as tables for people."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from ..config import BuildConfig
from ..index import Index
from ..results import Hits
from ..text.passages import described
from ..text.textquestions import TextQuestion
from ..web.page import plain_json
from ..web.visible import on_one_line

_WIDTH_OF_FILES = 100
# Numbers under such a name, and all that is below it, are bytes.
_BYTES = re.compile(r"bytes|disk|memory|temporary|held(?!.out)|sent|published")


def console() -> Console:
    """For stdout: as wide as the terminal, or a fixed width where there is none."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else _WIDTH_OF_FILES)


def excerpt(text: str, most: int = 160) -> Text:
    """The beginning of a text on one line, without what could move the terminal's cursor or be read as markup."""
    return Text(on_one_line(text, most))


def write(document: Mapping[str, Any], json: bool) -> None:
    """An answer on stdout: one JSON document, or tables of the same values."""
    if json:
        write_json(document)
    else:
        show(console(), document)


def write_index(index: Index, json: bool, every: bool = False) -> None:
    """What is known of an index on stdout: all of it as one JSON document or as tables, or what matters most."""
    facts = index_json(index)
    if json:
        write_json(facts)
    else:
        show_index(console(), facts, every)


def write_json(document: Any) -> None:
    """One JSON document on stdout."""
    sys.stdout.write(plain_json(document) + "\n")
    sys.stdout.flush()


def show(out: Console, document: Mapping[str, Any], within: str = "") -> None:
    """Values as tables: single ones as lines, then what holds others, each under its name.

    Args:
        out: where to.
        document: plain JSON values.
        within: the names above it.
    """
    lines = Table.grid(padding=(0, 2))
    for key, value in document.items():
        if not _takes_lines(value, within):
            lines.add_row(_name(key), _cell(value, f"{within} {key}"))
    if lines.rows:
        out.print(lines)
    for key, value in document.items():
        if not _takes_lines(value, within):
            continue
        path = f"{within} {key}".strip()
        out.print(Text("\n").append(_name(path)), style="bold")
        rows = value
        if isinstance(value, Mapping):
            parts = list(value.values())
            if not all(isinstance(part, Mapping) and part.keys() == parts[0].keys() for part in parts):
                show(out, value, path)
                continue
            rows = [{"": name} | row for name, row in value.items()]
        table = Table(box=None, header_style="bold", padding=(0, 1))
        columns = list(dict.fromkeys(name for row in rows for name in row))
        for name in columns:
            table.add_column(_name(name))
        for row in rows:
            table.add_row(*(_cell(row[name], f"{path} {name}") if name in row else "" for name in columns))
        out.print(table)


def _name(key: str) -> Text:
    return excerpt(key.replace("_", " "))


def _takes_lines(value: Any, within: str) -> bool:
    """Whether a value takes lines of its own: lists of mappings, mappings that hold some, and all at the top."""
    if isinstance(value, Mapping):
        return len(value) > 0 and (not within or any(isinstance(part, Mapping) for part in value.values()))
    return isinstance(value, list) and len(value) > 0 and all(isinstance(part, Mapping) for part in value)


def _cell(value: Any, path: str) -> Text:
    """One value, or several in a row, as text."""
    if isinstance(value, Mapping):
        value = [excerpt(name).append(" ").append(_cell(part, f"{path} {name}")) for name, part in value.items()]
    if isinstance(value, (list, tuple)):
        parts = [part if isinstance(part, Text) else _cell(part, path) for part in value]
        return Text(", ").join(parts) if parts else Text("none")
    if value is None or isinstance(value, bool):
        return Text("none" if value is None else str(value).lower())
    if isinstance(value, (int, float)) and _BYTES.search(path):
        return Text(decimal(round(value)) if value >= 10_000 else f"{value:,.0f} bytes")
    if isinstance(value, int):
        return Text(f"{value:,}")
    return Text(f"{value:.4g}") if isinstance(value, float) else excerpt(str(value))


def index_json(index: Index) -> dict[str, Any]:
    """All that is known of an index."""
    layers = []
    for spec in index.specs.values():
        curvature = index.curvature[spec.name]
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
                "trace_kept": curvature.energy if curvature.trace > 0 else None,
                "lambda": index.damping.value(curvature),
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
        "build_report": index.build_report,
        "metadata": index.metadata,
    }


# From here on a few examples are most of what scores sum up to (.87 where they hid what was asked for, .04 to .34 where
# they did not: `docs/quality.md`).
_MOST = 0.5
# Below it answers miss most of what they could be made of.
_LITTLE = 0.5


def show_index(out: Console, facts: Mapping[str, Any], every: bool = False) -> None:
    """What `index_json` gave, all or in short, and what to do where a few examples are most of all."""
    if every:
        _show_every(out, facts)
    else:
        _show_short(out, facts)
    coverage = facts["build_report"].get("coverage")
    if coverage is not None and coverage["scores"] is not None:
        out.print(f"\n{_in_short(coverage)}")
    outliers = facts["build_report"].get("outliers")
    if outliers is not None and outliers["share"] >= _MOST:
        out.print(
            f"\nThe hundredth of the examples with the largest gradients holds {outliers['share']:.0%} of the "
            "self-influence, and may come first whatever is asked: search with --normalize relatif."
        )
    if not every:
        out.print("\nSettings, layers and the whole report of the build: lorif info --all", style="dim")


def _show_short(out: Console, facts: Mapping[str, Any]) -> None:
    """What a reader asks first."""
    report, coarse, skipped = facts["build_report"], facts["coarse"], len(facts["skipped"])
    copies = (report.get("duplicates") or {}).get("examples")
    changed = _changed(facts["config"], BuildConfig().to_json())
    first, last = facts["layers"][0]["name"], facts["layers"][-1]["name"]
    lines = {
        "path": facts["path"],
        "examples": f"{facts['examples']:,}" + (f", {skipped:,} skipped" if skipped else ""),
        **({"copies": f"{copies:,} are copies of others"} if copies else {}),
        "on disk": f"{decimal(facts['nbytes'])}, {facts['bytes_per_example']:,} bytes an example",
        "rows": facts["codec"],
        "candidates": "none: searches scan"
        if coarse is None
        else f"{coarse['bytes_per_example']:.0f} bytes an example",
        "layers": f"{len(facts['layers'])}, from {first} to {last}" if len(facts["layers"]) > 1 else f"1, {first}",
        "built in": f"{sum(report.get('seconds', {}).values()):,.0f} s",
        "settings": ", ".join(changed) if changed else "the default",
        "fingerprint": facts["fingerprint"],
    }
    table = Table.grid(padding=(0, 2))
    for name, value in lines.items():
        table.add_row(name, excerpt(value))
    out.print(table)


def _changed(config: Mapping[str, Any], default: Mapping[str, Any], within: str = "") -> list[str]:
    """Settings that differ from the default, as "part.name value"."""
    found = []
    for name, value in config.items():
        if isinstance(value, Mapping) and isinstance(default.get(name), Mapping):
            found += _changed(value, default[name], f"{within}{name}.")
        elif value != default.get(name):
            found.append(f"{within}{name} {_cell(value, name).plain}")
    return found


def _show_every(out: Console, facts: Mapping[str, Any]) -> None:
    """All, with the layers in fewer columns."""
    layers = [
        {
            "name": layer["name"] + (f" (tied: {', '.join(layer['uses'])})" if len(layer["uses"]) > 1 else ""),
            "in x out": f"{layer['width_in']} x {layer['width_out']}",
            "projected": f"{layer['d_in']} x {layer['d_out']}",
            "c": layer["rank"],
            "r": layer["curvature_rank"],
            "trace": layer["trace"],
            "kept": layer["trace_kept"],
            "lambda": layer["lambda"],
        }
        for layer in facts["layers"]
    ]
    show(out, {**facts, "layers": layers})


def _in_short(coverage: Mapping[str, Any]) -> str:
    """What an index sees, and what to do where that is little (see `build.coverage`)."""
    tracked, kept = coverage["tracked"], coverage["scores"]
    said = f"In short: rows keep {kept:.0%} of what scores are made of"
    if tracked is not None:
        said += f", and the layers that are tracked have {tracked:.0%} of the gradients"
    advice = [
        *(
            ["track embeddings, too: LayerSelection(embeddings=True)"]
            if tracked is not None and tracked < _LITTLE
            else []
        ),
        *(["larger rows keep more: --eigen-bytes"] if kept < _LITTLE else []),
    ]
    return f"{said}. {'That is little: ' + '; '.join(advice) + '.' if advice else 'That is as usual.'}"


def question_json(question: TextQuestion) -> dict[str, str | None]:
    """What was asked about."""
    place = {} if question.place is None else {"place": question.place}
    return {"text": question.text, "prompt": question.prompt} | place


def answers_json(
    questions: Sequence[TextQuestion], losses: Sequence[tuple[int, float]], hits: Hits
) -> list[dict[str, Any]]:
    """What was found for each question.

    Args:
        questions: in words.
        losses: of each, (tokens that have a loss, nats).
        hits: of them all.
    """
    out = []
    payloads = hits.payloads or [[None] * len(row) for row in hits.ids]
    lexical = [[None] * len(row) for row in hits.ids] if hits.lexical is None else hits.lexical.tolist()
    rows = zip(hits.ids.tolist(), hits.scores.tolist(), payloads, lexical, strict=True)
    for question, (tokens, loss), found in zip(questions, losses, rows, strict=True):
        answer = []
        for rank, (row, score, payload, by_words) in enumerate(zip(*found, strict=True), start=1):
            text, source = described(payload)
            more = {} if by_words is None else {"lexical": by_words}
            answer.append({"rank": rank, "id": row, "score": score} | more | {"source": source, "text": text})
        mean = loss / max(tokens, 1)
        told = {"tokens": tokens, "loss": loss, "loss_per_token": mean, "hits": answer}
        out.append(question_json(question) | told)
    return out


def show_answers(out: Console, answers: Sequence[Mapping[str, Any]]) -> None:
    """Of each answer what was asked about, the model's loss on it, and what was found."""
    for answer in answers:
        prompt = excerpt(answer["prompt"] or "", 1000)
        # As it is asked: a blank where there is one.
        if answer["prompt"] and (answer["prompt"][-1].isspace() or answer["text"][:1].isspace()):
            prompt.append(" ")
        prompt.stylize("not bold dim")
        out.print(Text.assemble("“", prompt, excerpt(answer["text"], 1000), "”"), style="bold")
        out.print(f"loss {answer['loss_per_token']:.2f} nats a token, of {answer['tokens']:,}", style="dim")
        table = Table(box=None, header_style="bold", padding=(0, 1))
        table.add_column("", justify="right", style="dim")
        table.add_column("score", justify="right", no_wrap=True)
        table.add_column("id", justify="right", no_wrap=True, style="dim")
        lexical = any("lexical" in hit for hit in answer["hits"])
        if lexical:
            table.add_column("by words", justify="right", no_wrap=True, style="dim")
        table.add_column("source", style="cyan", max_width=28)
        table.add_column("passage")
        for hit in answer["hits"]:
            words = (excerpt(hit[name] or "-") for name in ("source", "text"))
            place = [f"{hit['lexical'] or '-'}"] if lexical else []
            table.add_row(str(hit["rank"]), f"{hit['score']:.4g}", str(hit["id"]), *place, *words)
        out.print(table)


def unit_of_scores(total: int) -> str:
    """What scores are estimates of, in a sentence; total: N, how many examples the index has."""
    return (
        "Larger is stronger; trust the order before the size. To first order, under this curvature, damping and choice "
        f"of layers, score / {total:,} is by how many nats the text's loss, summed over its tokens, would rise without "
        "the passage; in fact it is often far fewer."
    )
