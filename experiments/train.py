"""Train a model: from a config to a run folder with checkpoints, metrics, plots and a page.

python -m experiments.train --config configs/tiny_relu2.py --out runs/demo
python -m experiments.train --config configs/tiny_relu2.py --config.model.num_layers=6 --resume never
python -m experiments.train --config configs/finetune_smollm2.py --config.init=smollm2-135m
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from experiments import entry


@dataclass
class Flags:
    out: str = entry.flag("", "run folder; by default runs/NAME, NAME being the config's")
    resume: str = entry.flag(
        "auto", "auto (the newest good checkpoint, else from the start), never, step=N, or a checkpoint's path"
    )


def main(call: entry.Call[Flags]) -> dict[str, Any]:
    from sparsejax.io.load import load
    from sparsejax.train.run import train

    assert call.config is not None
    flags = call.flags
    return train(call.config, base=call.base, out=flags.out, resume=flags.resume, command=call.command, loader=load)


if __name__ == "__main__":
    entry.run(main, Flags)
