"""Zeros counted inside the forward pass, against Python sets of the very tensors that the blocks multiply."""

import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsejax.compress.blocks import Blocks, taps
from sparsejax.compress.surgery import Placed, place
from sparsejax.evaluate.scope import Scope
from sparsejax.evaluate.sparsity import COVERAGE, SITES, ActivityCounter, batched_counts, coverage
from sparsejax.plugs import ConfigError
from tests.compress.tiny import tiny_model

WINDOWS = np.random.default_rng(0).integers(0, 256, (5, 24)).astype(np.int32)
UNION, BLOCKS = (1, 2, 4), (8, 128)
COUNTS = jax.jit(batched_counts, static_argnums=(1, 2))


@pytest.fixture(scope="module")
def model():
    """ReLU, two layers, a threshold at what enters the attention's output map of one of them."""
    dense = tiny_model(layers=2, activation="reglu")
    return place(dense, "inputs", {"blocks.1.attn.o": Placed("threshold", {"threshold": np.float32(0.05)})})


def sets(active):
    """Of each sequence and token, the set of its active entries."""
    return [[set(np.flatnonzero(token)) for token in sequence] for sequence in active]


def by_hand(active, first):
    """The definitions, one token at a time; active bool[B, T, F] of one layer."""
    active = active[:, first:]
    batch, length, width = active.shape
    groups = {size: [range(i, i + size) for i in range(0, batch - size + 1, size)] for size in UNION}
    found = sets(active)
    pairs = [(now, before) for row in found for before, now in zip(row[:-1], row[1:], strict=True) if now]
    blocks = {b: [any(token[i : i + b]) for row in active for token in row for i in range(0, width, b)] for b in BLOCKS}
    return {
        "zeros": 1 - active.mean(),
        "positions": 1 - active.mean(axis=(0, 2)),
        "dead": int((~active.any(axis=(0, 1))).sum()),
        "overlap": np.mean([len(now & before) / len(now) for now, before in pairs]) if pairs else np.nan,
        "union": {
            size: np.mean([len(set().union(*(found[b][t] for b in g))) for g in groups[size] for t in range(length)]) / width
            for size in UNION
        },
        "blocks": {b: np.mean(hit) for b, hit in blocks.items()},
    }


@pytest.mark.parametrize("scope", [Scope(), Scope("from:0.5", keep_first=13)], ids=lambda s: s.tokens)
def test_counts_are_those_of_the_tensors_that_the_blocks_multiply(model, scope):
    counter = ActivityCounter(24, scope=scope, union=UNION, blocks=BLOCKS)
    activity, first = counter.measure(model, WINDOWS), scope.first_sparse(24)
    assert activity.tokens == 5 * (24 - first) and list(activity.sites) == list(SITES)
    blocks, h = Blocks(model), Blocks(model).embed(WINDOWS)
    sparsify = None if scope.sparse(24) is None else np.broadcast_to(scope.sparse(24), WINDOWS.shape)
    for layer in range(2):
        h, stats = blocks.run(layer, h, probes=taps(*SITES), sparsify=sparsify)
        for name in ("attn.q", "attn.o", "mlp.down", "mlp.hidden"):
            expected = by_hand(np.asarray(stats[name]["value"].value) != 0, first)
            site = activity.sites[name]
            assert site.zero_fraction[layer] == pytest.approx(expected["zeros"], abs=1e-9)
            np.testing.assert_allclose(site.zero_fraction_position[layer], expected["positions"], atol=1e-9)
            assert site.dead_units[layer] == expected["dead"]
            assert site.overlap[layer] == pytest.approx(expected["overlap"], rel=1e-5)
            for size in UNION:
                assert site.union[size][layer] == pytest.approx(expected["union"][size], abs=1e-9)
            for block in BLOCKS:
                assert site.occupancy[block][layer] == pytest.approx(expected["blocks"][block], abs=1e-9)
    assert activity.sites["attn.o"].zero_fraction[0] == 0 < activity.sites["attn.o"].zero_fraction[1]


@settings(max_examples=12, deadline=None)
@given(
    shape=st.sampled_from([(1, 1, 1), (5, 3, 19), (4, 2, 16)]),  # few: each is compiled
    density=st.sampled_from((0.0, 0.2, 0.7, 1.0)),
    seed=st.integers(0, 99),
)
def test_unions_grow_with_the_batch_up_to_the_sum_and_ragged_blocks_count_once(shape, density, seed):
    active = np.random.default_rng(seed).random(shape) < density
    sizes = tuple(size for size in (1, 2, 4) if size <= shape[0])
    counts = jax.device_get(COUNTS(active, sizes, (8, 128)))
    share = {size: counts[f"union/{size}"].sum() / counts[f"unions/{size}"].sum() for size in sizes}
    assert share[1] == pytest.approx(active.mean())
    for size in sizes[1:]:
        groups = shape[0] // size
        joined = active[: groups * size].reshape(groups, size, *shape[1:]).any(1)
        assert share[size] == pytest.approx(joined.mean())
        assert joined.mean() <= size * active[: groups * size].mean() + 1e-9
    assert counts["blocks/8"].sum() == shape[0] * shape[1] * -(-shape[2] // 8)
    assert counts["occupied/128"].sum() == active.any(-1).sum()


def test_coverage_is_concave_from_nothing_to_everything_and_even_units_have_none_hot():
    fired = np.random.default_rng(0).pareto(1.5, (3, 37))
    curves = coverage(fired)
    assert curves.shape == (3, len(COVERAGE)) and (curves[:, 0] == 0).all()
    np.testing.assert_allclose(curves[:, -1], 1)
    assert (np.diff(curves, 2) <= 1e-12).all() and (curves >= np.array(COVERAGE) - 1e-12).all()
    np.testing.assert_allclose(coverage(np.ones((1, 40)))[0], COVERAGE)
    assert np.isnan(coverage(np.zeros((1, 8)))).all()


def test_rows_sorted_by_expert_are_counted_without_neighbours():
    model = tiny_model(layers=2, activation="reglu", feed_pattern=("moe:experts=4,k=2",))
    activity = ActivityCounter(24, union=UNION, blocks=BLOCKS).measure(model, WINDOWS)
    site = activity.sites["mlp.down"]
    assert site.overlap is None and site.union is None and site.occupancy is None and activity.codes is None
    assert activity.sites["attn.q"].union[4].shape == (2,)
    assert (site.zero_fraction > 0.3).all() and (site.zero_fraction < 0.7).all()
    assert site.zero_fraction_position.shape == (2, 24)


def test_what_cannot_be_counted_is_refused(model):
    with pytest.raises(ConfigError, match="--union = .*sizes of 1 or more"):
        ActivityCounter(24, union=(0,))
    with pytest.raises(ConfigError, match="--keep-first = 24: leaves nothing"):
        ActivityCounter(24, scope=Scope("all", 24))
    with pytest.raises(ConfigError, match="--window = 300: tiny has 128 positions"):
        ActivityCounter(300).measure(model, np.zeros((1, 300), np.int32))
    encoder = dataclasses.replace(model, config=dataclasses.replace(model.config, kind="encoder"))
    with pytest.raises(ConfigError, match="is of kind 'encoder'"):
        ActivityCounter(24).measure(encoder, WINDOWS)
