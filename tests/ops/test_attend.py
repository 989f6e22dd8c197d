from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from sparsejax.ops import attend as attend_module
from sparsejax.ops.attend import attend, attention_entropy, default_block_size, explain_backend, sample_rows
from sparsejax.ops.position_bias import relative_bias
from sparsejax.plugs import ConfigError


def oracle_probabilities(
    q,
    k,
    *,
    causal,
    scale,
    window=0,
    query_segment_ids=None,
    key_segment_ids=None,
    query_positions=None,
    key_positions=None,
    prefix=None,
    bias=None,
    softcap=0.0,
):
    """Attention probabilities [B, H, T, S] in float64, one query row at a time, from the definition of the mask."""
    q, k = np.asarray(q, np.float64), np.asarray(k, np.float64)
    (batch, length, heads, _), keys, repeats = q.shape, k.shape[1], q.shape[2] // k.shape[2]
    probabilities = np.zeros((batch, heads, length, keys))
    for b, h, t in np.ndindex(batch, heads, length):
        seen = []
        for s in range(keys):
            at = t if query_positions is None else int(query_positions[b, t])
            other = s if key_positions is None else int(key_positions[b, s])
            visible = not causal or other <= at or (prefix is not None and bool(prefix[b, s]))
            visible &= not window or abs(at - other) < window
            if key_segment_ids is not None:
                visible &= int(key_segment_ids[b, s]) != 0
                visible &= query_segment_ids is None or int(query_segment_ids[b, t]) == int(key_segment_ids[b, s])
            if visible:
                seen.append(s)
        if seen:
            logits = k[b, seen, h // repeats] @ q[b, t, h] * scale
            logits = softcap * np.tanh(logits / softcap) if softcap else logits
            logits = logits if bias is None else logits + np.asarray(bias, np.float64)[h, t, seen]
            weights = np.exp(logits - logits.max())
            probabilities[b, h, t, seen] = weights / weights.sum()
    return probabilities


def oracle(q, k, v, **kwargs):
    values = np.repeat(np.asarray(v, np.float64), q.shape[2] // v.shape[2], axis=2)
    return np.einsum("bhts,bshv->bthv", oracle_probabilities(q, k, **kwargs), values)


def operands(batch=2, length=9, keys=None, heads=4, groups=2, head_dim=8, value_dim=None, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    make = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)  # noqa: E731
    keys = keys or length
    value_dim = value_dim or head_dim
    return make(batch, length, heads, head_dim), make(batch, keys, groups, head_dim), make(batch, keys, groups, value_dim)


def packed_segments(rng, batch, length):
    """Rows such as 1 1 2 2 2 3 0 0: documents in order, then padding."""
    cuts = np.sort(rng.integers(0, length + 1, (batch, 3)), axis=1)
    ids = 1 + (np.arange(length)[None, :, None] >= cuts[:, None, :2]).sum(-1)
    return np.where(np.arange(length)[None] < cuts[:, 2:], ids, 0).astype(np.int32)


@settings(max_examples=16, deadline=None)  # each is a program of its own
@given(
    length=st.sampled_from([1, 6, 7, 13, 29]),
    groups=st.integers(1, 2),
    repeats=st.integers(1, 2),
    causal=st.booleans(),
    window=st.integers(0, 5),
    segmented=st.booleans(),
    with_prefix=st.booleans(),
    with_bias=st.booleans(),
    softcap=st.sampled_from([0.0, 2.0]),
    backend=st.sampled_from(["blocked", "xla"]),
    block_size=st.integers(3, 8),
    recompute=st.booleans(),
    seed=st.integers(0, 99),
)
def test_every_mask_and_backend_equals_the_float64_definition(
    length, groups, repeats, causal, window, segmented, with_prefix, with_bias, softcap, backend, block_size, recompute, seed
):
    rng = np.random.default_rng(seed)
    q, k, v = operands(2, length, heads=groups * repeats, groups=groups, head_dim=4, value_dim=6, seed=seed)
    kwargs = {"causal": causal, "scale": 0.7, "window": window, "softcap": softcap}
    if segmented:
        kwargs["query_segment_ids"] = kwargs["key_segment_ids"] = packed_segments(rng, 2, length)
    if with_prefix and causal:
        kwargs["prefix"] = np.arange(length)[None] < rng.integers(0, length + 1, (2, 1))
    if with_bias:
        kwargs["bias"] = rng.normal(size=(groups * repeats, length, length)).astype(np.float32)
    expected = oracle(q, k, v, **kwargs)
    run = partial(attend, backend=backend, block_size=block_size, recompute=recompute)
    actual = jax.jit(run, static_argnames=("causal", "scale", "window", "softcap"))(q, k, v, **kwargs)
    np.testing.assert_allclose(actual, expected, atol=2e-5)


@settings(max_examples=8, deadline=None)
@given(length=st.sampled_from([1, 5]), keys=st.sampled_from([1, 2, 9]), padded=st.integers(0, 9), seed=st.integers(0, 99))
def test_cross_attention_of_ragged_lengths_equals_the_definition(length, keys, padded, seed):
    q, k, v = operands(2, length, keys, seed=seed)
    ids = jnp.asarray(np.arange(keys)[None].repeat(2, 0) < keys - padded, jnp.int32)
    actual = jax.jit(partial(attend, causal=False, scale=0.5, block_size=2))(q, k, v, key_segment_ids=ids)
    np.testing.assert_allclose(actual, oracle(q, k, v, causal=False, scale=0.5, key_segment_ids=ids), atol=2e-5)


@pytest.mark.parametrize("block_size", [8, 2])  # 3 blocks stand alone, 11 are looped over
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("window", [0, 5])
def test_gradients_of_blocks_equal_the_reference(recompute, window, block_size):
    blocked = gradients(window, backend="blocked", block_size=block_size, recompute=recompute)
    for actual, expected in zip(blocked, gradients(window, backend="xla"), strict=True):
        np.testing.assert_allclose(actual, expected, atol=1e-5)


@cache
def gradients(window, **how):
    """Those of packed rows with a bias, by q, k, v and the bias's table."""
    operands_and_table = *operands(2, 21), np.random.default_rng(2).normal(size=(8, 4)).astype(np.float32)
    ids = jnp.asarray(packed_segments(np.random.default_rng(1), 2, 21))

    def loss(q, k, v, table):
        bias = partial(relative_bias, table, bidirectional=False, max_distance=16)
        out = attend(
            q,
            k,
            v,
            causal=True,
            scale=0.3,
            window=window,
            query_segment_ids=ids,
            key_segment_ids=ids,
            bias=bias,
            softcap=3.0,
            **how,
        )
        return (jnp.sin(out) * out).sum()

    return jax.jit(jax.grad(loss, (0, 1, 2, 3)))(*operands_and_table)


def test_gradients_equal_finite_differences_in_float64():
    with jax.enable_x64(True):
        q, k, v = operands(1, 6, head_dim=4, dtype=np.float64)
        run = jax.jit(partial(attend, causal=True, scale=0.5, block_size=4, softcap=2.0))
        check_grads(run, (q, k, v), order=1, modes=["rev"])


@pytest.mark.parametrize("backend", ["blocked", "xla"])
def test_no_gradient_reaches_a_later_key_or_one_outside_the_window(backend):
    q, k, v = operands(1, 12)
    run = partial(attend, causal=True, scale=0.4, window=4, backend=backend, block_size=5)
    for d_key in jax.jit(jax.jacobian(lambda k, v: run(q, k, v)[0].sum((1, 2)), (0, 1)))(k, v):
        reached = np.asarray(jnp.abs(d_key[:, 0]).max((2, 3)) > 0)
        expected = np.tril(np.ones((12, 12), bool)) & ~np.tril(np.ones((12, 12), bool), -4)
        expected_keys = expected.copy()
        expected_keys[0, 0] = reached[0, 0]  # a single visible key has probability 1: its logit has no gradient
        np.testing.assert_array_equal(reached, expected_keys)


def test_other_segments_change_nothing_not_even_with_infinite_keys():
    q, k, v = operands(1, 10)
    ids = jnp.array([[1, 1, 1, 1, 2, 2, 2, 0, 0, 0]])
    run = jax.jit(partial(attend, causal=True, scale=0.4, query_segment_ids=ids, key_segment_ids=ids, block_size=4))
    loud = run(q.at[:, 4:].mul(1e4), k.at[:, 4:].mul(1e15), v.at[:, 4:].set(1e30))
    np.testing.assert_array_equal(loud[:, :4], run(q, k, v)[:, :4])
    alone = jax.jit(partial(attend, causal=True, scale=0.4))(q[:, 4:7], k[:, 4:7], v[:, 4:7])
    np.testing.assert_allclose(run(q, k, v)[:, 4:7], alone, atol=1e-6)


def test_index_order_and_restarting_positions_agree_on_packed_rows():
    q, k, v = operands(1, 9)
    ids, positions = jnp.array([[1, 1, 1, 1, 2, 2, 2, 2, 0]]), jnp.array([[0, 1, 2, 3, 0, 1, 2, 3, 0]])
    run = jax.jit(
        partial(attend, q, k, v, causal=True, scale=0.4, window=3, query_segment_ids=ids, key_segment_ids=ids, block_size=4)
    )
    np.testing.assert_allclose(run(), run(query_positions=positions, key_positions=positions), atol=1e-6)


@pytest.mark.parametrize("backend", ["blocked", "xla"])
def test_rows_that_see_nothing_are_zero_with_finite_gradients(backend):
    q, k, v = operands(2, 8)
    ids = jnp.zeros((2, 8), jnp.int32).at[0, :3].set(1)
    run = partial(attend, causal=True, scale=0.4, query_segment_ids=ids, key_segment_ids=ids, backend=backend, block_size=3)
    out, pullback = jax.vjp(jax.jit(run), q, k, v)
    assert (out[0, 3:] == 0).all() and (out[1] == 0).all() and (out[0, :3] != 0).all()
    for gradient in pullback(jnp.ones_like(out)):
        assert jnp.isfinite(gradient).all() and (gradient[1] == 0).all() and (gradient[0, 3:] == 0).all()


def test_grouped_queries_equal_repeated_keys_and_values():
    q, k, v = operands(2, 11, heads=6, groups=2)
    repeated = [jnp.repeat(x, 3, axis=2) for x in (k, v)]
    run = jax.jit(partial(attend, causal=True, scale=0.4, block_size=4))
    np.testing.assert_allclose(run(q, k, v), run(q, *repeated), atol=1e-6)


def test_low_precision_inputs_have_a_float32_softmax():
    q, k, v = operands(1, 40, heads=1, groups=1, dtype=jnp.bfloat16)
    out = jax.jit(partial(attend, causal=True, scale=0.4, block_size=16))(q * 8, k * 8, v)
    assert out.dtype == jnp.bfloat16
    exact = oracle(*(np.asarray(x, np.float64) for x in (q * 8, k * 8, v)), causal=True, scale=0.4)
    np.testing.assert_allclose(np.asarray(out, np.float64), exact, atol=2e-2)  # two roundings to 8 bits, not logits of 8 bits


def test_huge_logits_do_not_overflow():
    q, k, v = operands(1, 8)
    out, pullback = jax.vjp(jax.jit(partial(attend, causal=True, scale=1.0, block_size=4)), q * 1e4, k * 1e4, v)
    assert jnp.isfinite(out).all() and all(jnp.isfinite(g).all() for g in pullback(out))


@pytest.mark.parametrize("window", [0, 3])
def test_decoding_with_a_cache_equals_the_full_forward(window):
    q, k, v = operands(2, 7)
    full = jax.jit(partial(attend, causal=True, scale=0.4, window=window))(q, k, v)
    slots = 10  # the cache is longer than what was written, and the rest holds garbage
    cache = [jnp.full((2, slots, *x.shape[2:]), jnp.float32(1e6)).at[:, :7].set(x) for x in (k, v)]
    key_positions = jnp.tile(jnp.arange(slots)[None], (2, 1))

    @jax.jit
    def step(q_row, t):
        written = (key_positions <= t).astype(jnp.int32)
        return attend(
            q_row,
            *cache,
            causal=True,
            scale=0.4,
            window=window,
            query_positions=jnp.full((2, 1), t),
            key_positions=key_positions,
            key_segment_ids=written,
        )

    rows = [step(np.asarray(q)[:, t : t + 1], t) for t in range(7)]
    np.testing.assert_allclose(np.concatenate(rows, 1), full, atol=1e-6)


def test_a_bias_function_sees_the_positions_of_its_block():
    q, k, v = operands(1, 10)
    table = jax.random.normal(jax.random.key(0), (8, 4))
    bias = partial(relative_bias, table, bidirectional=False, max_distance=20)
    run = jax.jit(partial(attend, q, k, v, causal=True, scale=1.0, block_size=4), static_argnames="bias")
    whole = partial(attend, causal=True, scale=1.0, backend="xla")
    expected = jax.jit(lambda q, k, v: whole(q, k, v, bias=bias(jnp.arange(10), jnp.arange(10))))(q, k, v)
    np.testing.assert_allclose(run(bias=bias), expected, atol=1e-6)
    positions = jnp.arange(10)[None]
    np.testing.assert_allclose(run(bias=bias, query_positions=positions, key_positions=positions), expected, atol=1e-6)


def test_the_traced_program_does_not_grow_with_the_number_of_blocks():
    def equations(length):
        q, k, v = operands(1, length, heads=1, groups=1, head_dim=4)
        return len(str(jax.make_jaxpr(partial(attend, causal=True, scale=0.4, block_size=4))(q, k, v)).splitlines())

    assert equations(256) == equations(64) < 2 * equations(32)


def temporary_bytes(length, **kwargs):
    shape = jax.ShapeDtypeStruct((1, length, 4, 32), jnp.float32)
    run = jax.grad(lambda q, k, v: attend(q, k, v, causal=True, scale=0.2, **kwargs).sum(), (0, 1, 2))
    return jax.jit(run).lower(shape, shape, shape).compile().memory_analysis().temp_size_in_bytes


def test_blocks_use_less_memory_than_the_reference_and_recomputing_less_still():
    reference = temporary_bytes(1024, backend="xla")
    kept = temporary_bytes(1024, backend="blocked", block_size=256, recompute=False)
    recomputed = temporary_bytes(1024, backend="blocked", block_size=256, recompute=True)
    assert recomputed < 0.6 * reference and recomputed < kept < reference


def test_blocks_work_under_vmap_scan_and_remat():
    q, k, v = operands(4, 9)
    run = jax.jit(partial(attend, causal=True, scale=0.4, block_size=4))
    per_row = jax.jit(jax.vmap(lambda q, k, v: run(q[None], k[None], v[None])[0]))(q, k, v)
    np.testing.assert_allclose(per_row, run(q, k, v), atol=1e-6)

    def layers(q, body):
        return jax.lax.scan(lambda x, _: (body(x, k, v) + x, None), q, None, length=2)[0].sum()

    whole = partial(attend, causal=True, scale=0.4, backend="xla")
    expected = jax.jit(jax.grad(partial(layers, body=whole)))(q)
    np.testing.assert_allclose(jax.jit(jax.grad(partial(layers, body=jax.checkpoint(run))))(q), expected, atol=1e-5)


def test_sharded_attention_equals_one_device():
    mesh = jax.make_mesh((2, 2, 2), ("data", "tensor", "sequence"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
    q, k, v = operands(4, 16, heads=4, groups=2)
    place = jax.NamedSharding(mesh, jax.P("data", "sequence", "tensor"))
    expected = jax.jit(partial(attend, causal=True, scale=0.4, block_size=8))(q, k, v)
    with jax.set_mesh(mesh):
        assert explain_backend(q, k, v, causal=True).name == "xla"
        for backend in ("auto", "blocked"):
            run = jax.jit(partial(attend, causal=True, scale=0.4, block_size=8, backend=backend))
            np.testing.assert_allclose(run(*jax.device_put((q, k, v), place)), expected, atol=1e-6)


# What cuDNN is asked for: eligibility and the translation of the mask. Its own arithmetic needs a GPU.


@pytest.fixture
def on_gpu(monkeypatch):
    monkeypatch.setattr(attend_module, "trace_platform", lambda: "gpu")


def test_auto_is_cudnn_on_gpu_and_blocks_elsewhere(monkeypatch):
    q, k, v = operands(dtype=jnp.bfloat16)
    assert explain_backend(q, k, v, causal=True).name == "blocked"
    assert "NVIDIA" in explain_backend(q, k, v, causal=True, backend="cudnn").reason
    monkeypatch.setattr(attend_module, "trace_platform", lambda: "gpu")
    assert explain_backend(q, k, v, causal=True).name == "cudnn"
    assert explain_backend(q, k, v, causal=True, backend="xla").name == "xla"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"softcap": 5.0}, "soft-capped"),
        ({"bias": jnp.zeros((4, 8, 8))}, "bias"),
        ({"query_positions": jnp.arange(8)[None]}, "positions"),
        ({"window": 3, "key_segment_ids": jnp.ones((2, 8))}, "window"),
        ({"window": 3, "causal": False}, "window"),
        ({"dtype": jnp.float32}, "float32"),
        ({"head_dim": 12}, "multiple of 8"),
        ({"length": 7, "key_segment_ids": jnp.ones((2, 7))}, "even"),
    ],
)
def test_what_cudnn_cannot_do_falls_back_with_the_reason(on_gpu, caplog, change, told):
    sizes = {name: change.pop(name) for name in ("dtype", "head_dim", "length") if name in change}
    q, k, v = operands(**{"length": 8, "dtype": jnp.bfloat16, **sizes})
    choice = explain_backend(q, k, v, **{"causal": True, "backend": "cudnn", **change})
    assert choice.name == "blocked" and told in choice.reason


