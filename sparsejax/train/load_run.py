"""The model of a run folder, from its newest good checkpoint."""

from __future__ import annotations

from pathlib import Path

import jax
from jax.sharding import Mesh

from sparsejax import config_text
from sparsejax.config import ExperimentConfig
from sparsejax.io import model_json
from sparsejax.io.model import Model, computed_in
from sparsejax.plugs import ConfigError, check
from sparsejax.train import optim
from sparsejax.train.checkpoint import choose, newest, read_record, restore
from sparsejax.train.frozen import packed_as_saved, restore_frozen
from sparsejax.train.partition import joined, partition
from sparsejax.train.setup import state_shardings
from sparsejax.train.state import abstract_model, cast_for_compute, init_state


def load_run(
    folder: Path | str, *, name: str = "", dtype: str = "float32", mesh: Mesh | None = None, step: int | None = None
) -> Model:
    """The weights that the run evaluates (their average, where it keeps one), in the structure of its config.

    Args:
      folder: a run folder; the run may still go on, its newest finished checkpoint is read.
      dtype: of matrices, embeddings and biases.
      mesh: where they go; None: the default device. Need not be the mesh of the run.
      step: the checkpoint of this step; None: the newest.
    Raises:
      ConfigError: not a run folder, no finished checkpoint, or one that does not fit the config beside it.
    """
    folder = Path(folder)
    saved = folder / "config.json"
    check(saved.is_file(), "--model", str(folder), "is not a run folder: it holds no config.json")
    config = config_text.from_json(saved.read_text(encoding="utf-8"), ExperimentConfig, str(saved))
    described = model_json.read(folder)
    config.model = config_text.from_values(described.config, type(config.model), str(folder / model_json.MODEL_JSON))
    # `choose` would finish the last rename of a save, which may be that of a run still under way.
    choice = newest(folder / "checkpoints") if step is None else choose(f"step={step}", folder / "checkpoints")
    if choice is None or choice.path is None:
        raise ConfigError(f"--model = {str(folder)!r}: holds no finished checkpoint; train it first, or longer")
    structure, shapes = abstract_model(config.model)
    parameters = packed_as_saved(choice.path, structure, shapes)
    parts = partition(structure, parameters, config.optimizer.train)
    transformation = optim.optimizer(config.optimizer, config.steps, parts.trained)
    averaged = config.optimizer.ema_decay > 0
    abstract = jax.eval_shape(
        lambda v: init_state(v, parts, config.seed, transformation, averaged, config.model.dtype), parameters
    )
    if mesh is not None:
        shardings = state_shardings(abstract, parts, mesh)
        abstract = jax.tree.map(lambda s, to: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=to), abstract, shardings)
    state = restore(choice.path, abstract._replace(frozen={}))
    frozen = restore_frozen(choice.path, abstract.frozen)
    values = joined(state.average or optim.evaluated(config.optimizer, state.optimizer, state.trainable), frozen)
    model = computed_in(config.model, dtype)
    structure, _ = abstract_model(model)
    found_step = read_record(choice.path).step
    as_stored = dtype == "float32" and (not frozen or config.model.dtype == "float32")
    return Model(
        name or str(folder),
        model,
        structure,
        values if as_stored else jax.jit(lambda v: cast_for_compute(structure, v, dtype))(values),
        described.tokenizer,
        described.chat_template,
        {**described.source, "family": "sparsejax", "path": str(folder), "run": config.name, "step": found_step},
    )
