"""Settings: the choices of a build, `BuildConfig`, as flags and in a YAML file; one table makes both.

A command that is `configured` gets a flag for each field, `--config FILE`, and what they say together as its parameter
`settings`. So `build` and `estimate` cannot differ in what they take. Flags win over the file.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from ..config import COARSE_KINDS, COMPLEMENTS, CURVATURES, DTYPES, PARTS, PROJECTIONS, BuildConfig, stores
from ..errors import ConfigError
from ..text.yamlfile import read_yaml
from .options import byte_count, damping_policy

_PANEL = "Settings of the index, by the names of BuildConfig"


def _plain(given: str) -> Any:
    """An integer, or a word."""
    return int(given) if given.isdecimal() else given


def _words(**words: Any) -> Callable[[str], Any]:
    """Reads words that stand for a value, and all else plainly."""
    return lambda given: words[given] if given in words else _plain(given)


def _fraction(given: str) -> Any:
    return Fraction(given) if "/" in given or "." in given else _words(none=None)(given)


@dataclass(frozen=True)
class Setting:
    """How a field of `BuildConfig` is written.

    Attributes:
        help: one sentence.
        parse: makes the field's value of what is written, in a flag or as a string in a file; raises ValueError.
        default: how the field's default is written.
    """

    help: str
    parse: Callable[[str], Any] = _plain
    default: str | None = None


def _among(words: Sequence[str]) -> str:
    return f"{', '.join(words[:-1])} or {words[-1]}"


SETTINGS: dict[str, Setting] = {
    "layers": Setting(
        "Track these layers only: a name or glob pattern; may be repeated.", default="all but embeddings"
    ),
    "projection_dim": Setting(
        "Width each side of a gradient is projected to: an integer, a fraction, auto or none.", _fraction
    ),
    "projection_floor": Setting("Least width that a fraction gives: an integer or auto."),
    "projection": Setting(f"Learnt from a sample, or random: {_among(PROJECTIONS)}."),
    "rank": Setting("Factor pairs kept per passage and layer, c: an integer or full.", _words(full=None)),
    "curvature": Setting(f"Of the loss, ggn, of the gradients, empirical, or both: {_among(CURVATURES)}."),
    "curvature_rank": Setting("Curvature directions kept per layer, r: an integer, full or auto.", _words(full=None)),
    "power_iterations": Setting("Subspace iterations of the fit."),
    "damping": Setting(
        "The index's damping: auto, by a row's bytes; a multiple of trace/D; or RULE:X (see search).",
        damping_policy,
        "auto",
    ),
    "complement": Setting(f"Weight of directions outside of the curvature's: {_among(COMPLEMENTS)}."),
    "store": Setting(f"What is kept of a passage: {_among(stores())}."),
    "eigen_bytes": Setting("Most bytes of a passage, with store eigen: an integer or auto."),
    "dtype": Setting(f"Of stored factors: {_among(DTYPES)}."),
    "seed": Setting("Of projections and samples."),
    "batch_size": Setting("Passages per pass through the model: an integer, or auto, by their tokens."),
    "on_nonfinite": Setting("A gradient with inf or NaN: error stops, skip leaves it out."),
    "sample.size": Setting("Passages that are fitted on."),
    "sample.rows": Setting("Fit the curvature on the sample, or on all stored rows (published order)."),
    "sample.probes": Setting("Random rows a passage of the ggn: an integer or auto.", _words(auto=None), "auto"),
    "coarse.kind": Setting(f"What proposes candidates: {_among(COARSE_KINDS)}."),
    "coarse.dim": Setting("Coordinates of a passage, for all layers together."),
    "coarse.sketch": Setting("Directions of the coordinates: auto, pca or per-layer."),
    "coarse.queries": Setting("Passages whose exact answers calibrate searches; 0: none."),
    "compute.device": Setting(
        "Where the model runs: cpu, cuda, ...; auto takes a GPU if there is one.", default="auto"
    ),
    "compute.autocast": Setting(
        "Mixed precision of the forward pass: bfloat16, float16 or none.", _words(none=None), "none"
    ),
    "compute.shard_bytes": Setting("Size of a shard's rows, as 64MiB.", byte_count, "64MiB"),
    "compute.spool_bytes": Setting("Most disk for temporary rows, as 16GiB.", byte_count, "16GiB"),
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
        flags: settings that were given as flags, as they were written, by their names in `SETTINGS`.
    """

    file: Path | None
    flags: dict[str, Any]

    def read(self) -> tuple[BuildConfig, str]:
        """(the config, where the model is to run).

        Raises:
            ConfigError: what is in the file is not a config, or what both say together is none.
        """
        written = ({} if self.file is None else _written(self.file)) | self.flags
        values: dict[str, Any] = {}
        name = ""
        try:
            for name, value in written.items():
                part, _, field = name.rpartition(".")
                if isinstance(value, str) and name in SETTINGS:
                    value = SETTINGS[name].parse(value)
                (values.setdefault(part, {}) if part else values)[field] = value
            name = ""
            # The model is put there, so that the config need not say where it is.
            device = values.get("compute", {}).pop("device", None) or "auto"
            return BuildConfig.from_json(values), str(device)
        except (ConfigError, TypeError, ValueError, KeyError, ZeroDivisionError) as error:
            where = "" if self.file is None else f"with {self.file}: "
            raise ConfigError(f"{where}{name and f'{name} '}{error}") from None


