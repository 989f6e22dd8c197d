"""Measure speed beside its limits.

    python -m experiments.bench train --config configs/tiny_relu2.py
    python -m experiments.bench train --config configs/lm_350m.py --steps 50 --json results/bench_train_h100.json
    python -m experiments.bench evaluate
    python -m experiments.bench decode --model smollm2-135m --tokens 64
    python -m experiments.bench formats --model smollm2-135m --json results/bench_formats.json
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from experiments import entry
from sparsejax.plugs import ConfigError, check, check_choice


@dataclass
class Flags:
    steps: int = entry.flag(20, "train: steps timed, in each of the variants compared")
    model: str = entry.flag("", "decode, formats: name or path of the model")
    tokens: int = entry.flag(64, "decode: new tokens timed, in each turn")
    prompt_length: int = entry.flag(32, "decode: tokens of the prompt")
    formats: str = entry.flag("", "formats: formats of weights with / between; default 2, 3, 4 and 8 bits in groups of 64")
    rows: int = entry.flag(1, "formats: rows of x; 1 is decoding")
    rounds: int = entry.flag(5, "how often the variants take turns; the spread is over them")


def main(call: entry.Call[Flags]) -> dict[str, Any]:
    name = " ".join(call.names)
    check_choice("benchmark", name, _BENCHMARKS)
    check(call.flags.rounds >= 1, "--rounds", call.flags.rounds, "must be at least 1")
    return _BENCHMARKS[name](call)


def _train(call: entry.Call[Flags]) -> dict[str, Any]:
    check(call.flags.steps >= 2, "--steps", call.flags.steps, "must be at least 2")
    if call.config is None:
        raise ConfigError("--config = '': give a config, e.g. --config configs/tiny_relu2.py")
    from experiments.bench_train import bench_train

    return bench_train(call.config, steps=call.flags.steps, rounds=call.flags.rounds)


def _evaluate(call: entry.Call[Flags]) -> dict[str, Any]:
    from experiments.bench_evaluate import bench_evaluate

    return bench_evaluate(rounds=call.flags.rounds)


def _decode(call: entry.Call[Flags]) -> dict[str, Any]:
    flags = call.flags
    check(flags.model, "--model", "", "give the name or path of a model")
    check(flags.tokens >= 2, "--tokens", flags.tokens, "must be at least 2")
    check(flags.prompt_length >= 1, "--prompt-length", flags.prompt_length, "must be at least 1")
    from experiments.bench_decode import bench_decode

    return bench_decode(flags.model, prompt_length=flags.prompt_length, tokens=flags.tokens, rounds=flags.rounds)


def _formats(call: entry.Call[Flags]) -> dict[str, Any]:
    flags = call.flags
    check(flags.model, "--model", "", "give the name or path of a model")
    check(flags.rows >= 1, "--rows", flags.rows, "must be at least 1")
    from experiments.bench_formats import bench_formats
    from sparsejax.compress.bit_allocation import menu_of

    return bench_formats(flags.model, menu_of(flags.formats.split("/")), rows=flags.rows, rounds=flags.rounds)


_BENCHMARKS: dict[str, Callable[[entry.Call[Flags]], dict[str, Any]]] = {
    "decode": _decode,
    "evaluate": _evaluate,
    "formats": _formats,
    "train": _train,
}


if __name__ == "__main__":
    entry.run(main, Flags, config=False, names="benchmark")
