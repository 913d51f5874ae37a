"""Registry: the row codecs by name; whoever adds one adds a line here, or an entry from outside the package."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from ..errors import ConfigError

if TYPE_CHECKING:
    from .base import RowCodec

CODECS: dict[str, str | type[RowCodec]] = {
    "eigen": "eigencodes:EigenCodec",
    "factors": "factors:FactorCodec",
}
"""Name -> the codec's class, or the module here and the class in it, which is imported when it is first asked for."""

PREFERRED, LOSSLESS = "eigen", "factors"
"""What store="auto" stands for: the first; the second where it loses next to nothing of the gradients."""


def codec_class(name: str) -> type[RowCodec]:
    """The codec of a name.

    Raises:
        ConfigError: there is none.
    """
    found = CODECS.get(name)
    if found is None:
        raise ConfigError(f"store={name!r} is no row codec: known are {sorted(CODECS)}")
    if isinstance(found, str):
        module, _, attribute = found.partition(":")
        made: type[RowCodec] = getattr(import_module(f".{module}", __package__), attribute)
        return made
    return found
