"""`experiments.train`: one config, one run folder."""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from sparsejax import config_text
from sparsejax.config import ExperimentConfig, finalize
from sparsejax.data.pipeline import DataPipeline, build_data
from sparsejax.data.tokenizers import Tokenizer
from sparsejax.io import model_json
from sparsejax.io.model import Model
from sparsejax.models.config import ModelConfig
from sparsejax.models.sizes import ffn_comparison
from sparsejax.parallel import launch
from sparsejax.plugs import ConfigError, check
from sparsejax.train import metrics, optim
from sparsejax.train.final import describe, finish
from sparsejax.train.loop import Trainer
from sparsejax.train.setup import compile_ahead, parameter_table, prepare, summary
from sparsejax.train.start import Loader, started

KEPT_OF_SOURCE = ("generation", "special_tokens")  # of a model that a run starts from: how its text ends, its template's words


def train(
    config: ExperimentConfig,
    *,
    base: ExperimentConfig | None = None,
    out: str | os.PathLike[str] = "",
    resume: str = "auto",
    command: str = "",
    loader: Loader | None = None,
) -> dict[str, Any]:
    """Train to `config.steps` in the run folder `out`, going on from what `resume` finds there; the result as JSON values.

    Args:
      config: finalized (`sparsejax.config.finalize`).
      base: what the resolved config is printed against; default: the same.
      out: run folder; default runs/NAME.
      resume: auto | never | step=N | path of a checkpoint.
      command: the command line, for the record.
      loader: loads the model that `config.init` names (`sparsejax.io.load.load`).
    Raises:
      ConfigError: anything about config, data, folder or checkpoint that does not fit, before the first step; later a loss that
        is not usable where the config says to stop, and a full disk.
    """
    start = time.perf_counter()
    launch.initialize()
    folder = Path(out or Path("runs") / config.name)
    say = print if launch.is_main() else _silent
    origin = started(config.init, loader, config.mesh) if config.init else None
    model = origin.model if origin else None
    if model is not None:
        config = finalize(config, start=model.config, device_count=jax.device_count())
    tokenizer = model.tokenizer if model else None
    data = build_data(
        config.data, model_kind=config.model.kind, batch_size=config.batch_size, seed=config.seed, tokenizer=tokenizer
    )
    config = _with_data(config, data, model.config if model else None)
    setup = prepare(config, data.batch_spec(), start=origin)
    metrics.check_writers(config.log.writers)
    diff = config_text.diff(config, base or config)
    say("\n".join(["config, as far as it differs from the file:", *(f"  {line}" for line in diff)]))
    say(parameter_table(setup))
    say(ffn_comparison(config.model))
    trainer = Trainer(setup, data, folder)
    _open_folder(folder, config)
    choice = trainer.choose(resume)
    check((choice.step or 0) <= config.steps, "steps", config.steps, f"the checkpoint to start from is of step {choice.step}")
    compile_seconds = compile_ahead(setup, choice.step or 0)
    say("\n".join([*summary(setup), *optim.schedule_notes(config.optimizer, config.steps)]))
    say("\n".join(data.describe()))
    if origin is not None and choice.path is not None:
        origin.forget()  # the checkpoint holds all parameters
    first = trainer.restore(choice)
    with _full_disk_told(folder):
        _claim_folder(folder, config, data.tokenizer, model)
        began = time.perf_counter()
        finished = trainer.run()
        train_seconds = time.perf_counter() - began
        if not finished:
            return {"name": config.name, "finished": False, "step": trainer.step, "folder": str(folder)}
        seconds = {
            "compile_seconds": compile_seconds,
            "train_seconds": train_seconds,
            "tokens_per_second": trainer.timer.tokens_per_second,
            "steps_run": config.steps - first,
        }
        result = finish(trainer, command, diff, seconds)
    say("\n".join(describe(result, folder)))
    say(f"total {time.perf_counter() - start:.1f} s")
    return {**result, "finished": True, "folder": str(folder)}


def _silent(*values: Any) -> None:
    """Hosts other than the first print nothing."""


def _with_data(config: ExperimentConfig, data: DataPipeline, start: ModelConfig | None) -> ExperimentConfig:
    """The config with what only the data knows: vocabulary or classes."""
    return finalize(
        config, vocab_size=data.vocab_size, num_classes=data.num_classes, image_shape=data.image_shape,
        device_count=jax.device_count(), start=start,
    )


@contextlib.contextmanager
def _full_disk_told(folder: Path) -> Iterator[None]:
    """A disk that fills up under metrics, statistics or the page as one message, like that under a checkpoint."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ConfigError(
            f"{error.filename or folder}: {error.strerror}; the checkpoints in {folder / 'checkpoints'} are intact, and the "
            "same command goes on from the last one when there is space"
        ) from error


def _open_folder(folder: Path, config: ExperimentConfig) -> None:
    """Make a run folder that is not there; refuse one that belongs to another config."""
    saved = folder / "config.json"
    try:
        if saved.exists():
            before = config_text.from_json(saved.read_text(encoding="utf-8"), ExperimentConfig, str(saved))
            config_text.require_same(config, before, folder=str(folder))
        if launch.is_main():
            folder.mkdir(parents=True, exist_ok=True)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--out = {str(folder)!r}: not usable as a run folder ({error})") from error


def _claim_folder(folder: Path, config: ExperimentConfig, tokenizer: Tokenizer | None, start: Model | None) -> None:
    """Write the config, when nothing is left that may be refused: a start that failed leaves the folder to another config."""
    template = start.chat_template if start else None
    kept = {name: start.source[name] for name in KEPT_OF_SOURCE if name in start.source} if start else {}
    launch.barrier("folder read")
    if launch.is_main():
        texts = model_json.files(config.model, {"stored": "checkpoints"}, tokenizer, template, kept)
        for name, text in texts.items():
            metrics.replace_text(folder / name, text)
        metrics.replace_text(folder / "config.json", config_text.to_json(config))
        metrics.replace_text(folder / "config.txt", config_text.to_text(config))
