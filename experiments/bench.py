"""Measure speed beside its limits.

    python -m experiments.bench train --config configs/tiny_relu2.py
    python -m experiments.bench train --config configs/lm_350m.py --steps 50 --json results/bench_train_h100.json
    python -m experiments.bench evaluate
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from experiments import entry
from sparsejax.plugs import ConfigError, check, check_choice


@dataclass
class Flags:
    steps: int = entry.flag(20, "train: steps timed, in each of the variants compared")
    rounds: int = entry.flag(5, "how often the variants take turns; the spread is over them")


def main(call: entry.Call[Flags]) -> dict[str, Any]:
    name = " ".join(call.names)
    check_choice("benchmark", name, ("evaluate", "train"))
    check(call.flags.steps >= 2, "--steps", call.flags.steps, "must be at least 2")
    check(call.flags.rounds >= 1, "--rounds", call.flags.rounds, "must be at least 1")
    if name == "evaluate":
        from experiments.bench_evaluate import bench_evaluate

        return bench_evaluate(rounds=call.flags.rounds)
    if call.config is None:
        raise ConfigError("--config = '': give a config, e.g. --config configs/tiny_relu2.py")
    from experiments.bench_train import bench_train

    return bench_train(call.config, steps=call.flags.steps, rounds=call.flags.rounds)


if __name__ == "__main__":
    entry.run(main, Flags, config=False, names="benchmark")
