"""The training step: accumulation, sharding, guard, optimizers, learning, all on tiny models."""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import config_text, plugs
from sparsejax.config import ExperimentConfig, finalize
from sparsejax.data.config import DataConfig
from sparsejax.models.config import AttentionConfig, FFNConfig, ModelConfig
from sparsejax.parallel import launch
from sparsejax.parallel.config import MeshConfig
from sparsejax.train import optim
from sparsejax.train.config import CheckpointConfig, OptimizerConfig
from sparsejax.train.loss import chunks_for, score, score_chunked
from sparsejax.train.partition import partition
from sparsejax.train.setup import prepare
from sparsejax.train.state import abstract_model, init_state, initial_values

VOCAB, LENGTH, BATCH = 40, 16, 8


def experiment(**changes) -> ExperimentConfig:
    model = dict(
        num_layers=2,
        d_model=32,
        vocab_size=VOCAB,
        attention=AttentionConfig(num_heads=4, num_kv_heads=2),
        ffn=FFNConfig(hidden=64, activation="relu2"),
    )
    model.update(changes.pop("model", {}))
    base = dict(
        steps=8,
        batch_size=BATCH,
        model=ModelConfig(**model),
        data=DataConfig(source="copy", sequence_length=LENGTH),
        mesh=MeshConfig(data=1),
        optimizer=OptimizerConfig(learning_rate=1e-2, schedule="constant"),
    )
    return finalize(ExperimentConfig(**{**base, **changes}))


def batch(seed=0, ragged=True) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    tokens = random.integers(0, VOCAB, (BATCH, LENGTH + 1)).astype(np.int32)
    lengths = random.integers(2, LENGTH + 1, BATCH) if ragged else np.full(BATCH, LENGTH)
    inside = np.arange(LENGTH) < lengths[:, None]
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "weights": inside.astype(np.float32),
        "segment_ids": inside.astype(np.int32),
        "positions": np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (BATCH, LENGTH)).copy(),
    }


SPEC = {name: (array.shape, array.dtype) for name, array in batch().items()}


SETUPS = {}


def prepared(config):
    """A setup on as many devices as its mesh has, made and compiled once for all tests."""
    key = config_text.to_text(config)
    if key not in SETUPS:
        SETUPS[key] = prepare(config, SPEC, devices=jax.devices()[: np.prod(dataclasses.astuple(config.mesh)[:5])])
    return SETUPS[key]


def steps(config, count=1, watch=False, seeds=None):
    """(state after `count` steps, metrics of each step)."""
    setup = prepared(config)
    state, found = setup.init(), []
    for i in range(count):
        placed = launch.global_batch(batch((seeds or range(count))[i]), setup.mesh, BATCH)
        state, metrics = setup.train(setup.stage(i), watch)(state, placed)
        found.append(jax.device_get(metrics))
    return state, found


