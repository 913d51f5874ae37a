"""quanda: its metrics and benchmarks judge this library's answers (quanda, Bareeva et al., arXiv:2410.07158).

quanda is not among this project's extras: pip install quanda.
"""

from __future__ import annotations

from typing import Any

__all__ = ["LorifExplainer"]


def __getattr__(name: str) -> Any:
    if name == "LorifExplainer":
        try:
            from .explainer import LorifExplainer
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] != "quanda":
                raise
            from ..errors import ConfigError

            raise ConfigError("LorifExplainer needs quanda, which is not installed: pip install quanda") from None
        return LorifExplainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
