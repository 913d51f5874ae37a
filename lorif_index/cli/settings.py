"""Settings: the choices of a build, `BuildConfig`, as flags and in a YAML file; one table makes both.

A command that is `configured` gets a flag for each field, `--config FILE`, and what they say together as its parameter
`settings`. So `build` and `estimate` cannot differ in what they take. Flags win over the file.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fractions import Fraction
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from ..config import (
    COARSE_KINDS,
    COMPLEMENTS,
    CURVATURES,
    DTYPES,
    PARTS,
    PROJECTIONS,
    BuildConfig,
    LayerSelection,
    stores,
)
from ..errors import ConfigError
from .options import byte_count, damping_policy

_PANEL = "Settings of the index, by the names of BuildConfig"


@dataclass(frozen=True)
class Setting:
    """How a field of `BuildConfig` is written.

    Attributes:
        help: one sentence.
        kind: the flag's type.
        least: of an integer.
        parse: makes the field's value of what is written, in a flag or as a string in a file; raises ValueError.
        choices: offered by shell completion.
    """

    help: str
    kind: Any = str
    least: int | None = None
    parse: Callable[[str], Any] | None = None
    choices: tuple[str, ...] = ()


def _count(**words: Any) -> Callable[[str], Any]:
    """Reads an integer or one of some words, each of which stands for a value."""

    def parse(given: str) -> Any:
        if given in words:
            return words[given]
        if not given.isdecimal():
            raise ValueError(f"takes an integer{''.join(f' or {word}' for word in words)}, got {given!r}")
        return int(given)

    return parse


def _projection_dim(given: str) -> int | Fraction | str | None:
    if given in ("auto", "none"):
        return None if given == "none" else given
    try:
        value = Fraction(given)
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"takes an integer, a fraction such as 1/16, auto or none, got {given!r}") from None
    return int(value) if value.denominator == 1 else value


def _listed(words: Sequence[str]) -> str:
    return f"{', '.join(words[:-1])} or {words[-1]}"


def _or_none(given: str) -> str | None:
    return None if given == "none" else given


SETTINGS: dict[str, Setting] = {
    "layers": Setting("Track these layers only: a name or glob pattern; may be repeated.", list[str]),
    "projection_dim": Setting(
        "Width each side of a gradient is projected to: an integer, a fraction, auto or none.", parse=_projection_dim
    ),
    "projection_floor": Setting("Least width that a fraction gives: an integer or auto.", parse=_count(auto="auto")),
    "projection": Setting("eigen, learnt from a sample, or random.", choices=PROJECTIONS),
    "rank": Setting("Factor pairs kept per passage and layer, c: an integer or full.", parse=_count(full=None)),
    "curvature": Setting("Of the loss, ggn, of the gradients, empirical, mixed, or auto.", choices=CURVATURES),
    "curvature_rank": Setting(
        "Curvature directions kept per layer, r: an integer, full or auto.", parse=_count(full=None, auto="auto")
    ),
    "power_iterations": Setting("Subspace iterations of the fit.", int, least=0),
    "damping": Setting("The index's damping: a multiple of trace/D, or RULE:X (see search).", parse=damping_policy),
    "complement": Setting(
        "Weight of directions outside of the curvature's: log-mean, tail-corrected or truncated.", choices=COMPLEMENTS
    ),
    "store": Setting(f"What is kept of a passage: {_listed(stores())}.", choices=stores()),
    "eigen_bytes": Setting("Most bytes of a passage, with store eigen and largest.", int, least=1),
    "dtype": Setting(f"Of stored factors: {_listed(DTYPES)}.", choices=DTYPES),
    "seed": Setting("Of projections and samples.", int, least=0),
    "batch_size": Setting("Passages per pass through the model.", int, least=1),
    "on_nonfinite": Setting("A gradient with inf or NaN: error stops, skip leaves it out.", choices=("error", "skip")),
    "sample.size": Setting("Passages that are fitted on.", int, least=1),
    "sample.rows": Setting(
        "Fit the curvature on the sample, or on all stored rows (published order).", choices=("sample", "stored")
    ),
    "sample.probes": Setting("Random rows a passage of the ggn: an integer or auto.", parse=_count(auto=None)),
    "coarse.kind": Setting("What proposes candidates: auto, flat or none.", choices=COARSE_KINDS),
    "coarse.dim": Setting("Coordinates of a passage, for all layers together.", int, least=1),
    "coarse.sketch": Setting(
        "Directions of the coordinates: auto, pca or per-layer.", choices=("auto", "pca", "per-layer")
    ),
    "coarse.queries": Setting("Passages whose exact answers calibrate searches; 0: none.", int, least=0),
    "compute.device": Setting("Where the model runs: cpu, cuda, ...; auto takes a GPU if there is one."),
    "compute.autocast": Setting(
        "Mixed precision of the forward pass: bfloat16, float16 or none.",
        parse=_or_none,
        choices=("none", "bfloat16", "float16"),
    ),
    "compute.shard_bytes": Setting("Size of a shard's rows, as 64MiB.", parse=byte_count),
    "compute.spool_bytes": Setting("Most disk for temporary rows, as 16GiB.", parse=byte_count),
}
"""Every field of `BuildConfig` and of its objects (a test compares them), in the order of `--help`."""


def flag_of(name: str) -> str:
    """The flag of a setting: its name, without the part that says only where a build is computed."""
    return "--" + name.removeprefix("compute.").replace(".", "-").replace("_", "-")


@dataclass(frozen=True)
class Settings:
    """What flags and a file say of a build.

    Attributes:
        file: a YAML file, or None.
        flags: settings that were given as flags, by their names in `SETTINGS`, as values of `BuildConfig`.
    """

    file: Path | None
    flags: dict[str, Any]

    def read(self) -> tuple[BuildConfig, str]:
        """(the config, where the model is to run).

        Raises:
            ConfigError: what is in the file is not a config, or what both say together is none.
        """
        values = {} if self.file is None else read_config(self.file)
        for name, value in self.flags.items():
            part, _, field = name.rpartition(".")
            if part:
                values[part] = values.get(part, {}) | {field: value}
            else:
                values[name] = value
        # The model is put there, so that the config need not say where it is.
        device = values.get("compute", {}).pop("device", None) or "auto"
        try:
            return BuildConfig.from_json(values), str(device)
        except (ConfigError, TypeError, ValueError, KeyError, ZeroDivisionError) as error:
            raise ConfigError(f"{'' if self.file is None else f'with {self.file}: '}{error}") from None


def read_config(file: Path) -> dict[str, Any]:
    """A YAML file whose keys are fields of `BuildConfig`, as values for `BuildConfig.from_json`.

    Strings may be written as in flags: `rank: full`, `projection_dim: 1/16`, `damping: absolute:0.01`. `layers` is a
    pattern, a list of them, or a mapping of `LayerSelection`'s fields; `sample`, `coarse` and `compute` are mappings of
    their objects' fields, or the value that a bare one stands for: `sample: 2000`, `coarse: flat`.

    Raises:
        ConfigError: not a YAML mapping, an unknown key (the message names the nearest), a value that cannot be read.
        OSError: the file cannot be read.
    """
    try:
        import yaml
    except ImportError:
        raise ConfigError(
            "--config needs PyYAML, which is not installed: install the extra text of lorif-index"
        ) from None

    try:
        written = file.read_bytes()
        _refuse_repeated(yaml.compose(written, Loader=yaml.SafeLoader), str(file))
        found = yaml.safe_load(written)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{file} is not YAML: {error}") from None
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise ConfigError(f"{file} holds a {type(found).__name__}, and settings are a mapping: write lines as rank: 4")
    _known(found, [f.name for f in dataclasses.fields(BuildConfig)], f"{file}: ")
    if isinstance(found.get("layers"), dict):
        _known(found["layers"], [f.name for f in dataclasses.fields(LayerSelection)], f"{file}: layers: ")
    values = {}
    for name, value in found.items():
        if name not in PARTS:
            values[name] = _read(name, value, file)
            continue
        kind, short = PARTS[name]
        part = value if isinstance(value, dict) else {short: "none" if name == "coarse" and value is None else value}
        _known(part, [f.name for f in dataclasses.fields(kind)], f"{file}: {name}: ")
        values[name] = {field: _read(f"{name}.{field}", given, file) for field, given in part.items()}
    return values


def _read(name: str, value: Any, file: Path) -> Any:
    """The value of one setting in a file."""
    parse = SETTINGS[name].parse
    try:
        return parse(value) if parse is not None and isinstance(value, str) else value
    except ValueError as error:
        raise ConfigError(f"{file}: {name} {error}") from None


def _refuse_repeated(node: Any, where: str) -> None:
    """Refuses a key that is there twice, of which YAML's loader would drop the first without a word."""
    if node is None or node.id != "mapping":
        return
    keys = [key.value for key, _ in node.value if isinstance(key.value, str)]
    for key, (_, value) in zip(keys, node.value, strict=False):
        if keys.count(key) > 1:
            raise ConfigError(f"{where}: {key} is there twice: keep one of them")
        _refuse_repeated(value, f"{where}: {key}")


