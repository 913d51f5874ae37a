"""Claim: importing lorif_index takes little more than importing torch, and imports no other package of weight.

Each import in a process of its own, the two in turn.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from typing import Any

from bench.environment import ROOT, arguments, keep, table, timed

LIMIT = 1.25
ROUTES = {"the interpreter alone": "pass", "import torch": "import torch", "import lorif_index": "import lorif_index"}
MODULES = (
    "import sys, json, torch; before = set(sys.modules); import lorif_index; "
    "print(json.dumps(sorted(set(sys.modules) - before)))"
)


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def main() -> None:
    parsed = arguments(__doc__ or "")
    seconds: dict[str, list[float]] = {name: [] for name in ROUTES}
    for code in () if parsed.smoke else ROUTES.values():
        run(code)
    for _ in range(1 if parsed.smoke else 7):
        for name, code in ROUTES.items():
            seconds[name].append(timed(lambda code=code: run(code)))
    medians = {name: statistics.median(s) for name, s in seconds.items()}
    ratio = medians["import lorif_index"] / medians["import torch"]
    new: list[str] = json.loads(run(MODULES))
    packages = sorted({name.partition(".")[0] for name in new})
    rows: list[list[Any]] = [["", "s"], *([name, f"{value:.2f}"] for name, value in medians.items())]
    table(rows)
    print(f"{ratio:.2f} times (expected: <= {LIMIT}); {len(new)} modules beside torch's, of {', '.join(packages)}")
    keep("import_cost", {"seconds": medians, "ratio": ratio, "modules": len(new), "packages": packages}, parsed)


if __name__ == "__main__":
    main()
