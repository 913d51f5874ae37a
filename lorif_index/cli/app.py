"""App: the program `lorif`, to which the other modules add their commands; errors in one line, with exit codes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from ..errors import LorifError, message_of
from ..version import VERSION

app = typer.Typer(
    name="lorif",
    help="Training data attribution: which training examples made this model do that?",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@contextmanager
def reported_errors() -> Iterator[None]:
    """Errors that a user can cause as one line on stderr and exit code 1; an interruption as 130."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo("lorif: interrupted", err=True)
        raise typer.Exit(130) from None
    except BrokenPipeError:
        raise
    except (LorifError, OSError) as error:
        typer.echo(f"lorif: {' '.join(message_of(error).split())}", err=True)
        raise typer.Exit(1) from None


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lorif {VERSION}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and leave.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Training data attribution: which training examples made this model do that?"""


def main() -> None:
    """The entry point `lorif`."""
    app()
