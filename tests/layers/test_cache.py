"""The cache: what it holds after appends, what it reads, and that decoding against it is the whole forward pass."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsejax import nnx_compat
from sparsejax.context import Context
from sparsejax.layers.cache import Dense, KVCache, cache_format, empty_cache, over_filled, read_sizes
from sparsejax.models.config import AttentionConfig, FFNConfig, ModelConfig, NormConfig, PositionConfig, RopeConfig
from sparsejax.models.serving import read_bytes, serving_form
from sparsejax.models.transformer import Transformer
from sparsejax.ops.attend import attend
from sparsejax.ops.attend_one import attend_one
from sparsejax.plugs import ConfigError, register

VOCAB, LENGTH = 40, 80  # longer than the ring of a window of 5


def config(**changes):
    base: dict[str, Any] = dict(
        num_layers=3,
        d_model=16,
        vocab_size=VOCAB,
        max_length=LENGTH,
        unroll=1,
        attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=4),
        ffn=FFNConfig(hidden=24, activation="swiglu"),
    )
    return ModelConfig(**{**base, **changes})


def model(seed=0, **changes):
    structure, values = nnx_compat.split(Transformer(config(**changes), jax.random.key(seed)))
    # Fan-in embeddings are so small that attention would hardly look at anything.
    return structure, jax.tree.map(lambda a: a * 2 if a.ndim >= 2 else a, values)


HEADS = dict(num_heads=4, num_kv_heads=2, head_dim=4)
MODELS = {
    "rope, grouped queries": {},
    "one kv head, softcaps": dict(attention=AttentionConfig(4, 1, 4, softcap=2.0), head_softcap=3.0),
    "learned with offset": dict(positions=PositionConfig("learned", offset=2)),
    "sinusoidal": dict(positions=PositionConfig("sinusoidal")),
    "relative": dict(positions=PositionConfig("relative")),
    "no positions, untied, biases": dict(
        positions=PositionConfig("none"), tied_embeddings=False, head_bias=True,
        attention=AttentionConfig(**HEADS, bias=True, out_bias=True), ffn=FFNConfig(24, activation="geglu", bias=True),
    ),
    "windows, two thetas, qk-norm": dict(
        attention_pattern=("local", "global"), block="sandwich", norm=NormConfig(plus_one=True),
        attention=AttentionConfig(**HEADS, window=5, qk_norm=True),
        positions=PositionConfig(rope=RopeConfig(theta=1e6, local_theta=1e4, scaling="linear:8")),
    ),
    "every layer local, int4 keys": dict(
        attention_pattern=("local",), attention=AttentionConfig(**HEADS, window=7, cache_format="int4:asym,token,zero=min")
    ),
    "encoder-decoder": dict(kind="encoder_decoder", encoder_layers=2, positions=PositionConfig("relative")),
}


def decoded(structure, values, tokens, prompt, pad, ctx=None):
    """Logits [B, N - prompt + 1, V] from a prefill of `prompt` tokens behind `pad` of padding, then token by token."""
    ctx = ctx or Context()

    def module(values):
        return nnx_compat.merge(structure, values)

    @jax.jit
    def prefill(values, tokens):
        rows = len(tokens)
        index = jnp.broadcast_to(jnp.arange(pad + prompt) - pad, (rows, pad + prompt))
        padded = jnp.pad(tokens[:, :prompt], ((0, 0), (pad, 0)))
        batch = {"tokens": padded, "positions": jnp.maximum(index, 0), "segment_ids": (index >= 0).astype(jnp.int32)}
        cache = module(values).empty_cache(rows, pad + tokens.shape[1])
        h, _, cache = module(values).features(batch, ctx._replace(mode="prefill"), cache)
        return module(values).logits(h[:, -1]), cache

    @jax.jit
    def step(values, token, position, cache):
        batch = {"tokens": token[:, None], "positions": jnp.full((len(token), 1), position, jnp.int32)}
        h, _, cache = module(values).features(batch, ctx._replace(mode="decode"), cache)
        return module(values).logits(h[:, -1]), cache

    logits, cache = prefill(values, tokens)
    found = [logits]
    for position in range(prompt, tokens.shape[1]):
        logits, cache = step(values, tokens[:, position], position, cache)
        found.append(logits)
    return np.stack(found, 1)


def sequences(length=LENGTH, rows=2, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, VOCAB, (rows, length)), jnp.int32)


@pytest.mark.parametrize("name", MODELS)
def test_prefill_and_decode_equal_the_whole_forward_pass_at_every_position(name):
    structure, values = model(**MODELS[name])
    tokens, ctx, batch = sequences(), Context(), {}
    if name == "encoder-decoder":
        batch = {"encoder_tokens": sequences(9, seed=1), "encoder_segment_ids": jnp.ones((2, 9), jnp.int32).at[1, 6:].set(0)}
        ctx = ctx._replace(memory=jax.jit(lambda v: nnx_compat.merge(structure, v).encode(batch, Context())[0].memory)(values))
        ctx = ctx._replace(memory_segment_ids=batch["encoder_segment_ids"])
    whole = jax.jit(lambda v: nnx_compat.merge(structure, v)({**batch, "tokens": tokens})[0])(values)
    # A ring that comes to wrap, and one that is full after the prefill.
    for prompt, pad in [(2, 3), (LENGTH - 4, 0)][: 2 if "local" in name or "windows" in name else 1]:
        found = decoded(structure, values, tokens, prompt, pad, ctx)
        np.testing.assert_allclose(found, whole[:, prompt - 1 :], rtol=2e-4, atol=3e-4)


@pytest.mark.parametrize("name", ["rope, grouped queries", "no positions, untied, biases", "windows, two thetas, qk-norm"])
def test_the_serving_form_computes_what_the_model_does(name):
    structure, values = model(**MODELS[name])
    serving = serving_form(structure, values)
    tokens = sequences(12)
    forms = (structure, values), serving
    whole, served = (jax.jit(lambda v, s=s: nnx_compat.merge(s, v)({"tokens": tokens})[0])(v) for s, v in forms)
    np.testing.assert_allclose(served, whole, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(decoded(*serving, tokens, 4, 2), whole[:, 3:], rtol=2e-4, atol=3e-4)


def test_the_serving_form_of_an_encoder_decoder_reads_its_memory():
    structure, values = model(**MODELS["encoder-decoder"])
    batch = {"tokens": sequences(6), "encoder_tokens": sequences(9, seed=1)}
    forms = (structure, values), serving_form(structure, values)
    whole, served = (jax.jit(lambda v, s=s: nnx_compat.merge(s, v)(batch)[0])(v) for s, v in forms)
    np.testing.assert_allclose(served, whole, rtol=1e-4, atol=1e-4)


def test_layers_with_ops_of_their_own_keep_them_in_the_serving_form():
    structure, values = model(inputs=("blocks.1.attn.q=topk:0.5", "blocks.*.mlp.up=topk:0.5"))
    served = serving_form(structure, values)
    blocks = nnx_compat.merge(*served).blocks.segments["0"]
    assert [block.attn.qkv is None for block in blocks.values()] == [False, True, False]
    assert all(block.mlp.gate_up is None for block in blocks.values())
    tokens = sequences(6)
    forms = (structure, values), served
    whole, found = (jax.jit(lambda v, s=s: nnx_compat.merge(s, v)({"tokens": tokens})[0])(v) for s, v in forms)
    np.testing.assert_allclose(found, whole, rtol=1e-5, atol=1e-5)


def test_consuming_frees_each_stacked_array():
    structure, values = model()
    stacked = jax.tree.leaves(values["blocks"])
    served, arrays = serving_form(structure, values, consume=True)
    assert all(leaf.is_deleted() for leaf in stacked)
    assert np.isfinite(nnx_compat.merge(served, arrays)({"tokens": sequences(4)})[0]).all()


def test_bytes_read_count_the_tied_table_once_and_rows_looked_up_not_at_all():
    count = lambda tree: sum(leaf.nbytes for leaf in jax.tree.leaves(tree))  # noqa: E731
    structure, values = model()
    assert read_bytes(structure, values) == count(values) == read_bytes(*serving_form(structure, values))
    structure, values = model(tied_embeddings=False, positions=PositionConfig("learned"))
    assert read_bytes(structure, values) == count(values) - count(values["embed"])


@settings(max_examples=8)  # every shape is compiled for
@given(
    window=st.sampled_from([0, 3, 64, 70]),
    counts=st.lists(st.sampled_from([1, 1, 2, 5, 63, 64, 65, 130, 200]), min_size=1, max_size=5),
)
def test_after_any_appends_the_last_tokens_are_held_each_once(window, counts):
    total = sum(counts)
    cache = empty_cache(Dense(), 1, total, heads=2, head_dim=3, dtype=jnp.float32, window=window)
    numbers = np.arange(1, total + 1)
    start = 0
    for count in counts:
        part = jnp.asarray(numbers[start : start + count], jnp.float32)
        k = jnp.broadcast_to(part[None, :, None, None], (1, count, 2, 3))
        cache = cache.append(k, -k, jnp.asarray(numbers[None, start : start + count]), None)
        start += count
    held = cache.read(cache.slots)
    kept = min(total, cache.slots)
    assert cache.slots == min(total, -(-window // 64) * 64 or total) and int(cache.length) == total
    filled = np.asarray(held.segment_ids[0] > 0)
    assert sorted(np.asarray(held.positions[0])[filled]) == list(numbers[-kept:])
    assert np.array_equal(held.k[0, :, :, 0], np.broadcast_to(held.positions, (2, cache.slots)))
    assert np.array_equal(held.v, -held.k)


def test_a_ring_refuses_more_tokens_at_once_than_it_can_still_show():
    cache = empty_cache(Dense(), 1, 200, heads=1, head_dim=2, dtype=jnp.float32, window=60)
    q = jnp.zeros((1, 6, 1, 2))
    with pytest.raises(ValueError, match="6 tokens at once: a ring of 64 slots with a window of 60 decodes at most 5"):
        cache.attend(q, lambda keys: keys.k)
    assert cache.attend(q[:, :5], lambda keys: keys.k).shape == (1, 1, 64, 2)


def test_several_tokens_decode_at_once_against_a_filled_cache():
    structure, values = model(**MODELS["windows, two thetas, qk-norm"])
    tokens = sequences(20)

    @jax.jit
    def both(values):
        transformer = nnx_compat.merge(structure, values)
        cache, parts = transformer.empty_cache(2, 20), []
        for low, high in ((0, 7), (7, 12), (12, 20)):
            positions = jnp.broadcast_to(jnp.arange(low, high), (2, high - low))
            batch = {"tokens": tokens[:, low:high], "positions": positions}
            h, _, cache = transformer.features(batch, Context(mode="decode"), cache)
            parts.append(transformer.logits(h))
        return jnp.concatenate(parts, 1), transformer({"tokens": tokens})[0]

    np.testing.assert_allclose(*both(values), rtol=2e-4, atol=3e-4)


def test_only_the_filled_prefix_is_read_and_none_of_it_is_missed():
    assert read_sizes(100) == [100] and read_sizes(256) == [256] and read_sizes(3000) == [256, 512, 1024, 2048, 3000]
    cache = empty_cache(Dense(), 1, 3000, heads=1, head_dim=1, dtype=jnp.float32)
    for filled, read in ((0, 256), (256, 256), (257, 512), (1024, 1024), (2049, 3000), (3000, 3000)):
        seen = over_filled(dataclasses.replace(cache, length=jnp.int32(filled)), lambda keys: jnp.int32(keys.k.shape[2]))
        assert int(seen) == read


@pytest.mark.parametrize(
    ("slots", "groups", "repeats", "softcap", "with_bias"),
    [(1, 2, 1, 1.5, False), (9, 1, 3, 0.0, True), (9, 2, 3, 1.5, True), (9, 2, 1, 0.0, False)],
)
def test_one_query_attends_as_many_do(slots, groups, repeats, softcap, with_bias):
    how = dict(scale=0.7, softcap=softcap)

    @jax.jit
    def both(q, k, v, ids, bias):
        bias = bias if with_bias else None
        heads_first = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
        found = attend_one(q, *heads_first, visible=(ids > 0)[:, None], bias=bias, **how)
        return found, attend(q, k, v, causal=False, bias=bias, key_segment_ids=ids, **how)

    for seed in range(5):
        rng = np.random.default_rng(seed)
        draw = lambda *shape, rng=rng: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
        q, k, v = draw(2, 1, groups * repeats, 4), draw(2, slots, groups, 4), draw(2, slots, groups, 3)
        ids = jnp.asarray(rng.integers(0, 2, (2, slots)), jnp.int32)
        found, expected = both(q, k, v, ids, draw(groups * repeats, 1, slots))
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@register("cache", "test_halves")
@dataclasses.dataclass(frozen=True)
class Halves(Dense):
    """Stores float16 and shows queries the last `recent` tokens alone: a format and a selection from outside."""

    recent: int = 0

    def encode(self, k, v):
        return {"kv": jnp.stack([k, v], -1).astype(jnp.float16)}

    def decode(self, store, head):
        return store["kv"][..., 0].astype(head.dtype), store["kv"][..., 1].astype(head.dtype)

    def select(self, q, cache: KVCache, attend):
        keys = cache.read(cache.slots)
        recent = jnp.arange(cache.slots)[None] >= cache.length - self.recent
        return attend(keys._replace(segment_ids=jnp.where(recent, keys.segment_ids, 0)))


def test_a_format_and_a_selection_plug_in_by_name():
    _, values = model()
    tokens = sequences(10)

    @functools.partial(jax.jit, static_argnums=1)
    def run(values, spec):
        attention = AttentionConfig(**HEADS, cache_format=spec)
        structure = nnx_compat.abstract(lambda: Transformer(config(attention=attention), jax.random.key(0)))[0]
        transformer = nnx_compat.merge(structure, values)
        cache = transformer.empty_cache(2, 10)
        h, _, cache = transformer.features({"tokens": tokens[:, :9]}, Context(mode="prefill"), cache)
        batch = {"tokens": tokens[:, 9:], "positions": jnp.full((2, 1), 9)}
        return transformer.features(batch, Context(mode="decode"), cache)[0]

    dense, near, short = (run(values, spec) for spec in ("dense", "test_halves:recent=10", "test_halves:recent=2"))
    assert 0 < np.abs(dense - near).max() < 1e-2 < np.abs(dense - short).max()
    with pytest.raises(ConfigError, match="model.attention.cache_format: cache = 'dence'.*'dense'"):
        cache_format("dence")
