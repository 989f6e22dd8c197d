"""Compress a model by a recipe: calibrate, fit, replace, evaluate, and write a model folder with its report.

    python -m experiments.compress --model smollm2-135m --recipe configs/recipes/teal.py:0.5 --out runs/teal-0.5
    python -m experiments.compress --model runs/mine --recipe configs/recipes/teal.py:0.4 --out runs/teal-0.4 \\
        --data c4_sample:evaluation,stdlib:evaluation --tasks arc_easy --tier full

The plan and what it will cost are printed first. --out is complete when it holds model.json; it then loads like any model, and
report.html is its report. An interrupted compression goes on when the same command runs again; a finished one is left alone.
--tier quick (16 x 512 calibration tokens, 8 x 512 of each text) or full; --calibration-sequences, --calibration-length,
--window and --limit change single numbers of it. Calibration must not overlap what is evaluated.
Sparsity acts at all tokens unless --scope=from:FRACTION or decode, and --keep-first, say otherwise: see experiments.evaluate.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments import entry
from sparsejax.plugs import check, check_choice


@dataclass
class Flags:
    model: str = entry.flag("", "name or path of the model")
    recipe: str = entry.flag("", "FILE.py or FILE.py:ARGUMENT whose get_recipe(ARGUMENT) returns a list of passes")
    out: str = entry.flag("", "new folder, or that of an interrupted compression")
    tier: str = entry.flag("quick", "quick or full: how much calibration, search and evaluation")
    data: tuple[str, ...] = entry.flag(("stdlib:evaluation",), "texts to evaluate on, as for experiments.evaluate")
    tasks: tuple[str, ...] = entry.flag((), "multiple-choice tasks to evaluate on, e.g. arc_easy")
    calibration: str = entry.flag("stdlib:calibration", "text to calibrate on, with its split; several with commas")
    calibration_sequences: int = entry.flag(0, "windows of it; 0: the tier's")
    calibration_length: int = entry.flag(0, "tokens of each window; 0: the tier's")
    seed: int = entry.flag(0, "which windows")
    skip_first: int = entry.flag(0, "leading tokens of each window that statistics leave out")
    allow_overlap: bool = entry.flag(False, "calibrate also on what is evaluated")
    scope: str = entry.flag("all", "tokens at which sparsity acts when it is evaluated: all, from:FRACTION or decode")
    keep_first: int = entry.flag(0, "so many first tokens are dense in any case")
    window: int = entry.flag(0, "tokens per evaluated window; 0: the tier's")
    limit: int = entry.flag(0, "windows of each text, rows of each task; 0: the tier's")
    batch: int = entry.flag(0, "windows or rows per forward pass; 0: chosen by length and device")
    baseline: str = entry.flag("", "folder of an earlier compression by the same protocol whose dense row is reused")
    decode_tokens: int = entry.flag(32, "tokens decoded to measure speed; 0: not measured")
    executor: str = entry.flag("masked", "of sparse products while speed is measured: masked, or gathered (zeros are skipped)")
    resume: bool = entry.flag(True, "go on with the pieces of an interrupted compression; --noresume starts anew")
    dtype: str = entry.flag("float32", "float32 or bfloat16: of weights and computation")
    data_dir: str = entry.flag("", "data folder")


def main(call: entry.Call[Flags]) -> dict[str, Any]:
    flags = call.flags
    for name, what in (("model", "the name or path of a model"), ("recipe", "a file, e.g. configs/recipes/teal.py:0.5"),
                       ("out", "a new folder")):  # fmt: skip
        check(getattr(flags, name), f"--{name}", "", f"give {what}")
    check_choice("--dtype", flags.dtype, ("float32", "bfloat16"))
    for name in ("limit", "batch", "window", "calibration_sequences", "calibration_length", "seed", "skip_first"):
        check(getattr(flags, name) >= 0, f"--{name.replace('_', '-')}", getattr(flags, name), "must be 0 or more")
    decoded = flags.decode_tokens
    check(decoded == 0 or decoded >= 2, "--decode-tokens", decoded, "must be 0, or 2 or more")
    from sparsejax.arrays import EXECUTORS
    from sparsejax.compress.calibration import CalibrationSpec
    from sparsejax.compress.recipe import TIERS, Pass
    from sparsejax.compress.session import Request, compress
    from sparsejax.evaluate.scope import Scope
    from sparsejax.evaluate.texts import TEXTS

    check_choice("--tier", flags.tier, TIERS)
    check_choice("--executor", flags.executor, EXECUTORS)
    for source in CalibrationSpec(flags.calibration).texts:
        check_choice("--calibration", source.partition(":")[0], TEXTS)
    passes = entry.from_file("--recipe", flags.recipe, "get_recipe")
    good = isinstance(passes, list | tuple) and passes and all(isinstance(one, Pass) for one in passes)
    check(good, "--recipe", flags.recipe, "get_recipe must return a list of passes")
    counted = flags.calibration_sequences, flags.calibration_length, flags.seed, flags.skip_first
    return compress(Request(
        model=flags.model, out=Path(flags.out), recipe=flags.recipe, passes=tuple(passes),
        recipe_text=Path(flags.recipe.partition(":")[0]).read_text(encoding="utf-8"),
        data=(*flags.data, *flags.tasks), tier=flags.tier, calibration=CalibrationSpec(flags.calibration, *counted),
        scope=Scope(flags.scope, flags.keep_first), window=flags.window, limit=flags.limit, batch=flags.batch,
        dtype=flags.dtype, data_dir=flags.data_dir, baseline=flags.baseline, allow_overlap=flags.allow_overlap,
        resume=flags.resume, decode_tokens=flags.decode_tokens, executor=flags.executor, about=entry.about(call.command),
    ))  # fmt: skip


if __name__ == "__main__":
    entry.run(main, Flags, config=False)
