"""Choice: the config of a build: the one given, that of the index whose fit is taken, or the default."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..config import BuildConfig
from ..errors import ConfigError
from ..storage.manifest import read_manifest


def chosen_config(config: BuildConfig | None, fit: Path | None = None, curvature: Any = None) -> BuildConfig:
    """The config of a build.

    Args:
        config: as it was given.
        fit: the folder of an index whose fit is taken, or None.
        curvature: as it was given.

    Raises:
        ConfigError: it is no config, or curvature was given beside a fit. NotAnIndexError: there is no index in `fit`.
    """
    if fit is not None:
        if curvature is not None:
            raise ConfigError("fit= takes another index's curvature, so that curvature= has no use: pass one of them")
        if config is None:
            other = read_manifest(fit)
            config = BuildConfig.from_json(other.config | {"projection_floor": other.floor()})
    config = BuildConfig() if config is None else config
    if not isinstance(config, BuildConfig):
        raise ConfigError(f"config must be a BuildConfig, got {type(config).__name__}")
    return config