def distance(a, b) -> float:
    """Largest relative difference of two trees of updates, by leaf norm."""
    return max(
        float(np.linalg.norm(x - y) / (np.linalg.norm(y) + 1e-30))
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


PLAIN = OptimizerConfig("sgd", learning_rate=1.0, schedule="constant", weight_decay=0.0, clip_norm=0.0)


def gradients(config):
    """Gradients of one step, read off a plain SGD step of learning rate 1 without clipping."""
    setup = prepared(dataclasses.replace(config, optimizer=PLAIN))
    # Drawn on one device and laid out over the mesh: to draw it there compiles as long as the step does.
    drawn = prepared(experiment(optimizer=PLAIN)).init()
    before = jax.device_get(drawn.trainable)
    placed = jax.device_put(drawn, jax.tree.map(lambda leaf: leaf.sharding, setup.abstract_state))
    state, metrics = setup.train(0, False)(placed, launch.global_batch(batch(), setup.mesh, BATCH))
    after = jax.device_get(state.trainable)
    return jax.tree.map(np.subtract, before, after), float(metrics["loss"])


@pytest.mark.parametrize("accumulate", [2, 4])
def test_accumulation_with_ragged_masks_equals_the_large_batch(accumulate):
    whole, loss = gradients(experiment())
    parts, accumulated = gradients(experiment(accumulate=accumulate))
    assert abs(loss - accumulated) < 1e-6
    assert distance(parts, whole) < 1e-5


@pytest.mark.parametrize(
    "mesh",
    [
        MeshConfig(data=8),
        MeshConfig(data=1, fsdp=8),
        MeshConfig(data=2, tensor=2, fsdp=2),
        MeshConfig(data=1, tensor=2, sequence=4),
        MeshConfig(data=2, sequence=2, fsdp=2),
    ],
    ids=lambda m: "x".join(map(str, dataclasses.astuple(m)[:5])),
)
def test_a_sharded_step_equals_one_device(mesh):
    whole, loss = gradients(experiment())
    sharded, sharded_loss = gradients(experiment(mesh=mesh))
    assert abs(loss - sharded_loss) < 1e-6
    assert distance(sharded, whole) < 1e-5


def test_a_sharded_state_is_drawn_as_on_one_device():
    sharded = prepared(experiment(mesh=MeshConfig(data=2, tensor=2, fsdp=2), optimizer=PLAIN)).init()
    assert not all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(sharded.trainable))
    alone = prepared(experiment(optimizer=PLAIN)).init()
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(sharded), jax.device_get(alone))


def test_large_parameters_are_sharded_and_silent_replication_is_an_error():
    config = experiment(model=dict(d_model=256, ffn=FFNConfig(hidden=512, activation="relu")), mesh=MeshConfig(data=2, fsdp=4))
    setup = prepare(config, SPEC)
    for leaf in jax.tree.leaves(setup.abstract_state):
        if np.prod(leaf.shape) > 2**16:
            assert not leaf.sharding.is_fully_replicated
    odd = experiment(
        model=dict(d_model=258, attention=AttentionConfig(num_heads=3, num_kv_heads=3), ffn=FFNConfig(hidden=515)),
        mesh=MeshConfig(data=2, fsdp=4),
    )
    with pytest.raises(plugs.ConfigError, match="mlp"):
        prepare(odd, SPEC)


def test_five_steps_compile_once():
    config = experiment()
    setup = prepare(config, SPEC, devices=jax.devices()[:1])
    state = setup.init()
    placed = launch.global_batch(batch(), setup.mesh, BATCH)
    counted = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *a, **k: counted.append(name) if "backend_compile" in name else None
    )
    for step in range(5):
        state, _ = setup.train(setup.stage(step), False)(state, placed)
    assert len(counted) == 1
    assert [name for name in setup.compilations if name.startswith("train")] == ["train stage 0"]


def test_watching_changes_no_parameter():
    plain, _ = steps(experiment(), 2)
    watched, found = steps(experiment(), 2, watch=True)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), plain.trainable, watched.trainable)
    seen = found[0]["watch"]
    assert seen["zero_fraction"].shape == (2,) and seen["zero_fraction_position"].shape == (2, LENGTH)
    assert seen["attention_entropy"].shape == (2,) and seen["dead_units"].shape == (2,)
    assert 0.3 < seen["zero_fraction"].mean() < 0.7
    assert found[0]["param_norm/attn"] > 0 and found[0]["grad_norm/mlp"] > 0 and found[0]["update_norm/embed"] > 0


def test_watched_zeros_do_not_count_padding():
    _, found = steps(experiment(accumulate=2), 1, watch=True)
    _, whole = steps(experiment(), 1, watch=True)
    np.testing.assert_allclose(found[0]["watch"]["zero_fraction"], whole[0]["watch"]["zero_fraction"], rtol=1e-5)


def test_skipping_leaves_everything_but_the_step_as_it_was():
    config = experiment(checkpoint=CheckpointConfig(on_nan="skip"))
    setup = prepared(config)
    state = setup.init()
    poisoned = state._replace(trainable=jax.tree.map(lambda a: a * jnp.nan, state.trainable))
    before = jax.device_get(poisoned._replace(trainable=state.trainable))
    after, metrics = setup.train(0, False)(poisoned, launch.global_batch(batch(), setup.mesh, BATCH))
    assert bool(metrics["bad"]) and int(after.step) == 1
    jax.tree.map(np.testing.assert_array_equal, before.optimizer, jax.device_get(after.optimizer))


