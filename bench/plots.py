"""Pictures of the kept results: `docs/quality.svg`, `docs/frontier.svg` and `docs/search_at_scale.svg`.

Nothing is measured here. Each panel names the suite whose JSON it shows; methods without figures are left out.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from bench.environment import RESULTS, ROOT, kept

OURS, OTHERS, PLAIN = "#c0392b", "#2c6fbb", "#8a8a8a"
# Method of bench.lds -> name, colour and marker. Like methods have like colours.
METHODS: dict[str, tuple[str, str, str]] = {
    "library default": ("this library, default", OURS, "*"),
    "library, 8192 bytes": ("this library, 8,192 bytes", OURS, "H"),
    "library, 8192 bytes, refine": ("this library, 8,192 bytes, refined", "#e57fb0", "H"),
    "library, without the head": ("this library, without the head", "#e57fb0", "*"),
    "LoRIF c=1": ("LoRIF as published, c = 1", "#e08e2b", "v"),
    "LoRIF c=4": ("LoRIF as published, c = 4", "#e08e2b", "^"),
    "LoGRA d=16": ("LoGRA, d = 16", "#5aa35a", "s"),
    "LoGRA d=32": ("LoGRA, d = 32", "#5aa35a", "D"),
    "LoGRA (dattri)": ("LoGRA (dattri)", "#226622", "D"),
    "TRAK p=2048": ("TRAK (traker), p = 2048", OTHERS, "o"),
    "EK-FAC (kronfluence)": ("EK-FAC (kronfluence)", "#7b4fa3", "X"),
    "EK-FAC (kronfluence), with the head": ("EK-FAC (kronfluence), with the head", "#7b4fa3", "P"),
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
    "empirical": "this library, empirical",
    "paper": "LoRIF as published",
}
# Where methods that keep nothing for an example stand on the axis of bytes.
NOTHING = 60
Bars = list[tuple[str, float, float]]
"""Name, value, and half the width of its error bar."""


# -- attribution quality -------------------------------------------------------------------------------------------


def scatter(axes: Any, task: str) -> list[Any]:
    """LDS against bytes: filled at the method's own damping, hollow at the best of a sweep. The legend's handles."""
    methods = (kept(f"lds_{task}") or {"methods": {}})["methods"]
    handles = []
    for name, (label, colour, marker) in METHODS.items():
        figures = methods.get(name, {"error": ""})
        if "error" in figures:
            continue
        x, own, best = figures["bytes_per_example"] or NOTHING, figures["lds"][0], figures["best_odd"][0]
        axes.plot([x, x], [own, best], color=colour, lw=1, alpha=0.5, zorder=1)
        style = {"color": colour, "marker": marker, "ls": "", "ms": 13 if marker == "*" else 7}
        axes.plot(x, best, mfc="white", zorder=2, **style)
        handles += axes.plot(x, own, label=label, zorder=3, **style)
    axes.set(xscale="log", title=f"LDS: {TASKS[task]}", xlabel="bytes per example", ylabel="LDS", ylim=(-0.02, 0.75))
    axes.set_xlim(NOTHING / 1.8, 5e5)
    axes.set_xticks([NOTHING, 1e3, 1e4, 1e5], ["none", "1,000", "10,000", "100,000"])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    return handles


def colour_of(name: str) -> str:
    """This library's, another's, or a plain reference's."""
    if name.startswith("this library"):
        return OURS
    return OTHERS if name.startswith(("LoRIF", "TRAK", "EK-FAC", "LoGRA")) else PLAIN


def bars(axes: Any, title: str, what: str, rows: Bars) -> None:
    """Horizontal bars, best on top."""
    ordered = sorted(rows, key=lambda row: row[1])
    for place, (name, value, error) in enumerate(ordered):
        axes.barh(place, value, xerr=error or None, color=colour_of(name), height=0.7, error_kw={"lw": 1})
        text = f"{value:+.2f}" if what.startswith("nats") else f"{value:.3f}"
        axes.annotate(text, (max(value, 0) + error, place), (3, 0), textcoords="offset points", va="center", fontsize=7)
    axes.set_yticks(range(len(ordered)), [row[0] for row in ordered], fontsize=7.5)
    axes.set(title=title, xlabel=what)
    axes.set_xlim(right=axes.get_xlim()[1] * 1.12)
    axes.grid(alpha=0.3, axis="x")
    axes.set_axisbelow(True)


