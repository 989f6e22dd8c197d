"""A run folder trained with quantized weights, as a folder that stores them packed and serves the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax

from sparsejax import config_text
from sparsejax.compress.export import export, report
from sparsejax.config import ExperimentConfig, finalize
from sparsejax.data.pipeline import build_data
from sparsejax.evaluate.likelihood import Likelihood, evaluate
from sparsejax.io import model_folder, model_json
from sparsejax.io.model import Model
from sparsejax.parallel import rules
from sparsejax.plugs import check
from sparsejax.train.loop import Trainer
from sparsejax.train.setup import prepare
from sparsejax.train.step import make_evaluation_step


def export_run(run: Path | str, out: Path | str) -> dict[str, Any]:
    """Pack the newest checkpoint of a run into `out` and evaluate both on the same held-out batches; the result as JSON values.

    `out` becomes a model folder (`io.model_folder`) in which every quantized kernel is a QTensor.

    Args:
      run: a run folder whose config quantizes weights (`model.weights`).
      out: a new or empty folder.
    Raises:
      ConfigError: not a run folder, nothing to pack, an `out` that is in use, or an export that would not serve the same bits.
    """
    run = Path(run)
    saved = run / "config.json"
    check(saved.is_file(), "--model", str(run), "is not a run folder: it holds no config.json")
    out = model_folder.claim(out, "--out")
    config = config_text.from_json(saved.read_text(encoding="utf-8"), ExperimentConfig, str(saved))
    tokenizer = model_json.read(run).tokenizer if config.init else None
    data = build_data(
        config.data, model_kind=config.model.kind, batch_size=config.batch_size, seed=config.seed, tokenizer=tokenizer
    )
    config = finalize(
        config, vocab_size=data.vocab_size, num_classes=data.num_classes, image_shape=data.image_shape,
        device_count=jax.device_count(),
    )
    trainer = Trainer(prepare(config, data.batch_spec()), data, run)
    step = trainer.restore(trainer.choose("auto"))
    trainer.checkpoints.close()
    check(step > 0, "--model", str(run), "holds no checkpoint")
    trained = trainer.evaluated_parameters()
    exported = export(trainer.setup.structure, trained, config.model.dtype)
    print(report(exported))
    before, after = (_held_out(trainer, values) for values in (trained, exported.values))
    print(f"held-out loss {before.loss:.6f} as trained, {after.loss:.6f} as exported")
    same = before.loss == after.loss
    check(same, "--model", str(run), f"the export gives a held-out loss of {after.loss!r}, the trained model {before.loss!r}")
    source = {"family": "sparsejax", "run": config.name, "step": step}
    model = Model(str(out), config.model, trainer.setup.structure, exported.values, data.tokenizer, None, source)
    model_folder.save(model, out)
    return {
        "run": str(run),
        "out": str(out),
        "step": step,
        "bytes_before": exported.bytes_before,
        "bytes_after": exported.bytes_after,
        "loss_trained": before.loss,
        "loss_exported": after.loss,
        "kernels": [row._asdict() for row in exported.rows],
    }


def _held_out(trainer: Trainer, values: Any) -> Likelihood:
    """Likelihood of the held-out batches under these values, by one evaluation step compiled for them."""
    setup = trainer.setup
    stage = setup.stage(trainer.step)
    step = make_evaluation_step(setup.structure, setup.config, devices=setup.mesh.size, stage=stage, watch=False)
    jitted = jax.jit(step, out_shardings=rules.replicated(setup.mesh))
    token_bytes = trainer.token_bytes()
    return evaluate(lambda batch: jitted(values, token_bytes, batch), trainer.held_out(setup.config.evaluate.batches))
