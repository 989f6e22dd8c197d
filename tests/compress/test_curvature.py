"""Traces, eigenvalues and pairs of a tiny decoder's loss against its Hessian written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.compress.curvature import Curvature, estimate
from sparsejax.compress.packed import with_qtensors
from sparsejax.context import Context
from sparsejax.ops.formats.spec import FormatSpec
from sparsejax.plugs import ConfigError
from sparsejax.quantized_arrays import qtensor
from tests.compress.tiny import tiny_model

TOKENS = np.random.default_rng(0).integers(0, 256, (1, 12), np.int32)
SITES = ("blocks.0.attn.k", "blocks.1.attn.v", "blocks.1.mlp.down")
WRITTEN = 2  # sites of 8 x 4 weights each, whose Hessian is written out


@pytest.fixture(scope="module")
def curvature():
    """Of a model whose predictions are not flat, so that its curvature is that of a model at work."""
    model = tiny_model(layers=2, width=8, hidden=16)
    values = jax.tree.map(lambda leaf: leaf, model.values)
    values["embed"] = jax.tree.map(lambda leaf: 8 * leaf, values["embed"])
    return Curvature(model.__class__(**{**vars(model), "values": values}), SITES)


@pytest.fixture(scope="module")
def written(curvature):
    """(Hessian, Gauss-Newton matrix) float64[64, 64] of the first two sites, from differences of gradients and of logits."""
    flat = np.stack([curvature.model.parameter(f"{site}.kernel") for site in SITES[:WRITTEN]]).reshape(-1)
    shape = curvature.model.parameter(f"{SITES[0]}.kernel").shape

    @jax.jit
    def gradient_and_logits(flat):
        def loss(flat):
            kernels = dict(curvature.kernels)
            for part, slot in zip(flat.reshape(WRITTEN, *shape), curvature.slots, strict=False):
                kernels[".".join(slot.path)] = kernels[".".join(slot.path)].at[slot.row].set(part)
            module = curvature.module(kernels, curvature.model.values)
            logits = module({"tokens": jnp.asarray(TOKENS[:, :-1])}, Context(mode="prefill"))[0][0, :, :264]
            nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.asarray(TOKENS)[0, 1:, None], axis=-1)
            return jnp.mean(nll), logits

        return jax.grad(loss, has_aux=True)(flat)

    step = 0.02 * np.eye(flat.size, dtype=np.float32)
    ends = [[gradient_and_logits(flat + sign * row) for sign in (1, -1)] for row in step]
    hessian, jacobian = (np.stack([(np.asarray(a[n], np.float64) - b[n]) / 0.04 for a, b in ends], -1) for n in (0, 1))
    p = np.asarray(jax.nn.softmax(gradient_and_logits(flat)[1]), np.float64)
    centered = jacobian - np.einsum("tv,tvn->tn", p, jacobian)[:, None]
    return hessian, np.einsum("tvn,tv,tvm->nm", centered, p, centered) / len(p)


def blocks_of(matrix):
    """[64, 64] as [site, weights, site, weights]."""
    return matrix.reshape(WRITTEN, -1, WRITTEN, len(matrix) // WRITTEN)


def traces_of(matrix):
    return np.einsum("injn->ij", blocks_of(matrix)).diagonal()


def test_the_loss_and_the_divergence_follow_changed_kernels(curvature):
    changed = {SITES[2]: 0 * curvature.model.parameter(f"{SITES[2]}.kernel")}
    assert curvature.loss(TOKENS) != curvature.loss(TOKENS, changed)
    again = Curvature(curvature.model.rebuilt(curvature.model.config, {f"{SITES[2]}.kernel": changed[SITES[2]]}), SITES)
    assert again.loss(TOKENS) == pytest.approx(curvature.loss(TOKENS, changed), rel=1e-6)
    features, head = [one.features(TOKENS) for one in (curvature, again)], curvature.model.module().logits
    p, q = (np.asarray(jax.nn.log_softmax(head(h)), np.float64) for h in features)
    found = curvature.divergence(TOKENS, features[0], changed)
    assert found == pytest.approx(np.mean(np.sum(np.exp(p) * (p - q), -1)), rel=1e-3) and found > 0.01
    assert abs(curvature.divergence(TOKENS, features[0], {})) < 1e-6


def test_hutchinsons_draws_have_the_traces_for_their_mean_and_tell_their_error(curvature, written):
    found = estimate([curvature.traces(TOKENS, seed) for seed in range(60)])
    exact = traces_of(written[0])
    assert np.all(np.abs(found.mean[:WRITTEN] - exact) < 4 * found.error[:WRITTEN])
    # Of random signs the variance is that of the entries off the diagonal; other maps' entries only add to it.
    off = blocks_of(written[0])
    for site in range(WRITTEN):
        own = off[site, :, site]
        least = np.sqrt(2 * (np.sum(own**2) - np.sum(np.diag(own) ** 2)) / 60)
        assert found.error[site] > 0.7 * least


def test_draws_of_labels_have_the_gauss_newton_trace_for_their_mean_and_are_never_negative(curvature, written):
    draws = np.stack([curvature.fisher(TOKENS, seed) for seed in range(120)])
    found = estimate(draws)
    assert (draws >= 0).all()
    assert np.all(np.abs(found.mean[:WRITTEN] - traces_of(written[1])) < 4 * found.error[:WRITTEN])


def test_power_iteration_finds_the_eigenvalue_of_each_block_and_of_a_group(curvature, written):
    for group in ([0], [1], [0, 1]):
        part = blocks_of(written[0])[np.ix_(group, range(32), group, range(32))]
        values = np.linalg.eigvalsh(part.reshape(32 * len(group), -1))
        exact = values[np.abs(values).argmax()]
        found = curvature.eigenvalue(TOKENS, group, tolerance=1e-5, most=400)
        assert found.value == pytest.approx(exact, rel=0.01) and 2 <= found.iterations <= 400
    assert curvature.eigenvalue(TOKENS, [0], most=3).iterations == 3


def test_pairs_are_the_products_of_moves_with_the_hessian_between_them(curvature, written):
    rng = np.random.default_rng(2)
    moves = {site: 0.1 * rng.normal(size=curvature.model.parameter(f"{site}.kernel").shape) for site in SITES}
    stacks = curvature.stacked(moves)
    found = np.stack([curvature.pairs(TOKENS, stacks, [site]) for site in range(3)])
    flat = np.stack([moves[site].reshape(-1) for site in SITES[:WRITTEN]])
    np.testing.assert_allclose(found[:2, :2], np.einsum("in,injm,jm->ij", flat, blocks_of(written[0]), flat), rtol=0.02)
    np.testing.assert_allclose(found, found.T, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(curvature.pairs(TOKENS, stacks, [0, 2]), found[0] + found[2], rtol=1e-3, atol=1e-6)


def test_a_single_draw_has_no_error_and_packed_kernels_no_derivatives(curvature):
    assert np.isnan(estimate(np.ones((1, 2))).error).all()
    model, kernel = curvature.model, curvature.model.parameter(f"{SITES[2]}.kernel")
    tensor = qtensor(kernel, FormatSpec.parse("int8"))
    packed = with_qtensors(model, {f"blocks.{layer}.mlp.down": tensor for layer in (0, 1)})
    with pytest.raises(ConfigError, match=f"{SITES[2]} = 'packed': has no derivatives"):
        Curvature(packed, SITES)
