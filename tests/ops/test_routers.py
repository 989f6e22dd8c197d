import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsejax.ops import routers

B, T, E = 3, 8, 4


def logits(seed=0, shape=(B, T, E)):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def ones(shape=(B, T)):
    return jnp.ones(shape, bool)


def one_hot_routing(experts, probabilities):
    """A Routing with k = 1 and given probabilities, for the closed-form values of the losses."""
    experts = jnp.asarray(experts)[..., None]
    return routers.Routing(experts, jnp.ones(experts.shape), jnp.asarray(probabilities, jnp.float32))


def test_renorm_is_a_softmax_over_the_chosen_logits_and_divides_raw_by_its_sum():
    h = logits()
    raw, renorm = (routers.softmax_top_k(h, 2, combine) for combine in ("raw", "renorm"))
    np.testing.assert_array_equal(raw.experts, renorm.experts)
    np.testing.assert_allclose(renorm.weights, raw.weights / raw.weights.sum(-1, keepdims=True), rtol=1e-5)
    np.testing.assert_allclose(raw.weights, np.sort(jax.nn.softmax(h), axis=-1)[..., ::-1][..., :2], rtol=1e-5)


def test_all_experts_with_renorm_is_the_full_softmax():
    h = logits()
    routing = routers.softmax_top_k(h, E, "renorm")
    np.testing.assert_allclose(
        np.take_along_axis(np.asarray(routing.probabilities), np.asarray(routing.experts), -1), routing.weights, rtol=1e-5
    )


def test_routing_is_float32_from_bfloat16_logits():
    routing = routers.softmax_top_k(logits().astype(jnp.bfloat16), 2, "raw")
    assert routing.weights.dtype == routing.probabilities.dtype == jnp.float32


def test_one_expert_per_token_with_renorm_is_refused_because_the_router_would_get_no_gradient():
    with pytest.raises(ValueError, match="no gradient"):
        routers.softmax_top_k(logits(), 1, "renorm")


@pytest.mark.parametrize("k", [0, E + 1])
def test_k_outside_the_experts_is_refused(k):
    with pytest.raises(ValueError, match="1 to the number of experts"):
        routers.softmax_top_k(logits(), k, "raw")


@pytest.mark.parametrize("granularity", routers.GRANULARITY)
def test_load_balance_is_one_at_balance_and_the_number_of_experts_at_collapse(granularity):
    balanced = one_hot_routing(np.tile(np.arange(T) % E, (B, 1)), np.full((B, T, E), 1 / E))
    collapsed = one_hot_routing(np.zeros((B, T), int), np.tile(np.eye(E)[0], (B, T, 1)))
    np.testing.assert_allclose(routers.load_balance(balanced, ones(), granularity), 1.0, rtol=1e-6)
    np.testing.assert_allclose(routers.load_balance(collapsed, ones(), granularity), E, rtol=1e-6)


def test_load_balance_does_not_grow_with_k():
    uniform = jnp.zeros((B, T, E)) + 1e-6 * logits()
    for k in (1, 2, E):
        value = routers.load_balance(routers.softmax_top_k(uniform, k, "raw"), ones())
        np.testing.assert_allclose(value, 1.0, rtol=1e-3)


def test_sequence_granularity_is_the_token_weighted_mean_of_each_row_alone():
    mask = jnp.arange(T)[None] < jnp.asarray([[8], [3], [5]])
    h = logits()
    rows = [
        float(routers.load_balance(routers.softmax_top_k(h[b : b + 1], 2, "raw"), mask[b : b + 1])) for b in range(B)
    ]
    value = routers.load_balance(routers.softmax_top_k(h, 2, "raw"), mask, "sequence")
    np.testing.assert_allclose(value, np.average(rows, weights=[8, 3, 5]), rtol=1e-5)


def test_load_balance_has_the_gradient_of_the_mean_probabilities_alone():
    h = logits()
    share = np.bincount(np.asarray(routers.softmax_top_k(h, 2, "raw").experts).ravel(), minlength=E) / (B * T * 2)

    def closed_form(h):
        return E * jnp.sum(jax.nn.softmax(h).mean((0, 1)) * share)

    got = jax.grad(lambda h: routers.load_balance(routers.softmax_top_k(h, 2, "raw"), ones()))(h)
    np.testing.assert_allclose(got, jax.grad(closed_form)(h), atol=1e-7)


