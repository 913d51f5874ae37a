"""Page: the templates and filters that report and explorer share; whatever comes from an index is escaped."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from functools import cache
from importlib import resources
from typing import Any

import numpy as np
from rich.filesize import decimal

from ..errors import ConfigError
from .charts import levels
from .visible import on_one_line, pieces, visible

_LONGEST_IN_A_LIST = 4000
# Of one text on a page of its own; a payload may have a megabyte.
_LONGEST = 60_000


@cache
def environment() -> Any:
    """The Jinja2 environment: escapes everything, and fails on names that are not there.

    Raises:
        ConfigError: Jinja2 is not installed.
    """
    try:
        import jinja2
    except ImportError:
        raise ConfigError("pages need Jinja2, which is not installed: install the extra serve of lorif-index") from None
    made = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: asset(f"templates/{name}")),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {
        "visible": visible,
        "shown": _shown,
        "short": on_one_line,
        "score": _score,
        "share": _share,
        "seconds": _seconds,
        "units": decimal,
    }
    made.globals |= {"longest": _LONGEST, "longest_in_a_list": _LONGEST_IN_A_LIST}
    return made


@cache
def asset(name: str) -> str:
    """A template, stylesheet or script of the package: one of a fixed few, never a path from outside."""
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def render(template: str, **values: Any) -> str:
    """A page as HTML."""
    return str(environment().get_template(template).render(**values))


def style_source(css: str) -> str:
    """The Content-Security-Policy source that allows this very stylesheet."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(css.encode()).digest()).decode()}'"


def token_values(tokens: Sequence[str], shares: np.ndarray) -> list[dict[str, Any]]:
    """Tokens with their shares, for the templates and the script: {"share", "level", "title", "pieces"}."""
    total = float(abs(shares).sum()) or 1.0
    return [
        {
            "share": float(share),
            "level": f"p{step}" if step > 0 else f"n{-step}" if step < 0 else "",
            "title": f"{100 * float(share) / total:+.1f}%",
            "pieces": [list(piece) for piece in pieces(token)],
        }
        for token, share, step in zip(tokens, shares, levels(shares), strict=True)
    ]


def _score(value: float) -> str:
    """Four digits, with a true minus."""
    text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return text.replace("-", "\N{MINUS SIGN}")


def _shown(text: str, most: int = _LONGEST) -> Any:
    from markupsafe import Markup, escape

    out = [
        Markup('<span class="mark" title="{}">{}</span>').format(piece.name, piece.text)
        if piece.name
        else escape(piece.text)
        for piece in pieces(text[:most])
    ]
    if len(text) > most:
        out.append(Markup('<span class="cut" title="{:,} characters in all">…</span>').format(len(text)))
    return Markup("").join(out)


def _share(value: float) -> str:
    return "unknown" if value != value else f"{value:.3f}"


def _seconds(value: float) -> str:
    return f"{1000 * value:,.0f} ms" if value < 1 else f"{value:,.1f} s"


def plain_json(value: Any) -> str:
    """ASCII JSON, which holds lone surrogates as escapes; what is not finite is null."""
    return json.dumps(_finite(value), allow_nan=False, indent=1)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_finite(part) for part in value]
    return value
