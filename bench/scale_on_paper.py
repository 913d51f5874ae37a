"""What does an index of up to a billion examples of up to 70 billion parameters take? Tables of `docs/scale.md`.

No measurement: the package's own formulas (`lorif_index.build.sizes` and `traffic`, which `bench.costs estimate` and
`bench.scaling` compare with builds), at shapes of public models. Prints Markdown; `--write` puts it into the page.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from lorif_index import BuildConfig
from lorif_index.build.choice import widest
from lorif_index.build.sizes import ENTRY_BYTES, Shapes
from lorif_index.build.traffic import build_traffic, search_traffic
from lorif_index.capture import eigenbases
from lorif_index.capture.data import batch_examples
from lorif_index.capture.gradients import SIDES, LayerSpec
from lorif_index.capture.layers import TrackedLayer, Use, layer_specs
from lorif_index.config import LEAST_FLOOR
from lorif_index.curvature.fit import thinning
from lorif_index.linalg.subspace import GROUP_BYTES, grouped, together_bytes
from lorif_index.search.candidates import most_proposed
from lorif_index.storage.manifest import LARGEST

PAGE = Path(__file__).parent.parent / "docs" / "scale.md"
COUNTS = (10**6, 10**8, 10**9)
# Of an example, in tokens.
LENGTH = 512
# Of a batch by default.
EXAMPLES = batch_examples("auto", LENGTH)
# What a GPU is taken to sustain: 40% of an H100's 989e12 dense operations a second in bfloat16.
RATE = 0.4e15
# Of a row in the coarse stage, by one thread: shortened rows that were turned round, a million of them
# (docs/choosing.md).
SECONDS_A_CODE = 9.3e-9
# Of the fitting sample, one probe for each example beside its own gradient: the default for language models.
PROBES = 1
BATCH = 8
"""Examples of a batch, where inputs are held."""


def _layer(name: str, inputs: int, outputs: int, bias: bool, words: str | None = None) -> TrackedLayer:
    """A linear map without its weight."""
    use = Use(name, nn.Identity(), False, inputs, outputs, bias)
    return TrackedLayer(name, (use,), inputs + bias, outputs, bias, words)


@dataclass(frozen=True)
class Shape:
    """The linear maps of a model's blocks and its head, which are what is tracked.

    Attributes:
        name, source: of the model.
        blocks: how many.
        maps: (inputs, outputs) of each linear map in a block.
        bias: whether they have one.
        head: (inputs, words) of the head, which has none; None: it is not trained.
        parameters: of the whole model.
    """

    name: str
    source: str
    blocks: int
    maps: tuple[tuple[int, int], ...]
    bias: bool
    head: tuple[int, int] | None
    parameters: float

    def index(self, config: BuildConfig) -> Shapes:
        """The shapes of an index of it."""
        return Shapes(self.config(config), self.specs(config), config.store)

    def specs(self, config: BuildConfig) -> dict[str, LayerSpec]:
        """The layers as an index of the model has them."""
        return layer_specs(self._layers, self.config(config))

    @property
    def _layers(self) -> list[TrackedLayer]:
        layers = [_layer(str(i), *sides, self.bias) for i, sides in enumerate(self.blocks * self.maps)]
        return layers if self.head is None else [*layers, _layer("head", *self.head, False, words="out")]

    def config(self, config: BuildConfig) -> BuildConfig:
        """With what a build of the model chooses: widths, and how large a sample is."""
        given = config.projection_dim != "auto" or config.projection_floor != "auto"
        return config if given else widest(config, self._layers)


GPT2 = Shape(
    "GPT-2 small, 0.1B",
    "Radford et al. 2019, Language Models are Unsupervised Multitask Learners: 12 blocks, width 768",
    12,
    ((768, 2304), (768, 768), (768, 3072), (3072, 768)),
    True,
    (768, 50257),
    0.124e9,
)
SEVEN = Shape(
    "Llama 2 7B",
    "Touvron et al., arXiv:2307.09288, and its released configuration: 32 blocks, width 4,096, feed-forward 11,008",
    32,
    (*4 * ((4096, 4096),), (4096, 11008), (4096, 11008), (11008, 4096)),
    False,
    (4096, 32000),
    6.74e9,
)
SEVENTY = Shape(
    "Llama 2 70B",
    "the same: 80 blocks, width 8,192, 8 heads of 128 for keys and values, feed-forward 28,672",
    80,
    ((8192, 8192), (8192, 1024), (8192, 1024), (8192, 8192), (8192, 28672), (8192, 28672), (28672, 8192)),
    False,
    (8192, 32000),
    69.0e9,
)
LORA = Shape(
    "Llama 2 7B, LoRA of rank 16 on every map",
    "the same, with adapters (Hu et al., arXiv:2106.09685): two small maps for each",
    32,
    tuple(pair for inputs, outputs in SEVEN.maps for pair in ((inputs, 16), (16, outputs))),
    False,
    None,
    6.74e9,
)
EXPERTS = Shape(
    "Mixture of experts, 8 x 7B",
    "Jiang et al., arXiv:2401.04088: 32 blocks, width 4,096, 8 experts of 14,336, gate and up in one map",
    32,
    (
        *((4096, 4096), (4096, 1024), (4096, 1024), (4096, 4096), (4096, 8)),
        *(8 * ((4096, 28672), (14336, 4096))),
    ),
    False,
    (4096, 32000),
    46.7e9,
)
SHAPES = (GPT2, SEVEN, SEVENTY)
"""With other settings, too."""

DEFAULT = BuildConfig(store="eigen")
CONFIGS = {
    "default": DEFAULT,
    "projection_dim=64": dataclasses.replace(DEFAULT, projection_dim=64),
    "projection_dim=32": dataclasses.replace(DEFAULT, projection_dim=32),
    "the same, store='factors'": dataclasses.replace(DEFAULT, projection_dim=32, store="factors"),
}


def units(size: float) -> str:
    """Bytes, in powers of 1,000."""
    for name in ("B", "kB", "MB", "GB", "TB"):
        if size < 999.5:
            return f"{size:.3g} {name}"
        size /= 1000
    return f"{size:,.4g} PB"


def number(count: float) -> str:
    names = {10**9: "B", 10**6: "M", 10**3: "k"}
    return next((f"{count / n:,.3g}{name}" for n, name in names.items() if count >= n), f"{count:,.3g}")


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:,.0f} ms" if seconds > 0.02 else f"{1e3 * seconds:.2g} ms"


def hours(seconds: float) -> str:
    return f"{seconds / 3600:,.2g}" if seconds < 360_000 else f"{seconds / 3600:,.0f}"


def markdown(rows: list[list[str]]) -> str:
    head, *rest = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([head, "|" + "---|" * len(rows[0]), *rest])


def _width(specs: dict[str, LayerSpec]) -> int:
    return sum(spec.dim for spec in specs.values())


def _walks(specs: dict[str, LayerSpec]) -> int:
    """Over the sample, that learnt projections take."""
    sides = eigenbases.side_fits(specs, eigenbases.fitted_sides(specs), 0, torch.device("cpu"))
    return len(list(grouped(sides)))


def _fit_passes(shape: Shape) -> int:
    """Examples that the model is run on before the first row is written, each as often as it is."""
    specs, sample = shape.specs(DEFAULT), shape.config(DEFAULT).sample.size
    probed = -(-sample // thinning(sample, specs, PROBES + 1))
    return _walks(specs) * min(_learnt_from(specs), sample) + sample + PROBES * probed


def _learnt_from(specs: dict[str, LayerSpec]) -> int:
    """Examples that projections are learnt from."""
    widest = max(spec.side(side)[0] for spec in specs.values() for side in SIDES if spec.projected(side))
    return min(max(eigenbases.LEAST, -(-eigenbases.POSITIONS * widest // LENGTH)), eigenbases.SAMPLE)


def _pass_seconds(shape: Shape) -> float:
    """Of one example's forward and backward pass without parameters' gradients: 2 operations a parameter, token and
    pass."""
    return 4 * shape.parameters * LENGTH / RATE


def shapes() -> str:
    """What is tracked, and how wide its projected gradients are."""
    rows = [["model", "linear maps", "settings", "d of the widest map", "sum of D", "an example's gradient", "a batch"]]
    for shape in SHAPES:
        for name, config in list(CONFIGS.items())[:3]:
            specs = shape.specs(config)
            widest = max(specs.values(), key=lambda spec: spec.dim)
            each = 4 * _width(specs)
            row = [shape.name, str(len(specs)), name, f"{widest.d_in} x {widest.d_out}", number(_width(specs))]
            rows.append([*row, units(each), units(each * EXAMPLES)])
    return markdown(rows)


def defaults() -> str:
    """What a build by the default takes of each of 8 ranks, N = 1M."""
    head = "model|linear maps|sum of D|passes of the fit|memory of a rank|learning projections|sample on disk"
    rows = [[*head.split("|"), "files", "rows", "sent by a rank", "calibration questions"]]
    for shape in (*SHAPES, LORA, EXPERTS):
        index, config, specs = shape.index(DEFAULT), shape.config(DEFAULT), shape.specs(DEFAULT)
        sides = eigenbases.side_fits(specs, eigenbases.fitted_sides(specs), 0, torch.device("cpu"))
        # Of every map its inputs in half precision, of a batch, until the gradients are there.
        held = 2 * BATCH * LENGTH * sum(spec.width_in for spec in specs.values())
        most = max(size for stage, size in index.memory(COUNTS[0], ranks=8).items() if stage != "search")
        sizes = [most, held + min(together_bytes(sides.values()), GROUP_BYTES), 8 * _width(specs) * config.sample.size]
        sent = sum(build_traffic(index, COUNTS[0], 8).most().values())
        disk = index.disk(COUNTS[0])
        sizes += [sum(index.fits().values()), disk.rows, sent]
        texts = [shape.name, str(len(specs)), number(_width(specs)), number(_fit_passes(shape))]
        rows.append([*texts, *map(units, sizes), str(index.queries(COUNTS[0]))])
    return markdown(rows)


def fits() -> str:
    """What is fitted once, whatever N is."""
    head = "model|settings|sample on disk|walks for projections|held by curvature|held by sketch|files"
    rows = [[*head.split("|"), "sent by a rank of 8", "of 64"]]
    for shape in SHAPES:
        for name, config in CONFIGS.items():
            specs = shape.specs(config)
            sample = 4 * _width(specs) * shape.config(config).sample.size
            index = shape.index(config)
            held = index.memory(COUNTS[0])
            sent = [
                sum(
                    size
                    for stage, size in build_traffic(index, COUNTS[0], ranks).most().items()
                    if stage in ("projections", "curvature", "codec", "sketch")
                )
                for ranks in (8, 64)
            ]
            kept = units(2 * sample) if sample <= config.compute.spool_bytes else f"{units(2 * sample)}: not kept"
            sizes = [held["curvature"], held["sketch"], sum(index.fits().values()), *sent]
            rows.append([shape.name, name, kept, str(_walks(specs)), *map(units, sizes)])
    return markdown(rows)


def rows_on_disk() -> str:
    """Rows, by codec, and the number of shards that they make."""
    ways: list[tuple[str, BuildConfig]] = [
        ("eigen (default), at most", DEFAULT),
        ("factors, c=1, projection_dim=64", dataclasses.replace(DEFAULT, projection_dim=64, store="factors")),
        ("factors, c=1", dataclasses.replace(DEFAULT, projection_floor=LEAST_FLOOR, store="factors")),
    ]
    rows = [["model", "rows", "bytes a row", *(f"N = {number(n)}" for n in COUNTS), "shards", "manifest", "at 1 GiB"]]
    for shape in SHAPES:
        for name, config in ways:
            if "factors" not in name and shape is not SHAPES[0]:
                continue
            sizes = [shape.index(config).disk(n) for n in COUNTS]
            each = max(sizes[0].row, 8)
            shards, larger = (-(-COUNTS[-1] * each // size) for size in (config.compute.shard_bytes, 1 << 30))
            refused = " (refused)" if shards * ENTRY_BYTES > LARGEST else ""
            rows.append(
                [shape.name if "factors" in name else "any", name, f"{sizes[0].row:,}"]
                + [units(size.rows + size.coarse) for size in sizes]
                + [f"{shards:,}", units(shards * ENTRY_BYTES) + refused, f"{larger:,}, {units(larger * ENTRY_BYTES)}"]
            )
    return markdown(rows)


def searches() -> str:
    """What each rank holds, sends and takes in a search, and in calibration."""
    head = "N|ranks|coarse codes|ids|open files, 64 MiB / 1 GiB shards|coarse stage, a query|sent, a query"
    rows = [[*head.split("|"), "calibration holds", "and sends"]]
    index = GPT2.index(DEFAULT)
    for count in COUNTS:
        for ranks in (1, 8, 64):
            own = -(-count // ranks)
            row, code = index.rows.row, index.disk(1).code
            files = [-(-own * row // size) for size in (DEFAULT.compute.shard_bytes, 1 << 30)]
            held = index.memory(count, ranks=ranks)["calibration"]
            sent = build_traffic(index, count, ranks).most()["calibration"] if ranks > 1 else 0
            asked = search_traffic(index, count, ranks, k=100).most()["candidates"]
            rows.append(
                [number(count), str(ranks), units(own * code), units(8 * own)]
                + [" / ".join(f"{n:,}" for n in files), milliseconds(own * SECONDS_A_CODE)]
                + [units(asked if ranks > 1 else 0), units(held), units(sent)]
            )
    return markdown(rows)


def passes() -> str:
    """GPU hours of forward and backward passes."""
    rows = [["model", "bfloat16 weights", "fitting", *(f"N = {number(n)}" for n in COUNTS)]]
    for shape in SHAPES:
        each = _pass_seconds(shape)
        rows.append(
            [shape.name, units(2 * shape.parameters), hours(_fit_passes(shape) * each)]
            + [hours(n * each) for n in COUNTS]
        )
    return markdown(rows)


def limits() -> str:
    """Where a setting must be turned."""
    index = GPT2.index(DEFAULT)
    row, code = index.rows.row, index.disk(1).code

    def calibrating(ranks: int) -> int:
        return build_traffic(index, COUNTS[-1], ranks).most()["calibration"]

    wide = DEFAULT.compute.spool_bytes // (4 * DEFAULT.sample.size)
    rows = [
        ["what", "stops", "turn"],
        [
            "a batch's projected gradients, 4 B x sum of D x `batch_size`, in 16 GiB",
            f"sum of D above {number((16 << 30) / (4 * EXAMPLES))}",
            "`projection_dim`, `batch_size`",
        ],
        [
            "the sample's gradients on temporary disk, 16 GiB: beyond, passes over the model take their place",
            f"sum of D above {number(wide)}",
            "`projection_dim`, `Compute(spool_bytes=)`, `sample`; ranks each keep their part",
        ],
        [
            "open files: each shard that is scanned, twice where rows are gathered, of a usual limit of 1,024",
            f"N above {number(1024 * DEFAULT.compute.shard_bytes // row)} at {row:,} B a row",
            "`Compute(shard_bytes=)`, `ulimit -n`, ranks",
        ],
        [
            f"one manifest of at most 256 MiB, {ENTRY_BYTES} B a shard, written anew with each",
            f"N above {number(LARGEST // ENTRY_BYTES * DEFAULT.compute.shard_bytes // row)} at {row:,} B a row",
            "`Compute(shard_bytes=)`; a folder for each rank, which has its own manifest",
        ],
        [
            f"bytes that calibration sends over 64 ranks: all proposals of up to {most_proposed(10**9):,} a rank and "
            "query, to all",
            f"{units(calibrating(64))} a rank at 1B",
            "`CoarseIndex(queries=)`; fewer ranks; 0: searches begin with a guess, and go on by what they see",
        ],
        [
            f"the coarse index in memory, {code} B a row, put together by the leader of a folder, twice, in 256 GiB",
            f"N above {number((256 << 30) // (2 * code))}",
            "a folder for each rank, or machine; `coarse=None` and scans",
        ],
        ["ids of a rank's rows in memory, 8 B each, in 64 GiB", f"N / K above {number((64 << 30) // 8)}", "ranks"],
        ["recall that takes more proposals than that", "a search scans instead, and says why", "`recall`, `k`"],
    ]
    return markdown(rows)


TABLES = {
    "shapes": shapes,
    "defaults": defaults,
    "fits": fits,
    "rows": rows_on_disk,
    "searches": searches,
    "passes": passes,
    "limits": limits,
}


def filled(page: str) -> str:
    """The page with its tables as they are computed; each stands between `<!-- name -->` and `<!-- end -->`."""
    for name, table in TABLES.items():
        text = f"<!-- {name} -->\n{table()}\n<!-- end -->"
        page, there = re.subn(rf"<!-- {name} -->\n.*?<!-- end -->", lambda _, text=text: text, page, flags=re.DOTALL)
        if there != 1:
            raise SystemExit(f"{PAGE} has {there} places for the table {name!r}")
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="into docs/scale.md")
    if parser.parse_args().write:
        PAGE.write_text(filled(PAGE.read_text()))
    for name, table in TABLES.items():
        print(f"## {name}\n\n{table()}\n")


if __name__ == "__main__":
    main()
