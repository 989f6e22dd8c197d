import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas.sparse_gemv import BACKENDS, sparse_gemv
from kernels_pallas.sparse_gemv.reference import GRANULE

SHAPES = [((), 1, 1), ((1, 1), 37, 5), ((3,), 300, 17)]  # of the rows, K, N: below a capacity, ragged, above one


def operands(shape, seed, kept, dtype="float32"):
    """(x, mask, w); each row keeps a share of its entries, the first row none where `kept` is 0."""
    lead, features, outputs = shape
    rng = np.random.default_rng(seed)
    mask = rng.random((*lead, features)) < kept
    draw = lambda *size: jnp.asarray(rng.normal(size=size), dtype)  # noqa: E731
    return draw(*lead, features), jnp.asarray(mask), draw(features, outputs)


run = jax.jit(sparse_gemv, static_argnames=("most", "preferred_element_type", "backend"))


@settings(max_examples=20)
@given(st.sampled_from(SHAPES), st.sampled_from(["float32", "bfloat16"]), st.integers(0, 99), st.sampled_from([0, 0.1, 0.5, 1]))
def test_every_backend_gives_the_product_of_what_is_kept(shape, dtype, seed, kept):
    x, mask, w = operands(shape, seed, kept, dtype)
    left, right = (np.asarray(a, np.float64) for a in (jnp.where(mask, x, 0), w))
    sums = 2 * shape[1] * np.finfo(np.float32).eps * (np.abs(left) @ np.abs(right))
    rounding = 0 if dtype == "float32" else 2**-8  # of the result, to its own 8 bits
    for backend in BACKENDS:
        y = run(x, mask, w, backend=backend)
        assert y.dtype == x.dtype and y.shape == (*shape[0], shape[2])
        error = np.abs(np.asarray(y, np.float64) - left @ right)
        assert np.all(error <= sums + rounding * np.abs(left @ right) + 1e-30), backend
        wide = np.asarray(run(x, mask, w, backend=backend, preferred_element_type="float32"), np.float64)
        assert np.all(np.abs(wide - left @ right) <= sums + 1e-30), backend


def test_more_than_the_capacity_is_as_exact_as_less():
    x, _, w = operands(((2,), 300, 4), 0, 1)
    for count in (0, GRANULE, 2 * GRANULE, 2 * GRANULE + 1, 300):  # the capacity at 300 is two granules
        mask = jnp.tile(jnp.arange(300) < count, (2, 1))
        expected = np.asarray(jnp.where(mask, x, 0), np.float64) @ np.asarray(w, np.float64)
        np.testing.assert_allclose(run(x, mask, w, backend="xla"), expected, rtol=1e-4, atol=1e-4)


def test_a_known_count_needs_no_way_out_and_gathers_no_more_rows():
    x, mask, w = operands(((1,), 300, 4), 0, 0.05)
    count = int(mask.sum())
    known, unknown = (run.lower(x, mask, w, backend="xla", most=most).as_text() for most in (count, None))
    assert "stablehlo.case" not in known and "stablehlo.case" in unknown
    y = run(x, mask, w, backend="xla", most=count)
    np.testing.assert_allclose(y, jnp.where(mask, x, 0) @ w, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["xla", "cpu"])
def test_what_is_not_kept_is_not_read(backend):
    x, mask, w = operands(((2,), 300, 4), 0, 0.2)
    mask = jnp.broadcast_to(mask[:1], mask.shape)
    y = run(jnp.where(mask, x, jnp.nan), mask, jnp.where(mask[0, :, None], w, jnp.nan), backend=backend)
    np.testing.assert_array_equal(y, run(x, mask, w, backend=backend))


def test_unknown_backends_are_named():
    with pytest.raises(ValueError, match="'tpu' is not one of"):
        sparse_gemv(*operands(SHAPES[1], 0, 0.5), backend="tpu")
