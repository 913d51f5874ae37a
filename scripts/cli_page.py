"""Makes docs/cli.md: every command of `lorif` with its options, from the program itself.

    python -m scripts.cli_page

What stands before the mark is written by hand, and stays.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer.main

from lorif_index.cli import app

PAGE = Path(__file__).parent.parent / "docs" / "cli.md"
MARK = "<!-- made by python -m scripts.cli_page: what follows is not edited by hand -->"


def program() -> Any:
    """The command group of `lorif`."""
    return typer.main.get_command(app)


def page(written: str) -> str:
    """The page as it was, with its part for the commands made anew."""
    return "\n".join([written.partition(MARK)[0].rstrip(), "", MARK, *commands()]).rstrip() + "\n"


def commands() -> list[str]:
    """Lines for all commands, in the order of `lorif --help`.

    Options of a panel of their own are listed where they come first; a later command with the same ones says so.
    """
    lines: list[str] = []
    panels: dict[str, tuple[str, list[str]]] = {}
    for name, command in program().commands.items():
        arguments = [p for p in command.params if p.param_type_name == "argument"]
        usage = [_argument(p) + ("..." if p.nargs == -1 and not p.metavar else "") for p in arguments]
        options = ["[OPTIONS]"] if len(arguments) < len(command.params) else []
        lines += [f"## lorif {name}", "", command.help.strip(), ""]
        lines += ["```text", " ".join(["lorif", name, *usage, *options]), "```", ""]
        own = [_row(p) for p in command.params if not _panel(p)]
        if own:
            lines += ["| | | default |", "|---|---|---|", *own, ""]
        for panel in dict.fromkeys(filter(None, map(_panel, command.params))):
            rows = [_row(p) for p in command.params if _panel(p) == panel]
            first, known = panels.setdefault(panel, (name, rows))
            if first != name:
                if rows != known:
                    raise ValueError(f"lorif {name} and lorif {first} differ in: {panel}")
                lines += [f"{panel}: as for [`lorif {first}`](#lorif-{first}).", ""]
                continue
            lines += [f"{panel}:", "", "| | | default |", "|---|---|---|", *rows, ""]
    return lines


def _panel(parameter: Any) -> str | None:
    panel = getattr(parameter, "rich_help_panel", None)
    return panel if isinstance(panel, str) else None


def _argument(parameter: Any) -> str:
    name = parameter.metavar or parameter.name.upper()
    return name if parameter.required or name.startswith("[") else f"[{name}]"


def _row(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        name = _argument(parameter)
    else:
        name = ", ".join(parameter.opts)
        # A value is named by its option, as in usage lines; a flag takes none.
        name += "" if getattr(parameter, "is_flag", False) else f" {parameter.metavar or '...'}"
    shown = getattr(parameter, "show_default", None)
    default = shown if isinstance(shown, str) else parameter.default
    if parameter.required:
        default = "required"
    elif default is None or default is False or default == []:
        default = ""
    help = (parameter.help or "").replace("|", "\\|")
    return f"| `{name}` | {help} | {default} |"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
