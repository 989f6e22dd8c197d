import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import plugs
from sparsejax.context import Stat
from sparsejax.train.loss import score
from sparsejax.train.objectives import CrossEntropy, RouterBalance, RouterZ, ZLoss, token_count


def lm_batch(seed=0):
    rng = np.random.default_rng(seed)
    lengths = np.asarray([[6], [2], [5], [1]])
    segments = (np.arange(6)[None] < lengths).astype(np.int32)
    return {
        "targets": jnp.asarray(rng.integers(0, 7, (4, 6))),
        "weights": jnp.asarray(segments, jnp.float32),
        "segment_ids": jnp.asarray(segments),
    }


def router_stats(balance, z, tokens):
    """Two layers with a router, as stacked by the model."""
    stats = {"balance": Stat(jnp.asarray(balance), "mean"), "z": Stat(jnp.asarray(z), "mean")}
    return {"mlp.router": {**stats, "tokens": Stat(jnp.asarray(tokens))}}


@pytest.mark.parametrize("term", [CrossEntropy(), ZLoss(0.1)])
def test_microbatches_with_ragged_masks_add_up_to_the_large_batch(term):
    batch = lm_batch()
    logits = jax.random.normal(jax.random.key(0), (4, 6, 7))

    def numerator(rows):
        part = {name: value[rows] for name, value in batch.items()}
        return term.numerator(score(logits[rows], part["targets"], part["weights"]), part, {}, 0)

    whole = numerator(slice(0, 4)) / term.denominator(batch)
    parts = sum(numerator(slice(i, i + 1)) / term.denominator(batch) for i in range(4))
    np.testing.assert_allclose(parts, whole, rtol=1e-6)
    kept = np.asarray(batch["weights"]) > 0
    log_z = np.asarray(jax.nn.logsumexp(logits, axis=-1))
    nll = log_z - np.take_along_axis(np.asarray(logits), np.asarray(batch["targets"])[..., None], -1)[..., 0]
    expected = nll[kept].mean() if isinstance(term, CrossEntropy) else 0.1 * (log_z[kept] ** 2).mean()
    np.testing.assert_allclose(whole, expected, rtol=1e-5)


@pytest.mark.parametrize(("term", "name"), [(RouterBalance(0.01), "balance"), (RouterZ(0.001), "z")])
def test_a_router_term_is_its_weight_times_the_mean_over_layers(term, name):
    batch = lm_batch()
    stats = router_stats([1.0, 3.0], [2.0, 6.0], [14.0, 14.0])
    value = term.numerator(None, batch, stats, 0) / term.denominator(batch)
    np.testing.assert_allclose(value, term.weight * {"balance": 2.0, "z": 4.0}[name], rtol=1e-6)


def test_router_terms_of_microbatches_are_weighted_by_their_tokens():
    batch = lm_batch()
    parts = [{name: value[rows] for name, value in batch.items()} for rows in (slice(0, 1), slice(1, 4))]
    assert [float(token_count(part)) for part in parts] == [6, 8]
    term = RouterZ(1.0)
    stats = [router_stats([1.0], [5.0], [6.0]), router_stats([1.0], [2.0], [8.0])]
    values = [term.numerator(None, part, found, 0) for part, found in zip(parts, stats, strict=True)]
    np.testing.assert_allclose(sum(values) / term.denominator(batch), (6 * 5 + 8 * 2) / 14, rtol=1e-6)


def test_an_encoder_decoder_counts_the_tokens_of_both_sides_and_images_count_as_examples():
    segments = jnp.asarray([[1, 1, 0]])
    assert float(token_count({"segment_ids": segments, "encoder_segment_ids": segments})) == 4
    assert float(token_count({"images": jnp.zeros((5, 8, 8, 1)), "weights": jnp.ones(5)})) == 5


@pytest.mark.parametrize("name", ["router_balance", "router_z"])
def test_a_router_term_without_a_mixture_of_experts_is_refused_by_name(name):
    with pytest.raises(plugs.ConfigError, match=f"'{name}' needs a router"):
        plugs.resolve("objective", name).numerator(None, lm_batch(), {"mlp.hidden": {}}, 0)


@pytest.mark.parametrize("text", ["z_loss:-1", "router_balance:inf", "router_z:weight=-1e-3"])
def test_a_weight_that_is_negative_or_infinite_is_refused(text):
    with pytest.raises(plugs.ConfigError, match="must be finite and not negative"):
        plugs.resolve("objective", text)