def test_a_spike_is_bad_once_the_average_is_known():
    config = experiment(checkpoint=CheckpointConfig(on_nan="skip", spike_factor=1.5), steps=60)
    setup = prepared(config)
    state = setup.init()
    step, placed = setup.train(0, False), launch.global_batch(batch(), setup.mesh, BATCH)
    for _ in range(30):
        state, metrics = step(state, placed)
        assert not metrics["bad"]
    state = state._replace(trainable=jax.tree.map(lambda a: a * 3, state.trainable))
    assert bool(step(state, placed)[1]["bad"])


def test_the_average_of_the_weights_follows_them():
    decay = 0.9
    config = experiment(optimizer=OptimizerConfig(ema_decay=decay, schedule="constant"))
    setup = prepared(config)
    state = setup.init()
    expected = jax.device_get(state.average)
    for i in range(3):
        state, _ = setup.train(0, False)(state, launch.global_batch(batch(i), setup.mesh, BATCH))
        expected = jax.tree.map(lambda a, w: decay * a + (1 - decay) * w, expected, jax.device_get(state.trainable))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), jax.device_get(state.average), expected)


def test_cross_entropy_in_pieces_equals_the_whole_in_value_and_gradient():
    h = jax.random.normal(jax.random.key(0), (3, 12, 8))
    w = jax.random.normal(jax.random.key(1), (8, VOCAB))
    found = batch()
    targets, weights = jnp.asarray(found["targets"][:3, :12]), jnp.asarray(found["weights"][:3, :12])

    def total(h, w, chunks):
        outputs = score_chunked(lambda x: x @ w, h, targets, weights, chunks=chunks)
        return outputs.nll_sum + 0.1 * outputs.z_sum, outputs

    (whole, outputs), (dh, dw) = jax.value_and_grad(total, (0, 1), has_aux=True)(h, w, 1)
    log_p = jax.nn.log_softmax(np.asarray(h @ w, np.float64))
    expected = -np.sum(np.take_along_axis(np.asarray(log_p), np.asarray(targets)[..., None], -1)[..., 0] * weights)
    np.testing.assert_allclose(outputs.nll_sum, expected, rtol=1e-5)
    (pieces, others), (dh4, dw4) = jax.value_and_grad(total, (0, 1), has_aux=True)(h, w, 4)
    np.testing.assert_allclose(pieces, whole, rtol=1e-6)
    np.testing.assert_allclose(others.correct_sum, outputs.correct_sum)
    np.testing.assert_allclose(dh4, dh, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(dw4, dw, rtol=1e-4, atol=1e-5)


def test_pieces_bound_the_logits_in_memory():
    assert chunks_for(8, 128, 300, 1) == 1
    chunks = chunks_for(32, 2048, 50_000, 1)
    assert 2048 % chunks == 0 and 32 * (2048 // chunks) * 50_000 <= 2**24 * 1.01
    assert chunks_for(32, 2048, 50_000, 64) < chunks
    h = jnp.zeros((4, 64, 16))
    targets, weights = jnp.zeros((4, 64), jnp.int32), jnp.ones((4, 64))

    def memory(chunks):
        def loss(w, h):
            return score_chunked(lambda x: x @ w, h, targets, weights, chunks=chunks).nll_sum

        compiled = jax.jit(jax.grad(loss)).lower(jnp.zeros((16, 4096)), h).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert memory(16) < 0.3 * memory(1)


def test_score_counts_hits_and_weights():
    logits = jnp.asarray([[[2.0, 0.0], [0.0, 1.0], [3.0, 0.0]]])
    outputs = score(logits, jnp.asarray([[0, 0, 0]]), jnp.asarray([[1.0, 1.0, 0.0]]))
    assert float(outputs.correct_sum) == 1.0 and float(outputs.weight_sum) == 2.0


def first_state(structure, transformation):
    values = initial_values(experiment().model, 0)
    return init_state(values, partition(structure, values), 0, transformation, False, "float32")


@pytest.mark.parametrize("name", sorted(optim.optimizers()))
def test_every_optimizer_of_optax_takes_a_step(name):
    function = optim.optimizers()[name]
    decay = 0.01 if "weight_decay" in inspect.signature(function).parameters else 0.0
    schedule = "cosine" if optim.takes_schedule(function) else "constant"
    config = OptimizerConfig(name, learning_rate=1e-3, weight_decay=decay, schedule=schedule)
    structure, _ = abstract_model(experiment().model)
    transformation = optim.optimizer(config, 10, structure)
    state = first_state(structure, transformation)
    gradients = jax.tree.map(jnp.ones_like, state.trainable)
    updates, _ = jax.eval_shape(transformation.update, gradients, state.optimizer, state.trainable)
    assert jax.tree.structure(updates) == jax.tree.structure(state.trainable)


def test_decay_reaches_the_roles_it_names_and_no_other():
    structure, _ = abstract_model(experiment().model)
    config = OptimizerConfig("adamw", learning_rate=1.0, schedule="constant", weight_decay=0.5, decay_roles=("matrix",))
    transformation = optim.optimizer(config, 10, structure)
    state = first_state(structure, transformation)
    zero = jax.tree.map(jnp.zeros_like, state.trainable)
    updates, _ = transformation.update(zero, state.optimizer, state.trainable)
    moved = structure.map(lambda w, u: bool(np.any(u != 0)), updates)
    expected = structure.map(lambda w, u: w.role == "matrix", updates)
    assert moved == expected


@pytest.mark.parametrize(
    "config, points",
    [
        (OptimizerConfig(learning_rate=1.0, schedule="constant"), {0: 1.0, 99: 1.0}),
        (
            OptimizerConfig(learning_rate=1.0, schedule="cosine", warmup_steps=10, final_fraction=0.1),
            {0: 0.0, 5: 0.5, 10: 1.0, 100: 0.1},
        ),
        (
            OptimizerConfig(learning_rate=1.0, schedule="wsd", decay_fraction=0.2, final_fraction=0.0),
            {0: 1.0, 80: 1.0, 90: 0.5, 100: 0.0},
        ),
        (OptimizerConfig(learning_rate=1.0, schedule="inverse_sqrt", warmup_steps=4), {2: 0.5, 4: 1.0, 16: 0.5}),
    ],
)
def test_schedules_pass_through_their_known_points(config, points):
    schedule = optim.schedule(config, 100)
    for step, value in points.items():
        np.testing.assert_allclose(schedule(step), value, atol=1e-6)


@pytest.mark.parametrize(
    "config, message",
    [
        (OptimizerConfig("adamv"), "adamw"),
        (OptimizerConfig("sgd"), "weight_decay"),
        (OptimizerConfig("adamw", arguments="b3=1"), "b3"),
        (OptimizerConfig("adamw", arguments="b1=often"), "often"),
    ],
)
def test_unusable_optimizers_are_named(config, message):
    from sparsejax.train.state import abstract_model

    with pytest.raises(plugs.ConfigError, match=message):
        optim.optimizer(config, 10, abstract_model(experiment().model)[0])


def test_a_constant_batch_is_learned():
    _, found = steps(experiment(), 40, seeds=[0] * 40)
    assert found[-1]["loss"] < 0.3 * found[0]["loss"]


def test_a_schedule_that_the_run_cuts_short_is_told():
    wsd = OptimizerConfig(schedule="wsd", warmup_steps=50, decay_fraction=0.6)
    assert "50 steps of warm-up and 60 of decay" in optim.schedule_notes(wsd, 100)[0]
    assert "warm-up takes 50 steps and the run has 40" in optim.schedule_notes(wsd, 40)[0]
    assert not optim.schedule_notes(wsd, 200) and not optim.schedule_notes(OptimizerConfig(), 1)
