"""The context: site globs, keys by layer and site, probes, stages."""

import itertools

import jax
import jax.numpy as jnp
import pytest

from sparsejax.context import Context, Probe, Stat, merge_stats, site_matches


@pytest.mark.parametrize(
    "glob, site, matches",
    [
        ("blocks.*.mlp.down", "blocks.3.mlp.down", True),
        ("blocks.*.mlp.down", "blocks.3.mlp.experts.down", False),
        ("blocks.**", "blocks.3.mlp.experts.down", True),
        ("**.{q,k}", "decoder.blocks.0.cross.k", True),
        ("**.{q,k}", "decoder.blocks.0.cross.v", False),
        ("blocks.*.mlp.{down,experts.down}", "blocks.0.mlp.experts.down", True),
        ("blocks.1.attn.q", "blocks.11.attn.q", False),
        ("blocks.1.attn.q", "blocks.1xattn.q", False),
        ("blocks.*", "decoder.blocks.0", False),
    ],
)
def test_a_glob_names_whole_sites(glob, site, matches):
    assert site_matches(glob, site) is matches


def test_keys_differ_by_layer_and_site_and_repeat_exactly():
    ctx = Context(rng=jax.random.key(0))
    keys = {
        (layer, site): tuple(jax.random.key_data(ctx._replace(layer=layer).key(site)).tolist())
        for layer, site in itertools.product(range(3), ("attn", "mlp.router"))
    }
    assert len(set(keys.values())) == 6
    assert keys[1, "attn"] == tuple(jax.random.key_data(ctx._replace(layer=1).key("attn")).tolist())


def test_only_the_probes_of_a_site_measure_it():
    def mean(tensor, ctx):
        return {"mean": Stat(jnp.mean(tensor), "mean")}

    ctx = Context(probes=(Probe("mlp.*", mean), Probe("attn.out", lambda tensor, ctx: {"max": Stat(jnp.max(tensor), "max")})))
    found = ctx.measure("mlp.hidden", jnp.arange(4.0))
    assert set(found["mlp.hidden"]) == {"mean"} and float(found["mlp.hidden"]["mean"].value) == 1.5
    assert ctx.measure("residual", jnp.ones(2)) == {}
    both = merge_stats(found, {"mlp.hidden": {"other": Stat(jnp.ones(()))}, "x": {}})
    assert set(both["mlp.hidden"]) == {"mean", "other"}


def test_a_boundary_is_reached_from_its_stage_on_and_always_when_serving():
    assert not Context(stage=0).reached(100) and Context(stage=100).reached(100) and Context().reached(10**9)


def test_padding_is_masked_and_absent_segments_mask_nothing():
    assert Context(segment_ids=jnp.asarray([[1, 2, 0]])).token_mask.tolist() == [[True, True, False]]
    assert Context().token_mask is None