def test_a_forced_backend_that_cannot_run_is_told_once(caplog):
    attend_module._tell_once.cache_clear()
    q, k, v = operands()
    for _ in range(2):
        attend(q, k, v, causal=True, scale=1.0, backend="cudnn")
    assert [record.message for record in caplog.records if "cudnn" in record.message] == [
        "attention.backend = 'cudnn' runs as 'blocked': cudnn needs an NVIDIA GPU, this is cpu"
    ]


@pytest.mark.parametrize(
    ("causal", "mask"),
    [(True, "none"), (True, "window"), (True, "segments"), (True, "keys"), (True, "prefix")]
    + [(False, "none"), (False, "segments"), (False, "keys")],
)
def test_the_mask_given_to_cudnn_means_the_same(on_gpu, monkeypatch, causal, mask):
    """JAX promises the same result from both implementations, so its XLA one stands in for the device's."""
    original, asked = jax.nn.dot_product_attention, []

    def stand_in(*args, implementation, **kwargs):
        asked.append(implementation)
        return original(*args, implementation="xla", **kwargs)

    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    q, k, v = operands(2, 10, dtype=jnp.float16)
    kwargs = {"causal": causal, "scale": 0.3}
    ids = jnp.array([[1, 1, 1, 2, 2, 2, 2, 0, 0, 0], [0] * 10])
    if mask == "window":
        kwargs["window"] = 4
    if mask in ("segments", "prefix"):
        kwargs["query_segment_ids"] = kwargs["key_segment_ids"] = ids
    if mask == "keys":
        kwargs["key_segment_ids"] = ids
    if mask == "prefix":
        kwargs["prefix"] = jnp.tile(jnp.array([[True, True, False, True, False, True, False, False, False, False]]), (2, 1))
    actual, pullback = jax.vjp(partial(attend, **kwargs), q, k, v)
    assert asked == ["cudnn"]
    np.testing.assert_allclose(actual, oracle(q, k, v, **kwargs), atol=5e-3)
    total = jax.jit(jax.grad(lambda *operands: jnp.sum(attend(*operands, backend="xla", **kwargs)), (0, 1, 2)))
    for gradient, expected in zip(pullback(jnp.ones_like(actual)), total(q, k, v), strict=True):
        np.testing.assert_allclose(np.asarray(gradient, np.float32), np.asarray(expected, np.float32), atol=2e-2)


