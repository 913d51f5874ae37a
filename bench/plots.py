"""One picture of the attribution quality suites, from the results that are kept: `docs/quality.svg`.

Nothing is measured here. Each panel names the command whose JSON it shows; methods without figures are left out.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench.environment import RESULTS, ROOT

OURS, OTHERS, PLAIN = "#c0392b", "#2c6fbb", "#8a8a8a"
# Method of bench.lds -> name, colour and marker. Like methods have like colours.
METHODS: dict[str, tuple[str, str, str]] = {
    "library default": ("this library, default", OURS, "*"),
    "library, 8192 bytes": ("this library, 8,192 bytes", OURS, "H"),
    "library, largest, 512 bytes": ("this library, largest of groups, 512 bytes", "#e57fb0", "p"),
    "library, largest, 1600 bytes": ("this library, largest of groups, 1,600 bytes", "#e57fb0", "*"),
    "library, both": ('this library, store="both"', OURS, "P"),
    "LoRIF c=1": ("LoRIF as published, c = 1", "#e08e2b", "v"),
    "LoRIF c=4": ("LoRIF as published, c = 4", "#e08e2b", "^"),
    "LoGRA d=16": ("LoGRA, d = 16", "#5aa35a", "s"),
    "LoGRA d=32": ("LoGRA, d = 32", "#5aa35a", "D"),
    "LoGRA (dattri)": ("LoGRA (dattri)", "#226622", "D"),
    "TRAK p=2048": ("TRAK (traker), p = 2048", OTHERS, "o"),
    "EK-FAC (kronfluence)": ("EK-FAC (kronfluence)", "#7b4fa3", "X"),
    "gradient dot": ("gradient dot", PLAIN, "<"),
    "gradient cosine": ("gradient cosine", PLAIN, ">"),
}
TASKS = {
    "digits": "digits, MLP",
    "fashion": "Fashion-MNIST, CNN",
    "finetuned": "GPT, fine-tuned on source code",
    "scratch": "GPT, source code from scratch",
    "bible": "GPT, fine-tuned on the Bible",
}
KINDS = {
    "default": "this library",
    "largest": "this library, largest of groups",
    "empirical": "this library, empirical",
    "paper": "LoRIF as published",
}
# Where methods that keep nothing for an example stand on the axis of bytes.
NOTHING = 60


def kept(name: str) -> dict[str, Any] | None:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def scatter(axes: Any, task: str) -> list[Any]:
    """LDS against bytes: filled at the method's own damping, hollow at the best of a sweep. The legend's handles."""
    found = kept(f"lds_{task}")
    handles = []
    for name, (label, colour, marker) in METHODS.items():
        figures = (found or {"methods": {}})["methods"].get(name, {"error": ""})
        if "error" in figures:
            continue
        x = figures["bytes_per_example"] or NOTHING
        size = 13 if marker == "*" else 7
        axes.plot([x, x], [figures["lds"][0], figures["best_odd"][0]], color=colour, lw=1, alpha=0.5, zorder=1)
        style = {"color": colour, "marker": marker, "ls": "", "ms": size}
        axes.plot(x, figures["best_odd"][0], mfc="white", zorder=2, **style)
        handles += axes.plot(x, figures["lds"][0], label=label, zorder=3, **style)
    axes.set(xscale="log", title=f"LDS: {TASKS[task]}", xlabel="bytes per example", ylabel="LDS", ylim=(-0.02, 0.75))
    axes.set_xlim(NOTHING / 1.8, 5e5)
    axes.set_xticks([NOTHING, 1e3, 1e4, 1e5], ["none", "1,000", "10,000", "100,000"])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    return handles


def ensembles(axes: Any) -> None:
    """LDS of 1, 2 and 4 checkpoints against bytes."""
    styles = {
        "default, bytes for each member": (OURS, "o", "-"),
        "eigencodes, bytes of one for all": (PLAIN, "s", "--"),
    }
    for task in ("digits", "finetuned"):
        rows = (kept(f"ensembles_{task}") or {"rows": []})["rows"]
        for stored, (colour, marker, line) in styles.items():
            points = [r for r in rows if r["stored"] == stored and r["members"] == list(range(len(r["members"])))]
            if not points:
                continue
            xs, ys = [r["bytes"] for r in points], [r["lds"][0] for r in points]
            errors = [r["lds"][1] for r in points]
            label = stored.replace("default, bytes for each member", "default: so many times the bytes")
            label = label.replace("eigencodes, bytes of one for all", "eigencodes: the bytes of one for all")
            axes.errorbar(
                xs,
                ys,
                yerr=errors,
                color=colour,
                marker=marker,
                ls=line,
                ms=4,
                lw=1,
                label=label if task == "digits" else None,
            )
            for r, x, y in zip(points, xs, ys, strict=True):
                axes.annotate(str(len(r["members"])), (x, y), textcoords="offset points", xytext=(5, 5), fontsize=8)
        if rows:
            at = rows[0]
            axes.annotate(
                TASKS[task].split(",")[0], (at["bytes"], at["lds"][0]), (-6, 14), textcoords="offset points", ha="right"
            )
    axes.set(xscale="log", title="LDS: ensembles of 1, 2 and 4 checkpoints", xlabel="bytes per example", ylabel="LDS")
    axes.set(xlim=(80, 2e4), ylim=(0.13, 0.78))
    axes.set_xticks([100, 1e3, 1e4], ["100", "1,000", "10,000"])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7.5, loc="lower left")


def bars(axes: Any, title: str, what: str, rows: Iterable[tuple[str, float, float, str]]) -> None:
    """Horizontal bars, best on top: (name, value, half width of the error bar, colour)."""
    ordered = sorted(rows, key=lambda row: row[1])
    for place, (_, value, error, colour) in enumerate(ordered):
        axes.barh(place, value, xerr=error or None, color=colour, height=0.7, error_kw={"lw": 1})
        text = f"{value:+.2f}" if what.startswith("nats") else f"{value:.3f}"
        axes.annotate(text, (max(value, 0) + error, place), (3, 0), textcoords="offset points", va="center", fontsize=7)
    axes.set_yticks(range(len(ordered)), [row[0] for row in ordered], fontsize=7.5)
    axes.set(title=title, xlabel=what)
    axes.set_xlim(right=axes.get_xlim()[1] * 1.12)
    axes.grid(alpha=0.3, axis="x")
    axes.set_axisbelow(True)


def colour_of(name: str) -> str:
    """This library's, another's, or a plain reference's."""
    if name.startswith("this library"):
        return OURS
    known = ("LoRIF", "TRAK", "EK-FAC", "LoGRA")
    return OTHERS if name.startswith(known) else PLAIN