def test_router_z_is_the_squared_log_of_the_expert_count_at_zero_logits():
    np.testing.assert_allclose(routers.router_z(jnp.zeros((B, T, E)), ones()), np.log(E) ** 2, rtol=1e-6)


@pytest.mark.parametrize("granularity", routers.GRANULARITY)
def test_padding_counts_in_no_statistic(granularity):
    h = logits()
    mask = jnp.arange(T)[None] < jnp.asarray([[8], [3], [5]])
    poisoned = jnp.where(mask[..., None], h, 50 * logits(1))
    for h1 in (h, poisoned):
        routing = routers.softmax_top_k(h1, 2, "raw")
        found = (
            routers.load_balance(routing, mask, granularity),
            routers.router_z(h1, mask),
            routers.expert_load(routing.experts, mask, E),
        )
        expected = found if h1 is h else expected
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5)
    assert float(found[2].sum()) == 2 * 16


def test_statistics_of_a_batch_of_padding_are_finite():
    routing = routers.softmax_top_k(logits(), 2, "raw")
    assert float(routers.load_balance(routing, ~ones(), "batch")) == 0
    assert float(routers.router_z(logits(), ~ones())) == 0


def test_capacity_counts_k_rounds_up_and_stays_between_one_and_the_tokens():
    assert routers.capacity_per_expert(1.25, 7, 1, 4) == 3  # Switch: ceil(1.25 * 7 / 4)
    assert routers.capacity_per_expert(1.25, 7, 2, 4) == 5
    assert routers.capacity_per_expert(0.01, 7, 1, 4) == 1
    assert routers.capacity_per_expert(100, 7, 2, 4) == 7


def served_in_order(experts, mask, capacity):
    """Which (token, choice) pairs a queue in choice-major order serves."""
    kept, used = set(), np.zeros(E, int)
    for j in range(experts.shape[1]):
        for t in range(experts.shape[0]):
            e = experts[t, j]
            if mask[t] and used[e] < capacity:
                used[e] += 1
                kept.add((t, j))
    return kept


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, T), st.integers(1, E))
def test_capacity_dispatch_serves_first_choices_first_and_each_row_holds_its_assignment(seed, capacity, k):
    rng = np.random.default_rng(seed)
    experts = np.stack([rng.permutation(E)[:k] for _ in range(T)])
    mask = rng.random(T) < 0.8
    sent = jax.jit(routers.dispatch_with_capacity, static_argnums=(2, 3))(jnp.asarray(experts), jnp.asarray(mask), E, capacity)
    rows, assignments = np.asarray(sent.rows).reshape(T, k), np.asarray(sent.assignments)
    kept = {(t, j) for t in range(T) for j in range(k) if rows[t, j] < E * capacity}
    assert kept == served_in_order(experts, mask, capacity)
    for t, j in kept:
        assert rows[t, j] // capacity == experts[t, j]
        assert assignments[rows[t, j]] == t * k + j
    assert (assignments < T * k).sum() == len(kept)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, E))
def test_dropless_dispatch_sorts_every_assignment_by_expert_and_leaves_padding_out(seed, k):
    rng = np.random.default_rng(seed)
    experts = np.stack([rng.permutation(E)[:k] for _ in range(T)])
    mask = rng.random(T) < 0.8
    sent = jax.jit(routers.dispatch_dropless, static_argnums=2)(jnp.asarray(experts), jnp.asarray(mask), E)
    assignments, rows, groups = (np.asarray(a) for a in sent)
    np.testing.assert_array_equal(rows[assignments], np.arange(T * k))
    np.testing.assert_array_equal(groups, np.bincount(experts[mask].ravel(), minlength=E))
    counted = assignments[: groups.sum()]
    np.testing.assert_array_equal(experts.ravel()[counted], np.repeat(np.arange(E), groups))
    assert mask[counted // k].all()


def test_permuting_rows_has_the_gradient_of_the_gather():
    x = logits(shape=(6, 3))
    source, inverse = jnp.asarray([4, 6, 0, 2]), jnp.asarray([2, 4, 3, 4, 0, 4])
    weights = logits(1, (4, 3))

    def plain(x):
        return jnp.sum(weights * x.at[source].get(mode="fill", fill_value=0))

    got, expected = jax.grad(lambda x: jnp.sum(weights * routers.permute_rows(x, source, inverse)))(x), jax.grad(plain)(x)
    np.testing.assert_array_equal(got, expected)
