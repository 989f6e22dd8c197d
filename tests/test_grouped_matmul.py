import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas.grouped_matmul import BACKENDS, grouped_matmul, grouped_matmul_blocked

N, K, WIDTH = 37, 5, 6


def loop(x, w, groups):
    """float64 oracle: each group's rows times its matrix, zeros after the last group."""
    y = np.zeros((x.shape[0], w.shape[2]))
    start = 0
    for e, size in enumerate(groups):
        y[start : start + size] = np.asarray(x[start : start + size], np.float64) @ np.asarray(w[e], np.float64)
        start += size
    return y


def operands(seed, experts, dtype=np.float32):
    rng = np.random.default_rng(seed)
    if dtype == np.int8:
        return (jnp.asarray(rng.integers(-127, 128, s), jnp.int8) for s in ((N, K), (experts, K, WIDTH)))
    return (jnp.asarray(rng.normal(size=s), dtype) for s in ((N, K), (experts, K, WIDTH)))


def group_sizes(draw, experts):
    """Sizes that sum to at most N; empty groups and one group that takes all are drawn often."""
    cuts = sorted(draw(st.lists(st.sampled_from([0, 3, 8, 20, N]), min_size=experts, max_size=experts)))
    return np.diff([0, *cuts]).astype(np.int32)


@settings(max_examples=25, deadline=None)
@given(st.data(), st.sampled_from([8, 16]), st.integers(0, 99))
def test_blocked_values_equal_a_loop_over_groups(data, block_rows, seed):
    groups = group_sizes(data.draw, 4)
    x, w = operands(seed, 4)
    got = jax.jit(grouped_matmul_blocked, static_argnames="block_rows")(x, w, groups, block_rows=block_rows)
    np.testing.assert_allclose(got, loop(x, w, groups), atol=1e-5)


@settings(max_examples=10, deadline=None)
@given(st.data(), st.integers(0, 99))
def test_integer_products_are_exact(data, seed):
    groups = group_sizes(data.draw, 4)
    x, w = operands(seed, 4, np.int8)
    got = jax.jit(lambda *a: grouped_matmul_blocked(*a, preferred_element_type=jnp.int32, block_rows=8))(x, w, groups)
    assert got.dtype == jnp.int32
    np.testing.assert_array_equal(got, loop(x, w, groups))


@pytest.mark.parametrize("groups", [(10, 0, 20, 7), (0, 0, N, 0), (5, 6, 7, 8), (0, 0, 0, 0)])
def test_gradients_equal_the_reference(groups):
    x, w = operands(1, 4)
    weights = jnp.asarray(np.random.default_rng(2).normal(size=(N, WIDTH)), jnp.float32)
    groups = jnp.asarray(groups, jnp.int32)

    def loss(backend, x, w):
        return jnp.sum(weights * grouped_matmul(x, w, groups, backend=backend) ** 2)

    blocked, reference = (jax.jit(jax.grad(lambda x, w, b=b: loss(b, x, w), (0, 1)))(x, w) for b in ("cpu", "xla"))
    for got, expected in zip(blocked, reference, strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_accumulates_in_float32(backend):
    x, w = (a.astype(jnp.bfloat16) for a in operands(3, 2))
    groups = jnp.asarray([20, 17], jnp.int32)
    got = grouped_matmul(x, w, groups, preferred_element_type=jnp.float32, backend=backend)
    np.testing.assert_allclose(got, loop(x.astype(jnp.float32), w.astype(jnp.float32), groups), atol=1e-5)


def test_an_infinite_row_stays_in_its_own_group():
    x, w = operands(4, 2)
    groups = jnp.asarray([10, 27], jnp.int32)
    y, pull = jax.vjp(lambda x, w: grouped_matmul_blocked(x, w, groups, block_rows=8), x.at[10].set(jnp.inf), w)
    _, dw = pull(jnp.ones_like(y))
    assert np.isfinite(y[:10]).all() and np.isfinite(y[11:]).all()
    assert np.isfinite(dw[0]).all() and not np.isfinite(dw[1]).any()


def test_the_default_on_cpu_is_the_blocked_loop():
    x, w = operands(5, 4)
    compiled = jax.jit(grouped_matmul).lower(x, w, jnp.asarray([9, 9, 9, 10], jnp.int32)).compile()
    assert "while" in compiled.as_text()


def test_an_unknown_backend_is_refused_by_name():
    x, w = operands(6, 1)
    with pytest.raises(ValueError, match="'cuda' is not one of"):
        grouped_matmul(x, w, jnp.asarray([N], jnp.int32), backend="cuda")