def _known(given: Collection[str], known: Collection[str], where: str) -> None:
    """Refuses keys that are not known, with the nearest of those that are."""
    for key in given:
        if key not in known:
            near = get_close_matches(str(key), known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(sorted(known))}"
            raise ConfigError(f"{where}unknown key {key!r}: {hint}")


def configured(command: Callable[..., None]) -> Callable[..., None]:
    """A command with `settings: Settings` among its parameters, in whose place typer sees `--config` and a flag for
    each setting. (typer reads signatures, so that it is given one.)
    """
    hints = get_type_hints(command, include_extras=True)
    own = [p.replace(annotation=hints[n]) for n, p in inspect.signature(command).parameters.items() if n != "settings"]
    flags = [_flag(name, setting) for name, setting in SETTINGS.items()]
    file = typer.Option(
        "--config",
        metavar="FILE",
        help="A YAML file of the settings below; flags win over it.",
        rich_help_panel=_PANEL,
    )
    kind = inspect.Parameter.KEYWORD_ONLY
    config = inspect.Parameter("config", kind, default=None, annotation=Annotated[Path | None, file])

    @wraps(command)
    def run(**arguments: Any) -> None:
        written = {name: arguments.pop(_variable(name)) for name in SETTINGS}
        settings = Settings(arguments.pop("config"), _values(written))
        command(settings=settings, **arguments)

    parameters = [p.replace(kind=kind) for p in own] + [config, *flags]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    return run