# Entropy of the sampled rows.


@pytest.mark.parametrize("case", ["causal", "segments", "prefix", "bias", "cross", "positions"])
def test_entropy_equals_the_definition_when_every_row_is_sampled(case):
    q, k, _ = operands(2, 8, 6 if case == "cross" else 8)
    kwargs = {"causal": case != "cross", "scale": 0.5, "softcap": 4.0}
    ids = jnp.array([[1, 1, 1, 2, 2, 2, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1]])
    if case in ("segments", "prefix"):
        kwargs["query_segment_ids"] = kwargs["key_segment_ids"] = ids
    if case == "prefix":
        kwargs["prefix"] = jnp.tile(jnp.arange(8)[None] < 3, (2, 1))
    if case == "bias":
        kwargs["bias"] = jax.random.normal(jax.random.key(0), (4, 8, 8))
    if case == "positions":
        kwargs["query_positions"] = kwargs["key_positions"] = jnp.tile(jnp.arange(8)[None, ::-1], (2, 1))
    probabilities = oracle_probabilities(q, k, **kwargs)
    rows = -np.sum(np.where(probabilities > 0, probabilities * np.log(np.maximum(probabilities, 1e-300)), 0), -1)
    seen = probabilities.sum(-1) > 0
    expected = (rows * seen).sum((0, 2)) / seen.sum((0, 2))
    arrays = {name: kwargs.pop(name) for name in list(kwargs) if hasattr(kwargs[name], "shape")}
    np.testing.assert_allclose(jax.jit(partial(attention_entropy, **kwargs))(q, k, **arrays), expected, atol=1e-5)