def tail_patch() -> list[tuple[str, float, float, str]]:
    rows = []
    for name, figures in (kept("tail_patch") or {"methods": {}})["methods"].items():
        label = (
            METHODS[name][0]
            if name in METHODS
            else {"TRAK p=1024": "TRAK (traker), p = 1024", "random": "random"}.get(name)
        )
        if label is not None:
            rows.append((label, *figures["top"], colour_of(label)))
    return rows


def readable(name: str) -> str:
    """The library's kinds of index by what they are."""
    for kind, label in KINDS.items():
        for pattern in (kind, f"{kind}, relatif"):
            if name == pattern:
                return label + (', normalize="relatif"' if name.endswith("relatif") else "")
        for what in ("self-influence", "held-out influence"):
            if name == f"{what}, {kind}":
                return f"{label}: {what}"
            if name == f"{what}, {kind}, relatif, right":
                return f"{label}: {what}, relatif, right"
    return name


def of_others(results: dict[str, Any], key: str) -> dict[str, float]:
    """Other libraries' figures: name and setting -> value."""
    out = {}
    for name, found in results.items():
        for setting, figures in found.items():
            if isinstance(figures, dict) and key in figures:
                out[f"{name}: {setting}"] = figures[key]
    return out


def mislabelled() -> list[tuple[str, float, float, str]]:
    found, others = kept("mislabelled"), kept("other_libraries_mislabelled")
    values: dict[str, list[float]] = {}
    if found:
        for name in found["mislabelled"]["summary"]:
            if name.startswith("held-out influence") and name.endswith(("cosine", "cosine, right", "relatif")):
                # In the JSON alone: too many to show.
                continue
            values[readable(name)] = [run["results"][name]["found"] for run in found["mislabelled"]["runs"]]
    for run in others["runs"] if others else []:
        for name, value in of_others(run["results"], "found").items():
            values.setdefault(name, []).append(value)
    rows = []
    for name, each in values.items():
        rows.append((name, sum(each) / len(each), 0.0, colour_of(name)))
    return rows


def of_suite(suite: str, key: str) -> list[tuple[str, float, float, str]]:
    """Poisoned examples or duplicates."""
    own = (kept("mislabelled") or {}).get("poisoned") if suite == "poisoned" else kept(suite)
    others = (kept(f"other_libraries_{suite}") or {"results": {}})["results"]
    found = (own or {"results": {}})["results"]
    values = {readable(name): figures[key] for name, figures in found.items()} | of_others(others, key)
    return [(name, value, 0.0, colour_of(name)) for name, value in values.items()]


def draw(path: Path, also: Path | None = None) -> None:
    """Writes the picture; the same results give the same bytes. `also`: a PNG to look at."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"font.size": 9, "svg.hashsalt": "lorif", "axes.titlesize": 10})
    figure = pyplot.figure(figsize=(11, 21), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=(1.45, 1.25))
    panels = upper.subplots(3, 2)
    handles = {}
    for task, axes in zip(TASKS, panels.flat, strict=False):
        handles |= {handle.get_label(): handle for handle in scatter(axes, task)}
    ensembles(panels[2, 1])
    upper.legend(
        handles.values(),
        handles.keys(),
        loc="outside upper center",
        ncols=4,
        fontsize=8,
        title="LDS: filled at each method's own damping, hollow at the best of a sweep",
    )
    panels = lower.subplots(2, 2, height_ratios=(1.4, 1))
    few = len((kept("other_libraries_mislabelled") or {"runs": []})["runs"])
    many = len((kept("mislabelled") or {"mislabelled": {"runs": []}})["mislabelled"]["runs"])
    what = f"share of all flips; other libraries: {few} of {many} seeds" if few else "share of all flips"
    bars(panels[0, 0], "Mislabelled: in the first 10%", what, mislabelled())
    bars(panels[0, 1], "Poisoned: among the 20 first", "recall@20", of_suite("poisoned", "recall@20"))
    bars(panels[1, 0], "Tail-patch: a step on the 16 first", "nats of log-probability", tail_patch())
    bars(panels[1, 1], "Duplicates: the first is a parallel", "recall@1", of_suite("duplicates", "recall@1"))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    if also is not None:
        figure.savefig(also, dpi=90)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "quality.svg")
    parser.add_argument("--png", type=Path, default=None, help="also as a PNG, to look at")
    parsed = parser.parse_args()
    draw(parsed.out, parsed.png)
    print(f"drawn from {RESULTS.name}/: {parsed.out}")


if __name__ == "__main__":
    main()
