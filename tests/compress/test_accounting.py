"""Realised sparsity against masks counted in numpy, and bytes against counts by hand."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import plugs
from sparsejax.arrays import LowRank, QuantizedActivation, SparseActivation, Sum
from sparsejax.compress import accounting
from sparsejax.compress.blocks import Blocks, taps
from sparsejax.compress.surgery import Placed, place
from sparsejax.evaluate.scope import Scope
from sparsejax.evaluate.scoring import Row, Scorer
from sparsejax.models.sizes import linear_shapes
from sparsejax.nnx_compat import weight
from sparsejax.plugs import ConfigError
from tests.evaluate.tiny_model import random_model

D, F, V, LAYERS, LENGTH = 16, 24, 264, 2, 48
ATTENTION, FFN = D * 16 + 2 * D * 8 + 16 * D, 3 * D * F


@plugs.register("neuron_selector", "test_positive_gate")
@dataclasses.dataclass(frozen=True)
class PositiveGate:
    """Hidden units whose gate is positive; `all_maps`: as if it were known before the gate."""

    all_maps: bool = False
    reads_gate = True

    @property
    def skips(self):
        return ("gate", "up") if self.all_maps else ("up",)

    def __call__(self, x, gate_out, ctx):
        return gate_out > 0


@plugs.register("weight_op", "test_low_rank")
@dataclasses.dataclass(frozen=True)
class AddLowRank:
    """w + a b with room for 4 ranks."""

    def parameters(self, shape, axes, key):
        a, b = jnp.zeros((shape[-2], 4)), jnp.zeros((4, shape[-1]))
        return {"a": weight(a, (axes[-2], None), "adapter"), "b": weight(b, (None, axes[-1]), "adapter")}

    def __call__(self, arrays, w, ctx):
        return Sum(w, LowRank(arrays["a"], arrays["b"]))


def rows(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [Row(rng.integers(0, 256, length), 1) for length in lengths]


def measured(model, scored, scope=Scope(), batch=0):
    scorer = Scorer(model, batch, scope, accounting.meter(model.config))
    scorer.score(scored)
    return accounting.sparsity(model.config, scorer.measured())


def thresholded(model, threshold, sites=("attn.q", "mlp.down")):
    plan = {
        f"blocks.{layer}.{site}": Placed("threshold", {"threshold": jnp.float32(threshold)})
        for layer in range(LAYERS)
        for site in sites
    }
    return place(model, "inputs", plan)


def zeros_by_hand(model, scored, site, first):
    """[L]: zeros of a site over the inputs from `first` on, one row at a time without padding."""
    blocks, zeros, count = Blocks(model), np.zeros(LAYERS), 0
    for row in scored:
        inputs = row.tokens[None, :-1]
        sparse = jnp.arange(inputs.shape[1])[None] >= first
        h = blocks.embed(jnp.asarray(inputs))
        for layer in range(LAYERS):
            h, stats = blocks.run(layer, h, probes=taps(site), sparsify=sparse)
            tensor = np.asarray(stats[site]["value"].value)[0, first:]
            zeros[layer] += (tensor == 0).mean(axis=-1).sum()
        count += inputs.shape[1] - first
    return zeros / count


def test_only_tokens_in_scope_count_and_padding_never_does():
    model, keep_first = thresholded(random_model(), 0.3), 5
    scored = rows([33, 20])
    found = measured(model, scored, Scope(keep_first=keep_first), batch=3)
    assert found.tokens == sum(len(row.tokens) - 1 - keep_first for row in scored)
    for site in ("attn.q", "mlp.down"):
        np.testing.assert_allclose(found.sites[site], zeros_by_hand(model, scored, site, keep_first), atol=2e-6)
        assert found.sites[site].min() > 0.02
    assert all(not found.sites[site].any() for site in ("attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.up"))
    by_hand = sum(
        size * found.sites[site.split(".", 2)[2]][int(site.split(".")[1])]
        for site, size in ((site, shape[0] * shape[1]) for site, shape in linear_shapes(model.config).items())
    )
    assert found.model == pytest.approx(by_hand / (LAYERS * (ATTENTION + FFN)))


def test_a_model_without_sparsity_has_exactly_none():
    found = measured(random_model(), rows([17]))
    assert found.model == 0 and all(not shares.any() for shares in found.sites.values())


def test_what_a_selector_drops_saves_the_outputs_that_it_says():
    dense = random_model()
    shares = {}
    for spec in ("test_positive_gate", "test_positive_gate:all_maps=true"):
        model = place(dense, "neurons", {f"blocks.{layer}.mlp": Placed(spec) for layer in range(LAYERS)})
        found = measured(model, rows([25]))
        np.testing.assert_allclose(found.sites["mlp.up"], found.sites["mlp.down"], atol=1e-6)
        assert 0.3 < found.sites["mlp.down"].min() < 0.7
        shares[spec] = found.sites["mlp.gate"], found.sites["mlp.up"]
    (before, _), (gate, up) = shares.values()
    assert not before.any()
    np.testing.assert_array_equal(gate, up)


def test_dropped_inputs_and_dropped_outputs_of_a_map_save_together():
    model = place(random_model(), "neurons", {f"blocks.{layer}.mlp": Placed("test_positive_gate") for layer in range(LAYERS)})
    both = thresholded(model, 0.5, ("mlp.up", "mlp.gate"))
    scored = rows([30])
    found = measured(both, scored)
    blocks = Blocks(both)
    h = blocks.embed(jnp.asarray(scored[0].tokens[None, :-1]))
    for layer in range(LAYERS):
        h, tensors = blocks.tensors(layer, h, "mlp.up", "mlp.up_out")
        kept_in, kept_out = (np.mean(np.asarray(tensors[site]) != 0, axis=-1) for site in ("mlp.up", "mlp.up_out"))
        assert found.sites["mlp.up"][layer] == pytest.approx(1 - np.mean(kept_in * kept_out), abs=2e-6)


def test_bytes_are_those_counted_by_hand():
    dense = random_model()
    norms = (2 * LAYERS + 1) * D
    by_hand = 4 * (LAYERS * (ATTENTION + FFN) + norms + V * D)  # the tied table is the head; learned positions are looked up
    assert accounting.bytes_per_token(dense) == (by_hand, 0, 0)

    shares = {name: np.zeros(LAYERS) for name in accounting.MAPS}
    shares["mlp.down"][:] = 0.5
    shares["attn.q"][1] = 0.25
    realised = accounting.Sparsity(shares, {name: np.ones(LAYERS, np.int64) for name in shares}, 1.0)
    saved = 4 * (0.5 * LAYERS * F * D + 0.25 * D * 16)
    assert accounting.bytes_per_token(dense, realised) == (by_hand - saved, 0, saved)

    a, b = np.zeros((D, 4), np.float32), np.zeros((4, F), np.float32)
    a[:, :3], b[:3] = 1, 1  # three ranks of four
    arrays = {"a": jnp.asarray(a), "b": jnp.asarray(b)}
    ranked = place(dense, "weights", {"blocks.0.mlp.up": Placed("test_low_rank", arrays)})
    fitted = thresholded(ranked, 0.1, ("mlp.down",))
    found = accounting.bytes_per_token(fitted)
    extra = 4 * (3 * (D + F) + LAYERS)
    assert found == (by_hand + extra, extra, 0)


def test_zeros_in_weights_are_counted_apart():
    model = random_model()
    kernel = model.parameter("blocks.1.mlp.up.kernel").at[: D // 2].set(0)
    pruned = model.rebuilt(model.config, {"blocks.1.mlp.up.kernel": kernel})
    assert accounting.weight_zeros(pruned) == pytest.approx(D // 2 * F / (LAYERS * (ATTENTION + FFN)))
    assert accounting.bytes_per_token(pruned) == accounting.bytes_per_token(model)


def test_a_meter_changes_no_score():
    model = thresholded(random_model(), 0.3)
    plain, metered = (Scorer(model, meter=one).score(rows([20, 31])).nll for one in (None, accounting.meter(model.config)))
    np.testing.assert_array_equal(plain, metered)


def test_what_is_neither_a_network_nor_a_plain_mixture_of_them_is_refused_by_name():
    config = random_model().config
    with pytest.raises(ConfigError, match="feed_pattern = .'spark'"):
        accounting.meter(dataclasses.replace(config, feed_pattern=("spark",)))
    mixed = dataclasses.replace(config, feed_pattern=("moe:experts=4,k=2",))
    selected = dataclasses.replace(mixed, neurons=("blocks.*.mlp.experts=test_positive_gate",))
    with pytest.raises(ConfigError, match="neurons = 'blocks.0.mlp.experts'"):
        accounting.meter(selected)


def test_zeros_of_rounding_save_nothing():
    """Coarse codes have many zeros, which every product multiplies; what a selection drops counts, rounded or not."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 16)), jnp.float32).at[..., 0].set(0)
    mask = jnp.arange(16) % 4 > 0
    codes = QuantizedActivation(jnp.zeros((2, 3, 16), jnp.int8), jnp.ones((2, 3, 1)), None, jnp.dtype("float32"))
    for tensor, share in ((x, 15 / 16), (codes, 1), (SparseActivation(x, jnp.broadcast_to(mask, x.shape)), 12 / 16),
                          (SparseActivation(codes, jnp.broadcast_to(mask, x.shape)), 12 / 16)):  # fmt: skip
        np.testing.assert_allclose(accounting._kept_share(tensor, None)["kept"].value, share)