def readable(name: str) -> str:
    """The library's kinds of index by what they are."""
    what, _, kind = name.rpartition("influence, ")
    kind, _, way = kind.partition(", ")
    if kind not in KINDS:
        return name
    words = [f"{what}influence"] if what else []
    words += [way if words else f'normalize="{way}"'] if way else []
    return f"{KINDS[kind]}{': ' if what else ', ' if way else ''}{', '.join(words)}"


def of_others(results: dict[str, Any], key: str) -> dict[str, float]:
    """Other libraries' figures: name and setting -> value."""
    return {
        f"{name}: {setting}": figures[key]
        for name, found in results.items()
        for setting, figures in found.items()
        if isinstance(figures, dict) and key in figures
    }


def tail_patch() -> Bars:
    names = {name: label for name, (label, _, _) in METHODS.items()} | {"random": "random"}
    methods = (kept("tail_patch") or {"methods": {}})["methods"]
    return [(names[name], *figures["top"]) for name, figures in methods.items() if name in names]


def mislabelled() -> Bars:
    """The mean over seeds. Held-out influence normalised otherwise is in the JSON alone: too many to show."""
    values: dict[str, list[float]] = {}
    for run in (kept("mislabelled") or {"mislabelled": {"runs": []}})["mislabelled"]["runs"]:
        for name, figures in run["results"].items():
            if not (name.startswith("held-out influence") and name.endswith(("cosine", "cosine, right", "relatif"))):
                values.setdefault(readable(name), []).append(figures["found"])
    for run in (kept("other_libraries_mislabelled") or {"runs": []})["runs"]:
        for name, value in of_others(run["results"], "found").items():
            values.setdefault(name, []).append(value)
    return [(name, sum(each) / len(each), 0.0) for name, each in values.items()]


def of_suite(suite: str, key: str) -> Bars:
    """Poisoned examples or duplicates."""
    own = (kept("mislabelled") or {}).get("poisoned") if suite == "poisoned" else kept(suite)
    others = (kept(f"other_libraries_{suite}") or {"results": {}})["results"]
    found = (own or {"results": {}})["results"]
    values = {readable(name): figures[key] for name, figures in found.items()} | of_others(others, key)
    return [(name, value, 0.0) for name, value in values.items()]


def quality(figure: Any) -> None:
    figure.set_size_inches(11, 21)
    upper, lower = figure.subfigures(2, 1, height_ratios=(1.45, 1.25))
    panels, handles = upper.subplots(3, 2), {}
    for task, axes in zip(TASKS, panels.flat, strict=False):
        handles |= {handle.get_label(): handle for handle in scatter(axes, task)}
    panels[2, 1].set_axis_off()
    upper.legend(
        handles.values(),
        handles.keys(),
        loc="outside upper center",
        ncols=4,
        fontsize=8,
        title="LDS: filled at each method's own damping, hollow at the best of a sweep",
    )
    panels = lower.subplots(2, 2, height_ratios=(1.4, 1))
    bars(panels[0, 0], "Mislabelled: in the first 10%", "share of all flips", mislabelled())
    bars(panels[0, 1], "Poisoned: among the 20 first", "recall@20", of_suite("poisoned", "recall@20"))
    bars(panels[1, 0], "Tail-patch: a step on the 16 first", "nats of log-probability", tail_patch())
    bars(panels[1, 1], "Duplicates: the first is a parallel", "recall@1", of_suite("duplicates", "recall@1"))


# -- bytes, and search ---------------------------------------------------------------------------------------------


