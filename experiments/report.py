"""Gather the reports of several compressions of one model into one table with plots.

    python -m experiments.report runs/teal-0.4 runs/teal-0.5 runs/wina-0.5 --out runs/comparison

Folders are those that `experiments.compress` wrote. They must share an evaluation protocol (model, data, windows, scope); what
differs is named. The new folder gets report.json, report.md, report.html and the plots.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments import entry
from sparsejax.plugs import check


@dataclass
class Flags:
    out: str = entry.flag("", "new folder for the report")


def main(call: entry.Call[Flags]) -> dict[str, Any]:
    check(call.flags.out, "--out", "", "give a new folder")
    from sparsejax.compress import report, report_html
    from sparsejax.io.model_folder import claim

    found = report.gather([Path(name) for name in call.names])
    out = claim(call.flags.out, "--out")
    report_html.write(found, out)
    print(report.text(found))
    print(f"\n{out / 'report.html'}")
    return found


if __name__ == "__main__":
    entry.run(main, Flags, config=False, names="report folder")
