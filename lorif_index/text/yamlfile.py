"""YAML: a file of plain values, in which no key stands twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import ConfigError


def read_yaml(file: Path, wanted_for: str) -> Any:
    """What a file holds; no tags that make objects are read.

    Args:
        file: the file.
        wanted_for: who needs it, for the message where PyYAML is missing.

    Raises:
        ConfigError: not YAML, a key twice, or PyYAML is not installed. OSError: the file cannot be read.
    """
    try:
        import yaml
    except ImportError:
        raise ConfigError(
            f"{wanted_for} needs PyYAML, which is not installed: install the extra text of lorif-index"
        ) from None

    try:
        _refuse_repeated(yaml.compose(file.read_bytes(), Loader=yaml.SafeLoader), str(file))
        return yaml.safe_load(file.read_bytes())
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{file} is not YAML: {error}") from None


def _refuse_repeated(node: Any, where: str) -> None:
    """Refuses a key that is there twice, of which YAML's loader would drop the first without a word."""
    if node is None or node.id == "scalar":
        return
    if node.id == "sequence":
        for number, item in enumerate(node.value):
            _refuse_repeated(item, f"{where}: item {number}")
        return
    keys = [key.value for key, _ in node.value]
    for key, (_, value) in zip(keys, node.value, strict=True):
        if keys.count(key) > 1:
            raise ConfigError(f"{where}: {key} is there twice: keep one of them")
        _refuse_repeated(value, f"{where}: {key}")
