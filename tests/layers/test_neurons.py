"""The neurons site of `ffn`: which hidden units are computed, chosen by the gate, by the input or by an oracle."""

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsejax.context import Context, Probe, Stat
from sparsejax.layers.ffn import FFN, ffn
from sparsejax.layers.op import SiteRules
from sparsejax.models.config import FFNConfig, ModelConfig
from sparsejax.models.serving import serving_form
from sparsejax.models.site_rules import check_sites
from sparsejax.nnx_compat import merge
from sparsejax.plugs import ConfigError
from tests.compress.tiny import tiny_model

D, F = 12, 40


@dataclasses.dataclass(frozen=True)
class Given:
    """The units it is told."""

    mask: tuple[bool, ...]
    reads_gate: ClassVar[bool] = False

    def __call__(self, x, gate_out, ctx):
        return jnp.broadcast_to(jnp.asarray(self.mask), (*x.shape[:-1], len(self.mask)))


def build(activation, selectors=()):
    rules = SiteRules(neurons=(("blocks.0.mlp", tuple(selectors)),) if selectors else ())
    config = ModelConfig(d_model=D, ffn=FFNConfig(hidden=F, activation=activation))
    return FFN(config, key=jax.random.key(0), site="blocks.0.mlp", rules=rules)


def run(net, x, **ctx):
    return jax.jit(lambda x: net(x, Context(**ctx)))(x)


def tokens(seed=0, count=6):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(2, count, D)), jnp.float32)


@functools.cache
def relu_ffn():
    """(x -> (output, active units), (x, units) -> output)."""
    net, units = build("relu"), Probe("mlp.hidden", lambda h, ctx: {"value": Stat(h > 0)})

    def dense(x):
        y, stats = net(x, Context(probes=(units,)))
        return y, stats["mlp.hidden"]["value"].value

    def chosen(x, mask):
        return ffn(x, net.up, None, net.down, net.activation, Context(), neurons=lambda *_: mask)[0]

    return jax.jit(dense), jax.jit(chosen)


@given(seed=st.integers(0, 2**16), extra=st.floats(0, 1))
def test_any_superset_of_the_active_units_of_a_relu_ffn_gives_its_output_exactly(seed, extra):
    x, (dense, chosen) = tokens(seed), relu_ffn()
    y, active = dense(x)
    more = active | (np.random.default_rng(seed).random(active.shape) < extra)
    np.testing.assert_array_equal(chosen(x, more), y)
    np.testing.assert_array_equal(chosen(x, active), y)  # a perfect predictor


@pytest.mark.parametrize("activation", ["relu", "swiglu"])
def test_a_missed_unit_takes_its_row_of_down_from_the_output(activation):
    x, plain = tokens(), build(activation)
    hidden = Probe("mlp.hidden", lambda h, ctx: {"value": Stat(h)})
    dense, stats = run(plain, x, probes=(hidden,))
    h = np.asarray(stats["mlp.hidden"]["value"].value, np.float64)
    for unit in (0, F - 1):
        without = build(activation, [Given(tuple(i != unit for i in range(F)))])
        expected = h[..., unit, None] * np.asarray(plain.down.kernel.get_value(), np.float64)[unit]
        np.testing.assert_allclose(dense - run(without, x)[0], expected, atol=1e-6)


def test_units_that_are_not_chosen_are_zero_in_up_and_in_what_down_reads_and_out_of_scope_nothing_is():
    taps = tuple(Probe(site, lambda h, ctx, site=site: {site: Stat(h.dense() if hasattr(h, "dense") else h)})
                 for site in ("mlp.up_out", "mlp.down"))  # fmt: skip
    mask = np.arange(F) % 3 == 0
    net, sparsify = build("swiglu", [Given(tuple(mask.tolist()))]), jnp.arange(6)[None].repeat(2, 0) >= 4
    y, stats = run(net, tokens(), sparsify=sparsify, probes=taps)
    for site in ("mlp.up_out", "mlp.down"):
        value = np.asarray(stats[site][site].value)
        assert (value[:, 4:] != 0).all(axis=(0, 1)).tolist() == mask.tolist() and (value[:, :4] != 0).all()
    np.testing.assert_array_equal(y[:, :4], run(build("swiglu"), tokens())[0][:, :4])


def test_all_units_chosen_is_the_dense_network_bit_for_bit():
    np.testing.assert_array_equal(run(build("swiglu", [Given((True,) * F)]), tokens())[0], run(build("swiglu"), tokens())[0])


def test_a_selector_that_reads_the_gate_is_refused_where_there_is_none_and_two_are_refused_anywhere():
    plain = tiny_model(layers=1, activation="relu2").config
    with pytest.raises(ConfigError, match=r"model.neurons\[0\].*selects by the gate"):
        check_sites(dataclasses.replace(plain, neurons=("blocks.*.mlp=gate_threshold",)))
    with pytest.raises(ConfigError, match="expected one selector"):
        check_sites(dataclasses.replace(plain, neurons=("blocks.*.mlp=predictor:4|predictor:4",)))
    with pytest.raises(ConfigError, match="no FFN has this site"):
        check_sites(dataclasses.replace(plain, neurons=("blocks.*.attn=predictor:4",)))


def test_the_serving_form_selects_the_same_units():
    model = tiny_model(layers=1)
    thresholds = {"blocks.0.mlp.neurons.threshold": jnp.float32(0.3)}
    ruled = model.with_rules(thresholds, neurons=("blocks.*.mlp=gate_threshold",))
    batch = {"tokens": np.arange(24).reshape(2, 12) * 7 % 264}
    forms = (ruled.structure, ruled.values), serving_form(ruled.structure, ruled.values), (model.structure, model.values)
    ours, served, dense = (jax.jit(lambda v, s=s: merge(s, v)(batch)[0])(v) for s, v in forms)
    np.testing.assert_allclose(served, ours, atol=1e-5)
    assert np.abs(served - dense).max() > 1e-2
