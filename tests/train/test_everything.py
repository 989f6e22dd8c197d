"""configs/tiny_everything.py, every plug point in one model, made small: it trains, shards, resumes and exports."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import tiny_everything
from sparsejax import nnx_compat
from sparsejax.compress.export import export
from sparsejax.config import finalize
from sparsejax.context import Context
from sparsejax.data.config import DataConfig
from sparsejax.data.pipeline import build_data
from sparsejax.models.config import AttentionConfig, FFNConfig
from sparsejax.parallel.config import MeshConfig
from sparsejax.train.checkpoint import restore
from sparsejax.train.config import CheckpointConfig, EvaluateConfig, LogConfig
from sparsejax.train.loop import Trainer
from sparsejax.train.metrics import read_metrics
from sparsejax.train.setup import prepare
from sparsejax.train.state import build

pytestmark = pytest.mark.filterwarnings("ignore:Sharding info not provided")

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


def trainer(config, folder, setup=None):
    """A trainer in this process; with `setup`, of what is compiled already."""
    data = build_data(config.data, model_kind="decoder", batch_size=config.batch_size, seed=config.seed)
    config = finalize(config, vocab_size=data.vocab_size)
    sizes = [size for size in dataclasses.astuple(config.mesh)[:5]]
    setup = setup or prepare(config, data.batch_spec(), devices=jax.devices()[: int(np.prod(sizes))])
    folder.mkdir()
    return Trainer(setup, data, folder)


def run(folder, config=None, setup=None, resume="auto"):
    """The trainer at the end of a run."""
    made = trainer(config, folder, setup)
    made.restore(made.choose(resume))
    assert made.run()
    return made


def losses(folder):
    return [row["loss"] for row in read_metrics(folder) if "loss" in row]


@pytest.fixture(scope="module")
def on_one_device(tmp_path_factory):
    return run(tmp_path_factory.mktemp("one") / "run", small(checkpoint=CheckpointConfig(every=0)))


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    return run(tmp_path_factory.mktemp("sharded") / "run", small(SHARDED))


def test_it_shards_as_one_device_trains(on_one_device, sharded):
    assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(sharded.state.trainable))
    alone, together = losses(on_one_device.folder), losses(sharded.folder)
    assert len(alone) == STEPS
    np.testing.assert_allclose(together[: START + 1], alone[: START + 1], rtol=1e-5)
    # Once activations are rounded to int8, a last-bit difference of a sum can move a code: the curves stay close, not equal.
    np.testing.assert_allclose(together, alone, rtol=2e-3)


def test_it_compiles_one_step_per_stage(on_one_device):
    compilations = on_one_device.setup.compilations
    assert sorted(name for name in compilations if name.startswith("train")) == ["train stage 0", f"train stage {START}"]


def test_it_resumes_sharded_to_the_same_bits_on_both_sides_of_the_quantizers_start(sharded, tmp_path):
    straight = arrays(sharded)
    for resumed_from in (2, 4):
        saved = sharded.folder / "checkpoints" / str(resumed_from)
        found = arrays(run(tmp_path / str(resumed_from), small(SHARDED), sharded.setup, resume=str(saved)))
        assert straight.keys() == found.keys() and len(straight) > 20
        for name, value in straight.items():
            np.testing.assert_array_equal(value, found[name], err_msg=name)


def arrays(trained):
    """Every array of the last checkpoint by path."""
    state = restore(trained.folder / "checkpoints" / str(STEPS), trained.setup.abstract_state)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]}


def test_its_export_serves_the_trained_bits(on_one_device):
    setup, state = on_one_device.setup, on_one_device.state
    exported = export(setup.structure, state.trainable, "float32")
    assert exported.bytes_after < 0.5 * exported.bytes_before
    batch = {"tokens": jnp.asarray(np.random.default_rng(0).integers(0, 100, (2, 16)), jnp.int32)}
    ctx = Context(mode="prefill")
    trained = jax.jit(lambda v: build(setup.structure, v, "float32")(batch, ctx)[0])(state.trainable)
    served = jax.jit(lambda v: nnx_compat.merge(setup.structure, v)(batch, ctx)[0])(exported.values)
    np.testing.assert_array_equal(trained, served)