def frontier(figure: Any) -> None:
    """What a stored byte buys on the fine-tuned GPT, and where other methods are."""
    figure.set_size_inches(9, 4)
    axes, methods = figure.subplots(), (kept("lds_finetuned") or {"methods": {}})["methods"]
    sized = {"library default", *(name for name in methods if re.fullmatch(r"library, \d+ bytes", name))}
    rows = sorted(
        (methods[name] for name in sized if "lds" in methods.get(name, {})), key=lambda f: f["bytes_per_example"]
    )
    for label, key, style in (("scores as they are", "lds", "o-"), ("shrunk", "lds_shrunk", "o--")):
        x = [figures["bytes_per_example"] for figures in rows]
        y, error = np.array([figures[key] for figures in rows]).T
        axes.errorbar(x, y, yerr=error, fmt=style, ms=4, lw=1, color=OURS, label=f"this library, {label}")
    for name in ("LoRIF c=1", "LoRIF c=4", "LoGRA d=32", "LoGRA (dattri)", "TRAK p=2048"):
        if "lds" in methods.get(name, {}):
            label, colour, marker = METHODS[name]
            axes.plot(methods[name]["bytes_per_example"], methods[name]["lds"][0], marker, color=colour, label=label)
    for name, style in (("EK-FAC (kronfluence)", ":"), ("EK-FAC (kronfluence), with the head", "-.")):
        if "lds" in methods.get(name, {}):
            axes.axhline(
                methods[name]["lds"][0], ls=style, lw=1, color=METHODS[name][1], label=f"{name}: keeps nothing"
            )
    axes.set(xscale="log", xlabel="bytes per example, without what all share", ylabel="LDS", ylim=(0, 0.8))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def search_at_scale(figure: Any) -> None:
    """Rows rescored for a recall; latency, candidates and batches against their numbers."""
    figure.set_size_inches(9, 7)
    recall, latency, candidates, rate = figure.subplots(2, 2).flat
    for store in ("eigen", "factors"):
        indexes = [e for e in (kept(f"search_at_scale_{store}") or {"indexes": []})["indexes"] if "hot_ms_10" in e]
        ns = [e["n"] for e in indexes]
        for e in (e for e in indexes if "batches" in e):
            for k in (10, 100):
                rows = [r for r in e["recall_held-out"] if r["k"] == k and r["sign"] == "proponents"]
                label = f"{store}, k={k}, N={e['n']:,}"
                recall.plot([r["candidates"] for r in rows], [r["recall"] for r in rows], "o-", label=label)
            sizes, ms = ([b[key] for b in e["batches"]] for key in ("batch", "ms_per_query"))
            rate.plot(sizes, 1e3 / np.array(ms), "o-", label=f"{store}, N={e['n']:,}")
        if not ns:
            continue
        latency.plot(ns, [e["hot_ms_10"] for e in indexes], "o-", label=f"search, {store}")
        latency.plot(ns, [e["scan_hot_ms"] for e in indexes], "s--", label=f"scan, {store}")
        for k in (10, 100):
            candidates.plot(ns, [e[f"candidates_{k}"] for e in indexes], "o-", label=f"{store}, k={k}")
    recall.set(xscale="log", xlabel="rows rescored", ylabel="recall")
    latency.set(xscale="log", yscale="log", xlabel="N", ylabel="ms, one query, warm")
    candidates.set(xscale="log", yscale="log", xlabel="N", ylabel="rows rescored at a recall of .99")
    rate.set(xscale="log", xlabel="queries together", ylabel="queries per second")


PICTURES: dict[str, Callable[[Any], None]] = {
    "quality": quality,
    "frontier": frontier,
    "search_at_scale": search_at_scale,
}


@contextmanager
def drawn(path: Path) -> Iterator[Any]:
    """A figure that is written to a file; the same results give the same bytes."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"font.size": 9, "svg.hashsalt": "lorif", "axes.titlesize": 10})
    figure = pyplot.figure(layout="constrained")
    yield figure
    for axes in figure.axes:
        if axes.get_legend_handles_labels()[0] and len(figure.axes) < 5 and axes.get_legend() is None:
            axes.grid(alpha=0.3)
            axes.legend(fontsize=8)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pictures", nargs="*", default=list(PICTURES), help=f"of {', '.join(PICTURES)}; all by default")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="a folder")
    parser.add_argument("--suffix", default=".svg", help=".png: to look at")
    parsed = parser.parse_args()
    parsed.out.mkdir(parents=True, exist_ok=True)
    for name in parsed.pictures:
        path = parsed.out / f"{name}{parsed.suffix}"
        with drawn(path) as figure:
            PICTURES[name](figure)
        print(f"drawn from {RESULTS.name}/: {path}")


if __name__ == "__main__":
    main()
