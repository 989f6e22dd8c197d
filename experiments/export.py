"""Pack a run that was trained with quantized weights into a folder that stores and serves them at their true bits.

    python -m experiments.train --config configs/qat_int8_tiny.py --out runs/qat
    python -m experiments.export --run runs/qat --out runs/qat_packed
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from experiments import entry
from sparsejax.plugs import check


@dataclass
class Flags:
    run: str = entry.flag("", "run folder of a training with quantized weights")
    out: str = entry.flag("", "new folder for the packed model")


def main(call: entry.Call[Flags]) -> dict[str, Any]:
    for name in ("run", "out"):
        check(getattr(call.flags, name), f"--{name}", "", "give a folder")
    from sparsejax.compress.export_run import export_run

    return export_run(call.flags.run, call.flags.out)


if __name__ == "__main__":
    entry.run(main, Flags, config=False)
