"""The model: causality, scan, remat, purity, every arrangement that a config can ask for."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import nnx_compat
from sparsejax.context import Context, Probe, Stat
from sparsejax.layers.block import Block
from sparsejax.layers.stack import plan_segments
from sparsejax.models.config import (
    AttentionConfig,
    FFNConfig,
    ModelConfig,
    NormConfig,
    PositionConfig,
    RopeConfig,
    VisionConfig,
)
from sparsejax.models.transformer import Transformer
from sparsejax.train.state import build

VOCAB, LENGTH = 32, 12


def model_config(**changes) -> ModelConfig:
    base = dict(
        num_layers=3,
        d_model=16,
        vocab_size=VOCAB,
        max_length=LENGTH,
        attention=AttentionConfig(num_heads=4, num_kv_heads=4, head_dim=4),
        ffn=FFNConfig(hidden=32, activation="relu2"),
    )
    return ModelConfig(**{**base, **changes})


def lm_batch(batch=2, length=LENGTH, seed=0):
    tokens = np.random.default_rng(seed).integers(0, VOCAB, (batch, length)).astype(np.int32)
    return {"tokens": jnp.asarray(tokens)}


FORWARDS = {}


def run(config, batch, seed=0, **context):
    """Logits and statistics; what has been compiled for a config serves again."""
    key = repr((config, seed, context))
    if key not in FORWARDS:
        structure, values = nnx_compat.split(Transformer(config, jax.random.key(seed)))
        forward = jax.jit(lambda values, batch: nnx_compat.merge(structure, values)(batch, Context(**context)))
        FORWARDS[key] = values, forward
    values, forward = FORWARDS[key]
    return forward(values, batch)


VARIANTS = {
    "pre": {},
    "post": dict(block="post"),
    "parallel": dict(block="parallel"),
    "sandwich": dict(block="sandwich", norm=NormConfig(plus_one=True)),
    "layer norm with biases": dict(
        norm=NormConfig("layer", bias=True),
        ffn=FFNConfig(hidden=32, activation="gelu", bias=True),
        attention=AttentionConfig(num_heads=4, num_kv_heads=4, head_dim=4, bias=True, out_bias=True),
    ),
    "grouped queries and qk-norm": dict(attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=4, qk_norm=True)),
    "one kv head, soft-caps": dict(
        attention=AttentionConfig(num_heads=4, num_kv_heads=1, head_dim=6, softcap=5.0), head_softcap=3.0
    ),
    "local and global, two thetas": dict(
        num_layers=5,
        attention_pattern=("local", "local", "global"),
        attention=AttentionConfig(num_heads=4, num_kv_heads=4, head_dim=4, window=3),
        positions=PositionConfig(rope=RopeConfig(theta=1e6, local_theta=1e4, scaling="linear:8")),
    ),
    "partial rotary": dict(positions=PositionConfig(rope=RopeConfig(fraction=0.5))),
    "learned with offset": dict(positions=PositionConfig("learned", offset=2)),
    "sinusoidal": dict(positions=PositionConfig("sinusoidal")),
    "relative": dict(positions=PositionConfig("relative")),
    "no positions": dict(positions=PositionConfig("none")),
    "gated": dict(ffn=FFNConfig(hidden=24, activation="swiglu")),
    "untied, scaled embeddings, token types": dict(tied_embeddings=False, embedding_scale=True, token_types=2),
    "layer scale": dict(layer_scale=1e-2),
    "normed embeddings and projections": dict(
        embedding_norm=True,
        attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=4, qk_norm=True, qk_norm_over="projection"),
    ),
    "two activations": dict(feed_pattern=("ffn:reglu", "ffn"), ffn=FFNConfig(hidden=24, activation="swiglu")),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_no_output_depends_on_a_later_token(name):
    structure, values = nnx_compat.split(Transformer(model_config(**VARIANTS[name]), jax.random.key(0)))
    middle = LENGTH // 2
    logits = jax.jit(lambda tokens: nnx_compat.merge(structure, values)({"tokens": tokens}, Context())[0])
    first, second = (np.array(lm_batch(seed=seed)["tokens"]) for seed in (0, 1))
    second[:, :middle] = first[:, :middle]
    found, changed = (np.asarray(logits(tokens)) for tokens in (first, second))
    assert np.all(np.isfinite(found))
    np.testing.assert_array_equal(found[:, :middle], changed[:, :middle])
    assert np.all(np.any(found[:, middle:] != changed[:, middle:], axis=-1))


def test_no_gradient_reaches_a_later_token():
    structure, values = nnx_compat.split(Transformer(model_config(), jax.random.key(0)))
    middle = LENGTH // 2
    tokens = jnp.tile(jnp.arange(LENGTH), (2, 1))  # rows of the table are positions

    def outputs(table):
        model = nnx_compat.merge(structure, {**values, "embed": {**values["embed"], "table": table}})
        return model.features({"tokens": tokens}, Context())[0][:, :middle].sum()

    gradient = np.asarray(jax.jit(jax.grad(outputs))(values["embed"]["table"]))
    assert np.all(gradient[middle:LENGTH] == 0)
    assert np.all(np.isfinite(gradient)) and np.any(gradient[:middle] != 0)


@pytest.mark.parametrize("name", ["pre", "local and global, two thetas", "relative"])
def test_scan_equals_unrolled_in_values_and_gradients(name):
    config = model_config(**VARIANTS[name])
    batch = lm_batch()

    def loss_and_gradients(config):
        structure, values = nnx_compat.split(Transformer(config, jax.random.key(0)))

        def loss(values):
            return jnp.mean(jnp.square(nnx_compat.merge(structure, values)(batch, Context())[0]))

        value, gradients = jax.jit(jax.value_and_grad(loss))(values)
        return value, gradients["embed"]["table"]

    scanned = loss_and_gradients(dataclasses.replace(config, unroll=1))
    others = [dataclasses.replace(config, scan=False)]
    if name == "pre":  # three layers two by two: one is left over
        others.append(dataclasses.replace(config, unroll=2))
    for other in others:
        value, gradient = loss_and_gradients(other)
        np.testing.assert_allclose(value, scanned[0], rtol=1e-6)
        np.testing.assert_allclose(gradient, scanned[1], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    "signatures, plan",
    [
        ("aaaa", [(1, 4)]),
        ("abab", [(2, 2)]),
        ("aabaabaa", [(3, 2), (1, 2)]),
        ("abc", [(1, 1), (1, 1), (1, 1)]),
        ("aaabaaa", [(1, 3), (1, 1), (1, 3)]),
    ],
)
def test_segments_cover_the_layers_with_the_longest_scans(signatures, plan):
    assert plan_segments(list(signatures)) == plan


def test_a_rule_that_names_a_layer_splits_the_scan():
    config = model_config(num_layers=4, inputs=("blocks.2.mlp.down=topk:0.25",))
    model = Transformer(config, jax.random.key(0))
    assert model.blocks.plan == ((1, 2), (1, 1), (1, 1))
    probe = Probe("mlp.hidden", lambda h, ctx: {"zeros": Stat(jnp.mean(h == 0))})
    _, stats = run(config, lm_batch(), probes=(probe,))
    zeros = np.asarray(stats["mlp.hidden"]["zeros"].value)
    assert zeros.shape == (4,) and zeros[2] >= 0.75 and zeros[[0, 1, 3]].max() < 0.75


def test_remat_lowers_temporary_memory_and_changes_nothing_else():
    config = model_config(num_layers=8, d_model=64, ffn=FFNConfig(hidden=256, activation="gelu"), unroll=1)
    batch = lm_batch(8)

    def compiled(config):
        structure, values = nnx_compat.split(Transformer(config, jax.random.key(0)))

        def loss(values):
            return jnp.mean(jnp.square(nnx_compat.merge(structure, values)(batch, Context())[0]))

        step = jax.jit(jax.value_and_grad(loss)).lower(values).compile()
        return step.memory_analysis().temp_size_in_bytes, step(values)

    plain_bytes, (plain_loss, plain_gradients) = compiled(config)
    for remat, most in (("full", 0.6), ("dots", 0.95)):
        remat_bytes, (remat_loss, remat_gradients) = compiled(dataclasses.replace(config, remat=remat))
        assert remat_bytes < most * plain_bytes, remat
        np.testing.assert_allclose(remat_loss, plain_loss, rtol=1e-6)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7), plain_gradients, remat_gradients)


def test_statistics_survive_scan_and_remat():
    config = model_config(remat="full", unroll=1)
    probe = Probe("mlp.hidden", lambda h, ctx: {"mean": Stat(jnp.mean(h), "mean")})
    _, stats = run(config, lm_batch(), probes=(probe,))
    assert stats["mlp.hidden"]["mean"].value.shape == (3,)


def test_a_write_to_a_variable_inside_a_block_raises(monkeypatch):
    feed = Block.feed

    def writing(self, h, ctx):
        self.mlp_norm.gain[...] = jnp.zeros_like(self.mlp_norm.gain[...])
        return feed(self, h, ctx)

    monkeypatch.setattr(Block, "feed", writing)
    with pytest.raises(RuntimeError, match="written inside the model"):
        run(model_config(), lm_batch(), seed=1)  # traced with the block that writes


def test_an_array_outside_a_weight_is_named():
    model = Transformer(model_config(), jax.random.key(0))
    model.norm.extra = jnp.ones(3)
    with pytest.raises(TypeError, match="norm.extra"):
        nnx_compat.split(model)


def test_an_encoder_sees_both_ways_and_ignores_padding():
    config = model_config(kind="encoder")
    batch = lm_batch()
    segments = jnp.ones((2, LENGTH), jnp.int32).at[:, -3:].set(0)
    first = run(config, {**batch, "segment_ids": segments})[0]
    changed = batch["tokens"].at[:, -1].set((batch["tokens"][:, -1] + 1) % VOCAB)
    padded = run(config, {"tokens": changed, "segment_ids": segments})[0]
    np.testing.assert_array_equal(first[:, :-3], padded[:, :-3])
    assert np.any(run(config, {"tokens": changed})[0][:, 0] != run(config, batch)[0][:, 0])


def test_packed_documents_do_not_see_each_other():
    config = model_config()
    batch = lm_batch()
    segments = jnp.asarray([[1] * 5 + [2] * 7] * 2, jnp.int32)
    positions = jnp.asarray([list(range(5)) + list(range(7))] * 2, jnp.int32)
    packed = run(config, {**batch, "segment_ids": segments, "positions": positions})[0]
    alone = run(config, {"tokens": batch["tokens"][:, 5:]})[0]
    np.testing.assert_allclose(packed[:, 5:], alone, rtol=1e-4, atol=1e-5)


def test_an_encoder_decoder_reads_its_encoder_and_stays_causal():
    config = model_config(kind="encoder_decoder", encoder_layers=2, positions=PositionConfig("relative"))
    batch = lm_batch()
    source = lm_batch(seed=1)["tokens"]
    logits, _ = run(config, {**batch, "encoder_tokens": source})
    other, _ = run(config, {**batch, "encoder_tokens": (source + 1) % VOCAB})
    assert np.any(logits != other)
    later = batch["tokens"].at[:, -1].set((batch["tokens"][:, -1] + 1) % VOCAB)
    same, _ = run(config, {"tokens": later, "encoder_tokens": source})
    np.testing.assert_array_equal(logits[:, :-1], same[:, :-1])


@pytest.mark.parametrize("class_token, pool", [(True, "class"), (False, "mean")])
def test_a_vit_classifies_and_takes_images_of_another_size(class_token, pool):
    vision = VisionConfig(image_size=8, channels=1, patch_size=2, class_token=class_token)
    positions = PositionConfig("learned")
    config = model_config(kind="vit", vocab_size=0, num_classes=10, pool=pool, vision=vision, positions=positions)
    images = jnp.asarray(np.random.default_rng(0).random((3, 12, 12, 1)), jnp.float32)
    assert run(config, {"images": images[:, :8, :8]})[0].shape == (3, 10)
    assert run(config, {"images": images})[0].shape == (3, 10)


def test_bfloat16_computes_in_bfloat16_and_returns_float32_logits():
    config = model_config(dtype="bfloat16")
    structure, values = nnx_compat.split(Transformer(config, jax.random.key(0)))
    logits, _ = jax.jit(lambda v: build(structure, v, "bfloat16")(lm_batch(), Context()))(values)
    wide, _ = run(config, lm_batch())
    assert logits.dtype == jnp.float32
    assert 0 < np.abs(logits - wide).max() < 0.2
