"""Keys and values in few bits: the card's errors, bytes, appends, and that every way of running a model reads the same keys."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.config import ExperimentConfig, finalize
from sparsejax.context import Context
from sparsejax.layers.attention import Attention
from sparsejax.layers.cache import cache_format, empty_cache, token_bytes
from sparsejax.layers.op import SiteRules
from sparsejax.models.config import AttentionConfig, ModelConfig, PositionConfig
from sparsejax.plugs import ConfigError

KV4, KV8 = (f"int{bits}:asym,token,zero=min,scale=f16" for bits in (4, 8))
OFFSET = (np.random.default_rng(0).standard_normal((2, 7, 3, 64)) + np.linspace(-3, 3, 64)).astype(np.float32)


def by_hand(x, bits):
    """P12 of the card: scale and minimum over a head, both in float16."""
    low = x.min(-1, keepdims=True)
    scale = ((x.max(-1, keepdims=True) - low) / (2**bits - 1)).astype(np.float16).astype(np.float32)
    low = low.astype(np.float16).astype(np.float32)
    return np.clip(np.round((x - low) / scale), 0, 2**bits - 1) * scale + low


@pytest.mark.parametrize(("bits", "error"), [(8, 5.4e-3), (4, 9.0e-2)])
def test_keys_are_rounded_as_the_card_says_with_its_errors(bits, error):
    x = np.random.default_rng(1).standard_normal((1, 400, 2, 64)).astype(np.float32) + 3
    k, v = cache_format((KV4, KV8)[bits == 8]).as_read(jnp.asarray(x), jnp.asarray(-x))
    np.testing.assert_allclose(k, by_hand(x, bits), atol=2e-6)
    np.testing.assert_allclose(v, by_hand(-x, bits), atol=2e-6)
    assert np.linalg.norm(k - x) / np.linalg.norm(x - 3) == pytest.approx(error, rel=0.05)


@pytest.mark.parametrize(
    ("text", "bytes_of_a_head"),
    [("dense", 256), (KV8, 64 + 4), (KV4, 32 + 4), ("int3:token,scale=bf16", 24 + 2), ("fp8_e4m3:token", 64 + 4),
     ("int4:asym,group=32,axis=-1", 32 + 4 + 1), ("mxfp4:axis=-1", 32 + 2)],
)  # fmt: skip
def test_a_cache_holds_the_true_bits_and_reads_back_what_queries_see(text, bytes_of_a_head):
    form = cache_format(text, 64)
    assert token_bytes(form, heads=3, head_dim=64, dtype=jnp.float32) == 2 * 3 * bytes_of_a_head

    @jax.jit
    def kept(k):
        cache = empty_cache(form, 2, 7, heads=3, head_dim=64, dtype=jnp.float32)
        return cache.append(k, -k, jnp.zeros((2, 7), jnp.int32), None), form.as_read(k, -k)

    cache, seen = kept(OFFSET)
    assert sum(array.nbytes for array in cache.store.values()) == 2 * 7 * 2 * 3 * bytes_of_a_head
    held = jax.jit(lambda cache: cache.read(7))(cache)
    for found, wanted in zip((held.k, held.v), seen, strict=True):
        np.testing.assert_allclose(np.asarray(found).transpose(0, 2, 1, 3), wanted, atol=1e-6)


def test_tokens_are_stored_alike_however_they_are_appended():
    form = cache_format(KV4)

    @functools.partial(jax.jit, static_argnums=0)
    def stores(cuts):
        cache, found = empty_cache(form, 2, 7, heads=3, head_dim=64, dtype=jnp.float32), []
        for low, high in zip(cuts[:-1], cuts[1:], strict=True):
            part = jnp.asarray(OFFSET[:, low:high])
            cache = cache.append(part, part, jnp.zeros(part.shape[:2], jnp.int32), None)
            found.append(cache.store)
        return found

    (whole,), parts = stores((0, 7)), stores((0, 5, 6, 7))
    jax.tree.map(np.testing.assert_array_equal, parts[-1], whole)
    for name, array in parts[0].items():  # what follows leaves it as it was
        np.testing.assert_array_equal(array[:, :, :5], whole[name][:, :, :5])


def attention(kind="global", causal=True, text="dense"):
    config = ModelConfig(d_model=12, attention=AttentionConfig(2, 1, 6, cache_format=text), positions=PositionConfig("none"))
    return Attention(config, key=jax.random.key(0), site="blocks.0.attn", rules=SiteRules(), kind=kind, causal=causal)


def test_attention_without_a_cache_is_that_of_keys_and_values_rounded_by_hand():
    x = np.random.default_rng(2).standard_normal((1, 5, 12)).astype(np.float32)
    layer, ctx = attention(text=KV4), Context(positions=jnp.arange(5)[None])
    q, k, v, o = (np.asarray(getattr(layer, name).kernel.get_value()) for name in "qkvo")
    scores = np.einsum("thd,sd->hts", (x[0] @ q).reshape(5, 2, 6), by_hand(x[0] @ k, 4)) / np.sqrt(6)
    weights = np.exp(np.where(np.tri(5, dtype=bool), scores, -np.inf))
    mixed = np.einsum("hts,sd->thd", weights / weights.sum(-1, keepdims=True), by_hand(x[0] @ v, 4))
    np.testing.assert_allclose(layer(jnp.asarray(x), ctx, None)[0][0], mixed.reshape(5, 12) @ o, atol=1e-5)


def test_only_what_is_cached_is_rounded():
    assert attention("cross", causal=False, text=KV4).cache_format == attention().cache_format
    assert attention("global", causal=False, text=KV4).cache_format == attention().cache_format  # an encoder's
    assert attention("local", text=KV4).cache_format != attention("local").cache_format


def test_gradients_go_straight_through_to_keys():
    form, x = cache_format("int2:token"), jnp.asarray(OFFSET[:1, :1])
    assert np.array_equal(jax.grad(lambda x: jnp.sum(form.as_read(x, x)[0] * OFFSET[:1, :1]))(x), OFFSET[:1, :1])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("int8:asym", r"cache_format = 'int8:asym': granularity = 'channel': shares scales among tokens.*group=SIZE,axis=-1"),
        ("int4:group=8", "granularity = 'group': shares scales among tokens"),
        ("int4:group=24,axis=-1", "32 channels are no multiple of 24"),
        ("nvfp4:axis=-1", "second = 'two_level': needs all tokens at once"),
        ("int8:token,static", "static = True"),
        ("int8:token,round=stochastic", "round = 'stochastic'"),
        ("log2_4:token", "element = 'log2_4': has no negative numbers"),
        ("int9:token", "model.attention.cache_format: cache = 'int9'"),
        ("int4:tokens", "option 'tokens'.*Did you mean 'token'"),
    ],
)
def test_a_format_that_no_cache_can_have_is_refused_by_name(text, message):
    config = ExperimentConfig(model=ModelConfig(d_model=128, attention=AttentionConfig(num_heads=4, cache_format=text)))
    with pytest.raises(ConfigError, match=message):
        finalize(config)


def test_a_model_that_keeps_no_keys_refuses_a_format_for_them():
    config = ExperimentConfig(model=ModelConfig(kind="encoder", attention=AttentionConfig(cache_format=KV8)))
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, task="masked_lm"))
    with pytest.raises(ConfigError, match="model.kind 'encoder' keeps no keys and values"):
        finalize(config)
