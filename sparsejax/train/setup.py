"""Everything a run needs before its first step, and before any data is read: mesh, shapes, shardings, compiled steps."""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from sparsejax import plugs
from sparsejax.config import ExperimentConfig
from sparsejax.layers.op import SiteRules
from sparsejax.models.sizes import flops_per_token, parameter_counts
from sparsejax.nnx_compat import Structure
from sparsejax.parallel import aot, rules
from sparsejax.parallel.mesh import describe, make_mesh
from sparsejax.train import metrics, optim
from sparsejax.train.partition import Partition, joined, partition
from sparsejax.train.start import Start
from sparsejax.train.state import TrainState, abstract_model, init_state, initial_values
from sparsejax.train.step import make_evaluation_step, make_train_step

BatchSpec = dict[str, tuple[tuple[int, ...], Any]]


@dataclasses.dataclass
class Setup:
    """A model on its mesh, with the functions that train and evaluate it.

    `abstract_state` carries the shardings; `train(stage, watch)` and `evaluate(stage, watch)` give
    compiled functions and compile each at most once; `jitted` is the training step before that. `start` is the model that the
    parameters are taken from, None where they are drawn.
    """

    config: ExperimentConfig
    mesh: Mesh
    structure: Structure
    parts: Partition
    abstract_state: TrainState
    batch_spec: dict[str, jax.ShapeDtypeStruct]
    boundaries: tuple[int, ...]
    schedule: optax.Schedule
    init: Callable[[], TrainState]
    jitted: Callable[[int, bool], Any]
    train: Callable[[int, bool], Any]
    evaluate: Callable[[int, bool], Any]
    compilations: dict[str, aot.Compilation]
    start: Start | None = None

    def stage(self, step: int) -> int:
        """The largest schedule boundary that `step` has reached, 0 before the first."""
        return max((b for b in self.boundaries if b <= step), default=0)


def prepare(config: ExperimentConfig, batch_spec: BatchSpec, devices: Any = None, start: Start | None = None) -> Setup:
    """Shapes, shardings and step functions for a finalized config; nothing is allocated and no data is read.

    Args:
      config: finalized; with `init`, against that model.
      batch_spec: name -> (shape of the global batch, dtype).
      devices: by default all.
      start: the model that `config.init` names, where the parameters are to be taken from it.
    Raises:
      plugs.ConfigError: an impossible mesh, a batch that does not divide, an objective without its statistics, a large
        parameter that no mesh axis shards, parameters to train that are not there.
    """
    known = config.model.attention.head_dim
    plugs.check(known, "init", config.init, "its config is not known here; `experiments.train` loads it")
    mesh = make_mesh(config.mesh, devices)
    rules.check_batch(config.batch_size // config.accumulate, mesh)
    objectives = tuple(plugs.resolve("objective", spec, f"objectives[{i}]") for i, spec in enumerate(config.objectives))
    structure, shapes = abstract_model(config.model)
    axes = structure.map(lambda weight: weight.axes)
    rules.require_sharded(axes, shapes, mesh, config.mesh)
    given = start.model.values if start else {}

    def values(given: Any) -> Any:
        drawn = initial_values(config.model, config.seed)
        return start.values(given, drawn, config.model) if start else drawn

    parts = partition(structure, jax.eval_shape(values, given), config.optimizer.train)
    transformation = optim.optimizer(config.optimizer, config.steps, parts.trained)
    schedule = optim.schedule(config.optimizer, config.steps)
    averaged = config.optimizer.ema_decay > 0

    def build(given: Any) -> TrainState:
        return init_state(values(given), parts, config.seed, transformation, averaged, config.model.dtype)

    abstract = jax.eval_shape(build, given)
    shardings = state_shardings(abstract, parts, mesh)
    abstract = jax.tree.map(lambda s, sh: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sh), abstract, shardings)
    batch = {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=rules.batch_sharding(mesh, shape))
        for name, (shape, dtype) in batch_spec.items()
    }
    compilations: dict[str, aot.Compilation] = {}

    def compiled(name: str, fn: Callable[[], Any], *avals: Any) -> Any:
        if name not in compilations:
            with rules.use_mesh(mesh):
                compilations[name] = aot.lower_and_compile(fn(), *avals)
        return compilations[name].compiled

    def jitted(stage: int, watch: bool) -> Any:
        step = make_train_step(
            structure, parts, config, objectives, transformation, schedule, devices=mesh.size, stage=stage, watch=watch
        )
        return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))

    def train(stage: int, watch: bool) -> Any:
        name = f"train stage {stage}" + " watched" * watch
        return compiled(name, lambda: jitted(stage, watch), abstract, batch)

    def evaluate(stage: int, watch: bool) -> Any:
        def evaluation() -> Any:
            step = make_evaluation_step(structure, config, devices=mesh.size, stage=stage, watch=watch)
            return jax.jit(step, out_shardings=rules.replicated(mesh))

        token_bytes = jax.ShapeDtypeStruct((config.model.vocab_size,), "float32", sharding=rules.replicated(mesh))
        values = joined(abstract.trainable, abstract.frozen)
        return compiled(f"evaluate stage {stage}" + " watched" * watch, evaluation, values, token_bytes, batch)

    def init() -> TrainState:
        # Threefry draws depend on nothing but the key, so a sharded init equals one device's.
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Some donated buffers")  # those that are frozen in another dtype
            make = compiled("init", lambda: jax.jit(build, donate_argnums=0, out_shardings=shardings), given)
        return make(start.take() if start else {})

    return Setup(
        config=config,
        mesh=mesh,
        structure=structure,
        parts=parts,
        abstract_state=abstract,
        batch_spec=batch,
        boundaries=SiteRules.of(config.model).boundaries(),
        schedule=schedule,
        init=init,
        jitted=jitted,
        train=train,
        evaluate=evaluate,
        compilations=compilations,
        start=start,
    )


