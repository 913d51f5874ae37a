"""Command line: `lorif`, a module for each kind of command. Answers on stdout, progress and errors on stderr.

    app         the program itself: its errors and its exit codes
    options     what several commands take
    settings    the choices of a build, as flags and in a YAML file
    show        tables, and JSON on stdout
    making      demo, build, estimate
    shares      explanations in a terminal
    asking      search, explain, info
    keeping     add, remove, refit, compact, merge, verify, repair
    browsing    report, serve

Exit codes: 0 done, 1 an error of the user's or of the files, in one line, 2 usage, 130 interrupted.
"""

from __future__ import annotations

from .app import app, main

# In the order in which `lorif --help` lists the commands.
from . import making, asking, keeping, browsing  # noqa: F401  # isort: skip

__all__ = ["app", "main"]