def _written(file: Path) -> dict[str, Any]:
    """A YAML file whose keys are fields of `BuildConfig`, by the names in `SETTINGS`.

    Strings may be written as in flags: `rank: full`, `projection_dim: 1/16`, `damping: absolute:0.01`. `layers` is a
    pattern, a list of them, or a mapping of `LayerSelection`'s fields; `sample`, `coarse` and `compute` are mappings of
    their objects' fields, or the value that a bare one stands for: `sample: 2000`, `coarse: flat`.

    Raises:
        ConfigError: not a YAML mapping, or a key twice. OSError: the file cannot be read.
    """
    found = read_yaml(file, "--config")
    if not isinstance(found, dict | None):
        raise ConfigError(f"{file} holds a {type(found).__name__}, and settings are a mapping: write lines as rank: 4")
    written: dict[str, Any] = {}
    for name, value in (found or {}).items():
        if name not in PARTS:
            written[str(name)] = value
        elif isinstance(value, dict):
            written |= {f"{name}.{field}": given for field, given in value.items()}
        else:
            written[f"{name}.{PARTS[name][1]}"] = "none" if name == "coarse" and value is None else value
    return written


def configured(command: Callable[..., None]) -> Callable[..., None]:
    """A command with `settings: Settings` among its parameters, in whose place typer sees `--config` and a flag for
    each setting. (typer reads signatures, so that it is given one.)
    """
    hints = get_type_hints(command, include_extras=True)
    own = [p.replace(annotation=hints[n]) for n, p in inspect.signature(command).parameters.items() if n != "settings"]
    file = typer.Option(
        "--config",
        metavar="FILE",
        help="A YAML file of the settings below; flags win over it.",
        rich_help_panel=_PANEL,
    )
    kind = inspect.Parameter.KEYWORD_ONLY
    config = inspect.Parameter("config", kind, default=None, annotation=Annotated[Path | None, file])
    flags = {name: _flag(name, setting) for name, setting in SETTINGS.items()}

    @wraps(command)
    def run(**arguments: Any) -> None:
        written = {name: arguments.pop(flag.name) for name, flag in flags.items()}
        given = {name: value for name, value in written.items() if value}
        command(settings=Settings(arguments.pop("config"), given), **arguments)

    parameters = [p.replace(kind=kind) for p in own] + [config, *flags.values()]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    return run


def _flag(name: str, setting: Setting) -> inspect.Parameter:
    """The parameter of one setting: None unless it is given; the help says what then holds."""
    default: Any = BuildConfig().to_json()
    for part in name.split("."):
        default = default[part]
    option = typer.Option(
        flag_of(name), help=setting.help, show_default=setting.default or str(default), rich_help_panel=_PANEL
    )
    kind = list[str] if name == "layers" else str
    return inspect.Parameter(
        flag_of(name).removeprefix("--").replace("-", "_"),
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[kind | None, option],
    )