def state_shardings(abstract: TrainState, parts: Partition, mesh: Mesh) -> TrainState:
    """Where each array of a state goes: parameters, moments and averages by logical axes, the rest everywhere."""
    whole: Any = rules.replicated(mesh)
    axes, frozen = (part.map(lambda weight: weight.axes) for part in (parts.trained, parts.frozen))
    return TrainState(
        step=whole,
        trainable=rules.sharding_tree(axes, abstract.trainable, mesh),
        frozen=rules.sharding_tree(frozen, abstract.frozen, mesh) if frozen else {},
        optimizer=rules.optimizer_sharding(abstract.optimizer, abstract.trainable, axes, mesh),
        average=rules.sharding_tree(axes, abstract.average, mesh) if abstract.average else {},
        guard=jax.tree.map(lambda _: whole, abstract.guard),
        rng=whole,
    )


def examples_to_tokens(config: ExperimentConfig) -> int:
    """Tokens that one example stands for in rates: its length, or an image's patches."""
    if config.model.kind == "vit":
        vision = config.model.vision
        return (vision.image_size // vision.patch_size) ** 2 + int(vision.class_token)
    return config.data.sequence_length


def compile_ahead(setup: Setup, first_step: int = 0) -> float:
    """Compile every step function that the run will call; returns the seconds it took."""
    start = time.perf_counter()
    config = setup.config
    if first_step >= config.steps:
        return 0.0
    stages = sorted({setup.stage(first_step), *(b for b in setup.boundaries if first_step < b < config.steps)})
    for stage in stages:
        setup.train(stage, False)
        if config.log.watch_every:
            setup.train(stage, True)
    return time.perf_counter() - start


def summary(setup: Setup) -> list[str]:
    """What is printed before the first step: devices, parameters by part and where they lie, memory, flops, seconds."""
    config, mesh = setup.config, setup.mesh
    counts = parameter_counts(config.model)
    state = setup.abstract_state
    trained, frozen = (sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(v)) for v in (state.trainable, state.frozen))
    parts = ", ".join(f"{part} {count:,}" for part, count in counts.items() if part != "total" and count)
    tokens = examples_to_tokens(config)
    flops = flops_per_token(config.model, tokens)
    device = mesh.devices.flat[0]
    peak = metrics.peak_flops(device.device_kind, config.model.dtype, config.log.peak_flops)
    lines = [
        f"devices: {describe(mesh)} on {device.device_kind}",
        f"parameters: {trained + frozen:,} ({parts})" + (f", of which {trained:,} are trained" if frozen else ""),
        f"flops per token (forward and backward): {flops:,.0f}",
        metrics.mfu_formula(flops, mesh.size, device.device_kind, peak),
    ]
    for name, found in setup.compilations.items():
        memory = ", ".join(f"{use} {size / 2**20:,.1f} MiB" for use, size in found.memory.items() if use != "code")
        lines.append(
            f"{name}: trace {found.trace_seconds:.2f} s, lower {found.lower_seconds:.2f} s, "
            f"compile {found.compile_seconds:.2f} s; per device {memory}"
        )
    return lines


def parameter_table(setup: Setup) -> str:
    """Parameter, shape, spec and bytes per device, one line each."""
    axes = setup.structure.map(lambda weight: weight.axes)
    state = setup.abstract_state
    return rules.format_table(rules.table(axes, joined(state.trainable, state.frozen), setup.mesh))
