"""configs/tiny_everything.py, every plug point in one model, made small: it trains, shards, resumes and exports."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from configs import tiny_everything
from sparsejax import nnx_compat
from sparsejax.compress.export import export
from sparsejax.config import finalize
from sparsejax.context import Context
from sparsejax.data.config import DataConfig
from sparsejax.data.pipeline import build_data
from sparsejax.models.config import AttentionConfig, FFNConfig
from sparsejax.parallel import launch
from sparsejax.parallel.config import MeshConfig
from sparsejax.train.checkpoint import restore
from sparsejax.train.config import CheckpointConfig, EvaluateConfig, LogConfig
from sparsejax.train.run import train
from sparsejax.train.setup import prepare
from sparsejax.train.state import build

START, STEPS = 3, 6
SHARDED = MeshConfig(data=2, fsdp=2, expert=2)


def small(mesh=MeshConfig(data=1), **changes):
    """The config with its methods as they are, 2 layers of width 32; QAT starts at step 3."""
    config = tiny_everything.get_config()
    model = dataclasses.replace(
        config.model,
        num_layers=2,
        d_model=32,
        attention=AttentionConfig(num_heads=4, qk_norm=True),
        ffn=FFNConfig(hidden=64, activation="relu2"),
        feed_pattern=("ffn", "moe:experts=4,k=2,hidden=32,balance=sequence"),
        inputs=tuple(rule.replace("start=100", f"start={START}") for rule in config.model.inputs),
        weights=tuple(rule.replace("start=100", f"start={START}") for rule in config.model.weights),
    )
    objectives = tuple(o if not o.startswith("l1") else "l1:weights=0/1e-4/1e-3,ends=1/3/6" for o in config.objectives)
    optimizer = dataclasses.replace(config.optimizer, warmup_steps=0)
    base = dict(
        steps=STEPS,
        batch_size=8,
        model=model,
        objectives=objectives,
        mesh=mesh,
        optimizer=optimizer,
        data=DataConfig(source="copy", sequence_length=16),
        log=LogConfig(every=1, writers=("jsonl",)),
        evaluate=EvaluateConfig(batches=1),
        checkpoint=CheckpointConfig(every=2, keep=9),
    )
    return finalize(dataclasses.replace(config, **{**base, **changes}))


def losses(config, steps=STEPS):
    data = build_data(config.data, model_kind="decoder", batch_size=config.batch_size, seed=config.seed)
    config = finalize(config, vocab_size=data.vocab_size)
    sizes = [size for size in dataclasses.astuple(config.mesh)[:5]]
    setup = prepare(config, data.batch_spec(), devices=jax.devices()[: int(np.prod(sizes))])
    state, found = setup.init(), []
    for step in range(steps):
        batch = launch.global_batch(data.batch(step), setup.mesh, config.batch_size)
        state, metrics = setup.train(setup.stage(step), False)(state, batch)
        found.append(float(metrics["loss"]))
    return setup, state, found


@functools.cache
def on_one_device():
    return losses(small())


def test_it_shards_as_one_device_trains():
    _, _, alone = on_one_device()
    _, _, sharded = losses(small(SHARDED))
    np.testing.assert_allclose(sharded[: START + 1], alone[: START + 1], rtol=1e-5)
    # Once activations are rounded to int8, a last-bit difference of a sum can move a code: the curves stay close, not equal.
    np.testing.assert_allclose(sharded, alone, rtol=2e-3)


def test_it_compiles_one_step_per_stage():
    setup, _, _ = on_one_device()
    assert sorted(name for name in setup.compilations if name.startswith("train")) == ["train stage 0", f"train stage {START}"]


def test_it_resumes_sharded_to_the_same_bits_on_both_sides_of_the_quantizers_start(tmp_path):
    config = small(SHARDED)
    train(config, out=tmp_path / "straight")
    straight = load_last(tmp_path / "straight")
    for resumed_from in (2, 4):
        again = tmp_path / f"again from {resumed_from}"
        train(config, out=again, resume=str(tmp_path / "straight" / "checkpoints" / str(resumed_from)))
        found = load_last(again)
        assert straight.keys() == found.keys() and len(straight) > 20
        for name, value in straight.items():
            np.testing.assert_array_equal(value, found[name], err_msg=name)


def load_last(folder):
    """Every array of the last checkpoint by path."""
    config = small(SHARDED)
    data = build_data(config.data, model_kind="decoder", batch_size=config.batch_size, seed=config.seed)
    setup = prepare(finalize(config, vocab_size=data.vocab_size), data.batch_spec())
    state = restore(folder / "checkpoints" / str(STEPS), setup.abstract_state)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]}


def test_its_export_serves_the_trained_bits():
    setup, state, _ = on_one_device()
    exported = export(setup.structure, state.trainable, "float32")
    assert exported.bytes_after < 0.5 * exported.bytes_before
    batch = {"tokens": jnp.asarray(np.random.default_rng(0).integers(0, 100, (2, 16)), jnp.int32)}
    ctx = Context(mode="prefill")
    trained = jax.jit(lambda v: build(setup.structure, v, "float32")(batch, ctx)[0])(state.trainable)
    served = jax.jit(lambda v: nnx_compat.merge(setup.structure, v)(batch, ctx)[0])(exported.values)
    np.testing.assert_array_equal(trained, served)