def _values(written: dict[str, Any]) -> dict[str, Any]:
    """Flags that were given, as values.

    Raises:
        typer.BadParameter: one that cannot be read.
    """
    values = {}
    for name, value in written.items():
        if value is None or value == []:
            continue
        parse = SETTINGS[name].parse
        try:
            values[name] = value if parse is None else parse(value)
        except ValueError as error:
            raise typer.BadParameter(f"{flag_of(name)} {error}") from None
    return values


def _variable(name: str) -> str:
    return flag_of(name).removeprefix("--").replace("-", "_")


def _flag(name: str, setting: Setting) -> inspect.Parameter:
    """The parameter of one setting: None unless it is given; the help says what then holds."""
    default: Any = BuildConfig().to_json()
    for part in name.split("."):
        default = default[part]
    shown = {"layers": "all but embeddings and head", "damping": "relative:0.1"}.get(name)
    if shown is None and setting.parse is byte_count:
        shown = f"{default >> 30}GiB" if default >= 1 << 30 else f"{default >> 20}MiB"
    elif shown is None and default is None:
        shown = "none" if setting.choices else "auto"
    offered = setting.choices
    option = typer.Option(
        flag_of(name),
        min=setting.least,
        help=setting.help,
        show_default=str(default) if shown is None else shown,
        rich_help_panel=_PANEL,
        autocompletion=(lambda: list(offered)) if offered else None,
    )
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(_variable(name), kind, default=None, annotation=Annotated[setting.kind | None, option])
