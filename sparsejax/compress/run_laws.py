"""Activation ratios along training runs, for the Sparsing Law: from their logs, or as PPL-p% at their checkpoints.

A run logs the exact zeros of the FFN's hidden vector at its watching steps (`log.watch_every`), which says something where the
non-linearity gives exact zeros. PPL-p% needs the weights: keep checkpoints (`checkpoint.every`, `checkpoint.keep`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sparsejax.config import ExperimentConfig
from sparsejax.config_text import from_json
from sparsejax.evaluate.sparsing_law import LawFit, LineFit, fit_law, fit_width_depth
from sparsejax.io.model import Model
from sparsejax.plugs import ConfigError, check, resolve
from sparsejax.train import checkpoint_files
from sparsejax.train.load_run import load_run
from sparsejax.train.metrics import read_watch

# Share of a run's tokens that is left out at its start, as the paper leaves out the first few billion.
FIRST = 0.05


@dataclass(frozen=True)
class RunRatios:
    """Activation ratios of a run.

    Fields:
      name: the folder. width_per_layer: d_model / num_layers.
      law: decreasing where the non-linearity gives exact zeros, else increasing.
      tokens: trained on before each. ratio: 1 - sparsity, mean over layers.
    """

    name: str
    width_per_layer: float
    law: str
    tokens: np.ndarray
    ratio: np.ndarray


def logged_ratios(folder: Path) -> RunRatios:
    """Of the zeros that a run has logged.

    Raises:
      ConfigError: not a run folder, nothing logged, or a non-linearity without exact zeros.
    """
    config = _config(folder)
    law = _law(config)
    check(law == "decreasing", f"--runs: {folder}", config.model.ffn.activation,
          "gives no exact zeros; give --data, for PPL-p% at the run's checkpoints")  # fmt: skip
    watched = {name: series for name, series in read_watch(folder).items() if name.split("/")[-1] == "zero_fraction"}
    check(watched, f"--runs: {folder}", config.log.watch_every, "has logged no zeros; train with log.watch_every above 0")
    steps = next(iter(watched.values()))[0]
    zeros = np.concatenate([values for _, values in watched.values()], axis=1).mean(axis=1)
    return _ratios(folder, config, law, steps, 1 - zeros)


def checkpoint_ratios(folder: Path, ratio: Callable[[Model], float]) -> RunRatios:
    """Of the finished checkpoints of a run.

    Args:
      ratio: the activation ratio of a model, e.g. at PPL-1 %.
    Raises:
      ConfigError: not a run folder, or what `ratio` refuses.
    """
    config = _config(folder)
    steps = np.array([step for step in checkpoint_files.steps(folder / "checkpoints") if step > 0])
    check(len(steps), f"--runs: {folder}", "checkpoints", "holds none that is finished")
    steps = steps[steps >= FIRST * steps.max()]
    found = [ratio(load_run(folder, name=f"{folder} at step {step}", step=int(step))) for step in steps]
    return _ratios(folder, config, _law(config), steps, np.array(found))


def fit_runs(runs: Sequence[RunRatios]) -> tuple[dict[str, LawFit], LineFit | None]:
    """The law of each run by name, and the line of their last ratios over width / depth where 3 shapes or more are given."""
    fits = {run.name: fit_law(run.law, run.tokens.tolist(), run.ratio.tolist()) for run in runs}
    shapes = [run.width_per_layer for run in runs]
    enough = len(set(shapes)) >= 3
    return fits, fit_width_depth(shapes, [float(run.ratio[-1]) for run in runs]) if enough else None


def _config(folder: Path) -> ExperimentConfig:
    saved = folder / "config.json"
    check(saved.is_file(), "--runs", str(folder), "is not a run folder: it holds no config.json")
    return from_json(saved.read_text(encoding="utf-8"), ExperimentConfig, str(saved))


def _law(config: ExperimentConfig) -> str:
    activation = resolve("nonlinearity", config.model.ffn.activation, "model.ffn.activation")
    return "decreasing" if activation.exact_zeros else "increasing"


def _ratios(folder: Path, config: ExperimentConfig, law: str, steps: np.ndarray, ratio: np.ndarray) -> RunRatios:
    """With the steps of the start left out."""
    used = (steps > 0) & (steps >= FIRST * steps.max())
    if not used.any():
        raise ConfigError(f"--runs: {folder}: nothing was measured after step 0")
    tokens = steps[used].astype(np.float64) * config.batch_size * config.data.sequence_length
    model = config.model
    return RunRatios(str(folder), model.d_model / model.num_layers, law, tokens, ratio[used])