def test_entropy_of_uniform_attention_is_the_log_of_the_visible_keys():
    q, k = jnp.zeros((2, 64, 2, 4)), jnp.ones((2, 64, 2, 4))
    entropy = jax.jit(attention_entropy, static_argnames=("causal", "scale", "window", "rows"))
    np.testing.assert_allclose(entropy(q, k, causal=False, scale=1.0), np.log(64), rtol=1e-6)
    np.testing.assert_allclose(entropy(q, k, causal=True, scale=1.0, window=8, rows=2), np.log(8), rtol=1e-6)
    nothing = entropy(q, k, causal=True, scale=1.0, key_segment_ids=jnp.zeros((2, 64), jnp.int32))
    np.testing.assert_array_equal(nothing, 0)


@settings(max_examples=50, deadline=None)
@given(batch=st.integers(1, 200), length=st.integers(1, 300), rows=st.integers(1, 64))
def test_sampled_rows_keep_to_their_number_and_include_the_last(batch, length, rows):
    step, times = sample_rows(batch, length, rows)
    assert len(range(0, batch, step)) * len(times) <= rows
    assert len(set(times.tolist())) == len(times) and times[-1] == length - 1 and times[0] >= 0


# Wrong input.


def test_wrong_arguments_are_refused_where_they_are_given():
    q, k, v = operands()
    with pytest.raises(ConfigError, match="Did you mean 'blocked'"):
        attend(q, k, v, causal=True, scale=1.0, backend="block")
    with pytest.raises(ValueError, match="needs query_positions"):
        attend(q[:, :3], k, v, causal=True, scale=1.0)
    with pytest.raises(ValueError, match="needs query_positions|give query_positions"):
        attention_entropy(q[:, :3], k, causal=True, scale=1.0)
    with pytest.raises(ValueError, match="multiple of the 2 key heads"):
        attend(q[:, :, :3], k, v, causal=True, scale=1.0)
    with pytest.raises(ValueError, match="do not match"):
        attend(q, k, v[:, :4], causal=True, scale=1.0)
    with pytest.raises(ValueError, match="without key_segment_ids"):
        attend(q, k, v, causal=True, scale=1.0, query_segment_ids=jnp.ones((2, 9)))
    with pytest.raises(ValueError, match="not causal"):
        attend(q, k, v, causal=False, scale=1.0, prefix=jnp.ones((2, 9), bool))


def test_default_blocks_depend_on_length_and_platform():
    assert [default_block_size(length, "cpu") for length in (1, 512, 1024, 8192)] == [64, 64, 128, 128]
    assert default_block_size(1024, "gpu") == 256
