"""Scales by search: equal to brute force over all ratios, and never worse than the extremes on their own objective."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.recipes import rtn as recipe
from sparsejax.methods.quant import rtn
from sparsejax.ops.formats.clipping import CANDIDATES, GRID, check_search, searched_extent
from sparsejax.ops.formats.quantize import extent, qparams
from sparsejax.ops.formats.spec import FormatSpec
from sparsejax.plugs import ConfigError
from sparsejax.quantized_arrays import qtensor

COSTS = np.linspace(0.1, 3, 24, dtype=np.float32)
RATIOS = 1 - np.arange(CANDIDATES) / GRID


def drawn(seed):
    """[24, 6] with entries far from the others."""
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((24, 6)) * (1 + 6 * (rng.random((24, 6)) > 0.93))).astype(np.float32)


@functools.partial(jax.jit, static_argnums=(1, 2))
def searched(x, spec, search):
    """The tensor of searched scales, and the extents that they came from."""
    second = qparams(x, spec).second
    found = searched_extent(x, spec, search, weights=jnp.asarray(COSTS), second=second)
    return qtensor(x, spec, within=found, second=second).dequantize(), found, extent(x, spec)


def rounded_by_hand(x, low, high, bits):
    """Asymmetric integers of a group [8] in float64, 0 among the codes."""
    low, high = min(low, 0), max(high, 0)
    scale = (high - low) / (2**bits - 1)
    zero = np.clip(np.round(-low / scale), 0, 2**bits - 1)
    return (np.clip(np.round(x / scale) + zero, 0, 2**bits - 1) - zero) * scale


@pytest.mark.parametrize("search", ["mse", "hessian"])
def test_every_group_has_the_least_cost_of_all_ratios(search):
    x = drawn(0)
    values, _, _ = searched(x, FormatSpec.parse("int3:asym,group=8,scale=f32"), search)
    clipped = 0
    for group in range(3):
        rows = slice(8 * group, 8 * group + 8)
        for column in range(6):
            mine = x[rows, column].astype(float)

            def cost(found, mine=mine, rows=rows):
                error = np.abs(found - mine)
                return np.sum(error**2.4) if search == "mse" else np.sum(COSTS[rows] * error**2)

            costs = [cost(rounded_by_hand(mine, p * mine.min(), p * mine.max(), 3)) for p in RATIOS]
            assert cost(np.asarray(values)[rows, column]) == pytest.approx(min(costs), rel=1e-4)
            clipped += min(costs) < 0.99 * costs[0]
    assert clipped > 6


FORMATS = ["int3:group=7,ragged=tail", "int4:signed_max,group=8", "nf4:group=8", "nvfp4:group=8", "mxfp4:group=8",
           "q4_1:group=8", "int4:asym,zero=float,group=8", "int2:tensor", "int4:block=6x3"]  # fmt: skip


@pytest.mark.parametrize("text", FORMATS)
def test_no_group_loses_more_than_by_its_extremes_whatever_the_format(text):
    spec, x = FormatSpec.parse(text), drawn(1)
    values, found, full = searched(x, spec, "mse")
    plain = jax.jit(lambda x: qtensor(x, spec).dequantize())(x)
    rows, columns = spec.block(x.shape)
    costs = []
    for result in (values, plain):
        error = np.abs(np.asarray(result, np.float64) - x) ** 2.4
        costs.append([np.add.reduceat(np.add.reduceat(error, range(0, 24, rows), 0), range(0, 6, columns), 1)])
    assert (costs[0][0] <= costs[1][0] * (1 + 1e-5)).all() and np.sum(costs[0]) <= np.sum(costs[1])
    assert np.sum(costs[0]) < np.sum(costs[1]) or spec.scale == "e8m0"  # whose next scale is the half
    ratio = np.asarray(found.high / full.high)
    assert np.isclose(ratio[..., None], RATIOS, atol=1e-5).any(-1).all()


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), power=st.integers(-6, 6))
def test_the_ratio_of_a_group_does_not_depend_on_its_scale(seed, power):
    spec, x = FormatSpec.parse("int3:asym,group=8,scale=f32"), drawn(seed)
    one, found, _ = searched(x, spec, "hessian")
    other, scaled, _ = searched(x * 2.0**power, spec, "hessian")
    np.testing.assert_array_equal(other, one * 2.0**power)
    np.testing.assert_array_equal(scaled.high, found.high * 2.0**power)


def test_groups_of_zeros_stay_zeros_and_groups_with_nan_stay_nan():
    x = drawn(2)
    x[:8, 0], x[3, 1] = 0, np.nan
    values, _, _ = searched(x, FormatSpec.parse("int3:asym,group=8,scale=f32"), "mse")
    assert not np.asarray(values)[:8, 0].any() and np.isnan(values[:8, 1]).all() and np.isfinite(values[8:]).all()


def test_searches_that_make_no_sense_are_refused():
    for search, text, message in [
        ("mae", "int4", "scales = 'mae': allowed are 'absmax', 'mse', 'hessian'"),
        ("mse", "nf4:group=64,double", "scales = 'mse': .*quantizes scales in blocks"),
        ("mse", "int4:round=stochastic", "rounds at random"),
        ("hessian", "int8:static", "come from calibration"),
        ("mse", "ternary", "has scales of the mean"),
    ]:
        with pytest.raises(ConfigError, match=message):
            check_search(search, FormatSpec.parse(text))
    with pytest.raises(ConfigError, match="scales = 'hessian': allowed are 'absmax', 'mse'"):
        check_search("hessian", FormatSpec.parse("int4"), rtn.SCALES)
    assert recipe.get_recipe("int3:group=32/mse") == [rtn.Rtn("int3:group=32", scales="mse")]
