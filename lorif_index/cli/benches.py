"""Benches: `lorif bench`, the benchmarks of a checkout."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from ..errors import ConfigError
from ..text.show import console
from .app import app, reported_errors

FOLDER = "bench"
_PACKAGE = Path(__file__).parent.parent


def checkout() -> Path:
    """The folder that the package's source lies in, with its benchmarks; else the current one, if it is such a folder.

    Raises:
        ConfigError: neither has benchmarks, which are not installed with the package.
    """
    for place in (_PACKAGE.parent, Path.cwd()):
        if (place / FOLDER / "__init__.py").is_file() and (place / _PACKAGE.name / "__init__.py").is_file():
            return place
    raise ConfigError(
        f"benchmarks are not installed with the package, and {Path.cwd()} has no {FOLDER}/ beside {_PACKAGE.name}/: "
        "run it in a checkout of the source, with its test extra installed"
    )


def benches(root: Path) -> dict[str, str]:
    """name -> what it claims or asks, of the modules that run by themselves."""
    found = {}
    for path in sorted((root / FOLDER).glob("*.py")):
        source = path.read_text(encoding="utf-8")
        if 'if __name__ == "__main__"' in source:
            found[path.stem] = (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]
    return found


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False}
)
def bench(
    context: typer.Context,
    name: Annotated[
        str | None,
        typer.Argument(metavar="[NAME [OPTIONS OF THE BENCHMARK]]", help="Of a benchmark; without one, what there is."),
    ] = None,
) -> None:
    """Run a benchmark of a checkout, `python -m bench.NAME`, with what follows its name; --smoke is a tiny run."""
    with reported_errors():
        root = checkout()
        known = benches(root)
        if name is None:
            table = Table(box=None, show_header=False, padding=(0, 1))
            for one, claim in known.items():
                table.add_row(one, Text(claim))
            console().print(table)
            return
        if name not in known:
            near = get_close_matches(name, known, n=1)
            raise ConfigError(
                f"no benchmark {name!r}: {f'did you mean {near[0]}? ' if near else ''}`lorif bench` lists them"
            )
        # Where it is called from stays as it is, for the paths in its options; the benchmarks are the checkout's.
        path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
        command = [sys.executable, "-P", "-m", f"{FOLDER}.{name}", *context.args]
        done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, check=False)
    # A signal's number is negative.
    raise typer.Exit(done.returncode if done.returncode >= 0 else 128 - done.returncode)
